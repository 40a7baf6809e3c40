"""What the tests share: tiny random checkpoints, commands run in this process, files."""

import importlib
import json
import os
import sys
import threading
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import numpy as np
import pytest
import tokenizers
import torch
import tqdm
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests build their tensors on the CPU

# No thread and no lock of a progress bar that a forked child could die with.
tqdm.tqdm.monitor_interval = 0
tqdm.tqdm.set_lock(threading.RLock())
torch.set_num_threads(1)  # for tensors this small a second thread is only waited for

TEXTS = [
    "Think of a creative use for this object: brick.",
    "A brick can be a door stop, or the first step of a very small staircase for cats.",
    "What would happen if nobody could lie? Poker would be over, and birthdays very quiet.",
    "Write a metaphor for boredom. Boredom is a clock that has forgotten how to tick.",
]
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]

VOCABULARY = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SMALL = VOCABULARY | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LLAMA_LIKE = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2}
GEMMA = LLAMA_LIKE | {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}
GEMMA |= {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}
NEO = VOCABULARY | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}
NEO |= {"attention_types": [[["global", "local"], 1]], "window_size": 64}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA_LIKE),
    "llama-tied": lambda: transformers.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**LLAMA_LIKE, head_dim=8, sliding_window=64),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA_LIKE),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "granite": lambda: transformers.GraniteConfig(**LLAMA_LIKE, logits_scaling=4.0),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=64),
    "gpt2": lambda: transformers.GPT2Config(
        **VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256
    ),
    "gpt-neo": lambda: transformers.GPTNeoConfig(**NEO, max_position_embeddings=256),
    # ALiBi: positions are in the attention, so prompts cannot be shared
    "bloom": lambda: transformers.BloomConfig(**VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
}
SUPPORTED = [name for name in CONFIGS if name != "bloom"]


def make_tokenizer(chat_template: str | None = None):
    """A byte-level BPE tokenizer of 300 tokens with <bos>, <eos>, <pad>."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def make_checkpoint(folder: Path, config, auto=transformers.AutoModelForCausalLM, **tokenizer):
    """Save a random model of this configuration, weights large enough to tell tokens apart."""
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    make_tokenizer(**tokenizer).save_pretrained(folder)
    return str(folder)


def load_lm(name: str, dtype: torch.dtype):
    lm, _ = importlib.import_module("sft").load_with_adapter(name, None, dtype)
    lm.share = importlib.import_module("scores").probe(lm, 64)
    return lm


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CRPO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def no_child_is_left():
    """A process that a failing test has started and not waited for is killed."""
    yield
    forked = sys.modules.get("forked")
    for child in list(forked.running) if forked else ():
        forked.kill(child)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """checkpoints(name) is the folder of a tiny random model of that architecture."""
    return cache(lambda name: make_checkpoint(tmp_path_factory.mktemp(name), CONFIGS[name]()))


def preference_rows() -> list[dict]:
    """18 pairs of 4 prompts, with a score of each kind."""
    rng = np.random.default_rng(0)
    words = ["stone", "lamp", "river", "door", "clock", "feather", "soup", "violin"]
    rows = []
    for k in range(18):
        texts = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 6, 2)]
        row = {"prompt": f"A use for a {words[k % 4]}?", "chosen": f"{texts[0]} {k}"}
        scored = {
            f"{name}_chosen": float(rng.random())
            for name in ("diversity", "novelty", "surprise", "quality")
        }
        rows.append(row | {"rejected": texts[1]} | scored)
    return rows


@pytest.fixture(scope="session")
def argv(checkpoints, tmp_path_factory):
    """argv(name) is the command line of crpo.py or sft.py: 9 steps, a checkpoint every second."""
    folder = tmp_path_factory.mktemp("data")
    rows = preference_rows()
    examples = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    write(folder / "crpo.jsonl", rows)
    write(folder / "sft.jsonl", examples)
    flags = ["--model", checkpoints("llama"), "--lora-r", "2", "--lora-alpha", "4", "--lr", "0.01"]
    flags += ["--batch-size", "2", "--save-every", "2", "--out", "run"]
    more = {"crpo": ["--holdout", "0.25", "--max-steps", "9"], "sft": []}

    def get(name):
        return [f"{name}.py", "--data", str(folder / f"{name}.jsonl"), *flags, *more[name]]

    return get


def write(path: Path, rows) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line]


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main("crpo", *flags) calls that command in this process and returns what it printed."""

    def call(name: str, *flags) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        capsys.readouterr()
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(run_main, capsys, tmp_path, monkeypatch):
    """refused("crpo", *flags): the one sentence on stderr with which that command is refused.

    It ends with status 2, without a traceback, and changes no file below tmp_path.
    """

    def call(name: str, *flags) -> str:
        before = contents(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])  # `run` reads the name that it prints
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module("data").run(lambda: run_main(name, *flags))
        assert stopped.value.code == 2
        assert contents(tmp_path) == before
        lines = capsys.readouterr().err.splitlines()
        (line,) = (line for line in lines if "it/s" not in line)  # progress bars aside
        assert line.startswith(f"{name}.py: ") and len(line) < 600
        return line.removeprefix(f"{name}.py: ")

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its path; a folder counts as an empty file."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def shared(name: str) -> Path:
    """Real material that is not part of the project, in $CRPO_SHARED; the test skips without it."""
    root = os.environ.get("CRPO_SHARED")
    path = Path(root or "") / name
    if not root or not path.exists():
        pytest.skip(f"needs $CRPO_SHARED/{name}")
    return path
