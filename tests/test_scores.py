"""scores.py: log-probs, embeddings, rewards, the four signals and their cache, each held against
a definition that is slow and plain."""

import data
import scores
from data import Pair, Table, UserError, make_batch
from scores import Embedder, LanguageModel, Scorers, load_reward_model

import gc
import itertools
import json
import math
import os
import re
import shutil
import weakref
from signal import SIGKILL
from types import SimpleNamespace
from unittest.mock import Mock

import conftest
import numpy as np
import pytest
import torch
import transformers
from conftest import CONFIGS, LLAMA_LIKE, SMALL, SUPPORTED, load_lm, make_checkpoint, shared, write
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

NAN = math.nan
SIDES = ("chosen", "rejected")
WINDOWED = ["mistral", "gemma2", "gpt-neo"]  # 64 tokens
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BERT = SMALL | {"intermediate_size": 64, "max_position_embeddings": 64}
GEMMA = LLAMA_LIKE | {"head_dim": 8, "sliding_window": 64, "attn_logit_softcapping": 3.0}
REWARD_CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA_LIKE, num_labels=1),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA, num_labels=1),
    "bert": lambda: transformers.BertConfig(**SMALL, intermediate_size=64, num_labels=1),
}


@pytest.fixture(scope="module")
def embedders(tmp_path_factory, checkpoints):
    config, auto = transformers.BertConfig(**BERT), transformers.AutoModel
    bert = make_checkpoint(tmp_path_factory.mktemp("bert"), config, auto)
    return {"encoder": bert, "causal LM": checkpoints("llama")}


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    auto = transformers.AutoModelForSequenceClassification
    return {
        name: make_checkpoint(tmp_path_factory.mktemp(name), config(), auto)
        for name, config in REWARD_CONFIGS.items()
    }


def test_cudnn_attention_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("n", [1, scores.TILE, 2 * scores.TILE + 89])
def test_fused_token_logps_are_the_plain_ones(n, softcap, dtype):
    """Values and gradients, whatever comes upstream."""
    torch.manual_seed(n)
    start, head = torch.randn(n, 8).to(dtype), torch.randn(97, 8).to(dtype)
    targets, upstream = torch.randint(97, (n,)), torch.randn(n)
    results = []
    for function in (scores.token_logps_plain, scores.token_logps):
        hidden = start.clone().requires_grad_()
        logps = function(hidden, head, targets, softcap)
        logps.backward(upstream)
        results.append([logps.detach(), hidden.grad])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # of the largest number
    for expected, got in zip(*results, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("function", [scores.token_logps_plain, scores.token_logps])
def test_extreme_logits_stay_finite(function):
    """Logits (1e30, -1e30): the first token has log-prob 0 and slope 0, the second has -2e30 and
    head[1] - head[0]."""
    hidden = torch.tensor([[1e15, 0.0]] * 2, requires_grad=True)
    head = torch.tensor([[1e15, 0.0], [-1e15, 0.0]])
    logps = function(hidden, head, torch.tensor([0, 1]))
    logps.sum().backward()
    assert logps.tolist() == [0, pytest.approx(-2e30)]
    assert hidden.grad.tolist() == [[0, 0], [pytest.approx(-2e15), 0]]


SHORT, LONG = ((5, 20, 9), 40), ((100, 60, 9), 80)  # lengths of prompts, longest response


def test_a_prompts_gradient_is_added_up_in_the_same_order_by_several_threads():
    """One prompt state predicts the first token of many responses; threads must not race there."""
    states = torch.randn(2, 500, 256, requires_grad=True)
    batch = SimpleNamespace(mask=lambda: None, share=False, ids=states[..., 0], positions=None)
    batch.predict = torch.randint(0, 100, (20_000,))  # each state two hundred times
    run = lambda **_: SimpleNamespace(last_hidden_state=states * 1)  # noqa: E731
    lm = SimpleNamespace(model=SimpleNamespace(base_model=run), logit_scale=1, alone_above=10**9)
    upstream, gradients, before = torch.randn(20_000, 256), set(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            hidden = scores.response_hidden(lm, batch)
            assert torch.equal(hidden, states.flatten(0, 1)[batch.predict])
            (gradient,) = torch.autograd.grad(hidden, states, upstream)
            gradients.add(gradient.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(gradients) == 1


def random_table(prompt_lengths, longest):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, n).tolist() for n in prompt_lengths]
    prompt_of = [0, 1, 0, 2, 1, 0, 0, 2, 1, 0]
    lengths = [longest, 1, *rng.integers(1, longest, 8)]
    return Table(prompts, [rng.integers(0, 300, n).tolist() for n in lengths], prompt_of)


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["inside the window", "beyond the window"])
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_and_gradients_are_those_of_the_models_own_logits(checkpoints, name, lengths):
    """Prompts are shared where the architecture allows it; beyond its window it does not."""
    lm, table = load_lm(checkpoints(name), torch.float32), random_table(*lengths)
    shared, window = scores.layout(lm, table)
    assert shared == (name in SUPPORTED and (lengths is SHORT or name not in WINDOWED))
    layer = lm.model.get_input_embeddings()
    layer.weight = torch.nn.Parameter(layer.weight.clone())  # a tied head stays frozen
    expected, upstream = scores.sequence_logps_plain(lm, table), torch.randn(10)
    actual = scores.score_sequences(lm, table)
    np.testing.assert_allclose(actual, expected.detach(), rtol=1e-5)
    (plain,) = torch.autograd.grad(expected, layer.weight, upstream)
    for share in {shared, False}:
        batch = make_batch(table, range(10), share, window)
        assert len(batch.ids) < 10 or not share
        logps = scores.sequence_logps(lm, batch)
        (gradient,) = torch.autograd.grad(logps, layer.weight, upstream)
        assert (gradient - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_not_shared_where_another_place_in_it_changes_a_response(tmp_path, dtype):
    """A convolution runs over the row; ALiBi counts the tokens before a response."""
    conv = transformers.Lfm2Config(**LLAMA_LIKE, layer_types=["conv", "full_attention"])
    alibi = transformers.MptConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4)
    for config in (conv, alibi):
        lm = LanguageModel(make_checkpoint(tmp_path, config), dtype)
        assert not any(scores.probe(lm, longest) for longest in (9, 40, 150))


def test_a_multimodal_model_is_known_by_the_part_that_reads_text(tmp_path):
    text = LLAMA_LIKE | {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    vision |= {"num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    lm = load_lm(make_checkpoint(tmp_path, config), torch.float32)
    assert (lm.context, lm.window, lm.share) == (256, 64, True)
    for lengths in (SHORT, LONG):
        table = random_table(*lengths)
        expected = scores.sequence_logps_plain(lm, table)
        np.testing.assert_allclose(scores.score_sequences(lm, table), expected, rtol=1e-5)
    assert Embedder(str(tmp_path), torch.float32)(["a"])["a"].shape == (32,)
    text = SMALL | {"intermediate_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    clip = make_checkpoint(tmp_path / "clip", config, transformers.AutoModel)
    with pytest.raises(UserError, match="cannot embed a text"):
        Embedder(clip, torch.float32)(["a"])


def rewrite_config(folder, **changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


def rewrite_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_cannot_be_loaded_is_named_and_no_code_of_its_is_run(checkpoints, tmp_path):
    def fails(load, message):
        with pytest.raises(UserError, match=f"model {re.escape(str(tmp_path))}: .*{message}"):
            load(str(tmp_path), torch.float32).model  # noqa: B018 read when first needed

    shutil.copytree(checkpoints("llama"), tmp_path, dirs_exist_ok=True)
    fails(load_reward_model, "it has 2 outputs; expected 1")
    rewrite_config(tmp_path, id2label={"0": "good"})
    fails(load_reward_model, "it has no score.weight")
    rewrite_weights(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    fails(load_lm, "it has no model.layers.1.mlp.up_proj.weight for a Llama")
    rewrite_config(tmp_path, model_type="other", auto_map={"AutoConfig": "code.Config"})
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    fails(load_lm, "cannot be loaded")
    assert not (tmp_path / "ran").exists()


def test_an_output_layer_with_a_bias_is_refused(tmp_path):
    make_checkpoint(tmp_path, transformers.PhiConfig(**SMALL, intermediate_size=64))
    for bias, message in ((1, "its logits are not"), (math.nan, "not finite")):
        rewrite_weights(tmp_path, lambda w, bias=bias: w["lm_head.bias"][:1].fill_(bias))
        with pytest.raises(UserError, match=rf"PhiForCausalLM is not supported \(.*{message}"):
            load_lm(str(tmp_path), torch.float32)


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONGROPE = {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}
PART = LONGROPE["rope_scaling"] | {"rope_type": "longrope", "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "options", "facts"),
    [
        ("Llama", {"original_max_position_embeddings": 64}, {"context": 256, "logit_scale": 1}),
        ("Phi3", LONGROPE, {"context": 256}),
        ("Llama", {"rope_scaling": DYNAMIC}, {"context": 64}),  # longer ones change later rows
        ("Gemma3Text", {"rope_parameters": {"full_attention": PART}}, {"alone_above": 64}),
        ("Doge", {"keep_window_size": 32}, {"window": 32, "alone_above": 32, "softcap": None}),
        ("DeepseekV32", {"index_topk": 16}, {"context": 256, "window": 16}),
        ("RecurrentGemma", {}, {"softcap": 30}),
        ("xLSTM", {"output_logit_soft_cap": 30.0}, {"softcap": 30}),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, {"window": 0}),
        ("Cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25, "window": 10**9}),
        ("FalconH1", {"lm_head_multiplier": 0.5}, {"logit_scale": 0.5}),
        ("MiniCPM3", {"dim_model_base": 16}, {"logit_scale": 0.5}),
    ],
)
def test_facts_are_read_from_the_configuration(monkeypatch, kind, options, facts):
    config = getattr(transformers, f"{kind}Config")(**SMALL | options)
    for auto, read in (("AutoConfig", config), ("AutoTokenizer", conftest.make_tokenizer())):
        monkeypatch.setattr(f"transformers.{auto}.from_pretrained", Mock(return_value=read))
    lm = LanguageModel("name", torch.float32)
    assert {name: getattr(lm, name) for name in facts} == facts


@pytest.mark.parametrize("longest, alone", [(40, False), (90, True)])
def test_rows_that_change_each_other_are_run_one_by_one(tmp_path, longest, alone):
    """Under longrope, one of more than 64 tokens changes all of its pass."""
    config = transformers.Phi3Config(**LLAMA_LIKE | LONGROPE)
    lm = load_lm(make_checkpoint(tmp_path, config), torch.float32)
    table = random_table((9, 5, 20), longest)
    actual = scores.score_sequences(lm, table)
    np.testing.assert_allclose(actual, scores.sequence_logps_plain(lm, table), rtol=1e-5)
    assert scores.layout(lm, table)[0] != alone
    lm.alone_above = 10**9
    together = scores.sequence_logps(lm, make_batch(table, range(10), False, 0))
    assert np.allclose(actual, together, rtol=1e-5) != alone


def test_scorers_make_room_for_each_other(embedders, checkpoints, reward_models):
    """Of those given by name, one has its weights in memory. What was given loaded stays that very
    model: it may carry a merged adapter, which loading it again by name would lose."""
    lm = load_lm(checkpoints("llama"), torch.float32)
    weights, scorers = lm.model, Scorers(embedders["encoder"], lm, reward_models["llama"])
    earlier = []
    for kind in ("embedder", "reward_model") * 2:
        scorer = scorers.get(kind)
        assert scorers.get("surprise_model") is lm and vars(lm)["model"] is weights
        assert scorers.get(kind) is scorer
        gc.collect()
        assert not any(ref() for ref in earlier)
        earlier.append(weakref.ref(getattr(scorer, "checkpoint", scorer).model))
        assert earlier[-1]()
        del scorer


MANY = ["a", "A brick can be a door stop.", "birthdays, very quiet", "日本", "brick", "cats " * 40]


def test_pooling_and_length_are_those_of_the_makers_files(embedders, tmp_path):
    """modules.json of sentence-transformers: the first, the last or all states of 6 tokens."""
    folder = tmp_path / "sentence"
    shutil.copytree(embedders["encoder"], folder)
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    (folder / "1_Pooling").mkdir()

    def load(**config):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
        return Embedder(str(folder), torch.float32)

    checkpoint = load(pooling_mode="mean").checkpoint
    ids = checkpoint.tokenizer("A door stop.")["input_ids"][:6]
    states = checkpoint.model(torch.tensor([ids])).last_hidden_state[0]
    for expected, config in (
        (states[0], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        (states[-1], {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}),
        (states.mean(0), {"pooling_mode_mean_tokens": True, "include_prompt": True}),
        (states.mean(0), {"pooling_mode": "mean"}),
    ):
        vector = torch.from_numpy(load(**config)(["A door stop."])["A door stop."])
        assert torch.allclose(vector, torch.nn.functional.normalize(expected, dim=0), atol=1e-6)
    with pytest.raises(UserError, match=r"modules.json is not supported \(pooling mean\+max\)"):
        load(pooling_mode_mean_tokens=True, pooling_mode_max_tokens=True)
    upper, lower = (load(pooling_mode="mean", do_lower_case=on)(["A Door"]) for on in (False, True))
    assert np.allclose(lower["A Door"], load(pooling_mode="mean")(["a door"])["a door"])
    assert not np.allclose(lower["A Door"], upper["A Door"])
    modules.insert(2, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    about = {"in_features": 32, "out_features": 3, "bias": False}
    about |= {"activation_function": "torch.nn.modules.activation.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(about))
    W = {"linear.weight": torch.randn(3, 32)}
    save_file(W, folder / "2_Dense" / "model.safetensors")
    prompts = {"prompts": {"query": "A door"}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    vector = torch.from_numpy(load(pooling_mode="mean")([" stop."])[" stop."])
    expected = torch.tanh(states.mean(0) @ W["linear.weight"].T)
    assert torch.allclose(vector, torch.nn.functional.normalize(expected, dim=0), atol=1e-6)
    with pytest.raises(UserError, match="pooling without the prompt"):
        load(pooling_mode="mean", include_prompt=False)
    (folder / "modules.json").write_text(json.dumps(modules[::-1]))
    with pytest.raises(UserError, match=r"\(Normalize Dense Pooling Transformer\)"):
        load(pooling_mode="mean")
    (folder / "modules.json").write_text(json.dumps(modules))
    save_file(W | {"residual.weight": torch.ones(3, 32)}, folder / "2_Dense" / "model.safetensors")
    modules[1]["type"] = "sentence_transformers.models.WordWeights"
    for message in ("Error.* in loading state_dict", "'WordWeights' is not"):
        with pytest.raises(UserError, match=rf"modules.json is not supported .*{message}"):
            load(pooling_mode="mean")
        (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("kind", ["encoder", "causal LM"])
def test_an_embedding_is_the_mean_over_the_texts_own_tokens(embedders, kind, monkeypatch):
    """Of unit length, equal to that of the text alone; the encoder cuts at its 64 positions."""
    monkeypatch.setattr(scores, "TOKENS", 90)  # of a batch: so there are several
    embedder = Embedder(embedders[kind], torch.float32)
    tokenizer, blocks = embedder.checkpoint.tokenizer, embedder.checkpoint.model.base_model
    vectors = embedder([*MANY, MANY[0]])
    assert list(vectors) == MANY
    for text, vector in vectors.items():
        ids = torch.tensor([tokenizer(text)["input_ids"]], device=blocks.device)
        ids = ids[:, :64] if kind == "encoder" else ids
        with torch.no_grad():
            mean = blocks(input_ids=ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).cpu(), atol=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_batches_hold_every_index_once_and_no_more_tokens_than_allowed():
    lengths = np.random.default_rng(0).integers(1, 30, 200).tolist()
    batches = list(scores.by_length([*lengths, 500], 100))
    assert sorted(k for batch in batches for k in batch) == list(range(201))
    assert batches[0] == [200]  # longer than a batch may be: alone
    for batch in batches[1:]:
        assert max(lengths[k] for k in batch) * len(batch) <= 100
    assert len(batches) < 50  # 200 rows of 15 tokens on average are 30 full batches


def prompt_of(text):
    return (("user", text),)


REWARDED = [(prompt_of("Name a use for a brick."), text) for text in MANY[:6]]


@pytest.mark.parametrize("pad", ["<pad>", None, "<eos>"])
@pytest.mark.parametrize("name", REWARD_CONFIGS)
@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat template"])
def test_a_reward_is_that_of_transformers_on_the_text_alone(reward_models, name, template, pad):
    """There it is read before PAD, and where PAD is EOS, which ends a turn, before that too.
    The tokenizer adds BOS, as real ones do, which a template has already."""
    reward_model = load_reward_model(reward_models[name], torch.float32)
    tokenizer, model = reward_model.tokenizer, reward_model.model
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <eos> $B:1", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    tokenizer.chat_template, tokenizer.pad_token = template, pad
    tokenizer.padding_side = "left"
    kinds = ["token_type_ids"] if name == "bert" else []
    tokenizer.model_input_names = ["input_ids", "attention_mask", *kinds]
    reward_model.text.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    rewards = reward_model(REWARDED)
    assert np.std(rewards) > 0.001  # far more than is forgiven
    for (prompt, response), reward in zip(REWARDED, rewards, strict=True):
        text = f"<bos>user: {prompt[0][1]}<eos>assistant: {response}<eos>"
        inputs = tokenizer(prompt[0][1], response, return_tensors="pt")
        if template:
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits
        assert reward == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    with pytest.raises(UserError, match=r"256 tokens, too few for a text that ends in '.*ab"):
        reward_model([*REWARDED, (prompt_of("x"), "ab" * 300)])


def random_unit_vectors(texts):
    """A stub embedder: to each text its own direction in 16 dimensions, a little aligned."""
    directions = {}
    for text in texts:
        vector = 0.3 + np.random.default_rng(list(text.encode())).standard_normal(16)
        directions[text] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return directions


def make_pool(texts, preferred, human=None, prompt="x"):
    human = np.array(human or [math.nan] * len(texts))
    return scores.Pool(prompt_of(prompt), texts, np.array(preferred), human)


def make_pair(prompt, chosen, rejected, **columns):
    return Pair(prompt_of(prompt), chosen, rejected, columns, "pref.jsonl:1")


POOLS = [
    make_pool(["a stone soup", "a wheel, a wheel!", "doorstop", "a stone"], [True] * 3 + [False]),
    make_pool(["only one here"], [True]),
    make_pool(["preferred one", "rejected one", "rejected two"], [True, False, False]),
]


def mean_distance(pairs):
    """The mean over pairs of texts of 1 - cosine; 0 without any."""
    vectors = [[*random_unit_vectors(pair).values()] for pair in pairs]
    return np.mean([1 - one @ other for one, other in vectors]) if vectors else 0.0


def test_diversity_and_novelty_are_means_over_all_pairs():
    """Responses outside Y_x are held against all of it, its members against the other ones. And
    2 |DSI(y) - DSI(Y_x)|, Y_x being the words of the preferred responses, each once."""

    def dsi(texts):
        return mean_distance(itertools.combinations(scores.words(" ".join(texts)), 2))

    scorers, every = Scorers(embedder=random_unit_vectors), []
    actual = scores.diversity(POOLS, scorers), scores.novelty(POOLS, scorers)
    for pool, diversity, novelty in zip(POOLS, *actual, strict=True):
        best = list(itertools.compress(pool.texts, pool.preferred))
        plain = [mean_distance((y, other) for other in best if other != y) for y in pool.texts]
        np.testing.assert_allclose(diversity, plain, atol=1e-6)
        plain = np.array([dsi([text]) - dsi(best) for text in pool.texts])
        np.testing.assert_allclose(novelty, 2 * abs(plain), atol=1e-6)
        every += plain.tolist()
    assert max(every) > 0.01 and min(every) < -0.01  # so the absolute value is at work
    (novelty,) = scores.novelty([make_pool(["!!!", "?"], [True, True])], scorers)
    assert novelty.tolist() == [0, 0]  # no word at all


def test_rounding_makes_no_response_more_diverse_than_another():
    """Two responses are as far from each other, and many with one embedding all at 0; but float32
    vectors are of length 1 +- 1e-7, which min-max must not stretch to 0 and 1. Small distances
    stay: 1 - cos d = d^2 / 2, so d is (d^2 / 2 + 2 d^2) / 2 from 0 and -d."""
    vectors = list(random_unit_vectors(map(str, range(40))).values())
    same = [[vector] * n for n, vector in enumerate(vectors, 2)]
    for alike in [*map(list, itertools.pairwise(vectors)), *same]:
        actual = scores.distance_to_set(alike, np.ones(len(alike), bool))
        assert scores.normalise(actual, "diversity").tolist() == [0.5] * len(alike)
    angles = np.array([0, 1e-4, -1e-4])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    actual = scores.distance_to_set(list(vectors), np.ones(3, bool))
    assert actual == pytest.approx([0.5e-8, 1.25e-8, 1.25e-8], rel=1e-6)


def conversation(lm, prompt, text):
    return lm.encoder.ids([lm.encoder.render((*prompt_of(prompt), ("assistant", text)))])[0]


def test_signals_are_those_of_the_authors_code():
    """Numbers of mismayil/creative-preference-optimization (fb53d9e) for four prompts of one to six
    responses; the perplexity is of the whole conversation with its own BOS, behind one more."""
    fixture = json.loads(shared("fixtures/scores.json").read_text())
    table = {text: np.array(vector) for text, vector in fixture["embeddings"].items()}
    lm = LanguageModel(str(shared("fixtures/tiny_llama")), torch.float32)
    scorers = Scorers(lambda texts: {text: table[text] for text in texts}, lm)
    scorers.perplexity = "conversation"
    for prompt, expected in fixture["prompts"].items():
        texts = expected["responses"]
        pools = [make_pool(texts, [True] * len(texts), prompt=prompt)]
        assert [conversation(lm, prompt, t) for t in texts] == expected["perplexity_ids"]
        for signal, rtol in (("diversity", 0), ("novelty", 0), ("surprise", 5e-6)):
            values = scores.SIGNALS[signal].function(pools, scorers)[0]
            theirs = expected["perplexity" if signal == "surprise" else signal]
            np.testing.assert_allclose(values, theirs, rtol=rtol, atol=1e-6)
            theirs = [expected["normalised"][text][signal] for text in texts]
            np.testing.assert_allclose(scores.normalise(values, signal, "raw"), theirs, atol=5e-5)


def own_mean_logp(lm, head, ids):
    """Mean log-prob of the ids behind the head: the model's own logits, log-softmax in float64."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([head + ids]), use_cache=False).logits[0].double()
    return logits[:-1].log_softmax(-1)[range(-len(ids), 0), ids].mean().item()


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "bloom"])
@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat template"])
@pytest.mark.parametrize("perplexity", ["response", "conversation"])
def test_surprise_is_that_of_the_models_own_logits(checkpoints, name, template, perplexity):
    """Of the response, or of the whole conversation behind one more BOS; of rejected responses
    too, of the same text to two prompts, and twice to one."""
    lm = LanguageModel(checkpoints(name), torch.float64)
    lm.encoder.template = template or lm.encoder.template
    long = "A very small staircase for cats, or the first step of it."
    pairs = [("A brick?", "Cats", long), ("A brick?", "Nothing.", "Cats"), ("Lie!", "Cats", "日本")]
    pools = scores.make_pools([make_pair(*pair) for pair in pairs], include_rejected=True)
    assert [pool.texts for pool in pools] == [["Cats", "Nothing.", long], ["Cats", "日本"]]
    pools.append(make_pool(["日本", "Cats", "日本"], [True] * 3, prompt="Lie!"))  # once more
    actual = scores.surprise(pools, Scorers(None, lm, perplexity=perplexity))
    for pool, values in zip(pools, actual, strict=True):
        prompt = pool.prompt[0][1]
        head = f"<bos>user: {prompt}<eos>assistant: " if template else f"<bos>{prompt}\n\n"
        for text, value in zip(pool.texts, values, strict=True):
            texts = {"response": [head, text], "conversation": ["<bos>", f"{head}{text}<eos>"]}
            mean = own_mean_logp(lm, *lm.encoder.ids(texts[perplexity]))
            assert -math.log(value) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("perplexity", ["response", "conversation"])
def test_surprise_refuses_what_the_model_cannot_read(checkpoints, perplexity):
    """A conversation must fit with its BOS; a response with its prompt."""
    lm = LanguageModel(checkpoints("llama"), torch.float32)
    scorers, pools = Scorers(None, lm, perplexity=perplexity), [make_pool(["a brick"], [True])]
    item = (pools[0].prompt, "a brick")
    whole = 1 + len(conversation(lm, "x", "a brick"))
    (prompt,) = lm.encoder.ids([lm.encoder.head(pools[0].prompt)])
    answer = len(lm.encoder.responses([item], [prompt])[0]) - 1  # without its end
    least = whole if perplexity == "conversation" else len(prompt) + answer
    lm.context = least
    scores.surprise(pools, scorers)
    lm.context = least - 1
    with pytest.raises(UserError, match=f"{least - 1} tokens, too few for its prompt and '"):
        scores.surprise(pools, scorers)
    lm.tokenizer.bos_token = None
    scorers.perplexity = "conversation"
    with pytest.raises(UserError, match=f"{lm.name}: --perplexity conversation needs a BOS"):
        scores.surprise(pools, scorers)


def test_quality_is_the_reward_or_else_the_human_score():
    pools = [make_pool(["a", "b"], [True, True], [30, 41.5]), make_pool(["c"], [True], [22])]
    assert [values.tolist() for values in scores.quality(pools, Scorers())] == [[30, 41.5], [22]]
    reward = {"a": -1.5, "b": 2.0, "c": 7.0}
    rewards = lambda items: np.array([reward[text] for _, text in items])  # noqa: E731
    actual = scores.quality(pools, Scorers(reward_model=rewards))
    assert [values.tolist() for values in actual] == [[-1.5, 2.0], [7.0]]
    pools.append(make_pool(["scored", "forgotten"], [True, True], [30, math.nan]))
    with pytest.raises(UserError, match=r"--reward-model.*score_chosen.*'forgotten'"):
        scores.quality(pools, Scorers())


@pytest.mark.parametrize(
    "values, signal, expected",
    [
        ([3, 1, 2], "novelty", [1, 0, 0.5]),
        ([-8, -8, 2], "quality", [0, 0, 1]),
        ([1, 10, 1000], "surprise", [0, 1 / 3, 1]),  # of logarithms
        ([7], "diversity", [0]),
        ([7], "surprise", [0.5]),
    ],
)
def test_normalisation(values, signal, expected):
    """Min-max; one response alone is 0 in diversity and 0.5 elsewhere."""
    values = np.array(values, float)
    assert scores.normalise(values, signal).tolist() == pytest.approx(expected)
    if signal == "surprise" and len(values) > 1:
        assert scores.normalise(values, signal, "raw")[1] == pytest.approx(9 / 999)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The brick, the BRICK: Straße, Ёлка 42", ["the", "brick", "straße", "ёлка", "42"]),
        ("砖头door砖 かな カナ 한국", ["砖", "头", "door", "か", "な", "カ", "ナ", "한", "국"]),
        ("\U00020000\U00020001", ["\U00020000", "\U00020001"]),
        ("don't re-use it’s", ["don't", "re-use", "it’s"]),
        ("'quoted' -dash- ' - ’ snake_case", ["quoted", "dash", "snake", "case"]),
        ("cafe\u0301 café ﬁne Ｆｕｌｌ", ["café", "fine", "full"]),  # composed or not
        ("हिन्दी q\u0323a", ["हिन्दी", "q\u0323a"]),  # marks that never compose
        ("I ❤️ アイ・ウ 1️⃣ 🏴\U000e0067\U000e007f", ["i", "ア", "イ", "ウ", "1\ufe0f\u20e3"]),
        (" \t\n?!… — 😀", []),
    ],
)
def test_words(text, expected):
    """Distinct, lower case, in order; Chinese, Japanese and Korean by character."""
    assert scores.words(text) == expected


def some_pairs():
    return [
        make_pair("p", "east", "between", score_chosen=40, score_rejected=20),
        make_pair("q", "north", "east"),
        make_pair("p", "north", "east", score_chosen=45),
        make_pair("p", "east", "north"),
    ]


@pytest.mark.parametrize("score", ["many", True, [1]])
def test_a_human_score_that_is_no_number_is_refused(tmp_path, score):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": score}
    with pytest.raises(UserError, match=r"pref.jsonl:1: 'score_chosen'"):
        data.read_preferences(write(tmp_path / "pref.jsonl", [row]))


@pytest.mark.parametrize("include_rejected", [False, True])
def test_signals_of_the_distinct_responses_to_a_prompt_become_columns(include_rejected):
    """A response that is preferred anywhere belongs to Y_x, whatever else it lost against.

    East and north are at distance 1. "between" is 0.2 from north and 0.4 from east: 0.3. So for p,
    min-max gives 1, 1 and 0, or two equal ones, 0.5, without the rejected response. For q, Y_x is
    north alone: at distance 0 from itself, while east is at distance 1 from it."""
    table = {"east": [1, 0], "north": [0, 1], "between": [0.6, 0.8]}
    scorers = Scorers(embedder=lambda texts: {text: np.array(table[text]) for text in texts})
    pairs = some_pairs()
    p, q = scores.add_signals(pairs, ["diversity"], scorers, include_rejected)
    assert (p.prompt, q.prompt) == (prompt_of("p"), prompt_of("q"))
    n, m = (3, 2) if include_rejected else (2, 1)
    assert (p.texts, q.texts) == (["east", "north", "between"][:n], ["north", "east"][:m])
    assert [*p.preferred, *q.preferred] == [True, True, False][:n] + [True, False][:m]
    np.testing.assert_array_equal([*p.human, *q.human], [40, 45, 20][:n] + [NAN, NAN][:m])
    p = 1 if include_rejected else 0.5
    assert [pair.row["diversity_chosen"] for pair in pairs] == [p, 0, p, p]
    rejected = [0, 1, 1, 1] if include_rejected else [None] * 4
    assert [pair.row.get("diversity_rejected") for pair in pairs] == rejected


def test_a_wrong_name_is_reported_before_another_scorer_has_worked():
    scorers = Scorers(lambda texts: pytest.fail("it worked"), surprise_model="nowhere")
    with pytest.raises(UserError, match="model nowhere: cannot be loaded"):
        scores.add_signals(some_pairs(), ["diversity", "surprise"], scorers)


@pytest.mark.parametrize(
    "columns, expected",
    [
        ([([1, 2, 3], [30, 10, 20]), ([1, 2, 3, 4], [1, 8, 9, 99])], (3 * -0.5 + 4 * 1) / 7),
        ([([1, 2, NAN, 3], [30, 10, 0, 20]), ([5, 1, 9], [5, 9, NAN])], (3 * -0.5 + 2 * -1) / 5),
        ([([1, 2, 3], [30, 10, 20]), ([4, 4], [1, 2]), ([1], [1]), ([NAN], [2])], -0.5),
        ([([1, 2, 2, 3], [1, 2, 3, 3])], 3.75 / 4.5),
        ([([4, 4], [1, 2]), ([1, 2], [3, 3])], NAN),
        ([], NAN),
    ],
)
@pytest.mark.filterwarnings("error")
def test_correlation_within_prompts(columns, expected):
    """Spearman's 1 - 6 sum d^2 / (n (n^2 - 1)). Ranks 1, 2, 3 and 3, 1, 2: d = -2, 1, 1, so
    1 - 36 / 24. With ties, Pearson's of the ranks: 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5 without their
    mean are -1.5, 0, 0, 1.5 and -1.5, -0.5, 1, 1: product 3.75, squares 4.5 and 4.5."""
    columns = [[np.array(values, float) for values in pair] for pair in columns]
    r, n = scores.within_prompts(*(zip(*columns, strict=True) if columns else ([], []))).T
    assert (r @ n / n.sum() if len(n) else NAN) == pytest.approx(expected, nan_ok=True)


def test_a_partial_correlation_removes_what_a_third_column_explains():
    """r_xy = r_xz = .5 and r_yz = -.5 over ranks: (.5 + .25) / (1 - .25) = 1; and 0 if all is z."""
    x, y, z = (np.array(v, float) for v in ([1, 2, 3], [1, 3, 2], [2, 1, 3]))
    assert scores.within_prompts([x], [y], [z]).tolist() == [[pytest.approx(1), 3]]
    assert scores.within_prompts([x], [y], [x]).shape == (0, 2)


def test_agreement_is_weighted_by_responses_with_an_interval_over_prompts():
    """r is 1 over one prompt's 3 responses and -1 over the other's 4: (3 - 4) / 7.

    A quarter of the draws has the first prompt alone, and as many the second: -1 to 1.
    """
    x = [np.arange(3.0), np.arange(4.0)]
    assert scores.agreement(x, [x[0], -x[1]]) == "-0.14 (-1.00 to 1.00)"
    assert scores.agreement(x, [x[0] * NAN, x[1] * NAN]) == "-"


def test_infrequency_is_minus_the_log_of_the_share_that_is_alike():
    """Four unit vectors at 0, 30, 90 and 180 degrees: cosine .87 of the first two, else at most .5.

    The share of the first two is 2 / 4, that of the others 1 / 4. A rejected response at 10 degrees
    is like the first two, and with itself three, of five."""
    degrees = {"a": 0, "b": 30, "c": 90, "d": 180, "rejected": 10}
    turn = {text: math.radians(angle) for text, angle in degrees.items()}
    vector = {t: np.array([math.cos(a), math.sin(a)], np.float32) for t, a in turn.items()}
    pool = make_pool(list(degrees), [True] * 4 + [False])
    scorers = Scorers(lambda texts: vector)
    (values,) = scores.infrequency([pool], scorers)
    shares = [2 / 4, 2 / 4, 1 / 4, 1 / 4, 3 / 5]
    assert values.tolist() == pytest.approx([-math.log(share) for share in shares])
    scorers.same_above = 1.0  # now only the same vector is the same
    (values,) = scores.infrequency([pool], scorers)
    assert values.tolist() == pytest.approx([math.log(4)] * 4 + [math.log(5)])


def test_infrequency_in_tiles_is_that_of_a_double_loop(monkeypatch):
    monkeypatch.setattr(scores, "TILE", 7)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vector, preferred = {f"t{k}": v for k, v in enumerate(vectors)}, rng.random(40) < 0.7
    pool = make_pool(list(vector), preferred.tolist())
    (values,) = scores.infrequency([pool], Scorers(lambda texts: vector))
    for k in range(40):
        others = [vectors[j] for j in range(40) if preferred[j] and j != k]
        like = sum(vectors[k] @ other >= 0.6 for other in others)
        assert values[k] == pytest.approx(-math.log((1 + like) / (1 + len(others))))


def test_the_table_of_signals(capsys):
    """Novelty is 1, 3, 2, then 1, 3, then 1: 11 / 6; quality 4 / 6; words 40 / 6.

    Human scores fall, 30, 20, where known, twice: r is -1, whichever prompts are drawn, and nothing
    is left without length, which rises.
    """
    pools = []
    for n in (3, 2, 1):
        texts = ["one", "one two", "one\ntwo   three" + " and" * 30][:n]
        pools.append(make_pool(texts, [True] * n, [30.0, 20.0, NAN][:n]))
        pools[-1].raw |= {"novelty": np.array([1, 3, 2])[:n], "quality": np.arange(n)}
    scores.print_signals(pools, ["novelty", "quality"])
    scores.print_signals(pools[2:], [])  # a single response
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line]
    head, r = "mean least most with human score (95 %) length removed", "-1.00 (-1.00 to -1.00) -"
    assert lines == [
        *(head, f"novelty 1.83 1 3 {r}", f"quality 0.667 0 2 {r}", f"words 6.67 1 33 {r}"),
        *(head, "words 1 1 1 - -"),
    ]


def key_of(k):
    return scores.content_key("text", k)


def fill(kind, model, numbers):
    """Ask for a record of each number; return (values, numbers that had to be computed)."""
    computed = []

    def compute(batch):
        computed.extend(numbers[k] for k in batch)
        return np.array([[numbers[k], numbers[k] / 8] for k in batch], np.float32)

    keys, plan = [key_of(k) for k in numbers], lambda missing: [[k] for k in missing]
    return scores.compute_once(kind, model, keys, plan, compute), computed


ASKED = {"sharded": False, "threads": 1, "name": "m"}  # with its key, all asked of a checkpoint
MODEL, ANOTHER = (SimpleNamespace(key=64 * digit, **ASKED) for digit in "01")


def test_nothing_is_computed_twice():
    """Not within a call either; and values come in the order of the keys, whatever is known."""
    values, computed = fill("test", MODEL, [3, 1, 3, 3])
    assert computed == [3, 1]
    np.testing.assert_array_equal(values, [[3, 3 / 8], [1, 1 / 8], [3, 3 / 8], [3, 3 / 8]])
    values, computed = fill("test", MODEL, [1, 2, 3, 5, 2])
    assert computed == [2, 5]
    np.testing.assert_array_equal(values[:, 0], [1, 2, 3, 5, 2])
    assert fill("test", MODEL, [5, 1, 2, 3])[1] == []
    assert fill("test", ANOTHER, [1])[1] == [1]
    assert fill("other", MODEL, [1])[1] == [1]


def test_of_two_commands_that_compute_a_number_the_first_counts():
    """So that the other, resumed, goes on with the numbers that it began with."""

    def slow(batch):
        fill("test", MODEL, [8])  # another command begins and ends meanwhile
        return np.array([[9.0, 9.0]])

    actual = scores.compute_once("test", MODEL, [key_of(8)], lambda missing: [missing], slow)
    assert actual.tolist() == [[8, 1]]


def test_content_keys_tell_apart_what_could_run_together():
    parts = [("ab",), ("a", "b"), ([1, 23],), ([12, 3],), ([1], [23]), ([1, 2, 3],), ("1",), (1,)]
    keys = [scores.content_key(*part) for part in parts]
    assert len(set(keys)) == len(parts) and {len(key) for key in keys} == {16}


@pytest.mark.parametrize("wrong_number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_an_error_and_not_kept(wrong_number):
    wrong = [key_of(1)], lambda missing: [missing], lambda batch: np.array([[1, wrong_number]])
    with pytest.raises(UserError, match="test: m gives a number that is not finite"):
        scores.compute_once("test", MODEL, *wrong)
    assert fill("test", MODEL, [1])[1] == [1]


def test_with_a_full_cache_no_weights_are_read(checkpoints, embedders, reward_models, monkeypatch):
    names = embedders["encoder"], checkpoints("llama"), reward_models["llama"]

    def everything():
        scorers = Scorers(*names)
        signals = [signal.function(POOLS, scorers) for signal in scores.SIGNALS.values()]
        return np.concatenate([values for pools in signals for values in pools])

    first = everything()
    no_weights = property(lambda checkpoint: pytest.fail(f"{checkpoint.name} was read"))
    monkeypatch.setattr(scores.Checkpoint, "model", no_weights)
    np.testing.assert_array_equal(everything(), first)


def test_a_write_that_was_killed_is_undone_and_a_damaged_file_is_named():
    fill("test", MODEL, [1, 2, 3])
    (path,) = data.cache_folder().glob("test-*")
    if not (child := os.fork()):
        with scores.open_cache(path) as table:
            table.execute("PRAGMA cache_size = 1")  # so that pages reach the file before the end
            rows = [(key_of(k), bytes(8)) for k in range(4, 2000)]
            table.executemany("INSERT INTO numbers VALUES (?, ?, 0)", rows)
            os.kill(os.getpid(), SIGKILL)
    os.waitpid(child, 0)
    assert fill("test", MODEL, [1, 2, 3, 4])[1] == [4]
    three, flipped = (np.array([3, x], np.float32).tobytes() for x in (3 / 8, 3 / 4))
    path.write_bytes(path.read_bytes().replace(three, flipped))
    values, computed = fill("test", MODEL, [1, 2, 3, 4])
    assert computed == [3] and values[2].tolist() == [3, 3 / 8]
    for damaged in (b"torn", path.read_bytes()[:5000]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"cache {path}: cannot be used .*, remove it$"):
            scores.read_cache(path)


def test_processes_write_into_one_cache_at_once(tmp_path):
    """Four forked writers of 200 records each, one of them killed: what was written is whole."""
    children = []
    for n in range(4):
        child = os.fork()
        if not child:
            for k in range(200):
                fill("test", MODEL, [200 * n + k])
            os._exit(0)
        children.append(child)
    os.kill(children[0], SIGKILL)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ended[1:] == [0, 0, 0]
    values, computed = fill("test", MODEL, list(range(800)))
    assert all(k < 200 for k in computed)
    np.testing.assert_array_equal(values[200:, 0], np.arange(200, 800))


def save_adapter(folder, number, about):
    (folder / "text_matching").mkdir(exist_ok=True)
    tensor = {"lora_A": torch.tensor([number])}
    save_file(tensor, folder / "text_matching" / "adapter_model.safetensors")
    (folder / "text_matching" / "adapter_config.json").write_text(about)


def test_another_model_has_another_key(checkpoints, tmp_path):
    """The same files in another folder have the same one; and no weights are read for it."""
    folders = [tmp_path / name for name in ("z", "a")]
    for folder in folders:
        shutil.copytree(checkpoints("llama"), folder)
        save_adapter(folder, 1, "{}")
    one, other = (LanguageModel(str(folder), torch.float32) for folder in folders)
    assert one.key == other.key and "model" not in vars(one)
    keys = {one.key, LanguageModel(str(folder), torch.bfloat16).key}
    for change in (
        lambda: rewrite_weights(folder, lambda w: w["model.norm.weight"][0].mul_(1.001)),
        lambda: save_adapter(folder, 2, "{}"),
        lambda: save_adapter(folder, 2, '{"r": 8}'),
        lambda: rewrite_config(folder, rms_norm_eps=1e-3),
        lambda: shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors"),
    ):
        change()
        keys.add(LanguageModel(str(folder), torch.float32).key)
    assert len(keys) == 2 + 5


@pytest.fixture
def command(checkpoints, embedders, reward_models, tmp_path, run_main):
    """command(rows, *flags) runs `scores.py` on the rows and returns what it wrote."""

    def call(rows, *flags, out=tmp_path / "new" / "scored.jsonl"):
        files = ["--data", write(tmp_path / "pref.jsonl", rows), "--out", out]
        models = ["--embedder", embedders["encoder"], "--surprise-model", checkpoints("gpt2")]
        models += ["--reward-model", reward_models["gemma2"], "--dtype", "float32"]
        call.printed = run_main("scores", *files, *models, *flags)
        return [row for _, row in data.read_jsonl(out)]

    return call


def six_rows():
    texts = ["A door stop.", "A very small staircase for cats", "birthdays and poker", "quiet"]
    return [
        {"prompt": prompt, "chosen": texts[k], "rejected": texts[k - 1], "id": f"日本 {k}"}
        for prompt in ("Think of a brick.", "Think of a clock.")
        for k in range(3)
    ]


def test_the_command_adds_columns_and_changes_nothing_else(command):
    """Rows come back in order with what they held; min-max reaches 0 and 1 for each prompt."""
    rows = six_rows()
    rows[0] |= {"novelty_chosen": 7, "nested": {"mine": [None, 1.5, "\u2028"]}}  # 7 is replaced
    scored = command(rows, "--include-rejected", "--signals", *scores.SIGNALS)
    assert "6 pairs, 2 prompts, 8 distinct responses scored\n" in command.printed
    columns = [f"{signal}_{side}" for signal in scores.SIGNALS for side in SIDES]
    for row, before in zip(scored, rows, strict=True):
        assert list(row) == list(dict.fromkeys([*before, *columns]))
        assert {key: row[key] for key in before.keys() - columns}.items() <= before.items()
    for signal, k in itertools.product(scores.SIGNALS, (0, 3)):
        of = {(row[side], row[f"{signal}_{side}"]) for row in scored[k : k + 3] for side in SIDES}
        assert len(of) == 4  # a response has one score, wherever it stands
        expected = {0.5} if signal == "infrequency" else {0, 1}  # to this embedder all are alike
        assert expected <= {score for _, score in of}
        assert all(0 <= score <= 1 for _, score in of)


def test_a_fifth_signal_is_one_entry(command, monkeypatch):
    """Without a scorer; min-max of the lengths 12, 31 and 19."""
    lengths = lambda pools, _: [np.array([float(len(t)) for t in p.texts]) for p in pools]  # noqa: E731
    monkeypatch.setitem(scores.SIGNALS, "length", scores.Signal(lengths))
    rows = command(six_rows(), "--signals", "length", "--embedder", "nowhere")
    assert [row["length_chosen"] for row in rows[:3]] == [0, 1, pytest.approx(7 / 19, abs=1e-6)]


def test_the_command_computes_the_perplexity_asked_for(command):
    columns = []
    for flag in ([], ["--perplexity", "response"], ["--perplexity", "conversation"]):
        rows = command(six_rows(), "--signals", "surprise", *flag)
        columns.append([row["surprise_chosen"] for row in rows])
    assert columns[0] == columns[1] != columns[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_positions_do_not_restart_are_not_shared(checkpoints, monkeypatch, dtype):
    """What an architecture that ignores position ids would do."""

    def running_on(*args):
        batch = make_batch(*args)
        batch.positions = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        return batch

    assert load_lm(checkpoints("gpt2"), dtype).share
    monkeypatch.setattr(data, "make_batch", running_on)
    assert not load_lm(checkpoints("gpt2"), dtype).share


def test_rows_that_are_not_shared_are_reported_when_they_are_tried(checkpoints, capsys):
    """Once, and not again where they are longer."""
    line = "layout      plain rows, as BloomForCausalLM cannot share prompts here\n"
    lm = LanguageModel(checkpoints("bloom"), torch.float32)
    for longest, expected in ((9, line), (9, ""), (20, "")):
        scores.layout(lm, random_table((9, 9, 9), longest))
        assert capsys.readouterr().out == expected
