"""Two processes give what one gives, whether the frozen weights are whole in each or cut in two.

They are forked from the test and meet through gloo, as those of torchrun do; the last test goes
through torchrun itself.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ROOT, contents
from forked import SLOW, at_step, near, run, run_two, said, start_two, told, wait
from safetensors.torch import load_file

import sft

BOTH = pytest.mark.parametrize("name", ["crpo", "sft"])


@pytest.fixture(scope="module")
def alone(argv, tmp_path_factory):
    """alone(name, *flags) is the folder of a run of one process, made once."""
    made = {}

    def get(name, *flags):
        if (name, flags) not in made:
            made[name, flags] = folder = tmp_path_factory.mktemp(name)
            assert run(folder, [*argv(name), *SLOW, *flags]) == 0, said(folder)
        return made[name, flags]

    return get


@BOTH
@pytest.mark.parametrize("batch_size", ["5", "1"])
def test_two_processes_train_as_one(argv, alone, tmp_path, name, batch_size):
    """Five items a step are three and two; of one item the second process has none."""
    flags = "--batch-size", batch_size, "--micro-tokens", "60"
    whole = alone(name, *flags)
    assert run_two(tmp_path, [*argv(name), *SLOW, *flags]) == [0, 0], said(tmp_path, "said-0")
    near(tmp_path, whole, 1e-6, 1e-6)
    moved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert max(t.abs().max() for key, t in moved.items() if "lora_B" in key) > 2e-5
    assert said(tmp_path, "said-1") == ""  # only the first one speaks
    assert contents(tmp_path / "run").keys() == contents(whole / "run").keys()


def tell_size():
    """Write how many numbers of the model this process holds, once it is cut."""
    shard = sft.shard

    def told(lm):
        before = sum(p.numel() for p in lm.model.parameters())
        shard(lm)
        local = [getattr(p, "to_local", lambda p=p: p)() for p in lm.model.parameters()]
        blocks = sum(p.numel() for p in lm.model.model.layers.parameters())
        sizes = before, sum(p.numel() for p in local), blocks
        Path(f"size-{dist.get_rank()}").write_text(" ".join(map(str, sizes)))

    sft.shard = told


@BOTH
@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"]])
def test_a_model_cut_in_two_trains_as_one_that_is_whole(argv, alone, tmp_path, name, more):
    """Each process holds half of the numbers of the blocks, and the rest of them whole."""
    flags = "--batch-size", "3", "--micro-tokens", "60"
    command = [*argv(name), *SLOW, *flags, "--shard", *more]
    assert run_two(tmp_path, command, tell_size) == [0, 0], said(tmp_path, "said-0")
    near(tmp_path, alone(name, *flags), 1e-5, 1e-5)
    for rank in "01":
        before, local, blocks = map(int, said(tmp_path, f"size-{rank}").split())
        assert local == before - blocks // 2 and blocks > before / 3


def test_a_tied_model_with_an_adapter_below_is_cut_and_merged(argv, alone, checkpoints, tmp_path):
    """What --merge writes is what one process writes; the start is the model of sft.py."""
    below = alone("sft") / "run"
    flags = ["--adapter", str(below), "--batch-size", "3", "--merge"]
    whole = alone("crpo", *flags)
    assert run_two(tmp_path, [*argv("crpo"), *SLOW, *flags, "--shard"]) == [0, 0]
    near(tmp_path, whole, 1e-5, 1e-5)
    merged = [load_file(f / "run" / "merged" / "model.safetensors") for f in (tmp_path, whole)]
    assert max((merged[0][key] - merged[1][key]).abs().max() for key in merged[1]) < 1e-5


@pytest.mark.parametrize(
    ("first", "then"),
    [((1, []), (2, ["--shard"])), ((2, ["--shard"]), (1, [])), ((2, []), (1, []))],
)
def test_checkpoints_move_between_one_and_two_and_between_cut_and_whole(
    argv, alone, tmp_path, first, then
):
    """Stopped after step 3 in one form, resumed in another."""
    starts = {1: lambda *args: [run(*args)], 2: run_two}
    flags, stop = [*argv("crpo"), *SLOW, "--batch-size", "3"], at_step(3, told(signal.SIGTERM))
    (count, more), (count_then, more_then) = first, then
    assert starts[count](tmp_path, [*flags, *more], stop) == [143] * count
    status = starts[count_then](tmp_path, [*flags, *more_then, "--resume"])
    assert status == [0] * count_then
    log = "said" if count_then == 1 else "said-0"
    assert "resume      from run/checkpoint-4" in said(tmp_path, log)
    near(tmp_path, alone("crpo", "--batch-size", "3"), 1e-5, 1e-5)


def test_a_signal_to_one_process_stops_all_after_the_same_step(argv, tmp_path):
    one_stops = at_step(2, told(signal.SIGINT), rank=1)
    assert run_two(tmp_path, argv("sft"), one_stops) == [130, 130]
    assert "stopped     run/checkpoint-3 is saved" in said(tmp_path, "said-0")


def test_a_second_sigterm_does_not_end_a_save(argv, tmp_path):
    """As torchrun sends it once one process has ended; the second waits for the first to save."""

    def slow():
        at_step(2, told(signal.SIGTERM))()
        write = sft.State.write

        def written(state, folder):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            write(state, folder)
            Path("written").touch()

        sft.State.write = written

    children = start_two(tmp_path, [*argv("sft"), "--save-every", "100"], slow)
    assert wait(children[1]) == 143
    assert (tmp_path / "written").exists()
    assert wait(children[0]) == 143
    assert [path.name for path in sft.checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_a_process_that_dies_ends_the_other_with_a_sentence(argv, tmp_path):
    """Killed in step 5: what the first one saved before is whole, and the run goes on from it."""

    one_dies = at_step(5, told(signal.SIGKILL), rank=1)
    assert run_two(tmp_path, argv("crpo"), one_dies) == [1, -signal.SIGKILL]
    text = said(tmp_path, "said-0")
    assert "crpo.py: process 0 ends: another process has ended; see its message" in text
    assert "Traceback" not in text
    names = [path.name for path in sft.checkpoints(tmp_path / "run")]
    assert names == ["checkpoint-2", "checkpoint-4"]
    assert run_two(tmp_path, [*argv("crpo"), "--resume"]) == [0, 0]


def test_a_mistake_is_reported_once(argv, tmp_path):
    """Both meet it; the second waits for the first to be heard, and torchrun to end it."""
    first, second = start_two(tmp_path, [*argv("sft"), "--lora-targets", "wq"])
    assert wait(first) == 2
    assert said(tmp_path, "said-0").startswith("sft.py: --lora-targets: wq is no linear layer")
    os.kill(second, signal.SIGTERM)
    assert wait(second) == 143
    assert said(tmp_path, "said-1") == ""


def test_processes_are_those_of_torchrun(argv, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(tmp_path, argv("sft")) == 2
    assert "WORLD_SIZE is set, but not by torchrun" in said(tmp_path)
    assert not (tmp_path / "run").exists()


def test_torchrun(argv, alone, tmp_path):
    """The command as README has it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = ["--batch-size", "3"]
    command = [*torchrun, "--nproc-per-node", "2", str(ROOT / "crpo.py"), *argv("crpo")[1:], *SLOW]
    environment = os.environ | {"CRPO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, *flags], cwd=tmp_path, env=environment, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    near(tmp_path, alone("crpo", *flags), 1e-6, 1e-6)
    assert ran.stdout.decode().count("saved       run/") == 1
