"""crpo.py: the weights, the loss, the objective, and the command against DPO written plainly."""

import crpo
import scores
from crpo import choose_lambdas, crpo_loss, crpo_objective, hold_out, weigh
from data import Pair, UserError, build_table, step_indices
from scores import merge_adapter, read_adapter, score_sequences
from sft import adapter_off, inject, lora_layers

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_lm, read, write
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

# Eight pairs over four prompts; responses of several lengths, some in two pairs.
ROWS = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected, "weight": weight}
    for prompt, chosen, rejected, weight in (
        ("Name a use for a brick.", "A staircase for cats.", "A wall.", 0.5),
        ("Name a use for a brick.", "A staircase for cats.", "A very long and very dull wall.", 1),
        ("Name a use for a brick.", "A wall.", "A very long and very dull wall.", 1.5),
        ("What if nobody could lie?", "Poker would be over.", "Nothing.", 2),
        ("What if nobody could lie?", "Quiet birthdays.", "Nothing.", 0),
        ("Boredom is", "a clock that has forgotten how to tick", "dull", 0.25),
        ("Boredom is", "a wall", "dull", 0.75),
        ("Write a metaphor for joy.", "Joy is a brick that learned to fly.", "Joy.", 1.25),
    )
]
WEIGHTS = torch.tensor([row["weight"] for row in ROWS])


def make_pair(prompt="x", chosen="good", rejected="bad", where="pref.jsonl:1", **row):
    return Pair((("user", prompt),), chosen, rejected, row, where)


def parse(*flags):
    return crpo.parse_args(["--data", "pref.jsonl", *flags])


def logp(model, tokenizer, row, side):
    """log P(response | prompt) of one text alone, from the model's own full logits."""
    start = "<bos>" + row["prompt"] + "\n\n"
    n = len(tokenizer(start, add_special_tokens=False)["input_ids"])
    ids = tokenizer(start + row[side] + "<eos>", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([ids])
    tokens = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return tokens[n - 1 :].sum()


@torch.no_grad()
def logps(model, tokenizer, rows, side):
    return torch.stack([logp(model, tokenizer, row, side) for row in rows])


# Columns of three pairs, and the weights that the authors' compute_creativity_scores gives them.
SIGNALS = {
    "diversity": ([0.330480, 0.519577, 0.214695], [0.704239, 0.697863, 0.190823]),
    "novelty": ([0.927790, 0.092192, 0.362461], [0.035817, 0.149401, 0.527077]),
    "surprise": ([0.195616, 0.886106, 0.726433], [0.368358, 0.542052, 0.214854]),
    "quality": ([0.619161, 0.512335, 0.604964], [0.145972, 0.476920, 0.779204]),
}
THREE = {"diversity": 1, "novelty": 1, "surprise": 1, "quality": 0}  # in a product, no factor 0
MIXED = {"diversity": 0.5, "novelty": 1.5, "surprise": 2.0, "quality": 0.25}
AUTHORS = [  # lambdas, combine, relative to rejected, weights
    (MIXED, "add", False, [2.102947, 2.298371, 2.255146]),
    (MIXED, "add", True, [1.456257, 0.696961, 1.035094]),
    (THREE, "mult", False, [0.059979, 0.042445, 0.056530]),
    (MIXED, "mult", False, [0.013926, 0.008155, 0.012824]),
    # ours, by hand: 0.25 * 0.619161 * (0.5 * 0.330480 + 1.5 * 0.927790 + 2 * 0.195616) = 0.301556
    (MIXED, "gated", False, [0.301556, 0.277979, 0.318197]),
]


@pytest.mark.parametrize("flags", [["--lambda-novelty=1"], ["--lambda-quality=1"]])
def test_gated_needs_quality_and_something_to_gate(flags):
    with pytest.raises(UserError, match="--combine gated: expected --lambda-quality and"):
        choose_lambdas(parse("--combine=gated", *flags))


@pytest.mark.parametrize(("lambdas", "combine", "relative", "expected"), AUTHORS)
def test_weights_are_those_of_the_authors_code(lambdas, combine, relative, expected):
    pairs = [
        make_pair(
            **{f"{name}_chosen": chosen[k] for name, (chosen, _) in SIGNALS.items()},
            **{f"{name}_rejected": rejected[k] for name, (_, rejected) in SIGNALS.items()},
        )
        for k in range(3)
    ]
    flags = [f"--lambda-{name}={value}" for name, value in lambdas.items()]
    flags += ["--combine", combine] + ["--relative-to-rejected"] * relative
    weight, _ = weigh(pairs, None, parse(*flags))
    assert weight.tolist() == pytest.approx(expected, abs=4e-6)
    if not relative:
        scores = {name: torch.tensor(chosen) for name, (chosen, _) in SIGNALS.items()}
        assert torch.allclose(crpo.creativity_weight(scores, lambdas, combine), weight)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"diversity": 1, "novelty": 1, "surprise": 1}),
        (["--combine=gated"], {"infrequency": 1, "quality": 1}),
        (["--lambda-novelty=0.5"], {"novelty": 0.5}),
        (["--lambda-quality=2", "--lambda-diversity=0"], {"quality": 2}),
    ],
)
def test_naming_one_lambda_sets_the_others_to_zero(flags, expected):
    assert choose_lambdas(parse(*flags)) == expected


def test_a_ready_weight_counts_unless_a_lambda_is_named_and_all_of_them_zero_is_dpo():
    pairs = [make_pair(weight=2.5, novelty_chosen=0.25), make_pair(weight=0, novelty_chosen=1)]
    for flags, expected, made_of in (
        ([], [2.5, 0], "the file's weight column"),
        (["--lambda-novelty=2"], [0.5, 2], "add 2 novelty"),
        (["--lambda-diversity=0"], [1, 1], "1 for every pair: DPO"),
    ):
        weight, description = weigh(pairs, None, parse(*flags))
        assert (weight.tolist(), description) == (expected, made_of)


def test_relative_to_rejected_where_the_rejected_score_is_missing():
    """max(0, chosen - rejected): 0.9 - 0.4, 0.2 - 0.4, and 0.3 - 0 where the column is absent."""
    pairs = [make_pair(novelty_chosen=x, novelty_rejected=0.4) for x in (0.9, 0.2)]
    pairs.append(make_pair(novelty_chosen=0.3))
    args = parse("--lambda-novelty=1", "--relative-to-rejected")
    assert weigh(pairs, None, args)[0].tolist() == pytest.approx([0.5, 0, 0.3])


@pytest.mark.parametrize(
    ("column", "bad"),
    [
        *(("novelty_chosen", bad) for bad in (None, math.nan, -0.01, 1.01, "x", True)),
        *(("novelty_rejected", bad) for bad in (math.nan, -0.01, 1.01, "x", True)),
        *(("weight", bad) for bad in (None, math.nan, math.inf, 10**400, -0.01, "x", True)),
    ],
)
def test_a_bad_score_is_an_error_with_file_line_and_column(column, bad):
    good = {"novelty_chosen": 1.0, "novelty_rejected": 0.0, "weight": 1.0}
    pairs = [make_pair(**good), make_pair(where="pref.jsonl:7", **good | {column: bad})]
    flags = [] if column == "weight" else ["--lambda-novelty=1", "--relative-to-rejected"]
    with pytest.raises(UserError, match=rf"pref\.jsonl:7: '{column}' is"):
        weigh(pairs, None, parse(*flags))


@pytest.mark.parametrize(
    ("flags", "expected"), [([], [1, 0]), (["--relative-to-rejected"], [1, 0.5])]
)
def test_quality_that_the_file_lacks_comes_from_its_human_scores(flags, expected):
    """Chosen a = 50, c = 30; rejected b = 10. Over {a, c}: 1, 0. Over {a, c, b}: 1, 0.5, 0."""
    pairs = [
        make_pair(chosen="a", rejected="b", score_chosen=50, score_rejected=10),
        make_pair(chosen="c", rejected="b", score_chosen=30, score_rejected=10),
    ]
    flags = ["--lambda-quality=1", "--embedder=none", "--surprise-model=none", *flags]
    assert weigh(pairs, None, parse(*flags))[0].tolist() == expected


def test_signals_that_the_file_lacks_are_computed_and_those_it_has_are_kept(checkpoints):
    lm = load_lm(checkpoints("llama"), torch.float32)
    pairs = [
        make_pair(chosen=f"brick {word}", diversity_chosen=0.125)
        for word in ("wall", "of joy and of boredom", "clock stair")
    ]
    weight, description = weigh(pairs, lm, parse("--model", checkpoints("llama")))
    for name in ("novelty", "surprise"):  # min-max over the three
        values = [pair.row[f"{name}_chosen"] for pair in pairs]
        assert (min(values), max(values)) == (0, 1)
    three = ("diversity", "novelty", "surprise")
    totals = [sum(pair.row[f"{name}_chosen"] for name in three) for pair in pairs]
    assert weight.tolist() == pytest.approx(totals)
    assert [pair.row["diversity_chosen"] for pair in pairs] == [0.125] * 3
    assert description == "add 1 diversity, 1 novelty, 1 surprise"


def test_weights_of_mean_one_a_prompt_and_the_effective_share(capsys):
    """(1, 3) has mean 2 and (0, 0) mean 0; 4^2 / (4 * 10) of the four pairs, 1 / 20 of twenty."""
    pairs = [make_pair(prompt) for prompt in ("a", "b", "a", "b")]
    weight = torch.tensor([1.0, 0.0, 3.0, 0.0])
    assert crpo.mean_one(weight, pairs).tolist() == [0.5, 0, 1.5, 0]
    crpo.print_weights(weight, "add", parse())
    printed = capsys.readouterr().out
    assert "effective share of the pairs 40%" in printed and "warning" not in printed
    crpo.print_weights(torch.eye(20)[0], "add", parse())
    assert "warning: training rests on few of the pairs" in capsys.readouterr().out
    with pytest.raises(UserError, match="every pair has weight 0"):
        crpo.print_weights(torch.zeros(4), "add", parse())


# Log-probs of pairs: tied, saturated at +80 and at -80 (beta 0.1), ordinary.
PAIRS = torch.tensor(
    [  # policy chosen, policy rejected, ref chosen, ref rejected
        [-91.653290, -91.653290, -92.544250, -92.544250],
        [747.912598, -66.491333, -52.204765, -67.788826],
        [-42.021828, 778.527344, -41.149952, -21.545076],
        [-87.768082, -66.600235, -76.276367, -68.519691],
        [-54.297001, -44.358547, -57.606339, -49.661324],
    ]
).T
ONES = [1.0] * 5
LOSSES = [  # beta, weights, losses: of TRL 1.16, then, for diversity, of the authors' CDPOTrainer
    (0.05, ONES, [0.693147182, 4.506574689e-18, 40.047218323, 1.083610058, 0.744224489]),
    (0.1, ONES, [0.693147182, 2.030921622e-35, 80.094436646, 1.573460937, 0.797778130]),
    (0.5, ONES, [0.693147182, 0.0, 400.472167969, 6.706808567, 1.310864449]),
    (
        0.1,
        [0.33048034, 0.51957679, 0.21469539, 0.28163284, 0],
        [0.2290715128, 1.0552196974e-35, 17.195905685, 0.4431382716, 0],
    ),
]


@pytest.mark.parametrize(("beta", "weight", "expected"), LOSSES)
def test_the_loss_is_that_of_trl_and_of_the_authors(beta, weight, expected):
    losses = crpo_loss(*PAIRS, torch.tensor(weight), beta)
    assert losses.tolist() == pytest.approx(expected, rel=2e-6, abs=1e-44)


def test_margins_beyond_all_bounds_have_finite_losses_and_slopes():
    """beta 0.1 of log-probs 1e30 apart: the loss is 0 or the margin, the slope 0 or -weight."""
    policy = torch.tensor([1e30, -1e30, 0.0], requires_grad=True)
    zero, weight = torch.zeros(3), torch.tensor([2.0, 2.0, 0.0])
    losses = crpo_loss(policy, zero, zero, zero, weight, beta=0.1)
    losses.sum().backward()
    assert losses.tolist() == [0, pytest.approx(2e29), 0]
    assert policy.grad.tolist() == [0, pytest.approx(-0.2), 0]


def prepare(folder, beta=0.5):
    """A model with a fresh adapter; make(micro_tokens, shift) is CRPO over ROWS."""
    lm = load_lm(folder, torch.float32)
    items = [((("user", r["prompt"]),), r[side]) for r in ROWS for side in ("chosen", "rejected")]
    table, index = build_table(lm.encoder, items, 256)
    reference = torch.from_numpy(score_sequences(lm, table))
    inject(lm.model, 4, 8)
    sides = torch.tensor(index).view(-1, 2)

    def make(micro_tokens, shift=0.0):
        lm.micro_tokens = micro_tokens
        return crpo_objective(lm, table, sides, WEIGHTS, reference + shift, beta)

    return lm, make


def disturb(model):
    """As after some training: every B is random."""
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        layer.B.data.normal_(0, 0.05, generator=generator)


def run_step(objective, step, indices):
    """What one optimizer step sees: number of passes, metrics."""
    totals, passes = {}, 0
    for loss, stats in objective(step, indices):
        loss.backward()
        passes += 1
        assert loss.item() == pytest.approx(float(stats["loss"]))
        totals = {name: totals.get(name, 0) + float(value) for name, value in stats.items()}
    return passes, totals


def test_step_0_has_rewards_of_exactly_zero_and_loss_mean_weight_ln_2(checkpoints):
    _, make = prepare(checkpoints("llama"))
    _, stats = run_step(make(100), 0, list(range(8)))
    assert stats["loss"] == pytest.approx(WEIGHTS.mean().item() * math.log(2), rel=1e-6)
    assert all(stats[f"rewards/{name}"] == 0 for name in ("chosen", "rejected", "margins"))
    assert stats["rewards/accuracies"] == 0.5


def test_step_0_refuses_a_stale_reference_and_an_adapter_that_is_not_fresh(checkpoints):
    lm, make = prepare(checkpoints("llama"))
    for shift in (0.5, -0.5):
        with pytest.raises(AssertionError, match="remove the cache"):
            run_step(make(100, shift), 0, [0, 1])
    disturb(lm.model)
    with pytest.raises(AssertionError, match="changes the model"):
        run_step(make(100), 0, [0, 1])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_metrics_are_means_over_the_step_of_log_probs_computed_one_by_one(checkpoints, name):
    """Against the model's own full logits, a sequence at a time: 7 pairs in several passes."""
    lm, make = prepare(checkpoints(name), beta=0.5)
    disturb(lm.model)
    taken = [6, 0, 3, 1, 7, 2, 5]
    passes, stats = run_step(make(60), 1, taken)
    assert 1 < passes < 7

    rows, tokenizer = [ROWS[k] for k in taken], lm.encoder.tokenizer
    chosen, rejected = (logps(lm.model, tokenizer, rows, s) for s in ("chosen", "rejected"))
    with adapter_off(lm.model):
        ref = [logps(lm.model, tokenizer, rows, side) for side in ("chosen", "rejected")]
    rewards = 0.5 * (chosen - ref[0]), 0.5 * (rejected - ref[1])
    margin = rewards[0] - rewards[1]
    expected = {
        "loss": (WEIGHTS[taken] * (1 + torch.exp(-margin)).log()).mean(),
        "weight": WEIGHTS[taken].mean(),
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).float().mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    del stats["tokens"]
    assert stats == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4, abs=1e-4)


def test_hold_out_splits_by_prompt_and_is_a_function_of_the_seed():
    """11 prompts of 3 pairs: a tenth, rounded up, is 2 prompts with all their 6 pairs."""
    pairs = [make_pair(f"prompt {k % 11}", where=str(k)) for k in range(33)]
    train, held_out = hold_out(pairs, 0.1, seed=1)
    away = {pair.prompt for pair in held_out}
    assert (len(train), len(held_out), len(away)) == (27, 6, 2)
    assert not away & {pair.prompt for pair in train}
    assert hold_out(pairs, 0.1, seed=1) == (train, held_out)
    assert any(hold_out(pairs, 0.1, seed)[1] != held_out for seed in (2, 3))
    assert hold_out(pairs, 0, seed=1) == (pairs, [])
    assert hold_out(pairs[::11], 0.5, seed=1) == (pairs[::11], [])  # of the only prompt


SMALL = ["--lora-r", 4, "--lora-alpha", 8, "--micro-tokens", 60]


@pytest.fixture
def train(run_main, tmp_path, checkpoints):
    """train(rows, *flags) runs the command: what it prints, the lines of steps and evaluations."""

    def call(rows, *flags, out="run"):
        data, out = write(tmp_path / "pref.jsonl", rows), tmp_path / out
        always = "--data", data, "--model", checkpoints("llama"), "--out", out, *SMALL
        printed, lines = run_main("crpo", *always, *flags), read(out / "metrics.jsonl")
        return printed, [r for r in lines if "loss" in r], [r for r in lines if "eval_loss" in r]

    return call


def plain_dpo(folder, weights, beta, lr, batch_size, steps, seed):
    """(loss, margin, gradient norm) of each step: full logits, one sequence at a time, AdamW."""
    tokenizer, history = AutoTokenizer.from_pretrained(folder), []
    reference, policy = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    inject(policy, 4, 8, seed=seed)
    params = [p for m in lora_layers(policy).values() for p in (m.A, m.B)]
    optimizer = torch.optim.AdamW(params, weight_decay=0.0)
    for step in range(steps):
        total, margins = 0, []
        taken = step_indices(len(ROWS), batch_size, seed, step)
        for k in taken:
            ratio = {}
            for side in ("chosen", "rejected"):
                with torch.no_grad():
                    ref = logp(reference, tokenizer, ROWS[k], side)
                ratio[side] = logp(policy, tokenizer, ROWS[k], side) - ref
            margins.append(beta * (ratio["chosen"] - ratio["rejected"]))
            total -= weights[k] * F.logsigmoid(margins[-1]) / len(taken)
        optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)  # linear to zero
        optimizer.step()
        history.append([total.item(), torch.stack(margins).mean().item(), norm.item()])
    return np.array(history)


def test_a_run_that_changes_nothing_measures_the_same_before_and_after(train):
    """Both evaluations take the reference of their own passes: margins are 0, not rounding."""
    printed, _, _ = train(ROWS, "--model", "tiny", "--lr", 0, "--max-steps", 1, "--holdout", 0.5)
    assert "rewards/accuracies 0.500 -> 0.500, rewards/margins 0.000 -> 0.000" in printed


def test_only_what_the_steps_take_is_computed(train, monkeypatch):
    """One step of two of eight pairs: their responses alone need a reference; it is the same."""
    asked, score = [], scores.score_sequences

    def counting(lm, table):
        asked.append(len(table.responses))
        return score(lm, table)

    monkeypatch.setattr(scores, "score_sequences", counting)
    flags = "--holdout", 0, "--batch-size", 2, "--weights-mean-one"
    _, every, _ = train(ROWS, *flags, out="every")
    _, one, _ = train(ROWS, *flags, "--max-steps", 1, out="one")
    assert asked[1] <= 4 < asked[0]
    assert one[0]["loss"] == pytest.approx(every[0]["loss"], rel=1e-5)
    assert one[0]["weight"] == pytest.approx(every[0]["weight"])


@pytest.mark.parametrize(
    ("flags", "weights"), [(["--lambda-diversity", 0], [1.0] * 8), ([], WEIGHTS.tolist())]
)
def test_training_is_plain_dpo_times_the_weight(train, checkpoints, flags, weights):
    """Four steps of three pairs, over an epoch's end, as an independent loop takes them."""
    flags = [*flags, "--lr", 2e-3, "--beta", 0.3, "--batch-size", 3, "--max-steps", 4]
    _, steps, evaluations = train(ROWS, *flags, "--holdout", 0, "--seed", 7)
    names = ("loss", "rewards/margins", "grad_norm")
    history = np.array([[row[name] for name in names] for row in steps])
    expected = plain_dpo(checkpoints("llama"), weights, 0.3, 2e-3, 3, 4, seed=7)
    assert not evaluations
    assert np.abs(expected[1:, 1]).min() > 0.01  # it moved
    np.testing.assert_allclose(history, expected, rtol=2e-3, atol=1e-5)


def test_the_reference_is_the_sft_model_and_the_saved_adapter_is_the_whole_change(
    tmp_path, run_main, train, checkpoints
):
    """SFT, then CRPO on top: step 0 is at the SFT model, and what is saved is for the base."""
    base, tokenizer = checkpoints("llama"), AutoTokenizer.from_pretrained(checkpoints("llama"))
    responses = [{"prompt": r["prompt"], "response": r["chosen"]} for r in ROWS]
    flags = "--model", base, *SMALL, "--lr", 1e-2, "--batch-size", 2, "--merge"
    data, held_out = write(tmp_path / "sft.jsonl", responses), write(tmp_path / "eval", ROWS[4:])
    run_main("sft", "--data", data, "--out", tmp_path / "sft", *flags)
    flags += "--adapter", tmp_path / "sft", "--eval-data", held_out
    _, steps, (before, after) = train(ROWS[:4], *flags)

    def chosen(folder, adapter=None):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if adapter:
            merge_adapter(model, read_adapter(adapter), "saved")
        return logps(model, tokenizer, ROWS[4:], "chosen").mean().item()

    assert steps[0]["rewards/chosen"] == steps[0]["rewards/rejected"] == 0
    assert before["eval_rewards/margins"] == before["eval_rewards/chosen"] == 0
    assert before["eval_loss"] == pytest.approx(WEIGHTS[4:].mean().item() * math.log(2))
    assert before["eval_logps/chosen"] == pytest.approx(chosen(tmp_path / "sft/merged"), rel=1e-4)
    assert abs(before["eval_logps/chosen"] - chosen(base)) > 1  # SFT did something
    assert abs(after["eval_logps/chosen"] - before["eval_logps/chosen"]) > 0.01  # so did CRPO
    assert after["eval_logps/chosen"] == pytest.approx(chosen(base, tmp_path / "run"), rel=1e-4)
    assert after["eval_logps/chosen"] == pytest.approx(chosen(tmp_path / "run/merged"), rel=1e-4)


# A preference that can be learned from other prompts: the brick is good, the wall is bad.
WORDS = ["cats", "joy", "clocks", "lies", "stairs", "poker", "time", "birds", "bread", "ice"]
TOY = [
    {
        "prompt": f"Say something about {word}.",
        "chosen": f"A {adjective} brick.",
        "rejected": f"A {adjective} wall.",
    }
    for word in WORDS
    for adjective in ("small", "quiet")
]


def test_a_learnable_preference_is_learned_and_metrics_keep_their_contract(train):
    """20 pairs, 2 of 10 prompts held out: 4 steps of 4 pairs an epoch."""
    flags = "--lr", 5e-3, "--batch-size", 4, "--epochs", 2, "--holdout", 0.2, "--lambda-quality", 0
    printed, steps, (before, after) = train(TOY, *flags)
    assert "on 16 pairs; held out 4 pairs of 2 prompts" in printed

    means = {"loss", "weight", "rewards/chosen", "rewards/rejected", "rewards/margins"}
    means |= {"rewards/accuracies", "logps/chosen", "logps/rejected"}
    timing = {"seconds", "pairs_per_second", "tokens_per_second"}
    assert all(set(row) == means | timing | {"step", "epoch", "grad_norm", "lr"} for row in steps)
    for row in (before, after):
        assert set(row) == {f"eval_{name}" for name in means} | {"step", "epoch"}
    assert [row["step"] for row in steps] == list(range(8))
    assert (before["step"], after["step"]) == (0, 8)
    assert before["eval_rewards/accuracies"] == 0.5
    assert after["eval_rewards/accuracies"] == 1.0
    assert after["eval_loss"] < before["eval_loss"] - 0.01


def test_a_pair_that_is_too_long_takes_its_weight_along(train):
    """The second of four pairs is dropped: the mean weight is (1 + 3 + 4) / 3."""
    rows = [{**TOY[2 * k], "weight": k + 1.0} for k in range(4)]
    rows[1]["rejected"] = "A wall. " * 40
    printed, steps, _ = train(rows, "--max-length", 100, "--holdout", 0, "--max-steps", 1)
    assert "1 pair dropped as too long" in printed
    assert steps[0]["weight"] == pytest.approx(8 / 3)


def test_evaluation_data_do_not_change_the_weights_of_training(train, tmp_path):
    """Signals are normalised within a file, though both are about the same prompts."""
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in ROWS]
    other = write(tmp_path / "eval.jsonl", [{**rows[0], "chosen": "An anvil for ants."}, *rows[3:]])
    _, alone, _ = train(rows, "--max-steps", 1, "--holdout", 0, out="alone")
    _, beside, _ = train(rows, "--max-steps", 1, "--eval-data", other, out="beside")
    assert alone[0]["weight"] == pytest.approx(beside[0]["weight"], abs=1e-6)


def test_a_step_whose_weights_are_all_zero_moves_nothing_and_training_goes_on(train):
    """Responses of one token, and no weight in the whole first step."""
    words = "abcdef"
    rows = [
        {"prompt": "A brick?", "chosen": word, "rejected": words[k - 1]}
        | {"weight": float(k not in step_indices(6, 2, 42, 0))}
        for k, word in enumerate(words)
    ]
    flags = "--holdout", 0, "--lr", 1e-2, "--batch-size", 2, "--max-steps", 4
    _, (first, *others), _ = train(rows, *flags)
    assert first["loss"] == first["weight"] == first["grad_norm"] == 0
    assert others[0]["rewards/margins"] == 0  # nothing had moved
    assert all(row["loss"] > 0 and math.isfinite(row["grad_norm"]) for row in others)
    assert others[2]["rewards/margins"] != 0
