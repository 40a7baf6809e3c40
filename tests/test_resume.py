"""Runs that are killed, or meet a disk that refuses: nothing half-written, nothing lost.

A command runs in a process of its own, forked from this one so that it starts at once. What a kill
leaves on the disk depends only on which of the things that the process does to it came before, so
processes kill themselves before the n-th of these, or half-way through it.
"""

import data
import sft

import io
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, contents
from forked import SLOW, at_step, kill, metrics, near, printed, run, start, wait
from torch import nn

BOTH = pytest.mark.parametrize("name", ["crpo", "sft"])
KILLED = -signal.SIGKILL


def outcome(folder: Path) -> dict:
    """What a finished run has left: every file but the times in metrics.jsonl."""
    files = contents(folder / "run")
    record = json.loads(files.pop("run.json"))
    return files | {"metrics.jsonl": metrics(folder / "run"), "run.json": record}


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """whole(name) is what a run of that command leaves that nothing has interrupted."""

    @cache
    def get(name):
        folder = tmp_path_factory.mktemp(name)
        assert run(folder, argv(name)) == 0, printed(folder)
        return outcome(folder)

    return get


def one_sentence(folder: Path, name: str) -> str:
    """The only line of an error; progress bars aside."""
    text = printed(folder)
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if f"{name}.py: " in line]
    return line[line.index(f"{name}.py: ") :]


@BOTH
def test_the_newest_two_checkpoints_stay_and_hold_state_and_adapter(whole, name):
    """Nine steps, one saved every second and the last: 8 and 9 are left; the last is the result."""
    files = whole(name)
    folders = {path.split("/")[0] for path in files if path.startswith("checkpoint")}
    assert folders == {"checkpoint-8", "checkpoint-9"}
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert files[f"checkpoint-9/{file}"] == files[file]
    assert files["checkpoint-8/state.pt"] != files["checkpoint-9/state.pt"]
    assert not any(path.endswith(".part") for path in files)


def killer(n: int):
    """Before the n-th thing it does to the disk, the process kills itself; in a write, half-way."""

    def prepare():
        turns = itertools.count(1)

        def deadly(call, half=None):
            def wrapped(*args, **options):
                if next(turns) == n:
                    if half:
                        half(*args)
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return wrapped

        def add_half(path, content):
            with open(path, "ab") as file:
                file.write(content[: len(content) // 2])

        def half_state(state, path):
            whole_state(state, buffer := io.BytesIO())
            add_half(path, buffer.getvalue())

        os.replace = deadly(os.replace)
        sft.shutil.rmtree = deadly(sft.shutil.rmtree)
        for name in ("rename", "unlink", "mkdir"):
            setattr(Path, name, deadly(getattr(Path, name)))
        Path.write_bytes = deadly(Path.write_bytes, add_half)
        whole_state, torch.save = torch.save, deadly(torch.save, half_state)
        sft.open = deadly(open, lambda path, mode: add_half(path, 2 * b'{"step": 3, "lo'))

    return prepare


@BOTH
def test_killed_ever_later_a_resumed_run_ends_as_if_nothing_had_been(argv, whole, tmp_path, name):
    """In one folder, until a run does fewer things to the disk than the next kill waits for."""
    turns, kills = iter([1, 3, 6, *range(10, 1000, 5)]), 0
    while status := run(tmp_path, [*argv(name), "--resume"], killer(next(turns))):
        assert status == KILLED, printed(tmp_path)
        kills += 1
        for folder in sft.checkpoints(tmp_path / "run"):
            torch.load(folder / "state.pt", weights_only=True)  # one that has its name is whole
    assert kills > 6
    assert outcome(tmp_path) == whole(name)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_training_ends_with_its_status(argv, tmp_path, signum, status):
    def prepare():
        data.read_samples = lambda path: os.kill(os.getpid(), signum)

    assert run(tmp_path, argv("sft"), prepare) == status
    assert not (tmp_path / "run").exists()


def test_an_interrupt_while_importing_prints_nothing(tmp_path):
    """In none of the commands, whatever it imports first; another error is printed."""
    for module in ("numpy", "torch", "transformers", "safetensors", "huggingface_hub"):
        (tmp_path / f"{module}.py").write_text("import os\nraise eval(os.environ['ERROR'])")
    for name in ("data", "scores", "sft", "crpo", "eval"):
        for error, status in (("KeyboardInterrupt", -signal.SIGINT), ("ValueError(7)", 1)):
            env = {"PYTHONPATH": str(tmp_path), "ERROR": error}
            command = [sys.executable, str(ROOT / f"{name}.py")]
            ended = subprocess.run(command, env=env, capture_output=True, text=True)
            assert ended.returncode == status
            assert ended.stderr.endswith("ValueError: 7\n") if status == 1 else not ended.stderr


def test_a_finished_run_is_resumed_without_a_change_and_replaced_only_if_told_to(argv, tmp_path):
    def names():
        return [path.name for path in sorted((tmp_path / "run").iterdir()) if path.is_dir()]

    assert run(tmp_path, argv("crpo")) == 0
    before = contents(tmp_path / "run")
    assert run(tmp_path, argv("crpo")) == 2
    assert "--out run: there is a run in it; add --resume to go on," in printed(tmp_path)
    assert contents(tmp_path / "run") == before
    assert run(tmp_path, [*argv("crpo"), "--resume", "--merge"]) == 0
    after = contents(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert names() == ["checkpoint-8", "checkpoint-9", "merged"]
    assert run(tmp_path, [*argv("crpo"), "--overwrite", "--max-steps", "2"]) == 0
    assert names() == ["checkpoint-2"]


CHANGES = [
    (["--lr", "0.02"], "lr was 0.01, not 0.02"),
    (["--seed", "7", "--beta", "1"], "beta was 0.1, not 1.0; seed was 42, not 7"),
    (["--data", "changed.jsonl"], "sha256 of data was [0-9a-f]*, not "),
    (["--eval-data", "changed.jsonl"], "sha256 of eval_data was None, not "),
    (["--model", "other"], "model was .*; sha256 of model was "),
    (["--adapter", "other"], "adapter was None, not other"),
]


def test_what_has_changed_is_refused_and_named(argv, checkpoints, tmp_path):
    stopped = [*argv("crpo"), "--max-steps", "2"]
    assert run(tmp_path, stopped) == 0
    rows = Path(argv("crpo")[2]).read_text()
    (tmp_path / "changed.jsonl").write_text(rows.replace("violin", "guitar"))
    (tmp_path / "other").symlink_to(checkpoints("llama-tied"))
    before = contents(tmp_path / "run")
    for flags, message in CHANGES:
        (tmp_path / "log").unlink()
        assert run(tmp_path, [*stopped, "--resume", *flags]) == 2
        sentence = one_sentence(tmp_path, "crpo")
        assert sentence.startswith("crpo.py: --resume run: ")
        assert re.search(message, sentence) and sentence.endswith("or --overwrite")
        assert contents(tmp_path / "run") == before


def test_what_may_change_is_where_and_how_a_run_computes(argv, tmp_path):
    """Data of another name, smaller passes, recomputed blocks: the numbers stay."""
    command, other = [*argv("crpo"), *SLOW], tmp_path / "other"
    assert run(tmp_path, [*command, "--out", "first"], killer(40)) == KILLED
    assert sft.checkpoints(tmp_path / "first")
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(command[2]).read_bytes())
    (tmp_path / "first").rename(tmp_path / "run")
    flags = ["--data", str(moved), "--micro-tokens", "1", "--gradient-checkpointing"]
    assert run(tmp_path, [*command, *flags, "--save-every", "5", "--resume"]) == 0
    assert run(other, command) == 0
    near(tmp_path, other, 1e-5)


@BOTH
def test_a_disk_that_is_full_is_reported_and_the_last_checkpoint_stays(argv, whole, tmp_path, name):
    """No file may grow past 12 KB from step 5 on: a state takes more."""

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))

    assert run(tmp_path, argv(name), at_step(5, fill)) == 2
    sentence = one_sentence(tmp_path, name)
    assert sentence.startswith(f"{name}.py: run/checkpoint-6: cannot be written (")
    names = [path.name for path in sorted((tmp_path / "run").iterdir())]
    assert names == ["checkpoint-2", "checkpoint-4", "metrics.jsonl", "run.json"]
    assert run(tmp_path, [*argv(name), "--resume"]) == 0
    assert outcome(tmp_path) == whole(name)


def test_a_folder_that_vanishes_is_reported(argv, tmp_path):
    assert run(tmp_path, argv("sft"), at_step(3, lambda: sft.shutil.rmtree("run"))) == 2
    sentence = one_sentence(tmp_path, "sft")
    assert sentence == "sft.py: [Errno 2] No such file or directory: 'run/metrics.jsonl'"
    assert not (tmp_path / "run").exists()


FULL = "out of memory; in training lower --micro-tokens, "


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), FULL),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), FULL),
        (IndexError("index out of range in self"), "the model lacks tokens of its tokenizer"),
    ],
)
def test_what_torch_runs_into_is_reported_in_a_sentence(argv, tmp_path, error, message):
    def fail():
        raise error

    assert run(tmp_path, argv("crpo"), at_step(0, fail)) == 2
    assert one_sentence(tmp_path, "crpo").startswith(f"crpo.py: {message}")


def test_two_runs_do_not_write_to_one_folder(argv, tmp_path):
    """The second starts while the first waits in step 3; once that is killed, it may."""

    def stay():
        (tmp_path / "there").touch()
        time.sleep(60)

    first = start(tmp_path, argv("sft"), at_step(3, stay))
    while not (tmp_path / "there").exists():
        time.sleep(0.01)
    for flag in ("--resume", "--overwrite"):
        assert wait(start(tmp_path, [*argv("sft"), flag], log="second")) == 2
        assert "--out run: another command is writing it" in printed(tmp_path, "second")
        (tmp_path / "second").unlink()
    assert kill(first) == KILLED
    assert run(tmp_path, [*argv("sft"), "--overwrite"]) == 0


def test_damaged_metrics_are_reported_with_their_line(argv, tmp_path):
    assert run(tmp_path, argv("sft")) == 0
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    for line, message in ((b"\x00" * 20, "not a line of JSON"), (b"{}", "'step' is missing")):
        path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
        before = contents(tmp_path / "run")
        assert run(tmp_path, [*argv("sft"), "--resume"]) == 2
        assert f"run/metrics.jsonl:2: {message}" in printed(tmp_path).splitlines()[-1]
        assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("step", [0, 5])
def test_a_gradient_that_is_not_finite_leaves_the_state_before_it(argv, whole, tmp_path, step):
    """The pairs of the step are named, and its checkpoint is whole."""

    def ruin():
        backward = torch.Tensor.backward
        torch.Tensor.backward = lambda loss: backward(loss * torch.inf)

    assert run(tmp_path, argv("crpo"), at_step(step, ruin)) == 2
    line = rf"{re.escape(argv('crpo')[2])}:\d+"
    message = rf"step {step}: .* not finite; pairs of it: {line}, {line}\."
    assert re.search(message, one_sentence(tmp_path, "crpo"))
    assert run(tmp_path, [*argv("crpo"), "--resume"]) == 0
    assert f"resume      from run/checkpoint-{step}" in printed(tmp_path)
    assert outcome(tmp_path)["metrics.jsonl"] == whole("crpo")["metrics.jsonl"]


def test_a_layer_that_learns_nothing_is_reported():
    """As after a backward that never reached it: its B would stay zero without a word."""
    used, idle = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def objective(step, indices):
        yield used.sum(), {"loss": used.detach().sum(), "tokens": 1}

    with pytest.raises(data.UserError, match=r"--lora-targets: tower\.B takes no part"):
        sft.gradient(None, objective, 0, [0], {"head.B": used, "tower.B": idle})
