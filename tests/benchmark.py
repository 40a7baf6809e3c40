"""How fast it is, and how cost grows. Not collected by pytest: times on a shared machine are noisy.

    python tests/benchmark.py train       # a training step against TRL + PEFT's, same losses
    python tests/benchmark.py train --hidden 256 --vocabulary 128256
    python tests/benchmark.py train --gpu # the shape of Llama-3.1-8B in bfloat16, 64 pairs a step
    python tests/benchmark.py startup     # from the command to the first step, against TRL's
    python tests/benchmark.py growth      # an epoch as pairs, and responses to a prompt, grow
    python tests/benchmark.py head        # fused log-probs against plain ones, and Liger's
    python tests/benchmark.py head --gpu  # and against torch.compile's and Triton's tile
    python tests/benchmark.py attention   # a pass as it is, with FlexAttention, with torch.compile
    python tests/benchmark.py noise       # of log-probs in bfloat16
    python tests/benchmark.py generate    # sampling against transformers' generate; padding
    python tests/benchmark.py signals     # the four signals as responses to a prompt grow

train and startup need trl and peft; head takes Liger along where liger-kernel is installed. Every
figure is a median over rounds in which the contestants take turns; in brackets the extremes.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import tokenizers
import torch
import transformers

import eval as evaluation  # the name of the file is that of a builtin
import scores
from data import (
    Sample,
    Table,
    build_table,
    make_batch,
    make_pairs,
    micro_batches,
    read_jsonl,
    read_preferences,
    step_indices,
    write_jsonl,
)
from scores import (
    SIGNALS,
    TOKENS,
    LanguageModel,
    Pool,
    Scorers,
    additive_mask,
    by_length,
    layout,
    load_lm,
    mean_pairwise_distance,
    normalise,
    pick_device,
    sequence_logps,
    sequence_logps_plain,
    token_logps,
    token_logps_plain,
)
from sft import MICRO_TOKENS, inject, lora_layers

ROOT = Path(__file__).parent.parent


def rounds(contestants: dict, n: int) -> dict[object, list[float]]:
    """Seconds of each contestant in each of n rounds; they take turns, after one round unmeasured.

    Ratios within a round see the same machine, whatever else it is doing.
    """
    times: dict[object, list[float]] = {name: [] for name in contestants}
    for turn in range(n + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """k of the least-squares fit of times to c * sizes^k."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


# --------------------------------------------------------------------------------------------------
# The four signals
# --------------------------------------------------------------------------------------------------

SIZES = (1000, 2000, 4000, 8000, 16000)


def pairwise_walk(vectors: np.ndarray) -> float:
    """What the closed forms replace: the mean distance over all ordered pairs, one by one."""
    n = len(vectors)
    pairs = ((a, b) for i, a in enumerate(vectors) for j, b in enumerate(vectors) if i != j)
    return sum(1 - a @ b for a, b in pairs) / (n * (n - 1))


def signals_command(args) -> None:
    """n responses of up to 12 words to one prompt; embeddings given, surprise under tiny/."""
    rng = np.random.default_rng(0)
    vocabulary = [f"word{k}" for k in range(6000)]
    texts = [" ".join(vocabulary[k % 6000] for k in rng.zipf(1.2, 12)) for _ in range(SIZES[-1])]
    vectors = rng.standard_normal((len(vocabulary) + len(texts), 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vector = dict(zip([*vocabulary, *texts], vectors, strict=True))
    scorers = Scorers(embedder=lambda some: vector, surprise_model=load_lm("tiny", torch.float32))

    def work(name, n):
        prompt = (("user", "Think of a use for a brick."),)
        pool = Pool(prompt, texts[:n], np.ones(n, bool), rng.uniform(10, 50, n))

        def measure():
            with tempfile.TemporaryDirectory() as os.environ["CRPO_CACHE"]:
                return normalise(SIGNALS[name]([pool], scorers)[0], name)

        return measure

    print(f"seconds for n responses to one prompt, median of {args.rounds}")
    print(f"{'':12}" + "".join(f"{n:>10,}" for n in SIZES) + "  exponent")
    for name in SIGNALS:
        times = rounds({n: work(name, n) for n in SIZES}, args.rounds)
        medians = [median(times[n]) for n in SIZES]
        cells = "".join(f"{value:10.5f}" for value in medians)
        print(f"{name:12}{cells}{exponent(SIZES, medians):10.2f}")
    some = vectors[-SIZES[0] :]
    contest = {
        "walk": lambda: pairwise_walk(some),
        "closed": lambda: mean_pairwise_distance(some),
    }
    times = rounds(contest, args.rounds)
    ratio = median(w / c for w, c in zip(times["walk"], times["closed"], strict=True))
    print(
        f"mean distance of {SIZES[0]:,} embeddings: every pair in Python "
        f"{median(times['walk']):.2f} s, closed form {median(times['closed']) * 1e3:.2f} ms, "
        f"{ratio:,.0f} times as fast"
    )


# --------------------------------------------------------------------------------------------------
# Training: ours against TRL + PEFT
# --------------------------------------------------------------------------------------------------

# MuCE-PREF: task, prompts, pairs (table 2 of the paper); tokens of a prompt and median tokens of a
# response, which the paper does not print: our guess from the tasks.
MUCE = (
    ("Real-Life Creative Problem Solving", 8, 5601, 160, 60),
    ("Question Asking", 5, 314, 40, 12),
    ("Malevolent Problems", 21, 424, 70, 30),
    ("Metaphors", 51, 675, 30, 12),
    ("Alternate Uses of Objects Task", 11, 4388, 30, 8),
    ("Design Solutions", 10, 1366, 50, 40),
    ("Essays", 1, 174, 40, 300),
    ("Stories", 7, 1498, 60, 150),
    ("Consequences", 5, 10865, 30, 20),
    ("Experiment Design", 7, 5640, 90, 50),
    ("Hypothesis Generation", 6, 5260, 80, 25),
    ("Research Questions", 5, 5832, 80, 20),
    ("Associations", 5, 21, 30, 2),
)


def muce_shaped(n: int, vocabulary: int) -> list[dict]:
    """n of 42,058 pairs of random words: as many prompts and responses as MuCE-PREF has."""
    rng = np.random.default_rng(0)

    def text(length):
        return " ".join(f"w{k}" for k in rng.integers(4, vocabulary, max(1, round(length))))

    rows = []
    for task, prompts, pairs, asked, answered in MUCE:
        for _ in range(prompts):
            prompt = text(asked)
            lengths = rng.lognormal(math.log(answered), 0.5, max(2, pairs // prompts // 5 + 1))
            samples = [
                Sample((("user", prompt),), text(length), {"task": task}, "", rng.uniform(20, 50))
                for length in lengths
            ]
            rows += make_pairs(samples)
    return [rows[k] for k in rng.permutation(len(rows))[:n]]


def make_model(folder: Path, hidden: int, layers: int, vocabulary: int, gpu: bool = False) -> None:
    """A random Llama with a tokenizer of one id a word; gpu: of Llama-3.1's proportions."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2 if gpu else hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // (128 if gpu else 64),
        num_key_value_heads=hidden // (512 if gpu else 64),
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(pick_device()):
        model = transformers.LlamaForCausalLM._from_config(
            config, dtype=torch.bfloat16 if gpu else torch.float32
        )
    model.save_pretrained(folder)
    ids = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {f"w{k}": k for k in range(3, vocabulary)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


SEED, LR, R = 42, 1e-4, 128
CPU_SHAPE = {"hidden": 768, "layers": 4, "vocabulary": 4096, "batch_size": 8}
GPU_SHAPE = {"hidden": 4096, "layers": 32, "vocabulary": 128256, "batch_size": 64}  # Llama-3.1-8B


def choose_shape(args) -> None:
    """What no flag names is as on the CPU, or with --gpu as in Llama-3.1-8B."""
    for name, value in (GPU_SHAPE if args.gpu else CPU_SHAPE).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def gpu_memory() -> float:
    """GB in use on the GPU, whoever uses them; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def run_alone(*command: str, until: bytes | None = None) -> tuple[float, float]:
    """Run a command in a process of its own: its seconds, its peak memory in GB (the GPU's if any).

    until: the seconds are those until it prints this. MemoryError if it says that it ran out.
    """
    start, before = time.perf_counter(), gpu_memory()
    peak = seconds = 0.0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *command], stdout=said, stderr=said)
        ended = os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
        while os.waitid(*ended) is None:
            if until and not seconds and until in os.pread(said.fileno(), 10**6, 0):
                seconds = time.perf_counter() - start
            peak = max(peak, gpu_memory() - before)
            time.sleep(0.005)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            text = os.pread(said.fileno(), 10**7, 0).decode()
            if "out of memory" in text:
                raise MemoryError
            sys.exit(f"{' '.join(command)}\n{text}")
    return seconds or time.perf_counter() - start, peak or usage.ru_maxrss / 2**20


def trl_command(args) -> None:
    """TRL's DPOTrainer on the pairs in our order, from our initial adapter, with our metrics.jsonl.

    --best: reference log-probs before training, no gradient checkpointing (--checkpointing brings
    it back), and log-probs of the response tokens alone, which TRL otherwise does on a GPU only.
    --micro: pairs of a pass.
    """
    import peft
    import trl
    from datasets import Dataset

    if args.best and not torch.cuda.is_available():
        trl.trainer.utils._use_triton = lambda device: True
    torch.backends.cuda.enable_cudnn_sdp(not args.best)  # scores.py has switched it off
    dtype = getattr(torch, args.dtype)
    lm = load_lm(args.model, dtype)
    table, sides = encode(lm, read_preferences(args.data))
    rows = [
        {
            "prompt_ids": table.prompts[table.prompt_of[sides[k][0]]],
            "chosen_ids": table.responses[sides[k][0]],
            "rejected_ids": table.responses[sides[k][1]],
        }
        for step in range(args.steps)
        for k in step_indices(len(sides), args.batch_size, SEED, step)
    ]
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear")
    model = peft.get_peft_model(lm.model, config)
    ours = LanguageModel(args.model, dtype)
    ours.device = torch.device("cpu")
    inject(ours.model, R, 2 * R, seed=SEED)
    for name, layer in lora_layers(ours.model).items():
        model.base_model.model.get_submodule(name).lora_A["default"].weight.data.copy_(layer.A)
    del ours
    metrics = open(Path(args.out) / "metrics.jsonl", "w")  # noqa: SIM115

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.clock.losses.append(loss.item())
            return loss

    class Clock(transformers.TrainerCallback):
        start, losses = time.perf_counter(), []

        def on_step_end(self, *_, **__):
            now = time.perf_counter()
            row = {"loss": float(np.mean(self.losses)), "seconds": now - self.start}
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            self.start, self.losses = now, []

    options = {
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": args.checkpointing,
    }
    trainer = Trainer(
        model=model,
        args=trl.DPOConfig(
            output_dir=args.out,
            per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=args.batch_size // args.micro,
            learning_rate=LR,
            max_steps=args.steps,
            beta=0.1,
            bf16=args.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            **(options if args.best else {}),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=lm.tokenizer,
    )
    trainer.clock = Clock()
    trainer.add_callback(trainer.clock)
    trainer.train()


def encode(lm: LanguageModel, pairs) -> tuple[Table, list[tuple[int, int]]]:
    items = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    table, index = build_table(lm.encoder, items, 1024)
    return table, list(zip(index[::2], index[1::2], strict=True))


def ours(place: Path, out: Path, steps: int, batch_size: int, *flags: str) -> list[str]:
    """crpo.py as plain DPO, which is all that TRL can do: it has no weights of pairs."""
    command = ["crpo.py", "--data", f"{place}/pref.jsonl", "--model", f"{place}/model"]
    command += ["--out", str(out), "--batch-size", str(batch_size), "--max-steps", str(steps)]
    command += ["--lr", str(LR), "--seed", str(SEED), "--overwrite"]
    command += ["--lora-r", str(R), "--lora-alpha", str(2 * R)]
    command += ["--save-every", str(10**9)]  # at the end alone; TRL below saves nothing
    return [*command, "--lambda-diversity", "0", "--holdout", "0", *flags]


def theirs(place: Path, out: Path, steps: int, batch_size: int, *flags: str) -> list[str]:
    command = ["tests/benchmark.py", "trl", "--data", f"{place}/pref.jsonl"]
    command += ["--model", f"{place}/model", "--out", str(out), "--steps", str(steps)]
    return [*command, "--batch-size", str(batch_size), *flags]


def places(table: Table, sides, taken: list[int]) -> dict[str, int]:
    """Tokens and places of one step: what is needed, what ours computes, what padding computes.

    needed: every distinct prompt and response once. Also the response tokens, for the head.
    """
    pairs = [sides[k] for k in taken]
    sequences = list(dict.fromkeys(s for pair in pairs for s in pair))
    prompts = {table.prompt_of[s] for s in sequences}
    answers = sum(len(table.responses[s]) for s in sequences)
    rows = [
        len(table.prompts[table.prompt_of[s]]) + len(table.responses[s]) for s in sum(pairs, ())
    ]
    batches = [
        make_batch(table, some, True, 10**9)
        for _, some in micro_batches(table, pairs, MICRO_TOKENS)
    ]
    return {
        "needed": sum(len(table.prompts[p]) for p in prompts) + answers,
        "ours": sum(batch.ids.numel() for batch in batches),
        "TRL": sum(
            len(some) * max(some) for some in (rows[k : k + 16] for k in range(0, len(rows), 16))
        ),
        "head needed": answers,
        "head": sum(len(batch.targets) for batch in batches),
    }


def linear_shapes(config) -> list[tuple[int, int]]:
    """(in, out) of a block's linear layers."""
    H, F = config.hidden_size, config.intermediate_size
    KV = H // config.num_attention_heads * config.num_key_value_heads
    return [(H, H)] * 2 + [(H, KV)] * 2 + [(H, F)] * 3


def flops(config, tokens: float, head_tokens: float) -> float:
    """Of a training step's matrix products, attention aside: frozen layers 2 each way, LoRA 2 + 4.

    And the head: its logits and its gradient.
    """
    each = sum(4 * i * o + 6 * R * (i + o) for i, o in linear_shapes(config))
    head = 4 * config.hidden_size * config.vocab_size
    return config.num_hidden_layers * each * tokens + head * head_tokens


def matmul_rate(config, tokens: int, dtype: torch.dtype) -> float:
    """FLOP/s of this machine on the products of a pass of so many tokens, nothing else done."""
    H, V, device = config.hidden_size, config.vocab_size, pick_device()
    shapes = [(tokens, i, o) for i, o in linear_shapes(config)]
    shapes += [(tokens, o, i) for i, o in linear_shapes(config)]
    shapes += [(tokens, R, size) for pair in linear_shapes(config) for size in pair]
    shapes += [(scores.TILE, H, V), (scores.TILE, V, H)]
    repeats = 10 if device.type == "cuda" else 1
    done = taken = 0.0
    for n, i, o in shapes:
        x = torch.randn(n, i, device=device, dtype=dtype)
        w = torch.randn(i, o, device=device, dtype=dtype)
        out = x @ w
        out.view(-1)[0].item()  # waits for a GPU
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(x, w, out=out)
        out.view(-1)[0].item()
        taken += time.perf_counter() - start
        done += 2 * n * i * o * repeats
    return done / taken


def train_round(contestants: dict, micro: dict, found: dict) -> None:
    """Run each contestant once and note its seconds a step, memory and losses.

    micro: pairs of a pass of TRL, halved for good where a GPU has no room for as many.
    """
    for name, (script, *flags) in contestants.items():
        out = Path(flags[flags.index("--out") + 1])
        out.mkdir(exist_ok=True)
        while micro[name]:
            passes = [] if name == "ours" else ["--micro", str(micro[name])]
            try:
                _, memory = run_alone(str(ROOT / script), *flags, *passes)
            except MemoryError:
                if name == "ours":
                    sys.exit("crpo.py does not fit into memory")
                micro[name] //= 2
                continue
            rows = [row for _, row in read_jsonl(out / "metrics.jsonl")]
            seconds = median(row["seconds"] for row in rows[2:])
            found[name].append((seconds, memory, [row["loss"] for row in rows]))
            print(f"{name.strip()}: {seconds:.3f} s a step, {memory:.2f} GB", flush=True)
            break


def train_report(found: dict, count: dict, micro: dict, batch_size: int) -> None:
    print(f"{'':18}  s/step  pairs/s  tokens/s  wasted    GB  ours is faster by  loss differs by")
    for name, runs in found.items():
        if not runs:
            print(f"{name:18}  does not fit into memory")
            continue
        pace = median(run[0] for run in runs)
        ratios = [run[0] / own[0] for run, own in zip(runs, found["ours"], strict=True)]
        waste = 1 - count["needed"] / count["ours" if name == "ours" else "TRL"]
        off = max(
            abs(a - b)
            for run, own in zip(runs, found["ours"], strict=True)
            for a, b in zip(run[2], own[2], strict=True)
        )
        print(
            f"{name:18}{pace:8.3f}{batch_size / pace:9.2f}{count['needed'] / pace:10.0f}"
            f"{waste:8.0%}{max(run[1] for run in runs):6.2f}"
            f"{median(ratios):8.2f} ({min(ratios):.2f}-{max(ratios):.2f}){off:17.1e}"
            + (f"   in passes of {micro[name]} pairs, less wasted" if micro[name] != 8 else "")
        )


def train_command(args) -> None:
    """Whole commands in turn: crpo.py, TRL as it comes, TRL with the switches of --best."""
    choose_shape(args)
    dtype = torch.bfloat16 if args.gpu else torch.float32
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        make_model(place / "model", args.hidden, args.layers, args.vocabulary, args.gpu)
        pairs = muce_shaped(args.steps * args.batch_size, args.vocabulary)
        write_jsonl(place / "pref.jsonl", pairs)
        lm = LanguageModel(str(place / "model"), dtype)
        table, sides = encode(lm, read_preferences(place / "pref.jsonl"))
        steps = [step_indices(len(sides), args.batch_size, SEED, k) for k in range(args.steps)]
        counted = [places(table, sides, taken) for taken in steps]
        count = {name: np.mean([c[name] for c in counted]) for name in counted[0]}
        shared = (args.steps, args.batch_size, "--dtype", str(dtype).removeprefix("torch."))
        contestants = {
            "ours": ours(place, place / "ours", *shared),
            "TRL, default": theirs(place, place / "default", *shared),
            "TRL, best": theirs(place, place / "best", *shared, "--best"),
        }
        if args.gpu:
            again = theirs(place, place / "again", *shared, "--best", "--checkpointing")
            contestants["  + checkpointing"] = again
        found: dict[str, list] = {name: [] for name in contestants}
        micro = dict.fromkeys(contestants, 8)
        rates = []
        for turn in range(args.rounds):
            os.environ["CRPO_CACHE"] = os.environ["HF_HOME"] = f"{place}/cache-{turn}"
            tokens = round(min(count["ours"], MICRO_TOKENS))
            rates.append(matmul_rate(lm.config, tokens, dtype))
            train_round(contestants, micro, found)
    print(f"hidden {args.hidden}, vocabulary {args.vocabulary:,}, {args.batch_size} pairs a step")
    train_report(found, count, micro, args.batch_size)
    pace, rate = median(run[0] for run in found["ours"]), median(rates)
    needed = flops(lm.config, count["needed"], count["head needed"])
    done = flops(lm.config, count["ours"], count["head"])
    print(
        f"ours: {needed / 1e9:.0f} GFLOP a step needed, {done / 1e9:.0f} done, attention aside; "
        f"{done / pace / 1e9:.0f} GFLOP/s of the {rate / 1e9:.0f} that the products alone reach: "
        f"{done / pace / rate:.0%}, {needed / pace / rate:.0%} on what is needed"
    )


# --------------------------------------------------------------------------------------------------
# Training: start and growth
# --------------------------------------------------------------------------------------------------


# TRL as its documentation has it, and as much as `ours` above is told.
TRL_SCRIPT = f"""
import sys
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

data, model, out = sys.argv[1:]
DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=out, max_steps=1, per_device_train_batch_size=8, learning_rate={LR},
        report_to="none", save_strategy="no", use_cpu={not torch.cuda.is_available()},
    ),
    train_dataset=load_dataset(data, split="train"),
    peft_config=LoraConfig(r={R}, lora_alpha={2 * R}, target_modules="all-linear"),
).train()
"""


def startup_command(args) -> None:
    """From the command to the end of the first step: 100 pairs, the embedded model."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # nobody compiles on every start
    os.environ["PYTHONUNBUFFERED"] = "1"  # `until` is seen when it is said
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        (place / "model").symlink_to(ROOT / "tiny")
        (place / "data").mkdir()
        rows = [row for _, row in read_jsonl(ROOT / "pref.jsonl")][:100]
        for name in ("pref.jsonl", "data/train.jsonl"):
            write_jsonl(place / name, rows)
        script, *flags = ours(place, place / "ours", 1, 8)
        trl = f"dpo --dataset_name {place}/data --model_name_or_path {place}/model --use_peft"
        trl += f" --lora_r {R} --lora_alpha {2 * R} --lora_target_modules all-linear --max_steps 1"
        trl += f" --learning_rate {LR} --per_device_train_batch_size 8 --output_dir {place}/trl"
        trl += " --report_to none --save_strategy no"
        trl += "" if torch.cuda.is_available() else " --use_cpu"
        trainer = (f"{place}/data", f"{place}/model", f"{place}/script")
        ended = b"'train_runtime'"
        contestants = {
            "ours": ([str(ROOT / script), *flags], b"loss="),
            "a script on TRL's trainer": (["-c", TRL_SCRIPT, *trainer], ended),
            "trl dpo": ([str(Path(sys.executable).with_name("trl")), *trl.split()], ended),
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(args.rounds + 1):  # the first writes bytecode and is not measured
            for name, (command, until) in contestants.items():
                os.environ["CRPO_CACHE"] = os.environ["HF_HOME"] = f"{place}/{name}-{turn}-cache"
                seconds, _ = run_alone(*command, until=until)
                if turn:
                    times[name].append(seconds)
    for name, values in times.items():
        ratios = [own / value for own, value in zip(times["ours"], values, strict=True)]
        print(
            f"{name:26}{median(values):6.2f} s to the end of the first step; ours takes "
            f"{median(ratios):.2f} of it ({min(ratios):.2f}-{max(ratios):.2f})"
        )


def growth_command(args) -> None:
    """Seconds and memory of one epoch of crpo.py as pairs grow: MuCE's prompts, and one prompt."""
    sizes = (1000, 2000, 4000, 8000)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        make_model(place / "model", 128, 2, 4096)
        rng = np.random.default_rng(0)
        samples = [
            Sample((("user", "w5 w6 w7"),), " ".join(f"w{k}" for k in answer), {}, "", score)
            for answer, score in zip(
                rng.integers(4, 4096, (2 * sizes[-1], 12)),
                rng.uniform(20, 50, 2 * sizes[-1]),
                strict=True,
            )
        ]
        one = make_pairs(samples)
        one = [one[k] for k in rng.permutation(len(one))]
        for what, rows in (("142 prompts", muce_shaped(10**6, 4096)), ("one prompt", one)):
            found = []
            for n in (64, *sizes):
                write_jsonl(place / "pref.jsonl", rows[:n])
                os.environ["CRPO_CACHE"] = f"{place}/{what}-{n}"
                script, *flags = ours(place, place / "out", math.ceil(n / 64), 64)
                found.append(run_alone(str(ROOT / script), *flags))
            start, *taken = (seconds for seconds, _ in found)
            cells = "".join(
                f"{value - start:8.1f} s {gb:.2f} GB"
                for value, (_, gb) in zip(taken, found[1:], strict=True)
            )
            print(f"{what:12}{cells}   exponent {exponent(sizes, [t - start for t in taken]):.2f}")


# --------------------------------------------------------------------------------------------------
# The log-probs alone
# --------------------------------------------------------------------------------------------------


def products_alone(hidden, head, targets):
    """What no version can do without; the gradient is none."""
    tile = hidden.new_empty(scores.TILE, len(head))
    for rows in hidden.detach().split(scores.TILE):
        torch.mm(rows, head.T, out=tile[: len(rows)]) @ head
    return (0 * hidden[:, 0]).float()


def liger(hidden, head, targets):
    """Liger's DPO loss of as many tokens, with the gradient of that, and not of ours."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOLoss as Loss

    loss = Loss(use_ref_model=False, compiled=torch.cuda.is_available())
    total, _ = loss(head, hidden.view(8, -1, hidden.shape[1]), targets.view(8, -1))
    return total.expand(len(hidden))


def triton(hidden, head, targets):
    from triton_tile import token_logps

    return token_logps(hidden, head, targets)


HEADS = {
    "products": products_alone,
    "fused": token_logps,
    "plain": token_logps_plain,
    "Liger": liger,
    "compiled": token_logps,  # its tile by torch.compile, see time_head
    "Triton": triton,
}


def time_head(args) -> None:
    """One way, in this process: print its best time and the memory it takes beyond its inputs."""
    device = pick_device()
    dtype = torch.bfloat16 if args.gpu else torch.float32
    N, H, V = args.tokens, args.hidden or (4096 if args.gpu else 1024), args.vocabulary
    scores.TILE = args.tile
    if args.only == "compiled":
        scores.TokenLogps.tile = staticmethod(torch.compile(scores.TokenLogps.tile))
    torch.manual_seed(0)
    head = torch.randn(V, H, device=device, dtype=dtype)
    targets = torch.randint(V, (N,), device=device)
    hidden = torch.randn(N, H, device=device, dtype=dtype).div_(math.sqrt(H)).requires_grad_()
    upstream = torch.randn(N, device=device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    times = []
    for _ in range(20 if device.type == "cuda" else 2):
        hidden.grad = None
        start = time.perf_counter()
        HEADS[args.only](hidden, head, targets).backward(upstream)
        hidden.grad[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before
    if device.type == "cuda":
        inputs = sum(x.nbytes for x in (head, targets, hidden, upstream))
        memory = (torch.cuda.max_memory_allocated() - inputs) / 2**30
    print(json.dumps([min(times), memory]))


def head_command(args) -> None:
    """Each way in a process of its own, in turn; with --gpu at Llama-3.1-8B's sizes in bfloat16."""
    if args.only:
        return time_head(args)
    lacking = {"Liger"} - ({"Liger"} if find_spec("liger_kernel") else set())
    lacking |= set() if args.gpu else {"compiled", "Triton"}
    lacking |= set() if torch.cuda.is_available() and find_spec("triton") else {"Triton"}
    found: dict[str, list] = {name: [] for name in HEADS if name not in lacking}
    for _ in range(args.rounds):
        for name, runs in found.items():
            command = [sys.executable, *sys.argv, "--only", name]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            runs.append(json.loads(out.splitlines()[-1]))
    floor = [run[0] for run in found["products"]]
    for name, runs in found.items():
        ratios = [run[0] / least for run, least in zip(runs, floor, strict=True)]
        print(
            f"{name:9}{median(run[0] for run in runs):9.4f} s  {median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) of the products alone,"
            f"{max(run[1] for run in runs):7.3f} GB more memory"
        )


# --------------------------------------------------------------------------------------------------
# What a GPU may gain, and what bfloat16 costs
# --------------------------------------------------------------------------------------------------


def attention_command(args) -> None:
    """Forward and backward through the blocks for one step: as it is, FlexAttention, compiled."""
    choose_shape(args)
    device, dtype = pick_device(), torch.bfloat16 if args.gpu else torch.float32
    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place), args.hidden, args.blocks, args.vocabulary, args.gpu)
        lm = load_lm(place, dtype)
        write_jsonl(f"{place}/pref.jsonl", muce_shaped(args.batch_size, args.vocabulary))
        table, sides = encode(lm, read_preferences(f"{place}/pref.jsonl"))
    inject(lm.model, R, 2 * R)
    batches = [
        make_batch(table, some, True, 10**9).to(device)
        for _, some in micro_batches(table, sides, MICRO_TOKENS)
    ]
    added = [additive_mask(batch.mask, dtype) for batch in batches]

    def work(blocks, masks, attention):
        def passes():
            lm.model.set_attn_implementation(attention)
            for batch, mask in zip(batches, masks, strict=True):
                out = blocks(
                    input_ids=batch.ids,
                    attention_mask=mask,
                    position_ids=batch.positions,
                    use_cache=False,
                )
                out.last_hidden_state.float().square().mean().backward()
            next(lm.model.parameters()).view(-1)[0].item()  # waits for a GPU

        return passes

    blocks = lm.model.base_model
    contest = {
        "as it is": work(blocks, added, "sdpa"),
        "compiled": work(torch.compile(blocks, dynamic=True), added, "sdpa"),
    }
    if device.type == "cuda":  # on a CPU it has no backward
        from torch.nn.attention.flex_attention import create_block_mask

        blocked = []
        for batch in batches:
            rows, _, T, _ = batch.mask.shape
            seen = batch.mask[:, 0]
            mask = create_block_mask(
                lambda r, _, i, j, seen=seen: seen[r, i, j], rows, None, T, T, device
            )
            blocked.append(mask)
        contest["FlexAttention"] = work(blocks, blocked, "flex_attention")
    times = rounds(contest, args.rounds)
    shapes = ", ".join(f"{b.ids.shape[0]} x {b.ids.shape[1]}" for b in batches)
    print(f"hidden {args.hidden}, {args.blocks} blocks, {dtype}; rows x tokens: {shapes}")
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(times["as it is"], taken, strict=True)]
        print(
            f"{name:14}{median(taken):9.4f} s, faster by {median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})"
        )


@torch.no_grad()
def noise_command(args) -> None:
    """How far log-probs are from those of float32, one response at a time."""
    exact = load_lm(args.model, torch.float32)
    table, sides = encode(exact, read_preferences(args.data))
    truth = sequence_logps_plain(exact, table)
    lengths = torch.tensor([len(answer) for answer in table.responses])
    chosen, rejected = torch.tensor(sides).T
    print(f"{args.model}: {len(truth):,} responses of {lengths.float().mean():.0f} tokens")
    print(f"{'':30}   RMS a response    largest    RMS a token    RMS of a margin at beta 0.1")
    for dtype in (torch.float32, torch.bfloat16):
        lm = exact if dtype == torch.float32 else load_lm(args.model, dtype)
        shared = torch.empty_like(truth)
        units = [[s] for s in range(len(truth))]
        for _, some in micro_batches(table, units, TOKENS, *layout(lm, table)):
            shared[some] = sequence_logps(lm, make_batch(table, some, *layout(lm, table))).cpu()
        for name, values in (("alone", sequence_logps_plain(lm, table)), ("shared", shared)):
            off = values - truth
            margin = 0.1 * (off[chosen] - off[rejected])
            print(
                f"{str(dtype).removeprefix('torch.'):10}{name:20}"
                f"{off.square().mean().sqrt():17.2e}{off.abs().max():11.2e}"
                f"{(off.square() / lengths).mean().sqrt():15.2e}"
                f"{margin.square().mean().sqrt():31.2e}"
            )


# --------------------------------------------------------------------------------------------------
# Generating and scoring
# --------------------------------------------------------------------------------------------------


def transformers_generate(lm: LanguageModel, prompts, width: int, limit: int) -> int:
    """16 samples a prompt by transformers' generate, `width` prompts at a time; counts tokens."""
    ids = sorted(lm.encoder.prompts(prompts), key=len)
    stop, count = lm.encoder.stop_ids(), 0
    for at in range(0, len(ids), width):
        batch = ids[at : at + width]
        T = max(map(len, batch))
        left = torch.tensor([[0] * (T - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in batch])
        settings = {"do_sample": True, "temperature": 0.9, "top_p": 0.99, "top_k": 0}
        out = lm.model.generate(
            left, attention_mask=mask, num_return_sequences=16, max_new_tokens=limit,
            min_new_tokens=1, eos_token_id=stop, pad_token_id=stop[0], **settings,
        )[:, T:]  # fmt: skip
        count += int((~torch.isin(out, torch.tensor(stop))).sum())
    return count


def generate_command(args) -> None:
    """Tokens a second for 16 samples of each prompt of pref.jsonl; what scoring its texts pads.

    wasted: places the blocks compute beyond each prompt once and each token drawn.
    """
    lm = load_lm(args.model, torch.float32)
    pairs = read_preferences(ROOT / "pref.jsonl")
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    counts: dict[str, int] = {}
    held: Counter = Counter()

    def count_of(name, function):
        def measure():
            held[name] = 0
            hook = lm.model.base_model.register_forward_pre_hook(
                lambda _, __, inputs: held.update({name: inputs["input_ids"].numel()}),
                with_kwargs=True,
            )
            counts[name] = function()
            hook.remove()

        return measure

    def own():
        decodings = [decoding for decoding in evaluation.DECODINGS for _ in range(4)]
        texts = evaluation.generate(lm, prompts, decodings, args.limit, 65536, SEED)
        return sum(len(ids) for _, some in texts for ids in lm.encoder.ids(some))

    contest = {"ours": own}
    for width in (1, 4):
        contest[f"transformers, {width} at a time"] = lambda width=width: transformers_generate(
            lm, prompts, width, args.limit
        )
    times = rounds({name: count_of(name, f) for name, f in contest.items()}, args.rounds)
    pace = {name: [counts[name] / t for t in taken] for name, taken in times.items()}
    asked = sum(map(len, lm.encoder.prompts(prompts)))
    for name, values in pace.items():
        ratios = [a / b for a, b in zip(pace["ours"], values, strict=True)]
        wasted = 1 - (asked + counts[name]) / held[name]
        print(
            f"{name:34}{median(values):8.0f} tokens/s, {wasted:.0%} wasted; ours is faster "
            f"by {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        )
    table, _ = encode(lm, pairs)
    units = [[s] for s in range(len(table.responses))]
    batches = [
        make_batch(table, some, *layout(lm, table))
        for _, some in micro_batches(table, units, TOKENS, *layout(lm, table))
    ]
    n, used = sum(b.ids.numel() for b in batches), sum(b.tokens for b in batches)
    print(f"scoring log-probs: {1 - used / n:.1%} of {n:,} places are padding")
    lengths = [len(ids) for ids in table.responses]
    batches = list(by_length(lengths, TOKENS))
    n = sum(len(batch) * max(lengths[k] for k in batch) for batch in batches)
    print(f"embedding: {1 - sum(lengths) / n:.1%} of {n:,} places are padding")


def main() -> None:
    doc = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=doc)
    commands = parser.add_subparsers(required=True)
    shape = {"gpu": False, "hidden": None, "vocabulary": None, "batch_size": None}
    flags = {
        "signals": (signals_command, {"rounds": 3}),
        "train": (train_command, shape | {"layers": None, "rounds": 3, "steps": 8}),
        "trl": (
            trl_command,
            {"data": "", "model": "", "out": "", "dtype": "float32", "batch_size": 8, "steps": 8}
            | {"micro": 8, "best": False, "checkpointing": False},
        ),
        "startup": (startup_command, {"rounds": 3}),
        "growth": (growth_command, {}),
        "head": (
            head_command,
            {"rounds": 3, "only": "", "gpu": False, "hidden": None, "vocabulary": 128256}
            | {"tokens": 2048, "tile": scores.TILE},
        ),
        "attention": (attention_command, shape | {"blocks": 4, "rounds": 5}),
        "noise": (noise_command, {"model": "tiny", "data": str(ROOT / "pref.jsonl")}),
        "generate": (generate_command, {"rounds": 3, "limit": 64, "model": "tiny"}),
    }
    for name, (call, options) in flags.items():
        command = commands.add_parser(name, description=call.__doc__)
        command.set_defaults(call=call)
        for key, default in options.items():
            flag = f"--{key.replace('_', '-')}"
            if default is False:
                command.add_argument(flag, action="store_true")
            else:
                kind = int if default is None else type(default)
                command.add_argument(flag, type=kind, default=default)
    args = parser.parse_args()
    lacking = [name for name in ("trl", "peft") if not find_spec(name)]
    if args.call in (train_command, startup_command) and lacking:
        sys.exit(f"benchmark.py: it needs {' and '.join(lacking)} to compare with; install them")
    args.call(args)


if __name__ == "__main__":
    main()
