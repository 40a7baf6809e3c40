"""eval.py paper: the stages, what is skipped, the report. On a tiny random model."""

import data
import eval as evaluation
import scores
from data import UserError

import argparse
import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write

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
    started = SimpleNamespace(lines=[], fails=None)

    def run_stage(words, processes):
        if started.fails and started.fails in " ".join(words):
            return 3
        started.lines.append(" ".join(words))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words)
            runpy.run_path(str(scores.HERE / words[0]), run_name="__main__")
        return 0

    monkeypatch.setattr(evaluation, "run_stage", run_stage)
    return started


@pytest.fixture
def argv(tmp_path, monkeypatch, checkpoints):
    """argv("paper", *flags): flags for `rated_rows` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rated.jsonl", rated_rows())
    scorers = ["--embedder", checkpoints("llama"), "--surprise-model", checkpoints("gpt2")]
    shared = ["--data", "rated.jsonl", "--model", checkpoints("llama"), "--out", "all"]
    return lambda command, *flags: [command, *shared, *scorers, *QUICK, *flags]


@pytest.fixture
def call(argv, run_main):
    return lambda *words: run_main("eval", *argv(*words))


def test_paper_from_ratings_to_report_and_not_twice(call, started, tmp_path):
    variants = ["--variants", "DPO", "CrPO-nov", "CrPO-nov-qua", "--seeds", 2]
    call("paper", *variants)
    lines = list(started.lines)
    assert [" ".join(line.split()[:2]).replace(" --data", "") for line in lines] == [
        *("data.py pairs", "data.py sft", "scores.py judge", "scores.py", "sft.py"),
        *["crpo.py"] * 3,
        *["eval.py generate"] * 5,
        "eval.py score",
    ]
    signals = ("diversity 0", "novelty 1", "novelty 1 --lambda-quality 1")
    for line, flags in zip(lines[5:8], signals, strict=True):
        assert line.startswith("crpo.py --data all/scored.jsonl --model ")
        run = f"--adapter all/runs/SFT --holdout 0 --resume --seed 2 --lambda-{flags} --lora-r"
        assert run in line
        assert "--lora-r 2 --batch-size 2 --max-steps 2" in line
    assert not list(tmp_path.glob("all/runs/*/checkpoint-*"))

    results = json.loads((tmp_path / "all/results.json").read_text())
    models = {row["model"]: row for row in results["rows"]}
    assert {*models} == {"base", "SFT", "DPO", "CrPO-nov", "CrPO-nov-qua", "human"}
    assert {row["prompts"] for row in models.values()} == {3}
    assert results["scorers"]["quality"] == "all/judge"
    assert [row["difference"] for row in results["differences"]] == [
        *("base − DPO", "SFT − DPO", "CrPO-nov − DPO", "CrPO-nov-qua − DPO", "human − DPO"),
        "CrPO-nov-qua − CrPO-nov",
    ]

    report = (tmp_path / "all/report.md").read_text()
    assert all(f"\npython {line}   # " in report for line in lines)
    assert evaluation.tables(results) in report and "CrPO-nov-qua − CrPO-nov  3  " in report

    (tmp_path / "all/responses/CrPO-nov-2.jsonl").unlink()
    (tmp_path / "all/report.md").unlink()
    log = tmp_path / "all/stages.jsonl"  # the last stage, of another command, is done again
    log.write_text(log.read_text().replace("eval.py score", "eval.py score --old"))
    printed = call("paper", *variants)
    again = [line for line in lines if line.endswith("/CrPO-nov-2.jsonl")] + lines[-1:]
    assert started.lines[len(lines) :] == again and "[11/14] python eval.py generate" in printed
    assert (tmp_path / "all/report.md").read_text().count("python ") == report.count("python ")


def test_a_stage_that_fails_ends_it_and_the_next_call_goes_on_there(call, started, tmp_path):
    """Unless what there is was made by another command, or from other data, or one is at it."""
    with data.locked("all"), pytest.raises(UserError, match="--out all: another command is"):
        call("paper", "--variants", "DPO")
    for fails, stage in {"scores.py judge": 3, "crpo.py": 6, "eval.py score": 10}.items():
        started.fails = fails
        with pytest.raises(UserError, match=f"stage {stage} ended with status 3"):
            call("paper", "--variants", "DPO")
        assert len(started.lines) == stage - 1
    assert not (tmp_path / "all/report.md").exists()
    with pytest.raises(UserError, match=r"--out .*: it holds other files"):
        call("paper", "--out", tmp_path)
    stale = r"^all/pref.jsonl: made by another command or from other"
    with pytest.raises(UserError, match=stale):
        call("paper", "--variants", "DPO", "--pairs=--min-gap 7")
    rows = rated_rows()
    write(tmp_path / "rated.jsonl", [*rows, rows[0] | {"response": "one more"}])
    with pytest.raises(UserError, match=stale):
        call("paper", "--variants", "DPO")
    assert len(started.lines) == 9


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--crpo=--max-stepz 5", "unrecognized arguments: --max-stepz 5"),
        ("--sft=--lr cold", "argument --lr: 'cold': expected float"),
        ("--generate=--decoding q=1", "argument --decoding: 'q=1': expected t="),
        ("--model=nowhere", "model nowhere: cannot be loaded"),
        ("--data=unsplit.jsonl", "expected splits Training, and HeldoutItem or HeldoutTask"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_at_once(argv, refused, tmp_path, flag, message):
    write(tmp_path / "unsplit.jsonl", [row | {"split": "Training"} for row in rated_rows()])
    assert message in refused("eval", *argv("paper", flag))


def test_a_stage_is_stopped_with_us_and_waited_for(tmp_path):
    """It stops us as soon as it can be stopped itself, and takes a while to end."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(0.3)\n"
        "    sys.exit(open(sys.argv[1], 'w').close())\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "time.sleep(30)\n"
    )
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))
    with pytest.raises(SystemExit):
        evaluation.run_stage([str(tmp_path / "slow.py"), str(tmp_path / "ended")], 1)
    signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "ended").exists()


def test_a_variant_of_ones_own_and_several_seeds(call, started, tmp_path):
    half = "CrPO-nov-0.5=--lambda-novelty 0.5"
    call("paper", "--variants", "DPO", half, "CrPO-inf", "--seeds", 1, 2)
    crpo = [line for line in started.lines if line.startswith("crpo.py")]
    variants = ("DPO", "CrPO-nov-0.5", "CrPO-inf")
    assert [line.split("--out all/runs/")[1].split()[0] for line in crpo] == [
        f"{name}-{seed}" for seed in (1, 2) for name in variants
    ]
    assert "--lambda-novelty 0.5" in crpo[1]
    results = json.loads((tmp_path / "all/results.json").read_text())
    assert evaluation.tables(results) in (tmp_path / "all/report.md").read_text()
    runs = {row["model"]: row["runs"] for row in results["rows"]}
    assert runs == dict.fromkeys(variants, 2) | {"base": 1, "SFT": 1, "human": 1}
    generate = [line for line in started.lines if line.startswith("eval.py generate")]
    tuned = [line.split("--out ")[1].split()[0] for line in generate[:-1]]
    assert "--name base" in generate[-1] and f"--limit-like {' '.join(tuned)}" in generate[-1]


@pytest.mark.parametrize(
    "text", ["CrPO-new", "a/b=--beta 1", "=--beta 1", "CrPO-x=", "SFT=--beta 1"]
)
def test_a_variant_that_is_neither_the_papers_nor_ones_own_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=FLAGS or one of"):
        evaluation.parse_variant(text)


def test_several_processes_are_started_where_they_help(call, monkeypatch):
    lines = []

    def start(command, preexec_fn):
        assert preexec_fn or sys.platform != "linux"
        lines.append([str(part) for part in command])
        return SimpleNamespace(wait=lambda: 0, terminate=lambda: None)

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(FileNotFoundError):  # nothing has made results.json
        call("paper", "--nproc-per-node", 2, "--variants", "DPO")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    several = [words[7] for words in lines if words[1:7] == launcher]
    alone = [words[1:3] for words in lines if "-m" not in words]
    assert len(several) + len(alone) == len(lines)
    names = [Path(script).name for script in several]
    assert {*names} == {"scores.py", "sft.py", "crpo.py", "eval.py"}
    scripts = [[Path(script).name, command] for script, command in alone]
    assert scripts == [["data.py", "pairs"], ["data.py", "sft"], ["eval.py", "score"]]


def test_variants_are_the_papers_flags_of_crpo():
    """DPO, nine of the paper and three of ours."""
    assert len(evaluation.VARIANTS) == 13
    assert evaluation.VARIANTS["DPO"] == "--lambda-diversity 0"
    assert evaluation.VARIANTS["CrPO-gated"] == "--combine gated"
    short = {signal[:3]: signal for signal in scores.SIGNALS}
    for name, flags in evaluation.VARIANTS.items():
        signals = [s for s in name.replace("cre", "nov-div-sur-qua").split("-") if s in short]
        if signals:
            assert flags == " ".join(f"--lambda-{short[signal]} 1" for signal in signals)
    assert {*evaluation.VARIANTS} >= {name for pair in evaluation.QUALITY_PAIRS for name in pair}
