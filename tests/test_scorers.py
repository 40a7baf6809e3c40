"""The paper's embedder with its adapter, and `scores.py judge`, against transformers and numpy."""

import scores
from data import UserError
from scores import Embedder, cross_validate, fit_judge, judge_features, load_reward_model

import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import CONFIGS, SMALL, contents, make_checkpoint, make_tokenizer, write
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

TEXTS = ["a", "A brick can be a door stop.", "birthdays, very quiet", "日本", "boredom " * 20]


JINA = SMALL | {"intermediate_size": 64}
LINEAR = [f"layers.{k}.{name}" for k in (0, 1) for name in ("self_attn.q_proj", "mlp.fc2")]
TABLE = "embeddings.word_embeddings"


@pytest.fixture(params=["AutoModel", "AutoModelForMaskedLM"])
def jina(request, tmp_path):
    """The second way to save it stores no pooler, and its names begin with "roberta."."""
    folder, config = tmp_path / "jina", transformers.JinaEmbeddingsV3Config(**JINA)
    make_checkpoint(folder, config, getattr(transformers, request.param))
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A $B", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return str(folder)


def add_adapter(folder, prefix="base_model.model.", **config):
    """Save one in PEFT's format; returns {module: (A [r, in], B [out, r])}."""
    weights = transformers.AutoModel.from_pretrained(folder).state_dict()
    made, files = {}, {}
    for k, name in enumerate([*LINEAR, TABLE]):
        torch.manual_seed(k)
        shape = weights[f"{name}.weight"].shape
        rows, columns = shape[::-1] if name == TABLE else shape
        made[name] = torch.randn(4, columns) / 2, torch.randn(rows, 4) / 2
        for letter, tensor in zip("AB", made[name], strict=True):
            kind = f"lora_embedding_{letter}" if name == TABLE else f"lora_{letter}.weight"
            files[f"{prefix}{name}.{kind}"] = tensor
    place = Path(folder) / "text_matching"
    place.mkdir()
    save_file(files, place / "adapter_model.safetensors")
    config |= {"peft_type": "LORA", "r": 4, "lora_alpha": 2}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return made


def plain_embeddings(model, folder):
    """Of each text alone: the mean over its states, BOS and EOS among them, of unit length."""
    vectors, tokenizer = [], transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert [ids[0, 0], ids[0, -1]] == [0, 1]
        with torch.no_grad():
            mean = model.eval()(input_ids=ids).last_hidden_state[0].mean(0)
        vectors.append((mean / mean.norm()).numpy())
    return np.array(vectors)


def vectors(folder, texts):
    return list(Embedder(folder, torch.float32)(texts).values())


@pytest.mark.parametrize(
    "adapter, scale",
    [
        ({}, 2 / 4),
        ({"use_rslora": True, "prefix": "base_model.model.roberta."}, 2 / 2),  # of a masked LM
        ({"prefix": ""}, 2 / 4),
    ],
)
def test_jina_embeds_by_weights_with_the_tasks_adapter(jina, adapter, scale, monkeypatch, tmp_path):
    """W + alpha / r B A by hand, or alpha / sqrt r; all texts in one padded batch, and each alone
    with an empty cache."""
    model = transformers.AutoModel.from_pretrained(jina)
    without = plain_embeddings(model, jina)
    for name, (A, B) in add_adapter(jina, **adapter).items():
        delta = sum(scale * B[:, k, None] * A[None, k] for k in range(4))
        with torch.no_grad():
            model.get_submodule(name).weight += delta.T if name == TABLE else delta
    assert np.abs(plain_embeddings(model, jina) - without).max() > 0.1
    expected = plain_embeddings(model, jina)
    np.testing.assert_allclose(vectors(jina, TEXTS), expected, atol=1e-5, rtol=1e-4)
    for k, text in enumerate(TEXTS):
        monkeypatch.setenv("CRPO_CACHE", str(tmp_path / f"cache of {k}"))
        np.testing.assert_allclose(vectors(jina, [text])[0], expected[k], atol=1e-5, rtol=1e-4)


def test_an_adapter_is_merged_in_float32_and_rounded_once():
    """1 + 2^-8 + 2^-17 is just above the middle between 1 and its neighbour 1 + 2^-7 in bfloat16,
    and would be on it, and fall to 1, if the change had been rounded before."""
    layer = torch.nn.Linear(1, 1).to(torch.bfloat16)
    layer.weight.data.fill_(1)
    change = {"0": (torch.tensor([[1.0]]), torch.tensor([[2**-8 + 2**-17]]))}
    scores.merge_adapter(torch.nn.Sequential(layer), change, "A")
    assert layer.weight.item() == 1 + 2**-7 and layer.weight.dtype == torch.bfloat16
    tied = torch.nn.Sequential(layer, torch.nn.Linear(1, 1))
    tied[1].weight = layer.weight
    with pytest.raises(UserError, match="which this model lacks or has tied"):
        scores.merge_adapter(tied, change | {"1": change["0"]}, "A")


@pytest.mark.parametrize(
    "key, value",
    [("use_dora", True), ("rank_pattern", {"q_proj": 2}), ("init_lora_weights", "pissa")],
)
def test_what_peft_may_do_beyond_b_times_a_is_refused(jina, key, value):
    add_adapter(jina, alpha_pattern={}, lora_bias=False, layer_replication=None, **{key: value})
    with pytest.raises(UserError, match=r"text_matching: .* is not supported") as refused:
        scores.read_adapter(jina, "text_matching")
    assert f"{key} = {value!r} " in str(refused.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(name, commit, folder) puts a model into the hub's own cache on disk: its snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name, commit, folder):
        model = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, model / "snapshots" / commit, dirs_exist_ok=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(commit)
        return model / "snapshots" / commit

    return put


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_jina_without_its_adapter_is_refused(jina, hub, monkeypatch, tmp_path, lost):
    """In a folder or from the hub: its embeddings would look like any others, and be cached."""
    add_adapter(jina)
    snapshot = hub("a/jina", 40 * "1", jina)
    np.testing.assert_allclose(vectors("a/jina", TEXTS), vectors(jina, TEXTS), atol=1e-6)
    for name, folder in ((jina, Path(jina)), ("a/jina", snapshot)):
        (folder / "text_matching" / lost).unlink()
        monkeypatch.setenv("CRPO_CACHE", str(tmp_path / "another cache"))
        embedder = Embedder(name, torch.float32)
        with pytest.raises(UserError, match=f"adapter {name}/text_matching: cannot be read"):
            embedder(TEXTS)
        assert not any(map(scores.read_cache, (tmp_path / "another cache").glob("*.sqlite")))


def test_models_of_the_hub_are_known_by_name_and_commit(checkpoints, hub):
    """The cache of numbers must never take one for another."""

    def key(name, commit, dtype=torch.float32):
        hub(name, commit, checkpoints("llama"))
        return scores.LanguageModel(name, dtype).key

    one, two = 40 * "1", 40 * "2"
    others = [key("b/model", one), key("a/model", two), key("a/model", one, torch.bfloat16)]
    assert key("a/model", one) == key("a/model", one)
    assert len({key("a/model", one), *others}) == 4


def planted(n_prompts=30, each=12, d=5, noise=0.0):
    """(X, score) of each prompt, and the weights behind the scores; both move with the prompt."""
    rng = np.random.default_rng(0)
    true, groups = rng.standard_normal(d), []
    for shift in 9 * rng.standard_normal(n_prompts):
        X = rng.standard_normal((each, d)) + shift
        score = 30 + X @ true - 5 * true.sum() * shift + noise * rng.standard_normal(each)
        groups.append((X, score))
    return groups, true


def within(predicted, groups) -> float:
    r, n = scores.within_prompts(predicted, [y for _, y in groups]).T
    return r @ n / n.sum()


def centred(groups):
    columns = zip(*groups, strict=True)
    return [np.concatenate([part - part.mean(0) for part in column]) for column in columns]


def test_a_planted_truth_is_found_however_mild_the_raters_of_a_prompt():
    """Across prompts, scores fall where X @ true rises; within them they rise, and that counts."""
    groups, true = planted(300, noise=0.1)
    weight = fit_judge(groups)
    np.testing.assert_allclose(weight, true, atol=0.03)
    assert within(cross_validate(groups), groups) > 0.97
    X, score = map(np.concatenate, zip(*groups, strict=True))
    assert np.corrcoef(X @ true, score)[0, 1] < -0.7


def test_a_fit_is_the_least_of_squared_errors_and_squared_weights():
    """There the derivative is nil: X' (X w - y) + penalty w."""
    groups, _ = planted(noise=3)
    (X, y), weight = centred(groups), fit_judge(groups)
    np.testing.assert_allclose(X.T @ (X @ weight - y) + scores.PENALTY * weight, 0, atol=1e-9)


def test_noise_gives_no_agreement():
    rng = np.random.default_rng(0)
    groups = [(X, rng.standard_normal(len(X))) for X, _ in planted()[0]]
    assert abs(within(cross_validate(groups), groups)) < 0.15


@pytest.mark.parametrize("n_prompts", [2, 10, 23])
def test_a_held_out_prediction_never_saw_its_prompt(n_prompts):
    """So it stays when every score of that prompt changes. Each of ten folds (or a fold a prompt)
    leaves out a tenth of the prompts, and those outside it do feel the change."""
    groups, _ = planted(n_prompts, each=6, noise=3)
    before = cross_validate(groups)
    for k, (X, score) in enumerate(groups):
        after = cross_validate([*groups[:k], (X, -3 * score**2), *groups[k + 1 :]])
        moved = [np.abs(a - b) > 1e-9 for a, b in zip(after, before, strict=True)]
        assert not moved[k].any()
        unmoved = sum(not some.any() for some in moved)
        assert 1 <= unmoved <= math.ceil(n_prompts / min(n_prompts, 10))
        assert sum(some.all() for some in moved) == n_prompts - unmoved


def test_features_are_the_response_and_its_product_with_the_prompt():
    """e(y) = (0, 1, 0, 0) or (.6, .8, 0, 0), and 2 e(x) e(y) of 4 dimensions; the sum of the second
    half is twice the cosine. Turns of a prompt are one text, with an empty line between."""
    table = {"x": [0.8, 0.6, 0, 0], "s\n\nx": [0, 0, 1, 0], "y": [0, 1, 0, 0]}
    table["z"] = [0.6, 0.8, 0, 0]
    x, turns = (("user", "x"),), (("system", "s"), ("user", "x"))
    actual = judge_features(lambda texts: {t: table[t] for t in texts}, [(x, "y"), (turns, "z")])
    expected = [[0, 1, 0, 0, 0, 1.2, 0, 0], [0.6, 0.8, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.fixture(scope="module")
def rated(checkpoints, tmp_path_factory):
    """25 prompts of 14 responses; `planted` follows a line in the embedder's features."""
    rng = np.random.default_rng(0)
    vocabulary = ["".join(rng.choice([*"abcdefghij"], n)) for n in rng.integers(2, 6, 200)]
    prompts = [f"Think of {a} and {b}." for a, b in rng.choice(vocabulary, (25, 2))]
    rows = [
        {"prompt": prompt, "response": " ".join(rng.choice(vocabulary, 5)), "task": "Uses"}
        for prompt in prompts
        for _ in range(14)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        X = judge_features(Embedder(checkpoints("llama"), torch.float32), map_items(rows))
    signal = X @ rng.standard_normal(X.shape[1])
    for row, value in zip(rows, 3 * signal / signal.std(), strict=True):
        offset = prompts.index(row["prompt"]) % 5
        row |= {"planted": 30 + value + offset, "noise": 30 + 5 * rng.standard_normal()}
    return rows


def printed_within(line: str) -> float:
    return float(line.removeprefix("held out").split()[0])


def map_items(rows):
    return [((("user", row["prompt"]),), row["response"]) for row in rows]


@pytest.fixture
def judge(rated, checkpoints, tmp_path, run_main):
    """judge(*flags) fits one and returns what it prints; rows, score and embedder may be others."""

    def call(*flags, rows=rated, score="planted", embedder=None, out="judge"):
        rows = [row | {"score": row.get(score)} for row in rows]
        argv = ["judge", "--data", write(tmp_path / "rated.jsonl", rows), "--out", tmp_path / out]
        argv += ["--embedder", embedder or checkpoints("llama"), "--dtype", "float32", *flags]
        return run_main("scores", *argv)

    return call


def test_a_judge_loads_as_it_was_fitted(judge, rated, checkpoints, tmp_path):
    """In the dtype it was fitted with; its mean is the scores'."""
    printed = judge()
    items, score = map_items(rated), np.array([row["planted"] for row in rated])
    X = judge_features(Embedder(checkpoints("llama"), torch.float32), items)
    groups = list(zip(np.split(X, 25), np.split(score, 25), strict=True))
    expected = score.mean() + (X - X.mean(0)) @ fit_judge(groups)
    actual = load_reward_model(str(tmp_path / "judge"), torch.bfloat16)(items)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert printed_within(printed.splitlines()[1]) > 0.8


def test_a_judge_is_fitted_on_its_split_alone(judge, rated, tmp_path):
    """Scores of the others change neither what is printed nor a byte of the judge."""
    splits = ["Training"] * 250 + ["HeldoutItem"] * 100
    rows = [row | {"split": split} for row, split in zip(rated, splits, strict=True)]
    printed = judge("--split", "Training", rows=rows)
    assert "on Training, 250 responses" in printed
    for row in rows[250:]:
        row["planted"] = row["noise"]
    again = judge("--split", "Training", rows=rows, out="again")
    assert again.splitlines()[:2] == printed.splitlines()[:2]
    assert contents(tmp_path / "judge") == contents(tmp_path / "again")


def test_a_judge_needs_two_prompts_with_several_responses(judge, rated, tmp_path):
    """Not one prompt alone, nor one response to each, nor a split that no row has."""
    for rows, flags in ((rated[:14], []), (rated[::14], []), (rated, ["--split", "Tranning"])):
        count = 0 if flags else len(rows)
        with pytest.raises(UserError, match=f"rated.jsonl: {count} rated responses .* two prompts"):
            judge(*flags, rows=rows)
        assert not (tmp_path / "judge").exists()


def test_a_judge_that_is_not_what_was_fitted_is_refused(judge, tmp_path):
    """Its embedder has changed since it was fitted, or a number of its, or it is cut short."""
    embedder, file = tmp_path / "embedder", tmp_path / "judge" / "judge.safetensors"
    make_checkpoint(embedder, CONFIGS["llama"]())
    judge(embedder=str(embedder))
    load_reward_model(str(tmp_path / "judge"), torch.float32)
    make_checkpoint(embedder, CONFIGS["qwen2"]())
    with pytest.raises(UserError, match="embedder is no longer what it was fitted with"):
        load_reward_model(str(tmp_path / "judge"), torch.float32)
    whole = file.read_bytes()
    for content, message in ((whole[:-8] + bytes(8), "it is damaged"), (whole[:-1], "")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"judge: cannot be read .*{message}"):
            load_reward_model(str(tmp_path / "judge"), torch.float32)
