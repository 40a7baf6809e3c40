"""eval.py: what is generated, and the paper's averages by hand."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import CONFIGS, contents, make_checkpoint

import eval as evaluation  # the name of the file is that of a builtin
from data import Sample, UserError
from scores import Scorers, load_lm
from sft import save_checkpoint

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
