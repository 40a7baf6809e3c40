"""Commands in processes of their own, forked from the test so that they start at once."""

import json
import os
import socket
import sys
from pathlib import Path

import crpo
import data
import eval as evaluation
import scores
import sft

TIMES = ("seconds", "pairs_per_second", "responses_per_second", "tokens_per_second")


def start(folder: Path, argv: list[str], prepare=lambda: None, log="said", **variables) -> int:
    """Fork a process that runs the command in this folder, with a cache there; its id.

    What it prints goes to the file `log`; prepare() is called in it first.
    """
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child:
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
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "log": f"said-{rank}"} for rank in "01"]
    return [start(folder, argv, prepare, **shared, **rank) for rank in ranks]


def run_two(folder: Path, argv: list[str], prepare=lambda: None) -> list[int]:
    return [wait(child) for child in start_two(folder, argv, prepare)]


def said(folder: Path, log="said") -> str:
    return (folder / log).read_text()


def metrics(out: Path) -> list[dict]:
    """The rows of metrics.jsonl without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
