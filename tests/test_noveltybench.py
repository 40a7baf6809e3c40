"""eval.py noveltybench: classes and utility by hand, the classifier, the command."""

import eval as evaluation
import scores
from data import UserError
from eval import Equivalence, equal, partition
from scores import Judge

import json
import random
from functools import cache
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from conftest import SMALL, make_checkpoint, make_tokenizer, write
from tokenizers.processors import TemplateProcessing


@pytest.fixture
def bench(tmp_path, run_main):
    """bench(rows, *flags) runs the command on these rows: its results, and what it printed."""

    def run(rows, *flags):
        file, out = write(tmp_path / "responses.jsonl", rows), tmp_path / "nb.json"
        printed = run_main("eval", "noveltybench", "--responses", file, "--out", out, *flags)
        return json.loads(out.read_text()), " ".join(printed.split())

    return run


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("Raccoon", "raccoon", True),
        ("Raccoon", "Raccoon.", False),  # words are what stands between spaces
        ("a red brick", "the red brick", True),  # 2 * 2 >= 3
        ("a brick wall", "the brick", False),  # 2 * 1 < 3
        ("one two three four five", "two one", False),  # 2 * 2 < 5
        ("one one one", "one", False),  # a word is shared once, and 3 long
        ("", "", True),
        ("", "a b c d e f", False),
    ],
)
def test_short_answers_are_the_same_if_they_share_half_of_the_longer(one, other, expected):
    never = lambda pairs: pytest.fail("no model is asked about short answers")  # noqa: E731
    assert equal([(one, other), (other, one)], never) == [expected] * 2


def test_a_sixth_word_is_for_the_model():
    """At 0.102 two answers are not yet the same, at 0.103 they are."""
    five, six = "a b c d e", "a b c d e f"

    def classifier(pairs):
        assert pairs == [(six, six), (six, five), (five, six)]
        return [0.102, 0.103, 0]

    pairs = [(six, six), (five, five), (six, five), (five, six)]
    assert equal(pairs, classifier) == [False, True, True, False]
    assert equal(pairs, None) == [True] * 4


def partition_plain(texts, same) -> list[int]:
    """The definition: one generation joins the first class whose first member says the same."""
    heads, partition = {}, []
    for i, text in enumerate(texts):
        joined = (k for k, head in heads.items() if same([(head, text)])[0])
        partition.append(next(joined, i))
        heads.setdefault(partition[-1], text)
    return partition


def test_partitions_are_those_of_one_comparison_at_a_time(monkeypatch):
    """Random relations, not even symmetric ones, on lists of 1 to 12; the classifier is called
    once, with each generation and each later one of its list."""
    rng = random.Random(0)
    letters = "abcdefghijkl"
    near = {a + b for a in letters for b in letters if a == b or rng.random() < 0.2}
    lists = [rng.choices(letters, k=rng.randint(1, 12)) for _ in range(60)]
    calls = []

    def same(pairs, classifier=None):
        calls.append(pairs)
        return [a + b in near for a, b in pairs]

    plain = [partition_plain(texts, same) for texts in lists]
    calls.clear()
    monkeypatch.setattr(evaluation, "equal", same)
    assert partition(lists) == plain
    (pairs,) = calls
    assert len(pairs) == sum(len(texts) * (len(texts) - 1) / 2 for texts in lists)


def as_number(items):
    return np.array([float(text) for _, text in items])


def test_utility_is_that_of_published_submissions_and_by_hand():
    """By hand (10 + 0.64 * 4) / (1 + 0.8 + 0.64); only the first of a class is scored."""
    table = [
        ([0, 1, 2, 3, 4, 5, 6, 3, 6, 7], [4, 10, 9, 4, 10, 10, 10, 0, 0, 10], 6.978157401661962),
        ([0, 0, 1, 2, 3, 4, 5, 3, 6, 7], [10, 0, 4, 2, 9, 9, 8, 0, 6, 2], 5.285919351835696),
        ([0] * 10, [10] + [0] * 9, 2.2405804992033427),
        ([0, 0, 1], [10, 7, 4], 12.56 / 2.44),
    ]
    classes, rewards, expected = zip(*table, strict=True)
    asked = []

    def reward_model(items):
        asked.extend(items)
        return as_number(items)

    lists = [list(map(str, row)) for row in rewards]
    places = [[row.index(c) for c in row] for row in classes]
    actual = evaluation.utilities("pqrs", lists, places, reward_model, np.arange(1.5, 10))
    assert actual == pytest.approx(expected, abs=1e-12)
    assert len(asked) == 8 + 8 + 1 + 2
    assert asked[-3:] == [("r", "10"), ("s", "10"), ("s", "4")]


@pytest.mark.parametrize(
    "bins, rewards, expected",
    [
        (evaluation.SKYWORK_BINS, [-7.71875, -7.7, -3, -2.046875, -2], [1, 2, 9, 9, 10]),
        (evaluation.JUDGE_BINS, [9, 14, 14.1, 30, 46, 46.1, 60], [1, 1, 2, 5, 9, 10, 10]),
    ],
)
def test_rewards_become_1_to_10(bins, rewards, expected):
    """The utility of one response is what it is worth."""
    lists = [[str(reward)] for reward in rewards]
    n = len(lists)
    assert evaluation.utilities(["p"] * n, lists, [[0]] * n, as_number, bins) == [*expected]


ENCODER = SMALL | {"intermediate_size": 64, "num_labels": 2}
DEBERTA = ENCODER | {
    "type_vocab_size": 0, "relative_attention": True, "position_buckets": 32,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "max_position_embeddings": 512,
}  # fmt: skip
ENCODERS = {
    "deberta": lambda: transformers.DebertaV2Config(**DEBERTA),
    "bert": lambda: transformers.BertConfig(**ENCODER),  # is told which text a token is of
}
AUTO = transformers.AutoModelForSequenceClassification
LONG = "boredom is a clock that has forgotten how to tick, " * 20  # some 400 tokens
PAIRS = [
    ("A brick can be a door stop for cats.", "The first step of a very small staircase for cats."),
    ("The first step of a very small staircase for cats.", "A brick can be a door stop for cats."),
    ("birthdays, very quiet", LONG),
    (LONG, f"{LONG} and more"),
    ("", "What would happen if nobody could lie?"),
]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """encoders(name) is the folder of a tiny random classifier with two labels."""

    @cache
    def get(name):
        folder = tmp_path_factory.mktemp(name)
        make_checkpoint(folder, ENCODERS[name](), AUTO)
        model = AUTO.from_pretrained(folder)
        model.classifier.weight.data *= 50  # so that probabilities differ, around the middle
        model.classifier.bias.data[1] += 8.5 * (name == "bert")
        model.save_pretrained(folder)
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A <eos>",
            pair="<bos>:0 $A:0 <eos>:0 $B:1 <eos>:1",  # the second text and its end are of kind 1
            special_tokens=[("<bos>", 0), ("<eos>", 1)],
        )
        tokenizer.save_pretrained(folder)
        about = json.loads((folder / "tokenizer_config.json").read_text())
        about["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        return str(folder)

    return get


def probability(folder, one, other, limit):
    """The model's own softmax at label 1 of one pair alone, put together by hand."""
    tokenizer = make_tokenizer()
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"][:limit] for text in (one, other))
    ids = torch.tensor([[0, *a, 1, *b, 1]])
    kinds = torch.tensor([[0] * (len(a) + 2) + [1] * (len(b) + 1)])
    model = AUTO.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids, token_type_ids=kinds).logits.softmax(-1)[0, 1].item()


@pytest.mark.parametrize("name, limit", [("deberta", 128), ("bert", 126)])
def test_probabilities_are_the_models_own(encoders, monkeypatch, tmp_path, name, limit):
    """In a padded batch, or each alone. DeBERTa sees 128 tokens of each text; BERT takes 256 in
    all, of which up to 4 are special."""
    classifier = Equivalence(encoders(name))
    actual = classifier(PAIRS)
    expected = [probability(encoders(name), *pair, limit) for pair in PAIRS]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.ptp(expected) > 0.05  # else the comparison says little
    for k, pair in enumerate(PAIRS):
        monkeypatch.setenv("CRPO_CACHE", str(tmp_path / f"cache of {k}"))
        np.testing.assert_allclose(classifier([pair]), expected[k : k + 1], atol=1e-5)
    monkeypatch.setattr(AUTO, "from_pretrained", None)  # what is known needs no weights
    np.testing.assert_array_equal(Equivalence(encoders(name))(PAIRS[-1:]), classifier(PAIRS[-1:]))


def test_a_checkpoint_without_a_tokenizer_takes_that_of_deberta(encoders, tmp_path, monkeypatch):
    """As the published one: transformers makes up one that knows no word, and all is the same."""
    expected = Equivalence(encoders("deberta"))(PAIRS)
    folder = tmp_path / "bare"
    AUTO.from_pretrained(encoders("deberta")).save_pretrained(folder)
    with pytest.raises(UserError, match=r"model microsoft/deberta-v3-large: cannot be loaded"):
        Equivalence(str(folder))
    monkeypatch.setattr(Equivalence, "TOKENIZER", encoders("deberta"))
    monkeypatch.setenv("CRPO_CACHE", str(tmp_path / "another"))
    np.testing.assert_allclose(Equivalence(str(folder))(PAIRS), expected, atol=1e-6)


def test_the_command_partitions_by_the_classifier(bench, encoders, monkeypatch):
    """Against one comparison at a time; the threshold is put between the probabilities."""
    texts = [f"{text} {k}" for k, pair in enumerate(PAIRS[:4]) for text in pair]
    folder, rows = encoders("deberta"), responses("m", "A use?", *texts)
    threshold = float(np.median([probability(folder, texts[0], text, 128) for text in texts]))
    assert evaluation.SAME == 0.102
    monkeypatch.setattr(evaluation, "SAME", threshold)
    results, _ = bench(rows, "--equivalence", folder)

    def same(pairs):
        return [probability(folder, *pair, 128) > threshold for pair in pairs]

    expected = len(set(partition_plain(texts, same)))
    assert 1 < expected < len(texts)
    assert results["rows"][0]["mean_distinct"] == expected
    assert results["scorers"] == {"equivalence": folder, "threshold": threshold}


def responses(model, prompt, *texts, **more):
    model = {"model": model} if model else {}
    return [model | {"prompt": prompt, "response": text} | more for text in texts]


ROWS = [
    *responses("m", "p", "a wall", "wall", "a stop", "wall of a house that is red"),
    *responses(None, "p", "a wall", "the wall"),  # no model: a human's
    *responses("m", "q", "x"),
    *responses("m", "p", "hat", "beyond k"),
]


def test_results_and_table_by_hand(bench):
    """m, p, the first five of six: "wall" joins "a wall" (2 * 1 >= 2), so does "a stop" (2 >= 2).
    The fourth has 7 words and shares 2 with "a wall": alone. "hat" too. 3 classes; q has 1: mean 2.
    Either is drawn, so the interval is [1, 3]. The human's two: 2 * 1 >= 2, one class."""
    results, printed = bench(ROWS, "--k", 5)
    shared = {"task": "", "runs": 1}
    model = shared | {"model": "m", "prompts": 2, "responses": 6, "mean_distinct": 2}
    human = shared | {"model": "human", "prompts": 1, "responses": 2, "mean_distinct": 1}
    assert results == {
        "k": 5,
        "patience": 0.8,
        "scorers": {"equivalence": "shared words"},
        "rows": [model | {"mean_distinct_95": [1, 3]}, human | {"mean_distinct_95": None}],
    }
    head = "model task prompts responses mean_distinct (95 %)"
    assert f"{head} m 2 6 2 (1 to 3) human 1 2 1" in printed


def test_categories_have_rows_of_their_own_and_runs_are_measured_apart(bench):
    """Two classes to one prompt of fun, one to each of two of facts: 4 / 3 over prompts.

    Two runs answer q differently, each in one way: together they would have two classes."""
    rows = responses("m", "p", "a", "b", category="fun")
    rows += responses("m", "q", "a", category="facts") + responses("m", "r", "a", category="facts")
    rows += responses("m", "q", "b", category="facts", run="another")
    means = [(row["task"], row["runs"], row["mean_distinct"]) for row in bench(rows)[0]["rows"]]
    assert means == [("", 2, pytest.approx(4 / 3)), ("fun", 1, 2), ("facts", 2, 1)]


def test_utility_with_a_judge(bench, monkeypatch):
    """30 of 10 to 50 is u = 5. p: classes 0 0 0 1 2: 5 (1 + 0.512 + 0.4096) / 3.3616; q: 5."""
    judge = Mock(spec=Judge, side_effect=lambda items: np.full(len(items), 30.0))
    monkeypatch.setattr(scores, "load_reward_model", lambda name, dtype: judge)
    results, printed = bench(ROWS, "--k", 5, "--reward-model", "a judge")
    row = results["rows"][0]
    assert row["mean_utility"] == pytest.approx((5 * 1.9216 / 3.3616 + 5) / 2)
    assert row["mean_utility_95"] == pytest.approx([5 * 1.9216 / 3.3616, 5])
    assert results["scorers"]["reward_bins"] == "10 to 50 in ten"
    assert f"m 2 6 2 (1 to 3) {row['mean_utility']:.3g} (2.86 to 5)" in printed


def test_another_reward_model_has_the_benchmarks_bins(bench, tmp_path):
    config = transformers.BertConfig(**ENCODER | {"num_labels": 1})
    make_checkpoint(tmp_path / "rewards", config, AUTO)
    results, _ = bench(ROWS, "--reward-model", tmp_path / "rewards")
    assert results["scorers"]["reward_bins"] == "those of Skywork-Reward-Gemma-2-27B-v0.2"
    assert 1 <= results["rows"][0]["mean_utility"] <= 10


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--out r.jsonl", "r.jsonl: this command names that file twice"),
        ("--responses nb.json", "nb.json: this command names that file twice"),
        ("--equivalence none", "model none: cannot be loaded"),
        ("--reward-model none", "model none: cannot be loaded"),
    ],
)
def test_bad_flags_are_refused(refused, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    for name in ("r.jsonl", "nb.json"):
        write(tmp_path / name, ROWS)
    command = ["noveltybench", "--responses", "r.jsonl", "--out", "nb.json"]
    assert message in refused("eval", *command, *flags.split())
