"""scores.py as its user starts it: killed and started again, twice, in several processes.

Each run is a subprocess in a folder of its own, with a cache of its own. It goes through a script
that makes the batches small, writes down what scores.py does, and kills it where a test says so.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from conftest import ROOT, SMALL, make_checkpoint

SIGNALS = ["diversity", "novelty", "surprise"]
COLUMNS = [f"{name}_{side}" for name in SIGNALS for side in ("chosen", "rejected")]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
TORN = b"torn!"  # what a kill leaves of a record that was being written
SCRIPT = f"""
import json, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import transformers, data, scores

scores.TOKENS = 300
open_weights = transformers.PreTrainedModel.from_pretrained.__func__
fill, write_jsonl = scores.Cache.fill, data.write_jsonl
turn = dict.fromkeys(("embeddings", "surprise"), 0)

def tell(**event):
    with open("events", "a") as file:
        print(json.dumps({{"rank": scores.processes()[0], **event}}), file=file)

@classmethod
def told_open(cls, *args, **options):
    model, info = open_weights(cls, *args, **options)
    local = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    tell(opened=cls.__name__, numbers=sum(p.numel() for p in local))
    return model, info

def told_fill(cache, keys, plan, compute, what):
    def told_compute(batch):
        if os.environ.get("KILL_AT") == f"{{what}} {{turn[what]}}":
            os.kill(os.getpid(), signal.SIGKILL)
        turn[what] += 1
        tell(batch=[keys[k].hex() for k in batch], what=what)
        return compute(batch)
    return fill(cache, keys, plan, told_compute, what)

def told_write(path, rows):
    tell(wrote=path)
    write_jsonl(path, rows)

transformers.PreTrainedModel.from_pretrained = told_open
scores.Cache.fill, data.write_jsonl = told_fill, told_write
data.run(scores.main)
"""


def preference_rows() -> list[dict]:
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
    """The script, and the arguments of scores.py that all runs here have in common."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "small.py").write_text(SCRIPT)
    lines = [json.dumps(row) + "\n" for row in preference_rows()]
    (folder / "pref.jsonl").write_text("".join(lines))
    bert = transformers.BertConfig(**SMALL, intermediate_size=64)
    embedder = make_checkpoint(folder / "bert", bert, transformers.AutoModel)
    flags = ["--data", str(folder / "pref.jsonl"), "--out", "scored.jsonl", "--include-rejected"]
    flags += ["--embedder", embedder, "--surprise-model", checkpoints("llama")]
    return [str(folder / "small.py"), *flags]


def records(name: str, content: bytes) -> list[bytes]:
    """Of a cache file: 16 bytes of key, then 4 for each number; its name ends in how many."""
    size = 16 + 4 * int(name.removesuffix(".bin").rsplit("-")[-1])
    assert len(content) % size == 0
    return [content[at : at + size] for at in range(0, len(content), size)]


def run(folder: Path, command, *flags, signals=SIGNALS, processes=1, status=0, **variables):
    """Run in this folder; what the run wrote, said and did, and the cache it left."""
    (folder / "events").write_text("")
    start = [sys.executable, *(TORCHRUN if processes == 2 else []), *command, *flags]
    own = {"CRPO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*start, "--signals", *signals],
        cwd=folder,
        env=os.environ | own | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == status, process.stderr
    events = [json.loads(line) for line in (folder / "events").read_text().splitlines()]
    batches = [event for event in events if "batch" in event]
    scored = b"".join(path.read_bytes() for path in folder.glob("scored.jsonl*"))
    return SimpleNamespace(
        scored=scored,
        rows=[json.loads(line) for line in scored.splitlines()],
        said=process.stdout,
        errors=process.stderr.splitlines(),
        batches=[event["batch"] for event in batches],
        share=Counter((event["what"], event["rank"]) for event in batches),
        opened=[event for event in events if "opened" in event],
        writers=[event["rank"] for event in events if "wrote" in event],
        caches={path.name: path.read_bytes() for path in sorted(folder.glob("cache/*"))},
    )


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """One process, never interrupted; and the same command again."""
    folder = tmp_path_factory.mktemp("whole")
    first = run(folder, command)
    (folder / "scored.jsonl").unlink()
    return SimpleNamespace(**vars(first), again=run(folder, command))


@pytest.fixture(scope="module")
def killed(command, tmp_path_factory):
    """Killed among the embeddings, within a record."""
    folder = tmp_path_factory.mktemp("killed")
    found = run(folder, command, status=-signal.SIGKILL, KILL_AT="embeddings 7")
    for name, content in found.caches.items():
        (folder / "cache" / name).write_bytes(content + TORN)
    return SimpleNamespace(folder=folder, **vars(found))


def test_a_run_keeps_each_number_it_computes_and_tells_its_tables(whole):
    """Many batches of each kind, as the tests below need, and scores that are not all alike."""
    assert whole.share["embeddings", 0] > 20 and whole.share["surprise", 0] > 20
    kept = [record for item in whole.caches.items() for record in records(*item)]
    keys = [record[:16].hex() for record in kept]
    assert keys == [key for batch in whole.batches for key in batch]
    assert len(set(keys)) == len(keys) > 2 * 200
    assert all(len({row[column] for row in whole.rows}) > 50 for column in COLUMNS)
    assert len(whole.opened) == 2 and whole.writers == [0]
    assert whole.said.count("distinct responses scored") == whole.said.count("as measured") == 1


def test_a_second_run_opens_no_weights_and_writes_the_same_bytes(whole):
    assert whole.again.opened == whole.again.batches == []
    assert whole.again.scored == whole.scored and whole.again.said == whole.said
    assert whole.again.caches == whole.caches


def test_what_a_killed_run_has_computed_is_never_computed_again(command, killed, whole, tmp_path):
    """Killed among the embeddings, again among the log-probs, it ends as if nothing had been."""
    shutil.copytree(killed.folder, tmp_path, dirs_exist_ok=True)
    twice = run(tmp_path, command, status=-signal.SIGKILL, KILL_AT="surprise 7")
    end = run(tmp_path, command)
    for number_of_files, before in enumerate((killed, twice), 1):
        assert before.scored == b"" and len(before.caches) == number_of_files
        for name, content in before.caches.items():
            assert records(name, content) and end.caches[name].startswith(content)
    assert min(map(len, (killed.batches, twice.batches, end.batches))) >= 7
    assert killed.batches + twice.batches + end.batches == whole.batches
    assert end.caches == whole.caches
    assert end.scored == whole.scored and end.said == whole.said


def test_two_processes_share_the_work_and_write_the_file_of_one(command, killed, whole, tmp_path):
    """Of what a killed run has left; in the batches of one process, so to the last bit."""
    shutil.copytree(killed.folder, tmp_path, dirs_exist_ok=True)
    both = run(tmp_path, command, processes=2)
    assert both.scored == whole.scored and both.said == whole.said and both.writers == [0]
    assert sorted(killed.batches + both.batches) == sorted(whole.batches)
    for what in ("embeddings", "surprise"):
        assert abs(both.share[what, 0] - both.share[what, 1]) <= 2 and both.share[what, 1] > 6
    assert both.caches.keys() == whole.caches.keys()
    for name, content in both.caches.items():
        assert content.startswith(killed.caches.get(name, b""))
        assert sorted(records(name, content)) == sorted(records(name, whole.caches[name]))
