"""eval.py paper and sweep: the stages, what is skipped, the report. On a tiny random model."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluation
import scores
from data import UserError
from eval import Cell

QUICK = ["--sft", "--lora-r 2 --max-steps 1", "--crpo", "--lora-r 2 --batch-size 2 --max-steps 2"]
QUICK += ["--generate", "--samples 4 --max-new-tokens 5"]


def rated_rows():
    """Two prompts to train on, two held-out objects and a held-out task, six responses each."""
    words = ["stone", "lamp", "river", "door", "clock", "feather"]
    places = [("Uses", "Training")] * 2 + [("Uses", "HeldoutItem")] * 2 + [("Ends", "HeldoutTask")]
    return [
        {"task": task, "prompt": f"A use for {words[k]}?", "response": f"a {word} {words[k - n]}"}
        | {"score": 20 + 5 * n + k, "split": split}
        for k, (task, split) in enumerate(places)
        for n, word in enumerate(words)
    ]


@pytest.fixture
def started(monkeypatch):
    """The command lines of the stages that are run, each in this process instead of one of its own.

    Before one whose line holds `started.fails` the status is 3 instead.
    """
    found = SimpleNamespace(lines=[], fails=None)

    def run_stage(stage, processes):
        script, *flags = map(str, stage.command)
        line = " ".join([script, *flags])
        if found.fails and found.fails in line:
            return 3
        found.lines.append(line)
        with monkeypatch.context() as own:
            own.setattr(sys, "argv", [script, *flags])
            runpy.run_path(str(scores.HERE / script), run_name="__main__")
        return 0

    monkeypatch.setattr(evaluation, "run_stage", run_stage)
    return found


@pytest.fixture
def call(tmp_path, monkeypatch, checkpoints):
    """call("paper", *flags) runs the command on `rated_rows` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated_rows()))
    scorers = ["--embedder", checkpoints("llama"), "--surprise-model", checkpoints("gpt2")]

    def run(command, *flags):
        shared = ["--data", "rated.jsonl", "--model", checkpoints("llama"), "--out", "all"]
        argv = ["eval.py", command, *shared, *scorers, *QUICK, *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        evaluation.main()

    return run


def test_paper_from_ratings_to_report_and_not_twice(call, started, tmp_path, capsys):
    variants = ["--variants", "DPO", "CrPO-nov", "--seeds", 1, 2]
    call("paper", *variants)
    lines = list(started.lines)
    assert [" ".join(line.split()[:2]).replace(" --data", "") for line in lines] == [
        *("data.py pairs", "data.py sft", "scores.py judge", "scores.py", "sft.py"),
        *["crpo.py"] * 4,
        *["eval.py generate"] * 6,
        "eval.py score",
    ]
    crpo = [line for line in lines if line.startswith("crpo.py")]
    assert ["--lambda-diversity 0" in line for line in crpo] == [True, False] * 2
    assert ["--lambda-novelty 1" in line for line in crpo] == [False, True] * 2
    assert ["--seed 1" in line for line in crpo] == [True, True, False, False]
    assert all("--adapter all/runs/SFT --holdout 0" in line for line in crpo)
    assert all("--lora-r 2 --batch-size 2 --max-steps 2" in line for line in crpo)
    assert not list(tmp_path.glob("all/runs/*/checkpoint-*"))

    results = json.loads((tmp_path / "all/results.json").read_text())
    models = {row["model"]: row for row in evaluation.totals(results["rows"])}
    assert {name: row["runs"] for name, row in models.items()} == {
        **{"base": 1, "SFT": 1, "DPO": 2, "CrPO-nov": 2},
        "human": 1,
    }
    assert {row["prompts"] for row in models.values()} == {3}
    assert results["scorers"]["quality"] == "all/judge"
    assert any(w.startswith("novelty is measured by") for w in results["warnings"])
    assert not any(w.startswith("surprise") for w in results["warnings"])  # none trained on it

    report = (tmp_path / "all/report.md").read_text()
    assert all(f"\npython {line}   # " in report for line in lines)
    assert "| DPO alone beats the base | diversity | DPO − base |" in report
    assert "adding quality" not in report  # no such variant was asked for
    assert report.count("| CrPO-nov | 3 |") == 1  # over the tasks
    assert "## Uses" in report and "## Ends" in report

    (tmp_path / "all/responses/CrPO-nov-2.jsonl").unlink()
    (tmp_path / "all/report.md").unlink()
    capsys.readouterr()
    call("paper", *variants)
    again = [line for line in lines if "/CrPO-nov-2.jsonl" in line]  # made, and read by score
    assert started.lines[len(lines) :] == again
    assert "14 of 16 stages are done" in capsys.readouterr().out
    assert (tmp_path / "all/report.md").exists()


def test_a_stage_that_fails_ends_it_and_the_next_call_goes_on_there(call, started, tmp_path):
    variants = ["--variants", "DPO", "--seeds", 1]
    started.fails = "crpo.py"
    with pytest.raises(UserError, match="stage 6/10 ended with status 3; once that is mended"):
        call("paper", *variants)
    before = len(started.lines)
    assert started.lines[-1].startswith("sft.py")
    started.fails = "eval.py score"
    with pytest.raises(UserError, match="status 3"):
        call("paper", *variants)
    assert started.lines[before].startswith("crpo.py")
    assert not (tmp_path / "all/report.md").exists()


def test_what_another_command_or_other_data_has_left_is_refused(call, started, tmp_path):
    started.fails = "scores.py judge"
    variants = ["--variants", "DPO"]
    for _ in range(2):
        with pytest.raises(UserError, match="status 3"):
            call("paper", *variants)
    assert len(started.lines) == 2
    with pytest.raises(UserError, match=r"^all/pref.jsonl: made by another command, of other data"):
        call("paper", *variants, "--pairs=--min-gap 7")
    with open(tmp_path / "rated.jsonl", "a") as file:
        file.write(json.dumps(rated_rows()[0] | {"response": "one more"}) + "\n")
    with pytest.raises(UserError, match=r"^all/pref.jsonl, all/sft.jsonl: made by another command"):
        call("paper", *variants)


def test_what_was_made_from_something_that_is_gone_is_refused(call, started, tmp_path):
    """The scores are of the pairs, the run of the scores, its responses of the run; SFT is not."""
    variants = ["--variants", "DPO", "--seeds", 1]
    call("paper", *variants)
    before = len(started.lines)
    (tmp_path / "all/pref.jsonl").unlink()
    made = "all/scored.jsonl, all/runs/DPO-1, all/responses/DPO-1.jsonl: made by another command"
    with pytest.raises(UserError, match=f"^{made}"):
        call("paper", *variants)
    assert len(started.lines) == before


def test_stages_of_another_program_are_refused(call, started, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "stages.jsonl").write_text('{"stage": 1}\n')
    with pytest.raises(UserError, match=r"all/stages.jsonl: it is of another program"):
        call("paper")
    assert not started.lines


def test_of_several_times_that_something_was_made_the_last_counts(tmp_path):
    stage = evaluation.Stage(tmp_path, ["sft.py", "--lr", 2])
    rows = [
        {"out": str(tmp_path), "command": f"python sft.py --lr {lr}", "data": "d"} for lr in (1, 2)
    ]
    last = evaluation.Stage(tmp_path / "results.json", ["eval.py", "score"])
    assert evaluation.to_do([stage, last], rows, "d") == [last]
    with pytest.raises(UserError, match="made by another command"):
        evaluation.to_do([stage, last], rows[::-1], "d")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--crpo=--max-stepz 5", "--crpo: unrecognized arguments: --max-stepz 5"),
        ("--sft=--lr cold", "--sft: argument --lr: 'cold' is not float"),
        ("--generate=--decoding q=1", "--generate: argument --decoding: 'q=1': expected t="),
        ("--embedder=nowhere", "model nowhere: cannot be loaded"),
        ("--surprise-model=nowhere", "model nowhere: cannot be loaded"),
        ("--reward-model=nowhere", "model nowhere: cannot be loaded"),
        ("--model=nowhere", "model nowhere: cannot be loaded"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_at_once(call, started, tmp_path, flag, message):
    with pytest.raises(UserError, match=message):
        call("paper", flag)
    assert not started.lines and not (tmp_path / "all").exists()


def test_a_stage_that_is_stopped_with_us_may_save_first(tmp_path, monkeypatch):
    """The script saves a while after SIGTERM; this process, a fork that runs it, waits for that."""
    (tmp_path / "slow.py").write_text(
        "import signal, sys, time, pathlib\n"
        "def stop(*_):\n"
        "    time.sleep(0.3)\n"
        "    pathlib.Path(sys.argv[1], 'saved').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path(sys.argv[1], 'ready').touch()\n"
        "time.sleep(30)\n"
    )
    monkeypatch.setattr(scores, "HERE", tmp_path)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(143))
        try:
            evaluation.run_stage(evaluation.Stage(tmp_path, ["slow.py", tmp_path]), 1)
        except SystemExit as stopped:
            os._exit(stopped.code)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert (tmp_path / "saved").exists()


def test_sweep_by_signal_lambda_and_seed(call, started, tmp_path):
    call("sweep", "--signals", "novelty", "--lambdas", 0.5, 1, "--seeds", 1, 2)
    crpo = [line for line in started.lines if line.startswith("crpo.py")]
    assert [line.split("--out all/runs/")[1].split()[0] for line in crpo] == [
        f"{name}-{seed}" for seed in (1, 2) for name in ("DPO", "CrPO-nov-0.5", "CrPO-nov")
    ]
    assert ["--lambda-novelty 0.5" in line for line in crpo] == [False, True, False] * 2
    rows = [
        r.split(" | ") for r in (tmp_path / "all/sweep.md").read_text().splitlines() if r[:1] == "|"
    ]
    results = json.loads((tmp_path / "all/sweep.json").read_text())
    row_of = {row["model"]: row for row in evaluation.totals(results["rows"])}
    for cells, name, lam in zip(rows[2:], ("CrPO-nov-0.5", "CrPO-nov"), ("0.5", "1"), strict=True):
        row = row_of[name]
        assert cells[:3] == ["| novelty", lam, f"{row['novelty']:.3g}"]
        assert float(cells[3]) == pytest.approx(np.std(row["novelty_runs"], ddof=1), rel=0.05)
        gain = row["novelty"] - row_of["DPO"]["novelty"]
        assert float(cells[4].split()[0]) == pytest.approx(gain, rel=0.01)

    most = max(
        ("0.5", "1"), key=lambda lam: row_of["CrPO-nov" + "-0.5" * (lam == "0.5")]["novelty"]
    )
    assert f"Here most is at: novelty {most};" in (tmp_path / "all/sweep.md").read_text()

    before = len(started.lines)
    call("paper", "--variants", "DPO", "CrPO-nov", "--seeds", 1, 2)  # the same folder and runs
    assert [line.split()[:2] for line in started.lines[before:]] == [["eval.py", "score"]]


def test_data_without_the_splits_is_refused(call, started, tmp_path):
    rows = [row | {"split": "Training"} for row in rated_rows()]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"HeldoutItem or HeldoutTask of others; it says Training$"):
        call("paper")
    assert not started.lines and not (tmp_path / "all").exists()


def test_several_processes_are_started_where_they_help(call, monkeypatch):
    lines = []

    def start(command):
        lines.append([str(part) for part in command])
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(FileNotFoundError):  # nothing has made results.json
        call("paper", "--nproc-per-node", 2, "--variants", "DPO")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    shared = {" ".join(line[7:9]): line[1:7] == launcher for line in lines if "-m" in line}
    assert all(shared.values())
    assert {key.split()[0].rpartition("/")[2] for key in shared} == {
        *("scores.py", "sft.py", "crpo.py", "eval.py")
    }
    alone = [line[1:3] for line in lines if "-m" not in line]
    scripts = [[os.path.basename(script), command] for script, command in alone]
    assert scripts == [["data.py", "pairs"], ["data.py", "sft"], ["eval.py", "score"]]


def test_commands_of_several_processes_are_told_as_such():
    done = [{"command": "python sft.py", "seconds": 3}]
    line = "```\npython sft.py   # 3 s\n```\n"
    assert evaluation.show_commands(done, 1) == "## Every command\n\n" + line
    assert "under torchrun --nproc-per-node 8.\n\n" + line in evaluation.show_commands(done, 8)


def cell(model, prompt, run="1", **values):
    return Cell(model, run, "", "Uses", (("user", prompt),), 16, values)


def table_of(cells):
    signals = list(cells[0].values)
    for one in cells:
        one.values |= dict.fromkeys(evaluation.BESIDE, 0.0)
    return {"cells": cells, "rows": evaluation.tabulate(cells, signals)}


def test_a_claim_holds_only_beyond_the_interval():
    """SFT below base by 1 in each prompt: yes. DPO above base by -1, 1, 3: 1, and undecided.

    CrPO-nov is below DPO by 2 in novelty everywhere: the opposite of what is claimed.
    """
    quality = {"base": (10, 20, 30), "SFT": (9, 19, 29), "DPO": (9, 21, 33)}
    cells = [
        cell(model, prompt, quality=value, novelty=5 if model == "DPO" else 3)
        for model, values in quality.items()
        for prompt, value in zip("pqr", values, strict=True)
    ]
    found = table_of(cells)
    stated = [
        ("one", "quality", ["base"], ["SFT"]),
        ("two", "quality", ["DPO"], ["base"]),
        ("three", "novelty", ["base"], ["DPO"]),
        ("absent", "novelty", ["CrPO-nov"], ["DPO"]),
    ]
    _, _, *lines, _, _ = evaluation.show_claims(found, stated).split("\n")
    assert lines == [
        "| one | quality | base − SFT | 1 (1 to 1) | yes |  |",
        "| two | quality | DPO − base | 1 (-1 to 3) | undecided, leans to yes |  |",
        "| three | novelty | base − DPO | -2 (-2 to -2) | no, the opposite |  |",
    ]


def test_a_difference_averages_runs_within_a_prompt():
    cells = [cell("m", "p", run, quality=value) for run, value in (("1", 2), ("2", 4))]
    cells += [cell("n", "p", quality=1)]
    assert evaluation.difference(cells, "quality", ["m"], ["n"]) == (2, None)


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ([2, 0, 5], [1, 1, 1], [True, False, True]),
        ([2, 0, 5], [3], [False, False, True]),
        ([2], [1], [True]),
    ],
)
def test_seeds_are_counted_pair_by_pair_or_against_the_only_run(mine, theirs, expected):
    row, other = (
        {"n": float(np.mean(runs))} | ({"n_runs": runs} if len(runs) > 1 else {})
        for runs in (mine, theirs)
    )
    assert evaluation.seeds_above(row, other, "n") == expected


def test_the_answer_names_what_is_gained_and_lost():
    """Gated is above in quality by 1, below in novelty by 1, and the rest is level."""
    better = {"CrPO-gated": (2, 1), "CrPO-cre": (1, 2)}
    cells = [
        cell(model, prompt, quality=q, novelty=n, diversity=0, surprise=0)
        for model, (q, n) in better.items()
        for prompt in "pqr"
    ]
    found = table_of(cells)
    text = evaluation.show_answer(found)
    assert text.startswith(
        "Against CrPO-cre it trades: it gains quality and loses novelty, beyond the 95 % interval "
        "and with every seed.\n"
    )
    assert "CrPO-nov-div-sur" not in text


@pytest.mark.parametrize(
    ("quality", "said"), [(2, "helps"), (1, "does not help"), (0, "does not help")]
)
def test_the_answer_in_a_word(quality, said):
    cells = [
        cell(model, prompt, quality=q, novelty=0, diversity=0, surprise=0)
        for model, q in (("CrPO-gated", quality), ("CrPO-cre", 1))
        for prompt in "pqr"
    ]
    assert evaluation.show_answer(table_of(cells)).startswith(f"Against CrPO-cre it {said}: ")


def test_a_difference_that_one_seed_contradicts_is_undecided():
    assert evaluation.verdict(1, (0.5, 2), [True, True]) == "yes"
    assert evaluation.verdict(1, (0.5, 2), [True, False]) == "undecided, leans to yes"
    assert evaluation.verdict(-1, (-2, -0.5), [False, False]) == "no, the opposite"
    assert evaluation.verdict(1, (0, 2), []) == "undecided, leans to yes"
    assert evaluation.verdict(-1, None, []) == "undecided, leans to no"


def test_claims_by_hand():
    """Of the others DPO is the worst in quality, CrPO-div second in novelty, and so on."""
    means = {  # novelty, diversity, surprise, quality
        "base": (1, 1, 1, 30),
        "SFT": (2, 2, 9, 10),
        "DPO": (3, 3, 3, 12),
        "CrPO-nov": (9, 4, 4, 25),
        "CrPO-div": (8, 9, 5, 24),
        "CrPO-sur": (7, 5, 8, 23),
        "CrPO-qua": (6, 8, 2, 29),
        "CrPO-gated": (99, 99, 99, 1),
        "human": (99, 99, 99, 0),
    }
    names = ("novelty", "diversity", "surprise", "quality")
    rows = [{"model": m} | dict(zip(names, values, strict=True)) for m, values in means.items()]
    stated = list(evaluation.claims(rows))
    tuned = ["SFT", "DPO", "CrPO-nov", "CrPO-div", "CrPO-sur", "CrPO-qua"]
    assert [claim[1:] for claim in stated] == [
        *((name, tuned, ["base"]) for name in evaluation.THREE),
        *((name, ["DPO"], ["base"]) for name in evaluation.THREE),
        ("quality", ["DPO"], ["SFT"]),
        ("novelty", ["CrPO-nov"], ["CrPO-div"]),
        ("diversity", ["CrPO-div"], ["CrPO-qua"]),
        ("surprise", ["CrPO-sur"], ["CrPO-div"]),
        ("quality", ["CrPO-qua"], ["CrPO-nov"]),
        ("quality", ["CrPO-nov-qua"], ["CrPO-nov"]),
        ("novelty", ["CrPO-nov"], ["CrPO-nov-qua"]),
        ("quality", ["CrPO-div-qua"], ["CrPO-div"]),
        ("diversity", ["CrPO-div"], ["CrPO-div-qua"]),
        ("quality", ["CrPO-sur-qua"], ["CrPO-sur"]),
        ("surprise", ["CrPO-sur"], ["CrPO-sur-qua"]),
        ("quality", ["CrPO-cre"], ["CrPO-nov-div-sur"]),
        *((name, ["CrPO-nov-div-sur"], ["CrPO-cre"]) for name in evaluation.THREE),
        *((name, ["CrPO-nov-div-sur"], ["DPO"]) for name in evaluation.THREE),
    ]


def test_a_row_of_the_report():
    """Runs of 1, 2 and 6: a mean of 3 and a standard deviation of sqrt(7) = 2.6."""
    row = {"model": "m", "prompts": 12, "n": 3.0, "n_95": (1.0, 4.0), "n_runs": [1, 2, 6]}
    row |= dict.fromkeys(evaluation.BESIDE, 0.25) | {"hypervolume": None}
    *_, line, _, _ = evaluation.show_rows([row], ["n"]).split("\n")
    assert line == "| m | 12 | 3 (1 to 4), runs ± 2.6 | 0.25 | 0.25 | 0.25 | 0.25 | - |"


def test_prompts_that_one_model_did_not_answer_are_left_out_of_a_difference():
    cells = [cell("m", "p", n=3), cell("m", "q", n=9), cell("n", "p", n=1)]
    assert evaluation.difference(cells, "n", ["m"], ["n"]) == (2, None)
    rows = [{"prompts": 12}]
    assert evaluation.doubts(cells, rows)[0].startswith("the models do not answer the same prompts")
    assert evaluation.doubts(cells[:1], rows) == []


def test_variants_are_the_papers_flags_of_crpo():
    """SFT and DPO aside, nine of the paper and one of ours."""
    assert len(evaluation.VARIANTS) == 11
    assert evaluation.VARIANTS["DPO"] == "--lambda-diversity 0"
    assert evaluation.VARIANTS["CrPO-gated"] == "--combine gated"
    for name, flags in evaluation.VARIANTS.items():
        short = {"nov": "novelty", "div": "diversity", "sur": "surprise", "qua": "quality"}
        signals = short if name == "CrPO-cre" else [s for s in short if s in name.split("-")]
        if signals:
            assert flags == " ".join(f"--lambda-{short[signal]} 1" for signal in signals)


def test_draws_of_a_sweep(monkeypatch):
    pytest.importorskip("matplotlib")
    curves = {"novelty": [(0.5, 1.0, 0.1), (1.0, 1.2, 0.2)]}
    drawn = []
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, path: drawn.append(figure))
    evaluation.draw_sweep(curves, {"novelty": (0.9, 0.8)}, "sweep.png")
    (panel,) = drawn[0].axes
    (bars,) = panel.containers
    assert bars.lines[0].get_xydata().tolist() == [[0.5, 1.0], [1.0, 1.2]]
    ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert ends == [pytest.approx([0.9, 1.1]), pytest.approx([1.0, 1.4])]
    level = {line.get_label(): line.get_ydata()[0] for line in panel.lines}
    assert (level["DPO"], level["SFT"]) == (0.9, 0.8)
