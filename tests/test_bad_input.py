"""What users get wrong: one sentence with place, fault and what right looks like; nothing changed.

Every case is a command line in a folder with a file `data.jsonl` in it, and sometimes a model or an
adapter that is broken in one way. The exit status is 2, stderr is one line, there is no traceback,
and afterwards the folder holds what it held before.
"""

import data
import scores
import sft

import json
import re
import shutil

import pytest
import torch
import transformers
from conftest import CONFIGS, load_lm, make_tokenizer
from safetensors.torch import load_file, save_file

GOOD = {"prompt": "A use for a brick?", "chosen": "A door stop.", "rejected": "A brick."}
SCORED = GOOD | {f"{name}_chosen": 0.5 for name in scores.SIGNALS}
RATED = {"task": "Uses", "prompt": "A use for a brick?", "response": "A stop.", "score": 30}

CRPO, SFT = "crpo --data data.jsonl", "sft --data data.jsonl"
GENERATE = "eval generate --prompts data.jsonl --out new.jsonl"
SCORE = "scores --data data.jsonl --out new.jsonl --embedder tiny --surprise-model tiny"
JUDGE = "scores judge --data data.jsonl --out judge --embedder tiny"
PAIRS = "data pairs --data data.jsonl --out new.jsonl"


def lines(rows) -> bytes:
    """JSONL of a dict or several; strings and bytes are lines as they are."""
    rows = rows if isinstance(rows, tuple | list) else [rows]
    raw = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
    return b"".join((r if isinstance(r, bytes) else r.encode()) + b"\n" for r in raw)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands run, with a good data.jsonl."""
    (tmp_path / "data.jsonl").write_bytes(lines([SCORED, SCORED | {"chosen": "A pillow."}]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def check(folder, refused):
    """check(command, message): it is refused with a sentence in which the pattern is found."""

    def call(command, message):
        name, *flags = command.split()
        assert re.search(message, refused(name, *flags))

    return call


def good(**other) -> dict:
    return GOOD | other


PREFERENCES = {
    "broken JSON": ([GOOD, "{oops"], r"data.jsonl:2: not a line of JSON in UTF-8"),
    "nested without end": ("[" * 10**5, r"data.jsonl:1: not a line of JSON"),
    "two answers but for a blank": (GOOD | {"chosen": "A. ", "rejected": "A."}, r":1: .* two diff"),
    "a worse chosen": (good(score_chosen=2, score_rejected=3), r"'score_chosen' is 2; .* no less"),
    "two prompts": ({"question": "x", "input": "y"}, r":1: join 'question' and 'input' into one"),
    "a break of lines": (good(prompt=[{"role": "\u2028", "content": "x"}]), r'is " "; expected u'),
    "an escape": (good(task="a\x1b[2J"), r":1: it holds the character U.001b; remove it"),
    "a score of one row only": ([SCORED, GOOD], r":2: 'diversity_chosen' is missing; expected"),
    "a weight of one row only": ([good(weight=1), GOOD], r":2: 'weight' is missing"),
    "weights that are all 0": (good(weight=0), r"every pair has weight 0"),
}


@pytest.mark.parametrize("case", PREFERENCES)
def test_a_preference_file(check, folder, case):
    rows, message = PREFERENCES[case]
    (folder / "data.jsonl").write_bytes(lines(rows))
    check(CRPO, message)


def pickled(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def half_of_weights(model):
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def without_tokenizer(model):
    for path in model.glob("*token*"):
        path.unlink()


def with_tokenizer(chat_template=None, **special):
    def change(model):
        tokenizer = make_tokenizer(chat_template=chat_template)
        for name, token in special.items():
            setattr(tokenizer, name, token)
        tokenizer.save_pretrained(model)

    return change


MODELS = {
    "no folder": (shutil.rmtree, r"model model: cannot be loaded \(.*; expected a folder with c"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), r"expected a folder with"),
    "no tokenizer": (without_tokenizer, r"model model: cannot be loaded .* a tokenizer"),
    "half a file of weights": (half_of_weights, r"model model: cannot be loaded"),
    "a config that is no JSON": (lambda m: (m / "config.json").write_text("{"), r"cannot be load"),
    "pickled weights": (pickled, r"no file named model.safetensors .*; expected a folder"),
    "a broken template": (with_tokenizer("{% if %}"), r"the chat template of model refuses"),
    "no end of sequence": (with_tokenizer(eos_token=None), r"tokenizer of model has no EOS token"),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize(("command", "row"), [(CRPO, SCORED), (SFT, RATED)], ids=["crpo", "sft"])
def test_a_model(check, folder, checkpoints, command, row, case):
    change, message = MODELS[case]
    (folder / "data.jsonl").write_bytes(lines(row))
    shutil.copytree(checkpoints("llama"), folder / "model")
    change(folder / "model")
    check(f"{command} --model model", message)


def edited(change):
    """A change of an adapter's configuration and tensors."""

    def apply(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        change(config, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def misnamed(folder):
    path = folder / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def also_the_head(config, tensors):
    stem = "base_model.model.lm_head.lora_"
    tensors |= {f"{stem}A.weight": torch.ones(2, 32), f"{stem}B.weight": torch.ones(300, 2)}


ADAPTERS = {
    "the output layer": (edited(also_the_head), r"it is not finite lora_A"),
    "not a number": (edited(lambda c, t: [x.fill_(torch.nan) for x in t.values()]), r"not finite"),
    "no folder": (shutil.rmtree, r"adapter adapter: cannot be read"),
    "pickled weights": (misnamed, r"adapter adapter: cannot be read .* adapter_model.safetensors"),
    "another rank": (edited(lambda c, t: c.update(r=3)), r"not finite lora_A and lora_B of rank 3"),
    "half of a layer": (edited(lambda c, t: t.pop(next(iter(t)))), r"it is not finite lora_A"),
    "DoRA": (edited(lambda c, t: c.update(use_dora=True)), r"use_dora = True is not .*merge"),
    "whole layers": (edited(lambda c, t: c.update(modules_to_save=["x"])), r"modules_to_save = "),
}


@pytest.fixture
def adapter(folder, checkpoints):
    """The folder of a LoRA of rank 2 for the tiny random Llama."""
    lm = load_lm(checkpoints("llama"), torch.float32)
    sft.inject(lm.model, 2, 4)
    sft.save_adapter(lm.model, folder / "adapter", "base", beneath=None)
    return folder / "adapter"


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter(check, checkpoints, adapter, case):
    change, message = ADAPTERS[case]
    change(adapter)
    check(f"{CRPO} --model {checkpoints('llama')} --adapter adapter", message)


@pytest.mark.parametrize("other", ["other layers", "another size"])
def test_an_adapter_stays_with_the_model_it_was_trained_on(
    check, folder, checkpoints, adapter, other
):
    config = CONFIGS["llama" if other == "another size" else "gpt2"]()
    if other == "another size":
        config.hidden_size, config.head_dim = 64, 16
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "other")
    make_tokenizer().save_pretrained(folder / "other")
    message = r"it changes model.layers.0.* of shape \(32, 64\), which this model lacks"
    check(f"{CRPO} --model other --adapter adapter", message)


TWICE = r"a(.raters.json)?: this command names that file twice; name another"
COMMANDS = {
    f"{CRPO} --lr -1": r"argument --lr: '-1': expected float from 0 to 1,0",
    f"{CRPO} --lr 1e300": r"argument --lr: '1e300': expected float from 0 to 1,0",
    f"{CRPO} --beta -0.1": r"argument --beta: '-0.1': expected float from 1e-06 to",
    f"{CRPO} --batch-size 0": r"argument --batch-size: '0': expected int from 1 to 1,0",
    f"{CRPO} --max-length 2": r"argument --max-length: '2': expected int from 8",
    f"{CRPO} --warmup 2": r"argument --warmup: '2': expected float from 0 to 1",
    f"{CRPO} --holdout 1": r"argument --holdout: '1': expected float from 0 to 0.9",
    f"{CRPO} --seed -1": r"argument --seed: '-1': expected int from 0 to",
    f"{CRPO} --lora-r 0": r"argument --lora-r: '0': expected int from 1 to 1,0",
    f"{CRPO} --lambda-novelty -1": r"argument --lambda-novelty: '-1': expected float",
    f"{CRPO} --dtype float16": r"invalid choice: 'float16' .choose from 'auto', 'float32'",
    "crpo": r"required: --data; see --help",
    "crpo --data absent.jsonl": r"absent.jsonl: no such file; of a",
    "crpo --data .": r"\.: no such file; of a data set in a folder or on the hub give what its",
    f"{CRPO} --colour red": r"unrecognized arguments: --colour red; see --help",
    f"{CRPO} --template-kwargs [1]": r"argument --template-kwargs: invalid template_kwargs value",
    f"{CRPO} --learning-rate 1": r"--learning-rate 1; --learning-rate is --lr here; see --help",
    f"{CRPO} --lambda-nov 1": r"unrecognized arguments: --lambda-nov 1",
    f"{CRPO} --resume --overwrite": r"argument --overwrite: not allowed with argument --resume",
    f"{CRPO} --lora-targets wq": r"--lora-targets: wq is no linear layer .* there are down_proj",
    f"{CRPO} --shard": r"--shard: expected several processes, as of torchrun",
    f"{CRPO} --out data.jsonl": r"--out data.jsonl: data.jsonl lies in it; name another",
    f"{CRPO} --out .": r"--out \.: data.jsonl lies in it; name another folder",
    f"{CRPO} --eval-data absent.jsonl": r"absent.jsonl: no such file; of a",
    "data stats --data a\x1b[2J\x9b\udc80b": r"^a \[2J b: no such file",
    f"{SCORE} --signals beauty": r"argument --signals: invalid choice: 'beauty' \(choose from",
    f"{SCORE} --embedder nowhere": r"model nowhere: cannot be loaded",
    f"{SCORE} --signals quality --reward-model nowhere": r"nowhere: cannot be loaded",
    **{f"data {name} --data a --out ./a": TWICE for name in ("pairs", "sft", "ratings")},
    "data ratings --data a.raters.json --out a": TWICE,
    "scores --data a --out ./a": TWICE,
    f"{SCORE} --out data.jsonl/new": r"(exists|Not a directory): 'data.jsonl",
    f"{GENERATE} --samples 6": r"--samples 6: expected a multiple of 4",
    f"{GENERATE} --split Test": r"data.jsonl: no prompt has split 'Test'; see its 'split' column",
    f"{GENERATE} --adapter nowhere": r"adapter nowhere: cannot be read",
    "eval score --responses absent.jsonl --out n.json": r"absent.jsonl: no such file",
    "eval": r"required: command; see --help",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(check, command):
    check(command, COMMANDS[command])


OUTPUTS = [
    ("--out m", "m/config.json", r"--out m: it holds no run; name an empty or"),
    ("--out m", "m/film.part", r"--out m: it holds no run; name an empty or"),
    ("--out m", "m/metrics.jsonl", r"--out m: it holds no run; name an empty or"),
    ("--out m --overwrite", "m/checkpoint-500/x", r"--out m: it holds no run; name an empty or"),
    ("--out m --model m/x", "m/x", r"--out m: m/x lies in it; name another"),
]


def test_a_closed_pipe_is_no_success(monkeypatch):
    """Whoever reads, `head` for instance, may stop before the adapter is saved: 128 + SIGPIPE."""

    def closed():
        raise BrokenPipeError

    monkeypatch.setattr(data.os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        data.run(closed)
    assert stopped.value.code == 141


@pytest.mark.parametrize(("flags", "path", "message"), OUTPUTS)
def test_a_folder_that_is_not_a_runs(check, folder, flags, path, message):
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_text("{}")
    check(f"{CRPO} {flags}", message)


RECORDS = [
    (f"{CRPO} --lambda-quality 1", GOOD, r"quality needs --reward-model, or score_chosen"),
    (f"{CRPO} --max-length 8", good(chosen="word " * 50), r"every pair exceeds --max-length 8"),
    (SFT, {"prompt": "x"}, r"data.jsonl:1: 'response' is missing; expected a non-empty string"),
    (PAIRS, {"prompt": "x", "response": "y"}, r"data.jsonl:1: 'score' is missing; expected"),
    (PAIRS, [RATED | {"score": x} for x in (1, 2, 999) * 4], r"the score 999 stands apart"),
    (f"{PAIRS} --min-gap -1", RATED, r"argument --min-gap: '-1': expected float from 0 to 1,0"),
    (f"{PAIRS} --max-pairs 0", RATED, r"argument --max-pairs: '0': expected int from 1 to 1,0"),
    (f"{SCORE} --signals quality", GOOD, r"quality needs --reward-model, or score_chosen"),
    (JUDGE, RATED, r"data.jsonl: 1 rated response in this split, and fewer than two prompts"),
    (JUDGE, GOOD, r"data.jsonl:1: 'response' is missing"),
    (GENERATE, {"query": "x"}, r"data.jsonl:1: 'prompt' is missing; expected a non-empty"),
    (GENERATE, {"prompt": "long " * 600}, r"a prompt of \d+ tokens leaves no room in tiny"),
]


@pytest.mark.parametrize(("command", "rows", "message"), RECORDS)
def test_a_record(check, folder, command, rows, message):
    (folder / "data.jsonl").write_bytes(lines(rows))
    check(command, message)
