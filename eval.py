"""eval.py: did it work?

    python eval.py generate --model M --adapter runs/crpo --prompts heldout.jsonl --out crpo.jsonl
    python eval.py score --responses base.jsonl crpo.jsonl --out results.json
    python eval.py noveltybench --responses base.jsonl crpo.jsonl --out nb.json
    python eval.py human sheet --responses base.jsonl crpo.jsonl --out sheet.html
    python eval.py human tally --sheets sheet.*.csv --key sheet.key.json --out human.json
    python eval.py paper --data rated.jsonl --model M --out paper  # all of it, from the ratings on

generate samples responses, from a model at hand or behind an endpoint. score measures them as in
section 4 of arXiv 2505.14442, over a model's responses Y to a prompt, then over prompts and tasks:

    novelty    mean over y in Y of 2 | DSI(y) - DSI(Y) |
    diversity  mean semantic distance over the pairs of Y
    surprise   mean perplexity of y given the prompt
    quality    mean reward

noveltybench counts different answers (arXiv 2504.05228), human asks people, paper runs it all.
"""

import crpo
import data
import scores
import sft

import argparse
import ctypes
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import chain, combinations, islice, product
from pathlib import Path
from signal import SIGTERM

import huggingface_hub
import numpy as np
import torch
import transformers

# ---- Generating responses ------------------------------------------------------------------------

# What --decoding calls the settings; PLAIN leaves nothing out.
SETTINGS = {
    "t": ("temperature", data.number(float, 0, 100)),
    "p": ("top_p", data.number(float, 1e-6, 1)),
    "k": ("top_k", data.number(int, 0)),
    "min_p": ("min_p", data.number(float, 0, 1)),
}
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def parse_decoding(text: str) -> dict[str, float]:
    """An argparse type: t=0.7,p=0.95 and the like as a dict with the keys of PLAIN."""
    decoding = dict(PLAIN)
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in SETTINGS:
            raise argparse.ArgumentTypeError(f"{part!r}: expected t=, p=, k= or min_p=")
        name, parse = SETTINGS[key]
        decoding[name] = parse(value)
    return decoding


PAPERS = "t=0.7,p=0.95 t=0.9,p=0.99 t=0.7,k=50 t=0.8,p=0.97"
DECODINGS = [parse_decoding(text) for text in PAPERS.split()]


def generate(lm, prompts: Sequence, args, done: Set[int]) -> Iterator[tuple[int, list[str]]]:
    """Yield (index of a prompt, its --samples responses), as many of each decoding, in turn.

    Prompts of like length form a batch; what one decoding draws for it has at most --batch-tokens.
    The seed, the batch's place and the decoding decide what is drawn, so batches whose prompts are
    all `done` can be left out, and process r of W takes batches r, r + W, ... of the others.
    """
    ids = lm.encoder.ids([lm.encoder.head(prompt) for prompt in prompts])
    longest = max(map(len, ids))
    if longest >= lm.context:
        raise data.UserError(f"a prompt of {longest} tokens leaves no room in {lm.name}")
    limit, each = min(args.max_new_tokens, lm.context - longest), args.samples // len(args.decoding)
    batches = scores.by_length([each * (len(row) + limit) for row in ids], args.batch_tokens)
    todo = [place for place, batch in enumerate(batches) if not done.issuperset(batch)]

    def answer(place: int) -> list[tuple[int, list[str]]]:
        texts: dict[int, list[str]] = {k: [] for k in batches[place]}
        for turn, decoding in enumerate(args.decoding):
            torch.manual_seed(int(np.random.default_rng([args.seed, place, turn]).integers(2**63)))
            drawn = iter(tidy(sample(lm, [ids[k] for k in texts], decoding, each, limit)))
            for row in texts.values():
                row += islice(drawn, each)
        return [(k, row) for k, row in texts.items() if k not in done]

    rank, world = scores.processes()
    for first in range(0, len(todo), world):
        mine = answer(todo[first + rank]) if first + rank < len(todo) else []
        everyone = [mine] * world
        if world > 1:
            torch.distributed.all_gather_object(everyone, mine)
        yield from chain(*everyone)


def sample(lm, ids: list[list[int]], decoding: dict, n: int, limit: int) -> list[str]:
    """n responses to each of P prompts, prompt by prompt: P * n texts of 1 to `limit` tokens."""
    stop, T = lm.encoder.stop_ids(), max(map(len, ids))
    left = torch.tensor([[stop[0]] * (T - len(row)) + row for row in ids], device=lm.device)
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in ids], device=lm.device)
    settings, copies = {"do_sample": True, "num_return_sequences": n} | decoding, 1
    if decoding["temperature"] == 0:
        settings, copies = {"do_sample": False}, n  # the likeliest response, n times
    settings |= {"max_new_tokens": limit, "min_new_tokens": 1}
    config = transformers.GenerationConfig(eos_token_id=stop, pad_token_id=stop[0], **settings)
    lm.model.generation_config = config  # that of the checkpoint would fill in what is left out
    out = lm.model.generate(left, attention_mask=mask, generation_config=config)
    texts = lm.encoder.tokenizer.batch_decode(out[:, T:], skip_special_tokens=True)
    return [text for text in texts for _ in range(copies)]


def tidy(texts: Sequence[str]) -> list[str]:
    """Without the blanks around them, and what is read nowhere: NUL, escape, lone surrogates."""
    return [re.sub("[\0\x1b\ud800-\udfff]", "", text).strip() for text in texts]


TRIES = 8  # of a request
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second try, each later one: twice that
TIMEOUT = 600.0  # seconds without a byte, or for a whole answer
LONGEST_ANSWER = 2**24  # bytes


def ask(prompts: Sequence, args, done: Set[int]) -> Iterator[tuple[int, list[str]]]:
    """As `generate`, from an OpenAI-compatible server, with --concurrency requests at a time."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise data.UserError("OPENAI_API_KEY: a key has no line breaks and no letters beyond ASCII")
    todo, stop = [k for k in range(len(prompts)) if k not in done], threading.Event()
    n, each = args.samples, args.samples // len(args.decoding)

    def answer(place: tuple[int, int]) -> str:
        k, turn = place
        decoding = args.decoding[turn // each]
        # a filter that leaves nothing out is not sent: a server may not know it
        body = {s: x for s, x in decoding.items() if s == "temperature" or x != PLAIN[s]}
        body["messages"] = [{"role": role, "content": text} for role, text in prompts[k]]
        body |= {"model": args.model, "max_tokens": args.max_new_tokens}
        body["seed"] = (args.seed * n + turn) % 2**31  # what every server takes
        return chat(args.endpoint, key, body, stop)

    pool = ThreadPoolExecutor(args.concurrency)
    try:
        texts = pool.map(answer, product(todo, range(n)))
        for k in todo:
            yield k, tidy(list(islice(texts, n)))
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def chat(endpoint: str, key: str, body: dict, stop: threading.Event) -> str:
    """The answer to one request, tried again while the server is busy or away, until `stop`."""
    client = huggingface_hub.get_session()  # of httpx; by itself it sends no token
    client.event_hooks = {}  # HF_HUB_OFFLINE is about the hub, not about this server
    options = {"headers": {"Authorization": f"Bearer {key}"} if key else {}, "timeout": TIMEOUT}
    options["follow_redirects"] = False  # the key stays with this server
    url = f"{endpoint.rstrip('/')}/chat/completions"
    for turn in range(TRIES):
        status, after, why = 0, "", ""
        try:
            with client.stream("POST", url, json=body, **options) as reply:
                status, after = reply.status_code, reply.headers.get("Retry-After", "")
                answer = read_answer(reply)
            why = f"HTTP {status}: {answer}"
            if status == 200:
                return str.strip(json.loads(answer)["choices"][0]["message"]["content"] or "")
        except Exception as error:  # no connection, or an answer that is no chat completion
            why = why or repr(error)
        why = " ".join(why.replace(key or "\0", "$OPENAI_API_KEY").split())[:300]
        if status not in (0, 200, 408, 409, 429) and status < 500:
            raise data.UserError(f"--endpoint {endpoint}: {why}")
        if turn == 2:
            data.tqdm.write(f"no answer so far, still trying: {why}", file=sys.stderr)
        pause = min(PAUSE * 2**turn, LONGEST_PAUSE) * np.random.uniform(0.5, 1)
        asked = min(float(after), 3600) if after.isdecimal() else 0
        if turn + 1 == TRIES or stop.wait(max(pause, asked)):
            raise data.UserError(f"--endpoint {endpoint}: no answer in {turn + 1} tries; {why}")


def read_answer(reply) -> str:
    """The body of an answer, as it comes; ValueError if it does not end."""
    body, end = b"", time.monotonic() + TIMEOUT
    for part in reply.iter_bytes():
        body += part
        if len(body) > LONGEST_ANSWER or time.monotonic() > end:
            raise ValueError("its answer does not end")
    return body.decode(errors="replace")


def generate_command(args) -> None:
    scores.join_processes()
    if args.samples % (n := len(args.decoding)):
        raise data.UserError(f"--samples {args.samples}: expected a multiple of {n}")
    local = args.adapter or args.template_kwargs or scores.processes()[1] > 1
    if args.endpoint and (local or not re.fullmatch(r"https?://[^@?#\s]+", args.endpoint)):
        raise data.UserError("--endpoint: expected http[s]://..., one process and no --adapter")
    for path in (args.prompts, *(args.limit_like or ())):
        data.check_files(path, args.out)
    if Path(args.out).exists() and not (args.overwrite or args.resume):
        raise data.UserError(f"--out {args.out}: it exists; add --resume or --overwrite")
    prompts = data.read_prompts(args.prompts, *args.split or ())
    with data.locked(args.out):
        write_responses(args, prompts)


def write_responses(args, prompts: dict[data.Messages, dict]) -> None:
    run = args.adapter or args.model
    about = {"model": args.name or run, "run": run}
    common = {key: getattr(args, key) for key in ("max_new_tokens", "seed", "samples")}
    if not args.endpoint:
        common["batch_tokens"] = args.batch_tokens  # batches decide what is drawn
    asked = sent = list(prompts)
    if args.limit_like:
        limit = common["append"] = length_limit(args.limit_like)
        sent = [(*turns, ("user", f"{text}\n{limit}")) for *turns, (_, text) in asked]
    if args.template_kwargs:
        common["template_kwargs"] = args.template_kwargs
    each = args.samples // len(args.decoding)
    decodings = [decoding | common for decoding in args.decoding for _ in range(each)]
    begun: dict[data.Messages, list[dict]] = {}
    if args.resume and Path(args.out).is_file():
        begun = read_begun(args.out, about, prompts, decodings)
        print(f"resume      done in {args.out}: {data.plural(len(begun), 'prompt')}")
    rows = [row for answered in begun.values() for row in answered]
    done = {k for k, prompt in enumerate(asked) if prompt in begun}
    if args.endpoint:
        answers = ask(sent, args, done)
    else:
        lm, _ = sft.load_with_adapter(args.model, args.adapter, scores.pick_dtype(args.dtype))
        scores.probe(lm, longest=9)  # refuses a model whose numbers are not finite
        answers = generate(lm, sent, args, done)

    writes, written = scores.processes()[0] == 0, len(rows)
    options = {"initial": len(done), "delay": 0.1, "disable": not writes}
    for turn, (k, texts) in enumerate(data.progress(answers, "prompts", len(asked), **options)):
        if writes and turn == 0:  # now there is an answer, and every process has read the file
            data.write_file(args.out, data.jsonl(rows))
        columns = about | prompts[asked[k]] | {"prompt": data.prompt_column(asked[k])}
        both = zip(texts, decodings, strict=True)
        rows = [columns | {"response": text, "decoding": used} for text, used in both if text]
        if writes:
            with open(args.out, "ab") as file:
                file.write(data.jsonl(rows))
        written += len(rows)
    blank = len(asked) * args.samples - written
    print(f"saved {args.out}: {data.plural(len(asked), 'prompt')}, blank and left out: {blank:,}")


def length_limit(paths: Sequence[str]) -> str:
    """What the authors ask of untuned models: to be as long as the responses in these files."""
    texts = [sample.response for path in paths for sample in data.read_samples(path)]
    sentences = np.median([len(re.findall(r"[.!?]+(?!\S)|[。！？]", t)) or 1 for t in texts])
    words = np.median([len(scores.running_words(text)) for text in texts])
    length = f"{data.plural(round(sentences), 'sentence')} and at most {words:.0f} words"
    return f"Limit your response to {length}."


def read_begun(path: str, about: dict, prompts: Set, decodings: list) -> dict[tuple, list[dict]]:
    """The rows of a file that was begun, by prompt; UserError: they are not this command's."""
    begun = defaultdict(list)
    torn = Path(path).read_bytes().rpartition(b"\n")[2]
    wrong = "is not one that this command would write; --resume takes the flags of the start"
    if torn[:10] != b'{"model": '[: len(torn)]:
        raise data.UserError(f"{path}: its last line {wrong}")
    for where, row in data.read_jsonl(path, torn=True):
        prompt = data.parse_messages(row.get("prompt"), "prompt", where)
        begun[prompt].append(row)
        known = prompt in prompts and row.get("decoding") in decodings
        if not (known and about.items() <= row.items()):
            raise data.UserError(f"{where}: this row {wrong}")
    if begun and len(begun[prompt]) < len(decodings):  # the last, perhaps cut short
        del begun[prompt]
    return begun


def add_generate(commands) -> None:
    command = commands.add_parser("generate", help="sample responses to prompts")
    command.set_defaults(call=generate_command, decoding=DECODINGS)
    flag, whole = partial(data.flag, command), data.number(int, 1)
    flag("--prompts", ..., "JSONL with a `prompt` column")
    flag("--split", None, "only rows of these splits, e.g. HeldoutItem", nargs="+")
    flag("--out", ..., "JSONL of responses, written as they come")
    either = command.add_mutually_exclusive_group()
    data.flag(either, "--overwrite", False, "replace --out if it exists")
    data.flag(either, "--resume", False, "go on with --out where it ends")
    flag("--name", None, "of the model in --out; runs of one name are its seeds")
    flag("--model", "tiny", "name or folder; with --endpoint, the server's name")
    flag("--adapter", None, "adapter of sft.py, crpo.py or PEFT")
    flag("--endpoint", None, "OpenAI-compatible server to ask; its key is $OPENAI_API_KEY")
    what = "for untuned models: ask for responses as long as those in these files"
    flag("--limit-like", None, what, nargs="+", metavar="FILE")
    flag("--samples", 16, "responses a prompt", whole)
    help = f"temperature t (0: greedy), top-p p, top-k k, min_p, in turn (default: {PAPERS})"
    flag("--decoding", None, help, parse_decoding, nargs="+")
    flag("--max-new-tokens", 1024, "a response", whole)
    flag("--batch-tokens", 65536, "tokens at a time, old and new; at 8B each caches 131 KB", whole)
    flag("--concurrency", 8, "requests to --endpoint at a time", data.number(int, 1, 100))
    flag("--seed", 42, "of the draws", data.number(int, 0, 2**32))
    scores.add_model_flags(command)


# ---- Scoring -------------------------------------------------------------------------------------

# What stands beside the signals: length, and how much the responses to a prompt repeat.
BESIDE = ("words", "one-word", "duplicates")
# Variants trained with quality, and the same without.
QUALITY_PAIRS = [(f"CrPO-{name}-qua", f"CrPO-{name}") for name in ("nov", "div", "sur", "inf")]
QUALITY_PAIRS += [("CrPO-cre", "CrPO-nov-div-sur")]
# In the figure these models, or else the first four, have colours and names; the others are grey.
MARKED = ("base", "DPO", "CrPO-nov-div-sur", "CrPO-gated")
CORNERS = ((4, 4, "left"), (-4, -11, "right"), (-4, 4, "right"), (4, -11, "left"))  # of the names
ALL = "all tasks"
LEGEND = "Brackets: 95 % intervals over prompts, too narrow for fewer than ten. ±: over runs."


def repetition(texts: Sequence[str]) -> dict[str, float]:
    """BESIDE: words a response, and the shares of one-word responses and of repeated ones."""
    tokens = [scores.running_words(text) for text in texts]
    values = {"words": float(np.mean([len(row) for row in tokens]))}
    values["one-word"] = float(np.mean([len(set(row)) < 2 for row in tokens]))
    return values | {"duplicates": 1 - len(set(texts)) / len(texts)}


def group(samples: Sequence[data.Sample]) -> tuple[list[dict], list[list[data.Sample]]]:
    """A cell for each (model, run, task, prompt), and the samples that belong to it."""
    groups = defaultdict(list)
    for sample in samples:
        model = str(sample.row.get("model", "human"))
        run = str(sample.row.get("run", model))
        groups[model, run, sample.task, sample.prompt].append(sample)
    cells = [dict(zip(("model", "run", "task", "prompt"), key, strict=True)) for key in groups]
    return cells, list(groups.values())


def measure(samples, signals: Sequence[str], scorers: scores.Scorers) -> list[dict]:
    """The cells, with the means over their responses of each signal and of BESIDE."""
    cells, groups = group(samples)
    # novelty leaves one-word responses out, unless there are no others, as the authors do
    longer = [[s for s in some if len(scores.words(s.response)) > 1] or some for some in groups]
    for cell, members in zip(cells, groups, strict=True):
        cell |= {"responses": len(members)} | repetition([s.response for s in members])
    for kind in dict.fromkeys(filter(None, (scores.SIGNALS[name].scorer for name in signals))):
        scorers.get(kind)  # a wrong name is reported before another scorer has run for hours
    for signal in signals:
        pools = []
        for members in longer if signal == "novelty" else groups:
            texts, human = [s.response for s in members], np.array([s.score for s in members])
            pools.append(scores.Pool(members[0].prompt, texts, np.ones(len(texts), bool), human))
        for cell, raw in zip(cells, scores.SIGNALS[signal].function(pools, scorers), strict=True):
            cell[signal] = float(np.mean(raw))
    return cells


def bootstrap(tasks: Sequence[np.ndarray]) -> np.ndarray | None:
    """95 % percentile intervals [2, N] of means over prompts, then over tasks of [P, N] values.

    A replicate draws P - 1 of a task's P prompts, which gives its mean the right variance (Rao and
    Wu 1988). Still, of normal means over 4, 8, 16 or 40 prompts 82, 89, 93 or 94 % are covered. A
    task of one prompt adds no uncertainty, for none can be seen; None: no task has two.
    """
    rng, means = np.random.default_rng(0), []
    for values in tasks:
        P = len(values)
        drawn = rng.multinomial(P - 1, [1 / P] * P, 10_000) if P > 1 else np.ones((1, 1))
        means.append(drawn @ values / max(P - 1, 1))  # [replicates, N], or [1, N]
    replicates = sum(means) / len(means)
    return np.quantile(replicates, (0.025, 0.975), axis=0) if len(replicates) > 1 else None


def summarise(cells: Sequence[dict], names: Sequence[str]) -> dict:
    """Each measure's mean over runs, then prompts, then tasks; its interval as `<name>_95`."""
    grouped = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        grouped[cell["task"]][cell["prompt"]].append([cell[name] for name in names])
    tasks = [np.array([np.mean(runs, 0) for runs in task.values()]) for task in grouped.values()]
    means, interval = np.mean([task.mean(0) for task in tasks], 0), bootstrap(tasks)
    runs = list(dict.fromkeys(cell["run"] for cell in cells))
    row: dict = {"runs": len(runs), "prompts": sum(map(len, tasks))}
    for n, name in enumerate(names):
        ends = None if interval is None else interval[:, n].tolist()
        row |= {name: float(means[n]), f"{name}_95": ends}
    if len(runs) > 1:  # as `<name>_runs` the means of each
        each = [summarise([c for c in cells if c["run"] == run], names) for run in runs]
        row |= {f"{name}_runs": [part[name] for part in each] for name in names}
    return row


def tabulate(cells: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """The paper's table: a row for each (model, task), then one over a model's several tasks."""
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        of_model = [cell for cell in cells if cell["model"] == model]
        tasks = list(dict.fromkeys(cell["task"] for cell in of_model))
        for task in [*tasks, ALL] if len(tasks) > 1 else tasks:
            chosen = [cell for cell in of_model if task in (cell["task"], ALL)]
            n = sum(cell["responses"] for cell in chosen)
            rows.append({"model": model, "task": task, "responses": n} | summarise(chosen, names))
    return rows


def compare(cells: Sequence[dict], signals: Sequence[str]) -> list[dict]:
    """A row of differences for each model minus the first one, and with minus without quality."""
    answers = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        answers[cell["model"]][cell["task"], cell["prompt"]].append(cell)
    first, *others = answers
    pairs = [(model, first) for model in others]
    pairs += [pair for pair in QUALITY_PAIRS if {*pair} <= {*others}]
    rows = []
    for model, other in pairs:
        paired = []  # by prompt, so that differences between prompts widen no interval
        for prompt, of_model in answers[model].items():
            # each run with each: their mean difference is that of the means over runs
            for cell, base in product(of_model, answers[other].get(prompt, ())):
                paired.append(cell | {name: cell[name] - base[name] for name in signals})
        if paired:
            rows.append({"difference": f"{model} − {other}"} | summarise(paired, signals))
    return rows


def lay_out(rows, columns: Sequence[str], measures: Sequence[str]) -> str:
    """Aligned columns; measures have their interval and, of several runs, standard deviation."""
    table = [[*columns, *(f"{name} (95 %)" for name in measures)]]
    for row in rows:
        table.append([str(row[name]) for name in columns])
        for name in measures:
            numbers = [row[name], *(row[f"{name}_95"] or ())]
            text, *ends = map(in_short, numbers)
            text += f" ({' to '.join(ends)})" if ends else ""
            runs = row.get(f"{name}_runs")
            table[-1].append(text + (f", runs ± {np.std(runs, ddof=1):.2g}" if runs else ""))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [[f"{text:{w}}" for text, w in zip(row, widths, strict=True)] for row in table]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def in_short(x: float | None) -> str:
    if x is None or abs(x) < 5e-5:
        return "-" if x is None else "0"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def tables(results: dict) -> str:
    """What `score` prints and a report shows."""
    rows, signals = results["rows"], results["signals"]
    by_task = sorted(rows, key=lambda row: (row["task"] != ALL, row["task"]))
    last = {row["model"]: row for row in rows}.values()  # over all tasks of a model
    texts = ["Results:\n" + lay_out(by_task, ("task", "model", "prompts", "responses"), signals)]
    texts += ["Length and repetition:\n" + lay_out(last, ("model", "runs"), BESIDE)]
    columns = ("difference", "prompts")
    if rows := results["differences"]:
        texts += ["Differences, prompt by prompt:\n" + lay_out(rows, columns, signals)]
    return "\n\n".join([*texts, LEGEND])


def draw_panels(rows: Sequence[dict], signals: Sequence[str], path: str | Path) -> None:
    """The paper's figure 2: a panel for each signal, against quality; humans are dotted lines."""
    from matplotlib.figure import Figure

    rows = {row["model"]: row for row in rows}  # the last one of a model is over all its tasks
    models = [model for model in rows if model != "human"]
    marked = [model for model in MARKED if model in rows] or models[:4]
    names = [name for name in signals if name != "quality"]
    figure = Figure(figsize=(3.7 * len(names), 4), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for model in sorted(models, key=marked.__contains__):  # the marked ones on top
            row, x, y = rows[model], rows[model]["quality"], rows[model][name]
            color = f"C{marked.index(model)}" if model in marked else "0.75"
            across, up = row["quality_95"] or [x, x], row[f"{name}_95"] or [y, y]
            panel.plot(across, [y, y], [x, x], up, x, y, "o", color=color, linewidth=1)
            if model in marked:
                *offset, side = CORNERS[marked.index(model)]  # in points; the name's alignment
                at = {"xytext": offset, "textcoords": "offset points", "ha": side}
                panel.annotate(model, (x, y), color=color, fontsize=8, **at)
        if "human" in rows:
            panel.axvline(rows["human"]["quality"], color="0.5", linestyle=":", linewidth=1)
            panel.axhline(rows["human"][name], color="0.5", linestyle=":", linewidth=1)
        panel.set(xlabel="quality", title=name, xmargin=0.12)
        values = [row[name] for row in rows.values()]
        if max(values) > 5 * min(values) > 0:
            panel.set_yscale("log")
    figure.savefig(path, dpi=160)


def read_responses(paths: Sequence[str], splits: Sequence[str] = ()) -> list[data.Sample]:
    """The rows of all files; of those with a `split` only those of `splits`, if any are named."""
    samples = [sample for path in paths for sample in data.read_samples(path)]
    for split in {*splits} - {str(sample.row.get("split")) for sample in samples}:
        raise data.UserError(f"--split {split}: no response has it")
    return [s for s in samples if not splits or str(s.row.get("split")) in ("None", *splits)]


def score_command(args) -> None:
    data.check_files(*args.responses, args.out, args.figure)
    samples = read_responses(args.responses, args.split or ())
    unrated = sum(math.isnan(sample.score) for sample in samples)
    signals = [s for s in scores.SIGNALS if s != "quality" or args.reward_model or not unrated]
    if args.figure:
        with scores.user_error(f"--figure {args.figure}", "matplotlib and a .png, .pdf or .svg"):
            from matplotlib.figure import Figure

            Figure().savefig(os.devnull, format=Path(args.figure).suffix[1:])
        if "quality" not in signals:
            raise data.UserError("--figure: it is drawn against quality; name a --reward-model")
    models = args.embedder, args.surprise_model, args.reward_model, scores.pick_dtype(args.dtype)
    cells = measure(samples, signals, scores.Scorers(*models, args.perplexity))
    flags = {signal: scores.SIGNALS[signal].scorer for signal in signals}
    scorers = {s: getattr(args, name) or "human scores" for s, name in flags.items() if name}
    results = {"scorers": scorers, "signals": signals, "rows": tabulate(cells, (*signals, *BESIDE))}
    results |= {"differences": compare(cells, signals), "cells": cells}
    data.write_file(args.out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(tables(results))
    print("\nscorers: " + ", ".join(f"{s} {name}" for s, name in scorers.items()))
    if 0 < unrated < len(samples) and not args.reward_model:
        print(f"warning: no quality: responses without a score: {unrated:,}; name a --reward-model")
    if args.figure:
        draw_panels(results["rows"], signals, args.figure)
    print(f"saved {args.out}" + (f", {args.figure}" if args.figure else ""))


def add_score(commands) -> None:
    command = commands.add_parser("score", help="novelty, diversity, surprise, quality")
    command.set_defaults(call=score_command)
    flag = partial(data.flag, command)
    flag("--responses", ..., "JSONL; models are compared with the first row's", nargs="+")
    flag("--split", None, "only of these, where a row has a `split`", nargs="+")
    flag("--out", ..., "JSON file to write")
    flag("--figure", None, "also draw it: a .png, .pdf or .svg (needs matplotlib)")
    reward = "the human scores, if every response has one"
    scores.add_scorer_flags(command, scores.EMBEDDER, "google/gemma-2-27b-it", reward)
    scores.add_model_flags(command)


# ---- NoveltyBench --------------------------------------------------------------------------------

# The benchmark (arXiv 2504.05228), version 1.0: how many different answers are there, and what are
# they worth to a user who asks for one more with probability PATIENCE each time?
PATIENCE = 0.8
SAME = 0.102  # two responses are the same above this probability of the classifier
# Rewards at which u = 1..10 rises: those of the benchmark's reward model, and of a judge (10 to 50)
SKYWORK = "Skywork-Reward-Gemma-2-27B-v0.2"
SKYWORK_BINS = (-7.71875, -6.28125, -6, -5.71875, -5.5, -5, -4.375, -3.4375, -2.046875)
JUDGE_BINS = tuple(range(14, 50, 4))


class Equivalence(scores.Classifier):
    TOKENIZER = "microsoft/deberta-v3-large"  # the published classifier comes without a tokenizer

    def __init__(self, name: str):
        super().__init__(name, torch.float32, outputs=2)
        if set(self.tokenizer("A brick.")["input_ids"]) <= set(self.tokenizer.all_special_ids):
            # transformers returns an empty vocabulary if the tokenizer's files are missing
            self.tokenizer = scores.Checkpoint(self.TOKENIZER, None, torch.float32).tokenizer

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Probabilities [n] fp32 of label 1, that the two texts of a pair say the same."""
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        encoded = self.tokenizer(texts, add_special_tokens=False).encodings
        for encoding in encoded:  # to the length that the published classifier has seen
            encoding.truncate(min(128, self.context // 2 - 2))  # there are up to 4 special tokens
        encoded = dict(zip(texts, encoded, strict=True))
        join = self.tokenizer.backend_tokenizer.post_process
        joined = (join(encoded[one], encoded[other]) for one, other in pairs)
        rows = [(row.ids, row.type_ids) for row in joined]  # a whole encoding is far larger
        columns = {"input_ids": [ids for ids, _ in rows]}
        if "token_type_ids" in self.tokenizer.model_input_names:
            columns["token_type_ids"] = [kinds for _, kinds in rows]
        logits = scores.fill_rows("equivalence", self, columns, self.logits)
        return torch.from_numpy(logits).softmax(-1)[:, 1].numpy()


def equal(pairs: Sequence[tuple[str, str]], classifier: Equivalence | None) -> list[bool]:
    """Which pairs share half of the longer one's words; beyond five, the classifier decides."""
    words = {text: text.lower().split() for pair in pairs for text in pair}
    split = [(words[one], words[other]) for one, other in pairs]
    same = [2 * len({*a} & {*b}) >= max(len(a), len(b)) for a, b in split]
    long = [i for i, (a, b) in enumerate(split) if a and b and max(len(a), len(b)) > 5]
    if long and classifier:
        for i, p in zip(long, classifier([pairs[i] for i in long]), strict=True):
            same[i] = bool(p > SAME)
    return same


def partition(lists: Sequence[Sequence[str]], classifier=None) -> list[list[int]]:
    """For each generation of each list, the place in it of the first member of its class.

    A generation joins the first class whose first member says the same, or begins one.
    """
    pairs = [pair for texts in lists for pair in combinations(texts, 2)]
    same = dict(zip(pairs, equal(pairs, classifier), strict=True))
    partitions = []
    for texts in lists:
        firsts: list[int] = []
        for i, text in enumerate(texts):
            alike = (first for first in sorted({*firsts}) if same[texts[first], text])
            firsts.append(next(alike, i))
        partitions.append(firsts)
    return partitions


def utilities(prompts, lists, partitions, reward_model, bins) -> list[float]:
    """For each prompt (1 - p) / (1 - p^n) sum_i p^(i-1) [c_i is new] u_i over its n generations."""
    new = [(k, i) for k, firsts in enumerate(partitions) for i in sorted({*firsts})]
    rewards = reward_model([(prompts[k], lists[k][i]) for k, i in new])
    u = [[0] * len(texts) for texts in lists]
    for (k, i), value in zip(new, np.searchsorted(bins, rewards), strict=True):
        u[k][i] = value + 1  # 1 to 10; a threshold is in the lower bin
    return [float(np.average(row, weights=PATIENCE ** np.arange(len(row)))) for row in u]


def noveltybench_command(args) -> None:
    data.check_files(*args.responses, args.out)
    cells, groups = group(read_responses(args.responses))
    lists = [[sample.response for sample in members[: args.k]] for members in groups]
    scorers, classifier = {"equivalence": "shared words"}, None
    if args.equivalence:
        classifier = Equivalence(args.equivalence)
        scorers = {"equivalence": args.equivalence, "threshold": SAME}
    partitions = partition(lists, classifier)
    values = {"mean_distinct": [len(set(classes)) for classes in partitions]}
    if args.reward_model:
        reward_model = scores.load_reward_model(args.reward_model, scores.pick_dtype(args.dtype))
        judge = isinstance(reward_model, scores.Judge)
        scorers["reward_model"] = args.reward_model
        scorers["reward_bins"] = "10 to 50 in ten" if judge else f"those of {SKYWORK}"
        scored = [cell["prompt"] for cell in cells], lists, partitions, reward_model
        values["mean_utility"] = utilities(*scored, JUDGE_BINS if judge else SKYWORK_BINS)
    for k, cell in enumerate(cells):
        cell |= {"responses": len(lists[k]), **{name: x[k] for name, x in values.items()}}
    # the benchmark averages over prompts; then its categories, which are the tasks here
    rows = tabulate([cell | {"task": ""} for cell in cells], list(values))
    if len({cell["task"] for cell in cells}) > 1:
        rows += [row for row in tabulate(cells, list(values)) if row["task"] != ALL]
    results = {"k": args.k, "patience": PATIENCE, "scorers": scorers, "rows": rows}
    data.write_file(args.out, json.dumps(results, indent=2) + "\n")
    print(lay_out(rows, ("model", "task", "prompts", "responses"), list(values)))
    print("scorers: " + ", ".join(f"{key} {value}" for key, value in scorers.items()))
    print(f"saved {args.out}")


def add_noveltybench(commands) -> None:
    command = commands.add_parser("noveltybench", help="distinct answers and their utility")
    command.set_defaults(call=noveltybench_command)
    flag = partial(data.flag, command)
    flag("--responses", ..., "JSONL files of responses", nargs="+")
    flag("--out", ..., "JSON file to write")
    flag("--k", 10, "first generations a prompt", data.number(int, 1))
    flag("--equivalence", None, "classifier of pairs, label 1: the same (default: shared words)")
    flag("--reward-model", None, f"for utility: Skywork/{SKYWORK}, or a judge's folder")
    scores.add_model_flags(command)


# ---- Human evaluation ----------------------------------------------------------------------------

SCALE = 5  # a rating is a whole number from 1, not at all, to this, very much
QUESTIONS = {
    "novelty": "Is it different from what most people would write?",
    "surprise": "Is it unexpected?",
    "quality": "Is it a good answer: fitting, clear, well put?",
    "creativity": "All in all, is it creative?",
}


def draw_items(samples: Sequence[data.Sample], P: int, each: int, seed: int) -> dict[str, dict]:
    """What to rate, by id, in the order of the sheet: `each` responses of each model to P prompts.

    An item is {"prompt", "response", "models"}, with a model for each time the response was drawn.
    Neither its place nor its id, which follows from the text, tells who wrote it.
    """
    answers = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        answers[sample.prompt][str(sample.row.get("model", "human"))].append(sample.response)
    models = sorted({model for answer in answers.values() for model in answer})
    full = sorted(p for p in answers if all(len(answers[p][model]) >= each for model in models))
    if len(models) < 2 or len(full) < P:
        have = f"{len(full):,} prompts have --per-prompt responses of each of {len(models)} models"
        raise data.UserError(f"--prompts {P}: {have}; expected {P} prompts and two models")
    rng, items = np.random.default_rng(seed), {}
    for prompt in [full[k] for k in rng.choice(len(full), P, replace=False)]:
        turns = [f"{role}: {content}" for role, content in prompt]
        asked = "\n\n".join(turns) if len(turns) > 1 else prompt[0][1]
        drawn = defaultdict(list)
        for model in models:
            texts = sorted(answers[prompt][model])
            # by number: every text of an array takes the room of the longest
            for k in rng.choice(len(texts), each, replace=False):
                drawn[texts[k]].append(model)
        texts = sorted(drawn)
        for text in (texts[k] for k in rng.permutation(len(texts))):
            name = "r" + scores.content_key(asked, text).hex()[:12]  # to no program a number
            items[name] = {"prompt": asked, "response": text, "models": drawn[text]}
    return items


def sheet_command(args) -> None:
    page, key = Path(args.out), Path(args.out).with_suffix(".key.json")
    data.check_files(*args.responses, page, key)
    if page.suffix != ".html":
        raise data.UserError(f"--out {page}: expected a name that ends in .html")
    for path in (page, key):
        if path.exists() and not args.overwrite:
            raise data.UserError(f"--out {page}: {path} exists; add --overwrite, or name another")
    items = draw_items(read_responses(args.responses), args.prompts, args.per_prompt, args.seed)
    content = {"questions": QUESTIONS, "items": items}
    data.write_file(key, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    rows = [[name, item["prompt"], item["response"]] for name, item in items.items()]
    filling = {"name": page.stem, "questions": QUESTIONS, "scale": SCALE, "rows": rows}
    filling["store"] = scores.content_key(QUESTIONS, rows).hex()  # its place in the browser
    text = json.dumps(filling).replace("<", "\\u003c")  # a `<` could end the script element
    html = (scores.HERE / "docs" / "sheet.html").read_text("utf-8")
    data.write_file(page, html.replace("/*DATA*/", text))
    print(f"saved {page}: {data.plural(args.prompts, 'prompt')}, {len(items):,} responses")
    print(f"saved {key}: who wrote what; keep it from the raters")


def read_sheet(path: str, questions: Sequence[str], responses: dict[str, str]) -> np.ndarray:
    """One rater's ratings [I, Q] in the order of the key, NaN where blank. UserError: file:line."""
    allowed, ratings = {"", *map(str, range(1, SCALE + 1))}, {}
    for where, row in data.read_csv(path, ("item", "response", *questions)):
        name, cells = row.get("item", ""), [row.get(question, "") for question in questions]
        if name in ratings or responses.get(name) != row.get("response", ""):
            expected = "an item of the key, once, with its response as the page saved it"
            raise data.UserError(f"{where}: item {name!r:.60}: expected {expected}")
        if not allowed.issuperset(cells):
            raise data.UserError(f"{where}: {cells!s:.60}: expected 1 to {SCALE} or nothing")
        ratings[name] = [float(cell or math.nan) for cell in cells]
    return np.array([ratings.get(name, [math.nan] * len(questions)) for name in responses])


def krippendorff(ratings: np.ndarray) -> float | None:
    """The raters' agreement, ordinal alpha, from ratings [J, I], NaN if blank; None: undefined.

    1 - observed / expected disagreement over pairs of ratings of one item, and of any; two ratings
    differ by (the ratings between them, half of their own included) squared (Krippendorff 2011).
    """
    counts = (ratings.T[:, :, None] == np.arange(1, SCALE + 1)).sum(1).astype(float)  # [I, C]
    counts = counts[counts.sum(1) > 1]
    weighted = counts / (counts.sum(1, keepdims=True) - 1)
    observed = weighted.T @ counts - np.diag(weighted.sum(0))  # [C, C]
    given = counts.sum(0)
    rank = given.cumsum() - given / 2
    distance = (rank[:, None] - rank) ** 2
    expected = (np.outer(given, given) * distance).sum() / max(given.sum() - 1, 1)
    return float(1 - (observed * distance).sum() / expected) if expected else None


def tally(ratings: np.ndarray, items: Sequence[dict]) -> dict:
    """What one question's ratings [J, I] say of each model rated, and how far the raters agree.

    items: the prompt of each of the I and the models that gave it (see `draw_items`). Means are
    over a prompt's ratings, then prompts. A rater of two models' responses to a prompt makes one
    comparison: a model wins the share of the pairs of these in which its response is rated higher,
    and half of the ties.
    """
    prompts = list(dict.fromkeys(item["prompt"] for item in items))
    given, cells = defaultdict(lambda: defaultdict(list)), []
    for i, j in np.argwhere(~np.isnan(ratings.T)):
        p = prompts.index(items[i]["prompt"])
        cell = {"run": "", "task": "", "prompt": p, "responses": 1, "mean": ratings[j, i]}
        for model in items[i]["models"]:
            given[p, j][model].append(ratings[j, i])
            cells.append(cell | {"model": model})
    rows = sorted(tabulate(cells, ["mean"]), key=lambda row: (-row["mean"], row["model"]))
    for row in rows:
        row |= {"ratings": row.pop("responses"), "win_rates": {}, "comparisons": {}}
        for other in sorted({cell["model"] for cell in cells} - {row["model"]}):
            pairs = [list(product(g[row["model"]], g[other])) for _, g in sorted(given.items())]
            won = [np.mean([(a > b) + (a == b) / 2 for a, b in some]) for some in pairs if some]
            if won:
                row["win_rates"][other] = float(np.mean(won))
                row["comparisons"][other] = len(won)
    blank = int(np.isnan(ratings).sum())
    counts = {"ratings": ratings.size - blank, "blank": blank}
    return {"alpha": krippendorff(ratings), **counts, "models": rows}


def tally_command(args) -> None:
    data.check_files(*args.sheets, args.key, args.out)
    with scores.user_error(f"--key {args.key}: cannot be read", "what eval.py human sheet made"):
        key = json.loads(Path(args.key).read_text("utf-8"))
        questions, items = list(key["questions"]), list(key["items"].values())
        texts = {name: item["response"] for name, item in key["items"].items()}
        models = sorted({model for item in items for model in item["models"]})
        prompts = {item["prompt"] for item in items}
    ratings = np.stack([read_sheet(path, questions, texts) for path in args.sheets])  # [J, I, Q]
    results = {q: tally(ratings[:, :, k], items) for k, q in enumerate(questions)}
    content = {"sheets": args.sheets, "prompts": len(prompts), "questions": results}
    data.write_file(args.out, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    for question, result in results.items():
        for row, other in product(result["models"], models):
            rate, games = row["win_rates"].get(other), row["comparisons"].get(other)
            row[f"beats {other}"] = f"{rate:.0%} of {games:,}" if games else "-"
        given = f"{data.plural(result['ratings'], 'rating')}, {result['blank']:,} blank"
        print(f"{question}: {given}, raters' agreement (alpha) {in_short(result['alpha'])}")
        columns = ["model", "ratings", *(f"beats {model}" for model in models)]
        print(lay_out(result["models"], columns, ["mean"]) + "\n")
    print(f"{LEGEND}\nsaved {args.out}")


def add_human(commands) -> None:
    human = commands.add_parser("human", help="a blinded rating sheet, and what the raters say")
    parts, whole = human.add_subparsers(dest="part", required=True), data.number(int, 1)
    sheet = parts.add_parser("sheet", help="draw responses into a page for raters, and its key")
    sheet.set_defaults(call=sheet_command)
    data.flag(sheet, "--responses", ..., "JSONL files of responses", nargs="+")
    data.flag(sheet, "--out", ..., "page to write, sheet.html say; its key goes beside it")
    data.flag(sheet, "--overwrite", False, "replace files that exist")
    data.flag(sheet, "--prompts", 4, "how many, drawn at random", whole)
    data.flag(sheet, "--per-prompt", 2, "responses of each model to a prompt", whole)
    data.flag(sheet, "--seed", 0, "of the draws", data.number(int, 0))
    count = parts.add_parser("tally", help="means, win rates, agreement")
    count.set_defaults(call=tally_command)
    data.flag(count, "--sheets", ..., "the CSV files that raters saved, one each", nargs="+")
    data.flag(count, "--key", ..., "the key that was made with the sheet")
    data.flag(count, "--out", ..., "JSON file to write")


# ---- The whole experiment ------------------------------------------------------------------------

# The paper's variants as flags of crpo.py; the last three are ours.
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
    "CrPO-inf": "--lambda-infrequency 1",
    "CrPO-inf-qua": "--lambda-infrequency 1 --lambda-quality 1",
    "CrPO-gated": "--combine gated",
}


def parse_variant(text: str) -> tuple[str, str]:
    """An argparse type: a name of VARIANTS, or NAME=FLAGS, as (name, flags of crpo.py)."""
    name, _, flags = text.partition("=")
    taken = not re.fullmatch(r"[\w.-]+", name) or name in ("base", "SFT", "human")
    if taken or not (flags := flags or VARIANTS.get(name, "")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FLAGS or one of {[*VARIANTS]}")
    return name, flags


def plan(args, results: Path) -> dict[Path, list[str]]:
    """{what it makes: words of a command}, in order: data, scores, SFT, runs, responses, scores."""
    out, stages = Path(args.out), {}
    pref, texts, scored = (out / f"{name}.jsonl" for name in ("pref", "sft", "scored"))
    judge, tuned, answers = out / "judge", out / "runs" / "SFT", out / "responses"
    rated, model = ["--data", args.data, "--split", "Training"], ["--model", args.model]
    scorers = ["--embedder", args.embedder, "--surprise-model", args.surprise_model]
    scorers += ["--reward-model", args.reward_model or judge, "--perplexity", args.perplexity]
    stages[pref] = ["data.py", "pairs", *rated, *args.pairs]
    stages[texts] = ["data.py", "sft", *rated]
    if not args.reward_model:
        stages[judge] = ["scores.py", "judge", *rated, "--embedder", args.embedder]
    stages[scored] = ["scores.py", "--data", pref, "--signals", *scores.SIGNALS, *scorers]
    seeds = ["--seed", args.seeds[0]]
    stages[tuned] = ["sft.py", "--data", texts, *model, "--resume", *seeds, *args.sft]
    runs = {answers / "SFT.jsonl": ["SFT", *seeds, "--adapter", tuned]}
    for seed, (name, lambdas) in product(args.seeds, args.variants):
        run, seeds = out / "runs" / f"{name}-{seed}", ["--seed", seed]
        start = ["--data", scored, *model, "--adapter", tuned, "--holdout", 0, "--resume"]
        stages[run] = ["crpo.py", *start, *seeds, *lambdas.split(), *args.crpo]
        runs[answers / f"{run.name}.jsonl"] = [name, *seeds, "--adapter", run]
    runs[answers / "base.jsonl"] = ["base", "--seed", args.seeds[0], "--limit-like", *runs]
    held_out = ["--split", *args.held_out]
    for file, who in runs.items():
        words = [*model, "--name", *who, "--prompts", args.data, *held_out, "--resume"]
        stages[file] = ["eval.py", "generate", *words, *args.generate]
    # the first is what the others are compared with
    files = sorted(runs, key=lambda file: (not file.name.startswith("DPO"), file.stem != "base"))
    measured = ["--responses", *files, args.data, *held_out]
    stages[results] = ["eval.py", "score", *measured, *scorers, *args.figure]
    return {made: [str(word) for word in (*words, "--out", made)] for made, words in stages.items()}


def run_stage(words: Sequence[str], nproc: int) -> int:
    """The exit status of a command; if we are stopped, so is it, and it is waited for."""
    start = [sys.executable]
    if nproc > 1 and words[1] not in ("pairs", "sft", "score"):
        start += f"-m torch.distributed.run --standalone --nproc-per-node {nproc} --".split()
    # PR_SET_PDEATHSIG of Linux: if we are killed, the child is stopped too
    die = partial(ctypes.CDLL(None).prctl, 1, SIGTERM) if sys.platform == "linux" else None
    child = subprocess.Popen([*start, scores.HERE / words[0], *words[1:]], preexec_fn=die)
    try:
        return child.wait()
    finally:  # it has ended, or SystemExit or KeyboardInterrupt ends us
        child.terminate()
        child.wait()


def carry_out(stages: dict[Path, list[str]], args) -> list[dict]:
    """Run the stages that are not done, noting each in DIR/stages.jsonl; return the rows of all."""
    log, digest = Path(args.out) / "stages.jsonl", scores.content_hash(args.data)
    if not log.exists():
        if any(not path.match("stages.jsonl.*.part") for path in log.parent.glob("*")):
            raise data.UserError(f"--out {args.out}: it holds other files; name a new folder")
        data.write_file(log, "")
    done, todo = {row.get("out"): row for _, row in data.read_jsonl(log)}, []
    for k, (out, words) in enumerate(stages.items(), 1):
        row = {"out": str(out), "command": shlex.join(["python", *words]), "data": digest}
        before = done.get(str(out), {}) if out.exists() else {}
        if before and k < len(stages) and not row.items() <= before.items():
            raise data.UserError(f"{out}: made by another command or from other data; remove it")
        if not row.items() <= before.items():
            todo.append((k, out, words, row))
    for k, out, words, row in todo:
        print(f"\n[{k}/{len(stages)}] {row['command']}", flush=True)
        began = time.perf_counter()
        if status := run_stage(words, args.nproc_per_node):
            raise data.UserError(f"stage {k} ended with status {status}; see its message")
        for checkpoint in out.glob("checkpoint-*"):  # of no more use, and large
            shutil.rmtree(checkpoint)
        done[str(out)] = row | {"seconds": round(time.perf_counter() - began)}
        data.write_file(log, data.jsonl(list(done.values())))
    return [done[str(out)] for out in stages]


def paper_command(args) -> None:
    """Run every stage and report: how, the figure, the tables, and every command."""
    out = Path(args.out)
    results, report = out / "results.json", out / "report.md"
    splits = {str(row.get("split")) for _, row in data.read_rows(args.data)}
    args.held_out = [split for split in ("HeldoutItem", "HeldoutTask") if split in splits]
    if "Training" not in splits or not args.held_out:
        raise data.UserError("--data: expected splits Training, and HeldoutItem or HeldoutTask")
    args.figure = ["--figure", out / "figure.png"] if find_spec("matplotlib") else []
    stages = plan(args, results)
    check = {"sft.py": sft.parse_args, "crpo.py": crpo.parse_args, "eval.py": parse_args}
    for script, *words in stages.values():  # what would be refused hours from now
        check.get(script, list)(words)
    scores.LanguageModel(args.model, torch.float32)  # its weights are not read here
    with data.locked(out):
        done = carry_out(stages, args)
    measured = json.loads(results.read_text("utf-8"))
    scorers = ", ".join(f"{signal} by {name}" for signal, name in measured["scorers"].items())
    figure = "![each measure against quality](figure.png)\n\n" if args.figure else ""
    commands = "\n".join(f"{row['command']}   # {row['seconds']} s" for row in done)
    data.write_file(
        report,
        f"# Creative Preference Optimization\n\n"
        f"{args.model} on {args.data}; seeds {', '.join(map(str, args.seeds))}; "
        f"{sum(row['seconds'] for row in done) / 60:.0f} min. Measured: {scorers}.\n\n{figure}"
        f"```\n{tables(measured)}\n```\n\n## Every command\n\nThose that score, train and generate "
        f"ran in {args.nproc_per_node} processes of torchrun.\n\n```\n{commands}\n```\n",
    )
    print(f"\nsaved {report}" + ("" if args.figure else ", no figure: that needs matplotlib"))


def add_paper(commands) -> None:
    command = commands.add_parser("paper", help="the whole experiment, from ratings to a report")
    command.set_defaults(call=paper_command, variants=list(VARIANTS.items()))
    data.flag(command, "--data", ..., "rated JSONL with a `split` column")
    data.flag(command, "--model", "tiny", "name or folder")
    data.flag(command, "--out", ..., "folder for everything; what is done there is not redone")
    data.flag(command, "--seeds", [42], "one a run of a variant", data.number(int, 0, 2**32))
    help = "what to train besides SFT: names of the paper, or of yours as NAME='flags of crpo.py'"
    data.flag(command, "--variants", None, f"{help} (default: all)", parse_variant, nargs="+")
    data.flag(command, "--nproc-per-node", 1, "torchrun's processes", data.number(int, 1, 1024))
    scores.add_scorer_flags(command, scores.EMBEDDER, "google/gemma-2-27b-it", "a fitted judge")
    for stage in ("pairs", "sft", "crpo", "generate"):
        help = f'flags of that stage, in quotes, as in --{stage}="--flag value"'
        data.flag(command, f"--{stage}", [], help, shlex.split, nargs=None, metavar="FLAGS")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = data.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_generate, add_score, add_noveltybench, add_human, add_paper):
        add(commands)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    args.call(args)


if __name__ == "__main__":
    data.run(main)
