"""scores.py: log-probs, embeddings, rewards, the four signals and their cache, each held against
a definition that is slow and plain."""

import json
import math
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
import transformers
from conftest import CONFIGS, LLAMA_LIKE, SMALL, SUPPORTED, make_checkpoint, shared
from safetensors.torch import load_file, save_file

import scores
from data import Pair, Table, UserError, make_batch, read_jsonl, run, write_jsonl
from scores import (
    Cache,
    Pool,
    Scorers,
    by_length,
    fingerprint,
    load_embedder,
    load_lm,
    load_reward_model,
    score_sequences,
    sequence_logps,
    token_logps,
    token_logps_plain,
)

WINDOWED = ["mistral", "gemma2", "gpt-neo"]  # 64 tokens
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BERT = SMALL | {"intermediate_size": 64, "max_position_embeddings": 64}
REWARD_CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA_LIKE, num_labels=1),
    "gemma2": lambda: transformers.Gemma2Config(
        **LLAMA_LIKE, num_labels=1, head_dim=8, sliding_window=64, attn_logit_softcapping=3.0
    ),
    "bert": lambda: transformers.BertConfig(
        **BERT | {"max_position_embeddings": 256}, num_labels=1
    ),
}


@pytest.fixture(scope="module")
def embedders(tmp_path_factory, checkpoints):
    folder = tmp_path_factory.mktemp("bert")
    bert = make_checkpoint(folder, transformers.BertConfig(**BERT), transformers.AutoModel)
    return {"encoder": bert, "causal LM": checkpoints("llama")}


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    auto = transformers.AutoModelForSequenceClassification
    return {
        name: make_checkpoint(tmp_path_factory.mktemp(name), config(), auto)
        for name, config in REWARD_CONFIGS.items()
    }


# --------------------------------------------------------------------------------------------------
# Log-probs of tokens: the fused version against the plain one
# --------------------------------------------------------------------------------------------------


def check_token_logps(fused, n, softcap, trained, dtype):
    """Values and gradients of `fused` are those of `token_logps_plain`, whatever comes upstream."""
    torch.manual_seed(n)
    device = scores.pick_device()
    start = torch.randn(n, 8, device=device), torch.randn(97, 8, device=device)
    targets = torch.randint(97, (n,), device=device)
    upstream = torch.randn(n, device=device)
    results = []
    for function in (token_logps_plain, fused):
        hidden = start[0].to(dtype, copy=True).requires_grad_()
        head = start[1].to(dtype, copy=True).requires_grad_(trained)
        logps = function(hidden, head, targets, softcap)
        logps.backward(upstream)
        results.append([logps.detach(), hidden.grad, *([head.grad] if trained else [])])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # of the largest number
    for expected, got in zip(*results, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("n", [1, scores.TILE, 2 * scores.TILE + 89])
def test_fused_token_logps_are_the_plain_ones(n, softcap, trained, dtype):
    check_token_logps(token_logps, n, softcap, trained, dtype)


def straight_through(values, gradients):
    return gradients + (values - gradients).detach()


def without_slope(hidden, head, targets, softcap):
    """Right values; the gradient forgets the slope of the soft cap."""
    uncapped = token_logps_plain(hidden, head, targets)
    return straight_through(token_logps_plain(hidden, head, targets, softcap), uncapped)


def wrong_sign(hidden, head, targets, softcap):
    """Right values; the gradient is uphill where it should be downhill."""
    logps = token_logps_plain(hidden, head, targets, softcap)
    return straight_through(logps, -logps)


def upstream_ignored(hidden, head, targets, softcap):
    """Right values, and a gradient that is right for .sum() alone."""
    logps = token_logps_plain(hidden, head, targets, softcap)
    logps.register_hook(torch.ones_like)
    return logps


def last_tile_unfinished(hidden, head, targets, softcap):
    logps = token_logps_plain(hidden, head, targets, softcap)
    return torch.cat([logps[: 2 * scores.TILE], torch.zeros_like(logps[2 * scores.TILE :])])


@pytest.mark.parametrize(
    "broken", [without_slope, wrong_sign, upstream_ignored, last_tile_unfinished]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_check_above_rejects_a_broken_version(broken, dtype):
    with pytest.raises(AssertionError):
        check_token_logps(broken, 2 * scores.TILE + 89, 4.0, False, dtype)


@pytest.mark.parametrize("function", [token_logps_plain, token_logps])
def test_token_logps_by_hand(function):
    """Logits ln 1, ln 2, ln 3 have probabilities 1/6, 2/6, 3/6.

    Logits 0 and 100 under a soft cap of 1 are 0 and tanh(100) = 1: ln e / (1 + e) for the second.
    """
    one, target = torch.ones(1, 1), torch.tensor([1])
    logps = function(one, torch.tensor([[1.0], [2.0], [3.0]]).log(), target)
    assert logps.item() == pytest.approx(math.log(2 / 6), rel=1e-6)
    logps = function(one, torch.tensor([[0.0], [100.0]]), target, 1.0)
    assert logps.item() == pytest.approx(1 - math.log(1 + math.e), rel=1e-6)


# --------------------------------------------------------------------------------------------------
# Log-probs of sequences: our packed rows against the model's own logits
# --------------------------------------------------------------------------------------------------

SHORT, LONG = ((5, 20, 9), 40), ((100, 60, 9), 80)  # lengths of prompts, longest response


def random_table(prompt_lengths, longest):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, n).tolist() for n in prompt_lengths]
    prompt_of = [0, 1, 0, 2, 1, 0, 0, 2, 1, 0]
    lengths = [longest, 1, *rng.integers(1, longest, 8)]
    return Table(prompts, [rng.integers(0, 300, n).tolist() for n in lengths], prompt_of, keys=[])


def own_logps(lm, prompt, answer):
    """[N] log-probs of a response: all logits of the model itself, one sequence, no padding."""
    text = torch.tensor([prompt + answer], device=lm.model.device)
    logits = lm.model(input_ids=text, use_cache=False).logits[0].float()  # [T, V]
    picked = logits[:-1].log_softmax(-1).gather(1, text[0, 1:, None])[:, 0]
    return picked[-len(answer) :]


def own_sequence_logps(lm, table):
    both = zip(table.prompt_of, table.responses, strict=True)
    return torch.stack([own_logps(lm, table.prompts[p], answer).sum() for p, answer in both])


@pytest.fixture(scope="module", params=CONFIGS)
def named_lm(request, checkpoints):
    return request.param, load_lm(checkpoints(request.param), torch.float32)


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["inside the window", "beyond the window"])
def test_log_probs_are_those_of_the_models_own_logits(named_lm, lengths):
    """Prompts are shared where the architecture allows it; beyond its window it does not."""
    name, lm = named_lm
    table = random_table(*lengths)
    assert lm.share == (name in SUPPORTED)
    assert scores.layout(lm, table)[0] == (lm.share and (lengths is SHORT or name not in WINDOWED))
    with torch.no_grad():
        expected = own_sequence_logps(lm, table).cpu()
    np.testing.assert_allclose(score_sequences(lm, table, "test"), expected, rtol=1e-5)


def test_gradients_of_shared_rows_are_those_of_plain_rows(named_lm):
    """With respect to the input embeddings, under random upstream gradients; and both are those
    of the model's own logits."""
    _, lm = named_lm
    table = random_table(*SHORT)
    torch.manual_seed(0)
    upstream = torch.randn(10, device=lm.model.device)
    embeddings = lm.model.get_input_embeddings().weight

    def gradient(logps):
        return torch.autograd.grad(logps, embeddings, upstream)[0]

    embeddings.requires_grad_()
    try:
        own = gradient(own_sequence_logps(lm, table))
        for share in {lm.share, False}:
            batch = make_batch(table, range(10), share, capacity=64)
            assert len(batch.ids) < 10 or not share
            error = (gradient(sequence_logps(lm, batch)) - own).abs().max()
            assert error <= 1e-5 * own.abs().max()
    finally:
        embeddings.requires_grad_(False)


def test_bfloat16_log_probs_are_near_those_of_float32(checkpoints):
    """bfloat16 carries 8 bits, so 2 % of a log-prob is what rounding may move."""
    table = random_table(*SHORT)
    exact, rough = (
        score_sequences(load_lm(checkpoints("llama"), dtype), table, "test")
        for dtype in (torch.float32, torch.bfloat16)
    )
    np.testing.assert_allclose(rough, exact, rtol=0.02)
    assert (rough != exact).all()


def test_a_model_whose_final_soft_cap_we_missed_would_be_refused(checkpoints, monkeypatch):
    """The trial at load notices logits that are not the output embedding on the hidden state."""
    monkeypatch.setattr(scores.LanguageModel, "softcap", None)
    with pytest.raises(UserError, match="Gemma2ForCausalLM is not supported"):
        load_lm(checkpoints("gemma2"), torch.float32)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied"])
def test_log_probs_of_an_independent_float64_implementation(name):
    """Log-probs that a Llama written in NumPy gives these checkpoints."""
    lm = load_lm(str(shared(f"fixtures/{name}")), torch.float32)
    cases = json.loads(shared("fixtures/logps.json").read_text())[name]
    prompts, responses = ([case[key] for case in cases] for key in ("prompt_ids", "response_ids"))
    table = Table(prompts, responses, list(range(len(cases))), keys=[])
    expected = [case["logp_float64"] for case in cases]
    np.testing.assert_allclose(score_sequences(lm, table, "test"), expected, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def bin_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(folder)


def one_tensor_short(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, load, message",
    [
        (shutil.rmtree, load_lm, "cannot be loaded"),
        (shutil.rmtree, load_embedder, "cannot be loaded"),
        (without_weights, load_lm, r"expected a folder with config.json, \*.safetensors"),
        (bin_only, load_lm, r"expected a folder with config.json, \*.safetensors"),
        (one_tensor_short, load_lm, r"the checkpoint has no model.layers.1.mlp.up_proj.weight"),
        (lambda folder: None, load_reward_model, "the checkpoint has no score.weight"),
    ],
)
def test_what_cannot_be_loaded_is_named(checkpoints, tmp_path, damage, load, message):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoints("llama"), folder)
    damage(folder)
    with pytest.raises(UserError, match=f"model {re.escape(str(folder))}: .*{message}"):
        load(str(folder), torch.float32)


def test_an_output_layer_with_a_bias_is_refused(tmp_path):
    make_checkpoint(tmp_path, transformers.PhiConfig(**SMALL, intermediate_size=64))
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}: .* bias"):
        load_lm(str(tmp_path), torch.float32)


def test_a_classifier_of_two_classes_is_no_reward_model(tmp_path):
    config = transformers.LlamaConfig(**LLAMA_LIKE, num_labels=2)
    make_checkpoint(tmp_path, config, transformers.AutoModelForSequenceClassification)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}: it has 2 outputs"):
        load_reward_model(str(tmp_path), torch.float32)


def test_a_tied_checkpoint_may_hold_its_lm_head_alone(checkpoints, tmp_path):
    """And what is loaded is frozen."""
    shutil.copytree(checkpoints("llama-tied"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lm = load_lm(str(tmp_path), torch.float32)
    assert torch.equal(lm.head.cpu(), weights["lm_head.weight"])
    assert lm.model.get_input_embeddings().weight is lm.head
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_scorers_load_when_needed_and_make_room_for_each_other(embedders, checkpoints):
    scorers = Scorers(embedders["encoder"], checkpoints("llama"))
    embedder = scorers.get("embedder")
    assert scorers.get("embedder") is embedder and scorers.surprise_model == checkpoints("llama")
    assert scorers.get("surprise_model").name == checkpoints("llama")
    assert scorers.embedder == embedders["encoder"]


# --------------------------------------------------------------------------------------------------
# Embeddings and rewards: many at once are one at a time
# --------------------------------------------------------------------------------------------------

MANY = ["a", "A brick can be a door stop.", "birthdays, very quiet", "日本", "brick", "cats " * 40]


@pytest.mark.parametrize("kind", ["encoder", "causal LM"])
def test_an_embedding_is_the_mean_over_the_texts_own_tokens(embedders, kind, monkeypatch):
    """Of unit length, equal to that of the text alone; the encoder cuts at its 64 positions."""
    monkeypatch.setattr(scores, "TOKENS", 90)  # of a batch: so there are several
    embedder = load_embedder(embedders[kind], torch.float32)
    vectors = embedder([*MANY, MANY[0]])
    assert list(vectors) == MANY
    for text, vector in vectors.items():
        ids = torch.tensor([embedder.tokenizer(text)["input_ids"]], device=embedder.blocks.device)
        ids = ids[:, :64] if kind == "encoder" else ids
        with torch.no_grad():
            mean = embedder.blocks(input_ids=ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).cpu(), atol=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_batches_hold_every_index_once_and_no_more_tokens_than_allowed():
    lengths = np.random.default_rng(0).integers(1, 30, 200).tolist()
    batches = list(by_length([*lengths, 500], 100))
    assert sorted(k for batch in batches for k in batch) == list(range(201))
    assert batches[0] == [200]  # longer than a batch may be: alone
    for batch in batches[1:]:
        assert max(lengths[k] for k in batch) * len(batch) <= 100
    assert len(batches) < 50  # 200 rows of 15 tokens on average are 30 full batches


def prompt_of(text):
    return (("user", text),)


REWARDED = [(prompt_of("Name a use for a brick."), text) for text in [*MANY[:5], "Stop. <eos>"]]


@pytest.mark.parametrize("name", REWARD_CONFIGS)
@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat template"])
def test_a_reward_is_that_of_transformers_on_the_text_alone(reward_models, name, template):
    """Padding with EOS does no harm, not even to a text that ends with one."""
    reward_model = load_reward_model(reward_models[name], torch.float32)
    tokenizer = reward_model.tokenizer
    tokenizer.chat_template = template
    tokenizer.pad_token = tokenizer.eos_token
    for (prompt, response), reward in zip(REWARDED, reward_model(REWARDED), strict=True):
        if template:
            text = f"<bos>user: {prompt[0][1]}<eos>assistant: {response}<eos>"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt[0][1], response)["input_ids"]
        with torch.no_grad():
            own = reward_model.model(torch.tensor([ids], device=reward_model.model.device)).logits
        assert reward == pytest.approx(own.item(), rel=1e-4, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# The four signals
# --------------------------------------------------------------------------------------------------


def random_unit_vectors(texts):
    """A stub embedder: to each text its own direction in 16 dimensions, a little aligned."""
    found = {}
    for text in texts:
        vector = 0.3 + np.random.default_rng(list(text.encode())).standard_normal(16)
        found[text] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return found


def make_pool(texts, preferred, human=None, prompt="x"):
    human = np.array(human or [math.nan] * len(texts))
    return Pool(prompt_of(prompt), texts, np.array(preferred), human)


POOLS = [
    make_pool(
        ["Stone soup", "a wheel, a wheel!", "doorstop", "the quiet stone", "a paper boat sinks"],
        [True, True, True, False, True],
    ),
    make_pool(["only one here"], [True]),
    make_pool(["preferred one", "rejected one", "rejected two"], [True, False, False]),
]


def plain_distance(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 1 - sum(x * y for x, y in zip(a, b, strict=True))


def plain_mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def plain_dsi(text):
    vectors = list(random_unit_vectors(scores.words(text)).values())
    ordered = [(a, b) for i, a in enumerate(vectors) for j, b in enumerate(vectors) if i != j]
    return plain_mean(plain_distance(a, b) for a, b in ordered)


def test_dsi_and_diversity_are_plain_loops_over_all_pairs():
    """Responses outside Y_x are held against all of it, its members against the other ones."""
    for pool, found in zip(
        POOLS, scores.diversity(POOLS, Scorers(embedder=random_unit_vectors)), strict=True
    ):
        vector = random_unit_vectors(pool.texts)
        best = [text for text, member in zip(pool.texts, pool.preferred, strict=True) if member]
        for text, value in zip(pool.texts, found, strict=True):
            others = [other for other in best if other != text]
            plain = plain_mean(plain_distance(vector[text], vector[other]) for other in others)
            assert value == pytest.approx(plain, abs=1e-6)
    assert scores.diversity(POOLS[1:2], Scorers(embedder=random_unit_vectors))[0] == [0]


def test_novelty_is_plain_loops_over_all_pairs_of_words():
    """2 |DSI(y) - DSI(Y_x)|, Y_x being the words of the preferred responses, each once."""
    found = scores.novelty(POOLS, Scorers(embedder=random_unit_vectors))
    for pool, values in zip(POOLS, found, strict=True):
        best = [text for text, member in zip(pool.texts, pool.preferred, strict=True) if member]
        whole = plain_dsi(" ".join(best))
        plain = [2 * abs(plain_dsi(text) - whole) for text in pool.texts]
        np.testing.assert_allclose(values, plain, atol=1e-6)
    below = plain_dsi("doorstop") < plain_dsi(" ".join(POOLS[0].texts))
    assert below and found[0][2] > 0.5  # so the absolute value is at work


def test_signals_are_those_of_the_authors_code():
    """`compute_inverse_homogenization` and `compute_novelty` of mismayil/creative-preference-
    optimization (fb53d9e) on one prompt of two responses.

    Their 16-dimensional vectors, turned into as many dimensions as there are: cosines stay.
    """
    table = {
        "engine": [1, 0, 0, 0],
        "river": [0.129481, 0.9915819, 0, 0],
        "signal": [-0.0593595, -0.0206657, 0.9980227, 0],
        "paper": [0.1895682, 0.3892488, -0.0701345, 0.8986826],
        "engine river engine engine": [1, 0],
        "signal paper": [0.4067349, 0.9135462],
    }
    scorers = Scorers(embedder=lambda texts: {text: np.array(table[text]) for text in texts})
    pools = [make_pool(["engine river engine engine", "signal paper"], [True, True])]
    assert scores.diversity(pools, scorers)[0] == pytest.approx([0.5932651] * 2, abs=1e-6)
    assert scores.novelty(pools, scorers)[0] == pytest.approx([0.0747163, 0.3628308], abs=1e-6)


def test_signals_are_those_of_the_authors_code_at_length():
    """The same on four prompts of one to six responses."""
    fixture = json.loads(shared("fixtures/scores.json").read_text())
    table = {text: np.array(vector) for text, vector in fixture["embeddings"].items()}
    scorers = Scorers(embedder=lambda texts: {text: table[text] for text in texts})
    for expected in fixture["prompts"].values():
        texts = expected["responses"]
        pools = [make_pool(texts, [True] * len(texts))]
        for signal in ("diversity", "novelty"):
            values = scores.SIGNALS[signal](pools, scorers)[0]
            np.testing.assert_allclose(values, expected[signal], atol=1e-6)
            theirs = [expected["normalised"][text][signal] for text in texts]
            np.testing.assert_allclose(scores.normalise(values, signal), theirs, atol=1e-5)


def test_surprise_is_the_perplexity_of_the_response_without_its_end(checkpoints):
    """exp(-mean log P) over the tokens of the text as it stands; EOS belongs to the template."""
    lm = load_lm(checkpoints("llama"), torch.float32)
    pools = [  # "Cats" twice under one prompt, and under another
        make_pool(["A door stop.", "Cats", "A poker", "Cats"], [True] * 4, prompt="Brick?"),
        make_pool(["Cats"], [True], prompt="What would happen if nobody could lie?"),
    ]
    found = scores.surprise(pools, Scorers(surprise_model=lm))
    assert [len(values) for values in found] == [4, 1]
    for pool, values in zip(pools, found, strict=True):
        head, *texts = lm.encoder.ids([f"<bos>{pool.prompt[0][1]}\n\n", *pool.texts])
        with torch.no_grad():
            expected = [math.exp(-own_logps(lm, head, ids).mean()) for ids in texts]
        np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_surprise_refuses_what_the_model_cannot_read(checkpoints):
    pools = [make_pool(["boredom " * 200], [True])]
    with pytest.raises(UserError, match="too few for the response"):
        scores.surprise(pools, Scorers(surprise_model=checkpoints("llama")))


def test_quality_is_the_reward_or_else_the_human_score():
    pools = [make_pool(["a", "b"], [True, True], [30, 41.5]), make_pool(["c"], [True], [22])]
    found = scores.quality(pools, Scorers())
    assert [values.tolist() for values in found] == [[30, 41.5], [22]]
    reward = {"a": -1.5, "b": 2.0, "c": 7.0}
    found = scores.quality(
        pools, Scorers(reward_model=lambda items: np.array([reward[text] for _, text in items]))
    )
    assert [values.tolist() for values in found] == [[-1.5, 2.0], [7.0]]


def test_quality_without_any_source_is_an_error():
    pools = [make_pool(["scored", "forgotten"], [True, True], [30, math.nan])]
    with pytest.raises(UserError, match=r"--reward-model.*score_chosen.*'forgotten'"):
        scores.quality(pools, Scorers())


@pytest.mark.parametrize(
    "values, signal, expected",
    [
        ([3, 1, 2], "novelty", [1, 0, 0.5]),
        ([-8, -8, 2], "quality", [0, 0, 1]),
        ([0.2, 0.2], "diversity", [0.5, 0.5]),
        ([0.2, 0.2 + 1e-16], "diversity", [0.5, 0.5]),
        ([7], "diversity", [0]),
        ([7], "novelty", [0.5]),
        ([7], "surprise", [0.5]),
        ([7], "quality", [0.5]),
    ],
)
def test_normalisation(values, signal, expected):
    """Min-max; all equal is 0.5; one response alone is 0 in diversity and 0.5 elsewhere."""
    assert scores.normalise(np.array(values, float), signal).tolist() == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The brick, the BRICK: a Brick!", ["the", "brick", "a"]),
        ("Straße über Ñandú, Ёлка 42", ["straße", "über", "ñandú", "ёлка", "42"]),
        ("砖头door砖", ["砖", "头", "door"]),
        ("かな カナ 한국", ["か", "な", "カ", "ナ", "한", "국"]),
        ("\U00020000\U00020001 \U0001f600", ["\U00020000", "\U00020001"]),
        ("don't re-use it’s", ["don't", "re-use", "it’s"]),
        ("'quoted' -dash- ' - ’", ["quoted", "dash"]),
        ("snake_case/and.dots", ["snake", "case", "and", "dots"]),
        ("cafe\u0301 café", ["café"]),  # one word, composed or not
        ("हिन्दी q\u0323a", ["हिन्दी", "q\u0323a"]),  # marks that never compose
        ("ﬁne Ｆｕｌｌ", ["fine", "full"]),
        ("I ❤️ アイ・ウ 1️⃣ 🏴\U000e0067\U000e007f", ["i", "ア", "イ", "ウ", "1\ufe0f\u20e3"]),
        ("", []),
        (" \t\n?!… — 😀", []),
    ],
)
def test_words(text, expected):
    """Distinct, lower case, in order; Chinese, Japanese and Korean by character."""
    assert scores.words(text) == expected


# --------------------------------------------------------------------------------------------------
# From pairs to columns
# --------------------------------------------------------------------------------------------------


def make_pair(prompt, chosen, rejected, **columns):
    return Pair(prompt_of(prompt), chosen, rejected, columns, "pref.jsonl:1")


def some_pairs():
    return [
        make_pair("p", "east", "between", score_chosen=40, score_rejected=20, mine="kept"),
        make_pair("q", "north", "east"),
        make_pair("p", "north", "east", score_chosen=45),
        make_pair("p", "east", "north"),
    ]


@pytest.mark.parametrize("include_rejected", [False, True])
def test_pools_are_the_distinct_responses_to_a_prompt(include_rejected):
    """A response that is preferred anywhere belongs to Y_x, whatever else it lost against."""
    pools = scores.make_pools(some_pairs(), include_rejected)
    extra = [["between"], ["east"]] if include_rejected else [[], []]
    assert [pool.prompt for pool in pools] == [prompt_of("p"), prompt_of("q")]
    assert [pool.texts for pool in pools] == [["east", "north", *extra[0]], ["north", *extra[1]]]
    members = [[True, True, *[False] * len(extra[0])], [True, *[False] * len(extra[1])]]
    assert [pool.preferred.tolist() for pool in pools] == members
    human = [40, 45, *([20] if include_rejected else [])]
    np.testing.assert_array_equal(pools[0].human, human)
    assert np.isnan(pools[1].human).all()


@pytest.mark.parametrize("score", ["40", True, [1]])
def test_a_human_score_that_is_no_number_is_refused(score):
    with pytest.raises(UserError, match=r"pref.jsonl:1: 'score_chosen'"):
        scores.make_pools([make_pair("p", "a", "b", score_chosen=score)], False)


@pytest.mark.parametrize("include_rejected", [False, True])
def test_signals_become_columns(include_rejected):
    """East and north are at distance 1. "between" is 0.2 from north and 0.4 from east: 0.3.

    So for p, min-max gives 1, 1 and 0, or two equal ones, 0.5, without the rejected response.
    For q, Y_x is north alone: at distance 0 from itself, while east is at distance 1 from it.
    """
    table = {"east": [1, 0], "north": [0, 1], "between": [0.6, 0.8]}
    scorers = Scorers(embedder=lambda texts: {text: np.array(table[text]) for text in texts})
    pairs = some_pairs()
    scores.add_signals(pairs, ["diversity"], scorers, include_rejected)
    p = 1 if include_rejected else 0.5
    assert [pair.row["diversity_chosen"] for pair in pairs] == [p, 0, p, p]
    rejected = [0, 1, 1, 1] if include_rejected else [None] * 4
    assert [pair.row.get("diversity_rejected") for pair in pairs] == rejected
    assert pairs[0].row["mine"] == "kept"


# --------------------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------------------


def key_of(k):
    return scores.content_key("text", k)


def fill(cache, numbers):
    """Ask for a record of each number; return (values, numbers that had to be computed)."""
    computed = []

    def compute(batch):
        computed.extend(numbers[k] for k in batch)
        return np.array([[numbers[k], numbers[k] / 8] for k in batch], np.float32)

    keys = [key_of(k) for k in numbers]
    return cache.fill(keys, lambda missing: [[k] for k in missing], compute, "test"), computed


def test_nothing_is_computed_twice():
    cache = Cache("test", b"weights of a model", 2)
    assert fill(cache, [3, 1])[1] == [3, 1]
    values, computed = fill(Cache("test", b"weights of a model", 2), [1, 2, 3])
    assert computed == [2]
    np.testing.assert_array_equal(values, [[1, 1 / 8], [2, 2 / 8], [3, 3 / 8]])
    assert fill(Cache("test", b"weights of another", 2), [1])[1] == [1]
    assert fill(Cache("other", b"weights of a model", 2), [1])[1] == [1]


def test_the_models_do_not_run_a_second_time(checkpoints, embedders, reward_models):
    lm = load_lm(checkpoints("llama"), torch.float32)
    embedder = load_embedder(embedders["encoder"], torch.float32)
    reward_model = load_reward_model(reward_models["llama"], torch.float32)
    runs = []
    for blocks in (lm.model.base_model, embedder.blocks, reward_model.model.base_model):
        blocks.register_forward_hook(lambda *_: runs.append(1))

    def everything():
        logps = score_sequences(lm, random_table(*SHORT), "test")
        return logps, np.stack(list(embedder(MANY).values())), reward_model(REWARDED)

    first = everything()
    assert len(runs) == 3
    for before, now in zip(first, everything(), strict=True):
        np.testing.assert_array_equal(before, now)
    assert len(runs) == 3


@pytest.mark.parametrize("lost", [1, 11, 23])
def test_a_record_cut_short_by_a_kill_is_computed_again(lost):
    cache = Cache("test", b"weights", 2)
    fill(cache, [1, 2, 3])
    whole = cache.path.read_bytes()
    assert len(whole) == 3 * (16 + 2 * 4)
    cache.path.write_bytes(whole[:-lost])
    values, computed = fill(cache, [1, 2, 3, 4])
    assert computed == [3, 4]
    np.testing.assert_array_equal(values[:, 0], [1, 2, 3, 4])
    assert cache.path.read_bytes()[: len(whole)] == whole
    assert fill(cache, [4, 3, 2, 1])[1] == []


def test_writers_do_not_harm_each_other():
    """Each gets all its records in, between those of the other, whatever the interleaving."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def write(start):
        cache = Cache("test", b"weights", 2)
        for k in range(start, start + 200):
            cache.append([key_of(k)], np.full((1, 2), k, np.float32))

    writers = [threading.Thread(target=write, args=(200 * n,)) for n in range(4)]
    try:
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    finally:
        sys.setswitchinterval(interval)
    values, computed = fill(Cache("test", b"weights", 2), list(range(800)))
    assert computed == []
    np.testing.assert_array_equal(values[:, 0], np.arange(800))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CRPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot be written .* CRPO_CACHE"):
        fill(Cache("test", b"weights", 2), [1])


def nudge_one_weight(model):
    """One element of 9,600, off the stride of the samples."""
    flat = model.lm_head.weight.data.view(-1)
    assert 4321 % (len(flat) // 1024)
    flat[4321] *= 1.001


@pytest.mark.parametrize(
    "change",
    [
        nudge_one_weight,
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    ],
    ids=["one weight", "dtype", "configuration"],
)
def test_another_model_has_another_fingerprint(checkpoints, tmp_path, change):
    """While the same weights in another folder have the same one."""
    shutil.copytree(checkpoints("llama"), tmp_path, dirs_exist_ok=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    one, two = load(checkpoints("llama")), load(tmp_path)
    assert fingerprint(one) == fingerprint(two)
    change(two)
    assert fingerprint(one) != fingerprint(two)


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


SIDES = ("chosen", "rejected")


def test_the_command_writes_every_column(
    checkpoints, embedders, reward_models, tmp_path, monkeypatch, capsys
):
    """Rows come back in order with what they held; min-max reaches 0 and 1 for each prompt."""
    texts = ["A door stop.", "A very small staircase for cats", "birthdays and poker", "quiet"]
    rows = [
        {"prompt": prompt, "chosen": texts[k], "rejected": texts[k - 1], "id": f"日本 {k}"}
        for prompt in ("Think of a brick.", "Think of a clock.")
        for k in range(3)
    ]
    rows[0]["novelty_chosen"] = 7  # is replaced
    write_jsonl(tmp_path / "pref.jsonl", rows)
    flags = {
        "--data": tmp_path / "pref.jsonl",
        "--out": tmp_path / "new" / "scored.jsonl",
        "--embedder": embedders["encoder"],
        "--surprise-model": checkpoints("gpt2"),
        "--reward-model": reward_models["gemma2"],
        "--dtype": "float32",
    }
    command = ["scores.py", *(str(part) for flag in flags.items() for part in flag)]
    command += ["--include-rejected", "--signals", *scores.SIGNALS]
    monkeypatch.setattr(sys, "argv", command)
    scores.main()

    scored = [row for _, row in read_jsonl(flags["--out"])]
    columns = [f"{signal}_{side}" for signal in scores.SIGNALS for side in SIDES]
    for row, before in zip(scored, rows, strict=True):
        assert list(row)[:4] == ["prompt", "chosen", "rejected", "id"]
        assert set(row) == {*before, *columns}
        assert all(row[key] == before[key] for key in ("prompt", "chosen", "rejected", "id"))
    for signal in scores.SIGNALS:
        for prompt in {row["prompt"] for row in rows}:
            group = [row for row in scored if row["prompt"] == prompt]
            of = {(row[side], row[f"{signal}_{side}"]) for row in group for side in SIDES}
            assert len(of) == 4  # a response has one score, wherever it stands
            assert {0, 1} <= {score for _, score in of}
            assert all(0 <= score <= 1 for _, score in of)
    said = capsys.readouterr().out
    assert "6 pairs, 8 distinct responses scored" in said
    mean = np.mean([row["novelty_chosen"] for row in scored])
    assert re.search(rf"novelty +mean {mean:.3f} .*replaces 1 scores", said)


def test_the_command_tells_the_users_mistake_in_one_line(tmp_path, monkeypatch, capsys):
    missing = str(tmp_path / "pref.jsonl")
    monkeypatch.setattr(sys, "argv", ["scores.py", "--data", missing, "--out", missing + ".out"])
    with pytest.raises(SystemExit) as stop:
        run(scores.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith("scores.py: ") and missing in said


def test_novelty_without_any_word_is_zero(checkpoints):
    found = scores.novelty([make_pool(["!!!", "?"], [True, True])], Scorers(checkpoints("llama")))
    assert found[0].tolist() == [0, 0]


def test_a_scorer_that_was_given_loaded_stays_that_very_model(checkpoints):
    """It may carry a merged adapter, which loading it again by name would lose."""
    lm = load_lm(checkpoints("llama"), torch.float32)
    scorers = Scorers(embedder=checkpoints("gpt2"), surprise_model=lm)
    scorers.get("embedder")
    assert scorers.get("surprise_model") is lm


def test_code_in_a_checkpoint_is_never_run(checkpoints, tmp_path):
    shutil.copytree(checkpoints("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_lm(str(tmp_path), torch.float32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_positions_do_not_restart_are_not_shared(checkpoints, monkeypatch, dtype):
    """What an architecture that ignores position ids would do."""

    def running_on(*args):
        batch = make_batch(*args)
        batch.positions = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        return batch

    assert load_lm(checkpoints("gpt2"), dtype).share
    monkeypatch.setattr(scores, "make_batch", running_on)
    assert not load_lm(checkpoints("gpt2"), dtype).share
