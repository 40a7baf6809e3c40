"""eval.py: did it work?

    python eval.py generate --model M --adapter runs/crpo --prompts heldout.jsonl --out crpo.jsonl
    python eval.py score    --responses base.jsonl crpo.jsonl --out results.json
    python eval.py noveltybench --responses base.jsonl crpo.jsonl --out nb.json

generate samples responses to each prompt, the paper's 16: four in each of its four decoding
settings. score measures them as the paper does (section 4 of arXiv 2505.14442), for each prompt
over a model's responses Y to it, then averages over the prompts of a task:

    novelty    mean over y in Y of 2 | DSI(y) - DSI(Y) |
    diversity  mean semantic distance over the pairs of Y
    surprise   mean perplexity of y given the prompt
    quality    mean reward

The definitions, and the models behind them, are those of scores.py. Other scorers than the ones a
model was trained with make the fairer test; the results name the ones that were used.

noveltybench counts how many of the first k responses to a prompt say different things, and what
they are worth to a user (arXiv 2504.05228); it reads and writes that benchmark's files.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from data import (
    Messages,
    Parser,
    Sample,
    UserError,
    check_number,
    check_prompt,
    check_text,
    number,
    parse_messages,
    prompt_column,
    read_prompts,
    read_rows,
    read_samples,
    run,
    write_file,
    write_jsonl,
)
from scores import (
    EMBEDDER,
    SIGNALS,
    Checkpoint,
    Judge,
    LanguageModel,
    Pool,
    Scorers,
    add_dtype_flag,
    add_scorer_flags,
    content_key,
    fill_rows,
    load_embedder,
    load_reward_model,
    pad,
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
GENERATIONS_EXAMPLE = (
    '{"prompt": "Name a use for a brick.", "generations": ["A door stop.", "..."]}'
)

Same = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]


@dataclass
class Answers:
    """What a model answered to one prompt, in order; its row in the file, and file:line."""

    model: str
    prompt: Messages
    generations: list[str]
    row: dict = field(repr=False)
    where: str


def read_answers(paths: Sequence[str]) -> list[Answers]:
    """Responses, by model and prompt in the order of the files; or the benchmark's own files.

    In those a line has a prompt with all its `generations`. UserError where a line is neither.
    """
    answers: dict[tuple, Answers] = {}
    for path in paths:
        if "generations" not in next(read_rows(path))[1]:
            for sample in read_samples(path):
                model = str(sample.row.get("model", "human"))
                own = Answers(model, sample.prompt, [], sample.row, sample.where)
                answers.setdefault((model, sample.prompt), own).generations.append(sample.response)
            continue
        for where, row in read_rows(path):
            own = parse_answers(path, where, row)
            first = answers.setdefault((own.model, own.prompt, str(row.get("id"))), own)
            if first is not own:
                raise UserError(
                    f"{where}: {own.model} answers this prompt in {first.where} too; expected all "
                    "its generations in one line"
                )
    return list(answers.values())


def parse_answers(path: str, where: str, row: dict) -> Answers:
    """A line of the benchmark's own files; a model may have said nothing there."""
    prompt = parse_messages(row.get("prompt"), "prompt", where, GENERATIONS_EXAMPLE)
    texts = row.get("generations")
    if not isinstance(texts, list) or not texts:
        raise UserError(
            f"{where}: 'generations' is {json.dumps(texts):.60}; expected a list of responses, as "
            f"in {GENERATIONS_EXAMPLE}"
        )
    for text in texts:
        if not isinstance(text, str) or text.strip():
            check_text(text, "generations", where, GENERATIONS_EXAMPLE)
    model = str(row.get("model") or path)
    return Answers(model, check_prompt(prompt, where), texts, row, where)


def shares_words(one: str, other: str) -> bool:
    """2 |words of both| >= the number of words of the longer: lower case, split at spaces."""
    a, b = one.lower().split(), other.lower().split()
    return 2 * len(set(a) & set(b)) >= max(len(a), len(b))


def is_short(one: str, other: str) -> bool:
    """Both have at most five words (or one has none): sharing words decides, no model is asked."""
    lengths = len(one.split()), len(other.split())
    return max(lengths) <= 5 or min(lengths) == 0


class Classifier:
    """The probability that two responses say the same: a sequence classifier with two labels.

    Its label 1 is "the same", and it is run in float32 on the first RESPONSE_TOKENS tokens of each
    response, as the benchmark has it.
    """

    def __init__(self, name: str):
        auto = transformers.AutoModelForSequenceClassification
        self.checkpoint = Checkpoint(name, auto, torch.float32)
        labels = self.checkpoint.config.num_labels
        if labels != 2:
            raise UserError(f"equivalence model {name}: it has {labels} labels; expected two")
        tokenizer = self.checkpoint.tokenizer
        if set(tokenizer("A brick.")["input_ids"]) <= set(tokenizer.all_special_ids):
            # no word is known: transformers makes such a tokenizer where the files are missing
            try:
                self.checkpoint.tokenizer = Checkpoint(TOKENIZER, auto, torch.float32).tokenizer
            except UserError as error:
                raise UserError(
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
                raise UserError(
                    f"equivalence model {checkpoint.name}: {type(model).__name__} is not "
                    "supported; expected an encoder, such as DeBERTa"
                )
            padded = {
                key: pad([rows[key][k] for k in batch], blank * (key == "input_ids"), model.device)
                for key in columns
            }
            inputs = {key: ids for key, (ids, _) in padded.items()}
            logits = model(attention_mask=padded["input_ids"][1], **inputs).logits  # [n, 2]
            return logits.float().softmax(-1)[:, 1:].cpu().numpy()

        return fill_rows("same", checkpoint, 1, rows["input_ids"], compute, "equivalence")[:, 0]


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


def utility(classes: Sequence[int], scores: Sequence[float]) -> float:
    """(1 - p) / (1 - p^n) sum_i p^(i-1) [c_i is new] u_i over the n generations; u = scores [n].

    So it is a mean of u, 0 for repetitions, weighted by how likely the i-th is asked for. With n
    fewer than k generations the weights are still to sum to 1.
    """
    weights = PATIENCE ** np.arange(len(classes))
    return float(sum(weights[i] * scores[i] for i in firsts(classes)) / weights.sum())


def score_firsts(answers, partitions, reward_model, bins) -> list[list[int]]:
    """u = 1..10 of the first generation of each class, 0 for its repetitions: for each prompt [n].

    Only those are scored. A reward equal to a threshold of `bins` is in the lower bin.
    """
    places = [(k, i) for k, classes in enumerate(partitions) for i in firsts(classes)]
    rewards = reward_model([(answers[k].prompt, answers[k].generations[i]) for k, i in places])
    scores = [[0] * len(classes) for classes in partitions]
    for (k, i), u in zip(places, np.searchsorted(bins, rewards) + 1, strict=True):
        scores[k][i] = int(u)
    return scores


def bootstrap(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean of values [P] or [P, m]: percentiles over 10,000 resamples."""
    rng, P = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(P, size=(500, P))].mean(1) for _ in range(20)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return low, high


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
        raise UserError(
            f"{answers.where}: {key!r} is {json.dumps(values):.60}; expected a list of {n} "
            f"numbers, one for each {each}"
        )
    return [check_number(value, key, answers.where, 0, 1e9) for value in values]


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
        held = math.nan if held is None else check_number(held, key, own.where, 0, 1e9)
        found[key] = held, ours

    heads = firsts(classes)
    compare("distinct", len(heads))
    scores = stored_numbers(own, "generation_scores", n, "generation")
    if scores is not None:
        compare("utility", utility(classes, scores))
        held = stored_numbers(own, "partition_scores", len(heads), "class of 'partition'")
        if held is not None:
            pairs = zip(held, [scores[i] for i in heads], strict=True)
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


def measure(answers: Sequence[Answers], same: Same, quality, args) -> tuple[dict, list[dict]]:
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
    row["mean_distinct_interval"] = [float(end) for end in bootstrap(distinct, args.seed)]
    if args.permutations:
        orders = distinct_in_orders(lists, same, args.permutations, args.seed)
        three = {"mean": orders.mean(), "least": orders.min(), "most": orders.max()}
        row["mean_distinct_in_orders"] = {key: float(value) for key, value in three.items()}
    lines = []
    for own, classes in zip(answers, partitions, strict=True):
        line = {"id": own.row["id"]} if "id" in own.row else {}
        line |= {"prompt": prompt_column(own.prompt), "model": own.model}
        line |= {"generations": own.generations, "partition": classes, "distinct": max(classes)}
        lines.append(line)
    if quality:
        for line, scores in zip(lines, score_firsts(answers, partitions, *quality), strict=True):
            classes = line["partition"]
            line["generation_scores"] = scores
            line["partition_scores"] = [scores[i] for i in firsts(classes)]
            line["utility"] = utility(classes, scores)
        utilities = np.array([line["utility"] for line in lines])
        row["mean_utility"] = float(utilities.mean())
        row["mean_utility_interval"] = [float(end) for end in bootstrap(utilities, args.seed)]
    return row, lines


def print_novelty(rows: Sequence[dict], k: int) -> None:
    width = max(len(row["model"]) for row in rows)
    head = f"{'model':{width}}  {'prompts':>7}  {'distinct':>8}  {'95 % interval':>15}"
    head += f"  {'in other orders':>22}" * ("mean_distinct_in_orders" in rows[0])
    print(head + f"  {'utility':>8}  {'95 % interval':>15}" * ("mean_utility" in rows[0]))
    for row in rows:

        def cells(key, row=row):
            low, high = row[f"{key}_interval"]
            return f"  {row[key]:8.3f}  {f'{low:.3f} - {high:.3f}':>15}"

        line = f"{row['model']:{width}}  {row['prompts']:7,}" + cells("mean_distinct")
        if "mean_distinct_in_orders" in row:
            line += "  {mean:6.3f} ({least:.3f} - {most:.3f})".format(
                **row["mean_distinct_in_orders"]
            )
        print(line + (cells("mean_utility") if "mean_utility" in row else ""))
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
        classifier = Classifier(args.equivalence)
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
        vector = load_embedder(args.embedder, pick_dtype(args.dtype))(texts)

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
        raise UserError("--threshold: it belongs to --equivalence or --embedder; name one of them")
    taken = {Path(path).resolve() for path in args.responses}
    for flag, path in (("--out", args.out), ("--write", args.write)):
        if path and Path(path).resolve() in taken:
            raise UserError(f"{flag} {path}: it is another file of this command; name a new one")
        taken.add(Path(path or "").resolve())
    if args.write and Path(args.write).exists() and not args.overwrite:
        raise UserError(f"--write {args.write}: it exists; add --overwrite, or name another")


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
        reward_model = load_reward_model(args.reward_model, pick_dtype(args.dtype))
        quality = reward_model, JUDGE_BINS if isinstance(reward_model, Judge) else SKYWORK_BINS
    named, same = load_equivalence(args, texts)
    if quality:
        bins = "10 to 50 in ten" if quality[1] is JUDGE_BINS else f"those of {SKYWORK}"
        named |= {"reward_model": args.reward_model, "reward_bins": bins}

    rows, lines = [], []
    for model, answers in models.items():
        row, own = measure(answers, same, quality, args)
        rows.append(row | ({"stored": stored[model]} if stored[model] else {}))
        lines += own
    about = {"k": args.k, "patience": PATIENCE, "permutations": args.permutations}
    write_file(args.out, json.dumps(about | {"scorers": named, "rows": rows}, indent=2) + "\n")
    print_novelty(rows, args.k)
    print_stored(rows)
    print("scorers: " + ", ".join(f"{key} {value}" for key, value in named.items()))
    if quality and quality[1] is SKYWORK_BINS and Path(args.reward_model).name != SKYWORK:
        print(f"warning: the bins are those of {SKYWORK}; {args.reward_model} may need others")
    if args.write:
        write_jsonl(args.write, lines)
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
    command.add_argument("--out", required=True, help="JSON file to write")
    command.add_argument(
        "--write",
        metavar="FILE",
        help="JSONL to write in the benchmark's own format, for a submission: prompt, generations, "
        "partition, distinct (the highest class index), generation_scores, partition_scores, "
        "utility",
    )
    command.add_argument("--overwrite", action="store_true", help="replace --write if it exists")
    whole = number(int, 1)
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
        type=number(float, 0, 1),
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
        type=number(int, 0),
        default=20,
        help="random orders of each prompt's generations to partition too, as the classes depend "
        "on the order; they ask --equivalence for more pairs (default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        type=number(int, 0, 2**32),
        default=42,
        help="of the orders and the intervals (default: %(default)s)",
    )
    add_dtype_flag(command)


# --------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_generate, add_score, add_noveltybench):
        add(commands)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    run(main)
