"""eval.py human: the sheet is blind, the page works in a browser, the tally is right by hand."""

import base64
import csv
import io
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter

import numpy as np
import pytest
from conftest import shared
from test_eval import call, write

import eval as evaluation
from data import UserError

MODELS = ("runs/crpo-nov", "gpt-4o", "Zephyr base")
NAN = np.nan


def response_rows(models=MODELS, prompts=6, each=3):
    """`each` responses of each model to each prompt, no two the same."""
    texts = itertools.count()
    return [
        {"model": model, "task": "T", "prompt": f"Prompt {p}?", "response": f"Text {next(texts)}."}
        for model in models
        for p in range(prompts)
        for _ in range(each)
    ]


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    """sheet(rows, *flags) makes a sheet; (rows of its CSV, key)."""

    def make(rows, *flags):
        file = write(tmp_path / "responses.jsonl", rows)
        flags = ["--responses", file, "--out", tmp_path / "sheet.csv", *flags]
        call(monkeypatch, "human", "sheet", *flags)
        key = json.loads((tmp_path / "sheet.key.json").read_text())
        return read(tmp_path / "sheet.csv"), key

    return make


@pytest.fixture
def tally(tmp_path, monkeypatch):
    """tally(name=content, ...) tallies these sheets against sheet.key.json; what it writes."""

    def run(**sheets):
        for name, content in sheets.items():
            (tmp_path / f"{name}.csv").write_bytes(content)
        files = [tmp_path / f"{name}.csv" for name in sheets]
        flags = ["--key", tmp_path / "sheet.key.json", "--out", tmp_path / "human.json"]
        call(monkeypatch, "human", "tally", "--sheets", *files, *flags)
        return json.loads((tmp_path / "human.json").read_text())

    return run


def read(path) -> list[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def filled(rows, delimiter=",", end="\r\n", bom="\ufeff") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return (bom + text.getvalue()).encode()


# --------------------------------------------------------------------------------------------------
# The sheet
# --------------------------------------------------------------------------------------------------


def test_the_sheet_has_each_models_responses_to_the_drawn_prompts(sheet, capsys, tmp_path):
    rows, key = sheet(response_rows(), "--prompts", 4, "--per-prompt", 2)
    written = {(row["prompt"], row["response"]): row["model"] for row in response_rows()}
    assert list(rows[0]) == ["item", "prompt", "response", *evaluation.QUESTIONS]
    assert {tuple(row.values())[3:] for row in rows} == {("", "", "", "")}
    assert [row["item"] for row in rows] == [*key["items"]]
    counts = Counter()
    for row in rows:
        (model,) = key["items"][row["item"]]["models"]
        assert written[row["prompt"], row["response"]] == model
        counts[row["prompt"], model] += 1
    assert len({prompt for prompt, _ in counts}) == 4
    assert counts == dict.fromkeys(counts, 2) and len(counts) == 4 * 3
    assert "4 prompts, 3 models, 24 responses to rate" in capsys.readouterr().out
    assert (tmp_path / "sheet.csv").read_bytes().startswith(b"\xef\xbb\xbfitem,")  # for Excel


def test_nothing_a_rater_gets_names_a_model_and_the_order_tells_none(sheet, tmp_path):
    """Of two responses to each of 30 prompts the first model's comes first about 15 times, sd 2.7;
    so it does when the rows are sorted by id.
    """
    flags = ("--models", *MODELS[:2], "--prompts", 30, "--per-prompt", 1)
    rows, key = sheet(response_rows(prompts=30), *flags)
    assert {model for item in key["items"].values() for model in item["models"]} == {*MODELS[:2]}
    for path in (tmp_path / "sheet.csv", tmp_path / "sheet.html"):
        for word in (*MODELS, "crpo", "gpt", "zephyr", "model", "responses.jsonl"):
            assert word.lower() not in path.read_text().lower(), (path, word)
    by_id = sorted(rows, key=lambda row: (row["prompt"], row["item"]))
    for ordered in (rows, by_id):
        first = [key["items"][row["item"]]["models"] for row in ordered[::2]]
        assert 7 <= first.count([MODELS[0]]) <= 23
    prompts = [row["prompt"] for row in rows[::2]]
    assert prompts == [row["prompt"] for row in rows[1::2]]
    assert prompts != sorted(prompts) and len({*prompts}) == 30


def test_the_seed_alone_decides_the_sheet(sheet):
    rows = response_rows()
    once = sheet(rows, "--seed", 1)
    assert sheet(rows[::-1], "--seed", 1, "--overwrite") == once
    assert sheet(rows, "--seed", 2, "--overwrite") != once


def test_an_item_id_follows_from_its_text_alone(sheet):
    """So a rebuilt key still reads a sheet that is filled in, and an id says nothing more."""
    rows, _ = sheet(response_rows(), "--prompts", 6, "--per-prompt", 3)
    other = [row | {"model": MODELS[k % 3]} for k, row in enumerate(response_rows())]
    again, _ = sheet(other, "--prompts", 6, "--per-prompt", 3, "--seed", 5, "--overwrite")
    assert {row["item"]: row["response"] for row in rows} == {
        row["item"]: row["response"] for row in again
    }
    assert all(row["item"].isalpha() for row in rows)


def test_a_response_of_two_models_is_one_item_and_counts_for_both(sheet):
    rows = [
        {"model": "a", "prompt": "P?", "response": "Same."},
        {"model": "a", "prompt": "P?", "response": "Same."},
        {"prompt": "P?", "response": "Same."},
        {"prompt": "P?", "response": "Other."},
        {"model": "a", "prompt": "Q?", "response": "Same."},
    ]
    rows, key = sheet(rows, "--prompts", 1)
    models = {item["response"]: item["models"] for item in key["items"].values()}
    assert models == {"Same.": ["a", "a", "human"], "Other.": ["human"]}
    assert len(rows) == 2


def test_prompts_can_be_picked_by_a_part_of_their_text(sheet):
    rows, _ = sheet(response_rows(), "--prompts", "mpt 3", "Prompt 5")
    assert {row["prompt"] for row in rows} == {"Prompt 3?", "Prompt 5?"}


def test_a_prompt_of_several_turns_is_shown_under_its_roles(sheet):
    prompt = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "A wall?"}]
    rows = [{"model": m, "prompt": prompt, "response": f"Text {m}."} for m in "ab"]
    rows, _ = sheet(rows, "--prompts", 1, "--per-prompt", 1)
    assert rows[0]["prompt"] == "system: Rhyme.\n\nuser: A wall?"


def test_questions_of_ones_own(sheet, tmp_path):
    rows, key = sheet(response_rows(), "--questions", "humour=Is it funny? x=y", "novelty")
    assert list(rows[0])[3:] == ["humour", "novelty"]
    expected = {"humour": "Is it funny? x=y", "novelty": evaluation.QUESTIONS["novelty"]}
    assert key["questions"] == expected
    assert "Is it funny? x=y" in (tmp_path / "sheet.html").read_text()


FORMULAS = ["=1+1", "+1", "-1 or 2", "@SUM(A1)", "\tTab", "'quoted'", "''=1", "Plain"]


def test_no_spreadsheet_sees_a_formula_and_the_text_comes_back(sheet, tally):
    """Also from spreadsheets that take the apostrophe for their own and drop it."""
    rows = [
        {"model": "ab"[k % 2], "prompt": "=P", "response": text} for k, text in enumerate(FORMULAS)
    ]
    rows, key = sheet(rows, "--prompts", 1, "--per-prompt", 4)
    for row in rows:
        text = key["items"][row["item"]]["response"]
        assert (row["response"] == text) == (text == "Plain")
        assert row["response"].removeprefix("'") == text
        assert row["prompt"] == "'=P"
    results = tally(kept=filled(rows), dropped=filled([
        row | {"response": row["response"].removeprefix("'")} for row in rows
    ]))  # fmt: skip
    assert [rater["blank"] for rater in results["raters"]] == [8 * 4, 8 * 4]


@pytest.mark.parametrize("name", ["sheet.csv", "sheet.html", "sheet.key.json"])
def test_what_exists_is_refused(sheet, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=f"{name} exists; add --overwrite"):
        sheet(response_rows())
    assert (tmp_path / name).read_text() == "precious"
    assert len([*tmp_path.iterdir()]) == 2  # the responses, and this


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "gpt-5"], "--models 'gpt-5': no response is of it; there are .*'gpt-4o'"),
        (["--models", "gpt-4o"], "all responses are of 'gpt-4o'; expected two models"),
        (["--prompts", "7"], "--prompts 7: there are 6 prompts with --per-prompt responses"),
        (["--prompts", "0"], "--prompts 0: there are 6 prompts"),
        (["--per-prompt", "4"], "--prompts 4: there are 0 prompts"),
        (["--prompts", "Prompt", "brick"], "--prompts 'brick': it is in none of the 6 prompts"),
        (["--questions", "=x"], "'=x' does not begin with a name of letters"),
        (["--questions", "item"], "'item' does not begin with a name of letters"),
        (["--out", "sheet.xlsx"], "argument --out: 'sheet.xlsx': expected a name in .csv"),
    ],
)
def test_sheets_that_cannot_be_made(sheet, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        sheet(response_rows(), *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]


# --------------------------------------------------------------------------------------------------
# Filled sheets
# --------------------------------------------------------------------------------------------------

LINES = "Line 1, a comma; a semicolon; and; more; of; them; here\nand \"quotes\".\n\nSo, 'so'."


@pytest.fixture
def two(sheet):
    """A sheet of two items, one question, and its rows rated 4 and 2."""
    rows = [{"model": m, "prompt": "P?", "response": f"{m}: {LINES}"} for m in "ab"]
    rows, _ = sheet(rows, "--prompts", 1, "--per-prompt", 1, "--questions", "creativity")
    rows.sort(key=lambda row: row["response"])
    return [row | {"creativity": value} for row, value in zip(rows, "42", strict=True)]


def means(results, question="creativity"):
    return {row["model"]: row["mean"] for row in results["questions"][question]["models"]}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
@pytest.mark.parametrize("bom", ["\ufeff", ""])
def test_sheets_of_any_spreadsheet_are_read(two, tally, delimiter, end, bom):
    assert means(tally(rater=filled(two, delimiter, end, bom))) == {"a": 4, "b": 2}


def test_what_spreadsheets_do_to_a_sheet_is_borne(two, tally):
    """Another column, another order, 4.0 or 4,0 for 4, CRLF in a cell, blank lines and cells."""
    two[0]["creativity"], two[1]["creativity"] = "4,00", " 2.0 "
    changed = [{"comment": "none", **row, "": ""} for row in two[::-1]]
    for row in changed:
        row["response"] = row["response"].replace("\n", "\r\n")
    content = filled(changed) + b",,,,,\r\n\r\n"
    assert means(tally(rater=content)) == {"a": 4, "b": 2}


def test_one_prompt_has_no_intervals(two, tally, capsys):
    for row in tally(rater=filled(two))["questions"]["creativity"]["models"]:
        assert (row["mean_interval"], row["strength_interval"]) == (None, None)
    assert (
        "warning: 95 % intervals over fewer than ten prompts are too narrow"
        in capsys.readouterr().out
    )


def test_blank_ratings_and_missing_lines_are_counted(two, tally):
    """A blank cell, a cell left off the end of its line, a line left out: no rating of `a`."""
    two[0]["creativity"] = ""
    short = filled(two).replace(b",\r\n", b"\r\n")
    assert len(short) == len(filled(two)) - 1
    results = tally(one=filled(two), two=short, three=filled(two[1:]))
    assert [(rater["ratings"], rater["blank"]) for rater in results["raters"]] == [(1, 1)] * 3
    (b, a) = results["questions"]["creativity"]["models"]
    expected = {"model": "a", "ratings": 0, "mean": None, "strength": None, "win_rates": {}}
    assert a == expected | {"mean_interval": None, "strength_interval": None}
    assert (b["model"], b["ratings"], b["mean"]) == ("b", 3, 2)


def other_item(rows):
    rows[1]["item"] = "bcdfghjkmn"


def out_of_range(rows):
    rows[1]["creativity"] = "6"


def halves(rows):
    rows[1]["creativity"] = "3.5"


def words(rows):
    rows[1]["creativity"] = "very"


def sorted_alone(rows):
    rows[0]["item"], rows[1]["item"] = rows[1]["item"], rows[0]["item"]


def twice(rows):
    rows[1] = rows[0]


def renamed(rows):
    rows[:] = [{("Creative" if k == "creativity" else k): v for k, v in r.items()} for r in rows]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_item, "spoilt.csv:6: item 'bcdfghjkmn' is not in the key; is that of another sheet"),
        (out_of_range, "spoilt.csv:6: 'creativity' is '6'; expected a whole number 1 to 5"),
        (halves, "spoilt.csv:6: 'creativity' is '3.5'; expected a whole number 1 to 5"),
        (words, "spoilt.csv:6: 'creativity' is 'very'; expected a whole number 1 to 5"),
        (sorted_alone, "spoilt.csv:2: the response is not that of item .*sorted without"),
        (twice, "spoilt.csv:6: item '[a-z]*' a second time"),
        (renamed, "spoilt.csv:1: not one column 'creativity'; expected item,prompt,response,crea"),
    ],
)
def test_a_sheet_that_is_wrong_is_refused_by_file_and_line(two, tally, tmp_path, spoil, message):
    """A response has four lines, so the second record begins on line 6."""
    good = filled(two)
    spoil(two)
    (tmp_path / "human.json").write_text("old results")
    with pytest.raises(UserError, match=message):
        tally(good=good, spoilt=filled(two))
    assert (tmp_path / "human.json").read_text() == "old results"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.csv:1: not one column 'item'"),
        (b"PK\x03\x04\xff", "bad.csv: cannot be read; save it as CSV in UTF-8"),
        (b'item,response,creativity\r\n"a"b,c', "bad.csv:2: not a line of CSV"),
    ],
)
def test_what_is_no_sheet_is_refused(two, tally, content, message):
    with pytest.raises(UserError, match=message):
        tally(bad=content)


NO_KEYS = ["", "[]", "{}", '{"questions": {}, "items": {"a": {}}}']
NO_KEYS.append('{"questions": {}, "items": {"a": {"prompt": "p", "response": 1, "models": ["m"]}}}')


@pytest.mark.parametrize("content", NO_KEYS)
def test_what_is_no_key_is_refused(two, tally, tmp_path, content):
    (tmp_path / "sheet.key.json").write_text(content)
    with pytest.raises(UserError, match="not a key of eval"):
        tally(rater=filled(two))


def test_a_sheet_counts_once_and_is_never_overwritten(two, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_bytes(filled(two))
    monkeypatch.chdir(tmp_path)
    twice = "this command names that file twice"
    for sheets, out, message in (
        (["a.csv", "./a.csv"], "out.json", twice),
        (["a.csv"], "./sheet.key.json", twice),
        (["a.csv"], "b.csv", r"argument --out: 'b.csv': expected a name in .json"),
    ):
        flags = ["--sheets", *sheets, "--key", "sheet.key.json", "--out", out]
        with pytest.raises(UserError, match=message):
            call(monkeypatch, "human", "tally", *flags)
    assert (tmp_path / "a.csv").read_bytes() == filled(two)


# --------------------------------------------------------------------------------------------------
# Strengths, agreement, intervals
# --------------------------------------------------------------------------------------------------


def test_two_models_have_the_odds_of_their_wins():
    """6 to 2: p_1 / p_2 = 3, so log strengths of +- log(3) / 2."""
    strengths = evaluation.bradley_terry(np.array([[0.0, 6], [2, 0]]))
    assert strengths == pytest.approx(np.array([0.5, -0.5]) * np.log(3))


def test_each_model_is_expected_to_win_as_often_as_it_did():
    """The likelihood's gradient: wins of i = sum_j n_ij P(i beats j). In one batch, several."""
    wins = np.random.default_rng(0).integers(1, 20, (5, 4, 4)) * (1 - np.eye(4))
    strengths = evaluation.bradley_terry(wins)
    for own, s in zip(wins, strengths, strict=True):
        beats = 1 / (1 + np.exp(s[None, :] - s[:, None]))
        assert ((own + own.T) * beats).sum(1) == pytest.approx(own.sum(1), rel=1e-6)
        assert s.sum() == pytest.approx(0, abs=1e-9)
        assert evaluation.bradley_terry(own) == pytest.approx(s, abs=1e-6)


def test_known_strengths_are_found_again():
    """20,000 games a pair: a log odds has a standard error of about 0.015."""
    known, rng = np.array([0.9, 0.2, -0.1, -1.0]), np.random.default_rng(1)
    wins = np.zeros((4, 4))
    for i, j in itertools.combinations(range(4), 2):
        wins[i, j] = rng.binomial(20000, 1 / (1 + np.exp(known[j] - known[i])))
        wins[j, i] = 20000 - wins[i, j]
    assert evaluation.bradley_terry(wins) == pytest.approx(known, abs=0.05)


def test_who_wins_everything_has_a_finite_strength(sheet, tally):
    """Ten games won, none lost, and half a win each before: odds 10.5 / 0.5, log strength half."""
    rows, key = sheet(response_rows("ab", 10, 1), "--prompts", 10, "--per-prompt", 1)
    for row in rows:
        row["novelty"] = "4" if key["items"][row["item"]]["models"] == ["a"] else "3"
    results = tally(rater=filled(rows))["questions"]["novelty"]["models"]
    assert [row["model"] for row in results] == ["a", "b"]
    assert [row["win_rates"] for row in results] == [{"b": 1}, {"a": 0}]
    assert results[0]["strength"] == pytest.approx(np.log(21) / 2)
    assert results[1]["strength_interval"] == pytest.approx([-np.log(21) / 2] * 2)


def test_alpha_by_hand():
    """Two raters, ratings (1, 1), (2, 2), (1, 2), and one item rated once, which drops out.

    Coincidences 1-1: 2, 2-2: 2, 1-2 and 2-1: 1 each; of 6 values three are 1 and three are 2.
    With two levels every distance is the same d: observed 2 d, expected 2 * 3 * 3 d / 5 = 3.6 d.
    alpha = 1 - 2 / 3.6 = 4/9.
    """
    ratings = np.array([[1, 2, 1, 5], [1, 2, 2, NAN]])
    assert evaluation.krippendorff(ratings) == pytest.approx(4 / 9)


def test_ordinal_alpha_by_hand():
    """Two raters, ratings (1, 1), (2, 4), (4, 4): of 6 values n_1 = 2, n_2 = 1, n_4 = 3.

    Distances squared: 1-2 is 2 + 1 - 3/2 = 1.5, 2-4 is 1 + 3 - 4/2 = 2, 1-4 is 6 - 5/2 = 3.5.
    Observed 2 * 4 = 8. Expected 2 (2 * 1 * 2.25 + 1 * 3 * 4 + 2 * 3 * 12.25) / 5 = 36.
    """
    ratings = np.array([[1.0, 2, 4], [1, 4, 4]])
    assert evaluation.krippendorff(ratings) == pytest.approx(1 - 8 / 36)


def test_alpha_of_krippendorffs_own_example():
    """Four observers, twelve units, ratings missing (Krippendorff 2011, example D): .815."""
    table = """1 2 3 3 2 1 4 1 2 . . .
               1 2 3 3 2 2 4 1 2 5 . 3
               . 3 3 3 2 3 4 2 2 5 1 .
               1 2 3 3 2 4 4 1 2 5 1 ."""
    ratings = [[NAN if x == "." else float(x) for x in line.split()] for line in table.splitlines()]
    assert evaluation.krippendorff(np.array(ratings)) == pytest.approx(0.815, abs=5e-4)


@pytest.mark.parametrize("ratings", [[[3.0, 4, 5]], [[3.0, 3], [3, 3]], [[3, NAN], [NAN, 3]]])
def test_alpha_is_undefined_for_one_rater_or_one_level(ratings):
    assert np.isnan(evaluation.krippendorff(np.array(ratings)))


def test_wins_by_hand():
    """One rater, one prompt: a has 5 and 3, b has 3 and 1, c shares a's 5 and has one blank.

    a - b: wins, wins, tie, wins: 3.5 / 4. a - c: tie, loss: 0.5 / 2. b - c: two losses.
    A second rater has rated only a's: no game, and a's mean is over (5, 3, 1, 1).
    """
    ratings = np.array([[5, 3, 3, 1, NAN], [1, 1, NAN, NAN, NAN]])
    drawn = np.array([[[0, 1], [2, 3], [0, 4]]])
    means, wins, games = evaluation.compare(ratings, drawn)
    assert means[0].tolist() == [2.5, 2, 3]
    second = np.array([[0, 0, 0.75], [0, 0, 0], [0.25, 0, 0]])  # a 1, 1 against c's shared 1: ties
    second[0, 2] = second[2, 0] = 0.5
    first = np.array([[0, 0.875, 0.25], [0.125, 0, 0], [0.75, 1, 0]])
    assert wins[0].tolist() == (first + second).tolist()
    assert games[0].tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]


def test_two_prompts_span_the_interval():
    """Means 2 and 4. A replicate draws one of the two prompts: the interval is from 2 to 4."""
    ratings, drawn = np.array([[2.0, 4, 3, 3]]), np.array([[[0], [2]], [[1], [3]]])
    rows = {row["model"]: row for row in evaluation.tally(ratings, ["a", "b"], drawn)["models"]}
    assert (rows["a"]["mean"], rows["a"]["mean_interval"]) == (3, [2, 4])
    assert rows["b"]["mean_interval"] == [3, 3]


def test_a_model_without_a_rating_comes_last_and_has_no_strength():
    ratings, drawn = np.array([[2.0, 4, NAN]]), np.array([[[0], [1], [2]]])
    rows = evaluation.tally(ratings, ["a", "b", "c"], drawn)["models"]
    assert [(row["model"], row["mean"]) for row in rows] == [("b", 4), ("a", 2), ("c", None)]
    assert rows[2]["strength"] is None and rows[2]["win_rates"] == {}
    assert rows[0]["strength"] > 0 > rows[1]["strength"]


def test_replicates_of_a_mean_have_its_variance():
    """The unbiased variance of a mean of P is s^2 / P; 10,000 replicates know it to some 1.5 %."""
    for P in (2, 4, 9):
        x = np.random.default_rng(P).normal(size=P)
        weights = evaluation.prompt_weights(P, np.random.default_rng(0))
        assert weights.sum(1) == pytest.approx(P)
        replicates = weights[1:] @ x / P
        assert replicates.var() == pytest.approx(x.var(ddof=1) / P, rel=0.15)


def plain_tally(ratings, drawn, prompts):
    """Means and wins of the prompts given, some of them several times, rating by rating."""
    M = drawn.shape[1]
    by_prompt, wins = [[] for _ in range(M)], np.zeros((M, M))
    for p in prompts:
        for i in range(M):
            own = [r[k] for r in ratings for k in drawn[p, i] if not np.isnan(r[k])]
            by_prompt[i] += [sum(own) / len(own)] if own else []
        for r in ratings:
            for i, j in itertools.permutations(range(M), 2):
                pairs = [(r[a], r[b]) for a in drawn[p, i] for b in drawn[p, j]]
                pairs = [pair for pair in pairs if not np.isnan(pair).any()]
                won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
                wins[i, j] += won / len(pairs) if pairs else 0
    return [np.mean(own) if own else NAN for own in by_prompt], wins


def test_tally_is_what_loops_over_prompts_raters_and_ratings_give():
    """Blank ratings, shared items, and every replicate of the bootstrap for itself."""
    rng = np.random.default_rng(3)
    P, M, K, J, N = 5, 3, 2, 3, 20
    drawn = np.sort(rng.integers(0, 4, (P, M, K)), -1) + 4 * np.arange(P)[:, None, None]
    ratings = rng.integers(1, 6, (J, N)).astype(float)
    ratings[rng.random((J, N)) < 0.3] = NAN
    found = evaluation.tally(ratings, ["a", "b", "c"], drawn)
    rows = sorted(found["models"], key=lambda row: row["model"])
    assert [row["strength"] for row in found["models"]] == sorted(
        (row["strength"] for row in rows), reverse=True
    )

    prior = evaluation.PRIOR * (1 - np.eye(M))
    mean, wins = plain_tally(ratings, drawn, range(P))
    assert [row["mean"] for row in rows] == pytest.approx(mean)
    strengths = evaluation.bradley_terry(wins + prior)
    assert [row["strength"] for row in rows] == pytest.approx(strengths.tolist(), abs=1e-6)
    for i, j in itertools.permutations(range(M), 2):
        rate = wins[i, j] / (wins[i, j] + wins[j, i])
        assert rows[i]["win_rates"]["abc"[j]] == pytest.approx(rate)

    replicates = []
    for weights in evaluation.prompt_weights(P, np.random.default_rng(0))[1:301]:
        times = np.rint(weights * (P - 1) / P).astype(int)
        mean, wins = plain_tally(ratings, drawn, np.repeat(np.arange(P), times))
        replicates.append((mean, evaluation.bradley_terry(wins * P / (P - 1) + prior)))
    expected = np.quantile(np.array(replicates), (0.025, 0.975), axis=0)
    with pytest.MonkeyPatch.context() as patch:
        everything = evaluation.prompt_weights
        patch.setattr(evaluation, "prompt_weights", lambda *of: everything(*of)[:301])
        rows = evaluation.tally(ratings, ["a", "b", "c"], drawn)["models"]
    for row in rows:
        m = "abc".index(row["model"])
        assert row["mean_interval"] == pytest.approx(expected[:, 0, m].tolist())
        assert row["strength_interval"] == pytest.approx(expected[:, 1, m].tolist(), abs=1e-6)


def test_planted_strengths_come_through_sheet_and_tally(sheet, tally, capsys):
    """Raters who rank the three responses to a prompt by Luce's rule, rated 5, 3, 1.

    Strength + Gumbel noise, sorted, makes i beat j with probability p_i / (p_i + p_j). 60 prompts,
    4 raters: 240 games a pair, a log odds within about 0.14.
    """
    planted = dict(zip(MODELS, (1.0, -0.2, -0.8), strict=True))
    flags = ("--prompts", 60, "--per-prompt", 1, "--questions", "creativity")
    rows, key = sheet(response_rows(prompts=60, each=1), *flags)
    rng, sheets = np.random.default_rng(5), {}
    for rater in ("ann", "bob", "cem", "dee"):
        worth = {
            row["item"]: planted[key["items"][row["item"]]["models"][0]] + rng.gumbel()
            for row in rows
        }
        own = sorted(rows, key=lambda row: (row["prompt"], -worth[row["item"]]))
        own = [row | {"creativity": (5, 3, 1)[k % 3]} for k, row in enumerate(own)]
        rng.shuffle(own)
        sheets[rater] = filled(own)
    results = tally(**sheets)
    found = results["questions"]["creativity"]
    assert [row["model"] for row in found["models"]] == [*MODELS]
    for row in found["models"]:
        low, high = row["strength_interval"]
        assert low < row["strength"] < high and 0.2 < high - low < 0.8
        assert row["strength"] == pytest.approx(planted[row["model"]], abs=0.3)
        assert row["ratings"] == 240
    assert 0 < found["alpha"] < 0.6
    assert results["prompts"] == 60 and len(results["raters"]) == 4

    lines = capsys.readouterr().out.splitlines()
    assert not any("fewer than ten prompts" in line for line in lines)
    first = found["models"][0]
    (shown,) = [line for line in lines if MODELS[0] in line]
    numbers = [first["mean"], *first["mean_interval"], first["strength"]]
    numbers += [*first["strength_interval"], *first["win_rates"].values()]
    cells = shown.replace("(", " ").replace(")", " ").replace(" to ", " ").split()
    assert cells == ["1", MODELS[0], *(f"{x:.3g}" for x in numbers[:6]), "-", *cells[-2:]]
    assert sorted(cells[-2:]) == sorted(f"{x:.3g}" for x in numbers[6:])


# --------------------------------------------------------------------------------------------------
# The page, in a browser
# --------------------------------------------------------------------------------------------------

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Browser:
    """Chromium without a window, driven by its DevTools protocol over a pipe."""

    def __init__(self, folder):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        # It takes commands at file descriptor 3 and answers at 4
        shell = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh"]
        self.process = subprocess.Popen(
            [*shell, PROGRAM, *flags, f"--user-data-dir={folder / 'profile'}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.watchdog = threading.Timer(120, self.process.kill)
        self.watchdog.start()
        self.calls, self.rest, self.session, self.target = 0, b"", {}, ""
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def send(self, method, **params):
        """The result of a command; events in between are dropped."""
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params, **self.session}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while True:
            while b"\0" not in self.rest:
                more = os.read(self.process.stdout.fileno(), 1 << 16)
                assert more, "the browser has ended"
                self.rest += more
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.calls:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url):
        """Close the tab, if any, and open another."""
        self.session = {}
        old = self.target
        self.target = self.send("Target.createTarget", url=url)["targetId"]
        if old:
            self.send("Target.closeTarget", targetId=old)
        attached = self.send("Target.attachToTarget", targetId=self.target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def js(self, expression):
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression):
        for _ in range(200):
            if self.js(expression):
                return
            time.sleep(0.05)
        raise AssertionError(expression)

    def press(self, *keys):
        for key in keys:
            code = {"Tab": 9, "ArrowRight": 39, " ": 32}.get(key, ord(key[0]))
            text = key if len(key) == 1 else ""
            event = {"key": key, "windowsVirtualKeyCode": code, "text": text}
            self.send("Input.dispatchKeyEvent", type="keyDown", **event)
            self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, element):
        """A press of the mouse on the middle of what the expression gives."""
        box = f"{element}.getBoundingClientRect().toJSON()"
        self.js(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.js(box)
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "button": "left", "clickCount": 1, **at}
            self.send("Input.dispatchMouseEvent", **event)

    def screenshot(self, path, width, dark):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def close(self):
        self.watchdog.cancel()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def browser(tmp_path):
    if not PROGRAM:
        pytest.skip("needs chromium")
    browser = Browser(tmp_path)
    yield browser
    browser.close()


NASTY = [
    "<b>bold</b> & <script>document.title = 'broken'</script>",
    "</script><img src=x onerror=\"document.title = 'broken'\">",
    '=HYPERLINK("http://example.com"), "quoted"\n\n  and a last line',
    "'tis @SCALE@ \u2028 @DATA@ <!--",
]


def rating(item, question, value):
    """The circle that a rater clicks."""
    name = json.dumps(f"{item} {question}")
    return f"document.querySelector(`[name={name}][value='{value}'] + span`)"


def test_the_page_is_filled_in_by_key_and_click_and_survives_a_closed_tab(
    sheet, tally, browser, tmp_path
):
    rows = [{"model": "xab"[k % 2], "prompt": "P <i>?", "response": t} for k, t in enumerate(NASTY)]
    rows, key = sheet(rows, "--prompts", 1, "--questions", "novelty", "creativity")
    ids, texts = [row["item"] for row in rows], [key["items"][row["item"]] for row in rows]
    url = (tmp_path / "sheet.html").as_uri()
    browser.open(url)
    shown = "[...document.querySelectorAll('article p')].map((p) => p.textContent)"
    assert browser.js(shown) == [item["response"] for item in texts]
    assert browser.js("document.querySelector('h2').textContent") == "P <i>?"
    assert browser.js("document.title") == "Rating sheet"
    assert browser.js("document.querySelector('output').textContent") == "0 of 8"

    # From the name by Tab, past the buttons, to the first question; digits go on by themselves
    browser.click("document.querySelector('#name')")
    browser.send("Input.insertText", text="Ann O'Hara")
    browser.press("Tab", "Tab", "Tab", "5", "4", "2", "1")
    # A digit and 0 leave the second of the third item blank, an arrow takes 2 of the next
    browser.press("3", "9", "x", "Tab", " ", "ArrowRight")
    browser.click("document.querySelector('#next')")
    assert browser.js("document.activeElement.name") == f"{ids[2]} creativity"
    before = [5, 4, 2, 1, 3, None, 2, None]
    browser.click(rating(ids[3], "creativity", 4))
    assert browser.js("document.querySelector('output').textContent") == "7 of 8"

    browser.open(url)  # another tab, the first is closed
    assert browser.js("document.querySelector('output').textContent") == "7 of 8"
    assert browser.js("document.querySelector('#name').value") == "Ann O'Hara"
    browser.click(rating(ids[3], "creativity", 4))  # a second click takes it back
    assert browser.js("document.querySelector('output').textContent") == "6 of 8"
    browser.click(rating(ids[0], "novelty", 1))
    browser.press("0")
    assert browser.js("document.querySelector('output').textContent") == "5 of 8"
    browser.press("5")
    browser.click("document.querySelector('#save')")
    saved = tmp_path / "sheet.Ann-O-Hara.csv"
    assert "2 ratings blank" in browser.js("document.querySelector('[role=status]').textContent")
    for _ in range(100):
        if saved.exists():
            break
        time.sleep(0.05)
    assert browser.js("performance.getEntriesByType('resource').length") == 0

    assert saved.read_bytes().startswith(b"\xef\xbb\xbf")
    given = [row[q] for row in read(saved) for q in ("novelty", "creativity")]
    assert given == ["" if value is None else str(value) for value in before]
    texts = [{k: row[k] for k in ("item", "prompt", "response")} for row in read(saved)]
    assert texts == [{k: row[k] for k in ("item", "prompt", "response")} for row in rows]
    results = tally(**{"sheet.Ann-O-Hara": saved.read_bytes()})
    assert results["raters"][0] | {"sheet": ""} == {"sheet": "", "ratings": 6, "blank": 2}


def test_the_page_asks_for_a_name_and_starts_again(sheet, browser, tmp_path):
    rows, _ = sheet(response_rows("ab", 1, 1), "--prompts", 1, "--per-prompt", 1)
    url = (tmp_path / "sheet.html").as_uri()
    browser.open(url)
    browser.click(rating(rows[0]["item"], "novelty", 5))
    browser.click("document.querySelector('#save')")
    assert "write your name" in browser.js("document.querySelector('[role=status]').textContent")
    assert browser.js("document.activeElement.id") == "name"
    assert not [*tmp_path.glob("sheet.*.csv")]
    browser.js("window.confirm = () => false")
    browser.click("document.querySelector('#clear')")
    assert browser.js("document.querySelector('output').textContent") == "1 of 8"
    browser.js("window.confirm = () => true")
    browser.click("document.querySelector('#clear')")
    assert browser.js("document.querySelector('output').textContent") == "0 of 8"
    browser.open(url)
    assert browser.js("document.querySelectorAll('main :checked').length") == 0


def test_a_page_of_real_responses(monkeypatch, tmp_path, browser):
    """People's sentences, two halves of them as two models; shown as they are, in every mode."""
    with open(shared("data/human_rated.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if '"HeldoutTask"' in line]
    rows = [row | {"model": f"half {k % 2}"} for k, row in enumerate(rows)]
    flags = ["--responses", write(tmp_path / "r.jsonl", rows), "--out", tmp_path / "sheet.csv"]
    call(monkeypatch, "human", "sheet", *flags)
    browser.open((tmp_path / "sheet.html").as_uri())
    shown = browser.js("[...document.querySelectorAll('article p')].map((p) => p.textContent)")
    items = json.loads((tmp_path / "sheet.key.json").read_text())["items"]
    assert shown == [item["response"] for item in items.values()]
    assert browser.js("getComputedStyle(document.querySelector('header')).position") == "sticky"
    for width in (1200, 360):
        browser.screenshot(tmp_path / f"{width}.png", width, dark=False)
        assert browser.js("document.documentElement.scrollWidth") <= width
