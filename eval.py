"""eval.py: did it work?

    python eval.py generate --model M --adapter runs/crpo --prompts heldout.jsonl --out crpo.jsonl
    python eval.py generate --model gpt-4o --endpoint https://api.openai.com/v1 --prompts ...
    torchrun --nproc-per-node 8 -- eval.py generate ...            # the same file, sooner
    python eval.py score    --responses base.jsonl crpo.jsonl --out results.json

generate samples responses to each prompt, the paper's 16: four in each of its four decoding
settings, from a model at hand or from any OpenAI-compatible server. score measures them as the
paper does (section 4 of arXiv 2505.14442), for each prompt over a model's responses Y to it, then
averages over the prompts of a task:

    novelty    mean over y in Y of 2 | DSI(y) - DSI(Y) |
    diversity  mean semantic distance over the pairs of Y
    surprise   mean perplexity of y given the prompt
    quality    mean reward

The definitions, and the models behind them, are those of scores.py. Other scorers than the ones a
model was trained with make the fairer test; the results name the ones that were used.
"""

import argparse
import json
import math
import os
import random
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (
    PROMPT_EXAMPLE,
    Messages,
    Parser,
    Sample,
    UserError,
    append_jsonl,
    number,
    parse_messages,
    prompt_column,
    read_jsonl,
    read_prompts,
    read_samples,
    run,
    write_file,
    write_jsonl,
)
from scores import (
    EMBEDDER,
    SIGNALS,
    LanguageModel,
    Pool,
    Scorers,
    add_dtype_flag,
    add_scorer_flags,
    content_key,
    join_processes,
    pick_dtype,
    processes,
)
from sft import load_with_adapter

# --------------------------------------------------------------------------------------------------
# Generating: a model at hand
# --------------------------------------------------------------------------------------------------

# The paper's four settings. Temperature 0 takes the likeliest token; 1, 0 and 0 leave out top_p,
# top_k and min_p.
DECODINGS = (
    {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": 0.0},
    {"temperature": 0.9, "top_p": 0.99, "top_k": 0, "min_p": 0.0},
    {"temperature": 0.7, "top_p": 1.0, "top_k": 50, "min_p": 0.0},
    {"temperature": 0.8, "top_p": 0.97, "top_k": 0, "min_p": 0.0},
)


def generate(
    lm: LanguageModel,
    prompts: Sequence[Messages],
    decodings: Sequence[dict[str, float]],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    done: Container[int] = (),
) -> Iterator[tuple[int, list[str]]]:
    """Sample a response to each prompt with each decoding; yield (index of the prompt, responses).

    About `batch_size` responses are drawn at a time, for prompts of like length; a response has at
    most the tokens that the model's context leaves beside the longest prompt (UserError: none). Its
    random numbers follow from the seed, its prompt and its place in `decodings` alone.
    Prompts that are `done` are not yielded; the others are drawn in the batches they would be in
    anyway, so that no rounding differs. Of several processes each draws every so-manieth batch.
    """
    ids, D = lm.encoder.prompts(prompts), len(decodings)
    longest = max(map(len, ids))
    if longest >= lm.context:
        raise UserError(
            f"a prompt of {longest} tokens leaves no room in {lm.name}, which takes {lm.context}"
        )
    limit = min(max_new_tokens, lm.context - longest)
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    width = max(1, batch_size // D)
    batches = [order[at : at + width] for at in range(0, len(order), width)]
    batches = [batch for batch in batches if any(k not in done for k in batch)]

    def answer(batch):
        seeds = [[seed, s, *content_key(prompts[k])] for k in batch for s in range(D)]
        noise = [np.random.default_rng(s).random((limit, 2), np.float32) for s in seeds]
        drawn = sample(lm, [ids[k] for k in batch], decodings, np.stack(noise))
        texts = lm.encoder.tokenizer.batch_decode(drawn, skip_special_tokens=True)
        return [(k, tidy(texts[n * D : (n + 1) * D])) for n, k in enumerate(batch) if k not in done]

    def share():
        rank, world = processes()
        for turn in range(0, len(batches), world):
            mine = answer(batches[turn + rank]) if turn + rank < len(batches) else []
            everyone = [mine] * world
            if world > 1:
                dist.all_gather_object(everyone, mine)
            for answered in everyone:
                yield from answered

    return share()


def tidy(texts: Sequence[str]) -> list[str]:
    """Without the blanks around them, and what no file of ours may hold: NUL, lone surrogates."""
    return [text.encode("utf-8", "ignore").decode().replace("\0", "").strip() for text in texts]


@torch.no_grad()
def sample(
    lm: LanguageModel, ids: list[list[int]], decodings: Sequence[dict], noise: np.ndarray
) -> list[list[int]]:
    """New ids behind each of P prompts with each of D decodings: P * D lists, without stop tokens.

    noise [P * D, limit, 2] uniform: for each token (`draw`). A prompt is read once for all its
    responses, and rows that have ended leave the batch when they are half of it.
    """
    device, D = lm.model.device, len(decodings)
    stop = torch.tensor(lm.encoder.stop_ids(), device=device)
    T, limit = max(map(len, ids)), noise.shape[1]
    left = torch.tensor([[0] * (T - len(row)) + row for row in ids], device=device)  # [P, T]
    lengths = torch.tensor([len(row) for row in ids], device=device).repeat_interleave(D)
    seen = torch.arange(T + limit, device=device) >= T - lengths[:, None]  # [P * D, T + limit]
    seen, noise = seen.long(), torch.tensor(noise, device=device)
    positions = (torch.arange(T, device=device) - T + lengths[::D, None]).clamp(min=0)
    settings = torch.tensor([settings_of(decoding) for decoding in decodings])
    settings = settings.to(device).repeat(len(ids), 1)  # [P * D, 4]

    out = lm.model.base_model(
        input_ids=left, attention_mask=seen[::D, :T], position_ids=positions, use_cache=True
    )
    cache, hidden = out.past_key_values, out.last_hidden_state[:, -1].repeat_interleave(D, 0)
    cache.batch_repeat_interleave(D)
    rows = torch.arange(len(ids) * D, device=device)  # which response each line of the cache is of
    tokens = torch.full_like(noise[..., 0], stop[0], dtype=torch.int64)  # [P * D, limit]
    for t in range(limit):
        logits = (hidden @ lm.head.T).float()  # [n, V]
        if lm.softcap:
            logits = lm.softcap * torch.tanh(logits / lm.softcap)
        if t == 0:
            logits[:, stop] = -math.inf  # a response has at least one token
        new = draw(logits, noise[rows, t], *settings[rows].T)
        tokens[rows, t] = new
        going = ~torch.isin(tokens[rows, : t + 1], stop).any(1)
        if t + 1 == limit or not going.any():
            break
        if going.sum() <= len(rows) / 2:
            rows, new = rows[going], new[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
        hidden = lm.model.base_model(
            input_ids=new[:, None],
            attention_mask=seen[rows, : T + t + 1],
            position_ids=(lengths[rows] + t)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    ends = torch.isin(tokens, stop).long()
    counts = torch.where(ends.any(1), ends.argmax(1), t + 1).tolist()
    return [row[:n] for row, n in zip(tokens.tolist(), counts, strict=True)]


def settings_of(decoding: dict[str, float]) -> tuple[float, ...]:
    """Temperature, top_p, top_k, min_p as `draw` takes them: temperature 0 is a top_k of 1."""
    temperature = decoding["temperature"]
    top_k = decoding["top_k"] if temperature else 1
    return max(temperature, 1e-6), decoding["top_p"], top_k, decoding["min_p"]


def draw_sorted(logits, noise, temperature, top_p, top_k, min_p) -> torch.Tensor:
    """Token ids [n] from logits [n, V] by inverting the distribution function at `noise` [n].

    Of the `top_k` likeliest tokens (0: all) those are kept whose likelier ones have less than
    `top_p` of the probability, and of these the ones that have at least `min_p` times the
    probability of the likeliest (arXiv 2407.01082). Of equally likely tokens the first comes first.
    All settings [n].
    """
    logits, ids = logits.sort(descending=True, stable=True)
    p = (logits / temperature[:, None]).softmax(-1)
    p *= (torch.arange(p.shape[1], device=p.device) < top_k[:, None]) | (top_k[:, None] == 0)
    below = p.cumsum(1) - p
    p *= below < top_p[:, None] * p.sum(1, keepdim=True)
    p *= p >= min_p[:, None] * p[:, :1]
    return ids.gather(1, invert(p, noise))[:, 0]


def draw(logits, noise, temperature, top_p, top_k, min_p) -> torch.Tensor:
    """As `draw_sorted`, with noise [n, 2] and hardly any sorting, which costs more than a model.

    A token drawn from the whole distribution is as good as one drawn from those that are kept, if
    it is one of them; whether it is takes a sum. Only the other rows are drawn again, sorted.
    """
    p = (logits / temperature[:, None]).softmax(-1)
    ids = invert(p, noise[:, 0])
    own, before = logits.gather(1, ids), torch.arange(p.shape[1], device=p.device) < ids
    likelier = (logits > own) | (logits == own) & before
    kept = ((p * likelier).sum(1) < top_p) & ((likelier.sum(1) < top_k) | (top_k == 0))
    kept &= p.gather(1, ids)[:, 0] >= min_p * p.amax(1)
    again = ~kept | ((top_p < 1) & (top_k > 0))  # both at once: top_p is of the top_k's sum
    settings = (x[again] for x in (temperature, top_p, top_k, min_p))
    ids = ids[:, 0]
    ids[again] = draw_sorted(logits[again], noise[again, 1], *settings)
    return ids


def invert(p: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The index [n, 1] at which the running sum of p [n, V] passes the share `noise` [n] of it."""
    reached = p.cumsum(1)
    pick = (reached <= noise[:, None] * reached[:, -1:]).sum(1, keepdim=True)
    return pick.clamp(max=p.shape[1] - 1)


# --------------------------------------------------------------------------------------------------
# Generating: a model behind an endpoint
# --------------------------------------------------------------------------------------------------

TRIES = 8  # of a request
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second try; it doubles from try to try
TIMEOUT = 600.0  # seconds without a byte
ODD = (ValueError, LookupError, TypeError, RecursionError)  # JSON that is not what it should be


class AsItComes(urllib.request.HTTPErrorProcessor):
    """A refusal is an answer too. No redirect is followed: it would take the key with it."""

    def http_response(self, request, response):
        return response

    https_response = http_response


HTTP = urllib.request.build_opener(AsItComes)


def ask(
    endpoint: str,
    model: str,
    prompts: Sequence[Messages],
    decodings: Sequence[dict[str, float]],
    max_new_tokens: int,
    concurrency: int,
    seed: int,
    done: Container[int] = (),
) -> Iterator[tuple[int, list[str]]]:
    """As `generate`, of the model that an OpenAI-compatible server calls so, prompt by prompt.

    `concurrency` requests are under way at a time. The prompts come in order, so what has been
    answered to later ones is lost if the process is killed before an earlier one is complete.
    A filter that the decoding leaves off is not sent; a server that has defaults of its own (vLLM
    takes them from the model's generation_config.json) has to be started without.
    The key is that of $OPENAI_API_KEY, and without one none is sent. UserError: the server refuses,
    or does not answer.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY: it holds what no key does, a line break perhaps")
    chats = [[{"role": role, "content": text} for role, text in prompt] for prompt in prompts]
    todo = [k for k in range(len(prompts)) if k not in done]
    off = {"top_p": 1, "top_k": 0, "min_p": 0}

    def body(k, s):
        filters = {name: decodings[s][name] for name in off if decodings[s][name] != off[name]}
        return {
            "model": model,
            "messages": chats[k],
            "max_tokens": max_new_tokens,
            "temperature": decodings[s]["temperature"],
            "seed": (seed * len(decodings) + s) % 2**31,  # what every server takes
            **filters,
        }

    def answers():
        pool, stop = ThreadPoolExecutor(concurrency), threading.Event()
        try:
            bodies = (body(k, s) for k in todo for s in range(len(decodings)))
            texts = pool.map(lambda body: chat(endpoint, key, body, stop), bodies)
            for k in todo:
                yield k, tidy(list(islice(texts, len(decodings))))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    return answers()


def chat(endpoint: str, key: str, body: dict, stop: threading.Event) -> str:
    """The answer to one request, tried again while the server is busy or away, until `stop`."""
    for turn in range(TRIES):
        status, after, content = post(f"{endpoint}/chat/completions", key, body)
        text = text_of(content) if status == 200 else None
        if text is not None:
            return text
        why = f"HTTP {status}: {message_of(content, key)}" if status else content.decode()
        if status not in (None, 200, 408, 409, 429) and status < 500:
            raise UserError(f"--endpoint {endpoint}: {why}")
        if turn == 2:
            tqdm.write(f"no answer so far, trying on: {why}", file=sys.stderr)
        if turn + 1 == TRIES or stop.wait(pause(turn, after)):
            raise UserError(f"--endpoint {endpoint}: no answer in {turn + 1} tries; {why}")


def post(url: str, key: str, body: dict) -> tuple[int | None, str, bytes]:
    """Status, Retry-After and content of the answer; without one None, and why as the content."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with HTTP.open(request, timeout=TIMEOUT) as answer:
            return answer.status, answer.headers.get("Retry-After", ""), answer.read()
    except (OSError, HTTPException, ValueError) as error:
        return None, "", (str(error) or repr(error)).encode()


def text_of(content: bytes) -> str | None:
    """What a chat completion says, "" if that is nothing; None if this is no chat completion."""
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except ODD:
        return None
    return (text or "") if isinstance(text, str | None) else None


def message_of(content: bytes, key: str) -> str:
    """The message of a server's error, or all that it says, in one line without the key."""
    text = content.decode("utf-8", "replace")
    try:
        error = json.loads(text)
        text = str((error[0] if isinstance(error, list) else error)["error"]["message"])
    except ODD:
        pass
    return " ".join(text.replace(key or "\0", "$OPENAI_API_KEY").split())[:300]


def pause(turn: int, after: str) -> float:
    """Seconds before the next try: twice those before, with jitter; more if Retry-After says so.

    That is a number of seconds or a date (RFC 9110, 10.2.3); it is believed up to an hour.
    """
    try:
        if after.isdecimal():
            asked = float(after)
        else:
            asked = parsedate_to_datetime(after).timestamp() - time.time()
    except (ValueError, OverflowError):
        asked = 0
    own = min(PAUSE * 2**turn, LONGEST_PAUSE) * random.uniform(0.5, 1)
    return max(own, min(asked, 3600))


# --------------------------------------------------------------------------------------------------
# Generating: the file of responses
# --------------------------------------------------------------------------------------------------


def generate_command(args) -> None:
    join_processes()
    prompts = read_prompts(args.prompts, *args.split)
    check_generate_flags(args)
    ran, each = args.adapter or args.model, args.samples // len(args.decoding)
    about = {"model": args.name or ran, "run": ran}
    common = {key: getattr(args, key) for key in ("max_new_tokens", "seed", "samples")}
    decodings = [decoding | common for decoding in args.decoding for _ in range(each)]
    begun = {}
    if args.resume and Path(args.out).exists():
        begun = read_begun(args.out, about, prompts, decodings)
        print(f"resume      {len(begun):,} prompts of {args.out} are done")
    asked = list(prompts)
    done = {k for k, prompt in enumerate(asked) if prompt in begun}
    what = asked, decodings, args.max_new_tokens
    if args.endpoint:
        answered = ask(args.endpoint, args.model, *what, args.concurrency, args.seed, done)
    else:
        lm, _ = load_with_adapter(args.model, args.adapter, pick_dtype(args.dtype))
        answered = generate(lm, *what, args.batch_size, args.seed, done)
    blank = write_responses(args.out, about, prompts, decodings, begun, answered)
    print(f"saved {args.out}: {len(asked):,} prompts, {blank:,} blank responses left out")


def check_generate_flags(args) -> None:
    if args.samples % len(args.decoding):
        raise UserError(
            f"--samples {args.samples}: expected a multiple of {len(args.decoding)}, the number "
            "of decodings"
        )
    if args.endpoint and args.adapter:
        raise UserError("--adapter: not with --endpoint, whose server has it or has it not")
    if args.endpoint and processes()[1] > 1:
        raise UserError("--endpoint: one process asks it; raise --concurrency instead")
    if Path(args.out).resolve() == Path(args.prompts).resolve():
        raise UserError(f"--out {args.out}: it is what --prompts names; name another")
    if Path(args.out).exists() and not (args.overwrite or args.resume):
        raise UserError(
            f"--out {args.out}: it exists; add --resume to go on with it, --overwrite to replace "
            "it, or name another"
        )


def read_begun(
    path: str, about: dict, prompts: Container[Messages], decodings: Sequence[dict]
) -> dict[Messages, list[dict]]:
    """The rows of a file that was begun, by prompt, in order; not of a prompt that may lack some.

    That is the last one, if it has fewer rows than samples: the rows of others that are missing
    were blank. UserError: a row that the same command would not have written.
    """
    begun: dict[Messages, list[dict]] = defaultdict(list)
    places = defaultdict(lambda: iter(decodings))
    torn = Path(path).read_bytes().rpartition(b"\n")[2]
    if torn[:10] != b'{"model": '[: len(torn)]:
        raise UserError(f"--resume {path}: its last line was not begun by generate; name another")
    for where, row in read_jsonl(path, torn=True):
        prompt = parse_messages(row.get("prompt"), "prompt", where, PROMPT_EXAMPLE)
        same = {key: row.get(key) == value for key, value in about.items()}
        same["prompt"] = prompt in prompts
        same["decoding"] = row.get("decoding") in places[prompt]  # behind the row before
        for key, agrees in same.items():
            if not agrees:
                raise UserError(
                    f"{where}: {key!r} is {json.dumps(row.get(key))[:200]}, which this command "
                    "would not write here; --resume takes the flags that the file was begun with"
                )
        begun[prompt].append(row)
    if begun and len(begun[prompt]) < len(decodings):
        del begun[prompt]
    return begun


def write_responses(
    path: str,
    about: dict[str, str],
    prompts: dict[Messages, str],
    decodings: Sequence[dict],
    begun: dict[Messages, list[dict]],
    answered: Iterator[tuple[int, list[str]]],
) -> int:
    """Write what there is, then the rows of each prompt as they come; return how many are blank.

    A file is replaced once there is an answer, and by then every process has read the old one.
    """
    first, kept = processes()[0] == 0, [row for rows in begun.values() for row in rows]
    asked, D, written = list(prompts), len(decodings), len(kept)
    bar = tqdm(total=len(asked) * D, initial=len(begun) * D, desc="responses", disable=not first)
    with closing(answered), bar:
        for turn, (k, texts) in enumerate(answered):
            to = about | {"task": prompts[asked[k]], "prompt": prompt_column(asked[k])}
            both = zip(texts, decodings, strict=True)
            rows = [to | {"response": text, "decoding": made} for text, made in both if text]
            if first and turn == 0:
                write_jsonl(path, kept)
            if first:
                append_jsonl(path, *rows)
            written += len(rows)
            bar.update(D)
    return len(asked) * D - written


def parse_decoding(text: str) -> dict[str, float]:
    """An argparse type: t=0.7,p=0.95 and the like, as one of DECODINGS."""
    kinds = {
        "t": ("temperature", number(float, 0, 100)),
        "p": ("top_p", number(float, 1e-6, 1)),
        "k": ("top_k", number(int, 0)),
        "min_p": ("min_p", number(float, 0, 1)),
    }
    made = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise argparse.ArgumentTypeError(
                f"{part!r}: expected t=, p=, k= or min_p= and a number, as in t=0.7,p=0.95"
            )
        name, kind = kinds[key]
        made[name] = kind(value)
    return made


def base_url(text: str) -> str:
    """An argparse type: an http(s) address without its last slash."""
    try:
        parts = urllib.parse.urlsplit(text)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        right = False
    if not right or not text.isascii() or {*text} & {*"@?# "}:
        raise argparse.ArgumentTypeError(
            "expected an address such as https://api.openai.com/v1 or http://localhost:8000/v1, "
            "and no key in it"
        )
    return text.rstrip("/")


def add_generate(commands) -> None:
    command = commands.add_parser("generate", help="sample responses to prompts")
    command.set_defaults(call=generate_command)
    command.add_argument("--prompts", required=True, help="JSONL with a `prompt` column")
    command.add_argument(
        "--split", nargs="+", default=[], help="only rows of these splits, e.g. HeldoutItem"
    )
    command.add_argument("--out", required=True, help="JSONL of responses, written as they come")
    either = command.add_mutually_exclusive_group()
    either.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    either.add_argument("--resume", action="store_true", help="go on with --out where it ends")
    command.add_argument(
        "--name",
        help="what --out calls the model; several runs of one name are its seeds "
        "(default: the name of the adapter, or of the model)",
    )
    command.add_argument(
        "--model",
        default="tiny",
        help="name or folder; with --endpoint, the server's name for it (default: %(default)s)",
    )
    command.add_argument("--adapter", help="adapter of sft.py, crpo.py or PEFT")
    command.add_argument(
        "--endpoint",
        type=base_url,
        metavar="URL",
        help="ask an OpenAI-compatible server, such as https://api.openai.com/v1 or "
        "http://localhost:8000/v1; the key is that of the environment variable OPENAI_API_KEY",
    )
    add_sampling_flags(command)
    add_dtype_flag(command)


def add_sampling_flags(command) -> None:
    whole = number(int, 1)
    command.add_argument(
        "--samples", type=whole, default=16, help="responses a prompt (default: %(default)s)"
    )
    command.add_argument(
        "--decoding",
        nargs="+",
        type=parse_decoding,
        default=DECODINGS,
        metavar="t=0.7,p=0.95",
        help="settings that share the samples evenly: temperature t (0: the likeliest token), "
        "top-p p, top-k k, min_p; without t it is 1, the others are off (default: the paper's "
        "four, t=0.7,p=0.95 t=0.9,p=0.99 t=0.7,k=50 t=0.8,p=0.97)",
    )
    command.add_argument(
        "--max-new-tokens", type=whole, default=1024, help="a response (default: %(default)s)"
    )
    command.add_argument(
        "--batch-size", type=whole, default=64, help="responses at a time (default: %(default)s)"
    )
    command.add_argument(
        "--concurrency",
        type=whole,
        default=8,
        help="requests to --endpoint at a time (default: %(default)s)",
    )
    command.add_argument(
        "--seed", type=number(int, 0, 2**32), default=42, help="of the draws (default: %(default)s)"
    )


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------


def score(samples: Sequence[Sample], signals: Sequence[str], scorers: Scorers) -> list[dict]:
    """The paper's table: a row for each (model, task), and one over a model's several tasks.

    Every signal is averaged over the responses to a prompt, then over prompts, then over tasks.
    """
    groups: dict[tuple[str, str, Messages], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[str(sample.row.get("model", "human")), sample.task, sample.prompt].append(sample)
    pools = [
        Pool(
            prompt,
            [sample.response for sample in group],
            np.ones(len(group), bool),
            np.array([sample.score for sample in group]),
        )
        for (_, _, prompt), group in groups.items()
    ]
    by_prompt = {
        signal: [float(np.mean(values)) for values in SIGNALS[signal](pools, scorers)]
        for signal in signals
    }
    members: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for k, (model, task, _) in enumerate(groups):
        members[model][task].append(k)
    rows = []
    for model, tasks in members.items():
        rows += [
            {"model": model, "task": task, "prompts": len(ks)}
            | {"responses": sum(len(pools[k].texts) for k in ks)}
            | {signal: float(np.mean([by_prompt[signal][k] for k in ks])) for signal in signals}
            for task, ks in tasks.items()
        ]
        if len(tasks) == 1:
            continue
        own = rows[-len(tasks) :]
        total = {key: sum(row[key] for row in own) for key in ("prompts", "responses")}
        means = {signal: float(np.mean([row[signal] for row in own])) for signal in signals}
        rows.append({"model": model, "task": "all tasks", **total, **means})
    return rows


def print_table(rows: Sequence[dict], signals: Sequence[str]) -> None:
    models, tasks = (max(len(row[key]) for row in rows) for key in ("model", "task"))
    head = "  ".join(f"{name:>9}" for name in ("prompts", "responses", *signals))
    print(f"{'model':{models}}  {'task':{tasks}}  {head}")
    for row in rows:
        cells = [f"{row['prompts']:9,}", f"{row['responses']:9,}"]
        cells += [f"{row[signal]:9.3f}" for signal in signals]
        print(f"{row['model']:{models}}  {row['task']:{tasks}}  {'  '.join(cells)}")


def score_command(args) -> None:
    samples = [sample for path in args.responses for sample in read_samples(path)]
    rated = not any(np.isnan(sample.score) for sample in samples)
    signals = ["novelty", "diversity", "surprise"]
    signals += ["quality"] if args.reward_model or rated else []
    dtype = pick_dtype(args.dtype)
    rows = score(
        samples, signals, Scorers(args.embedder, args.surprise_model, args.reward_model, dtype)
    )
    named = {"embedder": args.embedder, "surprise_model": args.surprise_model}
    named["reward_model"] = args.reward_model or ("human scores" if rated else None)
    write_file(args.out, json.dumps({"scorers": named, "rows": rows}, indent=2) + "\n")
    print_table(rows, signals)
    print("scorers: " + ", ".join(f"{key} {value}" for key, value in named.items() if value))
    print(f"saved {args.out}")


def add_score(commands) -> None:
    command = commands.add_parser("score", help="novelty, diversity, surprise, quality")
    command.set_defaults(call=score_command)
    command.add_argument("--responses", nargs="+", required=True, help="JSONL files of responses")
    command.add_argument("--out", required=True, help="JSON file to write")
    add_scorer_flags(command, EMBEDDER, "google/gemma-2-27b-it")
    add_dtype_flag(command)


# --------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_generate, add_score):
        add(commands)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    run(main)
