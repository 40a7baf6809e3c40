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
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from importlib.util import find_spec
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

# What stands beside the signals: length, and how much the responses to a prompt repeat.
BESIDE = ("words", "distinct-1", "distinct-2", "duplicates")
# Variants trained with quality, and the same without.
QUALITY_PAIRS = [(f"CrPO-{name}-qua", f"CrPO-{name}") for name in ("nov", "div", "sur")]
QUALITY_PAIRS += [("CrPO-cre", "CrPO-nov-div-sur")]
ALL = "all tasks"
REPLICATES = 10_000  # of the bootstrap
TOO_FEW = "95 % intervals over fewer than ten prompts are too narrow"
PromptValues = dict[str, dict[data.Messages, float]]  # {task: {prompt: a measure}}


def repetition(texts: Sequence[str]) -> dict[str, float]:
    """The measures BESIDE of the responses to a prompt.

    distinct-n: different n-grams / all n-grams (Li et al. 2016); duplicates: the share of responses
    that repeat an earlier one letter for letter.
    """
    tokens = [scores.running_words(text) for text in texts]
    values = {"words": float(np.mean([len(row) for row in tokens]))}
    for n in (1, 2):
        grams = [gram for row in tokens for gram in zip(*(row[k:] for k in range(n)), strict=False)]
        values[f"distinct-{n}"] = len(set(grams)) / max(len(grams), 1)
    return values | {"duplicates": 1 - len(set(texts)) / len(texts)}


def measure(
    samples: Sequence[data.Sample], signals: Sequence[str], scorers: scores.Scorers
) -> list[dict]:
    """A cell for each (model, run, task, prompt): means over its responses, and BESIDE."""
    groups: dict[tuple, list[data.Sample]] = defaultdict(list)
    for sample in samples:
        model = str(sample.row.get("model", "human"))
        run = str(sample.row.get("run", model))
        groups[model, run, sample.task, sample.prompt].append(sample)
    pools, cells = [], []
    for (model, run, task, prompt), group in groups.items():
        texts = [sample.response for sample in group]
        human = np.array([sample.score for sample in group])
        pools.append(scores.Pool(prompt, texts, np.ones(len(group), bool), human))
        cell = {"model": model, "run": run, "task": task, "prompt": prompt}
        cells.append(cell | {"responses": len(group)} | repetition(texts))
    for signal in signals:
        for cell, raw in zip(cells, scores.SIGNALS[signal].function(pools, scorers), strict=True):
            cell[signal] = float(np.mean(raw))
    return cells


def by_prompt(cells: Sequence[dict], name: str) -> PromptValues:
    """A measure of each prompt, averaged over runs."""
    runs: dict[str, dict[data.Messages, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        runs[cell["task"]][cell["prompt"]].append(cell[name])
    return {
        task: {prompt: float(np.mean(values)) for prompt, values in prompts.items()}
        for task, prompts in runs.items()
    }


def average(values: PromptValues) -> float:
    """The mean over the prompts of a task, then over tasks."""
    return float(np.mean([np.mean(list(prompts.values())) for prompts in values.values()]))


def bootstrap(values: PromptValues) -> list[float] | None:
    """The 95 % percentile interval of `average`, drawing the prompts of each task anew.

    A replicate draws P - 1 of a task's P prompts: so its mean has the variance it should however
    few prompts there are, where P draws fall short by 1 / P (Rao and Wu 1988). Yet of normal means
    over 4, 8, 16 or 40 prompts, 82, 89, 93 or 94 % lie in their 95 % intervals. A task of one
    prompt adds no uncertainty, for none can be seen; None if no task has two. The draws are the
    same whatever is averaged.
    """
    rng, means = np.random.default_rng(0), []
    for prompts in values.values():
        P, task = len(prompts), np.array(list(prompts.values()))
        drawn = rng.multinomial(P - 1, [1 / P] * P, REPLICATES) if P > 1 else np.ones((1, 1))
        means.append(drawn * P / max(P - 1, 1) @ task / P)  # [replicates], or [1]
    replicates = sum(means) / len(means)
    return np.quantile(replicates, (0.025, 0.975)).tolist() if len(replicates) > 1 else None


def summarise(cells: Sequence[dict], names: Sequence[str]) -> dict:
    """How many prompts; of each measure `average` under its name, `bootstrap` under `<name>_95`."""
    row: dict = {"prompts": len({(cell["task"], cell["prompt"]) for cell in cells})}
    for name in names:
        values = by_prompt(cells, name)
        row |= {name: average(values), f"{name}_95": bootstrap(values)}
    return row


def tabulate(cells: Sequence[dict], signals: Sequence[str]) -> list[dict]:
    """The paper's table: a row for each (model, task), and one over a model's several tasks.

    `<measure>_runs` are the means of each of several runs.
    """
    rows, names = [], (*signals, *BESIDE)
    for model in dict.fromkeys(cell["model"] for cell in cells):
        tasks = list(dict.fromkeys(cell["task"] for cell in cells if cell["model"] == model))
        for task in [*tasks, ALL] if len(tasks) > 1 else tasks:
            runs = defaultdict(list)
            for cell in cells:
                if cell["model"] == model and task in (cell["task"], ALL):
                    runs[cell["run"]].append(cell)
            own = [cell for run in runs.values() for cell in run]
            row = {"model": model, "task": task, "runs": len(runs)}
            row |= {"responses": sum(cell["responses"] for cell in own)} | summarise(own, names)
            for name in names if len(runs) > 1 else ():
                row[f"{name}_runs"] = [average(by_prompt(run, name)) for run in runs.values()]
            rows.append(row)
    return rows


def totals(rows: Sequence[dict]) -> list[dict]:
    """The last row of each model, which is over all its tasks."""
    return list({row["model"]: row for row in rows}.values())


def compare(cells: Sequence[dict], signals: Sequence[str]) -> list[dict]:
    """A row of differences for each model minus the first one, and with minus without quality.

    They are taken prompt by prompt over the prompts that both models answer: so how much prompts
    differ from each other does not widen the interval.
    """
    cells_of = defaultdict(list)
    for cell in cells:
        cells_of[cell["model"], cell["task"], cell["prompt"]].append(cell)
    first, *others = dict.fromkeys(cell["model"] for cell in cells)
    pairs = [(model, first) for model in others]
    pairs += [pair for pair in QUALITY_PAIRS if {*pair} <= {*others}]
    rows = []
    for model, other in pairs:
        paired = [  # each run with each: their mean difference is that of the means over runs
            cell | {name: cell[name] - base[name] for name in signals}
            for cell in cells
            if cell["model"] == model
            for base in cells_of[other, cell["task"], cell["prompt"]]
        ]
        if paired:
            rows.append({"difference": f"{model} − {other}"} | summarise(paired, signals))
    return rows


# --------------------------------------------------------------------------------------------------
# The table and the figure
# --------------------------------------------------------------------------------------------------


def with_interval(value: float | None, interval: list[float] | None = None) -> str:
    """A value, and its interval if there is one, with three significant digits or none behind."""
    numbers = (value, *(interval or ()))
    texts = ["-" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in numbers]
    return texts[0] + (f" ({texts[1]} to {texts[2]})" if interval else "")


def lay_out(rows: Sequence[dict], columns: Sequence[str], measures: Sequence[str]) -> list[list]:
    """A table of text; measures with their interval and, of several runs, standard deviation."""
    table = [[*columns, *(f"{name} (95 %)" for name in measures)]]
    for row in rows:
        table.append([str(row[name]) for name in columns])
        for name in measures:
            runs = row.get(f"{name}_runs")
            spread = f", runs ± {np.std(runs, ddof=1):.2g}" if runs else ""
            table[-1].append(with_interval(row[name], row[f"{name}_95"]) + spread)
    return table


def tables(results: dict) -> dict[str, list[list]]:
    """{title: table of text}: what `score` prints and a report shows."""
    rows, signals = results["rows"], results["signals"]
    by_task = sorted(rows, key=lambda row: (row["task"] != ALL, row["task"]))
    return {
        "Results": lay_out(by_task, ("task", "model", "prompts", "responses"), signals),
        "Length and repetition": lay_out(totals(rows), ("model", "runs"), BESIDE),
        "Differences, prompt by prompt": lay_out(
            results["differences"], ("difference", "prompts"), signals
        ),
    }


def print_columns(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())


def draw_panels(rows: Sequence[dict], signals: Sequence[str], path: str | Path) -> None:
    """The paper's figure 2: a panel for each signal, against quality, with both intervals."""
    from matplotlib.figure import Figure

    names = [name for name in signals if name != "quality"]
    figure = Figure(figsize=(3.7 * len(names), 4.4), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for k, row in enumerate(totals(rows)):
            x, y, style = row["quality"], row[name], {"color": f"C{k % 10}", "zorder": 2}
            panel.plot(row["quality_95"] or [x, x], [y, y], alpha=0.4, linewidth=1, **style)
            panel.plot([x, x], row[f"{name}_95"] or [y, y], alpha=0.4, linewidth=1, **style)
            panel.plot(x, y, "osD^vP"[k % 6], label=row["model"], **style)
        panel.set(xlabel="quality", title=name)
        panel.grid(alpha=0.2)
        values = [row[name] for row in totals(rows)]
        if max(values) > 5 * min(values) > 0:
            panel.set_yscale("log")
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=160)


def read_responses(paths: Sequence[str], splits: Sequence[str]) -> list[data.Sample]:
    """The rows of all files; of those with a `split` only those of `splits`, if any are named."""
    samples = [sample for path in paths for sample in data.read_samples(path)]
    for split in splits:
        if all(sample.row.get("split") != split for sample in samples):
            raise data.UserError(f"--split {split}: no response has it; see their 'split' column")
    return [s for s in samples if not splits or s.row.get("split") in (None, *splits)]


def score_command(args) -> None:
    check_files(args.responses, [args.out, args.figure])
    samples = read_responses(args.responses, args.split)
    unrated = sum(math.isnan(sample.score) for sample in samples)
    signals = [s for s in scores.SIGNALS if s != "quality" or args.reward_model or not unrated]
    if args.figure and not find_spec("matplotlib"):
        raise data.UserError("a figure needs the package matplotlib: pip install matplotlib")
    if args.figure and "quality" not in signals:
        raise data.UserError("--figure: it is drawn against quality; name a --reward-model")
    dtype = scores.pick_dtype(args.dtype)
    scorers = scores.Scorers(args.embedder, args.surprise_model, args.reward_model, dtype)
    cells = measure(samples, signals, scorers)
    flags = {signal: scores.SIGNALS[signal].scorer for signal in signals}
    results = {
        "scorers": {s: getattr(args, f) or "human scores" for s, f in flags.items() if f},
        "signals": signals,
        "rows": tabulate(cells, signals),
        "differences": compare(cells, signals),
        "cells": cells,
    }
    data.write_file(args.out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for title, table in tables(results).items():
        print(f"{title}:")
        print_columns(table)
        print()
    print("scorers: " + ", ".join(f"{s} {name}" for s, name in results["scorers"].items()))
    if 0 < unrated < len(samples) and not args.reward_model:
        print(f"warning: no quality: {unrated:,} responses have no score; name a --reward-model")
    if any(row["prompts"] < 10 for row in results["rows"]):
        print(f"warning: {TOO_FEW}")
    if args.figure:
        draw_panels(results["rows"], signals, args.figure)
    print(f"saved {args.out}" + (f", {args.figure}" if args.figure else ""))


def add_score(commands) -> None:
    command = commands.add_parser("score", help="novelty, diversity, surprise, quality")
    command.set_defaults(call=score_command)
    help = "JSONL files of responses; models are compared with that of the first row"
    data.flag(command, "--responses", ..., help, nargs="+")
    data.flag(command, "--split", [], "of rows that have a `split`, only those of these")
    data.flag(command, "--out", ..., "JSON file to write", ends_in(".json"))
    help = "also draw it: a .png, .pdf or .svg (needs matplotlib)"
    data.flag(command, "--figure", None, help, ends_in(".png", ".pdf", ".svg"))
    reward = "the human scores, if every response has one, or else no quality"
    group = command.add_argument_group("scorers")
    scores.add_scorer_flags(group, scores.EMBEDDER, "google/gemma-2-27b-it", reward)
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


def draw_items(samples: Sequence[data.Sample], P: int, each: int, seed: int) -> dict[str, dict]:
    """What to rate, by id, in the order of the sheet: `each` responses of each model to P prompts.

    An item is {"prompt", "response", "models"}, with a model for each time the response was drawn:
    if it was drawn twice, of one model or of two, it is still one item. The order is random and
    does not depend on that of the files, so that neither tells who wrote what. Nor does the id,
    which follows from the text; it has no digits, as a spreadsheet takes 12345e67 for a number.
    """
    answers: dict[data.Messages, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        answers[sample.prompt][str(sample.row.get("model", "human"))].append(sample.response)
    models = sorted({model for answer in answers.values() for model in answer})
    if len(models) < 2:
        raise data.UserError(f"all responses are of {models[0]!r}; expected two models to compare")
    full = sorted(p for p in answers if all(len(answers[p][name]) >= each for name in models))
    if len(full) < P:
        raise data.UserError(
            f"--prompts {P}: only {len(full):,} prompts have --per-prompt responses of each model"
        )
    rng, items = np.random.default_rng(seed), {}
    for prompt in [full[k] for k in rng.choice(len(full), P, replace=False)]:
        turns = [f"{role}: {content}" for role, content in prompt]
        asked = "\n\n".join(turns) if len(turns) > 1 else prompt[0][1]
        drawn = defaultdict(list)
        for model in models:
            for text in rng.choice(sorted(answers[prompt][model]), each, replace=False):
                drawn[str(text)].append(model)
        for text in map(str, rng.permutation(sorted(drawn))):
            key = "".join(LETTERS[byte % 16] for byte in scores.content_key(asked, text)[:10])
            items[key] = {"prompt": asked, "response": text, "models": drawn[text]}
    return items


def not_a_formula(text: str) -> str:
    """A text that no spreadsheet takes for a formula: an apostrophe in front, if it might."""
    return "'" + text if text[0] in "=+-@\t\r'" else text


def sheet_command(args) -> None:
    out = Path(args.out)
    page_path, key_path = out.with_suffix(".html"), out.with_suffix(".key.json")
    check_files(args.responses, [out, page_path, key_path])
    for path in (out, page_path, key_path):
        if path.exists() and not args.overwrite:
            raise data.UserError(f"--out {out}: {path} exists; add --overwrite, or name another")
    samples = [sample for path in args.responses for sample in data.read_samples(path)]
    items = draw_items(samples, args.prompts, args.per_prompt, args.seed)
    key = {"questions": QUESTIONS, "items": items}
    data.write_file(key_path, json.dumps(key, ensure_ascii=False, indent=1) + "\n")

    texts = ("prompt", "response")
    rows = [[key, *(not_a_formula(item[t]) for t in texts)] for key, item in items.items()]
    lines = io.StringIO("\ufeff", newline="")  # by which Excel knows UTF-8
    lines.seek(0, io.SEEK_END)
    csv.writer(lines).writerow(["item", *texts, *QUESTIONS])
    csv.writer(lines).writerows([*row, *[""] * len(QUESTIONS)] for row in rows)
    data.write_file(out, lines.getvalue())

    filling = {"name": out.stem, "questions": QUESTIONS, "scale": SCALE, "rows": rows}
    filling["store"] = scores.content_key(QUESTIONS, rows).hex()  # its place in the browser
    text = json.dumps(filling).replace("<", "\\u003c")  # a `<` could end the script element
    page = (scores.HERE / "docs" / "sheet.html").read_text("utf-8")
    data.write_file(page_path, page.replace("/*DATA*/", text))
    print(f"{args.prompts:,} prompts, {len(items):,} responses to rate")
    print(f"saved {out} and {page_path}: give a rater either")
    print(f"saved {key_path}: who wrote what; keep it from the raters")


def read_key(path: str) -> tuple[list[str], dict[str, dict], list[str], np.ndarray]:
    """The Q questions, the I items, the M models, and which K items each had drawn: [P, M, K]."""
    drawn: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    try:
        key = json.loads(Path(path).read_text("utf-8"))
        for k, item in enumerate(key["items"].values()):
            item["response"].split()  # a text
            for model in item["models"]:
                drawn[item["prompt"]][model].append(k)
        models = sorted({model for answers in drawn.values() for model in answers})
        indices = [[answers[model] for model in models] for answers in drawn.values()]
        return list(key["questions"]), key["items"], models, np.array(indices, dtype=int)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise data.UserError(f"--key {path}: not a key of eval.py human sheet ({error})") from None


def read_sheet(path: str, questions: Sequence[str], items: dict[str, dict]) -> np.ndarray:
    """One rater's ratings [I, Q] in the order of `items`, NaN where blank.

    Commas, semicolons or tabs between cells, as spreadsheets of different countries save CSV.
    """

    def check(right, what):
        if not right:
            raise data.UserError(f"{path}:{end + 1}: {what}")

    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise data.UserError(f"{path}: cannot be read; save it as CSV in UTF-8 ({error})") from None
    csv.field_size_limit(10**9)  # an unclosed quote takes all that follows into its cell
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    lines = csv.DictReader(io.StringIO(text, newline=""), restval="", delimiter=delimiter)
    lines.fieldnames = [name.strip() for name in lines.fieldnames or ()]
    end, ratings = 0, {}
    for column in ("item", "response", *questions):
        expected = ",".join(("item", "prompt", "response", *questions))
        check(column in lines.fieldnames, f"no column {column!r}; expected {expected}")
    end = lines.line_num
    for row in lines:
        if any(row.values()):
            name, text = row["item"].strip(), row["response"]
            check(name in items, f"item {name!r} is not in the key; is that of another sheet?")
            check(name not in ratings, f"item {name!r} a second time; remove one of the two")
            # Some spreadsheets take the apostrophe of `not_a_formula` for their own and drop it
            texts = text.split(), text.removeprefix("'").split()
            right = items[name]["response"].split() in texts
            check(right, f"the response is not that of item {name!r}; was a column sorted alone?")
            ratings[name] = []
            for question in questions:
                cell, expected = row[question].strip(), f"a whole number 1 to {SCALE}, or nothing"
                right = re.fullmatch(rf"([1-{SCALE}]([.,]0+)?)?", cell)
                check(right, f"{question!r} is {cell[:60]!r}; expected {expected}")
                ratings[name].append(float(cell[0]) if cell else math.nan)
        end = lines.line_num
    return np.array([ratings.get(name, [math.nan] * len(questions)) for name in items])


def krippendorff(ratings: np.ndarray) -> float | None:
    """The raters' agreement, ordinal alpha, from ratings [J, I], NaN if blank; None: undefined.

    1 is perfect, 0 what chance gives. 1 - observed / expected disagreement over pairs of ratings of
    one item, and of any; two ratings differ by (the ratings between them, half of their own
    included) squared (Krippendorff 2011).
    """
    levels = np.arange(1, SCALE + 1)
    counts = (ratings.T[:, :, None] == levels).sum(1).astype(float)  # [I, C]
    counts = counts[counts.sum(1) > 1]
    paired = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(SCALE)
    observed = (paired / (counts.sum(1) - 1)[:, None, None]).sum(0)  # [C, C]
    given = counts.sum(0)
    rank = given.cumsum() - given / 2
    distance = (rank[:, None] - rank) ** 2
    expected = (np.outer(given, given) * distance).sum() / max(given.sum() - 1, 1)
    return float(1 - (observed * distance).sum() / expected) if expected else None


def tally(ratings: np.ndarray, models: Sequence[str], drawn: np.ndarray) -> dict:
    """What one question's ratings [J, I] say of each model, and how far the raters agree.

    drawn [P, M, K]: a model's items at a prompt. The mean rating is over a prompt's ratings, then
    over prompts, and its interval is over prompts: ratings of one prompt depend on each other. A
    rater who has rated responses of two models to a prompt makes one comparison there: a model wins
    the share of the pairs of these in which its response is rated higher, and half of the ties.
    """
    rated, rows = ratings[:, drawn], []  # [J, P, M, K]
    for m, model in enumerate(models):
        by_prompt = [values[~np.isnan(values)] for values in rated[:, :, m].swapaxes(0, 1)]
        means = {"": {p: values.mean() for p, values in enumerate(by_prompt) if len(values)}}
        mean, interval = (average(means), bootstrap(means)) if means[""] else (None, None)
        row = {"model": model, "ratings": sum(map(len, by_prompt))}
        row |= {"mean": mean, "mean_95": interval, "win_rates": {}, "comparisons": {}}
        for n, other in enumerate(models):
            a, b = rated[:, :, m, :, None], rated[:, :, n, None, :]  # each with each
            pairs = (~np.isnan(a - b)).sum((2, 3))  # [J, P]
            wins = ((a > b) + 0.5 * (a == b)).sum((2, 3))
            if n != m and pairs.any():
                row["win_rates"][other] = float((wins[pairs > 0] / pairs[pairs > 0]).mean())
                row["comparisons"][other] = int((pairs > 0).sum())
        rows.append(row)
    rows.sort(key=lambda row: row["mean"] or 0, reverse=True)
    given = int((~np.isnan(ratings)).sum())
    result = {"alpha": krippendorff(ratings), "ratings": given, "blank": ratings.size - given}
    return result | {"models": rows}


def print_tally(question: str, result: dict) -> None:
    rows, models = [], [row["model"] for row in result["models"]]
    for row in result["models"]:
        rates = {m: f"{r:.0%} of {row['comparisons'][m]:,}" for m, r in row["win_rates"].items()}
        rows.append(row | {f"beats {model}": rates.get(model, "-") for model in models})
    print(
        f"\n{question}: {result['ratings']:,} ratings, {result['blank']:,} blank, raters' "
        f"agreement (alpha) {with_interval(result['alpha'])}"
    )
    beats = [f"beats {model}" for model in models]
    print_columns(lay_out(rows, ["model", "ratings", *beats], ["mean"]))


def tally_command(args) -> None:
    questions, items, models, drawn = read_key(args.key)
    check_files([*args.sheets, args.key], [args.out])
    ratings = np.stack([read_sheet(path, questions, items) for path in args.sheets])  # [J, I, Q]
    results = {q: tally(ratings[:, :, k], models, drawn) for k, q in enumerate(questions)}
    content = {"sheets": args.sheets, "prompts": len(drawn), "questions": results}
    data.write_file(args.out, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    for question, result in results.items():
        print_tally(question, result)
    print(f"\nwarning: {TOO_FEW}" if len(drawn) < 10 else "")
    print(f"saved {args.out}")


def add_human(commands) -> None:
    human = commands.add_parser("human", help="a blinded rating sheet, and what the raters say")
    parts = human.add_subparsers(dest="part", required=True)
    sheet = parts.add_parser("sheet", help="draw responses into a CSV, a page and a key")
    sheet.set_defaults(call=sheet_command)
    data.flag(sheet, "--responses", ..., "JSONL files of responses", nargs="+")
    help = "CSV to write; the page, .html, and the key beside it"
    data.flag(sheet, "--out", ..., help, ends_in(".csv"))
    data.flag(sheet, "--overwrite", False, "replace files that exist")
    whole = data.number(int, 1)
    data.flag(sheet, "--prompts", 4, "how many, drawn at random", whole)
    data.flag(sheet, "--per-prompt", 2, "responses of each model to a prompt", whole)
    data.flag(sheet, "--seed", 0, "of the draws", data.number(int, 0))
    count = parts.add_parser("tally", help="means, win rates, agreement")
    count.set_defaults(call=tally_command)
    data.flag(count, "--sheets", ..., "filled CSV files, one a rater", nargs="+")
    data.flag(count, "--key", ..., "the key that was made with the sheet")
    data.flag(count, "--out", ..., "JSON file to write", ends_in(".json"))


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
HELD_OUT = ("HeldoutItem", "HeldoutTask")


def plan(args, variants: dict[str, str], results: Path) -> dict[Path, list[str]]:
    """{what it makes: words of a command}, in order: data, scores, SFT, runs, responses, scores."""
    out, stages = Path(args.out), {}
    pref, texts, scored = (out / f"{name}.jsonl" for name in ("pref", "sft", "scored"))
    judge, tuned = out / "judge", out / "runs" / "SFT"
    rated, model = ["--data", args.data, "--split", "Training"], ["--model", args.model]
    scorers = ["--embedder", args.embedder, "--surprise-model", args.surprise_model]
    scorers += ["--reward-model", args.reward_model or judge]

    def stage(made, *words):
        stages[made] = [str(word) for word in (*words, "--out", made)]

    stage(pref, "data.py", "pairs", *rated, *args.pairs)
    stage(texts, "data.py", "sft", *rated)
    if not args.reward_model:
        stage(judge, "scores.py", "judge", *rated, "--embedder", args.embedder, "--overwrite")
    stage(scored, "scores.py", "--data", pref, "--signals", *scores.SIGNALS, *scorers)
    seeds = ["--seed", args.seeds[0]]
    stage(tuned, "sft.py", "--data", texts, *model, "--resume", *seeds, *args.sft)
    runs = {"base": ["base", *seeds], "SFT": ["SFT", *seeds, "--adapter", tuned]}
    for seed in args.seeds:
        for name, lambdas in variants.items():
            run, seeds = out / "runs" / f"{name}-{seed}", ["--seed", seed]
            start = ["--data", scored, *model, "--adapter", tuned, "--holdout", 0, "--resume"]
            stage(run, "crpo.py", *start, *seeds, *lambdas.split(), *args.crpo)
            runs[run.name] = [name, *seeds, "--adapter", run]
    prompts = ["--prompts", args.data, "--split", *args.held_out]
    files = [out / "responses" / f"{run}.jsonl" for run in runs]
    for file, who in zip(files, runs.values(), strict=True):
        generate = ["eval.py", "generate", *model, "--name", *who, *prompts, "--resume"]
        stage(file, *generate, *args.generate)
    files.sort(key=lambda file: not file.name.startswith("DPO"))  # the first is compared with
    figure = ["--figure", args.figure] if args.figure else []
    measured = ["--responses", *files, *prompts[1:]]
    stage(results, "eval.py", "score", *measured, *scorers, *figure)
    return stages


def run_stage(words: Sequence[str], nproc: int) -> int:
    """The exit status of a command; if we are stopped it is waited for, as it may be saving."""
    start = [sys.executable]
    if nproc > 1 and words[1] not in ("pairs", "sft", "score"):
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(nproc), "--"]
    child = subprocess.Popen([*start, scores.HERE / words[0], *words[1:]])
    try:
        return child.wait()
    except BaseException:  # SIGTERM, by way of SystemExit, or SIGINT
        child.terminate()
        child.wait()
        raise


def carry_out(stages: dict[Path, list[str]], args) -> list[dict]:
    """Run the stages that are not done, noting each in DIR/stages.jsonl; return their rows there.

    UserError: what a stage is to make was made by another command, from other data, or from what
    has been made anew. Only the last stage, which costs little, is then done again.
    """
    log, digest = Path(args.out) / "stages.jsonl", scores.content_hash(args.data)
    done = {row.get("out"): row for _, row in data.read_jsonl(log)} if log.exists() else {}
    renewed: set[str] = set()
    for k, (out, words) in enumerate(stages.items(), 1):
        row = {"out": str(out), "command": shlex.join(["python", *words]), "data": digest}
        before = done.get(str(out), {}) if out.exists() else {}
        if row.items() <= before.items() and not renewed & {*words}:
            continue
        if before and k < len(stages):
            raise data.UserError(
                f"{out}: made by another command, from other data or from what has been made anew "
                "since; remove it, or name another --out"
            )
        print(f"\n[{k}/{len(stages)}] {row['command']}", flush=True)
        began = time.perf_counter()
        if status := run_stage(words, args.nproc_per_node):
            raise data.UserError(
                f"stage {k} ended with status {status}; once that is mended, give the same command "
                "again, and it goes on there"
            )
        for checkpoint in out.glob("checkpoint-*"):  # of no more use, and large
            shutil.rmtree(checkpoint)
        renewed.add(str(out))
        done[str(out)] = row | {"seconds": round(time.perf_counter() - began)}
        data.write_jsonl(log, list(done.values()))
    return [done[str(out)] for out in stages]


def experiment_command(args) -> None:
    """Run every stage and write a report: `paper` is the paper's figure 2, `sweep` its figure 3."""
    out, names = Path(args.out), ("results.json", "report.md", "figure.png")
    if args.command == "paper":
        variants = {name: VARIANTS[name] for name in VARIANTS if name in args.variants}
    else:
        names, variants = ("sweep.json", "sweep.md", "sweep.png"), {"DPO": VARIANTS["DPO"]}
        for signal, lam in itertools.product(args.signals, args.lambdas):
            name = f"CrPO-{signal[:3]}" + (f"-{lam:g}" if lam != 1 else "")
            variants[name] = f"--lambda-{signal} {lam:g}"
    results, report, figure = (out / name for name in names)
    splits = {str(row.get("split")) for _, row in data.read_rows(args.data)}
    args.held_out = [split for split in HELD_OUT if split in splits]
    if "Training" not in splits or not args.held_out:
        raise data.UserError(
            f"{args.data}: expected a column `split` that says Training in some rows and "
            f"{' or '.join(HELD_OUT)} in others; it says {', '.join(sorted(splits))}"
        )
    args.seeds = list(dict.fromkeys(args.seeds))
    args.figure = figure if find_spec("matplotlib") else None
    stages = plan(args, variants, results)
    check = {"sft.py": sft.parse_args, "crpo.py": crpo.parse_args, "eval.py": parse_args}
    for script, *words in stages.values():  # what would be refused hours from now
        check.get(script, list)(words)
    scores.LanguageModel(args.model, torch.float32)  # its weights are not read here
    done = carry_out(stages, args)
    data.write_file(report, write_report(args, json.loads(results.read_text("utf-8")), done))
    print(f"\nsaved {report}" + ("" if args.figure else ", no figure: that needs matplotlib"))


def write_report(args, results: dict, done: Sequence[dict]) -> str:
    """Markdown: what was run and how to read it, the figure, the tables, and every command."""
    scorers = ", ".join(f"{signal} by {name}" for signal, name in results["scorers"].items())
    text = (
        f"# Creative Preference Optimization: {args.command}\n\n"
        f"{args.model} on {args.data}; seeds {', '.join(map(str, args.seeds))}; "
        f"{sum(row['seconds'] for row in done) / 60:.0f} minutes. Measured: {scorers}. Means are "
        "over the responses to a prompt, then over runs, prompts and tasks. Brackets hold the 95 % "
        "bootstrap interval over prompts, which is too narrow for fewer than ten; ± is the "
        "standard deviation of the runs.\n\n"
    )
    if args.figure:
        text += f"![each measure against quality]({args.figure.name})\n\n"
    for title, (head, *rows) in tables(results).items():
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
        text += f"## {title}\n\n" + "\n".join(lines) + "\n\n"
    text += "## Every command\n\n"
    if args.nproc_per_node > 1:
        text += "Those that score, train and generate ran under "
        text += f"torchrun --nproc-per-node {args.nproc_per_node}.\n\n"
    lines = [f"{row['command']}   # {row['seconds']} s" for row in done]
    return text + "```\n" + "\n".join(lines) + "\n```\n"


def add_experiments(commands) -> None:
    for name, seeds, help in (
        ("sweep", [42, 12, 92], "each signal alone, with several lambdas"),
        ("paper", [42], "the whole experiment, from ratings to a report"),
    ):
        command = commands.add_parser(name, help=help)
        command.set_defaults(call=experiment_command)
        data.flag(command, "--data", ..., "rated JSONL with a `split` column")
        data.flag(command, "--model", "tiny", "name or folder")
        data.flag(command, "--out", ..., "folder for everything; what is done there is not redone")
        help = "runs of each variant, a seed each; SFT is run once"
        data.flag(command, "--seeds", seeds, help, data.number(int, 0, 2**32))
        if name == "paper":
            names, help = list(VARIANTS), "what to train besides SFT"
            data.flag(command, "--variants", names, help, names, metavar="NAME")
        else:
            names, help = list(scores.SIGNALS), "those to sweep"
            data.flag(command, "--signals", names, help, names, metavar="NAME")
            help = "weights of the signal"
            data.flag(command, "--lambdas", [0.5, 1.0, 1.5, 2.0], help, data.number(float, 1e-6))
        help = "processes that score, train and generate, started by torchrun"
        data.flag(command, "--nproc-per-node", 1, help, data.number(int, 1, 1024))
        reward = "a judge, fitted to the human scores of the training split"
        group = command.add_argument_group("scorers")
        scores.add_scorer_flags(group, scores.EMBEDDER, "google/gemma-2-27b-it", reward)
        more = command.add_argument_group('flags for a stage, as in --sft="--lr 1e-4"')
        for stage in ("data.py pairs", "sft.py", "crpo.py", "eval.py generate"):
            flag, help = "--" + stage.removesuffix(".py").split()[-1], f"for {stage}"
            more.add_argument(flag, type=shlex.split, default=[], metavar="FLAGS", help=help)


# --------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = data.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_generate, add_score, add_noveltybench, add_human, add_experiments):
        add(commands)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    args.call(args)


if __name__ == "__main__":
    data.run(main)
