"""What users get wrong: one sentence with place, fault and what right looks like; nothing changed.

Every case is a command line in a folder of its own, with a file `data.jsonl` in it and sometimes a
model that is broken in one way. The exit status is 2, stderr is one line, there is no traceback,
and afterwards the folder holds what it held before.
"""

import json
import re
import shutil
import sys

import pytest
import torch
import transformers
from conftest import CONFIGS, contents, make_tokenizer
from safetensors.torch import load_file, save_file

import crpo
import data
import eval as evaluation
import scores
import sft

MODULES = {"crpo": crpo, "data": data, "eval": evaluation, "scores": scores, "sft": sft}
GOOD = {"prompt": "A use for a brick?", "chosen": "A door stop.", "rejected": "A brick."}
SCORED = GOOD | {f"{name}_chosen": 0.5 for name in scores.SIGNALS}
RATED = {"task": "Uses", "prompt": "A use for a brick?", "response": "A stop.", "score": 30}

RATERS = RATED | {"ratings": [1, 2], "raters": ["a", "b"]}


def lines(*rows) -> bytes:
    """JSONL of dicts, and of strings and bytes as they are."""
    raw = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
    return b"".join((r if isinstance(r, bytes) else r.encode()) + b"\n" for r in raw)


def turns(*roles) -> list[dict]:
    return [{"role": role, "content": f"{role} {k}"} for k, role in enumerate(roles)]


def chat(prompt, answer) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


PREFERENCES = {
    "broken JSON": (lines(GOOD, "{oops"), r"data.jsonl:2: not a line of JSON in UTF-8"),
    "a last line cut short": (lines(GOOD, GOOD)[:-20], r"data.jsonl:2: not a line of JSON"),
    "single quotes": (lines("{'prompt': 'x'}"), r"data.jsonl:1: not a line of JSON"),
    "a list": (lines(GOOD, "[1]"), r"data.jsonl:2: expected a JSON object such as \{"),
    "a number": (lines("7"), r"data.jsonl:1: expected a JSON object"),
    "nested without end": (lines("[" * 10**5), r"data.jsonl:1: not a line of JSON"),
    "NaN": (lines(SCORED | {"novelty_chosen": float("nan")}), r"data.jsonl:1: .*NaN is not"),
    "Infinity": (lines(GOOD, GOOD | {"weight": float("inf")}), r"data.jsonl:2: .*Infinity is not"),
    "Latin-1": (lines(b'{"prompt": "caf\xe9"}'), r"data.jsonl:1: not a line of JSON in UTF-8"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), r"data.jsonl:1: not a line of JSON in UTF-8"),
    "an empty file": (b"", r"data.jsonl: no records; expected one JSON object a line"),
    "blank lines": (b"\n \n\n", r"data.jsonl: no records"),
    "no chosen": (lines(GOOD, {"prompt": "x", "rejected": "y"}), r"data.jsonl:2: 'chosen' is miss"),
    "no rejected": (lines({"prompt": "x", "chosen": "y"}), r"data.jsonl:1: 'rejected' is missing"),
    "no prompt": (lines({"chosen": "Aa", "rejected": "Bb"}), r"data.jsonl:1: there is no 'prompt'"),
    "an empty chosen": (lines(GOOD | {"chosen": ""}), r"data.jsonl:1: 'chosen' is \"\"; expected"),
    "a blank rejected": (lines(GOOD | {"rejected": " \n"}), r"data.jsonl:1: 'rejected' is"),
    "an empty prompt": (lines(GOOD | {"prompt": ""}), r"data.jsonl:1: 'prompt' is \"\""),
    "a prompt that is null": (lines(GOOD | {"prompt": None}), r"data.jsonl:1: 'prompt' is missing"),
    "a chosen that is a number": (lines(GOOD | {"chosen": 7}), r"data.jsonl:1: 'chosen' is 7; exp"),
    "a prompt that is an object": (lines(GOOD | {"prompt": {}}), r"data.jsonl:1: 'prompt' is {}"),
    "NUL": (lines(GOOD | {"chosen": "a\0b"}), r"data.jsonl:1: 'chosen' holds a NUL"),
    "a lone surrogate": (lines(GOOD | {"rejected": "\ud83d"}), r"data.jsonl:1: 'rejected' holds a"),
    "the same text twice": (
        lines(GOOD | {"rejected": GOOD["chosen"]}),
        r"data.jsonl:1: .* same te",
    ),
    "an unknown role": (lines(GOOD | {"prompt": turns("human")}), r"data.jsonl:1: .* role 'human'"),
    "a role that is missing": (lines(GOOD | {"prompt": [{"content": "x"}]}), r"with role None"),
    "a turn that is a string": (lines(GOOD | {"prompt": ["x"]}), r"data.jsonl:1: .* role None"),
    "two turns of the user": (lines(GOOD | {"prompt": turns("user", "user")}), r"by turns"),
    "a system turn at the end": (lines(GOOD | {"prompt": turns("user", "system")}), r"'system'"),
    "an answer in the prompt": (lines(GOOD | {"prompt": turns("user", "assistant")}), r"the last"),
    "a system turn alone": (
        lines(GOOD | {"prompt": turns("system")}),
        r"data.jsonl:1: .*\['system",
    ),
    "a conversation without turns": (lines(GOOD | {"prompt": []}), r"'prompt' is an empty list"),
    "a turn without content": (
        lines(GOOD | {"prompt": [{"role": "user"}]}),
        r"'prompt.content' is",
    ),
    "a chosen that is a question": (lines(GOOD | {"chosen": turns("user")}), r"an assistant turn"),
    "different prompts": (
        lines({"chosen": chat("One?", "a"), "rejected": chat("Two?", "b")}),
        r"data.jsonl:1: 'chosen' and 'rejected' answer different prompts",
    ),
    "a score above 1": (lines(SCORED | {"novelty_chosen": 1.5}), r":1: 'novelty_chosen' is 1.5; "),
    "a score below 0": (
        lines(SCORED, SCORED | {"surprise_chosen": -0.1}),
        r":2: 'surprise_chosen'",
    ),
    "a score as a string": (lines(SCORED | {"diversity_chosen": "0.5"}), r"is '0.5'; expected a n"),
    "a score that is true": (lines(SCORED | {"diversity_chosen": True}), r"is True; expected"),
    "a score of one row only": (lines(SCORED, GOOD), r":2: 'diversity_chosen' is missing; expec"),
    "a misspelt column": (
        lines(GOOD | {"diversty_chosen": 0.5}),
        r"data.jsonl: it has a column 'diversty_chosen' and no 'diversity_chosen'; rename it",
    ),
    "a weight below 0": (lines(GOOD | {"weight": -1}), r"data.jsonl:1: 'weight' is -1; expected"),
    "a weight of one row only": (lines(GOOD | {"weight": 1}, GOOD), r":2: 'weight' is missing"),
    "weights that are all 0": (lines(GOOD | {"weight": 0}), r"every pair has weight 0"),
}


def broken(change):
    """A copy of the tiny random Llama, changed in one way."""

    def make(folder, checkpoints):
        shutil.copytree(checkpoints("llama"), folder / "model")
        change(folder / "model")

    return make


def pickled(model):
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def short(model):
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def without_tokenizer(model):
    for path in model.glob("*token*"):
        path.unlink()


def template(text):
    return broken(lambda model: make_tokenizer(chat_template=text).save_pretrained(model))


def without_eos(model):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)


UNSTABLE = "{% for m in messages %}{{ messages | length }} {{ m.content }}{% endfor %}"
NO_SYSTEM = "{{ raise_exception('only users') }}"

MODELS = {
    "no folder": (lambda *_: None, r"model model: cannot be loaded \(.*; expected a folder with c"),
    "no config": (broken(lambda m: (m / "config.json").unlink()), r"model model: cannot be loaded"),
    "no weights": (broken(lambda m: (m / "model.safetensors").unlink()), r"expected a folder with"),
    "no tokenizer": (broken(without_tokenizer), r"model model: cannot be loaded .* a tokenizer"),
    "half a file of weights": (broken(short), r"model model: cannot be loaded"),
    "a config that is no JSON": (
        broken(lambda m: (m / "config.json").write_text("{")),
        r"cannot b",
    ),
    "pickled weights": (
        broken(pickled),
        r"model model: cannot be loaded .*, \*.safetensors",
    ),
    "a template that is not prefix-stable": (template(UNSTABLE), r"model is not prefix-stable"),
    "a template that refuses": (template(NO_SYSTEM), r"the chat template of model refuses the r"),
    "a template that is broken": (template("{% if %}"), r"the chat template of model refuses"),
    "no end of sequence": (broken(without_eos), r"the tokenizer of model has no EOS token"),
}


def adapter(change=lambda config, tensors: None, name="llama"):
    """A LoRA of rank 2 for the tiny random Llama, or for another model, changed in one way."""

    def make(folder, checkpoints):
        lm = scores.load_lm(checkpoints(name), torch.float32)
        sft.inject(lm.model, 2, 4)
        sft.save_adapter(lm.model, folder / "adapter", "base", beneath=None)
        path = folder / "adapter" / "adapter_config.json"
        config, weights = json.loads(path.read_text()), folder / "adapter"
        tensors = load_file(weights / "adapter_model.safetensors")
        change(config, tensors)
        path.write_text(json.dumps(config))
        save_file(tensors, weights / "adapter_model.safetensors")

    return make


def pickled_adapter(folder, checkpoints):
    adapter()(folder, checkpoints)
    path = folder / "adapter" / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))


ADAPTERS = {
    "no folder": (lambda *_: None, r"adapter adapter: cannot be read"),
    "another model": (
        adapter(name="gpt2"),
        r"adapter adapter: it changes transformer.h.0.* which t",
    ),
    "another rank": (
        adapter(lambda c, t: c.update(r=3)),
        r"it is not pairs of lora_A and lora_B of",
    ),
    "half of a layer": (adapter(lambda c, t: t.pop(next(iter(t)))), r"it is not pairs of lora_A"),
    "DoRA": (adapter(lambda c, t: c.update(use_dora=True)), r"use_dora is not supported; merge it"),
    "whole layers": (
        adapter(lambda c, t: c.update(modules_to_save=["lm_head"])),
        r"modules_to_sav",
    ),
    "pickled weights": (pickled_adapter, r"adapter adapter: cannot be read .* adapter_model.safet"),
    "no adapter in the folder": (lambda f, _: (f / "adapter").mkdir(), r"cannot be read"),
}


def present(name, text="x"):
    """A file or, without text, an empty folder that is there already."""

    def make(folder, checkpoints):
        if text is None:
            (folder / name).mkdir(parents=True)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)

    return make


def rows(*records):
    return lambda folder, checkpoints: (folder / "data.jsonl").write_bytes(lines(*records))


NOTHING = present("data.jsonl", lines(SCORED, SCORED | {"chosen": "A pillow."}).decode())
CRPO, SFT = "crpo --data data.jsonl", "sft --data data.jsonl"
GENERATE = "eval generate --prompts data.jsonl --out new.jsonl"
SCORE = "scores --data data.jsonl --out new.jsonl --embedder tiny --surprise-model tiny"
JUDGE = "scores judge --data data.jsonl --out judge --embedder tiny"
RATINGS = "data ratings --data data.jsonl --out new.jsonl"
PAIRS = "data pairs --data data.jsonl --out new.jsonl"

COMMANDS = [
    ("crpo", NOTHING, r"required: --data; see --help"),
    ("crpo --data absent.jsonl", NOTHING, r"absent.jsonl: No such file or directory; expected a J"),
    ("crpo --data .", NOTHING, r"\.: Is a directory; expected a JSONL file"),
    (f"{CRPO} --colour red", NOTHING, r"unrecognized arguments: --colour red; see --help"),
    (f"{CRPO} --lambda-nov 1", NOTHING, r"unrecognized arguments: --lambda-nov 1"),
    (f"{CRPO} --lr -1", NOTHING, r"argument --lr: '-1' is not float at least 0"),
    (f"{CRPO} --lr 1e300", NOTHING, r"argument --lr: '1e300' is not float from 0 to 1000000000"),
    (f"{CRPO} --lr nan", NOTHING, r"argument --lr: 'nan' is not float at least 0"),
    (f"{CRPO} --lr fast", NOTHING, r"argument --lr: 'fast' is not float at least 0"),
    (f"{CRPO} --beta -0.1", NOTHING, r"argument --beta: '-0.1' is not float at least 0"),
    (f"{CRPO} --beta inf", NOTHING, r"argument --beta: 'inf' is not float"),
    (f"{CRPO} --batch-size 0", NOTHING, r"argument --batch-size: '0' is not int at least 1"),
    (f"{CRPO} --epochs 1.5", NOTHING, r"argument --epochs: '1.5' is not int at least 1"),
    (f"{CRPO} --max-steps 0", NOTHING, r"argument --max-steps: '0' is not int at least 1"),
    (f"{CRPO} --max-length 2", NOTHING, r"argument --max-length: '2' is not int at least 8"),
    (f"{CRPO} --micro-tokens 0", NOTHING, r"argument --micro-tokens: '0' is not int at least 1"),
    (f"{CRPO} --save-every 0", NOTHING, r"argument --save-every: '0' is not int at least 1"),
    (f"{CRPO} --warmup 2", NOTHING, r"argument --warmup: '2' is not float from 0 to 1"),
    (f"{CRPO} --holdout 1", NOTHING, r"argument --holdout: '1' is not float from 0 to 0.9"),
    (f"{CRPO} --seed -1", NOTHING, r"argument --seed: '-1' is not int from 0 to"),
    (f"{CRPO} --lora-r 0", NOTHING, r"argument --lora-r: '0' is not int at least 1"),
    (f"{CRPO} --lambda-novelty -1", NOTHING, r"argument --lambda-novelty: '-1' is not float"),
    (f"{CRPO} --combine max", NOTHING, r"argument --combine: invalid choice: 'max' \(choose from"),
    (f"{CRPO} --schedule step", NOTHING, r"argument --schedule: invalid choice: 'step'"),
    (f"{CRPO} --too-long cut", NOTHING, r"argument --too-long: invalid choice: 'cut'"),
    (
        f"{CRPO} --dtype float16",
        NOTHING,
        r"argument --dtype: invalid choice: 'float16'",
    ),
    (f"{CRPO} --dtype int8", NOTHING, r"argument --dtype: invalid choice: 'int8'"),
    (f"{CRPO} --lora-targets wq", NOTHING, r"--lora-targets: wq is no linear layer .* it has down"),
    (f"{CRPO} --resume --overwrite", NOTHING, r"argument --overwrite: not allowed with argument -"),
    (f"{CRPO} --shard", NOTHING, r"--shard: expected several processes, as of torchrun"),
    (f"{CRPO} --out data.jsonl", NOTHING, r"--out data.jsonl: it is a file; name a folder"),
    (
        f"{CRPO} --out m",
        present("m/config.json", "{}"),
        r"--out m: it holds 'config.json' and no run",
    ),
    (f"{CRPO} --out m", present("m/film.part"), r"--out m: it holds 'film.part' and no run"),
    (f"{CRPO} --out .", NOTHING, r"--data data.jsonl: it lies in --out, which this run would rep"),
    (f"{CRPO} --out m --model m/x", present("m/x"), r"--model m/x: it lies in --out, which this"),
    (
        f"{CRPO} --out m",
        present("m/metrics.jsonl"),
        r"--out m: it holds 'metrics.jsonl' and no run",
    ),
    (
        f"{CRPO} --out m --overwrite",
        present("m/checkpoint-500", None),
        r"it holds 'checkpoint-500' and no run; name",
    ),
    (
        f"{SFT} --from-scratch --out m",
        present("m/config.json", "{}"),
        r"it holds 'config.json' and no run",
    ),
    (f"{SFT} --from-scratch --shard", rows(RATED), r"--shard: not with --from-scratch, which trai"),
    (f"{SFT} --from-scratch --merge", rows(RATED), r"--merge: not with --from-scratch, which trai"),
    (f"{CRPO} --lambda-quality 1", rows(GOOD), r"quality needs --reward-model, or score_chosen"),
    (f"{CRPO} --eval-data absent.jsonl", NOTHING, r"absent.jsonl: No such file or directory"),
    (f"{CRPO} --max-length 8 --too-long refuse", NOTHING, r"is too long for --max-length 8: 'A"),
    (
        f"{CRPO} --max-length 8",
        rows(GOOD | {"chosen": "word " * 50}),
        r"every pair is too long; ra",
    ),
    (SFT, rows({"prompt": "x"}), r"data.jsonl:1: 'response' is missing; expected a non-empty stri"),
    (SFT, rows({"response": "x"}), r"data.jsonl:1: 'prompt' is missing"),
    (SFT, rows({"messages": turns("user")}), r"'messages' must end with the assistant's turn"),
    (SFT, rows({"messages": turns("assistant")}), r"the turns of the prompt are \[\]"),
    (SFT, rows(RATED | {"score": "30"}), r"data.jsonl:1: 'score' is '30'; expected a number"),
    (f"{SFT} --from-scratch --hidden 30", rows(RATED), r"--hidden 30: expected a multiple of tw"),
    (f"{SFT} --from-scratch --layers 0", rows(RATED), r"argument --layers: '0' is not int at lea"),
    ("data", NOTHING, r"required: command; see --help"),
    ("data shuffle", NOTHING, r"invalid choice: 'shuffle' \(choose from"),
    ("data stats --data absent.jsonl", NOTHING, r"absent.jsonl: No such file or directory"),
    (PAIRS, rows({"prompt": "x", "response": "y"}), r"data.jsonl:1: 'score' is missing; expected"),
    (PAIRS, rows(RATED | {"score": True}), r"data.jsonl:1: 'score' is True; expected a number"),
    (PAIRS, rows(RATED), r"data.jsonl: nothing is left of its rated responses"),
    (f"{PAIRS} --split Test", rows(RATED), r"data.jsonl: no split is 'Test'; there is no column"),
    (f"{PAIRS} --tasks Poems", rows(RATED), r"data.jsonl: no task is 'Poems'; there is 'Uses'"),
    (f"{PAIRS} --prompt-template {{x}}", rows(RATED), r"'{x}' is no template; it needs {prompt}"),
    (f"{PAIRS} --fill random", rows(RATED), r"argument --fill: invalid choice: 'random'"),
    (RATINGS, rows(RATED), r"data.jsonl:1: expected two lists of the same length, 'ratings' and"),
    (RATINGS, rows(RATERS | {"raters": ["a"]}), r"data.jsonl:1: expected two lists of the same"),
    (RATINGS, rows(RATERS | {"raters": ["a", "a"]}), r"data.jsonl:1: rater 'a' is there twice"),
    (RATINGS, rows(RATERS | {"raters": ["a", 1.5]}), r"a rater is 1.5; expected a name or a whole"),
    (
        RATINGS,
        rows(RATERS | {"ratings": [1, "2"]}),
        r"data.jsonl:1: 'ratings' is '2'; expected a n",
    ),
    (RATINGS, rows(RATERS, RATERS), r"no rater rates two responses differently; leave it out, or"),
    ("data stats --data d.csv", present("d.csv", "a,b\n1,2\n"), r"d.csv:1: expected a first line"),
    (
        "data stats --data d.csv",
        present("d.csv", "prompt,chosen\n1\n"),
        r"d.csv:2: 1 cells under 2",
    ),
    ("data stats --data d.csv", present("d.csv", 'prompt\n"a\n'), r"d.csv:2: not a line of CSV"),
    (f"{PAIRS} --min-gap -1", rows(RATED), r"argument --min-gap: '-1' is not float at least 0"),
    (f"{PAIRS} --max-pairs 0", rows(RATED), r"argument --max-pairs: '0' is not int at least 1"),
    (
        f"{SCORE} --signals beauty",
        NOTHING,
        r"argument --signals: invalid choice: 'beauty' \(choose",
    ),
    (f"{SCORE} --signals quality", rows(GOOD), r"quality needs --reward-model, or score_cho"),
    (f"{SCORE} --embedder nowhere", NOTHING, r"model nowhere: cannot be loaded"),
    (f"{SCORE} --signals quality --reward-model nowhere", NOTHING, r"nowhere: cannot be loaded"),
    (f"{SCORE} --out data.jsonl/new", NOTHING, r"data.jsonl/new: cannot be written \("),
    (
        JUDGE,
        rows(RATED),
        r"data.jsonl: 1 rated responses in this split, and fewer than two prompts",
    ),
    (JUDGE, rows(GOOD), r"data.jsonl:1: 'response' is missing"),
    (f"{GENERATE} --samples 6", NOTHING, r"--samples 6: expected a multiple of 4"),
    (
        f"{GENERATE} --split Test",
        NOTHING,
        r"data.jsonl: no prompt has split 'Test'; see its 'split'",
    ),
    (f"{GENERATE} --adapter nowhere", NOTHING, r"adapter nowhere: cannot be read"),
    (GENERATE, rows({"question": "x"}), r"data.jsonl:1: 'prompt' is missing; expected a non-empty"),
    (GENERATE, rows({"prompt": "long " * 600}), r"a prompt of \d+ tokens leaves no room in tiny"),
    (GENERATE, present("new.jsonl", "x"), r"data.jsonl: No such file or directory"),
    (
        "eval score --responses absent.jsonl --out n.json",
        NOTHING,
        r"absent.jsonl: No such file or direc",
    ),
    ("eval", NOTHING, r"required: command; see --help"),
]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(command, message): it ends with status 2 and one sentence, and changes nothing."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(command, message):
        name, *flags = command.split()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        before = contents(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            data.run(MODULES[name].main)
        said = capsys.readouterr().err.rpartition("\r")[2]  # what is behind progress bars
        assert stopped.value.code == 2, said
        assert said.count("\n") == 1 and said.endswith("\n"), said
        assert said.startswith(f"{name}.py: ") and len(said) < 600, said
        assert re.search(message, said), said
        assert contents(folder) == before

    call.folder = folder
    return call


@pytest.mark.parametrize("case", PREFERENCES)
def test_a_preference_file(refused, case):
    content, message = PREFERENCES[case]
    (refused.folder / "data.jsonl").write_bytes(content)
    refused(CRPO, message)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("command", ["crpo", "sft"])
def test_a_model(refused, checkpoints, command, case):
    prepare, message = MODELS[case]
    NOTHING(refused.folder, checkpoints)
    prepare(refused.folder, checkpoints)
    if command == "sft":
        rows(RATED)(refused.folder, checkpoints)
    refused(f"{command} --data data.jsonl --model model", message)


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter(refused, checkpoints, case):
    prepare, message = ADAPTERS[case]
    NOTHING(refused.folder, checkpoints)
    prepare(refused.folder, checkpoints)
    refused(f"{CRPO} --model {checkpoints('llama')} --adapter adapter", message)


@pytest.mark.parametrize(("command", "prepare", "message"), COMMANDS)
def test_a_command(refused, checkpoints, command, prepare, message):
    prepare(refused.folder, checkpoints)
    refused(command, message)


def test_an_adapter_stays_with_the_model_it_was_trained_on(refused, checkpoints):
    """Same layers, another size."""
    config = CONFIGS["llama"]()
    config.hidden_size, config.head_dim = 64, 16
    transformers.LlamaForCausalLM(config).save_pretrained(refused.folder / "wide")
    make_tokenizer().save_pretrained(refused.folder / "wide")
    NOTHING(refused.folder, checkpoints)
    adapter()(refused.folder, checkpoints)
    message = r"it changes model.layers.0.* of shape \(32, 64\), which this model does not have"
    refused(f"{CRPO} --model wide --adapter adapter", message)


def test_a_byte_order_mark_and_crlf_are_no_mistake(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(
        b"\xef\xbb\xbf" + lines(GOOD, SCORED).replace(b"\n", b"\r\n")
    )
    assert [pair.row for pair in data.read_preferences(tmp_path / "data.jsonl")] == [GOOD, SCORED]
