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

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
