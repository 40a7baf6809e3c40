"""eval.py: what is generated, and the paper's averages by hand."""

import json
import sys
from collections import Counter

import pytest
import torch
import transformers
from conftest import CONFIGS, LLAMA_LIKE, make_checkpoint

import eval as evaluation  # the name of the file is that of a builtin
from data import UserError
from scores import load_lm
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
