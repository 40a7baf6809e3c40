"""How fast it is. Not collected by pytest: times on a shared machine are noisy.

    python tests/benchmark.py train       # a training step against TRL + PEFT's, same losses
    python tests/benchmark.py train --hidden 256 --vocabulary 128256
    python tests/benchmark.py train --gpu # the shape of Llama-3.1-8B in bfloat16, 64 pairs a step
    python tests/benchmark.py noise       # how far bfloat16 moves log-probs
    python tests/benchmark.py syncs       # where a step waits for the GPU before its update

train needs trl and peft, and with --gpu liger-kernel; --trl-python names the Python of another
environment that has them. Every contestant is a process of its own, and they take turns, so that
ratios compare programs on an equally busy machine. Figures are medians over the rounds, with the
extremes in brackets.
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import crpo
import data
import scores
import sft

import numpy as np
import tokenizers
import torch
import transformers
from torch.utils.benchmark import Timer

ROOT = Path(__file__).parent.parent
GPU = torch.cuda.is_available()
SEED, LR, R = 42, 1e-4, 128


def ratios(ours: Sequence[float], others: Sequence[float]) -> str:
    """How many times as long the others take, round by round: the median and the extremes."""
    values = [other / our for our, other in zip(ours, others, strict=True)]
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def gpu_memory() -> float:
    """GB in use on the GPU, by any process; 0 without a GPU."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info() if GPU else (0, 0)
    return (total - free) / 2**30


MICRO_TOKENS = 8192 if GPU else 1024
CPU_SHAPE = {"hidden": 768, "layers": 4, "vocabulary": 4096, "batch_size": 8}
GPU_SHAPE = {"hidden": 4096, "layers": 32, "vocabulary": 128256, "batch_size": 64}  # Llama-3.1-8B

# The 13 tasks of MuCE-PREF: prompts and pairs of each (table 2 of the paper); tokens of a prompt
# and median tokens of a response, which the paper does not print: our guess from the tasks.
MUCE = (
    (8, 5, 21, 51, 11, 10, 1, 7, 5, 7, 6, 5, 5),
    (5601, 314, 424, 675, 4388, 1366, 174, 1498, 10865, 5640, 5260, 5832, 21),
    (160, 40, 70, 30, 30, 50, 40, 60, 30, 90, 80, 80, 30),
    (60, 12, 30, 12, 8, 40, 300, 150, 20, 50, 25, 20, 2),
)


def muce_shaped(n: int, vocabulary: int) -> list[dict]:
    """n of 42,058 pairs of random words: as many prompts and responses as MuCE-PREF has."""
    rng = np.random.default_rng(0)

    def text(length):
        return " ".join(f"w{k}" for k in rng.integers(4, vocabulary, max(1, round(length))))

    rows = []
    for prompts, pairs, asked, answered in zip(*MUCE, strict=True):
        for _ in range(prompts):
            prompt = (("user", text(asked)),)
            sizes = rng.lognormal(math.log(answered), 0.5, max(2, pairs // prompts // 5 + 1))
            texts = ((text(size), rng.uniform(20, 50)) for size in sizes)
            samples = [data.Sample(prompt, t, {}, "", score) for t, score in texts]
            rows += data.make_pairs(samples)[0]
    return [rows[k] for k in rng.permutation(len(rows))[:n]]


def make_model(folder: Path, args) -> None:
    """A random Llama with a tokenizer of one id a word; with --gpu of Llama-3.1's proportions."""
    config = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 7 // 2 if args.gpu else args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // (128 if args.gpu else 64),
        num_key_value_heads=args.hidden // (512 if args.gpu else 64),
    )
    torch.manual_seed(0)
    with torch.device(scores.DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=args.dtype)
    model.save_pretrained(folder)
    ids = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{k}": k for k in range(3, args.vocabulary)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def ours(args, place: Path) -> list[str]:
    """crpo.py as plain DPO, which is all that TRL can do: it has no weights of pairs."""
    command = f"--data {place}/pref.jsonl --model {place}/model --out {place}/ours --holdout 0"
    command += f" --batch-size {args.batch_size} --max-steps {args.steps} --seed {SEED} --lr {LR}"
    command += f" --dtype {'bfloat16' if args.gpu else 'float32'} --lora-r {R} --lora-alpha {2 * R}"
    command += f" --micro-tokens {MICRO_TOKENS} --lambda-diversity 0 --overwrite"
    command += f" --save-every {10**9}"  # TRL saves nothing
    return [sys.executable, str(ROOT / "crpo.py"), *command.split()]


def theirs(args, place: Path, *flags: str) -> list[str]:
    command = f"--place {place} --out {place}/trl --steps {args.steps}" + args.gpu * " --gpu"
    command += f" --batch-size {args.batch_size} --micro {min(args.micro, args.batch_size)}"
    return [args.trl_python, __file__, "trl", *command.split(), *flags]


def trl_command(args) -> None:
    """TRL's DPOTrainer on the pairs in our order, from our initial adapter, with our metrics.jsonl.

    --best: reference log-probs before training, no gradient checkpointing, and log-probs of the
    response tokens alone, which TRL otherwise computes on a GPU only.
    """
    import peft
    import trl
    from datasets import Dataset

    if args.best and not GPU:
        trl.trainer.utils._use_triton = lambda device: True
    torch.backends.cuda.enable_cudnn_sdp(not args.best)  # scores.py has switched it off
    rows = [row for _, row in data.read_jsonl(f"{args.place}/pref.jsonl")]
    steps = [data.step_indices(len(rows), args.batch_size, SEED, k) for k in range(args.steps)]
    starts = {"prompt": "<bos>", "chosen": " ", "rejected": " "}
    texts = [{k: start + rows[i][k] for k, start in starts.items()} for step in steps for i in step]

    ends = [time.perf_counter()]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    config = trl.DPOConfig(
        output_dir=args.out,
        model_init_kwargs={"dtype": args.dtype},
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=args.batch_size // args.micro,
        train_sampling_strategy="sequential",
        learning_rate=LR,
        max_steps=args.steps,
        bf16=args.gpu,
        use_cpu=not GPU,
        use_liger_kernel=args.liger,
        logging_steps=1,
        save_strategy="no",
        precompute_ref_log_probs=args.best,
        gradient_checkpointing=not args.best,
    )
    trainer = trl.DPOTrainer(
        model=f"{args.place}/model",
        args=config,
        train_dataset=Dataset.from_list(texts),
        peft_config=peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear"),
        callbacks=[Clock()],
    )
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in trainer.model.named_parameters():
        if "lora_A" in name:  # as sft.py draws it
            bound = 1 / math.sqrt(weight.shape[1])
            A = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
            weight.data.copy_(A)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    metrics = [{"loss": a, "seconds": b} for a, b in zip(losses, np.diff(ends), strict=True)]
    data.write_file(f"{args.out}/metrics.jsonl", data.jsonl(metrics))


def positions(lm: scores.LanguageModel, path: Path, args) -> np.ndarray:
    """Token positions that a step of ours computes on average [2]: in the blocks, in the head."""
    pairs = data.read_preferences(path)
    items = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    table, index = data.build_table(lm.encoder, items, 1024)
    sides, total = list(zip(index[::2], index[1::2], strict=True)), np.zeros(2)
    for k in range(args.steps):
        step = [sides[i] for i in data.step_indices(len(sides), args.batch_size, SEED, k)]
        (order,) = data.divide(table, step, 1)
        for _, sequences in data.micro_batches(table, step, order, MICRO_TOKENS, True, 10**9):
            batch = data.make_batch(table, sequences, True, 10**9)
            total += batch.ids.numel(), len(batch.targets)
    return total / args.steps


def product_seconds(config, tokens: float, head_tokens: float, dtype: torch.dtype) -> float:
    """Seconds that the matrix products of a training step of ours take by themselves.

    Attention's are left out. Frozen layers need no gradient of their weights.
    """
    H, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    KV = H // config.num_attention_heads * config.num_key_value_heads
    n, tile = min(int(tokens), MICRO_TOKENS), scores.TILE
    products = Counter({(tile, H, V): head_tokens / tile, (tile, V, H): head_tokens / tile})
    times = config.num_hidden_layers * tokens / n
    for i, o in [(H, H)] * 2 + [(H, KV)] * 2 + [(H, F)] * 2 + [(F, H)]:
        lora = [shape for size in (i, o) for shape in ((n, size, R), (n, R, size), (size, n, R))]
        for shape in ((n, i, o), (n, o, i), *lora):  # [a, b] @ [b, c]
            products[shape] += times
    seconds = 0.0
    for (a, b, c), times in products.items():
        x = torch.randn(a, b, device=scores.DEVICE, dtype=dtype)
        w = torch.randn(b, c, device=x.device, dtype=dtype)
        timer = Timer("x @ w", globals={"x": x, "w": w}, num_threads=torch.get_num_threads())
        seconds += times * timer.timeit(20 if GPU else 2).mean
    return seconds


def train_once(command: Sequence[str]) -> dict:
    """Run a contestant: seconds a step, peak memory in GB (the GPU's, if there is one), losses."""
    out = Path(command[command.index("--out") + 1])
    shutil.rmtree(out, ignore_errors=True)
    before, memory, ended = gpu_memory(), 0.0, 0
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=printed)
        while not ended:
            memory = max(memory, gpu_memory() - before)
            time.sleep(0.005)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if status:
            sys.exit(f"{' '.join(command)}\n{os.pread(printed.fileno(), 10**7, 0).decode()}")
    rows = [row for _, row in data.read_jsonl(out / "metrics.jsonl")]
    seconds = median(row["seconds"] for row in rows[2:])  # the first two warm up
    memory = memory or usage.ru_maxrss / 2**20
    return {"seconds": seconds, "GB": memory, "losses": [row["loss"] for row in rows]}


def train_command(args) -> None:
    """Whole commands in turn: crpo.py, TRL as it comes, and TRL with the switches of --best.

    --micro: pairs in a pass of TRL, to be lowered where its memory runs out.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_model(place / "model", args)
        rows = muce_shaped(args.steps * args.batch_size, args.vocabulary)
        data.write_file(place / "pref.jsonl", data.jsonl(rows))
        lm = scores.LanguageModel(str(place / "model"), args.dtype)
        count = positions(lm, place / "pref.jsonl", args)
        contestants = {
            "ours": ours(args, place),
            "TRL": theirs(args, place),
            "TRL, best": theirs(args, place, "--best"),
        }
        if args.gpu:
            contestants["and Liger"] = theirs(args, place, "--best", "--liger")
        runs: dict[str, list[dict]] = {name: [] for name in contestants}
        alone = []
        for turn in range(args.rounds):
            os.environ["CRPO_CACHE"] = os.environ["HF_HOME"] = f"{place}/cache-{turn}"
            alone.append(product_seconds(lm.config, *count, args.dtype))
            for name, command in contestants.items():
                runs[name].append(train_once(command))
    print(f"hidden {args.hidden}, vocabulary {args.vocabulary:,}, {args.batch_size} pairs a step")
    print("           s/step  pairs/s     GB  ours is faster by  loss differs by")
    for name, some in runs.items():
        seconds, our_seconds = ([run["seconds"] for run in each] for each in (some, runs["ours"]))
        pace, memory = median(seconds), max(run["GB"] for run in some)
        off = np.subtract([run["losses"] for run in some], [run["losses"] for run in runs["ours"]])
        print(
            f"{name:9}{pace:8.3f}{args.batch_size / pace:9.2f}{memory:7.2f}  "
            f"{ratios(our_seconds, seconds):17}{abs(off).max():17.1e}"
        )
    share = median(floor / second for floor, second in zip(alone, our_seconds, strict=True))
    print(
        f"ours: a step's matrix products, attention's aside, take {median(alone):.3f} s alone, "
        f"{share:.0%} of its time"
    )


def noise_command(args) -> None:
    """How far log-probs, with shared prompts, are from float32's, one response at a time."""
    exact, _ = sft.load_with_adapter(args.model, None, torch.float32)
    pairs = data.read_preferences(args.data)
    items = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    table, index = data.build_table(exact.encoder, items, 1024)
    truth, sides = scores.sequence_logps_plain(exact, table).cpu(), torch.tensor(index).view(-1, 2)
    print(f"{len(truth):,} responses; nats: RMS, largest, and RMS of a margin at beta 0.1")
    for dtype in (torch.float32, torch.bfloat16):
        lm, _ = sft.load_with_adapter(args.model, None, dtype)
        with tempfile.TemporaryDirectory() as os.environ["CRPO_CACHE"]:
            off = torch.from_numpy(scores.score_sequences(lm, table)) - truth
        margin = 0.1 * off[sides].diff(dim=1)
        figures = off.square().mean().sqrt(), off.abs().max(), margin.square().mean().sqrt()
        print(f"{dtype}  " + "  ".join(f"{value:.2e}" for value in figures))


def syncs_command(args) -> None:
    """Train a few steps; fail where one waits for the GPU between its first forward and its update.

    But for the first, which holds the reference against the one computed before.
    """
    if not GPU:
        raise data.UserError("syncs: expected a GPU")
    passes, add_up, steps = sft.passes, sft.add_up_gradients, []

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error" if steps else "default")
        yield from passes(*args)

    def unwatched(params):
        torch.cuda.set_sync_debug_mode("default")
        steps.append(add_up(params))

    sft.passes, sft.add_up_gradients = watched, unwatched
    with tempfile.TemporaryDirectory() as out:
        flags = ["--data", args.data, "--model", args.model, "--holdout", "0", "--out", out]
        sys.argv = ["crpo.py", *flags, "--max-steps", str(args.steps)]
        crpo.main()
    print(f"no step after the first waits, of {args.steps}")


def main() -> None:
    gpu = "--gpu" in sys.argv
    shape = GPU_SHAPE if gpu else CPU_SHAPE
    run = {"gpu": False, "steps": 8, "batch_size": shape["batch_size"], "micro": 8}
    flags = {
        train_command: {"rounds": 3, "trl_python": sys.executable} | run | shape,
        noise_command: {"model": "tiny", "data": str(ROOT / "pref.jsonl")},
        syncs_command: {"model": "tiny", "data": str(ROOT / "pref.jsonl"), "steps": 4},
        trl_command: run | {"place": ..., "out": ..., "best": False, "liger": False},
    }
    parser = data.Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for call, defaults in flags.items():
        name = call.__name__.removesuffix("_command")
        command = commands.add_parser(name, description=call.__doc__)
        command.set_defaults(call=call, dtype=torch.bfloat16 if gpu else torch.float32)
        for key, default in defaults.items():
            data.flag(command, f"--{key.replace('_', '-')}", default, "")
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    data.run(main)
