"""eval.py: did it work?

    python eval.py generate --model M --adapter runs/crpo --prompts heldout.jsonl --out crpo.jsonl
    python eval.py generate --model gpt-4o --endpoint https://api.openai.com/v1 --prompts ...
    torchrun --nproc-per-node 8 -- eval.py generate ...            # the same file, sooner
    python eval.py score    --responses base.jsonl crpo.jsonl --out results.json
    python eval.py noveltybench --responses base.jsonl crpo.jsonl --out nb.json
    python eval.py human sheet --responses base.jsonl crpo.jsonl --out sheet.csv
    python eval.py human tally --sheets sheet.*.csv --key sheet.key.json --out human.json
    python eval.py paper --data rated.jsonl --model M --out paper  # all of it, from the ratings on
    python eval.py sweep --data rated.jsonl --model M --out paper  # each signal, several lambdas

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

noveltybench counts how many of the first k responses to a prompt say different things, and what
they are worth to a user (arXiv 2504.05228); it reads and writes that benchmark's files. human asks
people. paper and sweep run the commands of the five files one after the other, each once, and put
what came out into a report.
"""

import argparse
import csv
import io
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import crpo
import data
import scores
import sft

# --------------------------------------------------------------------------------------------------
# Generating: a model at hand
# --------------------------------------------------------------------------------------------------

# What --decoding calls the settings, and their values that leave nothing out.
SETTINGS = {"t": "temperature", "p": "top_p", "k": "top_k", "min_p": "min_p"}
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
# The paper's four. Temperature 0 takes the likeliest token.
DECODINGS = (
    PLAIN | {"temperature": 0.7, "top_p": 0.95},
    PLAIN | {"temperature": 0.9, "top_p": 0.99},
    PLAIN | {"temperature": 0.7, "top_k": 50},
    PLAIN | {"temperature": 0.8, "top_p": 0.97},
)


def generate(
    lm: scores.LanguageModel,
    prompts: Sequence[data.Messages],
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
        raise data.UserError(
            f"a prompt of {longest} tokens leaves no room in {lm.name}, which takes {lm.context}"
        )
    limit = min(max_new_tokens, lm.context - longest)
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    width = max(1, batch_size // D)
    batches = [order[at : at + width] for at in range(0, len(order), width)]
    batches = [batch for batch in batches if any(k not in done for k in batch)]

    def answer(batch):
        seeds = [[seed, s, *scores.content_key(prompts[k])] for k in batch for s in range(D)]
        noise = [np.random.default_rng(s).random((limit, 2), np.float32) for s in seeds]
        drawn = sample(lm, [ids[k] for k in batch], decodings, np.stack(noise))
        texts = lm.encoder.tokenizer.batch_decode(drawn, skip_special_tokens=True)
        return [(k, tidy(texts[n * D : (n + 1) * D])) for n, k in enumerate(batch) if k not in done]

    def share():
        rank, world = scores.processes()
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
    lm: scores.LanguageModel, ids: list[list[int]], decodings: Sequence[dict], noise: np.ndarray
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
    prompts: Sequence[data.Messages],
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
        raise data.UserError("OPENAI_API_KEY: it holds what no key does, a line break perhaps")
    chats = [[{"role": role, "content": text} for role, text in prompt] for prompt in prompts]
    todo = [k for k in range(len(prompts)) if k not in done]

    def body(k, s):
        filters = {
            name: decodings[s][name]
            for name in ("top_p", "top_k", "min_p")
            if decodings[s][name] != PLAIN[name]
        }
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
            raise data.UserError(f"--endpoint {endpoint}: {why}")
        if turn == 2:
            tqdm.write(f"no answer so far, trying on: {why}", file=sys.stderr)
        if turn + 1 == TRIES or stop.wait(pause(turn, after)):
            raise data.UserError(f"--endpoint {endpoint}: no answer in {turn + 1} tries; {why}")


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
    scores.join_processes()
    prompts = data.read_prompts(args.prompts, *args.split)
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
        lm, _ = scores.load_with_adapter(args.model, args.adapter, scores.pick_dtype(args.dtype))
        answered = generate(lm, *what, args.batch_size, args.seed, done)
    blank = write_responses(args.out, about, prompts, decodings, begun, answered)
    print(f"saved {args.out}: {len(asked):,} prompts, {blank:,} blank responses left out")


def check_files(read: Sequence[str], written: Sequence[str | Path | None]) -> None:
    """UserError if two of these are one file: what is read would be replaced, or counted twice."""
    places = Counter(Path(path).resolve() for path in (*read, *written) if path)
    for path in (*read, *written):
        if path and places[Path(path).resolve()] > 1:
            raise data.UserError(f"{path}: this command names that file twice; name another")


def ends_in(*endings: str) -> Callable[[str], str]:
    """An argparse type: a file name that ends in one of these."""

    def parse(text: str) -> str:
        if not text.lower().endswith(endings):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a name in {' or '.join(endings)}")
        return text

    return parse


def check_generate_flags(args) -> None:
    if args.samples % len(args.decoding):
        raise data.UserError(
            f"--samples {args.samples}: expected a multiple of {len(args.decoding)}, the number "
            "of decodings"
        )
    if args.endpoint and args.adapter:
        raise data.UserError("--adapter: not with --endpoint, whose server has it or has it not")
    if args.endpoint and scores.processes()[1] > 1:
        raise data.UserError("--endpoint: one process asks it; raise --concurrency instead")
    check_files([args.prompts], [args.out])
    if Path(args.out).exists() and not (args.overwrite or args.resume):
        raise data.UserError(
            f"--out {args.out}: it exists; add --resume to go on with it, --overwrite to replace "
            "it, or name another"
        )


def read_begun(
    path: str, about: dict, prompts: Container[data.Messages], decodings: Sequence[dict]
) -> dict[data.Messages, list[dict]]:
    """The rows of a file that was begun, by prompt, in order; not of a prompt that may lack some.

    That is the last one, if it has fewer rows than samples: the rows of others that are missing
    were blank. UserError: a row that the same command would not have written.
    """
    begun: dict[data.Messages, list[dict]] = defaultdict(list)
    places = defaultdict(lambda: iter(decodings))
    torn = Path(path).read_bytes().rpartition(b"\n")[2]
    if torn[:10] != b'{"model": '[: len(torn)]:
        raise data.UserError(
            f"--resume {path}: its last line was not begun by generate; name another"
        )
    for where, row in data.read_jsonl(path, torn=True):
        prompt = data.parse_messages(row.get("prompt"), "prompt", where, data.PROMPT_EXAMPLE)
        same = {key: row.get(key) == value for key, value in about.items()}
        same["prompt"] = prompt in prompts
        same["decoding"] = row.get("decoding") in places[prompt]  # behind the row before
        for key, agrees in same.items():
            if not agrees:
                raise data.UserError(
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
    prompts: dict[data.Messages, dict],
    decodings: Sequence[dict],
    begun: dict[data.Messages, list[dict]],
    answered: Iterator[tuple[int, list[str]]],
) -> int:
    """Write what there is, then the rows of each prompt as they come; return how many are blank.

    A file is replaced once there is an answer, and by then every process has read the old one.
    """
    first, kept = scores.processes()[0] == 0, [row for rows in begun.values() for row in rows]
    asked, D, written = list(prompts), len(decodings), len(kept)
    bar = tqdm(total=len(asked) * D, initial=len(begun) * D, desc="responses", disable=not first)
    with closing(answered), bar:
        for turn, (k, texts) in enumerate(answered):
            to = about | prompts[asked[k]] | {"prompt": data.prompt_column(asked[k])}
            both = zip(texts, decodings, strict=True)
            rows = [to | {"response": text, "decoding": made} for text, made in both if text]
            if first and turn == 0:
                data.write_jsonl(path, kept)
            if first:
                data.append_jsonl(path, *rows)
            written += len(rows)
            bar.update(D)
    return len(asked) * D - written


def parse_decoding(text: str) -> dict[str, float]:
    """An argparse type: t=0.7,p=0.95 and the like, as one of DECODINGS."""
    kinds = {"t": data.number(float, 0, 100), "p": data.number(float, 1e-6, 1)}
    kinds |= {"k": data.number(int, 0), "min_p": data.number(float, 0, 1)}
    made = dict(PLAIN)
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise argparse.ArgumentTypeError(
                f"{part!r}: expected t=, p=, k= or min_p= and a number, as in t=0.7,p=0.95"
            )
        made[SETTINGS[key]] = kinds[key](value)
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
    add_sampling_flags(command.add_argument_group("sampling"))
    scores.add_dtype_flag(command)


def add_sampling_flags(command) -> None:
    whole = data.number(int, 1)
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
        "--seed",
        type=data.number(int, 0, 2**32),
        default=42,
        help="of the draws (default: %(default)s)",
    )


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------

THREE = ("novelty", "diversity", "surprise")
# What is told beside the four signals: length, and how much the responses to a prompt repeat.
BESIDE = ("words", "distinct-1", "distinct-2", "duplicates")


@dataclass
class Cell:
    """What is measured of the responses that one run of a model gave to one prompt.

    values: {measure: its mean over them}. decoding: "" for all the run's responses together.
    """

    model: str
    run: str
    decoding: str
    task: str
    prompt: data.Messages
    responses: int
    values: dict[str, float] = field(default_factory=dict)


def short(made) -> str:
    """A decoding as `--decoding` has it: t=0.7,p=0.95."""
    if made is None:
        return "as given"
    given = made if isinstance(made, dict) else {"temperature": made}
    found = {key: given.get(name, PLAIN[name]) for key, name in SETTINGS.items()}
    if not all(isinstance(value, int | float) for value in found.values()):
        return json.dumps(made)
    left = {key: value for key, value in found.items() if value != PLAIN[SETTINGS[key]]}
    return ",".join(f"{key}={value:g}" for key, value in left.items()) or "t=1"


def repetition(texts: Sequence[str]) -> dict[str, float]:
    """The measures BESIDE of the responses to a prompt.

    distinct-n: different n-grams / all n-grams (Li et al. 2016); duplicates: the share of responses
    that are, letter for letter, one that came before.
    """
    tokens = [scores.running_words(text) for text in texts]
    found = {"words": float(np.mean([len(row) for row in tokens]))}
    for n in (1, 2):
        grams = [gram for row in tokens for gram in zip(*(row[k:] for k in range(n)), strict=False)]
        found[f"distinct-{n}"] = len(set(grams)) / max(len(grams), 1)
    return found | {"duplicates": 1 - len(set(texts)) / len(texts)}


def measure(
    samples: Sequence[data.Sample],
    signals: Sequence[str],
    scorers: scores.Scorers,
    by_decoding: bool = False,
) -> list[Cell]:
    """A cell for each (model, run, task, prompt), and for each decoding if so asked."""
    groups: dict[tuple, list[data.Sample]] = defaultdict(list)
    for sample in samples:
        model = str(sample.row.get("model", "human"))
        run = str(sample.row.get("run", model))
        decoding = short(sample.row.get("decoding")) if by_decoding else ""
        groups[model, run, decoding, sample.task, sample.prompt].append(sample)
    pools = [
        scores.Pool(
            prompt,
            [sample.response for sample in group],
            np.ones(len(group), bool),
            np.array([sample.score for sample in group]),
        )
        for (*_, prompt), group in groups.items()
    ]
    cells = [
        Cell(*key, len(pool.texts), repetition(pool.texts))
        for key, pool in zip(groups, pools, strict=True)
    ]
    for signal in signals:
        for cell, found in zip(cells, scores.SIGNALS[signal].function(pools, scorers), strict=True):
            cell.values[signal] = float(np.mean(found))
    return cells


def by_prompt(cells: Sequence[Cell], name: str) -> dict[str, dict[data.Messages, float]]:
    """{task: {prompt: a measure}}, averaged over runs."""
    runs: dict[str, dict[data.Messages, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        runs[cell.task][cell.prompt].append(cell.values[name])
    return {
        task: {prompt: float(np.mean(values)) for prompt, values in prompts.items()}
        for task, prompts in runs.items()
    }


def average(values: dict[str, dict[data.Messages, float]]) -> float:
    """Over the prompts of a task, then over tasks."""
    return float(np.mean([np.mean(list(prompts.values())) for prompts in values.values()]))


REPLICATES = 10_000  # of the bootstrap


def prompt_weights(P: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of P prompts counts: all once, then in each replicate of the bootstrap.

    A replicate draws P - 1 prompts and scales them up to P: so a mean has the variance it should
    however few prompts there are, where P draws fall short by 1 / P (Rao and Wu 1988). Yet of
    normal means over 4, 8, 16 or 40 prompts, 82, 89, 93 or 94 % lie in their 95 % intervals; and
    one prompt has none.
    """
    drawn = rng.multinomial(P - 1, [1 / P] * P, REPLICATES if P > 1 else 0)
    return np.vstack([np.ones(P), drawn * P / max(P - 1, 1)])  # [1 + replicates, P]


def estimate(values: np.ndarray) -> tuple[float | None, list[float] | None]:
    """The first of `values`, and its 95 % interval over the others; None where undefined."""
    there = values[np.isfinite(values)]
    if not np.isfinite(values[0]):
        return None, None
    bounds = np.quantile(there[1:], (0.025, 0.975)).tolist() if len(there) > 1 else None
    return float(values[0]), bounds


def bootstrap(values: dict[str, dict[data.Messages, float]]) -> list[float] | None:
    """The 95 % percentile interval of `average`, the prompts of each task drawn anew.

    The tasks are given, their prompts a sample. A task of one prompt adds no uncertainty, for none
    can be seen; None if all are. The draws are the same whatever is averaged.
    """
    rng = np.random.default_rng(0)
    tasks = [np.array(list(prompts.values())) for prompts in values.values()]
    means = [prompt_weights(len(task), rng) @ task / len(task) for task in tasks]
    return estimate(sum(means) / len(means))[1]


def summarise(cells: Sequence[Cell], task: str, signals: Sequence[str]) -> dict:
    """A row of the table: means, intervals `<signal>_95`, and `<signal>_runs` of several runs."""
    runs = list(dict.fromkeys(cell.run for cell in cells))
    row = {
        "model": cells[0].model,
        "task": task,
        "runs": len(runs),
        "prompts": len({(cell.task, cell.prompt) for cell in cells}),
        "responses": sum(cell.responses for cell in cells),
    }
    for name in (*signals, *BESIDE):
        values = by_prompt(cells, name)
        row[name], row[f"{name}_95"] = average(values), bootstrap(values)
        if len(runs) > 1:
            own = [[cell for cell in cells if cell.run == run] for run in runs]
            row[f"{name}_runs"] = [average(by_prompt(part, name)) for part in own]
    return row


ALL = "all tasks"


def tabulate(cells: Sequence[Cell], signals: Sequence[str]) -> list[dict]:
    """The paper's table: a row for each (model, task), and one over a model's several tasks."""
    rows = []
    for model in dict.fromkeys(cell.model for cell in cells):
        own = [cell for cell in cells if cell.model == model]
        tasks = list(dict.fromkeys(cell.task for cell in own))
        for task in tasks:
            rows.append(summarise([cell for cell in own if cell.task == task], task, signals))
        if len(tasks) > 1:
            rows.append(summarise(own, ALL, signals))
    return rows


def totals(rows: Sequence[dict]) -> list[dict]:
    """The last row of each model, which is over all its tasks."""
    return list({row["model"]: row for row in rows}.values())


# --------------------------------------------------------------------------------------------------
# The frontier of quality and diversity
# --------------------------------------------------------------------------------------------------


def undominated(points: np.ndarray) -> np.ndarray:
    """Which of n points [n, 2] no other dominates, by as much of both and more of one: [n] bool."""
    above = (points[None] >= points[:, None]).all(2) & (points[None] > points[:, None]).any(2)
    return ~above.any(1)


def hypervolume(points: np.ndarray) -> float:
    """The area of [0, 1]^2 that points [n, 2] dominate: what lies below and left of one of them."""
    area, height = 0.0, 0.0
    for x, y in sorted(points.tolist(), reverse=True):  # from the greatest x on
        area, height = area + x * max(y - height, 0), max(y, height)
    return area


def frontiers(cells: Sequence[Cell]) -> list[dict]:
    """For each model, its decodings as points (quality, diversity), and what they reach together.

    A decoding that is hotter is more diverse and worse, so a model is a curve, not a point. The
    hypervolume is the share of the box around all points that lies below the curve.
    `on_frontier`: no decoding of any model has more of both. A single response to a prompt has no
    diversity, and is left out.
    """
    cells = [cell for cell in cells if cell.responses > 1]
    if not cells:
        return []
    keys = list(dict.fromkeys((cell.model, cell.decoding) for cell in cells))
    own = [[cell for cell in cells if (cell.model, cell.decoding) == key] for key in keys]
    axes = ("quality", "diversity")
    points = np.array([[average(by_prompt(part, name)) for name in axes] for part in own])
    scaled = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-9)
    best = undominated(points)
    found = []
    for model in dict.fromkeys(model for model, _ in keys):
        rows = [k for k, key in enumerate(keys) if key[0] == model]
        shown = [
            {"decoding": keys[k][1], "quality": points[k, 0], "diversity": points[k, 1]}
            | {"on_frontier": bool(best[k])}
            for k in rows
        ]
        found.append({"model": model, "hypervolume": hypervolume(scaled[rows]), "points": shown})
    return found


# --------------------------------------------------------------------------------------------------
# The table and the figure
# --------------------------------------------------------------------------------------------------


def training_scorers(samples: Sequence[data.Sample], named: dict[str, str]) -> list[str]:
    """A sentence for each scorer that measures here what it was trained towards, by run folders."""

    def place(name):  # the same model may be named in two ways
        return str(Path(name).resolve()) if Path(name).exists() else name

    models: dict[str, dict[str, None]] = defaultdict(dict)
    folders = {
        Path(str(s.row["run"])): s.row.get("model", "human") for s in samples if "run" in s.row
    }
    for folder, model in folders.items():
        files = [beside / "config.json" for beside in (folder, folder.parent)]
        for file in filter(Path.is_file, files):  # the parent is that of OUT/merged
            try:
                trained = json.loads(file.read_text())["scorers"]
                where = {signal: {place(n) for n in trained.get(signal, ())} for signal in named}
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # of another program
            for signal, name in named.items():
                if place(name) in where[signal]:
                    models[signal][str(model)] = None
    return [
        f"{signal} is measured by {named[signal]}, which gave the training of {', '.join(who)} its "
        f"{signal}: another scorer makes the fairer test"
        for signal, who in models.items()
    ]


TOO_FEW = "95 % intervals over fewer than ten prompts are too narrow"


def doubts(cells: Sequence[Cell], rows: Sequence[dict]) -> list[str]:
    """What to keep in mind of a table: prompts that are few, or not the same for all models."""
    asked: dict[str, set] = defaultdict(set)
    for cell in cells:
        asked[cell.model].add((cell.task, cell.prompt))
    found = []
    if any(prompts != next(iter(asked.values())) for prompts in asked.values()):
        found.append("the models do not answer the same prompts; compare them with care")
    if any(row["prompts"] < 10 for row in rows):
        found.append(TOO_FEW)
    return found


def print_table(rows: Sequence[dict], signals: Sequence[str]) -> None:
    """Each signal with its interval; below, for each model, what stands beside them."""
    table = [["model", "task", "prompts", "responses", *(f"{name} (95 %)" for name in signals)]]
    for row in rows:
        counts = [f"{row[name]:,}" for name in ("prompts", "responses")]
        shown = [with_interval(row[name], row[f"{name}_95"]) for name in signals]
        table.append([row["model"], row["task"], *counts, *shown])
    print_columns(table)
    beside = [name for name in (*BESIDE, "hypervolume") if name in rows[-1]]
    table = [["model", "runs", *beside]]
    for row in totals(rows):
        numbers = ["-" if row[name] is None else f"{row[name]:.3f}" for name in beside]
        table.append([row["model"], str(row["runs"]), *numbers])
    print()
    print_columns(table)


def print_columns(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())


def digits(value: float) -> str:
    """Three of them, or a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_interval(mean: float, interval: list[float] | None) -> str:
    return digits(mean) + (f" ({digits(interval[0])} to {digits(interval[1])})" if interval else "")


COLOURS = ("#0b6e99", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#444444", "#d16ba5", "#5b8fd9")
MARKERS = "osD^vP"


def plotting():
    """matplotlib.pyplot, drawing to files; UserError where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise data.UserError(
            "a figure needs the package matplotlib: pip install matplotlib"
        ) from None
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw_panels(rows: Sequence[dict], curves: Sequence[dict], path: str) -> None:
    """The paper's figure 2: novelty, diversity and surprise against quality, with intervals.

    The dotted line in the panel of diversity is the frontier, through decodings of any model.
    """
    plt = plotting()
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.4), layout="constrained")
    for panel, signal in zip(panels, THREE, strict=True):
        for k, row in enumerate(totals(rows)):
            colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
            x, y = row["quality"], row[signal]
            for axis, name in enumerate(("quality", signal)):
                low, high = row[f"{name}_95"] or (row[name], row[name])
                ends = ([low, high], [y, y]) if axis == 0 else ([x, x], [low, high])
                panel.plot(*ends, color=colour, alpha=0.35, linewidth=1, zorder=1)
            panel.plot(x, y, marker, color=colour, markersize=7, label=row["model"], zorder=3)
        panel.set(xlabel="quality", title=signal)
        panel.grid(alpha=0.2)
        values = [row[signal] for row in totals(rows)]
        if max(values) > 5 * min(values) > 0:
            panel.set_yscale("log")
            steps = (1, 2, 5) if max(values) < 100 * min(values) else (1,)
            panel.yaxis.set_major_locator(plt.LogLocator(subs=steps))
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:,.9g}")
            panel.yaxis.set_minor_formatter(plt.NullFormatter())
    points = [point for curve in curves for point in curve["points"] if point["on_frontier"]]
    best = sorted((point["quality"], point["diversity"]) for point in points)
    x, y = np.array(best).reshape(-1, 2).T
    panels[1].plot(x, y, ".:", color="#777777", linewidth=1, label="frontier")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    save_figure(figure, path)


def save_figure(figure, path: str) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:].lower(), dpi=160)
    data.write_file(path, content.getvalue())


def read_responses(args) -> list[data.Sample]:
    """The rows of all files, of `--split` if they have one. UserError: a split has no row."""
    samples = [sample for path in args.responses for sample in data.read_samples(path)]
    for split in args.split:
        if all(sample.row.get("split") != split for sample in samples):
            raise data.UserError(f"--split {split}: no response is of it; see their 'split' column")
    return [s for s in samples if not args.split or s.row.get("split") in (None, *args.split)]


def score_command(args) -> None:
    check_files(args.responses, [args.out, args.figure])
    samples = read_responses(args)
    unrated = sum(math.isnan(sample.score) for sample in samples)
    signals = [*THREE, "quality"] if args.reward_model or not unrated else list(THREE)
    if args.figure:
        plotting()
        if "quality" not in signals:
            raise data.UserError("--figure: it is drawn against quality; name a --reward-model")
    scorers = scores.Scorers(
        args.embedder, args.surprise_model, args.reward_model, scores.pick_dtype(args.dtype)
    )
    cells = measure(samples, signals, scorers)
    rows, curves = tabulate(cells, signals), []
    if "quality" in signals:
        curves = frontiers(measure(samples, ["quality", "diversity"], scorers, by_decoding=True))
        volume = {curve["model"]: curve["hypervolume"] for curve in curves}
        for row in totals(rows):
            row["hypervolume"] = volume.get(row["model"])
    behind = {signal: scores.SIGNALS[signal].scorer for signal in signals}
    named = {
        signal: getattr(args, scorer) or "human scores"
        for signal, scorer in behind.items()
        if scorer
    }
    warnings = training_scorers(samples, named)
    results = {"scorers": named, "warnings": warnings, "rows": rows, "frontiers": curves}
    results["cells"] = [vars(cell) for cell in cells]
    data.write_file(args.out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print_table(rows, signals)
    print("\nscorers: " + ", ".join(f"{signal} {name}" for signal, name in named.items()))
    if 0 < unrated < len(samples) and not args.reward_model:
        warnings.append(f"no quality: {unrated:,} responses have no score; name a --reward-model")
    for warning in warnings + doubts(cells, rows):
        print(f"warning: {warning}")
    if args.figure:
        draw_panels(rows, curves, args.figure)
    print(f"saved {args.out}" + (f", {args.figure}" if args.figure else ""))


def add_score(commands) -> None:
    command = commands.add_parser("score", help="novelty, diversity, surprise, quality")
    command.set_defaults(call=score_command)
    command.add_argument("--responses", nargs="+", required=True, help="JSONL files of responses")
    command.add_argument(
        "--split", nargs="+", default=[], help="of rows that have a `split`, only those of these"
    )
    command.add_argument("--out", type=ends_in(".json"), required=True, help="JSON file to write")
    command.add_argument(
        "--figure",
        type=ends_in(".png", ".pdf", ".svg"),
        help="also draw it: a .png, .pdf or .svg (needs matplotlib)",
    )
    reward = "the human scores, if every response has one, or else no quality"
    scores.add_scorer_flags(
        command.add_argument_group("scorers"), scores.EMBEDDER, "google/gemma-2-27b-it", reward
    )
    scores.add_dtype_flag(command)


# --------------------------------------------------------------------------------------------------
# NoveltyBench
# --------------------------------------------------------------------------------------------------

# The benchmark (arXiv 2504.05228), its version 1.0: how many different answers do k generations
# hold, and what are they worth to a user who asks for one more with probability p each time?
PATIENCE = 0.8  # p
SAME = 0.102  # two responses are the same above this probability of the classifier
COSINE = 0.8  # or from this cosine on, where an embedder is asked instead; ours
# Rewards to u = 1..10: at these the one of the reward model that the benchmark uses, at the others
# a judge's scores, cut into ten equal parts of 10 to 50.
SKYWORK = "Skywork-Reward-Gemma-2-27B-v0.2"
SKYWORK_BINS = (-7.71875, -6.28125, -6, -5.71875, -5.5, -5, -4.375, -3.4375, -2.046875)
JUDGE_BINS = tuple(range(14, 50, 4))
GENERATIONS_EXAMPLE = (
    '{"prompt": "Name a use for a brick.", "generations": ["A door stop.", "..."]}'
)

Same = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]


@dataclass
class Answers:
    """What a model answered to one prompt, in order; its row in the file, and file:line."""

    model: str
    prompt: data.Messages
    generations: list[str]
    row: dict = field(repr=False)
    where: str


def read_answers(paths: Sequence[str]) -> list[Answers]:
    """Responses, by model and prompt in the order of the files; or the benchmark's own files.

    In those a line has a prompt with all its `generations`. UserError where a line is neither.
    """
    answers: dict[tuple, Answers] = {}
    for path in paths:
        if "generations" not in next(data.read_rows(path))[1]:
            for sample in data.read_samples(path):
                model = str(sample.row.get("model", "human"))
                own = Answers(model, sample.prompt, [], sample.row, sample.where)
                answers.setdefault((model, sample.prompt), own).generations.append(sample.response)
            continue
        for where, row in data.read_rows(path):
            own = parse_answers(path, where, row)
            first = answers.setdefault((own.model, own.prompt, str(row.get("id"))), own)
            if first is not own:
                raise data.UserError(
                    f"{where}: {own.model} answers this prompt in {first.where} too; expected all "
                    "its generations in one line"
                )
    return list(answers.values())


def parse_answers(path: str, where: str, row: dict) -> Answers:
    """A line of the benchmark's own files; a model may have said nothing there."""
    prompt = data.parse_messages(row.get("prompt"), "prompt", where, GENERATIONS_EXAMPLE)
    texts = row.get("generations")
    if not isinstance(texts, list) or not texts:
        raise data.UserError(
            f"{where}: 'generations' is {json.dumps(texts):.60}; expected a list of responses, as "
            f"in {GENERATIONS_EXAMPLE}"
        )
    for text in texts:
        if not isinstance(text, str) or text.strip():
            data.check_text(text, "generations", where, GENERATIONS_EXAMPLE)
    model = str(row.get("model") or path)
    return Answers(model, data.check_prompt(prompt, where), texts, row, where)


def shares_words(one: str, other: str) -> bool:
    """2 |words of both| >= the number of words of the longer: lower case, split at spaces."""
    a, b = one.lower().split(), other.lower().split()
    return 2 * len(set(a) & set(b)) >= max(len(a), len(b))


def is_short(one: str, other: str) -> bool:
    """Both have at most five words (or one has none): sharing words decides, no model is asked."""
    lengths = len(one.split()), len(other.split())
    return max(lengths) <= 5 or min(lengths) == 0


def equivalence(decide: Same) -> Same:
    """same(pairs): the rule for short answers, or decide(pairs), asked once for each pair."""
    known: dict[tuple[str, str], bool] = {}

    def same(pairs):
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        known.update((pair, shares_words(*pair)) for pair in new)
        long = [pair for pair in new if not is_short(*pair)]
        if long:
            known.update(zip(long, decide(long), strict=True))
        return [known[pair] for pair in pairs]

    return same


def partition_plain(generations: Sequence[str], same: Same) -> list[int]:
    """The class of each of n generations, greedily in order: the definition.

    A generation joins the first class whose first member says the same, or else founds one.
    """
    heads, classes = [], []
    for text in generations:
        found = (c for c, head in enumerate(heads) if same([(head, text)])[0])
        classes.append(next(found, len(heads)))
        if classes[-1] == len(heads):
            heads.append(text)
    return classes


def partition(lists: Sequence[Sequence[str]], same: Same) -> list[list[int]]:
    """As `partition_plain` for each of many lists, with the same comparisons in few calls.

    Round c lets the first generation without a class found class c, in all lists at once, and
    compares it with those behind it that have none either.
    """
    classes = [[-1] * len(texts) for texts in lists]
    for c in range(max(map(len, lists))):
        pairs, places = [], []
        for texts, own in zip(lists, classes, strict=True):
            if -1 in own:
                head = own.index(-1)
                own[head] = c
                rest = [i for i, known in enumerate(own) if known == -1]
                pairs += [(texts[head], texts[i]) for i in rest]
                places += [(own, i) for i in rest]
        for (own, i), equal in zip(places, same(pairs), strict=True):
            if equal:
                own[i] = c
    return classes


def firsts(classes: Sequence[int]) -> list[int]:
    """Where the first generation of each class stands."""
    return [i for i, c in enumerate(classes) if c not in classes[:i]]


def utility(classes: Sequence[int], worth: Sequence[float]) -> float:
    """(1 - p) / (1 - p^n) sum_i p^(i-1) [c_i is new] u_i over the n generations; u = worth [n].

    So it is a mean of u, 0 for repetitions, weighted by how likely the i-th is asked for. With n
    fewer than k generations the weights are still to sum to 1.
    """
    weights = PATIENCE ** np.arange(len(classes))
    return float(sum(weights[i] * worth[i] for i in firsts(classes)) / weights.sum())


def score_firsts(answers, partitions, reward_model, bins) -> list[list[int]]:
    """u = 1..10 of the first generation of each class, 0 for its repetitions: for each prompt [n].

    Only those are scored. A reward equal to a threshold of `bins` is in the lower bin.
    """
    places = [(k, i) for k, classes in enumerate(partitions) for i in firsts(classes)]
    rewards = reward_model([(answers[k].prompt, answers[k].generations[i]) for k, i in places])
    worth = [[0] * len(classes) for classes in partitions]
    for (k, i), u in zip(places, np.searchsorted(bins, rewards) + 1, strict=True):
        worth[k][i] = int(u)
    return worth


def distinct_in_orders(lists: Sequence[list[str]], same: Same, orders: int, seed: int):
    """Mean distinct [orders] of the same generations, shuffled within each prompt."""
    rng = np.random.default_rng(seed)
    shuffled = [
        [texts[i] for i in rng.permutation(len(texts))] for _ in range(orders) for texts in lists
    ]
    counts = [len(set(classes)) for classes in partition(shuffled, same)]
    return np.array(counts).reshape(orders, len(lists)).mean(1)


def stored_numbers(answers: Answers, key: str, n: int, each: str) -> list[float] | None:
    """A column of n numbers of the benchmark's file; None where it is absent."""
    values = answers.row.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != n:
        raise data.UserError(
            f"{answers.where}: {key!r} is {json.dumps(values):.60}; expected a list of {n} "
            f"numbers, one for each {each}"
        )
    return [data.check_number(value, key, answers.where, 0, 1e9) for value in values]


def recompute(own: Answers) -> dict[str, tuple[float, float]]:
    """{column: (what it holds, or nan, what it should)} of a line of the benchmark's own file.

    Distinct and utility follow from the line's partition and scores; {} without a partition.
    """
    n, row, found = len(own.generations), own.row, {}
    classes = stored_numbers(own, "partition", n, "generation")
    if classes is None:
        return {}

    def compare(key, ours):
        held = row.get(key)
        held = math.nan if held is None else data.check_number(held, key, own.where, 0, 1e9)
        found[key] = held, ours

    heads = firsts(classes)
    compare("distinct", len(heads))
    worth = stored_numbers(own, "generation_scores", n, "generation")
    if worth is not None:
        compare("utility", utility(classes, worth))
        held = stored_numbers(own, "partition_scores", len(heads), "class of 'partition'")
        if held is not None:
            pairs = zip(held, [worth[i] for i in heads], strict=True)
            found["partition_scores"] = max(pairs, key=np.ptp)
    return found


def check_stored(answers: Sequence[Answers]) -> dict | None:
    """What `recompute` finds for a model: the means, and the largest difference from what is held.

    Files of the benchmark's first version hold as `distinct` the highest class index, one less than
    the number of classes, which others hold: the nearer of the two is named and held against it.
    None where no line has a partition.
    """
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for own in answers:
        for key, both in recompute(own).items():
            found[key].append(both)
    if not found:
        return None
    columns = {key: np.array(both, float) for key, both in found.items()}  # [P, 2]
    about: dict = {"prompts": len(columns["distinct"])}
    means = {key: columns[key][:, 1].mean() for key in ("distinct", "utility") if key in columns}
    about |= {f"mean_{key}": float(mean) for key, mean in means.items()}
    gaps = {key: np.diff(both[~np.isnan(both[:, 0])])[:, 0] for key, both in columns.items()}
    if len(gaps["distinct"]):
        less = min((0, 1), key=lambda less: np.abs(gaps["distinct"] - less).sum())
        gaps["distinct"] -= less
        about["distinct_is"] = "highest class index" if less else "number of classes"
    largest = {key: float(np.abs(gap).max()) for key, gap in gaps.items() if len(gap)}
    return about | {"largest_difference": largest}


def measure_answers(
    answers: Sequence[Answers], same: Same, quality, args
) -> tuple[dict, list[dict]]:
    """A model's row of the results, and the lines of the benchmark's own file: one for each prompt.

    quality: (reward model, bins), or None. The `distinct` of the lines is the highest class index,
    as the benchmark's first version has it; that of the row is the number of classes.
    """
    lists = [own.generations for own in answers]
    partitions = partition(lists, same)
    distinct = np.array([len(set(classes)) for classes in partitions], float)
    row = {"model": answers[0].model, "prompts": len(answers)}
    row["fewer_than_k"] = sum(len(texts) < args.k for texts in lists)
    row["mean_distinct"] = float(distinct.mean())
    row["mean_distinct_interval"] = bootstrap({"": dict(enumerate(distinct))})
    if args.permutations:
        orders = distinct_in_orders(lists, same, args.permutations, args.seed)
        three = {"mean": orders.mean(), "least": orders.min(), "most": orders.max()}
        row["mean_distinct_in_orders"] = {key: float(value) for key, value in three.items()}
    lines = []
    for own, classes in zip(answers, partitions, strict=True):
        line = {"id": own.row["id"]} if "id" in own.row else {}
        line |= {"prompt": data.prompt_column(own.prompt), "model": own.model}
        line |= {"generations": own.generations, "partition": classes, "distinct": max(classes)}
        lines.append(line)
    if quality:
        for line, worth in zip(lines, score_firsts(answers, partitions, *quality), strict=True):
            classes = line["partition"]
            line["generation_scores"] = worth
            line["partition_scores"] = [worth[i] for i in firsts(classes)]
            line["utility"] = utility(classes, worth)
        utilities = np.array([line["utility"] for line in lines])
        row["mean_utility"] = float(utilities.mean())
        row["mean_utility_interval"] = bootstrap({"": dict(enumerate(utilities))})
    return row, lines


def print_novelty(rows: Sequence[dict], k: int) -> None:
    table = [["model", "prompts", "distinct (95 %)"]]
    table[0] += ["in other orders"] * ("mean_distinct_in_orders" in rows[0])
    table[0] += ["utility (95 %)"] * ("mean_utility" in rows[0])
    for row in rows:
        cells = [row["model"], f"{row['prompts']:,}"]
        cells.append(with_interval(row["mean_distinct"], row["mean_distinct_interval"]))
        if orders := row.get("mean_distinct_in_orders"):
            cells.append(with_interval(orders["mean"], [orders["least"], orders["most"]]))
        if "mean_utility" in row:
            cells.append(with_interval(row["mean_utility"], row["mean_utility_interval"]))
        table.append(cells)
    print_columns(table)
    for row in rows:
        if row["fewer_than_k"]:
            print(
                f"warning: {row['fewer_than_k']:,} of the {row['prompts']:,} prompts of "
                f"{row['model']} have fewer than {k} generations; they are measured over those "
                "they have, and can be no more distinct than that"
            )


def print_stored(rows: Sequence[dict]) -> None:
    for row in rows:
        about = row.get("stored")
        if about:
            keys = [key for key in ("distinct", "utility") if f"mean_{key}" in about]
            means = ", ".join(f"{key} {about[f'mean_{key}']:.3f}" for key in keys)
            print(
                f"stored  {row['model']}: from its own partition of {about['prompts']:,}: {means}"
            )
            gaps = ", ".join(f"{k} {gap:.2g}" for k, gap in about["largest_difference"].items())
            held = f" (`distinct` is the {about['distinct_is']})" if "distinct_is" in about else ""
            print(f"        largest difference from what it holds: {gaps or 'it holds none'}{held}")


def load_equivalence(args, texts: Sequence[str]) -> tuple[dict, Same]:
    """What the results name, and same(pairs): of --equivalence, --embedder, or shared words."""
    default = SAME if args.equivalence else COSINE
    threshold = default if args.threshold is None else args.threshold
    if args.equivalence:
        classifier = scores.Equivalence(args.equivalence)
        ids = classifier.checkpoint.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        long = sum(len(row) > classifier.limit for row in ids)
        if long:
            print(
                f"equivalence {long:,} of {len(texts):,} responses are longer than "
                f"{classifier.limit} tokens; {args.equivalence} sees no more of them"
            )
        same = equivalence(lambda pairs: classifier(pairs) > threshold)
        return {"equivalence": args.equivalence, "threshold": threshold}, same
    if args.embedder:
        vector = scores.load_embedder(args.embedder, scores.pick_dtype(args.dtype))(texts)

        def close(pairs):
            dots = np.array([vector[one] @ vector[other] for one, other in pairs])
            return dots >= threshold - 1e-6  # a text and itself, at a threshold of 1

        named = {"equivalence": f"cosine of {args.embedder}", "threshold": threshold}
        return named, equivalence(close)
    same = equivalence(lambda pairs: [shares_words(*pair) for pair in pairs])
    return {"equivalence": "shared words"}, same


def check_novelty_flags(args) -> None:
    """UserError before anything is computed, or harmed."""
    if args.threshold is not None and not (args.equivalence or args.embedder):
        raise data.UserError(
            "--threshold: it belongs to --equivalence or --embedder; name one of them"
        )
    check_files(args.responses, [args.out, args.write])
    if args.write and Path(args.write).exists() and not args.overwrite:
        raise data.UserError(f"--write {args.write}: it exists; add --overwrite, or name another")


def noveltybench_command(args) -> None:
    check_novelty_flags(args)
    models: dict[str, list[Answers]] = defaultdict(list)
    for own in read_answers(args.responses):
        models[own.model].append(own)
    stored = {model: check_stored(answers) for model, answers in models.items()}
    for answers in models.values():
        for own in answers:
            del own.generations[args.k :]
    everything = [own for answers in models.values() for own in answers]
    texts = list(dict.fromkeys(text for own in everything for text in own.generations))
    quality = None
    if args.reward_model:
        reward_model = scores.load_reward_model(args.reward_model, scores.pick_dtype(args.dtype))
        quality = (
            reward_model,
            JUDGE_BINS if isinstance(reward_model, scores.Judge) else SKYWORK_BINS,
        )
    named, same = load_equivalence(args, texts)
    if quality:
        bins = "10 to 50 in ten" if quality[1] is JUDGE_BINS else f"those of {SKYWORK}"
        named |= {"reward_model": args.reward_model, "reward_bins": bins}

    rows, lines = [], []
    for model, answers in models.items():
        row, own = measure_answers(answers, same, quality, args)
        rows.append(row | ({"stored": stored[model]} if stored[model] else {}))
        lines += own
    about = {"k": args.k, "patience": PATIENCE, "permutations": args.permutations}
    data.write_file(args.out, json.dumps(about | {"scorers": named, "rows": rows}, indent=2) + "\n")
    print_novelty(rows, args.k)
    print_stored(rows)
    print("scorers: " + ", ".join(f"{key} {value}" for key, value in named.items()))
    if quality and quality[1] is SKYWORK_BINS and Path(args.reward_model).name != SKYWORK:
        print(f"warning: the bins are those of {SKYWORK}; {args.reward_model} may need others")
    if args.write:
        data.write_jsonl(args.write, lines)
        print(f"saved {args.write}: its `distinct` is the highest class index, one less than here")
    print(f"saved {args.out}")


def add_noveltybench(commands) -> None:
    command = commands.add_parser("noveltybench", help="distinct answers and their utility")
    command.set_defaults(call=noveltybench_command)
    command.add_argument(
        "--responses",
        nargs="+",
        required=True,
        help="JSONL files of responses, or the benchmark's own with `generations`; a partition, "
        "scores, utility and distinct that those hold are checked",
    )
    command.add_argument("--out", type=ends_in(".json"), required=True, help="JSON file to write")
    command.add_argument(
        "--write",
        metavar="FILE",
        help="JSONL to write in the benchmark's own format, for a submission: prompt, generations, "
        "partition, distinct (the highest class index), generation_scores, partition_scores, "
        "utility",
    )
    command.add_argument("--overwrite", action="store_true", help="replace --write if it exists")
    whole = data.number(int, 1)
    command.add_argument(
        "--k", type=whole, default=10, help="first generations a prompt (default: %(default)s)"
    )
    models = command.add_mutually_exclusive_group()
    models.add_argument(
        "--equivalence",
        help='sequence classifier of two labels, the second of them "the same"; the benchmark\'s: '
        "yimingzhang/deberta-v3-large-generation-similarity (default: responses are the same "
        "where twice the words they share reach the length of the longer)",
    )
    models.add_argument(
        "--embedder", help="instead: the same where the cosine of an embedding reaches --threshold"
    )
    command.add_argument(
        "--threshold",
        type=data.number(float, 0, 1),
        help=f"from which on two are the same (default: {SAME} for --equivalence, {COSINE} for "
        "--embedder)",
    )
    command.add_argument(
        "--reward-model",
        help=f"behind utility; the benchmark's is Skywork/{SKYWORK}; or a folder made by "
        "scores.py judge (default: no utility)",
    )
    command.add_argument(
        "--permutations",
        type=data.number(int, 0),
        default=20,
        help="random orders of each prompt's generations to partition too, as the classes depend "
        "on the order; they ask --equivalence for more pairs (default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        type=data.number(int, 0, 2**32),
        default=42,
        help="of the orders (default: %(default)s)",
    )
    scores.add_dtype_flag(command)


# --------------------------------------------------------------------------------------------------
# Human evaluation
# --------------------------------------------------------------------------------------------------

SCALE = 5  # a rating is a whole number from 1, not at all, to this, very much
QUESTIONS = {
    "novelty": "Is it different from what most people would write?",
    "surprise": "Is it unexpected?",
    "quality": "Is it a good answer: fitting, clear, well put?",
    "creativity": "All in all, is it creative?",
}
LETTERS = "bcdfghjkmnpqrstv"  # sixteen that spell no word
PRIOR = 0.5  # wins that each of two models has over the other before anyone has rated them


@dataclass
class Item:
    """What a rater judges at a time, with a model's name for each response drawn that reads so."""

    prompt: str
    response: str
    models: list[str]


def prompt_text(prompt: data.Messages) -> str:
    """A prompt as a rater reads it: one user turn as it is, several turns under their roles."""
    if len(prompt) == 1:
        return prompt[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in prompt)


def item_id(prompt: str, response: str) -> str:
    """Letters that follow from the text alone, and so tell no more than the rater reads anyway.

    No digits: a spreadsheet would take 12345e67 for a number.
    """
    return "".join(LETTERS[byte % 16] for byte in scores.content_key(prompt, response)[:10])


def choose_prompts(
    there: Sequence[data.Messages], wanted: Sequence[str], rng: np.random.Generator
) -> list[data.Messages]:
    """`wanted` says how many prompts, or has a part of the text of each."""
    if len(wanted) == 1 and wanted[0].isdecimal():
        if not 1 <= int(wanted[0]) <= len(there):
            raise data.UserError(
                f"--prompts {wanted[0]}: there are {len(there):,} prompts with --per-prompt "
                "responses of each model; ask for at least one and no more than these"
            )
        return [there[k] for k in rng.choice(len(there), int(wanted[0]), replace=False)]
    for part in wanted:
        if not any(part in prompt_text(prompt) for prompt in there):
            raise data.UserError(
                f"--prompts {part!r}: it is in none of the {len(there):,} prompts with "
                "--per-prompt responses of each model"
            )
    return [prompt for prompt in there if any(part in prompt_text(prompt) for part in wanted)]


def draw_items(
    samples: Sequence[data.Sample],
    models: Sequence[str] | None,
    wanted: Sequence[str],
    each: int,
    seed: int,
) -> dict[str, Item]:
    """What to rate, by id, in the order of the sheet: `each` responses of each model to a prompt.

    A response that was drawn twice, of one model or of two, is one item. The order is random, and
    that of the files does not enter it, so that neither tells who wrote what.
    """
    answers: dict[data.Messages, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        answers[sample.prompt][str(sample.row.get("model", "human"))].append(sample.response)
    there = sorted({model for answer in answers.values() for model in answer})
    for model in models or ():
        if model not in there:
            raise data.UserError(f"--models {model!r}: no response is of it; there are {there}")
    models = sorted(set(models or there))
    if len(models) < 2:
        raise data.UserError(f"all responses are of {models[0]!r}; expected two models to compare")
    full = sorted(p for p in answers if all(len(answers[p][name]) >= each for name in models))
    rng = np.random.default_rng(seed)
    items = {}
    for prompt in choose_prompts(full, wanted, rng):
        drawn = defaultdict(list)
        for model in models:
            for text in rng.choice(sorted(answers[prompt][model]), each, replace=False):
                drawn[str(text)].append(model)
        for text in rng.permutation(sorted(drawn)):
            item = Item(prompt_text(prompt), str(text), drawn[text])
            items[item_id(item.prompt, item.response)] = item
    return items


def not_a_formula(text: str) -> str:
    """A text that no spreadsheet takes for a formula: an apostrophe in front, if it might."""
    return "'" + text if text[0] in "=+-@\t\r'" else text


def make_sheet(items: dict[str, Item], questions: dict[str, str], name: str) -> tuple[str, str]:
    """The sheet as CSV, which Excel takes for UTF-8 by its first character, and as a page."""
    shown = {key: (not_a_formula(i.prompt), not_a_formula(i.response)) for key, i in items.items()}
    rows = [[key, *texts] for key, texts in shown.items()]
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(["item", "prompt", "response", *questions])
    writer.writerows([*row, *[""] * len(questions)] for row in rows)
    filling = {"name": name, "questions": questions, "scale": SCALE, "rows": rows}
    filling["store"] = scores.content_key(questions, rows).hex()
    # Within a script element a `<` alone could end the data
    text = json.dumps(filling).replace("<", "\\u003c")
    page = PAGE.replace("@SCALE@", str(SCALE)).replace("@DATA@", text)
    return "\ufeff" + lines.getvalue(), page


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Rating sheet</title>
<style>
  :root {
    color-scheme: light dark; --ink: #20242c; --soft: #59606d; --line: #828a98;
    --ground: #f2f3f5; --card: #fff; --mark: #1d57c4; --on-mark: #fff;
  }
  @media (prefers-color-scheme: dark) {
    :root {
      --ink: #e7e9ed; --soft: #a5adba; --line: #7b8391;
      --ground: #15171b; --card: #212429; --mark: #8fb5ff; --on-mark: #0c1c3a;
    }
  }
  html { scroll-padding: 8rem 0 4rem; }
  body { margin: 0; background: var(--ground); color: var(--ink); }
  body, input, button { font: 1rem/1.55 system-ui, sans-serif; }
  header, article { background: var(--card); }
  header {
    position: sticky; top: 0; z-index: 1; padding: .6rem max(1rem, 50% - 25rem);
    display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center;
    box-shadow: 0 1px 4px #0004;
  }
  header [role=status] { flex-basis: 100%; color: var(--soft); font-size: .9rem; }
  progress { flex: 1 1 2rem; min-width: 2rem; height: .6rem; accent-color: var(--mark); }
  #name { width: 9rem; padding: .2rem .5rem; }
  button { padding: .2rem .7rem; }
  header [role=status]:empty { margin-top: -.5rem; }
  main, footer { max-width: 50rem; margin: auto; padding: 0 1rem; }
  footer { padding-bottom: 30vh; }
  h1 { font-size: 1.5rem; margin: 1.5rem 0 0; }
  h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; white-space: pre-wrap; }
  h3 { font-size: .85rem; font-weight: normal; color: var(--soft); margin: 0; }
  article { border-radius: .6rem; padding: .9rem 1.2rem 1.1rem; margin: .9rem 0; }
  article p { font-size: 1.12rem; margin: .2rem 0 .9rem; white-space: pre-wrap; }
  article p, h2 { overflow-wrap: anywhere; }
  article div {
    display: grid; gap: .8rem 1.5rem;
    grid-template-columns: repeat(auto-fill, minmax(10.6rem, 1fr));
  }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
  dt { font-weight: 600; }
  dd { margin: 0; }
  fieldset { border: 0; margin: 0; padding: 0; display: flex; gap: .25rem; }
  legend { padding: 0; font-size: .9rem; color: var(--soft); }
  fieldset:focus-within legend { color: var(--mark); }
  label { position: relative; cursor: pointer; }
  fieldset input { position: absolute; inset: 0; margin: 0; opacity: 0; cursor: pointer; }
  fieldset span {
    display: block; width: 1.75rem; text-align: center; line-height: 1.75rem;
    border: 1px solid var(--line); border-radius: 50%;
  }
  @media (pointer: coarse) { fieldset span { width: 2.25rem; line-height: 2.25rem; } }
  label:hover span { border-color: var(--mark); }
  :checked + span { background: var(--mark); border-color: var(--mark); color: var(--on-mark); }
  :focus + span, :focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
</style>
<header>
  <label>Your name <input id="name" autocomplete="off"></label>
  <progress aria-label="Ratings given"></progress> <output></output>
  <button id="next">Next blank</button>
  <button id="save">Save</button>
  <div role="status"></div>
</header>
<main>
  <h1>Rating sheet</h1>
  <p>Please rate each response to its prompt, from 1, not at all, to @SCALE@, very much.
    A rating that you cannot give stays blank.</p>
  <dl></dl>
  <p>With the keyboard: Tab goes from question to question, a digit rates and goes on, 0 takes a
    rating back. With the mouse, a second click takes it back. Your answers stay in this browser
    until you press Start again, below the last response; Save gives you the file to send.</p>
  <noscript>This page needs JavaScript; without it, fill in the CSV file.</noscript>
</main>
<footer><button id="clear">Start again</button></footer>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const $ = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const data = JSON.parse($("#data").textContent);
const names = Object.keys(data.questions);
const plain = (text) => text.replace(/^'/, "");  // the apostrophe is for spreadsheets
const say = (text) => { $("[role=status]").textContent = text; };

function add(parent, tag, text = "", attributes = {}) {
  const node = document.createElement(tag);
  node.textContent = text;
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  return parent.appendChild(node);
}

for (const name of names) {
  add($("dl"), "dt", name);
  add($("dl"), "dd", data.questions[name]);
}
data.rows.forEach(([item, prompt, response], k) => {
  if (!k || prompt !== data.rows[k - 1][1]) add($("main"), "h2", plain(prompt), {dir: "auto"});
  const article = add($("main"), "article");
  add(article, "h3", `Response ${k + 1} of ${data.rows.length}`);
  add(article, "p", plain(response), {dir: "auto", lang: ""});
  const questions = add(article, "div");
  for (const name of names) {
    const set = add(questions, "fieldset", "", {title: data.questions[name]});
    add(set, "legend", name);
    for (let value = 1; value <= data.scale; value++) {
      const label = add(set, "label");
      add(label, "input", "", {type: "radio", name: `${item} ${name}`, value});
      add(label, "span", value);
    }
  }
});

const given = () => Object.fromEntries(all("main :checked").map((one) => [one.name, one.value]));

function keep() {
  const ratings = given();
  $("progress").max = all("fieldset").length;
  $("progress").value = Object.keys(ratings).length;
  $("output").textContent = `${$("progress").value} of ${$("progress").max}`;
  try {
    localStorage.setItem(data.store, JSON.stringify([$("#name").value, ratings]));
  } catch {
    say("This browser keeps no answers: press Save before you close the page.");
  }
}

function restore() {
  let kept = null;
  try { kept = JSON.parse(localStorage.getItem(data.store)); } catch { /* keep() says so */ }
  const [name, ratings] = kept ?? ["", {}];
  $("#name").value = name;
  for (const one of all("main input")) one.checked = ratings[one.name] === one.value;
  keep();
}

function go(set) {
  if (set) (set.querySelector(":checked") ?? set.querySelector("input")).focus();
}

function save() {
  const name = $("#name").value.trim();
  if (!name) {
    $("#name").focus();
    return say("Please write your name first: it tells your file from the others'.");
  }
  const ratings = given();
  const lines = [["item", "prompt", "response", ...names]];
  for (const row of data.rows) {
    lines.push([...row, ...names.map((asked) => ratings[`${row[0]} ${asked}`] ?? "")]);
  }
  const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
  const csv = "\ufeff" + lines.map((line) => line.map(quoted).join(",") + "\r\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv], {type: "text/csv"}));
  link.download = `${data.name}.${name.replace(/[^\p{L}\p{N}]+/gu, "-")}.csv`;
  link.click();
  say(`Saved ${link.download}, ${$("progress").max - $("progress").value} ratings blank.`);
}

let chosen = null;  // the rating under the pointer, if it was given before
$("main").onpointerdown = (event) => {
  chosen = event.target.closest("label")?.querySelector(":checked");
};
$("main").onclick = (event) => {
  if (event.target === chosen) chosen.checked = false;
  keep();
};
$("main").onkeydown = (event) => {
  const set = event.target.closest("fieldset");
  if (!set || event.ctrlKey || event.altKey || event.metaKey) return;
  const rating = [...set.querySelectorAll("input")].find((one) => one.value === event.key);
  if (rating) {
    rating.checked = true;
    go(all("fieldset")[all("fieldset").indexOf(set) + 1]);
  } else if (event.key === "0" && set.querySelector(":checked")) {
    set.querySelector(":checked").checked = false;
  }
  keep();
};
$("#name").oninput = keep;
$("#save").onclick = save;
$("#next").onclick = () => go(all("fieldset").find((set) => !set.querySelector(":checked")));
$("#clear").onclick = () => {
  if (!confirm("Remove the name and every rating from this page?")) return;
  try { localStorage.removeItem(data.store); } catch { /* nothing was kept */ }
  restore();
};
restore();
</script>
"""


def sheet_command(args) -> None:
    out = Path(args.out)
    page_path, key_path = out.with_suffix(".html"), out.with_suffix(".key.json")
    check_files(args.responses, [out, page_path, key_path])
    for path in (out, page_path, key_path):
        if path.exists() and not args.overwrite:
            raise data.UserError(f"--out {out}: {path} exists; add --overwrite, or name another")
    questions = dict(args.questions or QUESTIONS.items())
    samples = [sample for path in args.responses for sample in data.read_samples(path)]
    items = draw_items(samples, args.models, args.prompts, args.per_prompt, args.seed)
    sheet, page = make_sheet(items, questions, out.stem)
    key = {"questions": questions, "items": {name: vars(item) for name, item in items.items()}}
    data.write_file(key_path, json.dumps(key, ensure_ascii=False, indent=1) + "\n")
    data.write_file(out, sheet)
    data.write_file(page_path, page)
    prompts = {item.prompt for item in items.values()}
    models = {model for item in items.values() for model in item.models}
    ratings = len(items) * len(questions)
    print(f"{len(prompts):,} prompts, {len(models):,} models, {len(items):,} responses to rate")
    print(f"saved {out} and {page_path}: give a rater either, {ratings:,} ratings")
    print(f"saved {key_path}: who wrote what; keep it from the raters")


def read_key(path: str) -> tuple[dict[str, str], dict[str, Item], list[str], np.ndarray]:
    """The questions, the items, the M models, and which K items each had drawn: [P, M, K]."""
    drawn: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    try:
        key = json.loads(Path(path).read_text("utf-8"))
        questions = dict(key["questions"])
        items = {name: Item(**item) for name, item in key["items"].items()}
        if not all(isinstance(item.response, str) for item in items.values()):
            raise ValueError("a response is no text")
        for k, item in enumerate(items.values()):
            for model in item.models:
                drawn[item.prompt][model].append(k)
        models = sorted({model for item in items.values() for model in item.models})
        indices = [[drawn[prompt][model] for model in models] for prompt in drawn]
        return questions, items, models, np.array(indices, dtype=int)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise data.UserError(f"--key {path}: not a key of eval.py human sheet ({error})") from None


def read_sheet(path: str, questions: Iterable[str], items: dict[str, Item]) -> np.ndarray:
    """One rater's ratings [I, Q] in the order of `items`, NaN where blank.

    Comma, semicolon or tab between cells, as spreadsheets of different countries save CSV.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise data.UserError(f"{path}: cannot be read; save it as CSV in UTF-8 ({error})") from None
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    ratings = {}
    try:
        header = [name.strip() for name in next(lines, [])]
        for column in ("item", "response", *questions):
            if header.count(column) != 1:
                expected = ",".join(("item", "prompt", "response", *questions))
                raise data.UserError(f"{path}:1: not one column {column!r}; expected {expected}")
        end = lines.line_num
        for cells in lines:
            where, end = f"{path}:{end + 1}", lines.line_num
            # Spreadsheets may leave blank cells off the end of a line
            row = dict(zip(header, cells, strict=False))
            if any(cells):
                name = check_item(row, where, items)
                if name in ratings:
                    raise data.UserError(
                        f"{where}: item {name!r} a second time; remove one of the two"
                    )
                ratings[name] = [read_rating(row, question, where) for question in questions]
    except csv.Error as error:
        raise data.UserError(f"{path}:{lines.line_num}: not a line of CSV ({error})") from None
    blank = [math.nan for _ in questions]
    return np.array([ratings.get(name, blank) for name in items])


def check_item(row: dict[str, str], where: str, items: dict[str, Item]) -> str:
    """The id of the item that a line is about; UserError if its response is another one's."""
    name = row.get("item", "").strip()
    if name not in items:
        raise data.UserError(f"{where}: item {name!r} is not in the key; is that of another sheet?")
    text = row.get("response", "")
    # Some spreadsheets take the apostrophe of `not_a_formula` for their own and drop it
    if items[name].response.split() not in (text.split(), text.removeprefix("'").split()):
        raise data.UserError(
            f"{where}: the response is not that of item {name!r} in the key; if a column was "
            "sorted without the others, undo that"
        )
    return name


def read_rating(row: dict[str, str], question: str, where: str) -> float:
    text = row.get(question, "").strip()
    if text and not re.fullmatch(rf"[1-{SCALE}]([.,]0+)?", text):
        raise data.UserError(
            f"{where}: {question!r} is {text[:60]!r}; expected a whole number 1 to {SCALE}, or "
            "nothing"
        )
    return float(text[0]) if text else math.nan


def compare(ratings: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean rating [P, M], wins and games [P, M, M] from ratings [J, I] of J raters, NaN if blank.

    drawn [P, M, K]: a model's items at a prompt. Each rater who has rated a response of both
    models is a game at that prompt; a model wins the share of the pairs of their responses in which
    its own is rated higher, and half of the ties.
    """
    rated = ratings[:, drawn]  # [J, P, M, K]
    with np.errstate(invalid="ignore"):
        means = np.nansum(rated, (0, 3)) / (~np.isnan(rated)).sum((0, 3))
    P, M, _ = drawn.shape
    wins, games = np.zeros((P, M, M)), np.zeros((P, M, M))
    for own in rated:
        a, b = own[:, :, None, :, None], own[:, None, :, None, :]  # each with each: [P, M, M, K, K]
        pairs = (~np.isnan(a) & ~np.isnan(b)).sum((3, 4))
        wins += ((a > b) + 0.5 * (a == b)).sum((3, 4)) / np.maximum(pairs, 1)
        games += pairs > 0
    others = 1 - np.eye(M)
    return means, wins * others, games * others


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Maximum-likelihood log strengths [..., M], mean 0, from wins [..., M, M] of row over column.

    P(i beats j) = p_i / (p_i + p_j). The MM algorithm of Hunter (2004): with n_ij games,
        p_i <- wins of i / sum_j n_ij / (p_i + p_j)
    until nothing moves. There is a finite maximum where everybody has a win over everybody.
    """
    games = wins + wins.swapaxes(-1, -2)
    old, new = None, np.ones(wins.shape[:-1])
    while old is None or np.abs(np.log(new / old)).max() > 1e-10:
        old = new
        new = wins.sum(-1) / (games / (old[..., :, None] + old[..., None, :])).sum(-1)
        new = new / np.exp(np.log(new).mean(-1, keepdims=True))
    return np.log(new)


def krippendorff(ratings: np.ndarray) -> float:
    """The raters' agreement, ordinal alpha, from ratings [J, I], NaN if blank; NaN: undefined.

    1 is perfect, 0 what chance gives. 1 - observed / expected disagreement over pairs of ratings of
    one item, and of any; two ratings differ by (the ratings between them, half of their own
    included) squared (Krippendorff 2011).
    """
    levels = np.arange(1, SCALE + 1)
    counts = (ratings.T[:, :, None] == levels).sum(1).astype(float)  # [I, C]
    counts = counts[counts.sum(1) > 1]
    paired = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(SCALE)
    observed = (paired / (counts.sum(1) - 1)[:, None, None]).sum(0)  # [C, C]
    totals = counts.sum(0)
    rank = totals.cumsum() - totals / 2
    distance = (rank[:, None] - rank) ** 2
    expected = (np.outer(totals, totals) * distance).sum() / max(totals.sum() - 1, 1)
    return float(1 - (observed * distance).sum() / expected) if expected else math.nan


def tally(ratings: np.ndarray, models: Sequence[str], drawn: np.ndarray) -> dict:
    """What one question's ratings [J, I] say of each model, and how far the raters agree.

    The mean rating is over a prompt's ratings, then over prompts. Intervals are of the prompts:
    ratings of one prompt depend on each other, so what would other prompts have given?
    """
    means, wins, games = compare(ratings, drawn)
    weights = prompt_weights(len(drawn), np.random.default_rng(0))
    others = 1 - np.eye(len(models))
    with np.errstate(invalid="ignore"):
        mean = weights @ np.nan_to_num(means) / (weights @ ~np.isnan(means))
        rates = wins.sum(0) / games.sum(0)
    strength = bradley_terry(np.tensordot(weights, wins, 1) + PRIOR * others)
    strength[:, games.sum((0, 2)) == 0] = math.nan
    rows = []
    for m, model in enumerate(models):
        row = {"model": model, "ratings": int((~np.isnan(ratings[:, drawn[:, m]])).sum())}
        row["mean"], row["mean_interval"] = estimate(mean[:, m])
        row["strength"], row["strength_interval"] = estimate(strength[:, m])
        against = zip(models, rates[m].tolist(), strict=True)
        row["win_rates"] = {name: rate for name, rate in against if not math.isnan(rate)}
        rows.append(row)
    rows.sort(key=lambda row: -math.inf if row["strength"] is None else row["strength"])
    alpha, given = krippendorff(ratings), int((~np.isnan(ratings)).sum())
    return {
        "alpha": None if math.isnan(alpha) else alpha,
        "ratings": given,
        "blank": ratings.size - given,
        "models": rows[::-1],
    }


def print_tally(question: str, result: dict) -> None:
    def show(value, interval=None) -> str:
        return "-" if value is None else with_interval(value, interval)

    rows = result["models"]
    print(
        f"\n{question}: {result['ratings']:,} ratings, {result['blank']:,} blank, raters' "
        f"agreement (alpha) {show(result['alpha'])}"
    )
    beats = [f"beats {k}" for k, _ in enumerate(rows, 1)]
    table = [["", "model", "mean (95 %)", "strength (95 %)", *beats]]
    for k, row in enumerate(rows, 1):
        both = [show(row[name], row[f"{name}_interval"]) for name in ("mean", "strength")]
        rates = [show(row["win_rates"].get(other["model"])) for other in rows]
        table.append([str(k), row["model"], *both, *rates])
    print_columns(table)


def tally_command(args) -> None:
    questions, items, models, drawn = read_key(args.key)
    check_files([*args.sheets, args.key], [args.out])
    ratings = np.stack([read_sheet(path, questions, items) for path in args.sheets])  # [J, I, Q]
    raters = []
    for path, own in zip(args.sheets, ratings, strict=True):
        blank = int(np.isnan(own).sum())
        raters.append({"sheet": path, "ratings": own.size - blank, "blank": blank})
        print(f"{path}: {own.size - blank:,} ratings, {blank:,} blank")
    results = {}
    for q, question in enumerate(questions):
        results[question] = tally(ratings[:, :, q], models, drawn)
        print_tally(question, results[question])
    content = {"raters": raters, "prompts": len(drawn), "questions": results}
    data.write_file(args.out, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    print()
    if len(drawn) < 10:
        print(f"warning: {TOO_FEW}")
    print(f"saved {args.out}")


def question(text: str) -> tuple[str, str]:
    """An argparse type: NAME, or NAME=What the raters are asked."""
    name, _, asked = (part.strip() for part in text.partition("="))
    if not re.fullmatch(r"\w[\w -]*", name) or name in ("item", "prompt", "response"):
        raise argparse.ArgumentTypeError(
            f"{text!r} does not begin with a name of letters, such as humour=Is it funny?"
        )
    return name, asked or QUESTIONS.get(name, "")


def add_human(commands) -> None:
    human = commands.add_parser("human", help="a blinded rating sheet, and what the raters say")
    parts = human.add_subparsers(dest="part", required=True)
    sheet = parts.add_parser("sheet", help="draw responses into a CSV, a page and a key")
    sheet.set_defaults(call=sheet_command)
    sheet.add_argument("--responses", nargs="+", required=True, help="JSONL files of responses")
    sheet.add_argument(
        "--out",
        type=ends_in(".csv"),
        required=True,
        help="CSV to write; the page, .html, and the key beside it",
    )
    sheet.add_argument("--overwrite", action="store_true", help="replace files that exist")
    sheet.add_argument(
        "--models", nargs="+", help="only these; rows without `model` are human (default: all)"
    )
    sheet.add_argument(
        "--prompts",
        nargs="+",
        default=["4"],
        help="how many, drawn at random, or a part of the text of each (default: 4)",
    )
    whole = data.number(int, 1)
    sheet.add_argument(
        "--per-prompt",
        type=whole,
        default=2,
        help="responses of each model to a prompt (default: %(default)s)",
    )
    sheet.add_argument(
        "--questions",
        nargs="+",
        type=question,
        metavar="NAME[=ASKED]",
        help=f"what to rate from 1 to {SCALE} (default: {' '.join(QUESTIONS)})",
    )
    sheet.add_argument(
        "--seed", type=data.number(int, 0), default=0, help="of the draws (default: %(default)s)"
    )
    count = parts.add_parser("tally", help="means, win rates, strengths, agreement")
    count.set_defaults(call=tally_command)
    count.add_argument("--sheets", nargs="+", required=True, help="filled CSV files, one a rater")
    count.add_argument("--key", required=True, help="the key that was made with the sheet")
    count.add_argument("--out", type=ends_in(".json"), required=True, help="JSON file to write")


# --------------------------------------------------------------------------------------------------
# The whole experiment
# --------------------------------------------------------------------------------------------------

# The paper's variants as flags of crpo.py; the last one is ours.
VARIANTS = {
    "DPO": "--lambda-diversity 0",
    "CrPO-nov": "--lambda-novelty 1",
    "CrPO-div": "--lambda-diversity 1",
    "CrPO-sur": "--lambda-surprise 1",
    "CrPO-qua": "--lambda-quality 1",
    "CrPO-nov-qua": "--lambda-novelty 1 --lambda-quality 1",
    "CrPO-div-qua": "--lambda-diversity 1 --lambda-quality 1",
    "CrPO-sur-qua": "--lambda-surprise 1 --lambda-quality 1",
    "CrPO-nov-div-sur": "--lambda-novelty 1 --lambda-diversity 1 --lambda-surprise 1",
    "CrPO-cre": "--lambda-novelty 1 --lambda-diversity 1 --lambda-surprise 1 --lambda-quality 1",
    "CrPO-gated": "--combine gated",
}
SINGLE = {
    "novelty": "CrPO-nov",
    "diversity": "CrPO-div",
    "surprise": "CrPO-sur",
    "quality": "CrPO-qua",
}
HELD_OUT = ("HeldoutItem", "HeldoutTask")


@dataclass
class Stage:
    """A command of this project, without `python`, and what it leaves."""

    out: Path
    command: list

    @property
    def said(self) -> str:
        return shlex.join(["python", *map(str, self.command)])


def plan(args, variants: dict[str, str], results: Path) -> list[Stage]:
    """All stages in their order: data, scores, SFT, a run for each variant and seed, responses."""
    out = Path(args.out)
    pref, scored, judge = out / "pref.jsonl", out / "scored.jsonl", out / "judge"
    reward = args.reward_model or judge
    rated = ["--data", args.data, "--split", "Training"]
    scorers = ["--embedder", args.embedder, "--surprise-model", args.surprise_model]
    scorers += ["--reward-model", reward]

    stages = [Stage(pref, ["data.py", "pairs", *rated, "--out", pref, *args.pairs])]
    stages.append(Stage(out / "sft.jsonl", ["data.py", "sft", *rated, "--out", out / "sft.jsonl"]))
    if not args.reward_model:
        fit_judge = ["scores.py", "judge", *rated, "--embedder", args.embedder, "--out", judge]
        stages.append(Stage(judge, [*fit_judge, "--overwrite"]))
    signals = ["--signals", *scores.SIGNALS, *scorers]
    stages.append(Stage(scored, ["scores.py", "--data", pref, "--out", scored, *signals]))

    model, tuned = ["--model", args.model], out / "runs" / "SFT"
    train = ["sft.py", "--data", out / "sft.jsonl", *model, "--out", tuned, "--resume"]
    stages.append(Stage(tuned, [*train, "--seed", args.seeds[0], *args.sft]))
    runs = [("base", args.seeds[0], None), ("SFT", args.seeds[0], tuned)]
    for seed in args.seeds:
        for name, lambdas in variants.items():
            run = out / "runs" / f"{name}-{seed}"
            train = ["crpo.py", "--data", scored, *model, "--adapter", tuned, "--holdout", 0]
            train += ["--out", run, "--resume", "--seed", seed, *lambdas.split(), *args.crpo]
            stages.append(Stage(run, train))
            runs.append((name, seed, run))

    files = []
    for name, seed, run in runs:
        file = out / "responses" / f"{run.name if run else name}.jsonl"
        ask = ["eval.py", "generate", *model, *(["--adapter", run] if run else [])]
        ask += ["--name", name, "--seed", seed, "--prompts", args.data, "--split", *args.held_out]
        stages.append(Stage(file, [*ask, "--out", file, "--resume", *args.generate]))
        files.append(file)
    score = ["eval.py", "score", "--responses", *files, args.data, "--split", *args.held_out]
    return [*stages, Stage(results, [*score, "--out", results, *scorers])]


def to_do(stages: Sequence[Stage], rows: Sequence[dict], digest: str) -> list[Stage]:
    """The stages that are not done: `rows` hold those that ended well, of which data.

    UserError: what is there was made by another command, of other data, or from what is to be made
    anew. Only the last stage, which costs little, is then done again.
    """
    made, missing, stale = {row["out"]: row for row in rows}, [], []
    for stage in stages:
        row = made.get(str(stage.out))
        other = row and (row["command"], row["data"]) != (stage.said, digest)
        needs = {str(before.out) for before in missing} & set(map(str, stage.command))
        if not row or not stage.out.exists():
            missing.append(stage)
        elif other or needs:
            missing.append(stage)
            stale.append(str(stage.out))
    stale = [out for out in stale if out != str(stages[-1].out)]
    if stale:
        raise data.UserError(
            f"{', '.join(stale)}: made by another command, of other data or from what is no longer "
            "there; remove it, or name another --out"
        )
    return missing


def carry_out(stages: Sequence[Stage], args) -> list[dict]:
    """Run what is to do, and keep in DIR/stages.jsonl what is done; return that of these stages."""
    log, digest = Path(args.out) / "stages.jsonl", scores.content_hash(args.data)
    rows = [row for _, row in data.read_jsonl(log)] if log.exists() else []
    if not all({"out", "command", "data", "seconds"} <= row.keys() for row in rows):
        raise data.UserError(f"{log}: it is of another program; name another --out")
    missing = to_do(stages, rows, digest)
    print(f"{len(stages) - len(missing)} of {len(stages)} stages are done")
    for stage in missing:
        turn = f"{stages.index(stage) + 1}/{len(stages)}"
        print(f"\n[{turn}] {stage.said}", flush=True)
        began = time.perf_counter()
        status = run_stage(stage, args.nproc_per_node)
        if status:
            raise data.UserError(
                f"stage {turn} ended with status {status}; once that is mended, give the same "
                "command again, and it goes on there"
            )
        for checkpoint in sft.checkpoints(stage.out):  # of no more use, and large
            sft.remove(checkpoint)
        row = {"out": str(stage.out), "command": stage.said, "data": digest}
        rows.append(row | {"seconds": round(time.perf_counter() - began)})
        data.write_jsonl(log, rows)
    latest = {row["command"]: row for row in rows}
    return [latest[stage.said] for stage in stages]


def run_stage(stage: Stage, nproc: int) -> int:
    """Exit status of the command. One that is stopped with us is waited for: it may be saving."""
    start = [sys.executable]
    if nproc > 1 and stage.command[1] not in ("pairs", "sft", "score"):
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(nproc), "--"]
    child = subprocess.Popen([*start, scores.HERE / stage.command[0], *map(str, stage.command[1:])])
    try:
        return child.wait()
    except BaseException:  # SIGTERM, by way of SystemExit, or SIGINT
        child.terminate()
        child.wait()
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise


def check_stage_flags(args) -> None:
    """What a late stage would refuse, hours from now: its flags, and names of models."""
    generating = ["generate", "--prompts", args.data, "--out", args.out, *args.generate]
    for flag, parse, line in (
        ("--sft", sft.parse_args, ["--data", args.data, *args.sft]),
        ("--crpo", crpo.parse_args, ["--data", args.data, *args.crpo]),
        ("--generate", parse_args, generating),
    ):
        try:
            parse(line)
        except data.UserError as error:
            raise data.UserError(f"{flag}: {error}") from None
    dtype = torch.float32  # of weights that are not read here
    scorers = scores.Scorers(args.embedder, args.surprise_model, args.reward_model, dtype)
    for kind in ("embedder", "surprise_model", "reward_model"):
        scorers.get(kind)
    scores.LanguageModel(args.model, dtype)


def experiment(args, variants: dict[str, str], results: Path) -> tuple[dict, list[dict]]:
    """Run it; return what `score` found, its cells as such, and the stages."""
    splits = {str(row["split"]) for _, row in data.read_muce(args.data) if row.get("split")}
    args.held_out = [split for split in HELD_OUT if split in splits]
    if "Training" not in splits or not args.held_out:
        said = ", ".join(sorted(splits)) or "nothing"
        raise data.UserError(
            f"{args.data}: expected a column `split` that says Training of some rows and "
            f"{' or '.join(HELD_OUT)} of others; it says {said}"
        )
    args.seeds = list(dict.fromkeys(args.seeds))
    check_stage_flags(args)
    done = carry_out(plan(args, variants, results), args)
    found = json.loads(results.read_text())
    for cell in found["cells"]:
        cell["prompt"] = tuple(map(tuple, cell["prompt"]))
    return found | {"cells": [Cell(**cell) for cell in found["cells"]]}, done


def difference(cells: Sequence[Cell], name: str, ours: Sequence[str], theirs: Sequence[str]):
    """A measure of some models minus that of others: mean and interval over prompts of both."""
    mine, other = (by_prompt([c for c in cells if c.model in who], name) for who in (ours, theirs))
    paired = {
        task: {p: value - other[task][p] for p, value in prompts.items() if p in other[task]}
        for task, prompts in mine.items()
        if task in other and prompts.keys() & other[task].keys()
    }
    return average(paired), bootstrap(paired)


def claims(rows: Sequence[dict]) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """What the paper says of its models: (claim, measure, who is above, whom)."""
    mean = {
        row["model"]: row for row in totals(rows) if row["model"] not in ("human", "CrPO-gated")
    }
    for name in THREE:
        tuned = [model for model in mean if model != "base"]
        yield "tuned models are more creative than the base", name, tuned, ["base"]
    for name in THREE:
        yield "DPO alone beats the base", name, ["DPO"], ["base"]
    worst = min((m for m in mean if m != "SFT"), key=lambda m: mean[m]["quality"])
    yield "SFT is worst in quality", "quality", [worst], ["SFT"]
    for name, model in SINGLE.items():
        others = [m for m in SINGLE.values() if m in mean and m != model]
        if others:
            best = max(others, key=lambda m: mean[m][name])
            yield "of the four signals alone, each leads in its own", name, [model], [best]
    for name in THREE:
        yield "adding quality raises it", "quality", [f"{SINGLE[name]}-qua"], [SINGLE[name]]
        yield "and costs of the signal", name, [SINGLE[name]], [f"{SINGLE[name]}-qua"]
    yield "adding quality raises it", "quality", ["CrPO-cre"], ["CrPO-nov-div-sur"]
    for name in THREE:
        yield "and costs of the signal", name, ["CrPO-nov-div-sur"], ["CrPO-cre"]
    for name in THREE:
        yield "all three signals beat DPO", name, ["CrPO-nov-div-sur"], ["DPO"]


def seeds_above(row: dict, other: dict, name: str) -> list[bool]:
    """In which of its runs a model is above another, seed by seed, or above its only run."""
    mine, theirs = (one.get(f"{name}_runs", [one[name]]) for one in (row, other))
    return [a > b for a, b in zip(mine, theirs * (len(mine) // len(theirs)), strict=False)]


def verdict(mean: float, interval: list[float] | None, above: Sequence[bool]) -> str:
    """A difference counts beyond its interval over prompts, and with one sign in all seeds."""
    alike = all(above) or not any(above)
    if interval is None or interval[0] <= 0 <= interval[1] or not alike:
        return f"undecided, leans to {'yes' if mean > 0 else 'no'}"
    return "yes" if mean > 0 else "no, the opposite"


def markdown(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n\n"


def show_rows(rows: Sequence[dict], signals: Sequence[str]) -> str:
    """A table of measures: means with intervals, and of several runs their standard deviation."""

    def cell(row, name):
        runs = row.get(f"{name}_runs")
        spread = f", runs ± {np.std(runs, ddof=1):.2g}" if runs else ""
        return with_interval(row[name], row[f"{name}_95"]) + spread

    beside = [name for name in (*BESIDE, "hypervolume") if name in rows[0]]
    shown = []
    for row in rows:
        plain = ["-" if row[name] is None else f"{row[name]:.2f}" for name in beside]
        shown.append([row["model"], row["prompts"], *(cell(row, n) for n in signals), *plain])
    return markdown(("model", "prompts", *signals, *beside), shown)


def show_claims(found: dict, stated: Iterable[tuple[str, str, list[str], list[str]]]) -> str:
    rows, shown = {row["model"]: row for row in totals(found["rows"])}, []
    for claim, name, ours, theirs in stated:
        if rows.keys() >= {*ours, *theirs}:
            mean, interval = difference(found["cells"], name, ours, theirs)
            one = len(ours) == 1
            above = seeds_above(rows[ours[0]], rows[theirs[0]], name) if one else []
            compared = f"{ours[0] if one else 'all tuned models'} − {theirs[0]}"
            seeds = f"{sum(above)} of {len(above)}" if len(above) > 1 else ""
            holds = verdict(mean, interval, above)
            shown.append([claim, name, compared, with_interval(mean, interval), holds, seeds])
    head = ("claim", "measure", "difference of", "mean (95 %)", "holds", "seeds above")
    return markdown(head, shown)


def show_answer(found: dict) -> str:
    """Does the gated sum keep a better balance? Against DPO, and the sums without and with quality.

    Each in a sentence: it helps if it gains something and loses nothing, by `verdict`.
    """
    text, row_of = "", {row["model"]: row for row in totals(found["rows"])}
    for other in ("DPO", "CrPO-nov-div-sur", "CrPO-cre"):
        if not {"CrPO-gated", other} <= row_of.keys():
            continue
        stated = [("gated is above", name, ["CrPO-gated"], [other]) for name in scores.SIGNALS]
        holds = {}
        for _, name, *who in stated:
            above = seeds_above(row_of["CrPO-gated"], row_of[other], name)
            holds[name] = verdict(*difference(found["cells"], name, *who), above)
        gains = [name for name, said in holds.items() if said == "yes"]
        loses = [name for name, said in holds.items() if said == "no, the opposite"]
        helps = "helps" if gains and not loses else "trades" if gains else "does not help"
        text += (
            f"Against {other} it {helps}: it gains {' and '.join(gains) or 'nothing'} and loses "
            f"{' and '.join(loses) or 'nothing'}, beyond the 95 % interval and with every seed.\n\n"
        )
        text += show_claims(found, stated)
    return text


def about(args, found: dict, done: Sequence[dict]) -> str:
    """The head of a report: what was run, and how to read it."""
    minutes = sum(row["seconds"] for row in done) / 60
    named = ", ".join(f"{signal} by {name}" for signal, name in found["scorers"].items())
    seeds = ", ".join(map(str, args.seeds))
    text = (
        f"{args.model} on {args.data}; seeds {seeds}; {minutes:.0f} minutes. Measured: {named}. "
        "Means over the responses to a prompt, then over runs, prompts and tasks; in brackets the "
        "95 % bootstrap interval over prompts, too narrow where they are fewer than ten; ± is the "
        "standard deviation of the runs. Distinct-n is the share of n-grams that are different, "
        "and falls as responses become more; hypervolume the share of the box around all "
        "decodings' qualities and diversities that lies below a model's own.\n\n"
    )
    if found["warnings"]:
        text += "The scorers are those of the training; others make the fairer test.\n\n"
    return text


def show_commands(done: Sequence[dict], nproc: int) -> str:
    lines = [f"{row['command']}   # {row['seconds']} s" for row in done]
    text = "## Every command\n\n"
    if nproc > 1:
        text += f"Those that score, train and generate under torchrun --nproc-per-node {nproc}.\n\n"
    return text + "```\n" + "\n".join(lines) + "\n```\n"


def paper_command(args) -> None:
    out = Path(args.out)
    variants = {name: flags for name, flags in VARIANTS.items() if name in args.variants}
    found, done = experiment(args, variants, out / "results.json")
    rows = found["rows"]
    text = f"# Creative Preference Optimization\n\n{about(args, found, done)}"
    if figure(partial(draw_panels, rows, found["frontiers"], str(out / "figure.png"))):
        text += "![quality against novelty, diversity and surprise](figure.png)\n\n"
    text += "## Results\n\n" + show_rows(totals(rows), [*THREE, "quality"])
    text += "## The paper's claims\n\n" + show_claims(found, claims(rows))
    if answer := show_answer(found):
        text += "## Novelty that counts as far as quality is kept\n\n" + answer
    for task in dict.fromkeys(row["task"] for row in rows if row["task"] != ALL):
        text += f"## {task}\n\n"
        text += show_rows([row for row in rows if row["task"] == task], [*THREE, "quality"])
    data.write_file(out / "report.md", text + show_commands(done, args.nproc_per_node))
    print(f"\nsaved {out}/report.md")


def figure(draw: Callable[[], None]) -> bool:
    """Draw, if matplotlib is installed."""
    try:
        plotting()
    except data.UserError as error:
        print(f"no figure: {error}")
        return False
    draw()
    return True


def sweep_command(args) -> None:
    """Figure 3 of the paper: each signal alone, with several lambdas."""
    out, names = Path(args.out), {}
    for signal in args.signals:
        for lam in args.lambdas:
            names[signal, lam] = SINGLE[signal] + (f"-{lam:g}" if lam != 1 else "")
    variants = {"DPO": VARIANTS["DPO"]}
    variants |= {name: f"--lambda-{signal} {lam:g}" for (signal, lam), name in names.items()}
    found, done = experiment(args, variants, out / "sweep.json")
    row_of = {row["model"]: row for row in totals(found["rows"])}
    shown, curves = [], {signal: [] for signal in args.signals}
    for (signal, lam), name in names.items():
        row = row_of[name]
        spread = np.std(row.get(f"{signal}_runs", [0]), ddof=min(1, row["runs"] - 1))
        gain, interval = difference(found["cells"], signal, [name], ["DPO"])
        curves[signal].append((lam, row[signal], spread))
        shown.append([signal, f"{lam:g}", digits(row[signal]), f"{spread:.2g}"])
        shown[-1] += [with_interval(gain, interval), digits(row["quality"])]
    text = f"# Each signal alone, with several λ\n\n{about(args, found, done)}"
    base = {signal: (row_of["DPO"][signal], row_of["SFT"][signal]) for signal in args.signals}
    if figure(partial(draw_sweep, curves, base, str(out / "sweep.png"))):
        text += "![each measure against λ](sweep.png)\n\n"
    head = ("signal", "λ", "mean", "± over runs", "above DPO (95 %)", "quality")
    text += markdown(head, shown)
    most = [f"{s} {max(points, key=lambda p: p[1])[0]:g}" for s, points in curves.items()]
    text += "The paper finds most at λ = 0.5, of quality at 1. Here most is at: "
    text += ", ".join(most) + "; compare the differences with the spread over runs.\n\n"
    data.write_file(out / "sweep.md", text + show_commands(done, args.nproc_per_node))
    print(f"\nsaved {out}/sweep.md")


def draw_sweep(curves: dict[str, list[tuple]], base: dict[str, tuple], path: str) -> None:
    """For each signal: lambda against the measure of what was trained with it, DPO and SFT."""
    plt = plotting()
    size = (2.8 * len(curves), 3)
    whole, panels = plt.subplots(1, len(curves), figsize=size, layout="constrained", squeeze=False)
    for panel, (signal, points), colour in zip(panels[0], curves.items(), COLOURS, strict=False):
        lam, mean, spread = np.array(points).T
        panel.errorbar(lam, mean, spread, marker="o", color=colour, capsize=3, label="CrPO")
        for name, value, style in zip(("DPO", "SFT"), base[signal], ("--", ":"), strict=True):
            panel.axhline(value, linestyle=style, color="#777777", linewidth=1, label=name)
        panel.set(title=signal, xlabel="λ", xticks=lam)
        panel.grid(alpha=0.2)
    panels[0][-1].legend(frameon=False)
    save_figure(whole, path)


def add_experiment_flags(command) -> None:
    command.add_argument("--data", required=True, help="rated JSONL with a `split` column")
    command.add_argument("--model", default="tiny", help="name or folder (default: %(default)s)")
    command.add_argument(
        "--out", required=True, help="folder of it all; what is there is not redone"
    )
    command.add_argument(
        "--nproc-per-node",
        type=data.number(int, 1, 1024),
        default=1,
        help="processes that score, train and generate, started by torchrun (default: %(default)s)",
    )
    reward = "a judge, fitted to the human scores of the training split"
    scores.add_scorer_flags(
        command.add_argument_group("scorers"), scores.EMBEDDER, "google/gemma-2-27b-it", reward
    )
    more = command.add_argument_group("more flags for the stages, behind = and in quotes")
    for name, script, example in (
        ("pairs", "data.py pairs", "--max-pairs 4"),
        ("sft", "sft.py", "--lr 1e-4"),
        ("crpo", "crpo.py", "--gradient-checkpointing"),
        ("generate", "eval.py generate", "--max-new-tokens 64"),
    ):
        more.add_argument(
            f"--{name}",
            type=shlex.split,
            default=[],
            metavar="FLAGS",
            help=f'for {script}, as --{name}="{example}"',
        )


def add_paper(commands) -> None:
    command = commands.add_parser("paper", help="the whole experiment, from ratings to a report")
    command.set_defaults(call=paper_command)
    add_experiment_flags(command)
    command.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="NAME",
        default=list(VARIANTS),
        help=f"what to train besides SFT, of {', '.join(VARIANTS)} (default: all of them)",
    )
    add_seeds(command, [42])


def add_sweep(commands) -> None:
    command = commands.add_parser("sweep", help="each signal alone, with several lambdas")
    command.set_defaults(call=sweep_command)
    add_experiment_flags(command)
    command.add_argument(
        "--signals",
        nargs="+",
        choices=scores.SIGNALS,
        metavar="NAME",
        default=list(scores.SIGNALS),
        help=f"those to sweep, of {', '.join(scores.SIGNALS)} (default: all of them)",
    )
    command.add_argument(
        "--lambdas",
        nargs="+",
        type=data.number(float, 1e-6),
        default=[0.5, 1.0, 1.5, 2.0],
        help="weights of the signal (default: %(default)s)",
    )
    add_seeds(command, [42, 12, 92])


def add_seeds(command, seeds: list[int]) -> None:
    command.add_argument(
        "--seeds",
        nargs="+",
        type=data.number(int, 0, 2**32),
        default=seeds,
        help="a run of each variant for each of them; SFT is run once (default: %(default)s)",
    )


# --------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = data.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_generate, add_score, add_noveltybench, add_human, add_sweep, add_paper):
        add(commands)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    args.call(args)


if __name__ == "__main__":
    data.run(main)
