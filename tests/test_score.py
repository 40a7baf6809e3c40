"""eval.py score: the paper's averages, intervals and paired differences by hand; what is shown."""

import eval as evaluation  # the name of the file is that of a builtin
import scores
from data import Sample, UserError

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from conftest import CONFIGS, load_lm, make_checkpoint, write

# of words and of whole responses; unit vectors in a plane
VECTORS = {"red": (1.0, 0.0), "blue": (0.0, 1.0), "sky": (0.6, 0.8), "red sky": (0.8, 0.6)}
EMBEDDER = scores.Scorers(embedder=lambda texts: {text: np.array(VECTORS[text]) for text in texts})


def samples_of(task, prompt, *responses, **row):
    return [
        Sample((("user", prompt),), text, {"task": task, **row}, "responses.jsonl:1", score)
        for text, score in responses
    ]


def test_a_wrong_name_is_reported_before_another_scorer_has_run():
    scorers = scores.Scorers(embedder=lambda texts: pytest.fail("it has run"))
    scorers.surprise_model = "nowhere"
    with pytest.raises(UserError, match="model nowhere: cannot be loaded"):
        evaluation.measure(samples_of("t", "p", ("red", 1)), ["diversity", "surprise"], scorers)


def test_score_averages_over_responses_then_prompts_then_tasks():
    """Semantic distances: red-blue 1, red-sky 0.4, sky-blue 0.2, "red sky"-blue 0.4.

    p: {red, blue}        diversity 1.  DSI of one word 0, of {red, blue} 1: novelty 2, 2, for
                          there is no longer response.
    q: {red, red, red}    diversity 0.  One word only: novelty 0.  Two are duplicates.
    Colours: diversity (1 + 0) / 2, novelty (2 + 0) / 2, quality (15 + 40) / 2.
    r: {red sky, blue}    diversity 0.4.  Novelty leaves blue out, of one word, and what remains has
                          the DSI of itself: 0; quality 30.  Words: (2 + 1) / 2.
    The averages over all 7 responses, or over the 3 prompts, would be others. One of p and q is
    drawn, so the interval of Colours reaches from one to the other; r is its task's only prompt."""
    samples = [
        *samples_of("Skies", "r", ("red", 12), ("red", 14)),  # no model: a human's
        *samples_of("Colours", "p", ("red", 10), ("blue", 20), model="m"),
        *samples_of("Colours", "q", ("red", 30), ("red", 40), ("red", 50), model="m"),
        *samples_of("Skies", "r", ("red sky", 20), ("blue", 40), model="m"),
    ]
    signals = ["novelty", "diversity", "quality"]
    names = (*signals, *evaluation.BESIDE)
    rows = evaluation.tabulate(evaluation.measure(samples, signals, EMBEDDER), names)
    expected = [
        ("human", "Skies", 1, 1, 2, 0, 0, 13, 1, 1 / 2),
        ("m", "Colours", 1, 2, 5, 1, 0.5, 27.5, 1, 1 / 3),
        ("m", "Skies", 1, 1, 2, 0, 0.4, 30, 1.5, 0),
        ("m", "all tasks", 1, 3, 7, 0.5, 0.45, 28.75, 1.25, 1 / 6),
    ]
    keys = ("model", "task", "runs", "prompts", "responses", *signals, "words", "duplicates")
    for row, values in zip(rows, expected, strict=True):
        assert tuple(row[key] for key in keys[:2]) == values[:2]
        assert [row[key] for key in keys[2:]] == pytest.approx(values[2:], abs=1e-6)
    intervals = [row["diversity_95"] for row in rows]
    assert intervals == [None, pytest.approx((0, 1)), None, pytest.approx((0.2, 0.7))]


def test_runs_of_one_model_are_measured_apart_then_averaged():
    """One run says red twice, the other blue twice: each has diversity 0, together .67. Qualities
    of 1 and 3: mean 2, standard deviation sqrt(2) = 1.4."""
    samples = [
        *samples_of("Colours", "p", ("red", 1), ("red", 1), model="m", run="one"),
        *samples_of("Colours", "p", ("blue", 2), ("blue", 4), model="m", run="two"),
    ]
    signals = ["diversity", "quality"]
    (row,) = evaluation.tabulate(evaluation.measure(samples, signals, EMBEDDER), signals)
    assert (row["runs"], row["prompts"], row["responses"]) == (2, 1, 4)
    assert row["diversity"] == pytest.approx(0)
    assert (row["quality"], row["quality_runs"]) == (2, [1, 3])
    shown = evaluation.lay_out([row], ["model", "runs"], ["quality"])
    assert " ".join(shown.split()) == "model runs quality (95 %) m 2 2, runs ± 1.4"


def test_repetition_by_hand():
    """Words: 3, 3, 2, and 2 that are one."""
    actual = evaluation.repetition(["A b, a!", "A b, a!", "c-d  D'Or", "E e."])
    expected = {"words": 10 / 4, "one-word": 1 / 4, "duplicates": 1 / 4}
    assert expected.items() <= actual.items()


@pytest.mark.parametrize("sizes", [[12, 40], [1, 25]])
def test_bootstrap_is_that_of_a_plain_loop(sizes):
    """Within the noise of 4,000 draws; 1.96 standard errors each way; a second measure, here twice
    the first, has its own. Of 1, 2, 6 two are drawn, of 0, 4 one: (1 + 0) / 2 is least, in 1/18."""
    rng = np.random.default_rng(7)
    tasks = [rng.normal(k, 1, n) for k, n in enumerate(sizes)]
    both = evaluation.bootstrap([np.stack([task, 2 * task], 1) for task in tasks])
    low, high = both[:, 0]
    np.testing.assert_allclose(both[:, 1], 2 * both[:, 0])
    plain = []
    for _ in range(4000):
        drawn = [rng.choice(task, max(len(task) - 1, 1)) for task in tasks]
        plain.append(np.mean([np.mean(task) for task in drawn]))
    assert (low, high) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.03)
    errors = [np.std(task) / max(len(task) - 1, 1) ** 0.5 for task in tasks]
    error = np.linalg.norm(errors) / len(sizes)
    centre = np.mean([task.mean() for task in tasks])
    assert (low, high) == pytest.approx(centre + np.array([-1.96, 1.96]) * error, abs=0.15 * error)
    few = [np.array([[1], [2], [6]]), np.array([[0], [4]])]
    assert evaluation.bootstrap(few).tolist() == [[0.5], [5]]
    assert evaluation.bootstrap([np.ones((1, 2))] * 2) is None  # single prompts


def test_differences_are_what_loops_over_prompts_give():
    """Each model minus the first; with minus without quality; only prompts that both answer, and
    the mean over however many runs there are at a prompt."""
    rng, cells = np.random.default_rng(1), []
    models = ["base", "CrPO-nov", "DPO", "CrPO-nov-qua", "CrPO-cre"]
    prompts = [("A", "p"), ("A", "q"), ("A", "r"), ("B", "p"), ("B", "s")]
    for model, (task, prompt) in itertools.product(models, prompts):
        if (model, prompt) not in (("DPO", "q"), ("CrPO-nov", "s")):
            for run in range(1 if model == "base" else 3 if prompt == "r" else 2):
                cell = {"model": model, "run": f"{model}{run}", "task": task, "prompt": prompt}
                cells.append(cell | {"novelty": rng.random(), "quality": rng.random()})
    cells.append(cells[-1] | {"model": "stranger", "task": "C"})

    rows = evaluation.compare(cells, ["novelty", "quality"])
    pairs = [(m, "base") for m in models[1:]] + [("CrPO-nov-qua", "CrPO-nov")]
    assert [row["difference"] for row in rows] == [" − ".join(pair) for pair in pairs]
    for row, pair in zip(rows, pairs, strict=True):
        for name in ("novelty", "quality"):
            paired = {}
            for task, prompt in prompts:
                values = [
                    [c[name] for c in cells if (c["model"], c["task"], c["prompt"]) == key]
                    for key in ((model, task, prompt) for model in pair)
                ]
                if all(values):
                    ours, theirs = map(np.mean, values)
                    paired.setdefault(task, {})[prompt] = ours - theirs
            tasks = [np.array([*task.values()])[:, None] for task in paired.values()]
            interval = evaluation.bootstrap(tasks)[:, 0].tolist()
            assert row[name] == pytest.approx(np.mean([task.mean() for task in tasks]))
            assert row[f"{name}_95"] == pytest.approx(interval)
            assert row["prompts"] == sum(map(len, tasks))


RATED = [
    {"model": "m", "task": "Uses", "prompt": "Brick?", "response": "A wall.", "score": 22},
    {"model": "m", "task": "Uses", "prompt": "Brick?", "response": "A stair.", "score": 24},
    {"model": "m", "task": "Lies", "prompt": "Truth?", "response": "Quiet.", "score": 40},
]


@pytest.fixture
def score(tmp_path, run_main, checkpoints):
    """score(rows, *flags): what is printed, and results.json.

    The surprise model's head is zero, so each of 300 tokens has 1/300: perplexity 300."""
    uniform = make_checkpoint(tmp_path / "uniform", CONFIGS["llama"]())
    lm = load_lm(uniform, torch.float32)
    lm.head.zero_()
    lm.model.save_pretrained(uniform)

    def call(rows, *flags):
        file, out = write(tmp_path / "r.jsonl", rows), tmp_path / "results.json"
        flags = [*flags, "--embedder", checkpoints("llama"), "--surprise-model", uniform]
        printed = run_main("eval", "score", "--responses", file, "--out", out, *flags)
        return printed, json.loads(out.read_text())

    return call


@pytest.mark.parametrize("rated", [True, False])
def test_results_and_tables(score, checkpoints, tmp_path, rated):
    """With a score in every row quality is its mean: (22 + 24) / 2, then (23 + 40) / 2."""
    rows = [dict(row) for row in RATED] + [RATED[0] | {"model": "n", "score": 32}]
    if not rated:
        del rows[2]["score"]
    printed, results = score(rows)
    embedded = dict.fromkeys(("novelty", "diversity", "infrequency"), checkpoints("llama"))
    named = embedded | {"surprise": str(tmp_path / "uniform")}
    assert results["scorers"] == named | ({"quality": "human scores"} if rated else {})
    assert ("no quality: responses without a score: 1; name a --reward" in printed) == (not rated)
    assert evaluation.LEGEND in printed
    uses, lies, everything, other = rows = results["rows"]
    assert [row["task"] for row in rows] == ["Uses", "Lies", "all tasks", "Uses"]
    assert [row["responses"] for row in rows] == [2, 1, 3, 1]
    assert [row["surprise"] for row in rows] == pytest.approx([300] * 4, rel=1e-4)
    quality = [23, 40, 31.5, 32] if rated else [None] * 4
    assert [row.get("quality") for row in rows] == quality
    assert 0 < uses["diversity"] < 2
    assert lies["diversity"] == 0  # one response
    assert everything["diversity"] == pytest.approx(uses["diversity"] / 2)
    (difference,) = results["differences"]
    assert (difference["difference"], difference["prompts"]) == ("n − m", 1)
    assert difference.get("quality") == (9 if rated else None)

    lines, signals = printed.splitlines(), ["diversity", "novelty", "surprise", "infrequency"]
    signals += ["quality"] * rated
    assert lines[0] == "Results:" and "Differences, prompt by prompt:" in lines
    columns = ["task", "model", "prompts", "responses", *signals]
    assert lines[1].replace(" (95 %)", "").split() == columns
    for line, row in zip(lines[2:6], (everything, lies, uses, other), strict=True):
        shown = [evaluation.in_short(row[key]) for key in signals]
        numbers = [str(row["prompts"]), str(row["responses"]), *shown]
        assert line.split() == [*row["task"].split(), row["model"], *numbers]  # no intervals


def test_a_split_leaves_out_rows_of_another_and_keeps_those_without(score):
    splits = ({"split": "Training"}, {"split": "Test"}, {})
    rows = [row | split for row, split in zip(RATED, splits, strict=True)]
    actual = [(r["task"], r["quality"]) for r in score(rows, "--split", "Test")[1]["rows"]]
    assert actual[:2] == [("Uses", 24), ("Lies", 40)]


def test_odd_columns_are_no_hindrance(score):
    odd = {"run": ["one"], "decoding": {"temperature": "hot"}, "split": ["T"]}
    rows = [{key: row[key] for key in row if key != "model"} | odd for row in RATED]
    assert [row["quality"] for row in score(rows)[1]["rows"]] == [23, 40, 31.5]


def test_a_fifth_signal_is_measured_whether_or_not_it_has_a_scorer(score, monkeypatch):
    fifth = scores.Signal(lambda pools, scorers: [np.ones(len(p.texts)) for p in pools], None)
    monkeypatch.setitem(scores.SIGNALS, "oddity", fifth)
    printed, results = score(RATED)
    assert results["rows"][0]["oddity"] == 1 and "oddity" not in results["scorers"]
    assert "quality (95 %)  oddity (95 %)" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("r.jsonl ./r.jsonl", "names that file twice"),
        ("o.json", "names that file twice"),
        ("r.jsonl --figure f.bmp", "--figure f.bmp (Format 'bmp' is not supported"),
        ("r.jsonl --split Tset", "--split Tset: no response has it"),
        ("r.jsonl --figure f.png", "matplotlib and a .png"),
        ("u.jsonl --figure f.png", "against quality"),
    ],
)
def test_what_score_refuses(tmp_path, monkeypatch, refused, flags, message):
    if "matplotlib" in message:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    elif "--figure" in flags:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for name, row in (("r.jsonl", {}), ("o.json", {}), ("u.jsonl", {"score": None})):
        write(tmp_path / name, [RATED[0] | row])
    flags = ["--out", "o.json", "--responses", *flags.split()]
    assert message in refused("eval", "score", *flags, "--embedder", "nowhere")


def test_the_figure_shows_the_table(monkeypatch, tmp_path, score):
    """Points and intervals are read back from the panels; humans are two dotted lines."""
    pytest.importorskip("matplotlib")
    for model in ("m", "human"):
        score([row | {"model": model} for row in RATED], "--figure", tmp_path / f"{model}.png")
        assert (tmp_path / f"{model}.png").read_bytes().startswith(b"\x89PNG")
    drawn, savefig = [], "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, lambda figure, path, **_: drawn.append(figure))
    row = {"model": "m", "quality": 20, "novelty": 0.1, "diversity": 0.5}
    row |= {"quality_95": (19, 22), "novelty_95": (0.05, 0.2), "diversity_95": None}
    rows = [row, row | {"model": "human"}]
    evaluation.draw_panels(rows, ["novelty", "diversity", "quality"], "figure.png")
    panels = {panel.get_title(): panel for panel in drawn[0].axes}
    assert [*panels] == ["novelty", "diversity"]
    for name, expected in (
        ("novelty", [[[19, 0.1], [22, 0.1]], [[20, 0.05], [20, 0.2]], [[20, 0.1]]]),
        ("diversity", [[[19, 0.5], [22, 0.5]], [[20, 0.5], [20, 0.5]], [[20, 0.5]]]),
    ):
        *lines, one, other = panels[name].lines
        assert [line.get_xydata().tolist() for line in lines] == expected
        assert one.get_linestyle() == other.get_linestyle() == ":"
        assert [text.get_text() for text in panels[name].texts] == ["m"]
        assert panels[name].get_xlabel() == "quality"
