"""eval.py score: the paper's averages, intervals and paired differences by hand; what is shown."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import CONFIGS, contents, load_lm, make_checkpoint, write

import eval as evaluation  # the name of the file is that of a builtin
import scores
from data import Sample

VECTORS = {  # of words and of whole responses; unit vectors in a plane
    "red": (1.0, 0.0),
    "blue": (0.0, 1.0),
    "sky": (0.6, 0.8),
    "red sky": (0.8, 0.6),
}
EMBEDDER = scores.Scorers(embedder=lambda texts: {text: np.array(VECTORS[text]) for text in texts})


def samples_of(task, prompt, *responses, **row):
    return [
        Sample((("user", prompt),), text, {"task": task, **row}, "responses.jsonl:1", score)
        for text, score in responses
    ]


def test_score_averages_over_responses_then_prompts_then_tasks():
    """Semantic distances: red-blue 1, red-sky 0.4, sky-blue 0.2, "red sky"-blue 0.4.

    p: {red, blue}        diversity 1.  DSI of one word 0, of {red, blue} 1: novelty 2, 2, for
                          there is no longer response.
    q: {red, red, red}    diversity 0.  One word only: novelty 0.
    Colours: diversity (1 + 0) / 2, novelty (2 + 0) / 2, quality (15 + 40) / 2.
    r: {red sky, blue}    diversity 0.4.  Novelty leaves blue out, of one word, and what remains has
                          the DSI of itself: 0; quality 30.
    The averages over all 7 responses, or over the 3 prompts, would be others. The human has one
    task, and so no row over tasks. Words: 1 in p and q, (2 + 1) / 2 in r. Of the three reds of q
    two are duplicates. Two prompts drawn from p and q are p, p or q, q in a quarter of the draws
    each, so the interval of Colours reaches from one to the other; r is its task's only prompt.
    """
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
        assert {key: row[key] for key in keys} == pytest.approx(
            dict(zip(keys, values, strict=True)), abs=1e-6
        )
    intervals = [row["diversity_95"] for row in rows]
    assert intervals == [None, pytest.approx((0, 1)), None, pytest.approx((0.2, 0.7))]


def test_runs_of_one_model_are_measured_apart_then_averaged():
    """One run says red twice, the other blue twice: each has diversity 0, together .67.

    Qualities of 1 and 3: 2, and a standard deviation of the runs of sqrt(2) = 1.4.
    """
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
    """Words: 3, 3, 2, and 2 that are one; the second response repeats the first."""
    texts = ["A b, a!", "A b, a!", "c-d  D'Or", "E e."]
    expected = {"words": 10 / 4, "one-word": 1 / 4, "duplicates": 1 / 4}
    assert evaluation.repetition(texts) == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [[30], [12, 40], [1, 25]])
def test_bootstrap_is_that_of_a_plain_loop(sizes):
    """Within the noise of 4,000 draws; and its width is 1.96 standard errors each way."""
    rng = np.random.default_rng(7)
    tasks = [rng.normal(k, 1, n) for k, n in enumerate(sizes)]
    (low,), (high,) = evaluation.bootstrap([task[:, None] for task in tasks])
    plain = []
    for _ in range(4000):
        drawn = [rng.choice(task, max(len(task) - 1, 1)) for task in tasks]
        plain.append(np.mean([np.mean(task) for task in drawn]))
    assert (low, high) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.03)
    errors = [np.std(task) / max(len(task) - 1, 1) ** 0.5 for task in tasks]
    error = np.linalg.norm(errors) / len(sizes)
    centre = np.mean([task.mean() for task in tasks])
    assert (low, high) == pytest.approx(centre + np.array([-1.96, 1.96]) * error, abs=0.15 * error)


def test_bootstrap_of_few_prompts_by_enumeration():
    """Of 1, 2 and 6 two are drawn: nine means, 1 1.5 1.5 2 3.5 3.5 4 4 6, each in a ninth.

    The 2.5th percentile is so 1 and the 97.5th 6. With a task of 0 and 4 besides, of which one is
    drawn, the least mean is (1 + 0) / 2, in an eighteenth of the draws, and the greatest 5. Single
    prompts have no interval. A second measure, here twice the first, has its own.
    """
    three, two, one = (np.array([[x, 2 * x] for x in xs]) for xs in ([1, 2, 6], [0, 4], [5]))
    assert evaluation.bootstrap([three]).tolist() == [[1, 2], [6, 12]]
    assert evaluation.bootstrap([three, two]).tolist() == [[0.5, 1], [5, 10]]
    assert evaluation.bootstrap([one, one]) is None


def test_differences_are_what_loops_over_prompts_give():
    """Each model minus the first; with minus without quality; only prompts that both answer.

    Of several runs the mean counts, over however many runs there are at a prompt.
    """
    rng, cells = np.random.default_rng(1), []
    models = ["base", "CrPO-nov", "DPO", "CrPO-nov-qua", "CrPO-cre", "stranger"]
    for model in models:
        for task, prompt in [("A", "p"), ("A", "q"), ("A", "r"), ("B", "p"), ("B", "s")]:
            if (model, prompt) not in (("DPO", "q"), ("CrPO-nov", "s")) and model != "stranger":
                for run in range(1 if model == "base" else 3 if prompt == "r" else 2):
                    cell = {"model": model, "run": f"{model}{run}", "task": task, "prompt": prompt}
                    cells.append(cell | {"novelty": rng.random(), "quality": rng.random()})
    other = {"model": "stranger", "run": "x", "task": "C", "prompt": "p"}
    cells.append(other | {"novelty": 1.0, "quality": 1.0})

    rows = evaluation.compare(cells, ["novelty", "quality"])
    pairs = [(m, "base") for m in models[1:-1]] + [("CrPO-nov-qua", "CrPO-nov")]
    assert [row["difference"] for row in rows] == [" − ".join(pair) for pair in pairs]
    for row, pair in zip(rows, pairs, strict=True):
        for name in ("novelty", "quality"):
            paired = {}
            for task, prompt in dict.fromkeys((c["task"], c["prompt"]) for c in cells):
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


# ---- The command ---------------------------------------------------------------------------------

RATED = [
    {"model": "m", "task": "Uses", "prompt": "Brick?", "response": "A wall.", "score": 22},
    {"model": "m", "task": "Uses", "prompt": "Brick?", "response": "A stair.", "score": 24},
    {"model": "m", "task": "Lies", "prompt": "Truth?", "response": "Quiet.", "score": 40},
]


@pytest.fixture
def uniform(tmp_path):
    """A surprise model whose head is zero gives each of its 300 tokens 1/300: perplexity 300."""
    folder = make_checkpoint(tmp_path / "uniform", CONFIGS["llama"]())
    lm = load_lm(folder, torch.float32)
    lm.head.zero_()
    lm.model.save_pretrained(tmp_path / "uniform")
    return folder


@pytest.fixture
def score(tmp_path, run_main, checkpoints, uniform):
    """score(rows, *flags): what is printed, and results.json."""

    def call(rows, *flags):
        file, out = write(tmp_path / "r.jsonl", rows), tmp_path / "results.json"
        flags = [*flags, "--embedder", checkpoints("llama"), "--surprise-model", uniform]
        said = run_main("eval", "score", "--responses", file, "--out", out, *flags)
        return said, json.loads(out.read_text())

    return call


@pytest.mark.parametrize("rated", [True, False])
def test_results_and_tables(score, checkpoints, uniform, rated):
    """With a score in every row quality is its mean: (22 + 24) / 2, then (23 + 40) / 2."""
    rows = [dict(row) for row in RATED] + [RATED[0] | {"model": "n", "score": 32}]
    if not rated:
        del rows[2]["score"]
    said, results = score(rows)
    embedded = dict.fromkeys(("novelty", "diversity", "infrequency"), checkpoints("llama"))
    named = embedded | {"surprise": uniform}
    assert results["scorers"] == named | ({"quality": "human scores"} if rated else {})
    assert ("warning: no quality: 1 responses have no score; name a --rew" in said) == (not rated)
    assert evaluation.LEGEND in said
    uses, lies, everything, other = results["rows"]
    assert [row["task"] for row in results["rows"]] == ["Uses", "Lies", "all tasks", "Uses"]
    assert [row["responses"] for row in results["rows"]] == [2, 1, 3, 1]
    assert [row["surprise"] for row in results["rows"]] == pytest.approx([300] * 4, rel=1e-4)
    assert [row.get("quality") for row in results["rows"]] == (
        [23, 40, 31.5, 32] if rated else [None] * 4
    )
    assert 0 < uses["diversity"] < 2
    assert lies["diversity"] == 0  # one response
    assert everything["diversity"] == pytest.approx(uses["diversity"] / 2)
    (difference,) = results["differences"]
    assert (difference["difference"], difference["prompts"]) == ("n − m", 1)
    assert difference.get("quality") == (9 if rated else None)

    lines, signals = said.splitlines(), ["diversity", "novelty", "surprise", "infrequency"]
    signals += ["quality"] * rated
    assert lines[0] == "Results:" and "Differences, prompt by prompt:" in lines
    assert lines[1].replace(" (95 %)", "").split() == [
        *("task", "model", "prompts", "responses"),
        *signals,
    ]
    for line, row in zip(lines[2:6], (everything, lies, uses, other), strict=True):
        shown = [evaluation.in_short(row[key]) for key in signals]
        numbers = [str(row["prompts"]), str(row["responses"]), *shown]
        assert line.split() == [*row["task"].split(), row["model"], *numbers]  # no intervals


def test_a_split_leaves_out_rows_of_another_and_keeps_those_without(score):
    splits = ({"split": "Training"}, {"split": "Test"}, {})
    rows = [row | split for row, split in zip(RATED, splits, strict=True)]
    _, results = score(rows, "--split", "Test")
    found = [(row["task"], row["quality"]) for row in results["rows"]]
    assert found[:2] == [("Uses", 24), ("Lies", 40)]


@pytest.mark.parametrize(
    "odd",
    [{"run": ["one"]}, {"decoding": [1]}, {"decoding": {"temperature": "hot"}}, {"split": ["T"]}],
)
def test_odd_columns_are_no_hindrance(score, odd):
    rows = [{key: row[key] for key in row if key != "model"} | odd for row in RATED]
    assert [row["quality"] for row in score(rows)[1]["rows"]] == [23, 40, 31.5]


def test_a_fifth_signal_is_measured_whether_or_not_it_has_a_scorer(score, monkeypatch):
    fifth = scores.Signal(lambda pools, scorers: [np.ones(len(p.texts)) for p in pools], None)
    monkeypatch.setitem(scores.SIGNALS, "oddity", fifth)
    said, results = score(RATED)
    assert results["rows"][0]["oddity"] == 1 and "oddity" not in results["scorers"]
    assert "quality (95 %)  oddity (95 %)" in said


SHARED = ["--responses", "r.jsonl", "--out", "o.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--responses", "r.jsonl", "./r.jsonl", "--out", "o.json"], "names that file twice"),
        (["--responses", "o.json", "--out", "o.json"], "names that file twice"),
        ([*SHARED, "--figure", "f.bmp"], "--figure f.bmp (Format 'bmp' is not supported"),
        ([*SHARED, "--split", "Tset"], "--split Tset: no response has it"),
        ([*SHARED, "--figure", "f.png"], "matplotlib and a .png"),
        (["--responses", "u.jsonl", "--out", "o.json", "--figure", "f.png"], "against quality"),
    ],
)
def test_what_score_refuses(tmp_path, monkeypatch, refused, flags, message):
    if "matplotlib" in message:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    elif "--figure" in flags:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.jsonl", RATED)
    write(tmp_path / "o.json", RATED)
    write(tmp_path / "u.jsonl", [{**RATED[0], "score": None}])
    assert message in refused("eval", "score", *flags, "--embedder", "nowhere")
    assert len(contents(tmp_path)) == 3


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_the_figure_is_drawn(tmp_path, score, kind):
    pytest.importorskip("matplotlib")
    rows = RATED + [{**row, "model": "n", "prompt": row["prompt"] + "?"} for row in RATED]
    score(rows, "--figure", tmp_path / f"figure.{kind}")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[kind]
    assert (tmp_path / f"figure.{kind}").read_bytes().startswith(start)


def test_the_figure_shows_the_table(monkeypatch):
    """Points and intervals are read back from the panels; humans are two dotted lines."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    row = {"model": "m", "quality": 20, "novelty": 0.1, "diversity": 0.5, "surprise": 300}
    row |= {"quality_95": (19, 22), "novelty_95": (0.05, 0.2), "diversity_95": None}
    row |= {"surprise_95": (200, 900)}
    rows = [row, row | {"model": "human"}]
    evaluation.draw_panels(rows, ["novelty", "diversity", "surprise", "quality"], "figure.png")
    panels = {panel.get_title(): panel for panel in drawn[0].axes}
    assert [*panels] == ["novelty", "diversity", "surprise"]
    for name, expected in (
        ("novelty", [[[19, 0.1], [22, 0.1]], [[20, 0.05], [20, 0.2]], [[20, 0.1]]]),
        ("diversity", [[[19, 0.5], [22, 0.5]], [[20, 0.5], [20, 0.5]], [[20, 0.5]]]),
        ("surprise", [[[19, 300], [22, 300]], [[20, 200], [20, 900]], [[20, 300]]]),
    ):
        *lines, one, other = panels[name].lines
        assert [line.get_xydata().tolist() for line in lines] == expected
        assert one.get_linestyle() == other.get_linestyle() == ":"
        assert [text.get_text() for text in panels[name].texts] == ["m"]
        assert panels[name].get_xlabel() == "quality"
