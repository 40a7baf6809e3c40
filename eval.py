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
they are worth to a user (arXiv 2504.05228); it reads that benchmark's files too. human asks
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
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice, product
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import transformers
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


def parse_decoding(text: str) -> dict[str, float]:
    """An argparse type: t=0.7,p=0.95 and the like as a dict with the keys of PLAIN."""
    kinds = {"t": data.number(float, 0, 100), "p": data.number(float, 1e-6, 1)}
    kinds |= {"k": data.number(int, 0), "min_p": data.number(float, 0, 1)}
    decoding = dict(PLAIN)
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise argparse.ArgumentTypeError(
                f"{part!r}: expected t=, p=, k= or min_p= and a number, as in t=0.7,p=0.95"
            )
        decoding[SETTINGS[key]] = kinds[key](value)
    return decoding


PAPERS = "t=0.7,p=0.95 t=0.9,p=0.99 t=0.7,k=50 t=0.8,p=0.97"
DECODINGS = [parse_decoding(text) for text in PAPERS.split()]


def generate(
    lm: scores.LanguageModel,
    prompts: Sequence[data.Messages],
    decodings: Sequence[dict[str, float]],
    max_new_tokens: int,
    batch_tokens: int,
    seed: int,
    done: Set[int] = frozenset(),
) -> Iterator[tuple[int, list[str]]]:
    """Sample a response to each prompt with each decoding; yield (index of the prompt, responses).

    Prompts of like length form a batch; the responses that one decoding draws for it at a time have
    at most `batch_tokens`. A response has at most the tokens that the model's context leaves beside
    the longest prompt (UserError: none). The seed, the batch's place and the decoding decide what
    is drawn, so batches whose prompts are all `done` can be left out, and process r of W takes
    batches r, r + W, ... of the others. Every process yields all responses.
    """
    ids = lm.encoder.prompts(prompts)
    longest = max(map(len, ids))
    if longest >= lm.context:
        raise data.UserError(
            f"a prompt of {longest} tokens leaves no room in {lm.name}, which takes {lm.context}"
        )
    limit = min(max_new_tokens, lm.context - longest)
    counted = [(decoding, len(list(equal))) for decoding, equal in groupby(decodings)]
    at_a_time = max(n for _, n in counted)
    batches = list(scores.by_length([at_a_time * (len(row) + limit) for row in ids], batch_tokens))
    todo = [place for place, batch in enumerate(batches) if not done.issuperset(batch)]

    def answer(place: int) -> list[tuple[int, list[str]]]:
        batch = batches[place]
        texts: list[list[str]] = [[] for _ in batch]
        for turn, (decoding, n) in enumerate(counted):
            torch.manual_seed(int(np.random.default_rng([seed, place, turn]).integers(2**63)))
            drawn = sample(lm, [ids[k] for k in batch], decoding, n, limit)
            for k in range(len(batch)):
                texts[k] += tidy(drawn[k * n : (k + 1) * n])
        return [(k, own) for k, own in zip(batch, texts, strict=True) if k not in done]

    rank, world = scores.processes()
    for first in range(0, len(todo), world):
        mine = answer(todo[first + rank]) if first + rank < len(todo) else []
        everyone = [mine] * world
        if world > 1:
            dist.all_gather_object(everyone, mine)
        for answered in everyone:
            yield from answered


def sample(
    lm: scores.LanguageModel, ids: list[list[int]], decoding: dict[str, float], n: int, limit: int
) -> list[str]:
    """n responses to each of P prompts, prompt by prompt: P * n texts of 1 to `limit` tokens."""
    stop, T = lm.encoder.stop_ids(), max(map(len, ids))
    left = torch.tensor([[stop[0]] * (T - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in ids])
    greedy = decoding["temperature"] == 0  # then all n are the same
    settings = transformers.GenerationConfig(
        do_sample=not greedy,
        num_return_sequences=1 if greedy else n,
        max_new_tokens=limit,
        min_new_tokens=1,
        eos_token_id=stop,
        pad_token_id=stop[0],
        **({} if greedy else {name: decoding[name] for name in PLAIN}),
    )
    lm.model.generation_config = settings  # that of the checkpoint would fill in what is left out
    device = lm.model.device
    out = lm.model.generate(
        input_ids=left.to(device), attention_mask=mask.to(device), generation_config=settings
    )
    texts = lm.encoder.tokenizer.batch_decode(out[:, T:], skip_special_tokens=True)
    return [text for text in texts for _ in range(n)] if greedy else texts


def tidy(texts: Sequence[str]) -> list[str]:
    """Without the blanks around them, and what no file of ours may hold: NUL, lone surrogates."""
    return [text.encode("utf-8", "ignore").decode().replace("\0", "").strip() for text in texts]


# --------------------------------------------------------------------------------------------------
# Generating: a model behind an endpoint
# --------------------------------------------------------------------------------------------------

TRIES = 8  # of a request
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second try; it doubles from try to try
TIMEOUT = 600.0  # seconds without a byte


def ask(
    endpoint: str,
    model: str,
    prompts: Sequence[data.Messages],
    decodings: Sequence[dict[str, float]],
    max_new_tokens: int,
    concurrency: int,
    seed: int,
    done: Set[int] = frozenset(),
) -> Iterator[tuple[int, list[str]]]:
    """As `generate`, by the model that an OpenAI-compatible server knows by this name.

    `concurrency` requests are under way at a time. Prompts are yielded in order, so a process that
    is killed loses the answers to later prompts that came before those to an earlier one.
    A filter that the decoding leaves off is not sent; a server with defaults of its own (vLLM takes
    them from the model's generation_config.json) has to be started without them.
    UserError: the server refuses, or does not answer.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise data.UserError("OPENAI_API_KEY: a key has no line breaks and no letters beyond ASCII")
    todo, stop = [k for k in range(len(prompts)) if k not in done], threading.Event()

    def answer(place: tuple[int, int]) -> str:
        k, turn = place
        filters = {name: decodings[turn][name] for name in ("top_p", "top_k", "min_p")}
        body = {name: value for name, value in filters.items() if value != PLAIN[name]} | {
            "model": model,
            "messages": [{"role": role, "content": text} for role, text in prompts[k]],
            "max_tokens": max_new_tokens,
            "temperature": decodings[turn]["temperature"],
            "seed": (seed * len(decodings) + turn) % 2**31,  # what every server takes
        }
        return chat(endpoint, key, body, stop)

    pool = ThreadPoolExecutor(concurrency)
    try:
        texts = pool.map(answer, product(todo, range(len(decodings))))
        for k in todo:
            yield k, tidy(list(islice(texts, len(decodings))))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def chat(endpoint: str, key: str, body: dict, stop: threading.Event) -> str:
    """The answer to one request, tried again while the server is busy or away, until `stop`.

    The key goes to this server alone, as no redirect is followed, and into no message.
    """
    session = huggingface_hub.get_session()  # an httpx client, which by itself sends no token
    session.event_hooks = {}  # HF_HUB_OFFLINE is about the hub, not about this server
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    options = {"headers": headers, "timeout": TIMEOUT, "follow_redirects": False}
    for turn in range(TRIES):
        status, after, why = 0, "", ""
        try:
            reply = session.post(f"{endpoint}/chat/completions", json=body, **options)
            status, after = reply.status_code, reply.headers.get("Retry-After", "")
            why = f"HTTP {status}: {reply.text}"
            if status == 200:
                return str.strip(reply.json()["choices"][0]["message"]["content"] or "")
        except Exception as error:  # no connection, or an answer that is no chat completion
            why = why or str(error) or repr(error)
        why = " ".join(why.replace(key or "\0", "$OPENAI_API_KEY").split())[:300]
        if status not in (0, 200, 408, 409, 429) and status < 500:
            raise data.UserError(f"--endpoint {endpoint}: {why}")
        if turn == 2:
            tqdm.write(f"no answer so far, still trying: {why}", file=sys.stderr)
        if turn + 1 == TRIES or stop.wait(pause(turn, after)):
            raise data.UserError(f"--endpoint {endpoint}: no answer in {turn + 1} tries; {why}")


def pause(turn: int, after: str) -> float:
    """Seconds before the next try: twice those before, with jitter; more if Retry-After says so."""
    asked = float(after) if after.isdecimal() else 0  # it is believed up to an hour
    return max(min(PAUSE * 2**turn, LONGEST_PAUSE) * random.uniform(0.5, 1), min(asked, 3600))


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
    begun: dict[data.Messages, list[dict]] = {}
    if args.resume and Path(args.out).exists():
        begun = read_begun(args.out, about, prompts, decodings)
        print(f"resume      {len(begun):,} prompts of {args.out} are done")
    asked, rows = list(prompts), [row for done in begun.values() for row in done]
    what = asked, decodings, args.max_new_tokens
    done = {k for k, prompt in enumerate(asked) if prompt in begun}
    if args.endpoint:
        answered = ask(args.endpoint, args.model, *what, args.concurrency, args.seed, done)
    else:
        lm, _ = sft.load_with_adapter(args.model, args.adapter, scores.pick_dtype(args.dtype))
        answered = generate(lm, *what, args.batch_tokens, args.seed, done)

    writes, written = scores.processes()[0] == 0, len(rows)
    options = {"initial": len(done), "desc": "prompts", "disable": not writes}
    bar = tqdm(total=len(asked), delay=0.1, **options)  # a refusal comes without a bar
    with closing(answered), bar:
        for turn, (k, texts) in enumerate(answered):
            if writes and turn == 0:  # now there is an answer, and every process has read the file
                data.write_jsonl(args.out, rows)
            columns = about | prompts[asked[k]] | {"prompt": data.prompt_column(asked[k])}
            both = zip(texts, decodings, strict=True)
            rows = [columns | {"response": text, "decoding": used} for text, used in both if text]
            if writes:
                data.append_jsonl(args.out, *rows)
            written += len(rows)
            bar.update()
    blank = len(asked) * len(decodings) - written
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
    """UserError before anything is computed, or harmed."""
    out, n = args.out, len(args.decoding)
    if args.samples % n:
        raise data.UserError(
            f"--samples {args.samples}: expected a multiple of {n}, the number of decodings"
        )
    if args.endpoint and args.adapter:
        raise data.UserError("--adapter: not with --endpoint; load the adapter into that server")
    if args.endpoint and scores.processes()[1] > 1:
        raise data.UserError("--endpoint: one process asks it; raise --concurrency instead")
    check_files([args.prompts], [out])
    if Path(out).exists() and not (args.overwrite or args.resume):
        raise data.UserError(
            f"--out {out}: it exists; add --resume to go on with it, or --overwrite"
        )


def read_begun(
    path: str, about: dict, prompts: Container[data.Messages], decodings: Sequence[dict]
) -> dict[data.Messages, list[dict]]:
    """The rows of a file that was begun, by prompt, in order.

    The last prompt is left out if it has fewer rows than samples: some may not have been written.
    Rows that other prompts lack were blank. UserError: this command would not have written a row.
    """
    begun: dict[data.Messages, list[dict]] = defaultdict(list)
    torn = Path(path).read_bytes().rpartition(b"\n")[2]
    if torn[:10] != b'{"model": '[: len(torn)]:
        raise data.UserError(
            f"--resume {path}: its last line was not begun by generate; name another"
        )
    for where, row in data.read_jsonl(path, torn=True):
        prompt = data.parse_messages(row.get("prompt"), "prompt", where, data.PROMPT_EXAMPLE)
        agrees = {key: row.get(key) == about[key] for key in about}
        agrees |= {"prompt": prompt in prompts, "decoding": row.get("decoding") in decodings}
        for key in agrees:
            if not agrees[key]:
                raise data.UserError(
                    f"{where}: {key!r} is {json.dumps(row.get(key))[:200]}, which this command "
                    "would not write here; --resume takes the flags that the file was begun with"
                )
        begun[prompt].append(row)
    if begun and len(begun[prompt]) < len(decodings):
        del begun[prompt]
    return begun


def base_url(text: str) -> str:
    """An argparse type: an http(s) address without its last slash, and without a key."""
    if not re.fullmatch(r"https?://[^/@?#\s][^@?#\s]*", text):
        raise argparse.ArgumentTypeError("expected an address such as https://api.openai.com/v1")
    return text.rstrip("/")


def add_generate(commands) -> None:
    command = commands.add_parser("generate", help="sample responses to prompts")
    command.set_defaults(call=generate_command)
    data.flag(command, "--prompts", ..., "JSONL with a `prompt` column")
    data.flag(command, "--split", None, "only rows of these splits, e.g. HeldoutItem", nargs="+")
    data.flag(command, "--out", ..., "JSONL of responses, written as they come")
    either = command.add_mutually_exclusive_group()
    data.flag(either, "--overwrite", False, "replace --out if it exists")
    data.flag(either, "--resume", False, "go on with --out where it ends")
    name = "what --out calls the model; runs of one name are its seeds (default: its own name)"
    data.flag(command, "--name", None, name)
    data.flag(command, "--model", "tiny", "name or folder; with --endpoint, the server's name")
    data.flag(command, "--adapter", None, "adapter of sft.py, crpo.py or PEFT")
    server = (
        "ask an OpenAI-compatible server, such as https://api.openai.com/v1 or "
        "http://localhost:8000/v1; the key is that of the environment variable OPENAI_API_KEY"
    )
    data.flag(command, "--endpoint", None, server, base_url, metavar="URL")
    sampling, whole = command.add_argument_group("sampling"), data.number(int, 1)
    data.flag(sampling, "--samples", 16, "responses a prompt", whole)
    settings = (
        "settings that share the samples evenly: temperature t (0: the likeliest token), top-p p, "
        f"top-k k, min_p; without t it is 1, the others are off (default: the paper's, {PAPERS})"
    )
    options = {"nargs": "+", "metavar": "t=0.7,p=0.95"}
    data.flag(sampling, "--decoding", None, settings, parse_decoding, **options)
    command.set_defaults(decoding=DECODINGS, split=[])
    data.flag(sampling, "--max-new-tokens", 1024, "a response", whole)
    room = (
        "tokens at a time, prompts and new ones of all responses that are drawn together: as many "
        "as the GPU holds beside the weights; a model of 8B in bfloat16 caches 131 KB for a "
        "token, so 65,536 take 8.6 GB"
    )
    data.flag(sampling, "--batch-tokens", 65536, room, whole)
    most = data.number(int, 1, 100)  # connections of huggingface_hub's client
    data.flag(sampling, "--concurrency", 8, "requests to --endpoint at a time", most)
    data.flag(sampling, "--seed", 42, "of the draws", data.number(int, 0, 2**32))
    scores.add_dtype_flag(command)


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
        for cell, found in zip(cells, scores.SIGNALS[signal](pools, scorers), strict=True):
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
    named = {
        signal: getattr(args, scores.SCORER_OF[signal]) or "human scores" for signal in signals
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
RESPONSE_TOKENS = 128  # of each response: all that the classifier was trained to see
TOKENIZER = "microsoft/deberta-v3-large"  # the published classifier comes without its own
# Rewards to u = 1..10: at these the one of the reward model that the benchmark uses, at the others
# a judge's scores, cut into ten equal parts of 10 to 50.
SKYWORK = "Skywork-Reward-Gemma-2-27B-v0.2"
SKYWORK_BINS = (-7.71875, -6.28125, -6, -5.71875, -5.5, -5, -4.375, -3.4375, -2.046875)
JUDGE_BINS = tuple(range(14, 50, 4))
GENERATIONS_EXAMPLE = '{"prompt": "A use for a brick?", "generations": ["A door stop.", "..."]}'

Same = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]


def read_answers(paths: Sequence[str]) -> dict[str, dict[tuple, list[str]]]:
    """{model: {(prompt, id): its responses}} in the order of the files.

    The files hold responses, or are the benchmark's own, where a line has a prompt with all its
    `generations`, which may be blank. UserError where a line is neither.
    """
    answers: dict[str, dict[tuple, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        if "generations" not in next(data.read_rows(path))[1]:
            for sample in data.read_samples(path):
                model = str(sample.row.get("model", "human"))
                answers[model][sample.prompt, None].append(sample.response)
            continue
        for where, row in data.read_rows(path):
            prompt = data.parse_messages(row.get("prompt"), "prompt", where, GENERATIONS_EXAMPLE)
            prompt = data.check_prompt(prompt, where)
            model, texts = str(row.get("model") or path), row.get("generations")
            if not isinstance(texts, list) or not texts:
                raise data.UserError(
                    f"{where}: 'generations' is {json.dumps(texts):.60}; expected a list of "
                    f"responses, as in {GENERATIONS_EXAMPLE}"
                )
            for text in texts:
                if not isinstance(text, str) or text.strip():
                    data.check_text(text, "generations", where, GENERATIONS_EXAMPLE)
            answers[model][prompt, str(row.get("id"))] += texts
    return answers


def shares_words(one: str, other: str) -> bool:
    """2 |words of both| >= the number of words of the longer: lower case, split at spaces."""
    a, b = one.lower().split(), other.lower().split()
    return 2 * len(set(a) & set(b)) >= max(len(a), len(b))


class Classifier:
    """The probability that two responses say the same: a sequence classifier with two labels.

    Its label 1 is "the same", and it is run in float32 on the first RESPONSE_TOKENS tokens of each
    response, as the benchmark has it.
    """

    def __init__(self, name: str):
        auto = transformers.AutoModelForSequenceClassification
        self.checkpoint = scores.Checkpoint(name, auto, torch.float32)
        labels = self.checkpoint.config.num_labels
        if labels != 2:
            raise data.UserError(f"equivalence model {name}: it has {labels} labels; expected two")
        tokenizer = self.checkpoint.tokenizer
        if set(tokenizer("A brick.")["input_ids"]) <= set(tokenizer.all_special_ids):
            # no word is known: transformers makes such a tokenizer where the files are missing
            try:
                self.checkpoint.tokenizer = scores.Checkpoint(
                    TOKENIZER, auto, torch.float32
                ).tokenizer
            except data.UserError as error:
                raise data.UserError(
                    f"equivalence model {name}: it comes without a tokenizer, and that of "
                    f"{TOKENIZER} is not to be had, which needs the packages sentencepiece and "
                    f"protobuf too ({error})"
                ) from None
        special = self.checkpoint.tokenizer.num_special_tokens_to_add(pair=True)
        self.limit = min(RESPONSE_TOKENS, (self.checkpoint.context - special) // 2)

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Probabilities [n] fp32 of n (first, second) pairs, each computed once ever."""
        checkpoint, tokenizer = self.checkpoint, self.checkpoint.tokenizer
        encoded = tokenizer(*map(list, zip(*pairs, strict=True)))
        columns = [key for key in ("input_ids", "token_type_ids") if key in encoded]
        rows: dict[str, list[list[int]]] = {key: [] for key in columns}
        for k in range(len(pairs)):
            seen, kept = Counter(), []
            for t, side in enumerate(encoded.sequence_ids(k)):  # 0, 1, or None: a special token
                seen[side] += 1
                if side is None or seen[side] <= self.limit:
                    kept.append(t)
            for key in columns:
                rows[key].append([encoded[key][k][t] for t in kept])

        def compute(batch):
            model, blank = checkpoint.model, tokenizer.pad_token_id or 0
            if hasattr(model, "score"):  # reads the last token, and finds it by the id of PAD
                raise data.UserError(
                    f"equivalence model {checkpoint.name}: {type(model).__name__} is not "
                    "supported; expected an encoder, such as DeBERTa"
                )
            padded = {
                key: scores.pad(
                    [rows[key][k] for k in batch], blank * (key == "input_ids"), model.device
                )
                for key in columns
            }
            inputs = {key: ids for key, (ids, _) in padded.items()}
            logits = model(attention_mask=padded["input_ids"][1], **inputs).logits  # [n, 2]
            return logits.float().softmax(-1)[:, 1:].cpu().numpy()

        return scores.fill_rows("same", checkpoint, 1, rows["input_ids"], compute, "equivalence")[
            :, 0
        ]


def equivalence(decide: Same) -> Same:
    """same(pairs) is decide(pairs), but for short answers, where sharing words decides.

    These have at most five words, or one of them has none.
    """

    def same(pairs):
        equal = [shares_words(*pair) for pair in pairs]
        lengths = [(len(one.split()), len(other.split())) for one, other in pairs]
        long = [i for i, both in enumerate(lengths) if max(both) > 5 and min(both) > 0]
        if long:
            for i, decided in zip(long, decide([pairs[i] for i in long]), strict=True):
                equal[i] = bool(decided)
        return equal

    return same


def partition_plain(generations: Sequence[str], same: Same) -> list[int]:
    """The class of each of n generations, greedily in order: the definition.

    A generation joins the first class whose first member says the same, or else founds one.
    """
    heads, classes = [], []
    for text in generations:
        joined = (c for c, head in enumerate(heads) if same([(head, text)])[0])
        classes.append(next(joined, len(heads)))
        if classes[-1] == len(heads):
            heads.append(text)
    return classes


def partition(lists: Sequence[Sequence[str]], same: Same) -> list[list[int]]:
    """As `partition_plain` for each of many lists, with the same comparisons in few calls.

    In round c the first generation without a class founds class c, in all lists at once, and is
    compared with those behind it that have none either.
    """
    classes = [[-1] * len(texts) for texts in lists]
    for c in range(max(map(len, lists))):
        pairs, places = [], []
        for texts, assigned in zip(lists, classes, strict=True):
            if -1 in assigned:
                head = assigned.index(-1)
                assigned[head] = c
                rest = [i for i, earlier in enumerate(assigned) if earlier == -1]
                pairs += [(texts[head], texts[i]) for i in rest]
                places += [(assigned, i) for i in rest]
        for (assigned, i), equal in zip(places, same(pairs), strict=True):
            if equal:
                assigned[i] = c
    return classes


def firsts(classes: Sequence[int]) -> list[int]:
    """Where the first generation of each class stands."""
    return [i for i, c in enumerate(classes) if c not in classes[:i]]


def utility(classes: Sequence[int], worth: Sequence[float]) -> float:
    """(1 - p) / (1 - p^n) sum_i p^(i-1) [c_i is new] u_i over the n generations; u = worth [n].

    This is a mean of u, 0 for repetitions, weighted by how likely a user is to ask for the i-th.
    With fewer than k generations n is their number, so that the weights still sum to 1.
    """
    weights = PATIENCE ** np.arange(len(classes))
    return float(sum(weights[i] * worth[i] for i in firsts(classes)) / weights.sum())


def score_firsts(prompts, lists, partitions, reward_model, bins) -> list[list[int]]:
    """u = 1..10 of the first generation of each class, 0 for its repetitions: for each prompt [n].

    Only those are scored. A reward equal to a threshold of `bins` is in the lower bin.
    """
    places = [(k, i) for k, classes in enumerate(partitions) for i in firsts(classes)]
    rewards = reward_model([(prompts[k], lists[k][i]) for k, i in places])
    worth = [[0] * len(classes) for classes in partitions]
    for (k, i), u in zip(places, np.searchsorted(bins, rewards) + 1, strict=True):
        worth[k][i] = int(u)
    return worth


def measure_answers(model: str, answers: dict, k: int, same: Same, quality) -> dict:
    """A model's row of the results. quality: (reward model, bins), or None."""
    prompts, lists = [prompt for prompt, _ in answers], [texts[:k] for texts in answers.values()]
    partitions = partition(lists, same)
    values = {"distinct": [len(set(classes)) for classes in partitions]}
    if quality:
        worth = score_firsts(prompts, lists, partitions, *quality)
        values["utility"] = list(map(utility, partitions, worth))
    row = {"model": model, "prompts": len(lists)}
    row["fewer_than_k"] = sum(len(texts) < k for texts in lists)
    for name, each in values.items():
        row[f"mean_{name}"] = float(np.mean(each))
        row[f"mean_{name}_interval"] = bootstrap({"": dict(enumerate(each))})
    return row


def load_equivalence(args, texts: Sequence[str]) -> tuple[dict, Same]:
    """What the results name, and same(pairs): of --equivalence, --embedder, or shared words."""
    if not (args.equivalence or args.embedder):
        if args.threshold is not None:
            raise data.UserError("--threshold: it belongs to --equivalence or --embedder")
        same = equivalence(lambda pairs: [shares_words(*pair) for pair in pairs])
        return {"equivalence": "shared words"}, same
    default = SAME if args.equivalence else COSINE
    threshold = default if args.threshold is None else args.threshold
    if args.equivalence:
        classifier = Classifier(args.equivalence)
        same = equivalence(lambda pairs: classifier(pairs) > threshold)
        return {"equivalence": args.equivalence, "threshold": threshold}, same
    vector = scores.load_embedder(args.embedder, scores.pick_dtype(args.dtype))(texts)

    def close(pairs):
        dots = np.array([vector[one] @ vector[other] for one, other in pairs])
        return dots >= threshold - 1e-6  # a text and itself, at a threshold of 1

    named = {"equivalence": f"cosine of {args.embedder}", "threshold": threshold}
    return named, equivalence(close)


def noveltybench_command(args) -> None:
    check_files(args.responses, [args.out])
    models, quality = read_answers(args.responses), None
    lists = [texts[: args.k] for answers in models.values() for texts in answers.values()]
    scorers, same = load_equivalence(args, list(dict.fromkeys(chain(*lists))))
    if args.reward_model:
        reward_model = scores.load_reward_model(args.reward_model, scores.pick_dtype(args.dtype))
        judge = isinstance(reward_model, scores.Judge)
        quality = reward_model, JUDGE_BINS if judge else SKYWORK_BINS
        scorers["reward_model"] = args.reward_model
        scorers["reward_bins"] = "10 to 50 in ten" if judge else f"those of {SKYWORK}"
    rows = [measure_answers(*item, args.k, same, quality) for item in models.items()]
    results = {"k": args.k, "patience": PATIENCE, "scorers": scorers, "rows": rows}
    data.write_file(args.out, json.dumps(results, indent=2) + "\n")

    names = ["distinct", "utility"] if quality else ["distinct"]
    table = [["model", "prompts", f"fewer than {args.k}", *(f"{name} (95 %)" for name in names)]]
    for row in rows:
        means = [with_interval(row[f"mean_{n}"], row[f"mean_{n}_interval"]) for n in names]
        table.append([row["model"], f"{row['prompts']:,}", f"{row['fewer_than_k']:,}", *means])
    print_columns(table)
    print("scorers: " + ", ".join(f"{key} {value}" for key, value in scorers.items()))
    if quality and not judge and Path(args.reward_model).name != SKYWORK:
        print(f"warning: the bins are those of {SKYWORK}; {args.reward_model} may need others")
    print(f"saved {args.out}")


def add_noveltybench(commands) -> None:
    command = commands.add_parser("noveltybench", help="distinct answers and their utility")
    command.set_defaults(call=noveltybench_command)
    files = "JSONL files of responses, or the benchmark's own with `generations`"
    data.flag(command, "--responses", ..., files, nargs="+")
    data.flag(command, "--out", ..., "JSON file to write", ends_in(".json"))
    data.flag(command, "--k", 10, "first generations a prompt", data.number(int, 1))
    models = command.add_mutually_exclusive_group()
    classifier = (
        'classifier of two responses, whose second label means "the same"; the benchmark\'s is '
        "yimingzhang/deberta-v3-large-generation-similarity (default: they are the same if twice "
        "the words they share reach the length of the longer)"
    )
    data.flag(models, "--equivalence", None, classifier)
    cosine = "instead: they are the same if the cosine of this embedder reaches --threshold"
    data.flag(models, "--embedder", None, cosine)
    threshold = (
        "two responses are the same above it "
        f"(default: {SAME} for --equivalence, {COSINE} for --embedder)"
    )
    data.flag(command, "--threshold", None, threshold, data.number(float, 0, 1))
    reward = f"for utility; the benchmark's is Skywork/{SKYWORK}; or a folder of scores.py judge"
    data.flag(command, "--reward-model", None, reward)
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
