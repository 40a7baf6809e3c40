"""data.py ratings: raw ratings become factor scores, noisy raters are dropped.

The plain version of the graded response model stands here: one response, one rating and one point
of a fine grid at a time.
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import shared
from test_data import command, write

import data
from data import make_ratings


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
    there = rng.random((N, J)) >= missing
    rated = [{str(j): float(rating[i, j]) for j in np.flatnonzero(there[i])} for i in range(N)]
    return truth, slope, cuts, {str(j) for j in bad}, rated


def plain_model(rated, slope, cuts, names):
    """Log-likelihood, mean and standard deviation of the posterior of each response, plainly."""
    grid = np.linspace(-9, 9, 3001)
    found = []
    for row in rated:
        density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
        for name, category in row.items():
            j = names.index(name)
            above = [1 / (1 + np.exp(cut - slope[j] * grid)) for cut in cuts[j]]
            above = [np.ones_like(grid), *above, np.zeros_like(grid)]
            density = density * (above[int(category) - 1] - above[int(category)])
        mass = np.trapezoid(density, grid)
        mean = np.trapezoid(density * grid, grid) / mass
        square = np.trapezoid(density * grid**2, grid) / mass
        found.append((math.log(mass), mean, math.sqrt(square - mean**2)))
    return np.array(found).T


def score(rated, **options):
    ratings, names = make_ratings(rated)
    return ratings, names, data.score_responses(ratings, **options)


def dropped(names, scores):
    return {name for name, kept in zip(names, scores.kept, strict=True) if not kept}


def mean_rating(ratings):
    """Each response's plain mean rating: [N], NaN without any."""
    return ratings.response.bincount(ratings.value, ratings.N) / ratings.count()


def correlation(x, y):
    return np.corrcoef(x, y)[0, 1]


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


def test_the_nodes_integrate_the_moments_of_the_normal_distribution():
    """Of N(0, 1): 1, 0, 1, 0, 3, 0, 15."""
    moments = [float((data.LOG_WEIGHT.exp() * data.THETA**k).sum()) for k in range(7)]
    assert moments == pytest.approx([1, 0, 1, 0, 3, 0, 15], abs=2e-5)


def test_the_probability_of_a_category_by_hand(monkeypatch):
    """Slope 2, cuts -1 and 1; at theta 1/2 the line is 1.

    P(>= 1) = s(1 + 1) = 0.880797, P(>= 2) = s(1 - 1) = 1/2, so 0.119203, 0.380797 and 1/2. A
    reversed rater, slope -2: P(>= 1) = s(-1 + 1) = 1/2, P(>= 2) = s(-2) = 0.119203. A rater who
    uses two categories has one cut, -1: 0.119203 and 0.880797. Who uses one: 1.
    """
    monkeypatch.setattr(data, "THETA", torch.tensor([0.5], dtype=torch.float64))
    slope = torch.tensor([2.0, -2.0, 2.0, 2.0], dtype=torch.float64)
    cuts = torch.tensor([[-1.0, 1.0]] * 4, dtype=torch.float64)
    found = data.category_logps(slope, cuts, torch.tensor([3, 3, 2, 1])).exp()[..., 0].tolist()
    assert found[0] == pytest.approx([0.119203, 0.380797, 0.5], abs=1e-6)
    assert found[1] == pytest.approx([0.5, 0.380797, 0.119203], abs=1e-6)
    assert found[2][:2] == pytest.approx([0.119203, 0.880797], abs=1e-6)
    assert found[3][0] == 1


def test_log_probabilities_do_not_cancel():
    """Cuts a billionth apart: P = s'(line) 1e-9, where a difference of sigmoids keeps no digit."""
    slope, cuts = torch.tensor([30.0]).double(), torch.tensor([[0.0, 1e-9]]).double()
    logps = data.category_logps(slope, cuts, torch.tensor([3]))[0, 1]
    line = 30 * data.THETA
    expected = torch.nn.functional.logsigmoid(line) + torch.nn.functional.logsigmoid(-line)
    torch.testing.assert_close(logps, expected + math.log(1e-9), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("J", "missing", "within"), [(3, 0.5, 1e-6), (75, 0, 0.01)])
def test_likelihood_and_scores_are_those_of_the_plain_model(J, missing, within):
    """A response without ratings has log-likelihood 0, score 0 and standard error 1.

    75 ratings leave a posterior of width 0.13, which is hardly wider than the nodes are apart.
    """
    _, slope, cuts, _, rated = simulate(60, J, missing, noise=1, reversed_=1)
    rated += [dict.fromkeys(map(str, range(J)), float(k)) for k in range(1, 6)]  # no gaps in use
    rated += [{}]
    ratings, names = make_ratings(rated)
    order = [int(name) for name in names]
    slope, cuts = slope[order], cuts[order]
    logps = data.category_logps(torch.tensor(slope), torch.tensor(cuts), ratings.used)
    found = data.joint_logps(ratings, logps).logsumexp(1), *data.factor_scores(ratings, logps)
    expected = plain_model(rated, slope, cuts, names)
    np.testing.assert_allclose(torch.stack(found).numpy(), expected, rtol=0, atol=within)
    assert [float(x[-1]) for x in found] == pytest.approx([0, 0, 1], abs=1e-6)


def test_reliability_by_hand():
    """Scores 1, 2, 3 have variance 2/3, errors 0, 0, 1 a mean square of 1/3."""
    error = torch.tensor([0.0, 0, 1])
    assert data.reliability(torch.tensor([1.0, 2, 3]), error) == pytest.approx(2 / 3)


def test_a_fit_finds_the_parameters():
    """3,000 responses, 8 raters of whom each saw 60 %, one reversed, one noise.

    Stated bounds: slopes within 0.25 and cuts within 0.4, and 0.1 and 0.12 on root mean square.
    """
    _, slope, cuts, _, rated = simulate(3000, 8, 0.4, noise=1, reversed_=1)
    ratings, names = make_ratings(rated)
    order = [int(name) for name in names]
    found = [x.numpy() for x in data.fit_raters(ratings)]
    for got, true, most, typical in zip(
        found, (slope[order], cuts[order]), (0.25, 0.4), (0.1, 0.12), strict=True
    ):
        assert abs(got - true).max() < most
        assert np.sqrt(np.square(got - true).mean()) < typical


def test_a_fit_is_a_maximum_of_the_likelihood():
    """Nudging any slope or cut of the fit by 0.02 lowers likelihood times prior."""
    ratings, _ = make_ratings(simulate(400, 4, 0.2)[-1])
    fit = data.fit_raters(ratings)

    def value(slope, cuts):
        joint = data.joint_logps(ratings, data.category_logps(slope, cuts, ratings.used))
        prior = ((slope - data.SLOPE_MEAN) / data.SLOPE_SD).square() / 2
        return float(joint.logsumexp(1).sum() - prior.sum())

    best = value(*fit)
    for part, parameter in enumerate(fit):
        for k, nudge in itertools.product(range(parameter.numel()), (-0.02, 0.02)):
            moved = [x.clone() for x in fit]
            moved[part].view(-1)[k] += nudge
            assert value(*moved) < best


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_girth_agrees(missing):
    """At girth's parameters our log-likelihood and scores are girth's, and our maximum is higher.

    Only a little: girth matches cuts to the shares of the categories and maximises over slopes.
    Its slopes are at least 0.2, its AIC counts no parameters, its difficulty is cut / slope.
    """
    girth = pytest.importorskip("girth")
    rated = simulate(500, 5, missing, seed=3)[-1]
    ratings, names = make_ratings(rated)
    table = np.full((len(names), len(rated)), girth.INVALID_RESPONSE)
    table[ratings.rater, ratings.response] = ratings.value.int()
    bounds = {"quadrature_bounds": (-6, 6), "quadrature_n": 101}
    theirs = girth.grm_mml(table, bounds | {"use_LUT": False, "max_iteration": 100})
    slope = torch.tensor(theirs["Discrimination"])
    cuts = slope[:, None] * torch.tensor(theirs["Difficulty"])

    logps = data.category_logps(slope, cuts, ratings.used)
    likelihood = float(data.joint_logps(ratings, logps).logsumexp(1).sum())
    assert likelihood == pytest.approx(theirs["AIC"]["final"] / -2, abs=1e-4)
    np.testing.assert_allclose(data.factor_scores(ratings, logps)[0], theirs["Ability"], atol=1e-4)

    logps = data.category_logps(*data.fit_raters(ratings), ratings.used)
    ours = float(data.joint_logps(ratings, logps).logsumexp(1).sum())
    assert 0 < ours - likelihood < 1
    assert correlation(data.factor_scores(ratings, logps)[0], theirs["Ability"]) > 0.9995


# --------------------------------------------------------------------------------------------------
# Any scale, any overlap
# --------------------------------------------------------------------------------------------------


def categories(*values, rater="a"):
    return make_ratings([{rater: value} for value in values])[0].category.tolist()


def test_categories_are_the_distinct_values_in_order():
    assert categories(2.5, 0, 5, 2.5, -1) == [2, 1, 3, 2, 0]


def test_a_category_that_a_rater_never_uses_is_none_of_theirs():
    """a uses 1, 3, 5; b only 3; the scale has 1 to 5."""
    ratings, names = make_ratings([{"a": 1, "b": 3}, {"a": 5}, {"c": 4, "a": 3}, {"c": 2}])
    assert names == ["a", "b", "c"]
    assert ratings.used.tolist() == [3, 1, 2]
    assert ratings.category.tolist() == [0, 0, 2, 1, 1, 0]


def test_ten_values_are_ten_categories_however_rare():
    found = categories(*[1] * 1000, *range(2, 11))
    assert found[-10:] == list(range(10))


def test_a_fine_scale_is_cut_into_tenths_that_keep_equal_ratings_together():
    """0 to 99 once each: ten categories of ten.

    With 900 more zeros: their middle is at 45 %, the others are above 90 %. 0 to 9 once each and
    190 tens: the middle of the tens is at 52.5 %, the others are below 5 %.
    """
    assert categories(*range(100)) == [k // 10 for k in range(100)]
    assert categories(*[0] * 900, *range(100)) == [0] * 901 + [1] * 99
    assert categories(*range(10), *[10] * 190) == [0] * 10 + [1] * 190


def test_scores_hardly_depend_on_the_order_or_the_names_of_anything():
    rated = simulate(300, 6, 0.4)[-1]
    one = score(rated, keep_all=True)[2].score
    shuffled = np.random.default_rng(1).permutation(300)
    other = [dict(reversed([(f"r{j}", x) for j, x in rated[i].items()])) for i in shuffled]
    two = score(other, keep_all=True)[2].score
    np.testing.assert_allclose(two, one[shuffled], atol=2e-3)


def test_the_unit_of_the_scale_does_not_matter():
    """1 to 5, or the same ratings as -20, -15, ... 0; severity is in points of the scale."""
    rated = simulate(300, 4)[-1]
    one = score(rated)[2]
    two = score([{j: 5 * x - 25 for j, x in row.items()} for row in rated])[2]
    torch.testing.assert_close(one.score, two.score)
    torch.testing.assert_close(5 * one.severity, two.severity)


def test_scores_run_from_10_to_50_and_errors_shrink_with_them():
    """One affine map for all, with errors by the same factor 40 / (most - least)."""
    ratings, _, found = score(simulate(300, 5, 0.5)[-1], keep_all=True)
    logps = data.category_logps(*data.fit_raters(ratings), ratings.used)
    theta, error = data.factor_scores(ratings, logps)
    rated = ratings.count() > 0
    factor = 40 / (theta[rated].max() - theta[rated].min())
    assert found.score[rated].aminmax() == (10, 50)
    torch.testing.assert_close(
        found.score[rated], 10 + factor * (theta - theta[rated].min())[rated]
    )
    torch.testing.assert_close(found.error[rated], factor * error[rated])


def test_a_single_rater_keeps_their_order():
    """1 to 4, the prior's slope: scores ascend with the rating."""
    _, _, found = score([{"a": float(x)} for x in (1, 2, 3, 4, 2)])
    assert found.slope.item() == pytest.approx(1, abs=1e-3)
    assert found.score.argsort(stable=True).tolist() == [0, 1, 4, 2, 3]
    assert found.score[1] == found.score[4]


def test_a_rater_who_always_gives_the_same_says_nothing():
    """Scores are those without the rater, discrimination is the prior's."""
    rated = simulate(200, 3)[-1]
    one = score(rated, keep_all=True)[2]
    two = score([row | {"same": 3.0} for row in rated], keep_all=True)[2]
    torch.testing.assert_close(one.score, two.score, rtol=0, atol=1e-3)
    assert two.slope[3].item() == pytest.approx(1, abs=1e-3)


def test_severity_is_what_a_rater_gives_less_to_the_same_responses():
    """b gives what a gives minus 1, c sees only the better half of what a sees, and rates like a.

    On plain means c looks mild and b looks harsh; by severity only b is.
    """
    truth, _, _, _, rated = simulate(4000, 4, seed=2)
    rows = [
        {"a": row["0"] + 1, "b": row["0"], "d": row["1"], "e": row["2"]}
        | ({"c": row["0"] + 1} if theta > 0 else {})
        for theta, row in zip(truth, rated, strict=True)
    ]
    ratings, names = make_ratings(rows)
    logps = data.category_logps(*data.fit_raters(ratings), ratings.used)
    severity = dict(zip(names, data.describe_raters(ratings, logps)[0].tolist(), strict=True))
    assert severity["b"] - severity["a"] == pytest.approx(1, abs=0.05)
    assert severity["c"] - severity["a"] == pytest.approx(0, abs=0.25)
    assert sum(severity.values()) == pytest.approx(0, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Which raters stay
# --------------------------------------------------------------------------------------------------


def plain_omega(rated, loading, subset):
    """`mean_omega` of one set of names, one response at a time."""
    total = 0.0
    for row in rated:
        kept = [loading[name] for name in row if name in subset]
        if len(kept) >= 2:
            common = max(sum(kept), 0) ** 2
            noise = sum(1 - x**2 for x in kept) * math.sqrt(len(row) / len(kept))
            total += common / (common + noise)
    return total / len(rated)


def test_the_worth_of_raters_by_hand():
    """Loadings .8, .8 and 0, two responses, the second not rated by the second rater.

    All: 2.56 / (2.56 + .36 + .36 + 1) = .598131 and .64 / (.64 + .36 + 1) = .32; mean .459065.
    Without the third: 2.56 / (2.56 + .72 sqrt(3/2)) = .743807, and 0 with one left; mean .371904.
    Without the second: the first is .64 / (.64 + 1.36 sqrt(3/2)) = .277578, the second as before.
    Reversed raters are no signal: loadings -.8, -.8, 0 are worth 0.
    """
    ratings, _ = make_ratings([{"a": 1, "b": 2, "c": 3}, {"a": 2, "c": 1}])
    subsets = torch.tensor([[True, True, True], [True, True, False], [True, False, True]])
    loading = torch.tensor([0.8, 0.8, 0]).double()
    found = data.mean_omega(ratings, loading, subsets).tolist()
    assert found == pytest.approx([0.459065, 0.371904, (0.277578 + 0.32) / 2], abs=1e-5)
    assert data.mean_omega(ratings, -loading, subsets).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_the_genetic_algorithm_finds_the_best_of_all_subsets(seed):
    """8 raters, so 256 subsets; loadings of either sign, ratings at random."""
    rng = np.random.default_rng(seed)
    names = [str(j) for j in range(8)]
    rated = [{j: float(rng.integers(5)) for j in names if rng.random() < 0.6} for _ in range(40)]
    rated.insert(0, dict.fromkeys(names, 1.0))
    loading = rng.uniform(-0.3, 0.9, 8)
    by_name = dict(zip(names, loading, strict=True))
    every = (set(s) for n in range(9) for s in itertools.combinations(names, n))
    best = max(every, key=lambda subset: plain_omega(rated, by_name, subset))
    kept = data.select_raters(make_ratings(rated)[0], torch.tensor(loading), seed)
    assert {name for name, k in zip(names, kept, strict=True) if k} == best


def test_a_rater_who_changes_nothing_stays():
    """c rates only what nobody else does, where no set of raters is worth anything."""
    rated = [{"a": 1.0, "b": 2.0}] * 3 + [{"c": 1.0}]
    kept = data.select_raters(make_ratings(rated)[0], torch.tensor([0.8, 0.8, 0.0]).double(), 0)
    assert kept.all()


DESIGNS = [  # responses, raters, missing, noise, reversed
    (300, 3, 0, 1, 0),
    (300, 6, 0.3, 1, 1),
    (300, 20, 0.6, 2, 1),
    (1000, 75, 0.6, 8, 1),
    (5000, 10, 0.6, 2, 1),
    (5000, 4, 0.3, 0, 1),
]


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_noise_and_reversed_raters_are_dropped_and_scores_beat_the_mean(design):
    """The raters dropped are exactly the bad ones; scores are nearer the truth than plain means.

    Nearer even than the mean of the good raters alone, and the reliability of the scores is about
    their squared correlation with the truth.
    """
    truth, _, _, bad, rated = simulate(*design, seed=1)
    ratings, names, found = score(rated)
    assert dropped(names, found) == bad
    scored = ~found.score.isnan()
    good = mean_rating(ratings.by(found.kept))[scored]
    ours, mean, best = (
        correlation(x, truth[scored])
        for x in (found.score[scored], mean_rating(ratings)[scored], good)
    )
    assert ours > mean + 0.005
    assert ours > best
    assert found.reliability[1] == pytest.approx(ours**2, abs=0.06)


def test_the_selection_is_a_function_of_the_seed():
    rated = simulate(300, 12, 0.5, 2, 1)[-1]
    one, two = score(rated, seed=7)[2], score(rated, seed=7)[2]
    assert torch.equal(one.kept, two.kept)
    assert torch.equal(one.score.nan_to_num(), two.score.nan_to_num())


def test_all_raters_can_be_kept():
    _, names, found = score(simulate(300, 6, 0.3, 1, 1)[-1], keep_all=True)
    assert dropped(names, found) == set()
    assert found.reliability[0] == found.reliability[1]


def test_after_the_drop_scores_are_those_that_the_others_alone_give():
    rated = simulate(300, 6, 0, 1, 1, seed=1)[-1]
    _, names, found = score(rated)
    gone = dropped(names, found)
    alone = score([{j: x for j, x in row.items() if j not in gone} for row in rated], keep_all=True)
    torch.testing.assert_close(found.score, alone[2].score, rtol=0, atol=1e-2)
    assert found.reliability[1] == pytest.approx(alone[2].reliability[0], abs=1e-4)
    assert found.reliability[0] == score(rated, keep_all=True)[2].reliability[0]


def test_no_response_is_scored_that_the_drop_leaves_with_one_rating():
    """Rater 0 is noise. Left out: one rated by 0 and 1, one by 0 alone, one by nobody.

    One rated by 1 alone never had more, and keeps its score.
    """
    rated = [{j: row[j] for j in "123"} for row in simulate(300, 4, seed=1)[-1]]
    rng = np.random.default_rng(0)
    rated = [row | {"0": float(rng.integers(1, 6))} for row in rated]
    rated += [{"0": 3.0, "1": 3.0}, {"0": 3.0}, {}, {"1": 3.0}, {"1": 3.0, "2": 3.0}]
    _, names, found = score(rated)
    assert dropped(names, found) == {"0"}
    expected = [False] * 300 + [True, True, True, False, False]
    assert found.score.isnan().tolist() == expected
    assert found.error.isnan().tolist() == expected
    assert score(rated, keep_all=True)[2].score.isnan().nonzero().flatten().tolist() == [302]


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def records(rated, **columns):
    """Raters' records with a missing rating here and there written as null."""
    return [
        {"task": "Uses", "prompt": "brick", "response": f"r{i}", "note": i}
        | columns
        | {"ratings": [*row.values(), None], "raters": [*map(int, row), "absent"]}
        for i, row in enumerate(rated)
    ]


def rate_file(tmp_path, monkeypatch, rows, *flags):
    out = tmp_path / "rated.jsonl"
    path = write(tmp_path / "raters.jsonl", *rows)
    command(monkeypatch, "ratings", "--data", path, "--out", out, *flags)
    rated = [json.loads(line) for line in out.read_text().splitlines()]
    return rated, json.loads((tmp_path / "rated.jsonl.raters.json").read_text())


def test_the_ratings_command_writes_rated_records_and_the_raters(tmp_path, monkeypatch, capsys):
    """Two datasets by turns, each on the scale it has alone; rater 3 of the second is noise.

    The rows come in the order of the file and keep their other columns; responses without a score
    are counted. Whoever only ever skips is no rater.
    """
    one = simulate(200, 3, seed=1)[-1]
    rng = np.random.default_rng(0)
    two = [row | {"3": float(rng.integers(1, 6))} for row in simulate(200, 3, seed=2)[-1]]
    two[5] = {}
    rows = [*records(one, dataset="A"), *records(two, dataset="B")]
    rows = [rows[k // 2 + 200 * (k % 2)] for k in range(400)]
    rated, raters = rate_file(tmp_path, monkeypatch, rows)

    alone = torch.cat([score(one)[2].score, score(two)[2].score])
    error = torch.cat([score(one)[2].error, score(two)[2].error])
    expected = [
        {k: v for k, v in row.items() if k not in ("ratings", "raters")}
        | {"score": round(float(alone[k]), 3), "score_se": round(float(error[k]), 3)}
        for row, k in zip(rows, (k // 2 + 200 * (k % 2) for k in range(400)), strict=True)
        if not alone[k].isnan()
    ]
    assert rated == expected
    assert len(rated) == 399
    assert len(data.read_samples(tmp_path / "rated.jsonl", rated=True)) == 399

    assert [(r["dataset"], r["rater"]) for r in raters if not r["kept"]] == [("B", "3")]
    assert len(raters) == 7
    slopes = [r["discrimination"] for r in raters if r["dataset"] == "B"]
    assert slopes == sorted(slopes, reverse=True)
    first = raters[0]
    assert list(first) == [
        "task", "dataset", "language", "rater", "severity", "discrimination", "rated", "kept",
    ]  # fmt: skip
    assert (first["task"], first["dataset"], first["language"]) == ("Uses", "A", "")
    assert {r["rated"] for r in raters if r["dataset"] == "B"} == {199}
    printed = capsys.readouterr().out
    assert "Uses / B" in printed
    assert "1 responses have no score" in printed


def test_the_flags_of_the_ratings_command(tmp_path, monkeypatch):
    """--group-by without a column is one scale for all; --keep-all-raters keeps noise."""
    rng = np.random.default_rng(0)
    rated = [row | {"3": float(rng.integers(1, 6))} for row in simulate(200, 3, seed=2)[-1]]
    rows = [*records(rated[:100], dataset="A"), *records(rated[100:], dataset="B")]
    found, raters = rate_file(tmp_path, monkeypatch, rows, "--group-by", "--keep-all-raters")
    alone = score(rated, keep_all=True)[2]
    assert [row["score"] for row in found] == pytest.approx(alone.score.tolist(), abs=1e-3)
    assert [list(r) for r in raters] == [
        ["rater", "severity", "discrimination", "rated", "kept"]
    ] * 4
    assert all(r["kept"] for r in raters)


GOOD = {"prompt": "p", "response": "r", "ratings": [3, None, 2], "raters": ["a", "b", 3]}
BAD_RATINGS = {
    "two lists of the same length": GOOD | {"raters": ["a", "b"]},
    "two lists of the same length, 'ratings'": GOOD | {"ratings": 3},
    "two lists of the same length, 'ratings' and": {"prompt": "p", "response": "r", "score": 3},
    "'3' is there twice": GOOD | {"raters": ["a", 3, "3"]},
    "'ratings' is \"3\"": GOOD | {"ratings": [3, None, "3"]},
    "'ratings' is true": GOOD | {"ratings": [3, None, True]},
    "'raters' is 1.5": GOOD | {"raters": ["a", "b", 1.5]},
    "'raters' is true": GOOD | {"raters": ["a", "b", True]},
    "'raters' is missing": GOOD | {"raters": ["a", "b", None]},
    "'raters' is \"\"": GOOD | {"raters": ["a", "b", ""]},
    "'response' is missing": {k: v for k, v in GOOD.items() if k != "response"},
}


@pytest.mark.parametrize(("message", "row"), BAD_RATINGS.items())
def test_bad_ratings_are_refused_with_their_place(tmp_path, monkeypatch, capsys, message, row):
    out = tmp_path / "rated.jsonl"
    out.write_text("old")
    path = write(tmp_path / "raters.jsonl", GOOD, row)
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, "ratings", "--data", path, "--out", out)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "raters.jsonl:2: " in line
    assert message in line
    assert out.read_text() == "old"
    assert not (tmp_path / "rated.jsonl.raters.json").exists()


@pytest.mark.parametrize(
    "rated",
    [
        [{"1": 3.0, "2": 4.0}] * 5,
        [{"1": 3.0}, {"2": 4.0}],
        [{"1": 1.0, "2": 5.0}],
        [{}, {}],
    ],
    ids=["each rater always the same", "no overlap", "one response", "nothing"],
)
def test_a_group_that_cannot_be_fitted_is_refused_by_name(tmp_path, monkeypatch, capsys, rated):
    fine = records([{"1": 1.0}, {"1": 2.0}], task="Fine")
    with pytest.raises(SystemExit) as exit:
        rate_file(tmp_path, monkeypatch, fine + records(rated))
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "raters.jsonl:3: in the group 'Uses /  / ', which begins here, no rater" in line


def test_a_group_of_which_the_drop_leaves_nothing_is_refused(tmp_path, monkeypatch, capsys):
    """Without rater 3 only the first response still has two raters, and one makes no scale."""
    kept = torch.tensor([True, True, False])
    monkeypatch.setattr(data, "select_raters", lambda *_: kept)
    rated = [{"1": 1.0, "2": 2.0}, {"1": 2.0, "3": 3.0}, {"2": 1.0, "3": 1.0}]
    with pytest.raises(SystemExit) as exit:
        rate_file(tmp_path, monkeypatch, records(rated))
    assert exit.value.code == 2
    assert "too few responses are left" in capsys.readouterr().err


def test_a_column_that_no_row_has_is_no_group(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        rate_file(tmp_path, monkeypatch, records([{"1": 1.0}] * 2), "--group-by", "tsk")
    assert exit.value.code == 2
    assert "no row has a column 'tsk'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Real ratings
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["raters_english.jsonl", "raters_other_languages.jsonl"])
def test_a_noisy_rater_among_real_ones_is_the_one_dropped(name):
    """One who draws from the others' ratings at random, and one who turns the scale around."""
    groups = {}
    for where, row in data.read_jsonl(shared(f"data/{name}")):
        groups.setdefault(row["dataset"], []).append(data.parse_ratings(row, where))
    for rated in groups.values():
        ratings, names, found = score(rated)
        assert dropped(names, found) == set()
        assert correlation(found.score, mean_rating(ratings)) > 0.94
        assert 0.65 < found.reliability[0] < 0.85
        rng = np.random.default_rng(0)
        every = ratings.value.numpy()
        worse = [
            row | {"noise": float(rng.choice(every)), "reversed": 6 - next(iter(row.values()))}
            for row in rated
        ]
        _, names, spoilt = score(worse)
        assert dropped(names, spoilt) == {"noise", "reversed"}
