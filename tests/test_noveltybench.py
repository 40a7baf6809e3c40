"""eval.py noveltybench: classes and utility by hand, the classifier, the benchmark's own files."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import SMALL, contents, make_checkpoint, make_tokenizer, shared
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

import eval as evaluation
import scores
from data import UserError
from eval import equivalence, firsts, partition, partition_plain, utility
from scores import Checkpoint, Equivalence, Judge


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(rows, *flags) runs the command on a file of these rows and returns its results."""

    def run(rows, *flags):
        file = write(tmp_path / "responses.jsonl", rows)
        words = ["noveltybench", "--responses", file, "--out", tmp_path / "nb.json", *flags]
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
        evaluation.main()
        return json.loads((tmp_path / "nb.json").read_text())

    return run


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# Classes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("Raccoon", "raccoon", True),
        ("Raccoon", "Raccoon.", False),  # words are what stands between spaces
        ("a red brick", "the red brick", True),  # 2 * 2 >= 3
        ("a brick wall", "the brick", False),  # 2 * 1 < 3
        ("one two three four", "one two", True),  # 2 * 2 >= 4
        ("one two three four five", "two one", False),  # 2 * 2 < 5
        ("one one one", "one", False),  # a word is shared once, and 3 long
        ("", "", True),
    ],
)
def test_short_answers_are_the_same_where_twice_the_shared_words_reach_the_longer(
    one, other, expected
):
    def never(pairs):
        raise AssertionError("no model is asked about short answers")

    assert equivalence(never)([(one, other), (other, one)]) == [expected] * 2


def test_a_sixth_word_is_for_the_model_which_is_asked_once_for_each_pair():
    """And it decides against the shared words: all six, or none."""
    asked = []

    def decide(pairs):
        asked.extend(pairs)
        return [False] * len(pairs)

    same = equivalence(decide)
    five, six = "a b c d e", "a b c d e f"
    assert same([(six, six), (five, five), (six, five), (six, six)]) == [False, True, False, False]
    assert same([(six, five), (five, six), (six, "")]) == [False] * 3
    assert asked == [(six, six), (six, five), (five, six)]


def relation(*pairs):
    """same() by a table, and of each with itself."""
    return lambda asked: [one == other or (one, other) in pairs for one, other in asked]


CHAIN = relation(("A", "B"), ("B", "A"), ("B", "C"), ("C", "B"))  # not A and C


def each_plain(lists, same):
    return [partition_plain(texts, same) for texts in lists]


@pytest.mark.parametrize("cut", [partition, each_plain])
def test_a_generation_joins_the_class_whose_first_member_it_equals(cut):
    """A ~ B and B ~ C, but not A ~ C: how many classes there are depends on the order.

    ABC: B joins A, and C, held against A alone, stands by itself. BAC: both join B. ACB: B equals
    the first members of both classes and joins the former.
    """
    orders = ["ABC", "BAC", "ACB", "C", "CCA"]
    expected = [[0, 0, 1], [0, 0, 0], [0, 1, 0], [0], [0, 0, 1]]
    assert cut(orders, CHAIN) == expected


def test_rounds_over_all_prompts_make_the_comparisons_of_one_at_a_time():
    """Random relations, not even symmetric ones, on lists of 1 to 12; at most 12 calls."""
    rng = random.Random(0)
    letters = "abcdefghijkl"
    same = relation(*((a, b) for a in letters for b in letters if rng.random() < 0.2))
    lists = [rng.choices(letters, k=rng.randint(1, 12)) for _ in range(60)]
    asked, calls = {"rounds": [], "plain": []}, []

    def noted(name):
        def call(pairs):
            asked[name] += pairs
            calls.append(name)
            return same(pairs)

        return call

    assert partition(lists, noted("rounds")) == each_plain(lists, noted("plain"))
    assert sorted(asked["rounds"]) == sorted(asked["plain"])
    assert calls.count("rounds") <= 12


def test_distinct_in_other_orders():
    """Of the six orders of A ~ B ~ C the two that begin with B give 1 class, the others 2."""
    counts = evaluation.distinct_in_orders([list("ABC")], CHAIN, 900, seed=0)
    assert set(counts) == {1, 2}
    assert counts.mean() == pytest.approx(5 / 3, abs=0.06)
    both = evaluation.distinct_in_orders([list("ABC"), list("AA")], CHAIN, 900, seed=0)
    assert set(both) == {1, 1.5}  # a mean over the prompts of an order
    again = evaluation.distinct_in_orders([list("ABC")], CHAIN, 900, seed=0)
    other = evaluation.distinct_in_orders([list("ABC")], CHAIN, 900, seed=1)
    assert list(counts) == list(again) != list(other)


# --------------------------------------------------------------------------------------------------
# Utility
# --------------------------------------------------------------------------------------------------


def test_utility_of_three_generations():
    """Weights 1, 0.8, 0.64, in all 2.44. The second repeats the first: (10 + 0 + 0.64 * 4) / 2.44.

    With the first alone it is its score, however many were asked for.
    """
    assert firsts([0, 0, 1]) == [0, 2]
    assert utility([0, 0, 1], [10, 7, 4]) == pytest.approx(12.56 / 2.44)
    assert utility([0, 0, 1], [10, 0, 4]) == pytest.approx((1 - 0.8) / (1 - 0.8**3) * 12.56)
    assert utility([0], [7]) == 7
    assert utility([0, 1, 2, 3], [6] * 4) == pytest.approx(6)


@pytest.mark.parametrize(
    "classes, scores, expected",
    [
        ([0, 1, 2, 3, 4, 5, 6, 3, 6, 7], [4, 10, 9, 4, 10, 10, 10, 0, 0, 10], 6.978157401661962),
        ([0, 0, 1, 2, 3, 4, 5, 3, 6, 7], [10, 0, 4, 2, 9, 9, 8, 0, 6, 2], 5.285919351835696),
        ([0] * 10, [10] + [0] * 9, 2.2405804992033427),
    ],
)
def test_utility_is_that_of_published_submissions(classes, scores, expected):
    assert utility(classes, scores) == pytest.approx(expected, abs=1e-12)


THRESHOLDS = (-7.71875, -6.28125, -6.0, -5.71875, -5.5, -5.0, -4.375, -3.4375, -2.046875)


@pytest.mark.parametrize(
    "bins, rewards, expected",
    [
        (evaluation.SKYWORK_BINS, THRESHOLDS, range(1, 10)),  # a threshold is in the lower bin
        (evaluation.SKYWORK_BINS, [t + 1e-3 for t in THRESHOLDS], range(2, 11)),
        (evaluation.SKYWORK_BINS, [-99, 99], [1, 10]),
        (
            evaluation.JUDGE_BINS,
            [9, 10, 14, 14.1, 30, 46, 46.1, 50, 60],
            [1, 1, 1, 2, 5, 9] + [10] * 3,
        ),
    ],
)
def test_rewards_become_1_to_10(bins, rewards, expected):
    answers = [evaluation.Answers("m", (("user", "?"),), list(map(str, rewards)), {}, "")]
    classes = list(range(len(rewards)))

    def reward_model(items):
        return np.array([float(text) for _, text in items], np.float32)

    found = evaluation.score_firsts(answers, [classes], reward_model, bins)
    assert found == [list(expected)]


def test_only_the_first_of_a_class_is_scored():
    prompts = [(("user", name),) for name in "pq"]
    texts = [["1", "2", "3"], ["4", "5"]]
    answers = [evaluation.Answers("m", p, t, {}, "") for p, t in zip(prompts, texts, strict=True)]
    asked = []

    def reward_model(items):
        asked.extend(items)
        return np.array([float(text) for _, text in items])

    found = evaluation.score_firsts(answers, [[0, 0, 1], [0, 0]], reward_model, (2, 3.5))
    assert found == [[1, 0, 2], [3, 0]]
    assert asked == [(prompts[0], "1"), (prompts[0], "3"), (prompts[1], "4")]


# --------------------------------------------------------------------------------------------------
# The classifier
# --------------------------------------------------------------------------------------------------

ENCODER = SMALL | {"intermediate_size": 64, "num_labels": 2}
DEBERTA = ENCODER | {
    "type_vocab_size": 0, "relative_attention": True, "position_buckets": 32,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "max_position_embeddings": 512,
}  # fmt: skip
ENCODERS = {
    "deberta": lambda **more: transformers.DebertaV2Config(**DEBERTA | more),
    "bert": lambda **more: transformers.BertConfig(**ENCODER | more),  # which text a token is of
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


def pair_tokenizer():
    """<bos> A <eos> B <eos>, the second text and its end of kind 1."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos>:0 $A:0 <eos>:0 $B:1 <eos>:1",
        special_tokens=[("<bos>", 0), ("<eos>", 1)],
    )
    return tokenizer


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """encoders(name) is the folder of a tiny random classifier with two labels."""
    made = {}

    def get(name, **more):
        key = name, *more
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            make_checkpoint(folder, ENCODERS[name](**more), AUTO)
            model = AUTO.from_pretrained(folder)
            model.classifier.weight.data *= 50  # so that probabilities differ, around the middle
            model.classifier.bias.data[1] += 8.5 * (name == "bert")
            model.save_pretrained(folder)
            pair_tokenizer().save_pretrained(folder)
            about = json.loads((folder / "tokenizer_config.json").read_text())
            about["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
            (folder / "tokenizer_config.json").write_text(json.dumps(about))
            made[key] = str(folder)
        return made[key]

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
def test_probabilities_are_the_models_own_and_padding_changes_nothing(
    encoders, monkeypatch, tmp_path, name, limit
):
    """DeBERTa sees 128 tokens of each; BERT takes 256 in all, of which 3 are special."""
    classifier = Equivalence(encoders(name))
    found = classifier(PAIRS)
    expected = [probability(encoders(name), *pair, limit) for pair in PAIRS]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 0.05  # else the comparison says little
    for k, pair in enumerate(PAIRS):
        monkeypatch.setenv("CRPO_CACHE", str(tmp_path / f"cache of {k}"))
        np.testing.assert_allclose(classifier([pair]), expected[k : k + 1], atol=1e-5)


def test_a_pair_is_computed_once_ever(encoders, monkeypatch):
    first = Equivalence(encoders("bert"))(PAIRS)

    def refuse(*args, **kwargs):
        raise AssertionError("the weights are not needed again")

    monkeypatch.setattr(AUTO, "from_pretrained", refuse)
    assert (Equivalence(encoders("bert"))(PAIRS[::-1])[::-1] == first).all()


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


def test_the_command_partitions_by_the_classifier(bench, encoders, tmp_path, capsys):
    """Against one comparison at a time; the threshold is put between the probabilities."""
    texts = [f"{text} {k}" for k, pair in enumerate(PAIRS[:4]) for text in pair]
    folder = encoders("deberta")
    rows = [{"model": "m", "prompt": "A use?", "response": text} for text in texts]
    alone = [float(Equivalence(folder)([(texts[0], text)])[0]) for text in texts]
    threshold = float(np.median(alone))
    flags = ["--equivalence", folder, "--threshold", threshold, "--permutations", 3]
    results = bench(rows, *flags, "--write", tmp_path / "nb.jsonl")

    def same(pairs):
        return [probability(folder, *pair, 128) > threshold for pair in pairs]

    expected = partition_plain(texts, same)
    assert 1 < len(set(expected)) < len(texts)
    assert lines(tmp_path / "nb.jsonl")[0]["partition"] == expected
    assert results["rows"][0]["mean_distinct"] == len(set(expected))
    assert results["scorers"] == {"equivalence": folder, "threshold": threshold}
    assert "3 of 8 responses are longer than 128 tokens" in capsys.readouterr().out
    assert bench(rows, "--equivalence", folder)["scorers"]["threshold"] == 0.102


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------

WORDS = ["wall", "stop", "step", "hat"]


def responses(model, prompt, *texts, **more):
    model = {"model": model} if model else {}
    return [model | {"prompt": prompt, "response": text} | more for text in texts]


ROWS = [
    *responses("m", "p", "a wall", "wall", "a stop", "wall of a house that is red"),
    *responses(None, "p", "a wall", "the wall"),  # no model: a human's
    *responses("m", "q", "x"),
    *responses("m", "p", "hat", "beyond k"),
]


def test_results_and_table_by_hand(bench, capsys):
    """m, p, the first five of six: "wall" joins "a wall" (2 * 1 >= 2), so does "a stop" (2 >= 2).

    The fourth has 7 words and shares 2 with "a wall": alone. "hat" too. 3 classes; q has 1: mean 2.
    Of resamples of these two means one in four is 1 and one in four 3, so the interval is [1, 3].
    The human's two: 2 * 1 >= 2, one class.
    """
    results = bench(ROWS, "--k", 5)
    model, human = results["rows"]
    assert [row["model"] for row in results["rows"]] == ["m", "human"]
    assert (model["prompts"], model["mean_distinct"], model["fewer_than_k"]) == (2, 2, 1)
    assert model["mean_distinct_interval"] == [1, 3]
    assert (human["prompts"], human["mean_distinct"], human["fewer_than_k"]) == (1, 1, 1)
    assert model["mean_distinct_in_orders"].keys() == {"mean", "least", "most"}
    assert results["scorers"] == {"equivalence": "shared words"}
    assert (results["k"], results["patience"], results["permutations"]) == (5, 0.8, 20)
    assert "mean_utility" not in model
    out = capsys.readouterr().out
    orders = model["mean_distinct_in_orders"]
    cells = f"m 2 2 (1 to 3) {orders['mean']:.3g} ({orders['least']:.3g} to "
    assert cells in " ".join(out.split())
    assert "warning: 1 of the 2 prompts of m have fewer than 5 generations" in out


def test_orders_are_not_tried_where_none_are_asked_for(bench, capsys):
    (row, _) = bench(ROWS, "--permutations", 0)["rows"]
    assert "mean_distinct_in_orders" not in row
    assert "in other orders" not in capsys.readouterr().out


def test_cosine_from_the_threshold_on(bench, monkeypatch):
    """Long responses at angles of cosine 0.8 (the default threshold itself), 0.6 and 0."""
    long = [f"{word} and many more words than five" for word in WORDS]
    vectors = dict(zip(long, [(1, 0), (0.8, 0.6), (0.6, 0.8), (0, 1)], strict=True))

    def embedder(texts):
        return {text: np.array(vectors[text]) for text in texts}

    monkeypatch.setattr(scores, "load_embedder", lambda name, dtype: embedder)
    rows = responses("m", "p", *long)

    def distinct(*flags):
        return bench(rows, "--embedder", "E", *flags)["rows"][0]["mean_distinct"]

    assert distinct() == 2  # 0.8 joins, 0.6 does not, and 0 joins 0.6: 0.8 again
    assert distinct("--threshold", 0.6) == 2  # 0.6 joins the first too; 0 is alone
    assert distinct("--threshold", 0.5999) == 2
    assert distinct("--threshold", 0.81) == 3  # 0.6 and 0.8 have cosine 0.96
    assert distinct("--threshold", 0) == 1
    results = bench(rows + rows, "--embedder", "E", "--threshold", 1)
    assert results["rows"][0]["mean_distinct"] == 4
    assert results["scorers"] == {"equivalence": "cosine of E", "threshold": 1}


def make_judge(folder, embedder, score):
    """A judge to whom every response is worth `score`."""
    folder.mkdir()
    zero = {"weight": torch.zeros(64, dtype=torch.float64), "bias": torch.tensor([score])}
    save_file(zero, folder / "judge.safetensors")
    key = Checkpoint(embedder, transformers.AutoModel, torch.float32).key
    about = {"embedder": embedder, "dtype": "float32", "key": key}
    (folder / "judge.json").write_text(json.dumps(about))
    assert Judge(str(folder))([((("user", "?"),), "x")]) == [score]
    return folder


def test_utility_with_a_judge(bench, tmp_path, checkpoints, capsys):
    """30 of 10 to 50 is u = 5. p: classes 0 0 0 1 2: 5 (1 + 0.512 + 0.4096) / 3.3616; q: 5."""
    judge = make_judge(tmp_path / "judge", checkpoints("llama"), 30.0)
    results = bench(ROWS, "--k", 5, "--reward-model", judge)
    row = results["rows"][0]
    assert row["mean_utility"] == pytest.approx((5 * 1.9216 / 3.3616 + 5) / 2)
    assert row["mean_utility_interval"] == pytest.approx([5 * 1.9216 / 3.3616, 5])
    assert results["scorers"]["reward_bins"] == "10 to 50 in ten"
    out = capsys.readouterr().out
    assert f"  {row['mean_utility']:.3g} (2.86 to 5)" in out
    assert "may need others" not in out


def test_the_bins_of_another_reward_model_are_doubted(bench, tmp_path, capsys):
    config = transformers.BertConfig(**ENCODER | {"num_labels": 1})
    make_checkpoint(tmp_path / "rewards", config, AUTO)
    results = bench(ROWS, "--reward-model", tmp_path / "rewards")
    bins = "Skywork-Reward-Gemma-2-27B-v0.2"
    assert results["scorers"]["reward_bins"] == f"those of {bins}"
    assert 1 <= results["rows"][0]["mean_utility"] <= 10
    assert f"warning: the bins are those of {bins}" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The benchmark's own files
# --------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(bench, tmp_path, checkpoints, capsys):
    judge = make_judge(tmp_path / "judge", checkpoints("llama"), 30.0)
    file = tmp_path / "scores.jsonl"
    first = bench([row | {"id": "one"} for row in ROWS], "--reward-model", judge, "--write", file)
    written = lines(file)
    assert written[0] == {
        "id": "one",
        "prompt": "p",
        "model": "m",
        "generations": ["a wall", "wall", "a stop", ROWS[3]["response"], "hat", "beyond k"],
        "partition": [0, 0, 0, 1, 2, 3],
        "distinct": 3,  # the highest class index
        "generation_scores": [5, 0, 0, 5, 5, 5],
        "partition_scores": [5, 5, 5, 5],
        "utility": pytest.approx(5 * (1 + 0.8**3 + 0.8**4 + 0.8**5) / (5 * (1 - 0.8**6))),
    }
    assert [(line["model"], line["prompt"]) for line in written] == [
        ("m", "p"),
        ("m", "q"),
        ("human", "p"),
    ]
    capsys.readouterr()
    again = bench(written, "--reward-model", judge, "--write", file, "--overwrite")
    assert lines(file) == written
    for one, two in zip(first["rows"], again["rows"], strict=True):
        stored = two.pop("stored")
        assert one == two
        assert stored == {
            "prompts": one["prompts"],
            "mean_distinct": one["mean_distinct"],
            "mean_utility": pytest.approx(one["mean_utility"]),
            "distinct_is": "highest class index",
            "largest_difference": {"distinct": 0, "utility": 0, "partition_scores": 0},
        }
    assert "stored  m: from its own partition of 2: distinct 2.500" in capsys.readouterr().out


def own_row(prompt, partition, scores, **more):
    return (
        {"prompt": prompt, "generations": WORDS[: len(partition)], "partition": partition}
        | {"generation_scores": scores}
        | more
    )


def test_a_submission_is_checked_against_its_own_partition_and_scores(bench, capsys):
    """Its partition, not ours: "wall", "stop" and "step" share no word and would be three.

    p: (10 + 0.64 * 4) / 2.44 = 5.14754, held 5: off by 0.14754. q: every generation has its score,
    as newer files have it, but repetitions earn nothing: 6 / 1.8, held exactly; its distinct is
    held as 2 and is 1, where the others hold the number of classes. Of the scores of classes p
    holds 6 for a 4, q 5 for a 6.
    """
    rows = [
        own_row("p", [0, 0, 1], [10, 0, 4], distinct=2, utility=5, partition_scores=[10, 6]),
        own_row("q", [0, 0], [6, 9], distinct=2, utility=6 / 1.8, partition_scores=[5]),
        own_row("r", [0, 1], [1, 1], distinct=2, utility=1),
        own_row("s", [1, 0], [1, 1], distinct=2, utility=1),
        {"prompt": "t", "generations": ["", " "]},  # said nothing, holds nothing
    ]
    (row,) = bench([row | {"model": "m"} for row in rows])["rows"]
    assert row["mean_distinct"] == pytest.approx((3 + 2 + 2 + 2 + 1) / 5)
    assert row["stored"] == {
        "prompts": 4,
        "mean_distinct": (2 + 1 + 2 + 2) / 4,
        "mean_utility": pytest.approx((12.56 / 2.44 + 6 / 1.8 + 2) / 4),
        "distinct_is": "number of classes",
        "largest_difference": {
            "distinct": 1,
            "utility": pytest.approx(12.56 / 2.44 - 5),
            "partition_scores": 2,
        },
    }
    out = capsys.readouterr().out
    assert (
        "distinct 1, utility 0.15, partition_scores 2 (`distinct` is the number of classes)" in out
    )


def test_the_first_versions_distinct_is_one_less(bench, tmp_path):
    rows = [
        own_row("p", [0, 0, 1], [10, 0, 4], distinct=1),
        own_row("q", [0, 1, 2], [1, 2, 3], distinct=2),
        own_row("r", [0, 1, 2], [1, 2, 3], distinct=3),  # not like the others
    ]
    (row,) = bench(rows)["rows"]
    assert row["model"] == str(tmp_path / "responses.jsonl")
    assert row["stored"]["distinct_is"] == "highest class index"
    assert row["stored"]["largest_difference"] == {"distinct": 1}
    assert row["stored"]["mean_distinct"] == pytest.approx(8 / 3)


def test_a_partition_alone_is_checked_for_what_it_holds(bench, capsys):
    (row,) = bench([{"prompt": "p", "generations": WORDS[:2], "partition": [0, 0]}])["rows"]
    assert row["stored"] == {"prompts": 1, "mean_distinct": 1, "largest_difference": {}}
    assert "largest difference from what it holds: it holds none" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

GOOD = own_row("p", [0, 0, 1], [10, 0, 4])


@pytest.mark.parametrize(
    "rows, said",
    [
        ([GOOD, GOOD | {"generations": "wall"}], "2: 'generations' is \"wall\"; expected a list"),
        ([GOOD | {"generations": []}], r"1: 'generations' is \[\]; expected a list"),
        ([GOOD, {"prompt": "q"}], "2: 'generations' is null; expected a list"),
        ([GOOD | {"generations": ["a", 3, "b"]}], "1: 'generations' is 3; expected a non-empty"),
        ([GOOD | {"generations": ["a", "\0"]}], "1: 'generations' holds a NUL"),
        ([GOOD | {"prompt": None}], "1: 'prompt' is missing"),
        (
            [GOOD | {"partition": [0, 1]}],
            "1: 'partition' is .* a list of 3 numbers, one for each gen",
        ),
        ([GOOD | {"partition": [0, "1", 2]}], "1: 'partition' is '1'; expected a number"),
        ([GOOD | {"partition": [0, 0, -1]}], "1: 'partition' is -1; expected a number 0"),
        ([GOOD | {"generation_scores": 5}], "1: 'generation_scores' is 5; expected a list of 3"),
        (
            [GOOD | {"partition_scores": [1, 2, 3]}],
            "1: 'partition_scores' .* list of 2 .* each class",
        ),
        ([GOOD | {"utility": "high"}], "1: 'utility' is 'high'; expected a number"),
        ([GOOD | {"distinct": True}], "1: 'distinct' is True; expected a number"),
        (
            [GOOD, GOOD],
            "2: .* answers this prompt in .*:1 too; expected all its generations in one",
        ),
        ([{"prompt": "p", "response": "a"}, GOOD], "2: 'response' is missing"),
        ([{"prompt": "p", "response": " "}], "1: 'response' is"),
    ],
)
def test_bad_rows_are_told_and_nothing_is_written(bench, tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        bench(rows)
    assert contents(tmp_path).keys() == {"responses.jsonl"}


def test_one_prompt_under_two_ids_is_two_prompts(bench):
    (row,) = bench([GOOD | {"id": "a"}, GOOD | {"id": "b"}])["rows"]
    assert row["prompts"] == 2


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--threshold", "0.5"], "--threshold: it belongs to --equivalence or --embedder"),
        (["--embedder", "E", "--equivalence", "M"], "not allowed with"),
        (["--threshold", "1.5"], "'1.5' is not float"),
        (["--k", "0"], "'0' is not int at least 1"),
        (["--permutations", "-1"], "'-1' is not int at least 0"),
        (["--write", "taken.jsonl"], "--write taken.jsonl: it exists; add --overwrite"),
        (["--write", "./nb.json"], "nb.json: this command names that file twice"),
        (
            ["--write", "responses.jsonl", "--overwrite"],
            "responses.jsonl: this command names that file twice",
        ),
        (
            ["--out", "responses.jsonl"],
            "argument --out: 'responses.jsonl': expected a name in .json",
        ),
        (["--equivalence", "none"], "model none: cannot be loaded"),
        (["--reward-model", "none"], "model none: cannot be loaded"),
    ],
)
def test_bad_flags_are_told_and_nothing_is_harmed(bench, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.jsonl").write_text("precious\n")
    write(tmp_path / "responses.jsonl", ROWS)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=said):
        bench(ROWS, *flags)
    assert contents(tmp_path) == before


def test_classifiers_of_another_kind_are_refused(encoders, tmp_path):
    with pytest.raises(UserError, match="it has 3 outputs; expected 2"):
        Equivalence(encoders("bert", num_labels=3))


def test_real_prompts(bench):
    """The curated hundred, each answered by its own first words: one class, whatever the order."""
    prompts = [row["prompt"] for row in lines(shared("data/noveltybench_prompts.jsonl"))]
    rows = [row for p in prompts for row in responses("m", p, p[:30], p[:30], p[:30])]
    (row,) = bench(rows)["rows"]
    assert (row["prompts"], row["mean_distinct"], row["fewer_than_k"]) == (100, 1, 100)
    assert row["mean_distinct_in_orders"] == {"mean": 1, "least": 1, "most": 1}
