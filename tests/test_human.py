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
from conftest import shared, write

import eval as evaluation

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
def sheet(tmp_path, run_main):
    """sheet(rows, *flags) makes a sheet; (rows of its CSV, key)."""

    def make(rows, *flags):
        file = write(tmp_path / "responses.jsonl", rows)
        run_main("eval", "human", "sheet", "--responses", file, "--out", tmp_path / "s.csv", *flags)
        return read_csv(tmp_path / "s.csv"), json.loads((tmp_path / "s.key.json").read_text())

    return make


@pytest.fixture
def tally(tmp_path, run_main):
    """tally(name=content, ...) tallies these sheets against s.key.json: (printed, written)."""

    def run(**sheets):
        for name, content in sheets.items():
            (tmp_path / f"{name}.csv").write_bytes(content)
        files = [tmp_path / f"{name}.csv" for name in sheets]
        flags = ["--key", tmp_path / "s.key.json", "--out", tmp_path / "human.json"]
        said = run_main("eval", "human", "tally", "--sheets", *files, *flags)
        return said, json.loads((tmp_path / "human.json").read_text())

    return run


def read_csv(path) -> list[dict]:
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


def test_the_sheet_has_each_models_responses_to_the_drawn_prompts(sheet, tmp_path):
    rows, key = sheet(response_rows(), "--prompts", 4, "--per-prompt", 2)
    written = {(row["prompt"], row["response"]): row["model"] for row in response_rows()}
    assert list(rows[0]) == ["item", "prompt", "response", *evaluation.QUESTIONS]
    assert {tuple(row.values())[3:] for row in rows} == {("", "", "", "")}
    assert [row["item"] for row in rows] == [*key["items"]]
    assert key["questions"] == evaluation.QUESTIONS
    counts = Counter()
    for row in rows:
        (model,) = key["items"][row["item"]]["models"]
        assert written[row["prompt"], row["response"]] == model
        counts[row["prompt"], model] += 1
    assert len({prompt for prompt, _ in counts}) == 4
    assert counts == dict.fromkeys(counts, 2) and len(counts) == 4 * 3
    assert (tmp_path / "s.csv").read_bytes().startswith(b"\xef\xbb\xbfitem,")  # for Excel


def test_nothing_a_rater_gets_names_a_model_and_the_order_tells_none(sheet, tmp_path):
    """Of two responses to each of 30 prompts the first model's comes first about 15 times, sd 2.7;
    so it does when the rows are sorted by id.
    """
    flags = ("--prompts", 30, "--per-prompt", 1)
    rows, key = sheet(response_rows(MODELS[:2], prompts=30), *flags)
    for path in (tmp_path / "s.csv", tmp_path / "s.html"):
        for word in (*MODELS, "crpo", "gpt", "zephyr", "model", "responses.jsonl"):
            assert word.lower() not in path.read_text().lower(), (path, word)
    by_id = sorted(rows, key=lambda row: (row["prompt"], row["item"]))
    for ordered in (rows, by_id):
        first = [key["items"][row["item"]]["models"] for row in ordered[::2]]
        assert 7 <= first.count([MODELS[0]]) <= 23
    prompts = [row["prompt"] for row in rows[::2]]
    assert prompts == [row["prompt"] for row in rows[1::2]]
    assert prompts != sorted(prompts) and len({*prompts}) == 30


def test_the_seed_alone_decides_the_sheet_and_the_text_alone_an_id(sheet):
    """So a rebuilt key still reads a sheet that is filled in, and an id says nothing more."""
    rows = response_rows()
    once, key = sheet(rows, "--seed", 1)
    assert sheet(rows[::-1], "--seed", 1, "--overwrite") == (once, key)
    assert sheet(rows, "--seed", 2, "--overwrite")[0] != once
    everything = ("--prompts", 6, "--per-prompt", 3, "--overwrite")
    one, _ = sheet(rows, *everything)
    other = [row | {"model": MODELS[k % 3]} for k, row in enumerate(rows)]
    two, _ = sheet(other, *everything, "--seed", 5)
    ids = [{row["item"]: row["response"] for row in each} for each in (one, two)]
    assert ids[0] == ids[1] and all(name.isalpha() for name in ids[0])


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


def test_a_prompt_of_several_turns_is_shown_under_its_roles(sheet):
    prompt = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "A wall?"}]
    rows = [{"model": m, "prompt": prompt, "response": f"Text {m}."} for m in "ab"]
    rows, _ = sheet(rows, "--prompts", 1, "--per-prompt", 1)
    assert rows[0]["prompt"] == "system: Rhyme.\n\nuser: A wall?"


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
    dropped = [row | {"response": row["response"].removeprefix("'")} for row in rows]
    _, results = tally(kept=filled(rows), dropped=filled(dropped))
    assert results["questions"]["novelty"]["blank"] == 2 * 8


NASTY = [
    "<b>bold</b> & <script>document.title = 'broken'</script>",
    "</script><img src=x onerror=\"document.title = 'broken'\">",
    '=HYPERLINK("http://example.com"), "quoted"\n\n  and a last line',
    "'tis \u2028 /*DATA*/ <!--",
]


def test_no_text_ends_the_data_of_the_page(sheet, tmp_path):
    rows = [{"model": "xab"[k % 2], "prompt": "P <i>?", "response": t} for k, t in enumerate(NASTY)]
    rows, _ = sheet(rows, "--prompts", 1)
    page = (tmp_path / "s.html").read_text("utf-8")
    assert page.count("</script>") == 2 and "<img" not in page
    filling = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert filling["rows"] == [[row[key] for key in ("item", "prompt", "response")] for row in rows]
    assert (filling["questions"], filling["scale"]) == (evaluation.QUESTIONS, evaluation.SCALE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "7"], "--prompts 7: only 6 prompts have --per-prompt responses"),
        (["--prompts", "0"], "argument --prompts: '0' is not int at least 1"),
        (["--per-prompt", "4"], "--prompts 4: only 0 prompts have"),
        (["--out", "s.xlsx"], "argument --out: 's.xlsx': expected a name in .csv"),
        (["--responses", "alone.jsonl"], "all responses are of 'gpt-4o'; expected two models"),
        (["--out", "old.csv"], "old.csv exists; add --overwrite"),
        (["--out", "page.csv"], "page.html exists; add --overwrite"),
        (["--out", "key.csv"], "key.key.json exists; add --overwrite"),
    ],
)
def test_sheets_that_cannot_be_made(tmp_path, monkeypatch, refused, flags, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.jsonl", response_rows())
    write(tmp_path / "alone.jsonl", response_rows(["gpt-4o"]))
    for name in ("old.csv", "page.html", "key.key.json"):
        (tmp_path / name).write_text("precious")
    said = refused("eval", "human", "sheet", "--responses", "r.jsonl", "--out", "s.csv", *flags)
    assert message in said


# --------------------------------------------------------------------------------------------------
# Filled sheets
# --------------------------------------------------------------------------------------------------

LINES = "Line 1, a comma; a semicolon; and; more; of; them; here\nand \"quotes\".\n\nSo, 'so'."


@pytest.fixture
def two(sheet, monkeypatch):
    """A sheet of two items, one question, and its rows rated 4 and 2."""
    monkeypatch.setattr(evaluation, "QUESTIONS", {"creativity": "Is it?"})
    rows = [{"model": m, "prompt": "P?", "response": f"{m}: {LINES}"} for m in "ab"]
    rows, _ = sheet(rows, "--prompts", 1, "--per-prompt", 1)
    rows.sort(key=lambda row: row["response"])
    return [row | {"creativity": value} for row, value in zip(rows, "42", strict=True)]


def means(results):
    return {row["model"]: row["mean"] for row in results["questions"]["creativity"]["models"]}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize(("end", "bom"), [("\r\n", "\ufeff"), ("\n", "")])
def test_sheets_of_any_spreadsheet_are_read(two, tally, delimiter, end, bom):
    assert means(tally(rater=filled(two, delimiter, end, bom))[1]) == {"a": 4, "b": 2}


def test_what_spreadsheets_do_to_a_sheet_is_borne(two, tally):
    """Another column, another order, 4.0 or 4,0 for 4, CRLF in a cell, blank lines and cells.

    One prompt has no intervals, and that is said.
    """
    two[0]["creativity"], two[1]["creativity"] = "4,00", " 2.0 "
    changed = [{"comment": "none", **row, "": ""} for row in two[::-1]]
    for row in changed:
        row["response"] = row["response"].replace("\n", "\r\n")
    said, results = tally(rater=filled(changed) + b",,,,,\r\n\r\n")
    assert means(results) == {"a": 4, "b": 2}
    rows = results["questions"]["creativity"]["models"]
    assert [row["mean_95"] for row in rows] == [None, None]
    assert "warning: 95 % intervals over fewer than ten prompts are too narrow" in said


def test_blank_ratings_and_missing_lines_are_counted(two, tally):
    """A blank cell, a cell left off the end of its line, a line left out: no rating of `a`."""
    two[0]["creativity"] = ""
    short = filled(two).replace(b",\r\n", b"\r\n")
    assert len(short) == len(filled(two)) - 1
    said, results = tally(one=filled(two), two=short, three=filled(two[1:]))
    assert "creativity: 3 ratings, 3 blank, raters' agreement (alpha) -" in said
    (b, a) = results["questions"]["creativity"]["models"]
    expected = {"model": "a", "ratings": 0, "mean": None, "mean_95": None}
    assert a == expected | {"win_rates": {}, "comparisons": {}}
    assert (b["model"], b["ratings"], b["mean"]) == ("b", 3, 2)


def spoil(rows, **changes):
    rows[1] |= changes


def sort_alone(rows):
    rows[0]["item"], rows[1]["item"] = rows[1]["item"], rows[0]["item"]


def repeat(rows):
    rows[1] = rows[0]


def rename(rows):
    rows[:] = [{("Creative" if k == "creativity" else k): v for k, v in r.items()} for r in rows]


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"item": "bcdfghjkmn"}, "s1.csv:6: item 'bcdfghjkmn' is not in the key; is that of ano"),
        ({"creativity": "6"}, "s1.csv:6: 'creativity' is '6'; expected a whole number 1 to 5"),
        ({"creativity": "0"}, "s1.csv:6: 'creativity' is '0'; expected a whole number 1 to 5"),
        ({"creativity": "3.5"}, "s1.csv:6: 'creativity' is '3.5'; expected a whole number 1 to 5"),
        ({"creativity": "very"}, "s1.csv:6: 'creativity' is 'very'; expected a whole number"),
        (sort_alone, "s1.csv:2: the response is not that of item"),
        (repeat, "a second time; remove one of the two"),
        (rename, "s1.csv:1: no column 'creativity'; expected item,prompt,response,crea"),
        (b"", "s1.csv:1: no column 'item'"),
        (b"PK\x03\x04\xff", "s1.csv: cannot be read; save it as CSV in UTF-8"),
    ],
)
def test_a_sheet_that_is_wrong_is_refused_by_file_and_line(
    two, tmp_path, refused, spoiled, message
):
    """A response has four lines, so the second record begins on line 6."""
    (tmp_path / "good.csv").write_bytes(filled(two))
    if not isinstance(spoiled, bytes):
        spoil(two, **spoiled) if isinstance(spoiled, dict) else spoiled(two)
        spoiled = filled(two)
    (tmp_path / "s1.csv").write_bytes(spoiled)
    (tmp_path / "human.json").write_text("old results")
    flags = ["--key", tmp_path / "s.key.json", "--out", tmp_path / "human.json"]
    sheets = [tmp_path / "good.csv", tmp_path / "s1.csv"]
    assert message in refused("eval", "human", "tally", "--sheets", *sheets, *flags)


NO_KEYS = ["", "[]", "{}", '{"questions": {}, "items": {"a": {}}}']
NO_KEYS.append('{"questions": {}, "items": {"a": {"prompt": "p", "response": 1, "models": ["m"]}}}')


@pytest.mark.parametrize("content", NO_KEYS)
def test_what_is_no_key_is_refused(tmp_path, refused, content):
    (tmp_path / "key.json").write_text(content)
    flags = ["--key", tmp_path / "key.json", "--out", tmp_path / "o.json"]
    assert "not a key of eval" in refused("eval", "human", "tally", "--sheets", "a.csv", *flags)


@pytest.mark.parametrize(
    ("sheets", "out", "message"),
    [
        (["a.csv", "./a.csv"], "out.json", "this command names that file twice"),
        (["a.csv"], "./s.key.json", "this command names that file twice"),
        (["a.csv"], "b.csv", "argument --out: 'b.csv': expected a name in .json"),
    ],
)
def test_a_sheet_counts_once_and_is_never_overwritten(
    two, tmp_path, monkeypatch, refused, sheets, out, message
):
    (tmp_path / "a.csv").write_bytes(filled(two))
    monkeypatch.chdir(tmp_path)
    flags = ["--sheets", *sheets, "--key", "s.key.json", "--out", out]
    assert message in refused("eval", "human", "tally", *flags)


# --------------------------------------------------------------------------------------------------
# Agreement, means, win rates
# --------------------------------------------------------------------------------------------------


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
    assert evaluation.krippendorff(np.array(ratings)) is None


def test_wins_by_hand():
    """One rater, one prompt: a has 5 and 3, b has 3 and 1, c shares a's 5 and has one blank.

    a - b: wins, wins, tie, wins: 3.5 / 4. a - c: tie, loss: 0.5 / 2. b - c: two losses.
    A second rater has rated only a's, 1 and 1: with c's shared 1 two ties. So a's mean is over
    (5, 3, 1, 1), and a beats c in .25 and .5, on average .375, of two comparisons.
    """
    ratings = np.array([[5, 3, 3, 1, NAN], [1, 1, NAN, NAN, NAN]])
    drawn = np.array([[[0, 1], [2, 3], [0, 4]]])
    rows = {r["model"]: r for r in evaluation.tally(ratings, ["a", "b", "c"], drawn)["models"]}
    assert {m: (row["mean"], row["ratings"]) for m, row in rows.items()} == {
        **{"a": (2.5, 4), "b": (2, 2), "c": (3, 2)}
    }
    assert [*rows] == ["c", "a", "b"]
    assert rows["a"]["win_rates"] == {"b": 0.875, "c": 0.375}
    assert rows["b"]["win_rates"] == {"a": 0.125, "c": 0}
    assert rows["c"]["win_rates"] == {"a": 0.625, "b": 1}
    counts = {"a": {"b": 1, "c": 2}, "b": {"a": 1, "c": 1}, "c": {"a": 2, "b": 1}}
    assert {m: row["comparisons"] for m, row in rows.items()} == counts


def plain_tally(ratings, drawn):
    """Means [M][prompts], wins and comparisons [M, M], rating by rating."""
    P, M, _ = drawn.shape
    by_prompt, wins, games = [{} for _ in range(M)], np.zeros((M, M)), np.zeros((M, M))
    for p in range(P):
        for i in range(M):
            given = [r[k] for r in ratings for k in drawn[p, i] if not np.isnan(r[k])]
            if given:
                by_prompt[i][p] = sum(given) / len(given)
        for r in ratings:
            for i, j in itertools.permutations(range(M), 2):
                pairs = [(r[a], r[b]) for a in drawn[p, i] for b in drawn[p, j]]
                pairs = [pair for pair in pairs if not np.isnan(pair).any()]
                won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
                wins[i, j] += won / len(pairs) if pairs else 0
                games[i, j] += bool(pairs)
    return by_prompt, wins, games


def test_tally_is_what_loops_over_prompts_raters_and_ratings_give():
    """Blank ratings, shared items; a fourth model that nobody has rated comes last."""
    rng = np.random.default_rng(3)
    P, M, K, J, N = 5, 4, 2, 3, 22
    drawn = np.sort(rng.integers(0, 4, (P, M, K)), -1) + 4 * np.arange(P)[:, None, None]
    ratings = rng.integers(1, 6, (J, N)).astype(float)
    ratings[rng.random((J, N)) < 0.4] = NAN
    drawn[:, 3], ratings[:, 20:] = [20, 21], NAN
    result = evaluation.tally(ratings, [*"abcd"], drawn)
    by_prompt, wins, games = plain_tally(ratings, drawn)
    given = [row["mean"] for row in result["models"][:3]]
    assert given == sorted(given, reverse=True) and result["models"][3]["model"] == "d"
    for row in result["models"][:3]:
        i = "abc".index(row["model"])
        means = [*by_prompt[i].values()]
        assert row["mean"] == pytest.approx(np.mean(means))
        interval = evaluation.bootstrap({"": dict(enumerate(means))})
        assert row["mean_95"] == pytest.approx(interval)
        others = [j for j in range(3) if j != i]
        rates = {"abc"[j]: pytest.approx(wins[i, j] / games[i, j]) for j in others}
        assert row["win_rates"] == rates
        assert row["comparisons"] == {"abc"[j]: games[i, j] for j in others}
    assert result["models"][3]["mean"] is None and result["models"][3]["win_rates"] == {}
    blank = int(np.isnan(ratings).sum())
    assert (result["ratings"], result["blank"]) == (J * N - blank, blank)


def test_planted_preferences_come_through_sheet_and_tally(sheet, tally):
    """Raters who rank the three responses to a prompt by Luce's rule, rated 5, 3, 1.

    Strength + Gumbel noise, sorted, makes i beat j with probability p_i / (p_i + p_j). 60 prompts,
    4 raters: 240 comparisons a pair, a rate within about 0.03.
    """
    planted = dict(zip(MODELS, (1.0, -0.2, -0.8), strict=True))
    rows, key = sheet(response_rows(prompts=60, each=1), "--prompts", 60, "--per-prompt", 1)
    rng, sheets = np.random.default_rng(5), {}
    for rater in ("ann", "bob", "cem", "dee"):
        worth = {
            row["item"]: planted[key["items"][row["item"]]["models"][0]] + rng.gumbel()
            for row in rows
        }
        ranked = sorted(rows, key=lambda row: (row["prompt"], -worth[row["item"]]))
        ranked = [row | {"creativity": (5, 3, 1)[k % 3]} for k, row in enumerate(ranked)]
        rng.shuffle(ranked)
        sheets[rater] = filled(ranked)
    said, results = tally(**sheets)
    found = results["questions"]["creativity"]
    assert [row["model"] for row in found["models"]] == [*MODELS]
    for row in found["models"]:
        low, high = row["mean_95"]
        assert low < row["mean"] < high and row["ratings"] == 240
        for other, rate in row["win_rates"].items():
            expected = 1 / (1 + np.exp(planted[other] - planted[row["model"]]))
            assert rate == pytest.approx(expected, abs=0.1)
            assert row["comparisons"][other] == 240
    assert 0 < found["alpha"] < 0.6 and results["prompts"] == 60
    assert "fewer than ten prompts" not in said
    part = said[said.index("\ncreativity: 720 ratings, 0 blank") :].splitlines()
    first = found["models"][0]
    mean = evaluation.with_interval(first["mean"], first["mean_95"])
    rates = [f"{first['win_rates'][model]:.0%} of 240" for model in MODELS[1:]]
    assert " ".join(part[3].split()) == " ".join([MODELS[0], "240", "-", *rates, mean])


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
        self.session, old = {}, self.target
        self.target = self.send("Target.createTarget", url=url)["targetId"]
        if old:
            self.send("Target.closeTarget", targetId=old)
        attached = self.send("Target.attachToTarget", targetId=self.target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.wait(
            lambda: (
                self.js(f"location.href === {json.dumps(url)} && document.readyState") == "complete"
            )
        )

    def js(self, expression):
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition):
        for _ in range(200):
            if condition():
                return
            time.sleep(0.05)
        raise AssertionError("waited in vain")

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


def rating(item, question, value):
    return f"document.querySelector(`[name='{item} {question}'][value='{value}']`)"


STATUS = "document.querySelector('#status')?.textContent"


def test_the_page_is_filled_in_saved_and_survives_a_closed_tab(sheet, tally, browser, tmp_path):
    rows = [{"model": "xab"[k % 2], "prompt": "P <i>?", "response": t} for k, t in enumerate(NASTY)]
    rows, key = sheet(rows, "--prompts", 1)
    ids, texts = [row["item"] for row in rows], [key["items"][row["item"]] for row in rows]
    url = (tmp_path / "s.html").as_uri()
    browser.open(url)
    shown = "[...document.querySelectorAll('article p')].map((p) => p.textContent)"
    assert browser.js(shown) == [item["response"] for item in texts]
    assert browser.js("document.querySelector('h2').textContent") == "P <i>?"
    assert browser.js("document.title") == "Rating sheet"
    assert browser.js(STATUS).startswith("0 of 16 ratings")

    browser.click(rating(ids[0], "novelty", 3))
    browser.click(rating(ids[0], "novelty", 5))
    browser.click(rating(ids[3], "creativity", 1))
    browser.click("document.querySelector('#save')")  # without a name
    assert "Please write your name" in browser.js(STATUS)
    browser.send("Input.insertText", text="Ann O'Hara")
    browser.open(url)  # another tab, the first is closed
    assert browser.js(STATUS).startswith("2 of 16 ratings")
    assert browser.js("document.querySelectorAll('main :checked').length") == 2
    browser.click("document.querySelector('#save')")
    saved = tmp_path / "s.Ann-O-Hara.csv"
    browser.wait(saved.exists)
    assert "Saved s.Ann-O-Hara.csv" in browser.js(STATUS)
    assert browser.js("performance.getEntriesByType('resource').length") == 0  # asks no server

    assert saved.read_bytes().startswith(b"\xef\xbb\xbf")
    rows[0]["novelty"], rows[3]["creativity"] = "5", "1"
    assert read_csv(saved) == rows
    _, results = tally(**{"s.Ann-O-Hara": saved.read_bytes()})
    assert [results["questions"][q]["ratings"] for q in evaluation.QUESTIONS] == [1, 0, 0, 1]

    browser.js("window.confirm = () => false")
    browser.click("document.querySelector('#clear')")
    assert browser.js(STATUS).startswith("2 of 16")
    browser.js("window.confirm = () => true")
    browser.click("document.querySelector('#clear')")
    browser.wait(lambda: browser.js(f"{STATUS} === '0 of 16 ratings. '"))
    assert browser.js("document.querySelectorAll('main :checked').length") == 0


def test_a_page_of_real_responses_keeps_prompt_and_scale_in_sight(sheet, tmp_path, browser):
    """People's sentences, two halves of them as two models; wide and narrow, light and dark."""
    with open(shared("data/human_rated.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if '"HeldoutTask"' in line]
    _, key = sheet([row | {"model": f"half {k % 2}"} for k, row in enumerate(rows)])
    browser.open((tmp_path / "s.html").as_uri())
    shown = browser.js("[...document.querySelectorAll('article p')].map((p) => p.textContent)")
    assert shown == [item["response"] for item in key["items"].values()]
    for width in (1200, 390):
        browser.screenshot(tmp_path / f"{width}.png", width, dark=width == 390)
        assert browser.js("document.documentElement.scrollWidth") <= width
        browser.js("document.querySelector('section article:last-child').scrollIntoView()")
        for part in ("h2", ".ends", ".bar"):
            box = browser.js(f"document.querySelector('{part}').getBoundingClientRect().toJSON()")
            assert 0 <= box["top"] < box["bottom"] <= 900
        browser.screenshot(tmp_path / f"{width}-scrolled.png", width, dark=width == 390)
