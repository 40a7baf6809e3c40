"""eval.py noveltybench: classes and utility by hand, the classifier, the benchmark's own files."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import SMALL, make_checkpoint, make_tokenizer, read, shared, write
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

import eval as evaluation
import scores
from data import UserError
from eval import equivalence, partition, partition_plain, utility
from scores import Checkpoint, Equivalence, Judge


@pytest.fixture
def bench(tmp_path, run_main):
    """bench(rows, *flags) runs the command on these rows: its results, and what it printed."""

    def run(rows, *flags):
        file = write(tmp_path / "responses.jsonl", rows)
        out = tmp_path / "nb.json"
        printed = run_main("eval", "noveltybench", "--responses", file, "--out", out, *flags)
        return json.loads(out.read_text()), " ".join(printed.split())

    return run


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


def test_a_sixth_word_is_for_the_model():
    """And it decides against the shared words: all six, or none."""
    asked = []

    def decide(pairs):
        asked.extend(pairs)
        return [False] * len(pairs)

    same = equivalence(decide)
    five, six = "a b c d e", "a b c d e f"
    assert same([(six, six), (five, five), (six, five)]) == [False, True, False]
    assert same([(five, six), (six, "")]) == [False] * 2
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


# --------------------------------------------------------------------------------------------------
# Utility
# --------------------------------------------------------------------------------------------------


def test_utility_of_three_generations():
    """Weights 1, 0.8, 0.64, in all 2.44. The second repeats the first: (10 + 0 + 0.64 * 4) / 2.44.

    With the first alone it is its score, however many were asked for.
    """
    assert utility([0, 0, 1], [10, 7, 4]) == pytest.approx(12.56 / 2.44)
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
    texts, classes = list(map(str, rewards)), list(range(len(rewards)))

    def reward_model(items):
        return np.array([float(text) for _, text in items], np.float32)

    worth = evaluation.score_firsts([(("user", "?"),)], [texts], [classes], reward_model, bins)
    assert worth == [list(expected)]


def test_only_the_first_of_a_class_is_scored():
    prompts = [(("user", name),) for name in "pq"]
    texts = [["1", "2", "3"], ["4", "5"]]
    asked = []

    def reward_model(items):
        asked.extend(items)
        return np.array([float(text) for _, text in items])

    classes = [[0, 0, 1], [0, 0]]
    worth = evaluation.score_firsts(prompts, texts, classes, reward_model, (2, 3.5))
    assert worth == [[1, 0, 2], [3, 0]]
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


def test_the_command_partitions_by_the_classifier(bench, encoders):
    """Against one comparison at a time; the threshold is put between the probabilities."""
    texts = [f"{text} {k}" for k, pair in enumerate(PAIRS[:4]) for text in pair]
    folder = encoders("deberta")
    rows = [{"model": "m", "prompt": "A use?", "response": text} for text in texts]
    threshold = float(np.median([probability(folder, texts[0], text, 128) for text in texts]))
    results, _ = bench(rows, "--equivalence", folder, "--threshold", threshold)

    def same(pairs):
        return [probability(folder, *pair, 128) > threshold for pair in pairs]

    expected = len(set(partition_plain(texts, same)))
    assert 1 < expected < len(texts)
    assert results["rows"][0]["mean_distinct"] == expected
    assert results["scorers"] == {"equivalence": folder, "threshold": threshold}
    assert bench(rows, "--equivalence", folder)[0]["scorers"]["threshold"] == 0.102


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


def test_results_and_table_by_hand(bench):
    """m, p, the first five of six: "wall" joins "a wall" (2 * 1 >= 2), so does "a stop" (2 >= 2).

    The fourth has 7 words and shares 2 with "a wall": alone. "hat" too. 3 classes; q has 1: mean 2.
    Of resamples of these two means one in four is 1 and one in four 3, so the interval is [1, 3].
    The human's two: 2 * 1 >= 2, one class.
    """
    results, printed = bench(ROWS, "--k", 5)
    model = {"model": "m", "prompts": 2, "fewer_than_k": 1, "mean_distinct": 2}
    human = {"model": "human", "prompts": 1, "fewer_than_k": 1, "mean_distinct": 1}
    assert results == {
        "k": 5,
        "patience": 0.8,
        "scorers": {"equivalence": "shared words"},
        "rows": [
            model | {"mean_distinct_interval": [1, 3]},
            human | {"mean_distinct_interval": None},
        ],
    }
    assert "model prompts fewer than 5 distinct (95 %) m 2 1 2 (1 to 3) human 1 1 1" in printed


def test_cosine_from_the_threshold_on(bench, monkeypatch):
    """Long responses at angles of cosine 0.8 (the default threshold itself), 0.6 and 0."""
    long = [f"{word} and many more words than five" for word in WORDS]
    vectors = dict(zip(long, [(1, 0), (0.8, 0.6), (0.6, 0.8), (0, 1)], strict=True))

    def embedder(texts):
        return {text: np.array(vectors[text]) for text in texts}

    monkeypatch.setattr(scores, "load_embedder", lambda name, dtype: embedder)
    rows = responses("m", "p", *long)

    def distinct(*flags):
        results, _ = bench(rows + rows, "--embedder", "E", *flags)
        threshold = flags[-1] if flags else 0.8
        assert results["scorers"] == {"equivalence": "cosine of E", "threshold": threshold}
        return results["rows"][0]["mean_distinct"]

    assert distinct() == 2  # 0.8 joins, 0.6 does not, and 0 joins 0.6: 0.8 again
    assert distinct("--threshold", 0.6) == 2  # 0.6 joins the first too; 0 is alone
    assert distinct("--threshold", 0.81) == 3  # 0.6 and 0.8 have cosine 0.96
    assert distinct("--threshold", 0) == 1
    assert distinct("--threshold", 1) == 4


def make_judge(folder, embedder, score):
    """A judge to whom every response is worth `score`."""
    folder.mkdir()
    zero = {"weight": torch.zeros(64, dtype=torch.float64), "bias": torch.tensor([score])}
    key = Checkpoint(embedder, transformers.AutoModel, torch.float32).key
    about = {"embedder": embedder, "dtype": "float32", "key": key}
    save_file(zero, folder / "judge.safetensors", {"judge": json.dumps(about)})
    assert Judge(str(folder))([((("user", "?"),), "x")]) == [score]
    return folder


def test_utility_with_a_judge(bench, tmp_path, checkpoints):
    """30 of 10 to 50 is u = 5. p: classes 0 0 0 1 2: 5 (1 + 0.512 + 0.4096) / 3.3616; q: 5."""
    judge = make_judge(tmp_path / "judge", checkpoints("llama"), 30.0)
    results, printed = bench(ROWS, "--k", 5, "--reward-model", judge)
    row = results["rows"][0]
    assert row["mean_utility"] == pytest.approx((5 * 1.9216 / 3.3616 + 5) / 2)
    assert row["mean_utility_interval"] == pytest.approx([5 * 1.9216 / 3.3616, 5])
    assert results["scorers"]["reward_bins"] == "10 to 50 in ten"
    assert f"m 2 1 2 (1 to 3) {row['mean_utility']:.3g} (2.86 to 5)" in printed
    assert "may need others" not in printed


def test_the_bins_of_another_reward_model_are_doubted(bench, tmp_path):
    config = transformers.BertConfig(**ENCODER | {"num_labels": 1})
    make_checkpoint(tmp_path / "rewards", config, AUTO)
    results, printed = bench(ROWS, "--reward-model", tmp_path / "rewards")
    bins = "Skywork-Reward-Gemma-2-27B-v0.2"
    assert results["scorers"]["reward_bins"] == f"those of {bins}"
    assert 1 <= results["rows"][0]["mean_utility"] <= 10
    assert f"warning: the bins are those of {bins}" in printed


# --------------------------------------------------------------------------------------------------
# The benchmark's own files, and bad input
# --------------------------------------------------------------------------------------------------

GOOD = {"prompt": "p", "generations": ["wall", "stop", "step"], "partition": [0, 0, 1]}


def test_the_benchmarks_own_files(bench, tmp_path):
    """Their partition is not read. A model may have said nothing; an id makes another prompt."""
    nothing = {"prompt": "t", "model": "m", "generations": ["", " "]}
    rows = [GOOD, nothing, GOOD | {"model": "m", "id": "a"}, GOOD | {"model": "m", "id": "b"}]
    nameless, model = bench(rows, "--k", 3)[0]["rows"]
    assert (nameless["model"], nameless["mean_distinct"]) == (str(tmp_path / "responses.jsonl"), 3)
    assert (model["prompts"], model["fewer_than_k"]) == (3, 1)
    assert model["mean_distinct"] == pytest.approx((1 + 3 + 3) / 3)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([GOOD, GOOD | {"generations": "wall"}], "2: 'generations' is \"wall\"; expected a list"),
        ([GOOD | {"generations": []}], "1: 'generations' is []; expected a list"),
        ([GOOD, {"prompt": "q"}], "2: 'generations' is null; expected a list"),
        ([GOOD | {"generations": ["a", 3, "b"]}], "1: 'generations' is 3; expected a non-empty"),
        ([GOOD | {"generations": ["a", "\0"]}], "1: 'generations' holds a NUL"),
        ([GOOD | {"prompt": None}], "1: 'prompt' is missing"),
        ([{"prompt": "p", "response": "a"}, GOOD], "2: 'response' is missing"),
        ([{"prompt": "p", "response": " "}], "1: 'response' is"),
    ],
)
def test_bad_rows_are_refused(refused, tmp_path, rows, message):
    file = write(tmp_path / "bad.jsonl", rows)
    said = refused("eval", "noveltybench", "--responses", file, "--out", tmp_path / "nb.json")
    assert said.startswith(f"{file}:{message}")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--threshold 0.5", "--threshold: it belongs to --equivalence or --embedder"),
        ("--embedder E --equivalence M", "not allowed with"),
        ("--embedder E --threshold 1.5", "'1.5' is not float"),
        ("--k 0", "'0' is not int at least 1"),
        ("--out r.jsonl", "argument --out: 'r.jsonl': expected a name in .json"),
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


def test_classifiers_of_another_kind_are_refused(encoders):
    with pytest.raises(UserError, match="it has 3 outputs; expected 2"):
        Equivalence(encoders("bert", num_labels=3))


def test_real_prompts(bench):
    """The curated hundred, each answered by its own first words: one class."""
    prompts = [row["prompt"] for row in read(shared("data/noveltybench_prompts.jsonl"))]
    rows = [row for p in prompts for row in responses("m", p, p[:30], p[:30], p[:30])]
    (row,) = bench(rows)[0]["rows"]
    assert (row["prompts"], row["mean_distinct"], row["fewer_than_k"]) == (100, 1, 100)
