"""crpo.py: Creative Preference Optimization (arXiv 2505.14442), the whole method.

    python crpo.py --data pref.jsonl                                 # the embedded tiny model
    python crpo.py --data pref.jsonl --model M --adapter runs/sft    # from an SFT model
    python crpo.py --data pref.jsonl --lambda-diversity 1            # that signal alone; 0: DPO

For a prompt x, a preferred response y_w and a rejected one y_l, DPO maximises

    l_DPO = log sigmoid( beta [log pi(y_w|x) - log ref(y_w|x)]
                       - beta [log pi(y_l|x) - log ref(y_l|x)] )

and CRPO weights each pair by how creative its preferred response is:

    L_CRPO = - E[ (l_d diversity(y_w) + l_n novelty(y_w) + l_s surprise(y_w) + l_q quality(y_w))
                  * l_DPO ]

The signals are in [0, 1], normalised over the responses to x (scores.py); the l's are the flags
--lambda-*. All zero is plain DPO (weight 1); diversity alone is DDPO (arXiv 2503.17126), which also
scales the weights to a mean of 1 a prompt (--weights-mean-one). pi is the model with a LoRA adapter
and ref is the same model with the adapter off, so at step 0 pi = ref, both rewards are exactly 0
and the loss is mean(weight) * ln 2. Every run checks this.

The paper leaves open how to balance novelty with quality. --combine gated is our answer: creative
is what is new *and* good (Runco and Jaeger 2012), so novelty counts only as far as quality is kept,
whereas in a plain sum a poor response can compensate by being odd. (DARLING, arXiv 2509.02534,
multiplies quality by diversity online.) w = quality(y_w) * infrequency(y_w), or l_q quality(y_w)
times the sum of whichever other signals have an l.

Deliberate departures from the authors' code:
 1. a signal that was asked for and cannot be computed is an error, never a silent zero;
 2. an SFT adapter is merged before training, so that ref is the SFT model, not its base;
 3. the mean is over the pairs of the whole optimizer step, however it is cut into passes;
 4. without --eval-data a tenth of the prompts is held out (--holdout 0, as in the paper: none);
 5. a tie counts half in the accuracy, so an untrained model scores 0.5.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # the imports make a million objects and hardly any garbage

import data
import scores
import sft

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

gc.freeze()  # what was imported lives to the end: the collector need not walk it
gc.enable()

# ---- The paper -----------------------------------------------------------------------------------


def creativity_weight(signals: dict, lambdas: dict, combine: str = "add") -> torch.Tensor:
    """The weight of each pair [B] from its signals {name: [B]} and lambdas {name: float}.

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
    logps = scores.token_logps(hidden, head, batch.targets, softcap)  # [N]
    policy = torch.segment_reduce(logps, "sum", lengths=batch.lengths, unsafe=True)  # [S]
    sides = policy[chosen], policy[rejected], reference[chosen], reference[rejected]
    return crpo_loss(*sides, weight, beta), policy


def crpo_objective(
    lm: scores.LanguageModel,
    table: data.Table,
    sides: torch.Tensor,
    weight: torch.Tensor,
    reference: torch.Tensor,
    beta: float,
) -> sft.Objective:
    """CRPO over P pairs; sides [P, 2] is the chosen and the rejected response of each in the table.

    weight [P]; reference [responses of the table]. At step 0 and in evaluations it is computed in
    the same batch too: it must be the given one within rounding, and at step 0 the policy exactly.
    """

    def objective(step, indices):
        units = sides[indices].tolist()
        for taken, sequences, batch in sft.passes(lm, table, units):
            pairs = torch.tensor(indices)[taken]  # [B] of this pass
            place = torch.zeros(len(reference), dtype=torch.int64)
            place[sequences] = torch.arange(len(sequences))
            columns = (*place[sides[pairs]].T, weight[pairs], reference[sequences])
            chosen, rejected, w, ref = (data.send(x, batch.ids.device) for x in columns)  # [B], [S]
            if step == 0 or not torch.is_grad_enabled():  # so both evaluations take the same one
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
            yield losses.sum() / len(indices), stats | {"tokens": batch.tokens if taken else 0}

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


# ---- From the file to pairs with weights ---------------------------------------------------------


def choose_lambdas(args) -> dict[str, float]:
    """The signals that count, {name: lambda > 0}; none is DPO. UserError: a gate alone."""
    named = {name: getattr(args, f"lambda_{name}") for name in scores.SIGNALS}
    if all(value is None for value in named.values()):
        three = ("diversity", "novelty", "surprise")
        return dict.fromkeys(("infrequency", "quality") if args.combine == "gated" else three, 1.0)
    lambdas = {name: value for name, value in named.items() if value}
    if args.combine == "gated" and not ("quality" in lambdas and len(lambdas) > 1):
        expected = "--lambda-quality and another --lambda above 0, or none"
        raise data.UserError(f"--combine gated: expected {expected}")
    return lambdas


def weigh(pairs: Sequence[data.Pair], lm: scores.LanguageModel, args) -> tuple[torch.Tensor, str]:
    """The weight of each of P pairs [P], and what it is made of.

    A ready `weight` column counts where no --lambda is named; signals that the rows lack are added.
    """

    def read(column, high, default=None):
        values = [(pair.row.get(column, default), pair.where) for pair in pairs]
        return torch.tensor([data.check_number(v, column, where, 0, high) for v, where in values])

    named = any(getattr(args, f"lambda_{name}") is not None for name in scores.SIGNALS)
    if not named and any("weight" in pair.row for pair in pairs):
        return read("weight", 1e9), "the file's weight column"
    lambdas = choose_lambdas(args)
    if not lambdas:
        return torch.ones(len(pairs)), "1 for every pair: DPO"
    missing = [name for name in lambdas if not any(f"{name}_chosen" in p.row for p in pairs)]
    if missing:
        print(f"scoring     {', '.join(missing)}: not in the file, computed now")
        models = args.embedder or scores.Embedder(lm), args.surprise_model or lm, args.reward_model
        scorers = scores.Scorers(*models, scores.pick_dtype(args.dtype), args.perplexity)
        scores.add_signals(pairs, missing, scorers, include_rejected=args.relative_to_rejected)
    signals = {name: read(f"{name}_chosen", 1) for name in lambdas}
    if args.relative_to_rejected:
        for name in signals:
            signals[name] = (signals[name] - read(f"{name}_rejected", 1, 0.0)).clamp(min=0)
    made_of = ", ".join(f"{lam:g} {name}" for name, lam in lambdas.items())
    return creativity_weight(signals, lambdas, args.combine), f"{args.combine} {made_of}"


def hold_out(pairs: list[data.Pair], share: float, seed: int) -> tuple[list, list]:
    """Split by prompt, at random: no response to a held-out prompt is trained on."""
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    count = min(math.ceil(share * len(prompts)), len(prompts) - 1)
    order = np.random.default_rng(seed).permutation(len(prompts))
    away = {prompts[k] for k in order[:count]}
    return [p for p in pairs if p.prompt not in away], [p for p in pairs if p.prompt in away]


def encode_pairs(lm: scores.LanguageModel, train: list, held_out: list, args) -> tuple:
    """Tokenise the pairs into one table; drop and count those that are too long.

    Returns what is left of each list, the table, and the chosen and the rejected response of each
    pair, training pairs first, as indices into the table: [P, 2].
    """
    pairs = train + held_out
    items = [(p.prompt, text) for p in pairs for text in (p.chosen, p.rejected)]
    table, index = data.build_table(lm.encoder, items, args.max_length)
    sides = torch.tensor(index).view(-1, 2)
    fits = (sides >= 0).all(1)
    n = int(fits[: len(train)].sum())
    short = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
    train, held_out = short[:n], short[n:]
    if not train:
        raise data.UserError(f"{args.data}: every pair exceeds --max-length {args.max_length}")
    count, aside = data.plural, {p.prompt for p in held_out}
    print(
        f"read        {count(len(pairs), 'pair')}, {count(len(table.prompts), 'prompt')}, "
        f"{count(len({p.task for p in pairs}), 'task')}; "
        f"{count(len(pairs) - len(short), 'pair')} dropped as too long\n"
        f"training    on {count(len(train), 'pair')}; held out {count(len(held_out), 'pair')} of "
        f"{count(len(aside), 'prompt')}"
    )
    scores.layout(lm, table)  # refuses a model that is not supported
    sides, decode = sides[fits], lm.encoder.tokenizer.decode
    print(f"first pair  {decode(table.prompts[table.prompt_of[sides[0, 0]]])!r}")
    for name, side in zip(("chosen", "rejected"), sides[0], strict=True):  # in brackets: trained on
        print(f"  {name:9} [{decode(table.responses[side])!r}]")
    return train, held_out, table, sides


@torch.no_grad()
def show_samples(lm: scores.LanguageModel, prompt: list[int], when: str, seed: int) -> None:
    """Print two responses to a tokenised prompt, sampled at temperature 0.7, top-p 0.95."""
    ids, stop = torch.tensor([prompt], device=lm.model.device), lm.encoder.stop_ids()  # [1, T]
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0}
    sampling |= {"num_return_sequences": 2, "max_new_tokens": min(100, lm.context - len(prompt))}
    sampling |= {"eos_token_id": stop, "pad_token_id": stop[0]}
    lm.model.generation_config = transformers.GenerationConfig(**sampling)  # not the checkpoint's
    torch.manual_seed(seed)
    for row in lm.model.generate(ids, attention_mask=torch.ones_like(ids), synced_gpus=lm.sharded):
        text = lm.encoder.tokenizer.decode(row[len(prompt) :], skip_special_tokens=True)
        print(f"  {when:8}  {text.strip()}")


def mean_one(weight: torch.Tensor, pairs: Sequence[data.Pair]) -> torch.Tensor:
    """Weights [P] scaled to a mean of 1 over the pairs of each prompt, as DDPO has them."""
    number = {p: k for k, p in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}
    prompt = torch.tensor([number[pair.prompt] for pair in pairs])  # [P]
    mean = prompt.bincount(weight) / prompt.bincount()
    return weight / mean.clamp(min=1e-9)[prompt]


def print_weights(weight: torch.Tensor, made_of: str, args) -> None:
    """Print what the weights of P pairs are like. UserError if all are 0."""
    if not weight.any():
        raise data.UserError(f"{args.data}: every pair has weight 0; there is nothing to train on")
    share = float(weight.sum() ** 2 / (len(weight) * weight.square().sum()))  # 1 / P for one pair
    print(
        f"weights     {made_of}; mean {weight.mean():.3f}, from {weight.min():.3f} to "
        f"{weight.max():.3f}; effective share of the pairs {share:.0%}; beta {args.beta:g}"
    )
    if share < 0.1:
        print(f"warning: training rests on few of the pairs, their effective share is {share:.1%}")


# ---- The command ---------------------------------------------------------------------------------

# The paper's values, for 8B parameters and 42,058 pairs, would hardly change so small a model.
TINY_RECIPE = {"lr": 5e-4, "epochs": 3, "batch_size": 8, "lora_r": 16, "lora_alpha": 32}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser, positive = data.Parser(description=__doc__), data.number(float, 0)
    flag = partial(data.flag, parser)
    flag("--data", ..., "preference JSONL; README has its formats")
    recipe = ", ".join(f"{name} {value}" for name, value in TINY_RECIPE.items())
    flag("--model", "tiny", f"hub name or folder; tiny has its own defaults: {recipe}")
    flag("--adapter", None, "SFT adapter, merged into the model before training")
    flag("--eval-data", None, "held-out pairs, measured before and after")
    share = data.number(float, 0, 0.9)
    flag("--holdout", 0.1, "share of the prompts held out without --eval-data", share)
    sft.add_run_flags(parser, "runs/crpo")
    ones = "no --lambda: 1 for diversity, novelty, surprise; if gated, for infrequency, quality"
    flag = partial(data.flag, parser.add_argument_group("CRPO", ones))
    flag("--beta", 0.1, "of DPO", data.number(float, 1e-6))
    for name in scores.SIGNALS:
        flag(f"--lambda-{name}", None, f"weight of {name}", positive, metavar="L")
    ways = "their weighted sum, their product, or quality times the sum of the others"
    flag("--combine", "add", ways, ["add", "mult", "gated"])
    flag("--weights-mean-one", False, "scale the weights to a mean of 1 a prompt, as in DDPO")
    what = "count each signal only as far as the chosen response exceeds the rejected one"
    flag("--relative-to-rejected", False, what)
    scorers = parser.add_argument_group("scorers of signals that the file lacks")
    scores.add_scorer_flags(scorers, embedder=None, surprise_model=None)
    sft.add_training_flags(parser, lr=5e-6, schedule="linear", warmup=0.0, batch_size=64)
    if parser.parse_args(argv).model == "tiny":
        parser.set_defaults(**TINY_RECIPE)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    scores.join_processes()
    pairs = data.read_preferences(args.data)
    record = sft.check_out(args)
    if args.eval_data:
        train, held_out = pairs, data.read_preferences(args.eval_data)
    else:
        train, held_out = hold_out(pairs, args.holdout, args.seed)
    lm, beneath = sft.load_to_train(args, args.adapter)
    train, held_out, table, sides = encode_pairs(lm, train, held_out, args)
    pairs, n = train + held_out, len(train)
    steps = range(args.max_steps or math.ceil(n / args.batch_size))
    batches = (data.step_indices(n, args.batch_size, args.seed, step) for step in steps)
    taken = sorted({k for batch in batches for k in batch})  # nothing is computed for the others
    asked = {pairs[k].prompt for k in [*taken, *range(n, len(pairs))]}
    weight, reference = torch.zeros(len(pairs)), torch.zeros(len(table.responses))
    # Y_x comes from one file: evaluation data must not change the weights that are trained with
    files = [range(n), range(n, len(pairs))] if args.eval_data else [range(len(pairs))]
    with sft.adapter_off(lm.model):
        for file in files:
            if part := [k for k in file if pairs[k].prompt in asked]:
                some = [pairs[k] for k in part]
                w, made_of = weigh(some, lm, args)
                weight[part] = mean_one(w, some) if args.weights_mean_one else w
        needed = sides[[*taken, *range(n, len(pairs))]].unique().tolist()
        columns = ([column[s] for s in needed] for column in (table.responses, table.prompt_of))
        logps = scores.score_sequences(lm, data.Table(table.prompts, *columns))
        reference[needed] = torch.from_numpy(logps)
    print_weights(weight[taken], made_of, args)
    prompt = table.prompts[table.prompt_of[sides[-1, 0]]]
    print(f"samples     {(held_out or train)[-1].prompt[-1][1]}")
    show_samples(lm, prompt, "before", args.seed)

    def objective(part):
        return crpo_objective(lm, table, sides[part], weight[part], reference, args.beta)

    def save_model(folder):
        sft.save_adapter(lm.model, folder, lm.source, beneath)

    evaluation = (objective(slice(n, None)), len(held_out)) if held_out else None
    training = objective(slice(n)), [pair.where for pair in train]
    with data.locked(args.out):
        sft.prepare_out(args, record)
        results = sft.fit(lm, *training, args, "pairs", save_model, evaluation)
        show_samples(lm, prompt, "after", args.seed)
        sft.save_run(args, lm, save_model)
    if results:
        before, after = results
        names = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
        moved = (f"{name[5:]} {before[name]:.3f} -> {after[name]:.3f}" for name in names)
        print("held out    " + ", ".join(moved))
    print(f"saved       {args.out}/: {', '.join(sorted(p.name for p in Path(args.out).iterdir()))}")


if __name__ == "__main__":
    data.run(main)
