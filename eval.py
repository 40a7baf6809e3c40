"""eval.py: did it work?

    python eval.py generate --model M --adapter runs/crpo --prompts heldout.jsonl --out crpo.jsonl
    python eval.py score    --responses base.jsonl crpo.jsonl --out results.json
    python eval.py human sheet --responses base.jsonl crpo.jsonl --out sheet.csv
    python eval.py human tally --sheets sheet.*.csv --key sheet.key.json --out human.json

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

import argparse
import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    read_prompts,
    read_samples,
    run,
    write_file,
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
    pick_dtype,
)
from sft import load_with_adapter

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
REPLICATES = 2000  # of the bootstrap
PRIOR = 0.5  # wins that each of two models has over the other before anyone has rated them


@dataclass
class Item:
    """What a rater judges at a time, with a model's name for each response drawn that reads so."""

    prompt: str
    response: str
    models: list[str]


def prompt_text(prompt: Messages) -> str:
    """A prompt as a rater reads it: one user turn as it is, several turns under their roles."""
    if len(prompt) == 1:
        return prompt[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in prompt)


def item_id(prompt: str, response: str) -> str:
    """Letters that follow from the text alone, and so tell no more than the rater reads anyway.

    No digits: a spreadsheet would take 12345e67 for a number.
    """
    return "".join(LETTERS[byte % 16] for byte in content_key(prompt, response)[:10])


def choose_prompts(
    there: Sequence[Messages], wanted: Sequence[str], rng: np.random.Generator
) -> list[Messages]:
    """`wanted` says how many prompts, or has a part of the text of each."""
    if len(wanted) == 1 and wanted[0].isdecimal():
        if not 1 <= int(wanted[0]) <= len(there):
            raise UserError(
                f"--prompts {wanted[0]}: there are {len(there):,} prompts with --per-prompt "
                "responses of each model; ask for at least one and no more than these"
            )
        return [there[k] for k in rng.choice(len(there), int(wanted[0]), replace=False)]
    for part in wanted:
        if not any(part in prompt_text(prompt) for prompt in there):
            raise UserError(
                f"--prompts {part!r}: it is in none of the {len(there):,} prompts with "
                "--per-prompt responses of each model"
            )
    return [prompt for prompt in there if any(part in prompt_text(prompt) for part in wanted)]


def draw_items(
    samples: Sequence[Sample],
    models: Sequence[str] | None,
    wanted: Sequence[str],
    each: int,
    seed: int,
) -> dict[str, Item]:
    """What to rate, by id, in the order of the sheet: `each` responses of each model to a prompt.

    A response that was drawn twice, of one model or of two, is one item. The order is random, and
    that of the files does not enter it, so that neither tells who wrote what.
    """
    answers: dict[Messages, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        answers[sample.prompt][str(sample.row.get("model", "human"))].append(sample.response)
    there = sorted({model for answer in answers.values() for model in answer})
    for model in models or ():
        if model not in there:
            raise UserError(f"--models {model!r}: no response is of it; there are {there}")
    models = sorted(set(models or there))
    if len(models) < 2:
        raise UserError(f"all responses are of {models[0]!r}; expected two models to compare")
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


def cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula: an apostrophe in front, if it might."""
    return "'" + text if text[0] in "=+-@\t\r'" else text


def make_sheet(items: dict[str, Item], questions: dict[str, str], name: str) -> tuple[str, str]:
    """The sheet as CSV, which Excel takes for UTF-8 by its first character, and as a page."""
    rows = [[key, cell(item.prompt), cell(item.response)] for key, item in items.items()]
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(["item", "prompt", "response", *questions])
    writer.writerows([*row, *[""] * len(questions)] for row in rows)
    data = {"name": name, "questions": questions, "scale": SCALE, "rows": rows}
    data["store"] = content_key(questions, rows).hex()
    # Within a script element a `<` alone could end the data
    text = json.dumps(data).replace("<", "\\u003c")
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
    if out.suffix.lower() != ".csv":
        raise UserError(f"--out {out}: expected a name that ends in .csv")
    page_path, key_path = out.with_suffix(".html"), out.with_suffix(".key.json")
    for path in (out, page_path, key_path):
        if path.exists() and not args.overwrite:
            raise UserError(f"--out {out}: {path} exists; add --overwrite, or name another")
    questions = dict(args.questions or QUESTIONS.items())
    samples = [sample for path in args.responses for sample in read_samples(path)]
    items = draw_items(samples, args.models, args.prompts, args.per_prompt, args.seed)
    sheet, page = make_sheet(items, questions, out.stem)
    key = {"questions": questions, "items": {name: vars(item) for name, item in items.items()}}
    write_file(key_path, json.dumps(key, ensure_ascii=False, indent=1) + "\n")
    write_file(out, sheet)
    write_file(page_path, page)
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
        for k, item in enumerate(items.values()):
            for model in item.models:
                drawn[item.prompt][model].append(k)
        models = sorted({model for item in items.values() for model in item.models})
        indices = [[drawn[prompt][model] for model in models] for prompt in drawn]
        return questions, items, models, np.array(indices, dtype=int)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--key {path}: not a key of eval.py human sheet ({error})") from None


def read_sheet(path: str, questions: Iterable[str], items: dict[str, Item]) -> np.ndarray:
    """One rater's ratings [I, Q] in the order of `items`, NaN where blank.

    Comma, semicolon or tab between cells, as spreadsheets of different countries save CSV.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read; save it as CSV in UTF-8 ({error})") from None
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    ratings = {}
    try:
        header = [name.strip() for name in next(lines, [])]
        for column in ("item", "response", *questions):
            if header.count(column) != 1:
                expected = ",".join(("item", "prompt", "response", *questions))
                raise UserError(f"{path}:1: not one column {column!r}; expected {expected}")
        end = lines.line_num
        for cells in lines:
            where, end = f"{path}:{end + 1}", lines.line_num
            # Spreadsheets may leave blank cells off the end of a line
            row = dict(zip(header, cells, strict=False))
            if any(cells):
                name = check_item(row, where, items)
                if name in ratings:
                    raise UserError(f"{where}: item {name!r} a second time; remove one of the two")
                ratings[name] = [read_rating(row, question, where) for question in questions]
    except csv.Error as error:
        raise UserError(f"{path}:{lines.line_num}: not a line of CSV ({error})") from None
    blank = [math.nan for _ in questions]
    return np.array([ratings.get(name, blank) for name in items])


def check_item(row: dict[str, str], where: str, items: dict[str, Item]) -> str:
    """The id of the item that a line is about; UserError if its response is another one's."""
    name = row.get("item", "").strip()
    if name not in items:
        raise UserError(f"{where}: item {name!r} is not in the key; is that of another sheet?")
    text = row.get("response", "")
    # Some spreadsheets take the apostrophe of `cell` for their own and drop it
    if items[name].response.split() not in (text.split(), text.removeprefix("'").split()):
        raise UserError(
            f"{where}: the response is not that of item {name!r} in the key; if a column was "
            "sorted without the others, undo that"
        )
    return name


def read_rating(row: dict[str, str], question: str, where: str) -> float:
    text = row.get(question, "").strip()
    if text and not re.fullmatch(rf"[1-{SCALE}]([.,]0+)?", text):
        raise UserError(
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


def prompt_weights(P: int) -> np.ndarray:
    """How often each of P prompts counts: all once, then in each replicate of the bootstrap.

    A replicate draws P - 1 prompts and scales them up to P: so a mean has the variance it should
    however few prompts there are, where P draws fall short by 1 / P (Rao and Wu 1988). Yet of
    normal means over 4, 8, 16 or 40 prompts, 82, 89, 93 or 94 % lie in their 95 % intervals; and
    one prompt has none.
    """
    drawn = np.random.default_rng(0).multinomial(P - 1, [1 / P] * P, REPLICATES if P > 1 else 0)
    return np.vstack([np.ones(P), drawn * P / max(P - 1, 1)])  # [1 + replicates, P]


def estimate(values: np.ndarray) -> tuple[float | None, list[float] | None]:
    """The first of `values`, and its 95 % interval over the others; None where undefined."""
    there = values[np.isfinite(values)]
    if not np.isfinite(values[0]):
        return None, None
    bounds = np.quantile(there[1:], (0.025, 0.975)).tolist() if len(there) > 1 else None
    return float(values[0]), bounds


def tally(ratings: np.ndarray, models: Sequence[str], drawn: np.ndarray) -> dict:
    """What one question's ratings [J, I] say of each model, and how far the raters agree.

    The mean rating is over a prompt's ratings, then over prompts. Intervals are of the prompts:
    ratings of one prompt depend on each other, so what would other prompts have given?
    """
    means, wins, games = compare(ratings, drawn)
    weights, others = prompt_weights(len(drawn)), 1 - np.eye(len(models))
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
    def show(value, bounds=None) -> str:
        text = "-" if value is None else f"{value:.2f}"
        return text + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")

    rows = result["models"]
    width = max(len(row["model"]) for row in rows)
    print(
        f"\n{question}: {result['ratings']:,} ratings, {result['blank']:,} blank, raters' "
        f"agreement (alpha) {show(result['alpha'])}"
    )
    heads = "".join(f"{k:6}" for k, _ in enumerate(rows, 1))
    print(f"    {'model':{width}}  {'mean':>19}  {'strength':>21}  wins against{heads}")
    for k, row in enumerate(rows, 1):
        mean = show(row["mean"], row["mean_interval"])
        strength = show(row["strength"], row["strength_interval"])
        rates = "".join(f"{show(row['win_rates'].get(other['model'])):>6}" for other in rows)
        print(f"{k:3} {row['model']:{width}}  {mean:>19}  {strength:>21}  {'':12}{rates}")


def tally_command(args) -> None:
    questions, items, models, drawn = read_key(args.key)
    paths = [Path(path).resolve() for path in (*args.sheets, args.key, args.out)]
    if len(set(paths)) < len(paths):
        raise UserError("a file is named twice among --sheets, --key and --out")
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
    write_file(args.out, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    few = "; so few make them too narrow" if len(drawn) < 10 else ""
    print(f"\n95 % intervals: bootstrap over {len(drawn):,} prompts{few}")
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
        "--out", required=True, help="CSV to write; the page, .html, and the key beside it"
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
    whole = number(int, 1)
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
        "--seed", type=number(int, 0), default=0, help="of the draws (default: %(default)s)"
    )
    count = parts.add_parser("tally", help="means, win rates, strengths, agreement")
    count.set_defaults(call=tally_command)
    count.add_argument("--sheets", nargs="+", required=True, help="filled CSV files, one a rater")
    count.add_argument("--key", required=True, help="the key that was made with the sheet")
    count.add_argument("--out", required=True, help="JSON file to write")


# --------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_generate, add_score, add_human):
        add(commands)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    run(main)
