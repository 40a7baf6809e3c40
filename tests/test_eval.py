"""eval.py: what is generated, and the paper's averages by hand."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from conftest import CONFIGS, LLAMA_LIKE, contents, make_checkpoint

import eval as evaluation  # the name of the file is that of a builtin
from data import Sample, UserError
from scores import Scorers, load_lm
from sft import inject, lora_layers, merge, save_adapter, save_checkpoint

PROMPTS = [
    {"task": "Uses", "prompt": "Think of a creative use for this object: brick.", "split": "Test"},
    {"task": "Metaphors", "prompt": "What is boredom?", "split": "Training"},
    {
        "task": "Uses",
        "prompt": [
            {"role": "system", "content": "Answer in a rhyme."},
            {"role": "user", "content": "A use for a wall?"},
        ],
    },
]
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    evaluation.main()


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """generate(model, *flags) runs the command on PROMPTS and returns its rows."""
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)

    def run(model, *flags, out="out.jsonl"):
        flags = ["--model", model, "--prompts", prompts, "--max-new-tokens", 6, *flags]
        call(monkeypatch, "generate", "--out", tmp_path / out, *flags)
        return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]

    return run


def scripted(folder, **follows):
    """A Llama that reads one token only: after `a` comes follows["a"], whatever the decoding.

    Its blocks are zero, its embeddings one-hot, its head a table. The prompt is taken as it is, and
    `<unk>` closes the assistant's turn.
    """
    template = "{% for m in messages %}{{ m.content }}"
    template += "{{ '<unk>' if m.role == 'assistant' }}{% endfor %}"
    sizes = {"hidden_size": 300, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**LLAMA_LIKE | sizes)
    make_checkpoint(folder, config, chat_template=template)
    lm = load_lm(str(folder), torch.float32)
    for parameter in lm.model.parameters():
        if parameter.dim() > 1:
            parameter.zero_()
    lm.model.get_input_embeddings().weight.copy_(torch.eye(300))
    for token, following in follows.items():
        (a,), (b,) = lm.encoder.ids([token, following])
        lm.head[b, a] = 10.0
    save_checkpoint(lm.model, lm.encoder, folder)
    return str(folder)


# --------------------------------------------------------------------------------------------------
# Generating
# --------------------------------------------------------------------------------------------------


def test_four_responses_a_prompt_in_each_of_the_papers_decodings(generate, tmp_path):
    rows = generate(scripted(tmp_path / "model", **{".": "a", "?": "a", "a": "<eos>"}))
    settings = [(0.7, 0.95, 0), (0.9, 0.99, 0), (0.7, 1.0, 50), (0.8, 0.97, 0)]
    decodings = [(*s, 0, 6, 42, 16) for s in settings]
    keys = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "seed", "samples")
    asked = [(row["task"], str(row["prompt"])) for row in PROMPTS]
    counts = Counter(
        (row["task"], str(row["prompt"]), *(row["decoding"][key] for key in keys)) for row in rows
    )
    assert all(tuple(row["decoding"]) == keys for row in rows)
    assert counts == dict.fromkeys([(*a, *d) for a in asked for d in decodings], 4)
    names = ("model", "run", "task", "prompt", "response", "decoding")
    assert all(tuple(row) == names for row in rows)
    assert {row["response"] for row in rows} == {"a"}
    assert {(row["model"], row["run"]) for row in rows} == {(str(tmp_path / "model"),) * 2}


def test_the_id_of_a_prompt_stays_with_its_responses(tmp_path, monkeypatch, checkpoints):
    prompts = write(tmp_path / "p.jsonl", [{"id": "curated-0", "prompt": "?"}, {"prompt": "!"}])
    flags = ["--model", checkpoints("llama"), "--max-new-tokens", 3, "--out", tmp_path / "r.jsonl"]
    call(monkeypatch, "generate", "--prompts", prompts, *flags)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {(row["prompt"], row.get("id")) for row in rows} == {("?", "curated-0"), ("!", None)}


@pytest.mark.parametrize("turn_end", ["<eos>", "<unk>"])
def test_eos_and_the_templates_end_of_turn_stop_a_response(generate, tmp_path, turn_end):
    """x, y, stop; what would follow the stop is never drawn."""
    follows = {".": "x", "?": "x", "x": "y", "y": turn_end, turn_end: "z", "z": "z"}
    rows = generate(scripted(tmp_path / "model", **follows))
    assert {row["response"] for row in rows} == {"xy"}


def test_a_response_without_a_stop_has_max_new_tokens(generate, tmp_path):
    rows = generate(scripted(tmp_path / "model", **{".": "x", "?": "x", "x": "x"}))
    assert {row["response"] for row in rows} == {"x" * 6}


def test_blank_responses_are_left_out_and_counted(generate, tmp_path, capsys):
    """After `.` comes a line break and the end: the first prompt has 16 blank responses."""
    follows = {".": "\n", "\n": "<eos>", "?": "x", "x": "<eos>"}
    rows = generate(scripted(tmp_path / "model", **follows))
    assert Counter(row["response"] for row in rows) == {"x": 32}
    assert "3 prompts, 16 blank responses left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama", "gpt-neo"])
def test_the_seed_alone_decides_what_is_drawn(generate, checkpoints, name):
    shared = [checkpoints(name), "--split", "Test"]
    once = generate(*shared, "--seed", 1)
    again = generate(*shared, "--seed", 1, "--overwrite")
    other = generate(*shared, "--seed", 2, out="other.jsonl")
    assert once == again
    assert {row["prompt"] for row in once} == {PROMPTS[0]["prompt"]}
    assert len({row["response"] for row in once}) > 12  # draws, not one answer
    assert len({row["response"] for row in once + other}) > 24


LENGTHS = (9, 1, 30, 4)
ASKED = [(("user", "brick " * n + "?"),) for n in LENGTHS]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_likeliest_tokens_are_those_of_transformers_own_generate(checkpoints, name):
    """Prompts of several lengths in one batch, against each alone without a cache of ours."""
    lm = load_lm(checkpoints(name), torch.float32)
    found = dict(evaluation.generate(lm, ASKED, [GREEDY] * 2, 12, batch_size=8, seed=0))
    for k, prompt in enumerate(ASKED):
        ids = torch.tensor(lm.encoder.prompts([prompt]))
        out = lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=1,
            eos_token_id=lm.encoder.stop_ids(),
            pad_token_id=0,
        )
        text = lm.encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert found[k] == [text.replace("\0", "").strip()] * 2


@pytest.mark.parametrize("name", ["llama", "gpt-neo", "gemma2"])
def test_a_response_is_the_same_whatever_is_drawn_beside_it(checkpoints, name):
    """In batches of one prompt and of four, in another order, and without the other prompts."""
    lm = load_lm(checkpoints(name), torch.float32)

    def answers(asked, batch_size, seed=5):
        drawn = evaluation.generate(lm, asked, evaluation.DECODINGS, 12, batch_size, seed)
        return {asked[k]: texts for k, texts in drawn}

    together = answers(ASKED, 64)
    assert together == answers(ASKED, 1) == answers(ASKED[::-1], 8)
    assert answers(ASKED[1:2], 64) == {ASKED[1]: together[ASKED[1]]}
    assert answers(ASKED, 64, seed=6) != together
    assert len({text for texts in together.values() for text in texts}) == 16


SETTINGS = [
    (0.7, 0.95, 0, 0),
    (0.9, 0.99, 0, 0),
    (0.7, 1, 50, 0),
    (1.3, 0.5, 7, 0),
    (1, 1, 0, 0),
    (1, 1, 1, 0),
    (1, 1, 0, 0.1),
    (1.5, 0.9, 0, 0.05),
    (1.5, 1, 20, 0.2),
    (2, 0.8, 30, 0.3),
    (1, 1, 0, 1),
]


def probabilities(logits, temperature, top_p, top_k, min_p):
    """What transformers' own samplers leave of a distribution: [V]."""
    logits = transformers.TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_k:
        logits = transformers.TopKLogitsWarper(top_k)(None, logits)
    logits = transformers.TopPLogitsWarper(float(top_p))(None, logits)
    return transformers.MinPLogitsWarper(float(min_p))(None, logits).softmax(-1)[0]


@pytest.mark.parametrize("V", [40, 2000])
@pytest.mark.parametrize("settings", SETTINGS)
def test_sorted_draws_have_the_distribution_of_transformers_samplers(V, settings):
    """A thousand numbers spread evenly over [0, 1] give each token its share of them, to one."""
    logits = 2 * torch.randn(1, V, generator=torch.Generator().manual_seed(V))
    noise = (torch.arange(1000) + 0.5) / 1000
    each = [torch.full((1000,), float(x)) for x in settings]
    drawn = evaluation.draw_sorted(logits.expand(1000, V), noise, *each).bincount(minlength=V)
    expected = probabilities(logits, *settings)
    assert (drawn - 1000 * expected).abs().max() < 1.01
    assert not drawn[expected == 0].any()


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_have_the_distribution_of_sorted_ones(settings):
    """Over a grid of 120 x 120 numbers: a first draw is right to 1 / 120, and so is a second."""
    logits = 2 * torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    line = (torch.arange(120) + 0.5) / 120
    noise = torch.cartesian_prod(line, line)
    each = [torch.full((len(noise),), float(x)) for x in settings]
    drawn = evaluation.draw(logits.expand(len(noise), 100), noise, *each).bincount(minlength=100)
    expected = probabilities(logits, *settings)
    assert (drawn / len(noise) - expected).abs().max() < 2 / 120
    assert not drawn[expected == 0].any()


@pytest.mark.parametrize("draw", [evaluation.draw, evaluation.draw_sorted])
def test_each_row_of_a_draw_has_its_own_settings(draw):
    """Probabilities .5, .3, .2: noise .9 takes the third, or the last that the setting leaves.

    That is at least .5 * .5 for a min_p of .5. At temperature .1 the powers of ten of .5, .3, .2
    make the first one .994 of the whole.
    """
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(5, 3)
    noise = torch.full((5, 2) if draw is evaluation.draw else (5,), 0.9)
    top_p, top_k = torch.tensor([1, 0.8, 1, 1, 1]), torch.tensor([0, 0, 1, 0, 0])
    temperature, min_p = torch.tensor([1, 1, 1, 1, 0.1]), torch.tensor([0, 0, 0, 0.5, 0])
    assert draw(logits, noise, temperature, top_p, top_k, min_p).tolist() == [2, 1, 0, 1, 0]


@pytest.mark.parametrize("draw", [evaluation.draw, evaluation.draw_sorted])
def test_of_equally_likely_tokens_the_first_come_first(draw):
    """Five of probability .2, as bfloat16 often has them: 3 by top-k, 2 by top-p, 1 greedily."""
    line = (torch.arange(100) + 0.5) / 100
    noise = torch.cartesian_prod(line, line) if draw is evaluation.draw else line
    greedy = evaluation.settings_of(GREEDY)
    for settings, left in (((1, 1, 3, 0), 3), ((1, 0.4, 0, 0), 2), (greedy, 1)):
        each = [torch.full((len(noise),), float(x)) for x in settings]
        drawn = draw(torch.zeros(len(noise), 5), noise, *each)
        shares = drawn.bincount(minlength=5) / len(noise)
        expected = torch.tensor([1.0] * left + [0.0] * (5 - left)) / left
        assert torch.allclose(shares, expected, atol=0.02)
        assert not shares[left:].any()


@pytest.mark.parametrize("name", ["llama", "gpt-neo"])
def test_the_adapter_is_applied(generate, checkpoints, tmp_path, name):
    """Base and adapter answer as the checkpoint they were merged into, and not as the base."""
    base, merged, adapter = checkpoints(name), tmp_path / "merged", tmp_path / "tuned"
    lm = load_lm(base, torch.float32)
    inject(lm.model, 4, 8)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(lm.model).values():
        layer.B.data.normal_(0, 0.1, generator=generator)
    save_adapter(lm.model, adapter, base, beneath=None)
    merge(lm.model)
    save_checkpoint(lm.model, lm.encoder, merged)

    tuned = generate(base, "--adapter", adapter)
    whole = generate(merged, out="merged.jsonl")
    plain = generate(base, out="base.jsonl")
    assert {row["model"] for row in tuned} == {str(tmp_path / "tuned")}
    assert [row["response"] for row in tuned] == [row["response"] for row in whole]
    pairs = zip(tuned, plain, strict=False)
    assert sum(one["response"] != two["response"] for one, two in pairs) > len(tuned) / 2


def test_an_existing_out_is_refused_before_the_model_is_loaded(generate, tmp_path):
    (tmp_path / "out.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match="--overwrite"):
        generate("no such model")
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize("samples", [2, 6, 17])
def test_samples_that_the_four_decodings_cannot_share_are_refused(generate, tmp_path, samples):
    with pytest.raises(UserError, match=f"--samples {samples}: expected a multiple of 4"):
        generate("no such model", "--samples", samples)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_context_bounds_the_response_and_refuses_a_prompt_that_fills_it(tmp_path):
    """A context of 20: a prompt of 15 tokens has 5 to answer with, one of 20 none."""
    lm = load_lm(scripted(tmp_path / "model", x="x"), torch.float32)
    lm.config.max_position_embeddings = 20

    def answer(n):
        return next(evaluation.generate(lm, [(("user", "x" * n),)], [GREEDY], 99, 1, seed=0))

    assert answer(15) == (0, ["x" * 5])
    with pytest.raises(UserError, match="20 tokens leaves no room"):
        answer(20)


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------

VECTORS = {  # of words and of whole responses; unit vectors in a plane
    "red": (1.0, 0.0),
    "blue": (0.0, 1.0),
    "sky": (0.6, 0.8),
    "red sky": (0.8, 0.6),
}


def stub_embedder(texts):
    return {text: np.array(VECTORS[text]) for text in texts}


def samples_of(task, prompt, *responses, **row):
    return [
        Sample((("user", prompt),), text, {"task": task, **row}, "responses.jsonl:1", score)
        for text, score in responses
    ]


SKIES = [
    *samples_of("Skies", "r", ("red", 12), ("red", 14)),  # no model: a human's
    *samples_of("Colours", "p", ("red", 10), ("blue", 20), model="m"),
    *samples_of("Colours", "q", ("red", 30), ("red", 40), ("red", 50), model="m"),
    *samples_of("Skies", "r", ("red sky", 20), ("blue", 40), model="m"),
]


def test_score_averages_over_responses_then_prompts_then_tasks():
    """Semantic distances: red-blue 1, red-sky 0.4, sky-blue 0.2, "red sky"-blue 0.4.

    p: {red, blue}        diversity 1.  DSI of one word 0, of {red, blue} 1: novelty 2, 2.
    q: {red, red, red}    diversity 0.  One word only: novelty 0.
    Colours: diversity (1 + 0) / 2, novelty (2 + 0) / 2, quality (15 + 40) / 2.
    r: {red sky, blue}    diversity 0.4.  DSI 0.4, 0, and (0.4 + 1 + 0.2) / 3 = 8/15 of all three
                          words: novelty 2 * 2/15 and 16/15, on average 2/3; quality 30.
    The averages over all 7 responses, or over the 3 prompts, would be others. The human has one
    task, and so no line over tasks. Words: 1 in p and q, (2 + 1) / 2 in r. Of the three reds of q
    two are duplicates. Two prompts drawn from p and q are p, p or q, q in a quarter of the draws
    each, so the interval of Colours reaches from one to the other; r is its task's only prompt.
    """
    signals = ["novelty", "diversity", "quality"]
    cells = evaluation.measure(SKIES, signals, Scorers(embedder=stub_embedder))
    rows = evaluation.tabulate(cells, signals)
    expected = [
        ("human", "Skies", 1, 1, 2, 0, 0, 13, 1, 1 / 2),
        ("m", "Colours", 1, 2, 5, 1, 0.5, 27.5, 1, 1 / 3),
        ("m", "Skies", 1, 1, 2, 2 / 3, 0.4, 30, 1.5, 0),
        ("m", "all tasks", 1, 3, 7, 5 / 6, 0.45, 28.75, 1.25, 1 / 6),
    ]
    keys = ("model", "task", "runs", "prompts", "responses", *signals, "words", "duplicates")
    for row, values in zip(rows, expected, strict=True):
        assert {key: row[key] for key in keys} == pytest.approx(
            dict(zip(keys, values, strict=True)), abs=1e-6
        )
    intervals = [row["diversity_95"] for row in rows]
    assert intervals == [None, pytest.approx((0, 1)), None, pytest.approx((0.2, 0.7))]
    assert evaluation.totals(rows) == [rows[0], rows[3]]


def test_runs_of_one_model_are_measured_apart_then_averaged():
    """One run says red twice, the other blue twice: each has diversity 0, together .67."""
    samples = [
        *samples_of("Colours", "p", ("red", 1), ("red", 1), model="m", run="one"),
        *samples_of("Colours", "p", ("blue", 2), ("blue", 4), model="m", run="two"),
    ]
    cells = evaluation.measure(samples, ["diversity", "quality"], Scorers(embedder=stub_embedder))
    (row,) = evaluation.tabulate(cells, ["diversity", "quality"])
    assert (row["runs"], row["prompts"], row["responses"]) == (2, 1, 4)
    assert row["diversity"] == pytest.approx(0)
    assert (row["quality"], row["quality_runs"]) == (2, [1, 3])


def test_repetition_by_hand():
    """Words: 3, 3, 2. Of 8 five are different; bigrams a b, b a, a b, b a, c d: 3 of 5."""
    found = evaluation.repetition(["A b, a!", "A b, a!", "c-d  D'Or"])
    assert found == pytest.approx(
        {"words": 8 / 3, "distinct-1": 4 / 8, "distinct-2": 3 / 5, "duplicates": 1 / 3}
    )
    assert evaluation.repetition(["!"])["distinct-2"] == 0


@pytest.mark.parametrize("sizes", [[30], [12, 40], [1, 25]])
def test_bootstrap_is_that_of_a_plain_loop(sizes):
    """Within the noise of 4,000 draws; and its width is 1.96 standard errors each way."""
    rng = np.random.default_rng(7)
    tasks = {str(k): dict(enumerate(rng.normal(k, 1, n))) for k, n in enumerate(sizes)}
    low, high = evaluation.bootstrap(tasks)
    plain = []
    for _ in range(4000):
        drawn = [rng.choice(list(p.values()), max(len(p) - 1, 1)) for p in tasks.values()]
        plain.append(np.mean([np.mean(task) for task in drawn]))
    assert (low, high) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.03)
    errors = [np.std(list(p.values())) / max(len(p) - 1, 1) ** 0.5 for p in tasks.values()]
    error = np.linalg.norm(errors) / len(sizes)
    assert (low, high) == pytest.approx(
        evaluation.average(tasks) + np.array([-1.96, 1.96]) * error, abs=0.15 * error
    )


def test_bootstrap_of_few_prompts_by_enumeration():
    """Of 1, 2 and 6 two are drawn: nine means, 1 1.5 1.5 2 3.5 3.5 4 4 6, each in a ninth.

    The 2.5th percentile is so 1 and the 97.5th 6. With a task of 0 and 4 besides, of which one is
    drawn, the least mean is (1 + 0) / 2, in an eighteenth of the draws, and the greatest 5.
    """
    three = {"p": 1.0, "q": 2.0, "r": 6.0}
    assert evaluation.bootstrap({"a": three}) == [1, 6]
    assert evaluation.bootstrap({"a": three, "b": {"s": 0.0, "t": 4.0}}) == [0.5, 5]


def test_bootstrap_of_single_prompts_has_no_interval():
    assert evaluation.bootstrap({"a": {"p": 1.0}, "b": {"q": 2.0}}) is None


def test_a_difference_is_taken_prompt_by_prompt():
    """m is above n by 1 in each prompt, while prompts differ by 10: an interval of no width."""
    samples = [
        sample
        for model, more in (("m", 1), ("n", 0))
        for prompt, score in (("p", 10), ("q", 20), ("r", 30))
        for sample in samples_of("T", prompt, ("red", score + more), model=model)
    ]
    cells = evaluation.measure(samples, ["quality"], Scorers())
    mean, interval = evaluation.difference(cells, "quality", ["m"], ["n"])
    assert (mean, *interval) == pytest.approx((1, 1, 1))
    low, high = evaluation.tabulate(cells, ["quality"])[0]["quality_95"]
    assert high - low > 10


POINTS = np.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.4], [0.2, 0.9], [0.1, 0.1], [0.2, 0.9]])


def test_frontier_by_hand():
    """Strips from the right: .9 x .1, then .5 x .4 more, then .2 x .4 more: .09 + .2 + .08."""
    assert evaluation.undominated(POINTS).tolist() == [True, True, False, True, False, True]
    assert evaluation.hypervolume(POINTS) == pytest.approx(0.37)


def test_hypervolume_is_the_share_of_a_grid_that_is_dominated():
    rng = np.random.default_rng(0)
    line = (np.arange(200) + 0.5) / 200
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 1, 2)
    for n in (1, 2, 7):
        points = rng.random((n, 2))
        share = (grid <= points).all(2).any(1).mean()
        assert evaluation.hypervolume(points) == pytest.approx(share, abs=0.01)
        assert evaluation.hypervolume(points[evaluation.undominated(points)]) == pytest.approx(
            evaluation.hypervolume(points)
        )


def test_a_models_decodings_are_the_points_of_its_frontier():
    """cold: red twice, quality 30. hot: red and blue, diversity 1, quality 10. n: both, 20 and .5.

    In the box from (10, 0) to (30, 1) cold reaches x = 1 at y = 0 and hot y = 1 at x = 0, an area
    of 0; n reaches (.5, .4), which is no one's less: .2.
    """
    cold, hot = {"temperature": 0.2, "top_p": 0.9, "top_k": 0}, {"temperature": 2.0, "min_p": 0.1}
    samples = [
        *samples_of("T", "p", ("red", 30), ("red", 30), model="m", decoding=cold),
        *samples_of("T", "p", ("red", 10), ("blue", 10), model="m", decoding=hot),
        *samples_of("T", "p", ("red", 20), ("sky", 20), model="n"),
    ]
    scorers = Scorers(embedder=stub_embedder)
    cells = evaluation.measure(samples, ["quality", "diversity"], scorers, by_decoding=True)
    one, two = evaluation.frontiers(cells)
    keys = ("decoding", "quality", "diversity", "on_frontier")
    assert [[point[key] for key in keys] for point in one["points"]] == [
        ["t=0.2,p=0.9", 30, pytest.approx(0), True],
        ["t=2,min_p=0.1", 10, pytest.approx(1), True],
    ]
    assert one["hypervolume"] == pytest.approx(0, abs=1e-9)
    assert two["points"][0]["decoding"] == "as given"
    assert two["hypervolume"] == pytest.approx(0.2)
    single = [cell for cell in cells if cell.model == "m"][:1]
    single[0].responses = 1  # whose diversity is 0 by definition
    assert evaluation.frontiers(single) == []


@pytest.fixture
def uniform(tmp_path):
    """A surprise model whose head is zero gives each of its 300 tokens 1/300: perplexity 300."""
    folder = make_checkpoint(tmp_path / "uniform", CONFIGS["llama"]())
    lm = load_lm(folder, torch.float32)
    lm.head.zero_()
    save_checkpoint(lm.model, lm.encoder, tmp_path / "uniform")
    return folder


RATED = [
    {"model": "m", "task": "Uses", "prompt": "Brick?", "response": "A wall.", "score": 22},
    {"model": "m", "task": "Uses", "prompt": "Brick?", "response": "A stair.", "score": 24},
    {"model": "m", "task": "Lies", "prompt": "Truth?", "response": "Quiet.", "score": 40},
]


@pytest.mark.parametrize("rated", [True, False])
def test_results_and_table(tmp_path, monkeypatch, capsys, checkpoints, uniform, rated):
    """With a score in every row quality is its mean: (22 + 24) / 2, then (23 + 40) / 2."""
    rows = [dict(row) for row in RATED]
    if not rated:
        del rows[2]["score"]
    files = [write(tmp_path / f"{k}.jsonl", part) for k, part in enumerate((rows[:1], rows[1:]))]
    out = tmp_path / "results.json"
    scorers = ["--embedder", checkpoints("llama"), "--surprise-model", uniform]
    call(monkeypatch, "score", "--responses", *files, "--out", out, *scorers)

    results = json.loads(out.read_text())
    named = dict.fromkeys(("novelty", "diversity"), checkpoints("llama")) | {"surprise": uniform}
    assert results["scorers"] == named | ({"quality": "human scores"} if rated else {})
    assert results["warnings"] == []
    uses, lies, everything = results["rows"]
    assert [row["task"] for row in results["rows"]] == ["Uses", "Lies", "all tasks"]
    assert [row["responses"] for row in results["rows"]] == [2, 1, 3]
    assert [row["surprise"] for row in results["rows"]] == pytest.approx([300] * 3, rel=1e-4)
    assert [row.get("quality") for row in results["rows"]] == (
        [23, 40, 31.5] if rated else [None] * 3
    )
    assert 0 < uses["diversity"] < 2
    assert lies["diversity"] == 0  # one response
    assert everything["diversity"] == pytest.approx(uses["diversity"] / 2)

    head, *table = (line.split() for line in capsys.readouterr().out.splitlines()[:4])
    signals = ["novelty", "diversity", "surprise"] + ["quality"] * rated
    assert [cell for cell in head if cell not in ("(95", "%)")] == [
        *("model", "task", "prompts", "responses"),
        *signals,
    ]
    for cells, row in zip(table, results["rows"], strict=True):
        shown = [evaluation.digits(row[key]) for key in signals]
        numbers = [str(row["prompts"]), str(row["responses"]), *shown]
        assert cells == ["m", *row["task"].split(), *numbers]  # single prompts: no intervals


def test_a_split_leaves_out_rows_of_another_and_keeps_those_without(
    tmp_path, monkeypatch, checkpoints, uniform
):
    splits = ({"split": "Training"}, {"split": "Test"}, {})
    rows = [row | split for row, split in zip(RATED, splits, strict=True)]
    flags = ["--responses", write(tmp_path / "r.jsonl", rows), "--out", tmp_path / "results.json"]
    flags += ["--embedder", checkpoints("llama"), "--surprise-model", uniform]
    call(monkeypatch, "score", *flags, "--split", "Test")
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["task"], row["quality"]) for row in found[:2]] == [("Uses", 24), ("Lies", 40)]
    with pytest.raises(UserError, match="--split Tset: no response is of it"):
        call(monkeypatch, "score", *flags, "--split", "Test", "Tset")


def test_a_scorer_that_a_run_was_trained_with_is_told(
    tmp_path, monkeypatch, capsys, checkpoints, uniform
):
    """m was trained with this embedder, for its diversity; its surprise came from elsewhere.

    The embedder had another name then: that of a link to its folder.
    """
    (tmp_path / "run" / "merged").mkdir(parents=True)
    (tmp_path / "link").symlink_to(checkpoints("llama"))
    trained = {"scorers": {"diversity": [str(tmp_path / "link")], "surprise": ["another"]}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(trained))
    for run in ("run", "run/merged"):
        rows = [row | {"run": str(tmp_path / run)} for row in RATED]
        flags = ["--responses", write(tmp_path / "r.jsonl", rows)]
        flags += ["--embedder", checkpoints("llama"), "--surprise-model", uniform]
        call(monkeypatch, "score", *flags, "--out", tmp_path / "results.json")
        (warning,) = json.loads((tmp_path / "results.json").read_text())["warnings"]
        assert warning.startswith(f"diversity is measured by {checkpoints('llama')}, which gave")
        assert f"warning: {warning}\n" in capsys.readouterr().out


ODD_ROWS = [
    {"run": "nowhere"},  # and no model
    {"decoding": {"temperature": "hot"}},
    {"decoding": {"temperature": None}},
    {"decoding": [1]},
    {"decoding": "greedy"},
    {"split": ["Training"]},
]


@pytest.mark.parametrize("odd", ODD_ROWS)
@pytest.mark.parametrize("config", [b"[1]", b'{"scorers": null}', b"{", b"\xff"])
def test_odd_columns_and_records_of_other_programs_are_no_hindrance(
    tmp_path, monkeypatch, checkpoints, uniform, odd, config
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(config)
    monkeypatch.chdir(tmp_path)
    rows = [{key: row[key] for key in row if key != "model"} for row in RATED]
    rows = [row | {"run": "run"} | odd for row in rows]
    flags = ["--responses", write(tmp_path / "r.jsonl", rows), "--out", "results.json"]
    flags += ["--embedder", checkpoints("llama"), "--surprise-model", uniform]
    call(monkeypatch, "score", *flags)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["quality"] for row in found["rows"]] == [23, 40, 31.5]


REFUSED = [
    (["--responses", "r.jsonl", "./r.jsonl", "--out", "o.json"], "names that file twice"),
    (["--responses", "o.json", "--out", "o.json"], "names that file twice"),
    (["--responses", "r.jsonl", "--out", "r.jsonl"], "argument --out: 'r.jsonl': expected a name"),
    (["--responses", "r.jsonl", "--out", "o.json", "--figure", "f.bmp"], "--figure: 'f.bmp'"),
    (["--responses", "r.jsonl", "--out", "o.json", "--split", "Tset"], "--split Tset: no resp"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_what_score_refuses_leaves_everything_as_it_was(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    for name in ("r.jsonl", "o.json"):
        write(tmp_path / name, RATED)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        call(monkeypatch, "score", *flags, "--embedder", "nowhere")
    assert contents(tmp_path) == before


def test_what_a_table_leaves_out_is_told(tmp_path, monkeypatch, capsys, checkpoints, uniform):
    rows = [*RATED[:2], {key: RATED[2][key] for key in RATED[2] if key != "score"}]
    flags = ["--responses", write(tmp_path / "r.jsonl", rows), "--out", tmp_path / "o.json"]
    flags += ["--embedder", checkpoints("llama"), "--surprise-model", uniform]
    call(monkeypatch, "score", *flags)
    said = capsys.readouterr().out
    assert "warning: no quality: 1 responses have no score; name a --reward-model\n" in said
    assert "warning: 95 % intervals over fewer than ten prompts are too narrow\n" in said


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_the_figure_is_drawn(tmp_path, monkeypatch, checkpoints, uniform, kind):
    pytest.importorskip("matplotlib")
    figure = tmp_path / f"figure.{kind}"
    rows = RATED + [{**row, "model": "n", "prompt": row["prompt"] + "?"} for row in RATED]
    flags = ["--responses", write(tmp_path / "r.jsonl", rows), "--figure", figure]
    flags += ["--embedder", checkpoints("llama"), "--surprise-model", uniform]
    call(monkeypatch, "score", *flags, "--out", tmp_path / "results.json")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[kind]
    assert figure.read_bytes().startswith(start)


def test_the_figure_shows_the_table(tmp_path, monkeypatch):
    """Points and intervals are read back from the panels; the frontier runs through the best."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, path: drawn.append(figure))
    row = {"model": "m", "quality": 20, "novelty": 0.1, "diversity": 0.5, "surprise": 300}
    row |= {"quality_95": (19, 22), "novelty_95": (0.05, 0.2), "diversity_95": None}
    row |= {"surprise_95": (200, 900)}
    points = [
        {"decoding": "t=1", "quality": 21, "diversity": 0.4, "on_frontier": True},
        {"decoding": "t=2", "quality": 18, "diversity": 0.6, "on_frontier": True},
        {"decoding": "t=3", "quality": 17, "diversity": 0.3, "on_frontier": False},
    ]
    evaluation.draw_panels([row], [{"model": "m", "points": points}], "figure.png")
    novelty, diversity, surprise = drawn[0].axes
    assert [panel.get_title() for panel in drawn[0].axes] == ["novelty", "diversity", "surprise"]
    lines = [line.get_xydata().tolist() for line in novelty.lines]
    assert lines == [[[19, 0.1], [22, 0.1]], [[20, 0.05], [20, 0.2]], [[20, 0.1]]]
    assert [[20, 300]] in [line.get_xydata().tolist() for line in surprise.lines]
    assert diversity.lines[-1].get_xydata().tolist() == [[18, 0.6], [21, 0.4]]
    evaluation.draw_panels([row], [], "figure.png")  # of one response a decoding: no frontier
    assert drawn[1].axes[1].lines[-1].get_xydata().tolist() == []


def test_a_figure_without_matplotlib_or_quality_is_refused_before_anything(
    tmp_path, monkeypatch, checkpoints
):
    flags = ["--responses", write(tmp_path / "r.jsonl", RATED), "--out", tmp_path / "results.json"]
    flags += ["--embedder", "nowhere", "--figure", tmp_path / "figure.png"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="needs the package matplotlib: pip install matplotlib"):
        call(monkeypatch, "score", *flags)
    assert not (tmp_path / "results.json").exists()
