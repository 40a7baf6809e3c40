"""Two processes give what one gives, whether the frozen weights are whole in each or cut in two.

They are forked from the test and meet through gloo, as those of torchrun do; the last test goes
through torchrun itself.
"""

import sft

import os
import signal
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT, contents
from forked import SLOW, at_step, near, printed, run, run_two, sending, start_two, wait
from safetensors.torch import load_file

BOTH = pytest.mark.parametrize("name", ["crpo", "sft"])


@pytest.fixture(scope="module")
def alone(argv, tmp_path_factory):
    """alone(name, *flags) is the folder of a run of one process, made once."""

    @cache
    def get(name, *flags):
        folder = tmp_path_factory.mktemp(name)
        assert run(folder, [*argv(name), *SLOW, *flags]) == 0, printed(folder)
        return folder

    return get


@BOTH
@pytest.mark.parametrize("batch_size", ["5", "1"])
def test_two_processes_train_as_one(argv, alone, tmp_path, name, batch_size):
    """Five items a step are three and two; of one item the second process has none."""
    flags = "--batch-size", batch_size, "--micro-tokens", "60"
    whole = alone(name, *flags)
    assert run_two(tmp_path, [*argv(name), *SLOW, *flags]) == [0, 0], printed(tmp_path, "log-0")
    near(tmp_path, whole, 1e-6, 1e-6)
    moved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert max(t.abs().max() for key, t in moved.items() if "lora_B" in key) > 2e-5
    assert printed(tmp_path, "log-1") == ""  # only the first one speaks
    assert contents(tmp_path / "run").keys() == contents(whole / "run").keys()


def check_sizes():
    """Once it is cut, a process holds half of the blocks' numbers, and the others whole."""
    shard = sft.shard

    def checked(lm):
        before = sum(p.numel() for p in lm.model.parameters())
        shard(lm)
        local = [getattr(p, "to_local", lambda p=p: p)() for p in lm.model.parameters()]
        blocks = sum(p.numel() for p in lm.model.model.layers.parameters())
        assert sum(p.numel() for p in local) == before - blocks // 2 and blocks > before / 3
        print("cut in two")

    sft.shard = checked


@BOTH
@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"]])
def test_a_model_cut_in_two_trains_as_one_that_is_whole(argv, alone, tmp_path, name, more):
    flags = "--batch-size", "3", "--micro-tokens", "60"
    command = [*argv(name), *SLOW, *flags, "--shard", *more]
    assert run_two(tmp_path, command, check_sizes) == [0, 0], printed(tmp_path, "log-0")
    assert "cut in two" in printed(tmp_path, "log-0")
    near(tmp_path, alone(name, *flags), 1e-5, 1e-5)


def test_a_model_with_an_adapter_below_is_cut_and_merged(argv, alone, tmp_path):
    """What --merge writes is what one process writes; the start is the model of sft.py."""
    flags = ["--adapter", str(alone("sft") / "run"), "--batch-size", "3", "--merge"]
    whole = alone("crpo", *flags)
    assert run_two(tmp_path, [*argv("crpo"), *SLOW, *flags, "--shard"]) == [0, 0]
    near(tmp_path, whole, 1e-5, 1e-5)
    merged = [load_file(f / "run" / "merged" / "model.safetensors") for f in (tmp_path, whole)]
    assert max((merged[0][key] - merged[1][key]).abs().max() for key in merged[1]) < 1e-5


@pytest.mark.parametrize("first", ["whole", "cut"])
def test_checkpoints_move_between_one_whole_and_one_cut_in_two(argv, alone, tmp_path, first):
    """Killed in step 3 in one form, resumed in the other."""
    command, stop = [*argv("crpo"), *SLOW, "--batch-size", "3"], at_step(3, sending(signal.SIGKILL))
    if first == "whole":
        assert run(tmp_path, command, stop) == -signal.SIGKILL
        assert run_two(tmp_path, [*command, "--shard", "--resume"]) == [0, 0]
    else:
        assert 0 not in run_two(tmp_path, [*command, "--shard"], stop)
        assert run(tmp_path, [*command, "--resume"]) == 0
    log = "log-0" if first == "whole" else "log"
    assert "resume      from run/checkpoint-2" in printed(tmp_path, log)
    near(tmp_path, alone("crpo", "--batch-size", "3"), 1e-5, 1e-5)


def test_a_process_that_dies_ends_the_other_with_a_sentence(argv, alone, tmp_path):
    """Killed in step 5: what the first one saved before is whole, and one goes on from it alone."""
    command, one_dies = [*argv("crpo"), *SLOW], at_step(5, sending(signal.SIGKILL), rank=1)
    assert run_two(tmp_path, command, one_dies) == [2, -signal.SIGKILL]
    assert "this process ends, as another one has ended" in printed(tmp_path, "log-0")
    assert "Traceback" not in printed(tmp_path, "log-0")
    assert [p.name for p in sft.checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    assert run(tmp_path, [*command, "--resume"]) == 0
    near(tmp_path, alone("crpo"), 1e-5, 1e-5)


def test_a_mistake_is_reported_once(argv, tmp_path):
    """Both meet it; the second waits for the first to be heard, and torchrun to end it."""
    first, second = start_two(tmp_path, [*argv("sft"), "--lora-targets", "wq"])
    assert wait(first) == 2
    assert printed(tmp_path, "log-0").startswith("sft.py: --lora-targets: wq is no linear layer")
    os.kill(second, signal.SIGTERM)
    assert wait(second) == 143
    assert printed(tmp_path, "log-1") == ""


def test_processes_are_those_of_torchrun(argv, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(tmp_path, argv("sft")) == 2
    assert "WORLD_SIZE is set, but not by torchrun" in printed(tmp_path)
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
