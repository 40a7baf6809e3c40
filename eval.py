"""eval.py: did it work?

    python eval.py generate --model M --adapter runs/crpo --prompts heldout.jsonl --out crpo.jsonl
    python eval.py score    --responses base.jsonl crpo.jsonl --out results.json

generate samples responses to each prompt, the paper's 16: four in each of its four decoding
settings. score measures them as the paper does (section 4 of arXiv 2505.14442), for each prompt
over a model's responses Y to it, then averages over the prompts of a task:

    novelty    mean over y in Y of 2 | DSI(y) - DSI(Y) |
    diversity  mean semantic distance over the pairs of Y
    surprise   mean perplexity of y given the prompt
    quality    mean reward

The definitions, and the models behind them, are those of scores.py. Other scorers than the ones a
model was trained with make the fairer test; the results name the ones that were used.
"""

import io
import json
import math
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (
    Messages,
    Parser,
    Sample,
    UserError,
    number,
    prompt_column,
    read_jsonl,
    read_muce,
    read_prompts,
    read_samples,
    run,
    write_file,
    write_jsonl,
)
from scores import (
    EMBEDDER,
    HERE,
    SCORER_OF,
    SIGNALS,
    LanguageModel,
    Pool,
    Scorers,
    add_dtype_flag,
    add_scorer_flags,
    content_hash,
    content_key,
    pick_dtype,
    running_words,
)
from sft import checkpoints, load_with_adapter, remove

# --------------------------------------------------------------------------------------------------
# Generating
# --------------------------------------------------------------------------------------------------

# The paper's four settings; a quarter of a prompt's samples is drawn with each. top_k=0 is none.
DECODINGS = (
    {"temperature": 0.7, "top_p": 0.95, "top_k": 0},
    {"temperature": 0.9, "top_p": 0.99, "top_k": 0},
    {"temperature": 0.7, "top_p": 1.0, "top_k": 50},
    {"temperature": 0.8, "top_p": 0.97, "top_k": 0},
)


def generate(
    lm: LanguageModel,
    prompts: Sequence[Messages],
    decodings: Sequence[dict[str, float]],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[int, list[str]]]:
    """Sample a response to each prompt with each decoding; yield (index of the prompt, responses).

    About `batch_size` responses are drawn at a time, for prompts of like length; a response has at
    most the tokens that the model's context leaves beside the longest prompt (UserError: none). Its
    random numbers follow from the seed, its prompt and its place in `decodings` alone.
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

    def batches():
        for at in range(0, len(order), width):
            batch = order[at : at + width]
            seeds = [[seed, s, *content_key(prompts[k])] for k in batch for s in range(D)]
            noise = [np.random.default_rng(s).random((limit, 2), np.float32) for s in seeds]
            drawn = sample(lm, [ids[k] for k in batch], decodings, np.stack(noise))
            texts = lm.encoder.tokenizer.batch_decode(drawn, skip_special_tokens=True)
            for turn, k in enumerate(batch):
                own = texts[turn * D : (turn + 1) * D]
                yield k, [text.replace("\0", "").strip() for text in own]

    return batches()


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
    settings = torch.tensor([[d["temperature"], d["top_p"], d["top_k"]] for d in decodings])
    settings = settings.to(device).repeat(len(ids), 1)  # [P * D, 3]

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


def draw_sorted(logits, noise, temperature, top_p, top_k) -> torch.Tensor:
    """Token ids [n] from logits [n, V] by inverting the distribution function at `noise` [n].

    Of the `top_k` likeliest tokens (0: all) those are kept whose likelier ones have less than
    `top_p` of the probability; all settings [n].
    """
    p, ids = (logits / temperature[:, None]).softmax(-1).sort(descending=True)
    p *= (torch.arange(p.shape[1], device=p.device) < top_k[:, None]) | (top_k[:, None] == 0)
    below = p.cumsum(1) - p
    p *= below < top_p[:, None] * p.sum(1, keepdim=True)
    return ids.gather(1, invert(p, noise))[:, 0]


def draw(logits, noise, temperature, top_p, top_k) -> torch.Tensor:
    """As `draw_sorted`, with noise [n, 2] and hardly any sorting, which costs more than a model.

    A token drawn from the whole distribution is as good as one drawn from those that are kept, if
    it is one of them; whether it is takes a sum. Only the other rows are drawn again, sorted.
    """
    p = (logits / temperature[:, None]).softmax(-1)
    ids = invert(p, noise[:, 0])
    likelier = p > p.gather(1, ids)
    kept = ((p * likelier).sum(1) < top_p) & ((likelier.sum(1) < top_k) | (top_k == 0))
    again = ~kept | ((top_p < 1) & (top_k > 0))  # both at once: top_p is of the top_k's sum
    settings = noise[again, 1], temperature[again], top_p[again], top_k[again]
    ids = ids[:, 0]
    ids[again] = draw_sorted(logits[again], *settings)
    return ids


def invert(p: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The index [n, 1] at which the running sum of p [n, V] passes the share `noise` [n] of it."""
    reached = p.cumsum(1)
    pick = (reached <= noise[:, None] * reached[:, -1:]).sum(1, keepdim=True)
    return pick.clamp(max=p.shape[1] - 1)


def open_out(path: str):
    """Open a file to write responses into; UserError where the disk refuses."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from None


def generate_command(args) -> None:
    prompts = read_prompts(args.prompts, args.split)
    if args.samples % len(DECODINGS):
        raise UserError(f"--samples {args.samples}: expected a multiple of {len(DECODINGS)}")
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"--out {args.out}: it exists; add --overwrite, or name another")
    lm, _ = load_with_adapter(args.model, args.adapter, pick_dtype(args.dtype))
    name = args.adapter or args.model
    each = args.samples // len(DECODINGS)
    decodings = [decoding for decoding in DECODINGS for _ in range(each)]
    asked = list(prompts)
    drawn = generate(lm, asked, decodings, args.max_new_tokens, args.batch_size, args.seed)
    blank = 0
    bar = tqdm(total=len(asked) * args.samples, desc="responses")
    with open_out(args.out) as file, bar:
        for k, texts in drawn:
            for decoding, text in zip(decodings, texts, strict=True):
                row = {
                    "model": name,
                    "task": prompts[asked[k]],
                    "prompt": prompt_column(asked[k]),
                    "response": text,
                    "decoding": decoding,
                }
                blank += not text
                if text:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(texts))
    print(f"saved {args.out}: {len(asked):,} prompts, {blank:,} blank responses left out")


def add_generate(commands) -> None:
    command = commands.add_parser("generate", help="sample responses to prompts")
    command.set_defaults(call=generate_command)
    command.add_argument("--model", default="tiny", help="name or folder (default: %(default)s)")
    command.add_argument("--adapter", help="adapter of sft.py, crpo.py or PEFT")
    command.add_argument("--prompts", required=True, help="JSONL with a `prompt` column")
    command.add_argument("--split", help="only rows whose `split` is this, e.g. HeldoutItem")
    command.add_argument("--out", required=True, help="JSONL of responses, written as they come")
    command.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    whole = number(int, 1)
    command.add_argument(
        "--samples", type=whole, default=16, help="responses a prompt (default: %(default)s)"
    )
    command.add_argument(
        "--max-new-tokens", type=whole, default=1024, help="a response (default: %(default)s)"
    )
    command.add_argument(
        "--batch-size", type=whole, default=64, help="responses at a time (default: %(default)s)"
    )
    command.add_argument(
        "--seed", type=number(int, 0, 2**32), default=42, help="of the draws (default: %(default)s)"
    )
    add_dtype_flag(command)


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------


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
    prompt: Messages
    responses: int
    values: dict[str, float] = field(default_factory=dict)


def short(decoding) -> str:
    """As `--decoding` has it: t=0.7,p=0.95."""
    if not isinstance(decoding, dict):
        return str(decoding or "as given")
    off = {"t": None, "p": 1, "k": 0, "min_p": 0}
    names = dict(zip(off, ("temperature", "top_p", "top_k", "min_p"), strict=True))
    found = {key: decoding.get(name, off[key]) for key, name in names.items()}
    return ",".join(f"{key}={value:g}" for key, value in found.items() if value != off[key])


def repetition(texts: Sequence[str]) -> dict[str, float]:
    """The measures BESIDE of the responses to a prompt.

    distinct-n: different n-grams / all n-grams (Li et al. 2016); duplicates: the share of responses
    that are, letter for letter, one that came before.
    """
    tokens = [running_words(text) for text in texts]
    found = {"words": float(np.mean([len(row) for row in tokens]))}
    for n in (1, 2):
        grams = [gram for row in tokens for gram in zip(*(row[k:] for k in range(n)), strict=False)]
        found[f"distinct-{n}"] = len(set(grams)) / max(len(grams), 1)
    return found | {"duplicates": 1 - len(set(texts)) / len(texts)}


def measure(
    samples: Sequence[Sample], signals: Sequence[str], scorers: Scorers, by_decoding: bool = False
) -> list[Cell]:
    """A cell for each (model, run, task, prompt), and for each decoding if so asked."""
    groups: dict[tuple, list[Sample]] = defaultdict(list)
    for sample in samples:
        model = str(sample.row.get("model", "human"))
        run = str(sample.row.get("run", model))
        decoding = short(sample.row.get("decoding")) if by_decoding else ""
        groups[model, run, decoding, sample.task, sample.prompt].append(sample)
    pools = [
        Pool(
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
        for cell, found in zip(cells, SIGNALS[signal](pools, scorers), strict=True):
            cell.values[signal] = float(np.mean(found))
    return cells


def by_prompt(cells: Sequence[Cell], name: str) -> dict[str, dict[Messages, float]]:
    """{task: {prompt: a measure}}, averaged over runs."""
    runs: dict[str, dict[Messages, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        runs[cell.task][cell.prompt].append(cell.values[name])
    return {
        task: {prompt: float(np.mean(values)) for prompt, values in prompts.items()}
        for task, prompts in runs.items()
    }


def average(values: dict[str, dict[Messages, float]]) -> float:
    """Over the prompts of a task, then over tasks."""
    return float(np.mean([np.mean(list(prompts.values())) for prompts in values.values()]))


def bootstrap(
    values: dict[str, dict[Messages, float]], draws: int = 10_000
) -> tuple[float, float] | None:
    """The 95 % percentile interval of `average`, the prompts of each task drawn anew.

    The tasks are given, their prompts a sample. A task of one prompt adds no uncertainty, for none
    can be seen; None if all are. The draws are the same ones whatever is averaged.
    """
    tasks = [np.array(list(prompts.values())) for prompts in values.values()]
    if max(map(len, tasks)) < 2:
        return None
    rng = np.random.default_rng(0)
    means = [task[rng.integers(len(task), size=(draws, len(task)))].mean(1) for task in tasks]
    low, high = np.percentile(np.mean(means, 0), [2.5, 97.5])
    return float(low), float(high)


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
        row[name] = average(by_prompt(cells, name))
        row[f"{name}_95"] = bootstrap(by_prompt(cells, name))
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
    """Which of n points [n, 2], more being better, have no other above them in both: [n] bool."""
    above = (points[None] >= points[:, None]).all(2) & (points[None] > points[:, None]).any(2)
    return ~above.any(1)


def hypervolume(points: np.ndarray) -> float:
    """The area of [0, 1]^2 below or left of some point of [n, 2], more being better."""
    area, height = 0.0, 0.0
    for x, y in sorted(points.tolist(), reverse=True):  # from the greatest x on
        area, height = area + x * max(y - height, 0), max(y, height)
    return area


def frontiers(cells: Sequence[Cell]) -> list[dict]:
    """For each model, its decodings as points (quality, diversity), and what they reach together.

    A decoding that is hotter is more diverse and worse, so a model is a curve, not a point. The
    hypervolume is the share of the box around all points that lies below the curve.
    `on_frontier`: no decoding of any model has more of both.
    """
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


def training_scorers(samples: Sequence[Sample], named: dict[str, str]) -> list[str]:
    """A sentence for each scorer that measures here what it was trained towards, by run folders."""
    models: dict[tuple[str, str], list[str]] = defaultdict(list)
    folders = {Path(str(s.row["run"])): str(s.row["model"]) for s in samples if "run" in s.row}
    for folder, model in folders.items():
        files = [place / "config.json" for place in (folder, folder.parent)]
        for file in filter(Path.is_file, files):  # the parent is that of OUT/merged
            trained = json.loads(file.read_text()).get("scorers", {})
            for signal, name in named.items():
                if name in trained.get(signal, ()) and model not in models[signal, name]:
                    models[signal, name].append(model)
    return [
        f"{signal} is measured by {name}, which gave the training of {', '.join(who)} its "
        f"{signal}: another scorer makes the fairer test"
        for (signal, name), who in models.items()
        if who
    ]


def print_table(rows: Sequence[dict], signals: Sequence[str]) -> None:
    """Each signal with its interval; below, for each model, what stands beside them."""
    models, tasks = (max(len(row[key]) for row in rows) for key in ("model", "task"))
    print(f"{'model':{models}}  {'task':{tasks}}  prompts  responses", end="")
    print("".join(f"  {name + ' (95 %)':24}" for name in signals).rstrip())
    for row in rows:
        cells = "".join(f"  {with_interval(row, name):24}" for name in signals).rstrip()
        counts = f"{row['prompts']:7,}  {row['responses']:9,}"
        print(f"{row['model']:{models}}  {row['task']:{tasks}}  {counts}{cells}")
    beside = [name for name in (*BESIDE, "hypervolume") if name in rows[-1]]
    print(f"\n{'model':{models}}" + "".join(f"  {name:>11}" for name in ("runs", *beside)))
    for row in totals(rows):
        cells = "".join(f"  {row[name]:11.3f}" for name in beside)
        print(f"{row['model']:{models}}  {row['runs']:11}{cells}")


def with_interval(row: dict, name: str) -> str:
    interval = row[f"{name}_95"]
    return f"{row[name]:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


COLOURS = ("#0b6e99", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#444444", "#d16ba5", "#5b8fd9")
MARKERS = "osD^vP"


def plotting():
    """matplotlib.pyplot, drawing to files; UserError where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("a figure needs the package matplotlib: pip install matplotlib") from None
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw_panels(rows: Sequence[dict], curves: Sequence[dict], path: str) -> None:
    """The paper's figure 2: novelty, diversity and surprise against quality, with intervals.

    The line in the panel of diversity is a model's own frontier, through its best decodings.
    """
    plt = plotting()
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.4), layout="constrained")
    points = {
        curve["model"]: np.array([(p["quality"], p["diversity"]) for p in curve["points"]])
        for curve in curves
    }
    for k, row in enumerate(totals(rows)):
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k // len(COLOURS) % len(MARKERS)]
        for panel, signal in zip(panels, ("novelty", "diversity", "surprise"), strict=True):
            x, y = row["quality"], row[signal]
            for axis, name in enumerate(("quality", signal)):
                low, high = row[f"{name}_95"] or (row[name], row[name])
                ends = ([low, high], [y, y]) if axis == 0 else ([x, x], [low, high])
                panel.plot(*ends, color=colour, alpha=0.35, linewidth=1, zorder=1)
            panel.plot(x, y, marker, color=colour, markersize=7, label=row["model"], zorder=3)
        own = points[row["model"]]
        best = own[undominated(own)]
        panels[1].plot(*best[best[:, 0].argsort()].T, ":", color=colour, linewidth=1, zorder=2)
    for panel, signal in zip(panels, ("novelty", "diversity", "surprise"), strict=True):
        panel.set(xlabel="quality", title=signal)
        panel.grid(alpha=0.2)
    panels[2].set_yscale("log")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
    save_figure(figure, path)


def save_figure(figure, path: str) -> None:
    content = io.BytesIO()
    kind = Path(path).suffix[1:].lower()
    if kind not in ("png", "pdf", "svg"):
        raise UserError(f"--figure {path}: expected a name that ends in .png, .pdf or .svg")
    figure.savefig(content, format=kind, dpi=160)
    write_file(path, content.getvalue())


def score_command(args) -> None:
    samples = [sample for path in args.responses for sample in read_samples(path)]
    if args.split:
        samples = [s for s in samples if s.row.get("split") in (None, *args.split)]
    if not samples:
        raise UserError(f"--split {' '.join(args.split)}: no response is of it")
    rated = not any(np.isnan(sample.score) for sample in samples)
    signals = ["novelty", "diversity", "surprise"]
    signals += ["quality"] if args.reward_model or rated else []
    if args.figure:
        plotting()
        if "quality" not in signals:
            raise UserError("--figure: it is drawn against quality; name a --reward-model")
    scorers = Scorers(args.embedder, args.surprise_model, args.reward_model, pick_dtype(args.dtype))
    cells = measure(samples, signals, scorers)
    rows, curves = tabulate(cells, signals), []
    if "quality" in signals:
        curves = frontiers(measure(samples, ["quality", "diversity"], scorers, by_decoding=True))
        for row, curve in zip(totals(rows), curves, strict=True):
            row["hypervolume"] = curve["hypervolume"]
    named = {signal: getattr(args, SCORER_OF[signal]) or "human scores" for signal in signals}
    warnings = training_scorers(samples, named)
    results = {"scorers": named, "warnings": warnings, "rows": rows, "frontiers": curves}
    results["cells"] = [vars(cell) for cell in cells]
    write_file(args.out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print_table(rows, signals)
    print("\nscorers: " + ", ".join(f"{signal} {name}" for signal, name in named.items()))
    for warning in warnings:
        print(f"warning: {warning}")
    if args.figure:
        draw_panels(rows, curves, args.figure)
    print(f"saved {args.out}" + (f", {args.figure}" if args.figure else ""))


def add_score(commands) -> None:
    command = commands.add_parser("score", help="novelty, diversity, surprise, quality")
    command.set_defaults(call=score_command)
    command.add_argument("--responses", nargs="+", required=True, help="JSONL files of responses")
    command.add_argument(
        "--split", nargs="+", help="of rows that have a `split`, only those of these"
    )
    command.add_argument("--out", required=True, help="JSON file to write")
    command.add_argument("--figure", help="also draw it: a .png, .pdf or .svg (needs matplotlib)")
    add_scorer_flags(command, EMBEDDER, "google/gemma-2-27b-it")
    add_dtype_flag(command)


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
THREE = ("novelty", "diversity", "surprise")
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
    signals = ["--signals", *SIGNALS, *scorers]
    stages.append(Stage(scored, ["scores.py", "--data", pref, "--out", scored, *signals]))

    model, tuned = ["--model", args.model], out / "runs" / "SFT"
    sft = ["sft.py", "--data", out / "sft.jsonl", *model, "--out", tuned, "--resume"]
    stages.append(Stage(tuned, [*sft, "--seed", args.seeds[0], *args.sft]))
    runs = [("base", args.seeds[0], None), ("SFT", args.seeds[0], tuned)]
    for seed in args.seeds:
        for name, lambdas in variants.items():
            run = out / "runs" / f"{name}-{seed}"
            crpo = ["crpo.py", "--data", scored, *model, "--adapter", tuned, "--holdout", 0]
            crpo += ["--out", run, "--resume", "--seed", seed, *lambdas.split(), *args.crpo]
            stages.append(Stage(run, crpo))
            runs.append((name, seed, run))

    files = []
    for name, seed, run in runs:
        file = out / "responses" / f"{run.name if run else name}.jsonl"
        ask = ["eval.py", "generate", *model, *(["--adapter", run] if run else [])]
        ask += ["--name", name, "--seed", seed, "--prompts", args.data, "--split", *HELD_OUT]
        stages.append(Stage(file, [*ask, "--out", file, "--resume", *args.generate]))
        files.append(file)
    score = ["eval.py", "score", "--responses", *files, args.data, "--split", *HELD_OUT]
    return [*stages, Stage(results, [*score, "--out", results, *scorers])]


def carry_out(stages: Sequence[Stage], args) -> list[dict]:
    """Run the stages that are not done, and keep in DIR/stages.jsonl those that are; return it.

    A stage is done if it ended well and what it left is there. UserError if that was made by
    another command or of other data, or if a command fails.
    """
    log, data = Path(args.out) / "stages.jsonl", content_hash(args.data)
    rows = [row for _, row in read_jsonl(log)] if log.exists() else []
    for turn, stage in enumerate(stages, 1):
        was = [row for row in rows if row["out"] == str(stage.out)]
        if was and stage.out.exists():
            if (was[-1]["command"], was[-1]["data"]) != (stage.said, data):
                raise UserError(
                    f"{stage.out}: it is of other data or of another command, "
                    f"{was[-1]['command']}; remove it, or name another --out"
                )
            continue
        print(f"\n[{turn}/{len(stages)}] {stage.said}", flush=True)
        began, script = time.perf_counter(), HERE / stage.command[0]
        start = [sys.executable]
        if args.nproc_per_node > 1 and stage.command[1] not in ("pairs", "sft", "score"):
            start += ["-m", "torch.distributed.run", "--standalone"]
            start += ["--nproc-per-node", str(args.nproc_per_node), "--"]
        status = subprocess.run([*start, script, *map(str, stage.command[1:])]).returncode
        if status:
            raise UserError(
                f"the command above ended with status {status}; given again, this one goes on there"
            )
        for checkpoint in checkpoints(stage.out):  # of no more use, and large
            remove(checkpoint)
        seconds = round(time.perf_counter() - began)
        rows.append(
            {"out": str(stage.out), "command": stage.said, "data": data, "seconds": seconds}
        )
        write_jsonl(log, rows)
    return [row for stage in stages for row in rows if row["command"] == stage.said]


def experiment(args, variants: dict[str, str], results: Path) -> tuple[dict, list[dict]]:
    """Run it; return what `score` found, its cells as such, and the stages."""
    splits = {row.get("split") for _, row in read_muce(args.data)}
    if "Training" not in splits or not splits & set(HELD_OUT):
        raise UserError(
            f"{args.data}: expected a column `split` that says Training of some rows and "
            f"{' or '.join(HELD_OUT)} of others; it says {', '.join(sorted(map(str, splits)))}"
        )
    done = carry_out(plan(args, variants, results), args)
    found = json.loads(results.read_text())
    for cell in found["cells"]:
        cell["prompt"] = tuple(map(tuple, cell["prompt"]))
    return found | {"cells": [Cell(**cell) for cell in found["cells"]]}, done


def difference(cells: Sequence[Cell], name: str, ours: Sequence[str], theirs: Sequence[str]):
    """A measure of some models minus that of others, prompt by prompt: its mean and interval."""
    mine, other = (by_prompt([c for c in cells if c.model in who], name) for who in (ours, theirs))
    paired = {
        task: {prompt: value - other[task][prompt] for prompt, value in prompts.items()}
        for task, prompts in mine.items()
    }
    return average(paired), bootstrap(paired)


def claims(rows: Sequence[dict]) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """What the paper says of its models: (claim, measure, who is above, whom)."""
    mean = {row["model"]: row for row in totals(rows) if row["model"] != "human"}
    tuned = [model for model in mean if model != "base"]
    for name in THREE:
        yield "tuned models are more creative than the base", name, tuned, ["base"]
    for name in THREE:
        yield "DPO alone beats the base", name, ["DPO"], ["base"]
    worst = min((m for m in mean if m != "SFT"), key=lambda m: mean[m]["quality"])
    yield "SFT is worst in quality", "quality", [worst], ["SFT"]
    for name, model in SINGLE.items():
        others = [m for m in SINGLE.values() if m in mean and m != model]
        if others:
            best = max(others, key=lambda m: mean[m][name])
            yield "a signal alone leads in it", name, [model], [best]
    for name, model in list(SINGLE.items())[:3]:
        yield "adding quality raises quality", "quality", [f"{model}-qua"], [model]
        yield "and costs of the signal", name, [model], [f"{model}-qua"]
    yield "adding quality raises quality", "quality", ["CrPO-cre"], ["CrPO-nov-div-sur"]
    for name in THREE:
        yield "all three signals beat DPO", name, ["CrPO-nov-div-sur"], ["DPO"]


def verdict(mean: float, interval: tuple[float, float] | None) -> str:
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "cannot be told, leans to " + ("yes" if mean > 0 else "no")
    return "yes" if mean > 0 else "no, the opposite"


def markdown(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n\n"


def show_rows(rows: Sequence[dict], signals: Sequence[str]) -> str:
    """A table of measures: means with intervals, and of several runs their standard deviation."""

    def cell(row, name):
        runs = row.get(f"{name}_runs")
        return with_interval(row, name) + (f", runs ± {np.std(runs, ddof=1):.2g}" if runs else "")

    beside = [name for name in (*BESIDE, "hypervolume") if name in rows[0]]
    shown = []
    for row in rows:
        plain = [f"{row[name]:.2f}" for name in beside]
        shown.append([row["model"], row["prompts"], *(cell(row, n) for n in signals), *plain])
    return markdown(("model", "prompts", *signals, *beside), shown)


def show_claims(found: dict, stated: Iterable[tuple[str, str, list[str], list[str]]]) -> str:
    present, shown = {row["model"] for row in found["rows"]}, []
    for claim, name, ours, theirs in stated:
        if present.issuperset(ours + theirs):
            mean, interval = difference(found["cells"], name, ours, theirs)
            who = ours[0] if len(ours) == 1 else f"{len(ours)} models"
            ends = f"{interval[0]:.3g} to {interval[1]:.3g}" if interval else "one prompt"
            compared = f"{who} − {theirs[0]}"
            row = [claim, name, compared, f"{mean:.3g} ({ends})", verdict(mean, interval)]
            shown.append(row)
    return markdown(("claim", "measure", "difference of", "mean (95 %)", "holds"), shown)


def show_answer(found: dict) -> str:
    """Does the gated sum keep a better balance? Against the sums without and with quality."""
    cells, text = found["cells"], ""
    volumes = {row["model"]: row.get("hypervolume") for row in totals(found["rows"])}
    for other in ("CrPO-nov-div-sur", "CrPO-cre"):
        if {"CrPO-gated", other} <= volumes.keys():
            ends = {n: difference(cells, n, ["CrPO-gated"], [other])[1] or (0, 0) for n in SIGNALS}
            gains = [name for name, (low, _) in ends.items() if low > 0]
            loses = [name for name, (_, high) in ends.items() if high < 0]
            text += (
                f"Against {other} the gated sum gains {' and '.join(gains) or 'nothing'} and loses "
                f"{' and '.join(loses) or 'nothing'} beyond the 95 % interval; hypervolume "
                f"{volumes['CrPO-gated']:.2f} against {volumes[other]:.2f}.\n\n"
            )
            stated = [("gated is above", name, ["CrPO-gated"], [other]) for name in SIGNALS]
            text += show_claims(found, stated)
    return text


def about(args, found: dict, done: Sequence[dict]) -> str:
    """What was run: at the head of a report its settings, at its end the commands."""
    hours = sum(row["seconds"] for row in done) / 3600
    named = ", ".join(f"{signal} by {name}" for signal, name in found["scorers"].items())
    warned = "".join(f"\n\nNote: {warning}." for warning in found["warnings"])
    seeds = ", ".join(map(str, args.seeds))
    return (
        f"{args.model} on {args.data}; seeds {seeds}; {hours:.1f} hours. Measured: {named}. Means "
        "over the responses to a prompt, then over runs, prompts and tasks; in brackets the 95 % "
        f"bootstrap interval over prompts.{warned}\n\n"
    )


def show_commands(done: Sequence[dict]) -> str:
    lines = [f"{row['command']}   # {row['seconds']} s" for row in done]
    return "## Every command\n\n```\n" + "\n".join(lines) + "\n```\n"


def paper_command(args) -> None:
    out = Path(args.out)
    variants = {name: flags for name, flags in VARIANTS.items() if name in args.variants}
    found, done = experiment(args, variants, out / "results.json")
    rows = found["rows"]
    text = f"# Creative Preference Optimization\n\n{about(args, found, done)}"
    if figure(partial(draw_panels, rows, found["frontiers"], str(out / "figure.png"))):
        text += "![quality against novelty, diversity and surprise](figure.png)\n\n"
    text += "## Results\n\n" + show_rows(totals(rows), list(SIGNALS))
    text += "## The paper's claims\n\n" + show_claims(found, claims(rows))
    if answer := show_answer(found):
        text += "## Novelty that counts as far as quality is kept\n\n" + answer
    for task in dict.fromkeys(row["task"] for row in rows if row["task"] != ALL):
        text += f"## {task}\n\n"
        text += show_rows([row for row in rows if row["task"] == task], list(SIGNALS))
    write_file(out / "report.md", text + show_commands(done))
    print(f"\nsaved {out}/report.md")


def figure(draw: Callable[[], None]) -> bool:
    """Draw, if matplotlib is installed."""
    try:
        plotting()
    except UserError as error:
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
        ends = f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
        curves[signal].append((lam, row[signal], spread))
        shown.append([signal, f"{lam:g}", f"{row[signal]:.4g}", f"{spread:.2g}"])
        shown[-1] += [f"{gain:.3g}{ends}", f"{row['quality']:.4g}"]
    text = f"# Each signal alone, with several λ\n\n{about(args, found, done)}"
    base = {signal: (row_of["DPO"][signal], row_of["SFT"][signal]) for signal in args.signals}
    if figure(partial(draw_sweep, curves, base, str(out / "sweep.png"))):
        text += "![each measure against λ](sweep.png)\n\n"
    head = ("signal", "λ", "mean", "± over runs", "above DPO (95 %)", "quality")
    text += markdown(head, shown)
    write_file(out / "sweep.md", text + show_commands(done))
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
        type=number(int, 1, 1024),
        default=1,
        help="processes that score, train and generate, started by torchrun (default: %(default)s)",
    )
    add_scorer_flags(command, EMBEDDER, "google/gemma-2-27b-it")
    for name, script in (
        ("pairs", "data.py pairs"),
        ("sft", "sft.py"),
        ("crpo", "crpo.py"),
        ("generate", "eval.py generate"),
    ):
        command.add_argument(
            f"--{name}",
            type=shlex.split,
            default=[],
            metavar="FLAGS",
            help=f'more flags for {script}, in one pair of quotes, as "--max-steps 300"',
        )


def add_paper(commands) -> None:
    command = commands.add_parser("paper", help="the whole experiment, from ratings to a report")
    command.set_defaults(call=paper_command)
    add_experiment_flags(command)
    command.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="what to train besides SFT (default: all of them)",
    )
    add_seeds(command, [42])


def add_sweep(commands) -> None:
    command = commands.add_parser("sweep", help="each signal alone, with several lambdas")
    command.set_defaults(call=sweep_command)
    add_experiment_flags(command)
    command.add_argument(
        "--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS), help="which"
    )
    command.add_argument(
        "--lambdas",
        nargs="+",
        type=number(float, 1e-6),
        default=[0.5, 1.0, 1.5, 2.0],
        help="weights of the signal (default: %(default)s)",
    )
    add_seeds(command, [42, 12, 92])


def add_seeds(command, seeds: list[int]) -> None:
    command.add_argument(
        "--seeds",
        nargs="+",
        type=number(int, 0, 2**32),
        default=seeds,
        help="a run of each variant for each; SFT has the first (default: %(default)s)",
    )


# --------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_generate, add_score, add_sweep, add_paper):
        add(commands)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    run(main)
