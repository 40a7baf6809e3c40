"""eval.py human: the sheet is blind, the page works in a browser, the tally is right by hand."""

import eval as evaluation

import csv
import html
import io
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
from conftest import write

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


def by_two(prompt, texts):
    """Responses of two models in turn."""
    return [{"model": "ab"[k % 2], "prompt": prompt, "response": t} for k, t in enumerate(texts)]


@pytest.fixture
def sheet(tmp_path, run_main):
    """sheet(rows, *flags) makes a sheet; (rows of the CSV that its page saves unrated, key)."""

    def make(rows, *flags):
        file, page = write(tmp_path / "responses.jsonl", rows), tmp_path / "s.html"
        run_main("eval", "human", "sheet", "--responses", file, "--out", page, *flags)
        filling = filling_of(page)
        columns = ["item", "prompt", "response", *filling["questions"]]
        blank = [""] * len(filling["questions"])
        rows = [dict(zip(columns, row + blank, strict=True)) for row in filling["rows"]]
        return rows, json.loads((tmp_path / "s.key.json").read_text())

    return make


@pytest.fixture
def tally(tmp_path, run_main):
    """tally(name=content, ...) tallies these sheets against s.key.json: (printed, written)."""

    def run(**sheets):
        for name, content in sheets.items():
            (tmp_path / f"{name}.csv").write_bytes(content)
        files = [tmp_path / f"{name}.csv" for name in sheets]
        flags = ["--key", tmp_path / "s.key.json", "--out", tmp_path / "human.json"]
        printed = run_main("eval", "human", "tally", "--sheets", *files, *flags)
        return printed, json.loads((tmp_path / "human.json").read_text())

    return run


def filling_of(page) -> dict:
    """The data of a page, which is all that it gets besides its text."""
    data = page.read_text("utf-8").partition('id="data">')[2].partition("</script>")[0]
    return json.loads(data)


def filled(rows) -> bytes:
    """What the page saves, to the byte."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return ("\ufeff" + text.getvalue()).encode()


def test_the_sheet_has_each_models_responses_to_the_drawn_prompts(sheet):
    rows, key = sheet(response_rows(), "--prompts", 4, "--per-prompt", 2)
    written = {(row["prompt"], row["response"]): row["model"] for row in response_rows()}
    assert list(rows[0]) == ["item", "prompt", "response", *evaluation.QUESTIONS]
    assert [row["item"] for row in rows] == [*key["items"]]
    assert key["questions"] == evaluation.QUESTIONS
    models = [written[row["prompt"], row["response"]] for row in rows]
    assert [[model] for model in models] == [key["items"][row["item"]]["models"] for row in rows]
    counts = Counter(zip((row["prompt"] for row in rows), models, strict=True))
    assert set(counts.values()) == {2} and len(counts) == 4 * 3
    assert len({prompt for prompt, _ in counts}) == 4


def test_nothing_a_rater_gets_names_a_model_and_the_order_tells_none(sheet, tmp_path):
    """Of 30 pairs the first model's comes first 15 times, sd 2.7, also when sorted by id."""
    flags = ("--prompts", 30, "--per-prompt", 1)
    rows, key = sheet(response_rows(MODELS[:2], prompts=30), *flags)
    page = (tmp_path / "s.html").read_text().lower()
    for word in (*MODELS, "crpo", "gpt", "zephyr", "model", "responses.jsonl"):
        assert word.lower() not in page, word
    by_id = sorted(rows, key=lambda row: (row["prompt"], row["item"]))
    for ordered in (rows, by_id):
        first = [key["items"][row["item"]]["models"] for row in ordered[::2]]
        assert 7 <= first.count([MODELS[0]]) <= 23
    prompts = [row["prompt"] for row in rows[::2]]
    assert prompts == [row["prompt"] for row in rows[1::2]]
    assert prompts != sorted(prompts) and len({*prompts}) == 30


def test_the_seed_alone_decides_the_sheet_and_the_text_alone_an_id(sheet):
    """So a rebuilt key reads a filled sheet. An id begins with a letter: it is never a number."""
    rows = response_rows()
    once, key = sheet(rows, "--seed", 1)
    assert sheet(rows[::-1], "--seed", 1, "--overwrite") == (once, key)
    assert sheet(rows, "--seed", 2, "--overwrite")[0] != once
    everything = ("--prompts", 6, "--per-prompt", 3, "--overwrite")
    one, _ = sheet(rows, *everything)
    other = [row | {"model": MODELS[k % 3]} for k, row in enumerate(rows)]
    two, _ = sheet(other, *everything, "--seed", 5)
    ids = [{row["item"]: row["response"] for row in each} for each in (one, two)]
    assert ids[0] == ids[1] and all(name[0] == "r" for name in ids[0])


def test_a_response_of_two_models_is_one_item_and_counts_for_both(sheet):
    """A prompt of several turns is shown under its roles."""
    prompt = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "A wall?"}]
    human = [{"prompt": prompt, "response": text} for text in ("Same.", "Other.")]
    same = human[0] | {"model": "a"}
    rows, key = sheet([same, *human, same, same | {"prompt": "Q?"}], "--prompts", 1)
    models = {item["response"]: item["models"] for item in key["items"].values()}
    assert models == {"Same.": ["a", "a", "human"], "Other.": ["human"]}
    assert [row["prompt"] for row in rows] == ["system: Rhyme.\n\nuser: A wall?"] * 2


NASTY = [
    "<b>bold</b> & <script>document.title = 'broken'</script>",
    "</script><img src=x onerror=\"document.title = 'broken'\">",
    '=HYPERLINK("http://example.com"), "quoted"\n\n  and a last line',
    "'tis \u2028 /*DATA*/ <!--",
]


def test_no_text_ends_the_data_of_the_page(sheet, tmp_path):
    rows, _ = sheet(by_two("P <i>?", NASTY), "--prompts", 1)
    page, filling = (tmp_path / "s.html").read_text("utf-8"), filling_of(tmp_path / "s.html")
    assert page.count("</script>") == 2 and "<img" not in page
    assert sorted(row["response"] for row in rows) == sorted(NASTY)
    assert (filling["questions"], filling["scale"]) == (evaluation.QUESTIONS, evaluation.SCALE)


UNMAKEABLE = {
    "--prompts 7": "--prompts 7: 6 prompts have --per-prompt responses of each of 3 models",
    "--per-prompt 4": "--prompts 4: 0 prompts have",
    "--responses alone.jsonl": "of each of 1 models; expected 4 prompts and two models",
    "--out s.csv": "--out s.csv: expected a name that ends in .html",
    "--out old.html": "old.html exists; add --overwrite",
    "--out key.html": "key.key.json exists; add --overwrite",
    "--out r.jsonl --overwrite": "r.jsonl: this command names that file twice",
}


@pytest.mark.parametrize("flags", UNMAKEABLE)
def test_sheets_that_cannot_be_made(tmp_path, monkeypatch, refused, flags):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.jsonl", response_rows())
    write(tmp_path / "alone.jsonl", response_rows(["gpt-4o"]))
    for name in ("old.html", "key.key.json"):
        (tmp_path / name).write_text("precious")
    given = f"human sheet --responses r.jsonl --out s.html {flags}"
    assert UNMAKEABLE[flags] in refused("eval", *given.split())


LINES = "Line 1, a comma; a semicolon; and; more; of; them; here\nand \"quotes\".\n\nSo, 'so'."


@pytest.fixture
def two(sheet, monkeypatch):
    """A sheet of two items, one question, and its rows rated 4 and 2."""
    monkeypatch.setattr(evaluation, "QUESTIONS", {"creativity": "Is it?"})
    rows = [{"model": m, "prompt": "P?", "response": f"{m}: {LINES}"} for m in "ab"]
    rows, _ = sheet(rows, "--prompts", 1, "--per-prompt", 1)
    rows.sort(key=lambda row: row["response"])
    return [row | {"creativity": value} for row, value in zip(rows, "42", strict=True)]


def test_what_is_printed_and_written(two, tally):
    """In whatever order the lines are. One prompt has no intervals, and a warning says so."""
    printed, results = tally(rater=filled(two[::-1]))
    rows = results["questions"]["creativity"]["models"]
    assert [(row["model"], row["mean"]) for row in rows] == [("a", 4), ("b", 2)]
    header, *table = (" ".join(line.split()) for line in printed.splitlines()[1:4])
    assert header == "model ratings beats a beats b mean (95 %)"
    assert table == ["a 1 - 100% of 1 4", "b 1 0% of 1 - 2"]
    assert "95 % intervals over prompts, too narrow for fewer than ten" in printed


def test_blank_ratings_and_missing_lines_are_counted(two, tally):
    """A blank cell, a line left out: no rating of `a`."""
    two[0]["creativity"] = ""
    printed, results = tally(one=filled(two), two=filled(two[1:]))
    assert "creativity: 2 ratings, 2 blank, raters' agreement (alpha) -" in printed
    (b,) = results["questions"]["creativity"]["models"]
    assert (b["model"], b["ratings"], b["mean"], b["win_rates"]) == ("b", 2, 2, {})


SPOILED = {  # message: the sheet of the rows a, b
    "s1.csv:9: item 'bcdfghjkmn': expected an item": lambda a, b: [a, b | {"item": "bcdfghjkmn"}],
    "s1.csv:9: ['6']: expected 1 to 5 or nothing": lambda a, b: [a, b | {"creativity": "6"}],
    "s1.csv:9: ['0']: expected 1 to 5": lambda a, b: [a, b | {"creativity": "0"}],
    "s1.csv:9: ['3.5']: expected 1 to 5": lambda a, b: [a, b | {"creativity": "3.5"}],
    "s1.csv:6: item '': expected": lambda a, b: [a, b | {"item": "", "response": ""}],
    "of the key, once, with its response": lambda a, b: [a | {"item": b["item"]}, b],
    "s1.csv:9: item 'r": lambda a, b: [a, a],
    "(no column 'creativity')": lambda a, b: [{"item": "r0", "response": "x", "C": "3"}],
    "s1.csv:1: not a line of CSV (no column 'item')": lambda a, b: b"",
    "s1.csv:1: cannot be read ('utf-8' codec": lambda a, b: b"PK\x03\x04\xff",
    "s1.csv:2: not a line of CSV": lambda a, b: b"item,response,creativity\nr0",
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_sheet_that_is_wrong_is_refused_by_file_and_line(two, tmp_path, refused, message):
    """A response has four lines, so the second record ends on line 9."""
    (tmp_path / "good.csv").write_bytes(filled(two))
    spoiled = SPOILED[message](*two)
    (tmp_path / "s1.csv").write_bytes(spoiled if isinstance(spoiled, bytes) else filled(spoiled))
    (tmp_path / "human.json").write_text("old results")
    flags = ["--key", tmp_path / "s.key.json", "--out", tmp_path / "human.json"]
    sheets = [tmp_path / "good.csv", tmp_path / "s1.csv"]
    assert message in refused("eval", "human", "tally", "--sheets", *sheets, *flags)


ITEM = '{"questions": {}, "items": {"a": {"prompt": "p", "response": %s}}}'
TWICE = "this command names that file twice"


@pytest.mark.parametrize(
    ("flags", "key", "message"),
    [
        ("--sheets a.csv ./a.csv", None, TWICE),
        ("--out ./s.key.json", None, TWICE),
        ("", "", "expected what eval.py human sheet made"),
        ("", "[]", "expected what eval.py human sheet made"),
        ("", ITEM % '"x"', "expected what eval.py human sheet made"),
        ("", ITEM % '1, "models": ["m"]', "a.csv:5: item 'r"),
    ],
)
def test_a_sheet_counts_once_and_a_key_is_one_and_never_overwritten(
    two, tmp_path, monkeypatch, refused, flags, key, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_bytes(filled(two))
    if key is not None:
        (tmp_path / "s.key.json").write_text(key)
    given = f"human tally --sheets a.csv --key s.key.json --out out.json {flags}"
    assert message in refused("eval", *given.split())


def test_alpha_of_krippendorffs_own_example_and_where_it_is_undefined():
    """Four observers, twelve units, ratings missing (Krippendorff 2011, example D): .815."""
    table = """1 2 3 3 2 1 4 1 2 . . .
               1 2 3 3 2 2 4 1 2 5 . 3
               . 3 3 3 2 3 4 2 2 5 1 .
               1 2 3 3 2 4 4 1 2 5 1 ."""
    ratings = [[NAN if x == "." else float(x) for x in line.split()] for line in table.splitlines()]
    assert evaluation.krippendorff(np.array(ratings)) == pytest.approx(0.815, abs=5e-4)
    for none in ([[3.0, 4, 5]], [[3.0, 3], [3, 3]], [[3, NAN], [NAN, 3]]):  # one rater, one level
        assert evaluation.krippendorff(np.array(none)) is None


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
    """Blank ratings, shared items; a fourth model that nobody has rated is left out."""
    rng = np.random.default_rng(3)
    P, M, K, J, N = 5, 4, 2, 3, 22
    drawn = np.sort(rng.integers(0, 4, (P, M, K)), -1) + 4 * np.arange(P)[:, None, None]
    ratings = rng.integers(1, 6, (J, N)).astype(float)
    ratings[rng.random((J, N)) < 0.4] = NAN
    drawn[:, 3], ratings[:, 20:] = [20, 21], NAN
    models = [["abcd"[m] for _, m, _ in np.argwhere(drawn == n)] for n in range(N)]
    items = [{"prompt": n // 4, "models": some} for n, some in enumerate(models)]
    result = evaluation.tally(ratings, items)
    by_prompt, wins, games = plain_tally(ratings, drawn)
    given = [row["mean"] for row in result["models"]]
    assert given == sorted(given, reverse=True) and len(given) == 3
    for row in result["models"]:
        i = "abc".index(row["model"])
        means = np.array([*by_prompt[i].values()])
        assert row["mean"] == pytest.approx(means.mean())
        assert row["mean_95"] == pytest.approx(evaluation.bootstrap([means[:, None]])[:, 0])
        others = [j for j in range(3) if j != i]
        rates = wins[i] / np.maximum(games[i], 1)
        assert row["win_rates"] == {"abc"[j]: pytest.approx(rates[j]) for j in others}
        assert row["comparisons"] == {"abc"[j]: games[i, j] for j in others}
    assert result["blank"] == np.isnan(ratings).sum() == J * N - result["ratings"]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def browse(tmp_path):
    """browse(script): what the script returns at the end of s.html; the next call goes on there."""

    def run(script):
        script = f"(async () => {{ {script} }})().then((x) => parent.postMessage(x, '*'));"
        page = (tmp_path / "s.html").read_text("utf-8") + f"<script>{script}</script>"
        (tmp_path / "page.html").write_text(page, "utf-8")
        frame = "<iframe src=page.html></iframe><script>onmessage = "
        frame += "(event) => { document.body.textContent = JSON.stringify(event.data); };</script>"
        (tmp_path / "frame.html").write_text(frame)
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += ["--virtual-time-budget=3000", f"--user-data-dir={tmp_path}/profile"]
        command += [f"file://{tmp_path}/frame.html"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=100)
        return json.loads(html.unescape(re.search("<body>(.*)</body>", run.stdout, re.S)[1]))

    if not CHROMIUM:
        pytest.skip("needs chromium")
    return run


def test_the_page_is_filled_in_saved_and_survives_a_closed_browser(sheet, tally, browse):
    rows, key = sheet(by_two("P <i>?", NASTY), "--prompts", 1)
    first, *_, last = (row["item"] for row in rows)
    texts = browse(f"""
        const rate = (id, value) => document.getElementsByName(id)[value - 1].click();
        const status = () => get("status").textContent, before = status();
        rate("{first} novelty", 3); rate("{first} novelty", 5); rate("{last} creativity", 1);
        get("save").click();  // without a name
        const asked = status();
        get("name").value = "Ann O'Hara";
        get("name").dispatchEvent(new Event("input"));
        const texts = [...document.querySelectorAll("h2, article p")].map((x) => x.textContent);
        return [document.title, before, asked, ...texts];""")
    asked = "2 of 16 ratings. Please write your name first."
    assert texts[:3] == ["Rating sheet", "0 of 16 ratings. ", asked]
    assert texts[3:] == ["P <i>?", *(item["response"] for item in key["items"].values())]

    checked, name, asked, content = browse("""
        let blob, name, checked = document.querySelectorAll("main :checked").length;
        URL.createObjectURL = (made) => { blob = made; return "#"; };
        HTMLAnchorElement.prototype.click = function () { name = this.download; };
        get("save").click();
        const bytes = [...new Uint8Array(await blob.arrayBuffer())];
        return [checked, name, performance.getEntriesByType("resource").length, bytes];""")
    assert (checked, name, asked) == (2, "s.Ann-O-Hara.csv", 0)  # and no server is asked
    _, results = tally(**{"s.Ann-O-Hara": bytes(content)})
    rows[0]["novelty"], rows[3]["creativity"] = "5", "1"
    assert bytes(content) == filled(rows)
    assert [results["questions"][q]["ratings"] for q in evaluation.QUESTIONS] == [1, 0, 0, 1]

    clear = "confirm = () => {}; if (state.name) get('clear').click(); return 0;"
    left = "return [state.name, Object.keys(state.ratings).length];"
    assert browse(clear.format("false").replace("return 0;", left)) == ["Ann O'Hara", 2]
    browse(clear.format("true"))
    assert browse(left) == ["", 0]
