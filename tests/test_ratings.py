"""data.py ratings: raw ratings become factor scores, noisy raters are dropped.

The plain version of the graded response model stands here: one response, one rating and one point
of a fine grid at a time.
"""

import data

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import read, shared, write


def simulate(N, J, missing=0.0, noise=0, reversed_=0, seed=0):
    """Ratings 1 to 5 of N responses by J raters of a known model.

    Returns truth [N], slope [J] (0: noise, negative: reversed), cuts [J, 4], the bad raters, and
    {rater: rating} of each response.
    """
    rng = np.random.default_rng(seed)
    truth, slope = rng.normal(size=N), rng.lognormal(math.log(1.6), 0.3, J)
    thresholds = np.array([-1.2, -0.3, 0.6, 1.5]) + rng.normal(0, 0.7, (J, 1))
    bad = rng.permutation(J)[: noise + reversed_]
    slope[bad[:noise]] = 0
    slope[bad[noise:]] *= -1
    cuts = thresholds * np.where(slope == 0, 1, abs(slope))[:, None]
    above = 1 / (1 + np.exp(cuts - slope[:, None] * truth[:, None, None]))  # [N, J, 4]
    rating = 1 + (rng.random((N, J, 1)) < above).sum(2)
    present = rng.random((N, J)) >= missing
    rated = [{str(j): float(rating[i, j]) for j in np.flatnonzero(present[i])} for i in range(N)]
    return truth, slope, cuts, {str(j) for j in bad}, rated


def plain_model(rated, slope, cuts, names):
    """Log-likelihood and mean of the posterior of each response, plainly."""
    grid = np.linspace(-9, 9, 3001)
    posteriors = []
    for row in rated:
        density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
        for name, category in row.items():
            j = names.index(name)
            above = [1 / (1 + np.exp(cut - slope[j] * grid)) for cut in cuts[j]]
            above = [np.ones_like(grid), *above, np.zeros_like(grid)]
            density = density * (above[int(category) - 1] - above[int(category)])
        mass = np.trapezoid(density, grid)
        posteriors.append((math.log(mass), np.trapezoid(density * grid, grid) / mass))
    return np.array(posteriors).T


def dropped(raters):
    return {row["rater"] for row in raters if not row["kept"]}


def mean_rating(rated):
    """Each response's plain mean rating: [N]."""
    return np.array([np.mean([*row.values()]) for row in rated])


def correlation(x, y):
    return np.corrcoef(x, y)[0, 1]


def test_a_category_that_a_rater_never_uses_has_no_threshold():
    """Slope 2, cuts -1 and 1; who uses two categories has the first cut alone, who uses one none.

    Of theta 0 the first rater gives P(0) = s(-1), P(2) = s(-1); the second P(0) = s(-1), P(1) the
    rest; the third P(0) = 1. Far from the cuts no P is 0, which has no logarithm.
    """
    ratings = torch.zeros(6, 3, 3).double()  # a response each
    for n, (rater, category) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]):
        ratings[n, rater, category] = 1
    slope, cuts = torch.full((3,), 2.0).double(), torch.tensor([[-1.0, 1.0]] * 3).double()
    P = (data.joint_logps(ratings, slope, cuts) - data.LOG_WEIGHT)[:, len(data.THETA) // 2].exp()
    assert data.THETA[len(data.THETA) // 2].abs() < 1e-9
    expected = [0.268941, 0.462117, 0.268941, 0.268941, 0.731059, 1]
    assert P.tolist() == pytest.approx(expected, abs=1e-6)
    assert data.joint_logps(ratings, 50 * slope, cuts).isfinite().all()


@pytest.mark.parametrize(("J", "missing", "within"), [(3, 0.5, 1e-6), (75, 0, 0.01)])
def test_likelihood_and_scores_are_those_of_the_plain_model(J, missing, within):
    """A response without ratings has log-likelihood 0 and score 0.

    75 ratings leave a posterior of width 0.13, which is hardly wider than the nodes are apart.
    """
    _, slope, cuts, _, rated = simulate(60, J, missing, noise=1, reversed_=1)
    rated += [dict.fromkeys(map(str, range(J)), float(k)) for k in range(1, 6)]  # no gaps in use
    rated += [{}]
    ratings, names = data.one_hot(rated)
    order = [int(name) for name in names]
    fit = torch.tensor(slope[order]), torch.tensor(cuts[order])
    logps = data.joint_logps(ratings, *fit)
    computed = logps.logsumexp(1), logps.softmax(1) @ data.THETA
    expected = plain_model(rated, slope[order], cuts[order], names)
    np.testing.assert_allclose(torch.stack(computed).numpy(), expected, rtol=0, atol=within)
    assert [float(x[-1]) for x in computed] == pytest.approx([0, 0], abs=1e-6)


def test_a_fit_is_a_maximum_of_the_likelihood():
    """Nudging any slope or cut of the fit by 0.02 lowers likelihood times prior."""
    ratings, _ = data.one_hot(simulate(400, 4, 0.2)[-1])
    fit = data.fit_raters(ratings)

    def value(slope, cuts):
        prior = ((slope - data.SLOPE_MEAN) / data.SLOPE_SD).square() / 2
        return float(data.joint_logps(ratings, slope, cuts).logsumexp(1).sum() - prior.sum())

    best = value(*fit)
    for part, parameter in enumerate(fit):
        for k, nudge in itertools.product(range(parameter.numel()), (-0.02, 0.02)):
            moved = [x.clone() for x in fit]
            moved[part].view(-1)[k] += nudge
            assert value(*moved) < best


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.5, 0, 5, 2.5, -1], [2, 1, 3, 2, 0]),
        ([*[1] * 1000, *range(2, 11)], [0] * 1000 + list(range(1, 10))),  # ten, however rare
        (range(100), [k // 10 for k in range(100)]),
        # the middle of 900 more zeros is at 45 %, the others are above 90 %
        ([*[0] * 900, *range(100)], [0] * 901 + [1] * 99),
        # the middle of 190 tens is at 52.5 %, the others are below 5 %
        ([*range(10), *[10] * 190], [0] * 10 + [1] * 190),
    ],
    ids=["in order", "ten values", "tenths", "many low", "many high"],
)
def test_categories_are_distinct_values_or_tenths_of_them(values, expected):
    ratings, _ = data.one_hot([{"a": value} for value in values])
    assert ratings[:, 0].argmax(1).tolist() == expected
    assert (ratings.sum(2) == 1).all()


def test_categories_count_for_each_rater_apart():
    """a uses 1, 3, 5; b only 3; the scale has 1 to 5."""
    ratings, names = data.one_hot([{"a": 1, "b": 3}, {"a": 5}, {"c": 4, "a": 3}, {"c": 2}])
    assert names == ["a", "b", "c"]
    places = [[0, 0, 0], [0, 1, 0], [1, 0, 2], [2, 0, 1], [2, 2, 1], [3, 2, 0]]
    assert ratings.nonzero().tolist() == places


def test_order_names_and_unit_do_not_matter():
    """1 to 5, or the same as -20, -15, ... 0."""
    rated = [row for row in simulate(300, 6, 0.4)[-1] if row]
    scores = data.score_responses(rated)[0]
    shuffled = np.random.default_rng(1).permutation(len(rated))
    other = [{f"r{j}": 5 * x - 25 for j, x in reversed(rated[i].items())} for i in shuffled]
    changed = data.score_responses(other)[0]
    np.testing.assert_allclose(changed, scores[shuffled], atol=2e-3)


def test_scores_run_from_10_to_50():
    """One affine map for all; the reliability is the variance that they had before it."""
    rated = [row for row in simulate(300, 5, 0.5)[-1] if row]
    score, _, reliability = data.score_responses(rated)
    ratings, _ = data.one_hot(rated)
    theta = data.joint_logps(ratings, *data.fit_raters(ratings)).softmax(1) @ data.THETA
    assert [float(x) for x in score.aminmax()] == pytest.approx([10, 50])
    factor = 40 / (theta.max() - theta.min())
    torch.testing.assert_close(score, 10 + factor * (theta - theta.min()))
    assert reliability == pytest.approx(np.var(theta.tolist()))


def test_a_single_rater_keeps_their_order():
    """1 to 4, the prior's slope: scores ascend with the rating."""
    score, (rater,), _ = data.score_responses([{"a": float(x)} for x in (1, 2, 3, 4, 2)])
    assert rater == {"rater": "a", "discrimination": 1, "rated": 5, "kept": True}
    assert score.argsort(stable=True).tolist() == [0, 1, 4, 2, 3]
    assert score[1] == score[4]


@pytest.mark.parametrize(
    "design",  # responses, raters, missing, noise, reversed
    [(300, 3, 0, 1, 0), (300, 20, 0.6, 2, 1), (1000, 75, 0.6, 8, 1), (5000, 4, 0.3, 0, 1)],
    ids=str,
)
def test_noise_and_reversed_raters_are_dropped_and_scores_beat_the_mean(design):
    """The raters dropped are exactly the bad ones; scores are nearer the truth than plain means.

    Nearer even than the mean of the good raters alone, and the reliability of the scores is about
    their squared correlation with the truth.
    """
    truth, _, _, bad, rated = simulate(*design, seed=1)
    truth, rated = truth[[bool(row) for row in rated]], [row for row in rated if row]
    score, raters, reliability = data.score_responses(rated)
    assert dropped(raters) == bad
    scored = ~score.isnan().numpy()
    good = [{j: x for j, x in row.items() if j not in bad} or {"": 0} for row in rated]
    columns = score.numpy(), mean_rating(rated), mean_rating(good)
    ours, mean, best = (correlation(x[scored], truth[scored]) for x in columns)
    assert ours > max(mean + 0.005, best)
    assert reliability == pytest.approx(ours**2, abs=0.06)


def test_after_the_drop_scores_are_those_that_the_others_alone_give():
    rated = simulate(300, 6, 0, 1, 1, seed=1)[-1]
    score, raters, reliability = data.score_responses(rated)
    gone = dropped(raters)
    rest = [{j: x for j, x in row.items() if j not in gone} for row in rated]
    alone, _, expected = data.score_responses(rest)
    torch.testing.assert_close(score, alone, rtol=0, atol=1e-2)
    assert reliability == pytest.approx(expected, abs=1e-4)


def test_no_response_is_scored_that_the_drop_leaves_with_one_rating():
    """Rater 0 is noise. Left out: one rated by 0 and 1, one by 0 alone.

    One rated by 1 alone never had more, and keeps its score.
    """
    rated = [{j: row[j] for j in "123"} for row in simulate(300, 4, seed=1)[-1]]
    rng = np.random.default_rng(0)
    rated = [row | {"0": float(rng.integers(1, 6))} for row in rated]
    rated += [{"0": 3.0, "1": 3.0}, {"0": 3.0}, {"1": 3.0}, {"1": 3.0, "2": 3.0}]
    score, raters, _ = data.score_responses(rated)
    assert dropped(raters) == {"0"}
    expected = [False] * 300 + [True, True, False, False]
    assert score.isnan().tolist() == expected


def records(rated, **columns):
    """Raters' records with a missing rating here and there written as null."""
    return [
        {"task": "Uses", "prompt": "brick", "response": f"r{i}", "note": i}
        | columns
        | {"ratings": [*row.values(), None], "raters": [*map(int, row), "absent"]}
        for i, row in enumerate(rated)
    ]


@pytest.fixture
def rate_file(tmp_path, run_main):
    """rate_file(rows, *flags): the rated rows, the table of raters and what was printed."""

    def call(rows, *flags):
        path, out = write(tmp_path / "raters.jsonl", rows), tmp_path / "rated.jsonl"
        printed = run_main("data", "ratings", "--data", path, "--out", out, *flags)
        return read(out), json.loads((tmp_path / "rated.jsonl.raters.json").read_text()), printed

    return call


@pytest.fixture
def rating_refused(tmp_path, refused):
    """rating_refused(rows, *flags): the sentence with which such a file is refused."""

    def call(rows, *flags):
        path = write(tmp_path / "raters.jsonl", rows)
        out = tmp_path / "rated.jsonl"
        out.write_text("old")  # `refused` holds that it stays
        return refused("data", "ratings", "--data", path, "--out", out, *flags)

    return call


def test_the_ratings_command_writes_rated_records_and_the_raters(tmp_path, rate_file):
    """Two datasets by turns, each on the scale it has alone; rater 3 of the second is noise.

    The rows come in the order of the file and keep their other columns; one that nobody has rated
    is left out. Whoever only ever skips is no rater.
    """
    rng = np.random.default_rng(0)
    one = simulate(200, 3, seed=1)[-1]
    two = [row | {"3": float(rng.integers(1, 6))} for row in simulate(200, 3, seed=2)[-1]]
    pairs = zip(records(one, dataset="A"), records(two, dataset="B"), strict=True)
    rows = [row for pair in pairs for row in pair]
    rated, raters, printed = rate_file([*rows, *records([{}], dataset="C")])

    alone = data.score_responses(one), data.score_responses(two)
    scores = torch.stack([score for score, *_ in alone], 1).flatten().tolist()
    assert rated == [
        {k: v for k, v in row.items() if k not in ("ratings", "raters")} | {"score": round(x, 3)}
        for row, x in zip(rows, scores, strict=True)
    ]
    assert len(data.read_samples(tmp_path / "rated.jsonl", rated=True)) == len(rated) == 400

    assert [(r["dataset"], r["rater"]) for r in raters if not r["kept"]] == [("B", "3")]
    assert [r["rated"] for r in raters] == [200] * 7
    columns = "task dataset language rater discrimination rated kept"
    assert list(raters[0]) == columns.split()
    assert [raters[0][k] for k in ("task", "dataset", "language")] == ["Uses", "A", ""]
    cells = ["200", "200", "4", "1", f"{alone[1][2]:.3f}", "Uses", "/", "B"]
    assert printed.splitlines()[2].split() == cells


def test_a_rater_who_gives_one_value_alone_tells_nothing():
    """The scores are those without that rater; the last response has one rating left, of two."""
    rated = [*simulate(200, 3, seed=2)[-1], {"0": 1.0}]
    score, *_ = data.score_responses(rated)
    same, table, _ = data.score_responses([row | {"dull": 3.0} for row in rated])
    assert torch.equal(score[:-1], same[:-1]) and math.isnan(same[-1])
    assert [row["rater"] for row in table if not row["kept"]] == ["dull"]


GOOD = {"prompt": "p", "response": "r", "ratings": [3, None, 2], "raters": ["a", "b", 3]}


BAD_RATINGS = [
    ('\'raters\' is ["a", "b"]; expected different names', GOOD | {"raters": ["a", "b"]}),
    ("as many as there are 'ratings'; or name their columns by --raters", GOOD | {"ratings": 3}),
    ("'raters' is missing", {"prompt": "p", "response": "r", "score": 3}),
    ("'raters' is", GOOD | {"raters": ["a", 3, "3"]}),
    ("'raters' is", GOOD | {"raters": ["a", "b", 1.5]}),
    ("'raters' is", GOOD | {"raters": ["a", "b", None]}),
    ("'raters' is", GOOD | {"raters": ["a", "b", ""]}),
    ("'rating of 3' is \"three\"; expected a number", GOOD | {"ratings": [3, None, "three"]}),
    ("'rating of 3' is true", GOOD | {"ratings": [3, None, True]}),
    ("'response' is missing", {k: v for k, v in GOOD.items() if k != "response"}),
]


@pytest.mark.parametrize(("message", "row"), BAD_RATINGS)
def test_bad_ratings_are_refused_with_their_place(rating_refused, message, row):
    line = rating_refused([GOOD, row])
    assert "raters.jsonl:2: " in line
    assert message in line


@pytest.mark.parametrize(
    "rated",
    [
        [{"1": 3.0, "2": 4.0}] * 5,
        [{"1": 3.0}, {"2": 4.0}],
        [{"1": 1.0, "2": 5.0}],
        [{"1": 1.0, "2": 2.0}, {"1": 2.0, "2": 1.0}],
        [{"1": 1.0, "2": 2.0, "3": 2.0}, {"1": 2.0, "2": 1.0, "3": 2.0}],
    ],
    ids=["always the same", "no overlap", "one response", "contradiction", "and a constant"],
)
def test_responses_that_cannot_be_told_apart_are_refused(rating_refused, rated):
    line = rating_refused(records([{"1": 1.0}, {"1": 2.0}], task="Fine") + records(rated))
    assert "raters.jsonl:3: in the group 'Uses', which begins here, no two responses" in line


@pytest.mark.parametrize(
    ("rated", "flags", "message"),
    [
        ([{}, {}], (), "no row is left; for pairs, lower"),
        ([{"1": 1.0}] * 2, ("--raters", "cem"), "no row has a column 'cem' (--raters)"),
        ([*simulate(20, 3)[-1], {"0": 1.0, "1": 999.0}], (), "here, 999 stands apart; leave"),
    ],
)
def test_what_ratings_refuses(rating_refused, rated, flags, message):
    assert message in rating_refused(records(rated), *flags)


def test_codes_of_missing_values_are_told_from_a_scale():
    """They stand apart: alone or two together. A scale is none, nor one value of very few."""
    five, z = [1, 2, 3, 4, 5], np.random.default_rng(0).normal(size=999)
    coded = ([1, 2, 2], -9), ([0, 0, 1], 99), (five, -1), (five, -99, -98), (five, 88, 99)
    coded += (five, *[999] * 70), (five, 99, -9), ([1, 2, 2], 98, 99)  # of the first most miss
    for scale, *codes in coded:
        with pytest.raises(data.UserError, match=f"^a.csv {codes[-1]} stands apart; leave"):
            data.check_codes([*scale * 4, *codes], "a.csv")
    for scale in five, z, [0, 1, 500], range(101), range(-3, 4), [-1, 0, 1, 2], [-2, -1, 1, 2]:
        data.check_codes([*scale] * 4, "a.csv")
    data.check_codes([1, 2, 999], "a.csv")


def test_a_row_a_rating_and_a_column_a_rater_are_the_same_ratings(tmp_path, run_main):
    """As psychologists have them, in CSV; a blank cell is a missing rating."""
    lists = [("wall", [1, 2]), ("stop", [2, 2]), ("paint", [5, 4]), ("bed", [4, None])]
    rows = [{"prompt": "brick", "response": text, "ratings": x} for text, x in lists]
    write(tmp_path / "lists.jsonl", [row | {"raters": ["ann", "bob"]} for row in rows])
    column, cell = ["prompt;response;ann;bob"], ["prompt,response,rater,rating"]
    for text, (a, b) in lists:
        column.append(f"brick;{text};{a};{b or ''}")
        cell += [f"brick,{text},ann,{a}", *([f"brick,{text},bob,{b}"] if b else [])]
    (tmp_path / "column.csv").write_text("\n".join(column))
    (tmp_path / "cell.csv").write_text("\n".join(cell))
    columns = ["column.csv", "--raters", "ann", "bob"], ["column.csv", "--raters", "ann bob"]
    rated = []
    for name, *more in (["lists.jsonl"], *columns, ["cell.csv"]):
        out = tmp_path / f"{name}.rated"
        run_main("data", "ratings", "--data", tmp_path / name, "--out", out, *more)
        rated.append(read(out))
    assert rated == 4 * rated[:1] and len(rated[0]) == 4
    (tmp_path / "cell.csv").write_text("\n".join([*cell, cell[1]]))
    with pytest.raises(data.UserError, match=r"cell.csv:9: 'rater' is \"ann\"; expected one"):
        run_main("data", "ratings", "--data", tmp_path / "cell.csv", "--out", out)


@pytest.mark.parametrize("name", ["raters_english.jsonl", "raters_other_languages.jsonl"])
def test_a_noisy_rater_among_real_ones_is_the_one_dropped(name):
    """One who draws from the others' ratings at random, and one who turns the scale around."""
    groups = {}
    for where, row in data.read_jsonl(shared(f"data/{name}")):
        groups.setdefault(row["dataset"], []).append(data.parse_ratings(row, where))
    for rated in groups.values():
        every = [x for row in rated for x in row.values()]
        score, raters, reliability = data.score_responses(rated)
        assert dropped(raters) == set()
        assert correlation(score, mean_rating(rated)) > 0.94 and 0.65 < reliability < 0.85
        rng = np.random.default_rng(0)
        worse = [
            row | {"noise": float(rng.choice(every)), "reversed": 6 - next(iter(row.values()))}
            for row in rated
        ]
        assert dropped(data.score_responses(worse)[1]) == {"noise", "reversed"}
