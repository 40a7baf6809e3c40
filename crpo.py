"""crpo.py: Creative Preference Optimization (arXiv 2505.14442), the whole method.

    python crpo.py --data pref.jsonl                                    # the embedded tiny model
    python crpo.py --data pref.jsonl --model M --adapter runs/sft       # from an SFT model
    python crpo.py --data pref.jsonl --model M --lambda-diversity 1     # that signal alone: DDPO
    python crpo.py --data pref.jsonl --model M --lambda-diversity 0     # none: DPO

For a prompt x, a preferred response y_w and a rejected one y_l, DPO maximises

    l_DPO = log sigmoid( beta [log pi(y_w|x) - log ref(y_w|x)]
                       - beta [log pi(y_l|x) - log ref(y_l|x)] )

and CRPO weights each pair by how creative its preferred response is:

    L_CRPO = - E[ (l_d diversity(y_w) + l_n novelty(y_w) + l_s surprise(y_w) + l_q quality(y_w))
                  * l_DPO ]

The signals are in [0, 1], normalised over the responses to x (scores.py); the l's are the flags
--lambda-*. All zero is plain DPO (weight 1), diversity alone is DDPO (arXiv 2503.17126). pi is the
model with a LoRA adapter, ref the same model with the adapter off, so that at step 0 pi = ref, both
rewards are exactly 0 and the loss is mean(weight) * ln 2: checked in every run.

The paper leaves open how novelty is kept in balance with quality. --combine gated is our answer:
creative is what is new *and* good (Runco and Jaeger 2012), so novelty counts only as far as
quality is kept, where in the sum a poor response makes up for it by being odd:

    w = l_q quality(y_w) * (l_d diversity(y_w) + l_n novelty(y_w) + l_s surprise(y_w))

Deliberate departures from the authors' code:
 1. a signal that was asked for and cannot be had is an error, never a silent zero;
 2. an SFT adapter is merged before training, so that ref is the SFT model, not its base (in
    bfloat16 that rounds once more than merging the saved adapter would);
 3. the mean is over the pairs of the whole optimizer step, however it is cut into passes;
 4. without --eval-data a tenth of the prompts is held out (--holdout 0 trains on all, as the
    paper does);
 5. a tie counts half in the accuracy, so an untrained model scores 0.5.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until `run`: the imports make half a million objects and hardly any garbage

import argparse
import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import scores
import sft

# --------------------------------------------------------------------------------------------------
# The paper
# --------------------------------------------------------------------------------------------------


def creativity_weight(
    signals: dict[str, torch.Tensor], lambdas: dict[str, float], combine: str = "add"
) -> torch.Tensor:
    """The weight of each pair [B] from its signals {name: [B]}.

    add: sum of lambda * signal. mult: product of lambda * signal over the signals with lambda > 0.
    gated: quality times the sum of the others.
    """
    terms = {name: lam * signals[name] for name, lam in lambdas.items() if lam > 0}
    if combine == "gated":
        return terms.pop("quality") * sum(terms.values())
    return sum(terms.values()) if combine == "add" else math.prod(terms.values())


def crpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, weight, beta):
    """- weight * l_DPO of each pair; log-probs of whole responses and weights [B] -> losses [B]."""
    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    return -weight * F.logsigmoid(reward_chosen - reward_rejected)


def fused_crpo_loss(hidden, head, batch, chosen, rejected, reference, weight, beta, softcap=None):
    """From hidden states to the loss without logits.

    hidden [N, H] predicts batch.targets [N], tokens of S sequences; head [V, H]; chosen, rejected
    [B] index the sequences; reference [S]; weight [B]. Returns losses [B], policy log-probs [S].
    """
    policy = scores.sum_by_sequence(scores.token_logps(hidden, head, batch.targets, softcap), batch)
    losses = crpo_loss(
        policy[chosen], policy[rejected], reference[chosen], reference[rejected], weight, beta
    )
    return losses, policy


# --------------------------------------------------------------------------------------------------
# The objective of the training loop
# --------------------------------------------------------------------------------------------------


def crpo_objective(
    lm: scores.LanguageModel,
    table: data.Table,
    pairs: Sequence[tuple[int, int]],
    weight: torch.Tensor,
    reference: torch.Tensor,
    beta: float,
    micro_tokens: int,
) -> sft.Objective:
    """CRPO over `pairs` (indices into the table), weight [len(pairs)], reference [S of the table].

    At step 0 the reference is computed in the very batch: it must equal the policy bit for bit, and
    what was computed (or cached) before within rounding.
    """

    def objective(step, indices):
        taken = [pairs[k] for k in indices]
        for units, sequences, batch in sft.passes(lm, table, taken, micro_tokens):
            place = {s: k for k, s in enumerate(sequences)}
            sides = [[place[s] for s in taken[u]] for u in units]
            chosen, rejected = torch.tensor(sides, dtype=torch.int64).view(-1, 2).T  # [B] each
            w = weight[[indices[u] for u in units]].to(lm.model.device)  # [B]
            ref = reference[sequences].to(lm.model.device)  # [S]
            if step == 0:
                ref = check_reference(lm, batch, ref)
            hidden = scores.response_hidden(lm, batch)  # [N, H]
            losses, policy = fused_crpo_loss(
                hidden, lm.head, batch, chosen, rejected, ref, w, beta, lm.softcap
            )
            policy = policy.detach()
            reward = beta * (policy - ref)  # [S]
            if step == 0:
                assert not reward.any(), "step 0: the fresh adapter changes the model"
                assert torch.allclose(losses, w * math.log(2)), "step 0: the loss is not w ln 2"
            margin = reward[chosen] - reward[rejected]  # [B]
            means = {
                "loss": losses.detach(),
                "weight": w,
                "rewards/chosen": reward[chosen],
                "rewards/rejected": reward[rejected],
                "rewards/margins": margin,
                "rewards/accuracies": (1 + margin.sign()) / 2,
                "logps/chosen": policy[chosen],
                "logps/rejected": policy[rejected],
            }
            stats = {name: value.sum() / len(indices) for name, value in means.items()}
            yield losses.sum() / len(indices), stats | {"tokens": batch.tokens if units else 0}

    return objective


@torch.no_grad()
def check_reference(lm: scores.LanguageModel, batch, expected: torch.Tensor) -> torch.Tensor:
    """The reference log-probs [S] of this batch, computed now; they must agree with `expected`."""
    with sft.adapter_off(lm.model):
        now = scores.sequence_logps(lm, batch)
    tolerance = 1e-4 if lm.model.dtype == torch.float32 else 5e-2
    worst = ((now - expected).abs() / (1 + expected.abs())).max().item()
    assert worst < tolerance, f"reference log-probs are off by {worst:.1e}: remove the cache"
    return now


# --------------------------------------------------------------------------------------------------
# From the file to pairs with weights
# --------------------------------------------------------------------------------------------------


def choose_lambdas(args) -> dict[str, float]:
    """The flags --lambda-*; once one of them is given, those that are not count 0."""
    given = {name: getattr(args, f"lambda_{name}") for name in scores.SIGNALS}
    if all(value is None for value in given.values()):
        quality = 1.0 if args.combine == "gated" else 0.0
        return {"diversity": 1.0, "novelty": 1.0, "surprise": 1.0, "quality": quality}
    lambdas = {name: value or 0.0 for name, value in given.items()}
    if args.combine == "gated" and not 0 < lambdas["quality"] < sum(lambdas.values()):
        raise data.UserError(
            "--combine gated: expected --lambda-quality and the --lambda of another signal, all "
            "above 0, or no --lambda at all"
        )
    return lambdas


def ready(pairs: Sequence[data.Pair], args) -> bool:
    """Does the file say what each pair weighs? A --lambda asks for other weights."""
    given = any(getattr(args, f"lambda_{name}") is not None for name in scores.SIGNALS)
    return not given and any("weight" in pair.row for pair in pairs)


def weigh(pairs: Sequence[data.Pair], lm: scores.LanguageModel, args) -> tuple[torch.Tensor, str]:
    """Weights [len(pairs)] of the pairs, and a sentence that says where they come from.

    A signal without a column in the file is computed first, and the rows of the pairs keep it.
    """
    if ready(pairs, args):
        column = [data.check_number(p.row.get("weight"), "weight", p.where, 0, 1e9) for p in pairs]
        return torch.tensor(column), "the file's weight column"
    lambdas = {name: lam for name, lam in choose_lambdas(args).items() if lam > 0}
    if not lambdas:
        return torch.ones(len(pairs)), "1 for every pair: DPO"
    columns = {column for pair in pairs for column in pair.row}
    missing = [name for name in lambdas if f"{name}_chosen" not in columns]
    for name in missing:
        for typo in get_close_matches(f"{name}_chosen", columns, cutoff=0.85):
            raise data.UserError(
                f"{args.data}: it has a column {typo!r} and no '{name}_chosen'; rename it"
            )
    if missing:
        print(f"scoring     {', '.join(missing)}: not in the file, computed now")
        scorers = scores.Scorers(
            args.embedder or scores.Embedder(lm),
            args.surprise_model or lm,
            args.reward_model,
            scores.pick_dtype(args.dtype),
        )
        scores.add_signals(pairs, missing, scorers, include_rejected=args.relative_to_rejected)

    def read(column, default=None):
        values = [(pair.row.get(column, default), pair.where) for pair in pairs]
        return torch.tensor([data.check_number(v, column, where, 0, 1) for v, where in values])

    signals = {name: read(f"{name}_chosen") for name in lambdas}
    if args.relative_to_rejected:
        signals = {
            name: (signals[name] - read(f"{name}_rejected", 0.0)).clamp(min=0) for name in signals
        }
    terms = [f"{lam:g} {name}" for name, lam in lambdas.items()]
    said = (" * " if args.combine == "mult" else " + ").join(terms)
    if args.combine == "gated":
        said = f"({' + '.join(terms[:-1])}) * {terms[-1]}"  # quality is the last of SIGNALS
    if args.relative_to_rejected:
        said += ", each above the rejected response's"
    return creativity_weight(signals, lambdas, args.combine), said


def scorers_of(pairs: Sequence[data.Pair], args) -> dict[str, list[str]]:
    """Who gave each signal that the weights are made of, as far as the rows say."""
    if ready(pairs, args):
        return {}
    named = [pair.row["scorers"] for pair in pairs if isinstance(pair.row.get("scorers"), dict)]
    return {
        name: sorted({str(row[name]) for row in named if name in row})
        for name, lam in choose_lambdas(args).items()
        if lam > 0
    }


def hold_out(
    pairs: list[data.Pair], share: float, seed: int
) -> tuple[list[data.Pair], list[data.Pair]]:
    """Split by prompt, at random: no response of a held-out prompt is trained on."""
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    count = min(math.ceil(share * len(prompts)), len(prompts) - 1)
    order = np.random.default_rng(seed).permutation(len(prompts))
    away = {prompts[k] for k in order[:count]}
    return (
        [pair for pair in pairs if pair.prompt not in away],
        [pair for pair in pairs if pair.prompt in away],
    )


def encode_pairs(
    lm: scores.LanguageModel, train: list[data.Pair], held_out: list[data.Pair], args
) -> tuple[list[data.Pair], list[tuple[int, int]], data.Table, int]:
    """Tokenise both sets into one table; drop and count what is too long.

    Returns the pairs left, training first, (chosen, rejected) of each in the table, the table, and
    how many are for training.
    """
    pairs = train + held_out
    items = [(p.prompt, text) for p in pairs for text in (p.chosen, p.rejected)]
    table, index = data.build_table(lm.encoder, items, sft.limit_length(args, lm), args.too_long)
    sides = list(zip(index[::2], index[1::2], strict=True))
    kept = [k for k, side in enumerate(sides) if min(side) >= 0]
    n_train = sum(k < len(train) for k in kept)
    if not n_train:
        raise data.UserError(f"{args.data}: every pair is too long; raise --max-length")
    held = [pairs[k] for k in kept[n_train:]]
    print(
        f"read        {len(pairs):,} pairs, {len(table.prompts):,} prompts, "
        f"{len({p.task for p in pairs})} tasks; {table.cut:,} prompts cut, "
        f"{len(pairs) - len(kept):,} pairs dropped as too long\n"
        f"training    on {n_train:,} pairs; held out {len(held):,} pairs of "
        f"{len({p.prompt for p in held}):,} prompts"
    )
    return [pairs[k] for k in kept], [sides[k] for k in kept], table, n_train


def show_pair(lm: scores.LanguageModel, table: data.Table, chosen: int, rejected: int) -> None:
    """Print one pair as the model sees it, with what is trained on in brackets."""
    decode = lm.encoder.tokenizer.decode
    print(f"first pair  {decode(table.prompts[table.prompt_of[chosen]])!r}")
    print(f"  chosen    [{decode(table.responses[chosen])!r}]")
    print(f"  rejected  [{decode(table.responses[rejected])!r}]   [trained on]")


@torch.no_grad()
def show_samples(
    lm: scores.LanguageModel, prompt: data.Messages, who: str, seed: int, n: int = 2
) -> None:
    """Print n responses sampled at temperature 0.7, top-p 0.95."""
    (ids,) = lm.encoder.prompts([prompt])
    ids = data.left_cut(
        ids, lm.context - min(100, lm.context // 2), lm.encoder.tokenizer.bos_token_id
    )
    ids = torch.tensor([ids], device=lm.model.device)  # [1, T]
    torch.manual_seed(seed)
    out = lm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        top_k=0,
        num_return_sequences=n,
        max_new_tokens=min(100, lm.context // 2),
        eos_token_id=lm.encoder.stop_ids(),
        pad_token_id=lm.encoder.stop_ids()[0],
        synced_gpus=lm.sharded,
    )
    for row in out:
        text = lm.encoder.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
        print(f"  {who:8}  {text.strip()}")


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------

# The paper's values are for 8B parameters and 42,058 pairs. They would not move a model of a
# million parameters on 300 pairs: with the embedded model these are the defaults.
TINY_RECIPE = {"lr": 5e-4, "epochs": 3, "batch_size": 8, "lora_r": 16, "lora_alpha": 32}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = data.Parser(description=__doc__)
    parser.add_argument("--data", required=True, help="preference JSONL; formats in README")
    parser.add_argument(
        "--model",
        default="tiny",
        help="hub name or folder (default: %(default)s, which "
        "has its own defaults: " + ", ".join(f"{k} {v}" for k, v in TINY_RECIPE.items()) + ")",
    )
    parser.add_argument("--adapter", help="SFT adapter, merged into the model before training")
    parser.add_argument("--eval-data", help="held-out pairs, measured before and after")
    parser.add_argument(
        "--holdout",
        type=data.number(float, 0, 0.9),
        default=0.1,
        help="share of the prompts held out where there is no --eval-data (default: %(default)s)",
    )
    sft.add_run_flags(parser, "runs/crpo")
    group = parser.add_argument_group("CRPO")
    group.add_argument(
        "--beta", type=data.number(float, 0), default=0.1, help="of DPO (default: %(default)s)"
    )
    for name in scores.SIGNALS:
        group.add_argument(
            f"--lambda-{name}",
            type=data.number(float, 0),
            metavar="L",
            help=f"weight of {name} (default: {'1 if gated, or 0' if name == 'quality' else 1}; 0 "
            "once another --lambda is given)",
        )
    group.add_argument(
        "--combine",
        choices=["add", "mult", "gated"],
        default="add",
        help="the weighted signals' sum, their product, or quality times the sum of the others "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--relative-to-rejected",
        action="store_true",
        help="count each signal only as far as the chosen response exceeds the rejected one",
    )
    scorers = parser.add_argument_group("scorers of signals that the file lacks")
    scores.add_scorer_flags(scorers, embedder=None, surprise_model=None)
    sft.add_training_flags(parser, lr=5e-6, schedule="linear", warmup=0.0, batch_size=64)
    if parser.parse_args(argv).model == "tiny":
        parser.set_defaults(**TINY_RECIPE)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    scores.join_processes()
    record = sft.check_out(args)
    pairs = data.read_preferences(args.data)
    if args.eval_data:
        train, held_out = pairs, data.read_preferences(args.eval_data)
    else:
        train, held_out = hold_out(pairs, args.holdout, args.seed)
    lm, beneath = sft.load_to_train(args, args.adapter)

    everything, sides, table, n_train = encode_pairs(lm, train, held_out, args)
    show_pair(lm, table, *sides[0])
    # Y_x is of one file: evaluation data must not change the weights that are trained with
    parts = [everything[:n_train], everything[n_train:]] if args.eval_data else [everything]
    with sft.adapter_off(lm.model):
        weights, (said, *_) = zip(*(weigh(part, lm, args) for part in parts if part), strict=True)
        reference = torch.from_numpy(scores.score_sequences(lm, table, "reference"))
    weight = torch.cat(weights)
    if not weight[:n_train].any():
        raise data.UserError(
            f"{args.data}: every pair has weight 0 ({said}); nothing would be trained"
        )
    print(
        f"weights     {said}; mean {weight.mean():.3f}, from {weight.min():.3f} to "
        f"{weight.max():.3f}; beta {args.beta:g}"
    )
    params = sft.lora_parameters(lm.model)
    size = sum(p.numel() for p in params.values())
    print(
        f"adapter     {size:,} parameters, rank {args.lora_r}; peak "
        f"learning rate {args.lr:g}, {args.batch_size} pairs a step"
    )

    def objective_of(part):
        shared = (reference, args.beta, args.micro_tokens)
        return crpo_objective(lm, table, sides[part], weight[part], *shared)

    shown = everything[-1].prompt
    print(f"samples     {shown[-1][1]}")
    show_samples(lm, shown, "before", args.seed)
    n_held = len(sides) - n_train
    evaluation = (objective_of(slice(n_train, None)), n_held) if n_held else None
    sft.record_run(args, record | {"scorers": scorers_of(everything[:n_train], args)})

    def save_model(folder):
        sft.save_adapter(lm.model, folder, args.model, beneath)

    where = [pair.where for pair in everything[:n_train]]
    results = sft.fit(
        params, objective_of(slice(n_train)), where, args, "pairs", save_model, evaluation
    )
    show_samples(lm, shown, "after", args.seed)
    if results:
        print("held out    " + ", ".join(change(results, name) for name in REPORTED))
    sft.save_run(args, save_model)
    saved = sorted(path.name for path in Path(args.out).iterdir())
    print(f"saved       {args.out}/: {', '.join(saved)}")


REPORTED = ("loss", "rewards/accuracies", "rewards/margins")


def change(results: list[dict], name: str) -> str:
    before, after = (result[f"eval_{name}"] for result in results)
    return f"{name.removeprefix('rewards/')} {before:.3f} -> {after:.3f}"


if __name__ == "__main__":
    data.run(main)
