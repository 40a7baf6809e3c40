"""Commands in processes of their own, forked from the test so that they start at once.

A child that has not ended after a minute is killed, and the test fails with what it printed; what
still runs at the end of a test is killed too (see conftest.py).
"""

import crpo
import data
import eval as evaluation
import scores
import sft

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

SLOW = ["--lr", "1e-5"]  # two times the paper's; Adam moves a weight by it however small its slope
TIMES = ("seconds", "pairs_per_second", "responses_per_second", "tokens_per_second")
LIMIT = 60  # seconds
running: dict[int, Path] = {}  # children that nobody has waited for, and the files of their output


def start(folder: Path, argv: list[str], prepare=lambda: None, log="log", **variables) -> int:
    """Fork a process that runs the command in this folder, with a cache there; its id.

    What it prints goes to the file `log`; prepare() is called in it first.
    """
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        running[child] = folder / log
        return child
    status = 1
    try:
        os.chdir(folder)
        os.environ.update(variables, CRPO_CACHE=str(folder / "cache"))
        sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        sys.argv = argv
        prepare()
        commands = {"crpo.py": crpo, "eval.py": evaluation, "scores.py": scores, "sft.py": sft}
        data.run(commands[argv[0]].main)
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Exit status of a child; minus the signal that killed it."""
    began = time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() - began > LIMIT:
            printed = running[child].read_text()
            kill(child)
            raise AssertionError(f"a process did not end; it printed:\n{printed}")
        time.sleep(0.002)
    del running[child]
    return os.waitstatus_to_exitcode(ended[1])


def kill(child: int) -> int:
    """Kill a child and return its exit status."""
    os.kill(child, signal.SIGKILL)
    del running[child]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder: Path, argv: list[str], prepare=lambda: None) -> int:
    return wait(start(folder, argv, prepare))


def start_two(folder: Path, argv: list[str], prepare=lambda: None) -> list[int]:
    """The command in two processes that know each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared["TORCHELASTIC_RUN_ID"] = "test"
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "log": f"log-{rank}"} for rank in "01"]
    return [start(folder, argv, prepare, **shared, **rank) for rank in ranks]


def run_two(folder: Path, argv: list[str], prepare=lambda: None) -> list[int]:
    return [wait(child) for child in start_two(folder, argv, prepare)]


def at_step(n: int, act, rank: int | None = None):
    """prepare() for `start`: call act() when step n begins, in every process or in that one."""

    def prepare():
        gradient = sft.gradient

        def acting(lm, objective, step, *args):
            if step == n and rank in (None, scores.processes()[0]):
                act()
            return gradient(lm, objective, step, *args)

        sft.gradient = acting

    return prepare


def sending(signum: int):
    """For `at_step`: the process sends itself this signal."""
    return lambda: os.kill(os.getpid(), signum)


def printed(folder: Path, log="log") -> str:
    return (folder / log).read_text()


def metrics(out: Path) -> list[dict]:
    """The rows of metrics.jsonl without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def near(folder: Path, other: Path, losses: float, adapter: float = 1) -> None:
    """The same steps with the same numbers, and the same adapter, of runs that are SLOW.

    A log-prob of this random model is about -130 and the sum of some ten float32 numbers, so passes
    of another shape change it by up to 10 * 130 * 2^-24 = 8e-5. A tenth of that (beta) gets into a
    loss: less than 1e-5 of the greater of 2 and the number itself, which is what is tolerated.
    """
    for mine, theirs in zip(metrics(folder / "run"), metrics(other / "run"), strict=True):
        for name, value in mine.items():
            scale = max(2, abs(theirs[name]))
            assert abs(value - theirs[name]) <= losses * scale, (name, value, theirs[name])
    a, b = (load_file(f / "run" / "adapter_model.safetensors") for f in (folder, other))
    assert a.keys() == b.keys()
    assert max((a[key] - b[key]).abs().max() for key in a) <= adapter
