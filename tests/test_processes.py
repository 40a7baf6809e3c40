"""scores.py as whole runs: what was computed is kept through kills, and two processes share it."""

import scores

import json
import os
import shutil
import signal
import sqlite3
from collections import Counter

import forked
import numpy as np
import pytest
import transformers
from conftest import SMALL, contents, make_checkpoint, read, write


def random_rows() -> list[dict]:
    """Four prompts of 70 random responses in two tasks; Y_x is 50 of them; words recur."""
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 6, 240)]
    rows = []
    for k in range(4):
        texts = [" ".join(rng.choice(vocabulary, n)) for n in rng.integers(1, 9, 70)]
        about = {"task": ("Uses", "Lies")[k % 2], "prompt": f"Think of {vocabulary[k]}."}
        rows += [about | {"chosen": texts[i % 50], "rejected": texts[i - 1]} for i in range(70)]
    return rows


@pytest.fixture(scope="module")
def command(checkpoints, tmp_path_factory):
    """The command line of scores.py that all runs here have in common."""
    folder = tmp_path_factory.mktemp("command")
    bert = transformers.BertConfig(**SMALL, intermediate_size=64)
    embedder = make_checkpoint(folder / "bert", bert, transformers.AutoModel)
    data = str(write(folder / "pref.jsonl", random_rows()))
    flags = ["--data", data, "--out", "scored.jsonl", "--include-rejected", "--embedder", embedder]
    return ["scores.py", *flags, "--surprise-model", checkpoints("llama")]


def watch(kill_at=None):
    """Note every batch in a file; kill the process in a write before that kind and number."""

    def prepare():
        scores.TOKENS = 300
        compute_once, turn = scores.compute_once, Counter()

        def noted_once(kind, checkpoint, keys, plan, compute):
            def noted(batch):
                if kill_at == (kind, turn[kind]):
                    (path,) = scores.data.cache_folder().glob(f"{kind}-*")
                    with scores.open_cache(path) as table:
                        table.execute("INSERT INTO numbers VALUES ('torn', '', 0)")
                        os.kill(os.getpid(), signal.SIGKILL)
                turn[kind] += 1
                event = [kind, scores.processes()[0], [keys[k].hex() for k in batch]]
                with open("batches.jsonl", "a") as file:
                    print(json.dumps(event), file=file)
                return compute(batch)

            return compute_once(kind, checkpoint, keys, plan, noted)

        scores.compute_once = noted_once

    return prepare


def batches(folder):
    return [batch for _, _, batch in read(folder / "batches.jsonl")]


def printed(folder, log="log") -> str:
    """The tables that a run printed last, without its progress bars."""
    return forked.printed(folder, log).rpartition(" pairs, ")[2]


def records(folder) -> dict[str, list[tuple[bytes, bytes]]]:
    """Of each cache file, sorted: a key and its numbers."""
    tables = {}
    for path in (folder / "cache").glob("*.sqlite"):
        tables[path.name] = sorted(sqlite3.connect(path).execute("SELECT key, value FROM numbers"))
    return tables


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of a run in one process that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert forked.run(folder, command, watch()) == 0
    return folder


@pytest.fixture(scope="module")
def killed(command, tmp_path_factory):
    """The folder of a run that was killed among the embeddings."""
    folder = tmp_path_factory.mktemp("killed")
    assert forked.run(folder, command, watch(("embeddings-mean", 7))) == -signal.SIGKILL
    return folder


def test_a_run_keeps_each_number_it_computes(whole):
    """Many batches of each kind, as the tests below need, and scores that are not all alike."""
    kinds = Counter(what for what, _, _ in read(whole / "batches.jsonl"))
    assert kinds["embeddings-mean"] > 20 and kinds["logps"] > 20
    keys = {key.hex() for some in records(whole).values() for key, _ in some}
    computed = [key for batch in batches(whole) for key in batch]
    assert sorted(keys) == sorted(computed) and len(computed) > 2 * 200
    columns = [f"{signal}_chosen" for signal in ("diversity", "novelty", "surprise")]
    rows = read(whole / "scored.jsonl")
    assert all(len({row[column] for row in rows}) > 50 for column in columns)


def test_what_a_killed_run_has_computed_is_never_computed_again(command, killed, whole, tmp_path):
    """Killed among the embeddings, again among the log-probs, it ends as if nothing had been."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    assert len(list((tmp_path / "cache").glob("*.sqlite"))) == 1
    assert forked.run(tmp_path, command, watch(("logps", 7))) == -signal.SIGKILL
    assert len(list((tmp_path / "cache").glob("*.sqlite"))) == 2
    assert not (tmp_path / "scored.jsonl").exists()
    assert forked.run(tmp_path, command, watch()) == 0
    assert batches(tmp_path) == batches(whole)
    assert records(tmp_path) == records(whole)
    assert printed(tmp_path) == printed(whole)
    assert forked.run(tmp_path, command, watch()) == 0  # and once more
    assert batches(tmp_path) == batches(whole)
    assert (tmp_path / "scored.jsonl").read_bytes() == (whole / "scored.jsonl").read_bytes()


def test_two_processes_share_the_work_and_write_the_file_of_one(command, killed, whole, tmp_path):
    """Of what a killed run has left; in the batches of one process, so to the last bit."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    before = len(batches(tmp_path))
    assert forked.run_two(tmp_path, command, watch()) == [0, 0]
    assert (tmp_path / "scored.jsonl").read_bytes() == (whole / "scored.jsonl").read_bytes()
    assert printed(tmp_path, "log-0") == printed(whole)
    assert printed(whole).count("length removed") == 1
    assert not printed(tmp_path, "log-1")
    assert sorted(batches(tmp_path)) == sorted(batches(whole))
    share = Counter((what, rank) for what, rank, _ in read(tmp_path / "batches.jsonl")[before:])
    for what in ("embeddings-mean", "logps"):
        assert abs(share[what, 0] - share[what, 1]) <= 2 and share[what, 1] > 6
    assert records(tmp_path) == records(whole)


def test_two_processes_fit_the_judge_of_one_and_score_with_it(command, tmp_path):
    texts = [(row["prompt"], row["chosen"]) for row in random_rows()]
    rated = [{"prompt": prompt, "response": y, "score": len(y)} for prompt, y in texts]
    data = write(tmp_path / "rated.jsonl", rated)
    fit = ["scores.py", "judge", "--data", str(data), "--out", "judge", "--embedder", command[7]]
    use = [*command, "--signals", "quality", "--reward-model", "judge"]
    one, two = tmp_path / "one", tmp_path / "two"
    for argv in (fit, use):
        assert forked.run(one, argv) == 0 and forked.run_two(two, argv) == [0, 0]
    assert contents(one / "judge") == contents(two / "judge")
    assert (one / "scored.jsonl").read_bytes() == (two / "scored.jsonl").read_bytes()
    assert printed(one) == printed(two, "log-0")
