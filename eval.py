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
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
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
    depends_on = ["max_new_tokens", "seed", "samples", *["batch_tokens"] * (not args.endpoint)]
    common = {key: getattr(args, key) for key in depends_on}
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
        lm, _ = scores.load_with_adapter(args.model, args.adapter, scores.pick_dtype(args.dtype))
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
        classifier = scores.Equivalence(args.equivalence)
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
        for signal, lam in product(args.signals, args.lambdas):
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
