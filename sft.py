"""sft.py: changing weights.

    python sft.py --data sft.jsonl --model M --out runs/sft                  # LoRA on a checkpoint
    python sft.py --data tiny/corpus.jsonl --from-scratch --out my-tiny ...  # a fresh small Llama

LoRA (Hu et al. 2021, arXiv 2106.09685), for each linear layer W of the blocks:

    y = W x + (alpha / r) B A x          A [r, in] random, B [out, r] zero: at the start, no change

the one training loop, `fit`, which takes an objective, and the simplest objective: supervised
fine-tuning, the cross-entropy of the response tokens given the prompt,

    L_SFT = - sum_t log P(y_t | x, y_<t) / (response tokens of the step)

Deliberate departures from the paper's configuration:
 1. bfloat16 or float32, never float16;
 2. lm_head and embeddings stay frozen (the authors' SFT saves full copies of both);
 3. adapters are kept in float32 whatever the base is.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, stored [in, out]

from data import (
    Encoder,
    Parser,
    Table,
    UserError,
    build_table,
    make_batch,
    micro_batches,
    number,
    read_samples,
    run,
    step_indices,
    write_file,
)
from scores import (
    LanguageModel,
    add_dtype_flag,
    layout,
    load_lm,
    pick_device,
    pick_dtype,
    say_layout,
    sequence_logps,
)

# --------------------------------------------------------------------------------------------------
# LoRA
# --------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen linear layer and its low-rank update: x [..., in] -> base(x) + scale * B A x."""

    def __init__(self, base: nn.Module, r: int, alpha: float, generator: torch.Generator):
        super().__init__()
        shape = base.weight.shape
        n_out, n_in = reversed(shape) if isinstance(base, Conv1D) else shape
        bound = 1 / math.sqrt(n_in)  # PEFT's initial A: kaiming_uniform(a=sqrt(5))
        A = torch.empty(r, n_in).uniform_(-bound, bound, generator=generator)
        self.base, self.scale, self.on = base, alpha / r, True
        self.A = nn.Parameter(A.to(base.weight.device))
        self.B = nn.Parameter(torch.zeros(n_out, r, device=base.weight.device))

    def forward(self, x):
        y = self.base(x)
        if not self.on:
            return y
        down = F.linear(x, self.A.to(x.dtype)) * self.scale  # [..., r]
        y.view(-1, y.shape[-1]).addmm_(down.view(-1, len(self.A)), self.B.T.to(x.dtype))
        return y

    def merged(self) -> nn.Module:
        """The base layer with the update added to its weight, in fp32, cast once."""
        delta = self.scale * (self.B @ self.A)  # [out, in]
        weight = self.base.weight
        weight.data = (weight.float() + (delta.T if isinstance(self.base, Conv1D) else delta)).to(
            weight.dtype
        )
        return self.base


def lora_layers(model: nn.Module) -> dict[str, LoRA]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def inject(
    model: nn.Module, r: int, alpha: float, targets: Sequence[str] | None = None, seed: int = 0
) -> None:
    """Give linear layers of the blocks a LoRA: all of them, or those whose last name is a target.

    UserError if a target is no linear layer of this model.
    """
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    linear = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and m is not head
    ]
    leaves = {name.rpartition(".")[2] for name in linear}
    for target in targets or ():
        if target not in leaves:
            raise UserError(
                f"--lora-targets: {target} is no linear layer of this model; it has "
                + ", ".join(sorted(leaves))
            )
    for name in linear:
        if targets is None or name.rpartition(".")[2] in targets:
            layer = LoRA(model.get_submodule(name), r, alpha, generator)
            replace_module(model, name, layer)


@contextmanager
def adapter_off(model: nn.Module):
    """Within this context the model is its base: the reference of DPO."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter to its base weight and take it off. ValueError if there is none (left)."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("no adapter to merge: it was merged before, or never injected")
    for name, layer in layers.items():
        replace_module(model, name, layer.merged())


# An adapter as {module name: (A [r, in], B [out, r])}, with the scale alpha / r multiplied into B.
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]


def read_adapter(folder: str) -> Adapter:
    """Read an adapter in PEFT's format, from a folder or the hub.

    UserError if it is none, or uses what LoRA here has not.
    """
    path = Path(folder)
    try:
        if not path.exists():
            files = ["adapter_config.json", "adapter_model.safetensors"]
            path = Path(huggingface_hub.snapshot_download(folder, allow_patterns=files))
        config = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
    except Exception as error:
        raise UserError(
            f"adapter {folder}: cannot be read ({error}); expected a folder with "
            "adapter_config.json and adapter_model.safetensors, as sft.py, crpo.py or PEFT save it"
        ) from None
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"):
        if config.get(key):
            raise UserError(f"adapter {folder}: {key} is not supported; merge it with PEFT first")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise UserError(f"adapter {folder}: {start} changes the base too; merge it with PEFT first")
    r, alpha = config.get("r"), config.get("lora_alpha")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if ".lora_A.weight" in key]
    found = [(tensors[f"{n}.lora_A.weight"], tensors.get(f"{n}.lora_B.weight")) for n in names]
    whole = names and len(tensors) == 2 * len(names) and isinstance(alpha, int | float)
    if not whole or any(B is None or not len(A) == B.shape[1] == r for A, B in found):
        raise UserError(
            f"adapter {folder}: it is not pairs of lora_A and lora_B of rank {r} on linear layers "
            "alone; merge it with PEFT first"
        )
    if any(name.endswith(("lm_head", "embed_out")) for name in names):
        raise UserError(f"adapter {folder}: it changes the output layer, which stays frozen here")
    scale = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
    return {
        name.removeprefix("base_model.model."): (A.float(), B.float() * scale)
        for name, (A, B) in zip(names, found, strict=True)
    }


def merge_adapter(model: nn.Module, adapter: Adapter, where: str) -> None:
    """Add an adapter to the weights it was trained on. UserError if it is of another model."""
    for name, (A, B) in adapter.items():
        try:
            base = model.get_submodule(name)
            shape = tuple(base.weight.shape)
        except AttributeError:
            base, shape = None, None
        fits = B.shape[0], A.shape[1]
        if isinstance(base, Conv1D):
            fits = fits[::-1]
        if shape != fits:
            raise UserError(
                f"adapter {where}: it changes {name} of shape {fits}, which this model does not "
                "have; give the model that the adapter was trained on"
            )
        layer = LoRA(base, len(A), len(A), torch.Generator())
        layer.A.data, layer.B.data = A.to(base.weight.device), B.to(base.weight.device)
        replace_module(model, name, layer.merged())


def load_with_adapter(
    name: str, adapter: str | None, dtype: torch.dtype
) -> tuple[LanguageModel, Adapter | None]:
    """A language model with an adapter merged into it, if one is named, and that adapter."""
    beneath = read_adapter(adapter) if adapter else None
    lm = load_lm(name, dtype)
    if beneath:
        merge_adapter(lm.model, beneath, adapter)
        digest = hashlib.sha256(lm.key.encode())  # to the cache it is another model now
        for module, (A, B) in sorted(beneath.items()):
            digest.update(module.encode() + A.numpy().tobytes() + B.numpy().tobytes())
        lm.key = digest.hexdigest()
    return lm, beneath


def save_adapter(model: nn.Module, out: Path, base_name: str, beneath: Adapter | None) -> None:
    """Write the adapter in PEFT's format, for the model `base_name`.

    If another adapter was merged into that model first (`beneath`), the two are stacked: one
    adapter of rank r + r', whose product is their sum, so that what is saved is the whole change.
    """
    layers = {name: (m.A.data, m.B.data * m.scale) for name, m in lora_layers(model).items()}
    parts = [layers, beneath] if beneath else [layers]
    ranks = [len(next(iter(part.values()))[0]) for part in parts]
    tensors = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        n_in, n_out = next((p[name][0].shape[1], p[name][1].shape[0]) for p in parts if name in p)
        blank = [(torch.zeros(r, n_in), torch.zeros(n_out, r)) for r in ranks]
        found = [p.get(name, b) for p, b in zip(parts, blank, strict=True)]
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.cat([A.cpu() for A, _ in found]).contiguous()
        tensors[f"{stem}.lora_B.weight"] = torch.cat([B.cpu() for _, B in found], 1).contiguous()
    r = sum(ranks)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": r,  # the scale is in B
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({key.split(".")[-3] for key in tensors}),
        "fan_in_fan_out": any(isinstance(m.base, Conv1D) for m in lora_layers(model).values()),
        "inference_mode": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors.part")
    os.replace(out / "adapter_model.safetensors.part", out / "adapter_model.safetensors")
    write_file(out / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def save_checkpoint(model: nn.Module, encoder: Encoder, out: Path) -> None:
    """Write a full Hugging Face checkpoint, tokenizer and chat template included."""
    model.save_pretrained(out)
    encoder.tokenizer.save_pretrained(out)


# --------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------

# An objective takes the step's number and the indices of its items, and yields for each
# micro-batch its share of the step's loss, and its share of the step's metrics: both add up.
Objective = Callable[[int, list[int]], Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]]


# Of one forward pass. A CPU is no faster with more.
MICRO_TOKENS = 4096 if torch.cuda.is_available() else 1024

# What the progress bar shows of the metrics.
SHOWN = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of all steps, then linear or cosine to zero."""
    warm = math.ceil(warmup * total)
    if step < warm:
        return peak * step / warm
    done = (step - warm) / max(total - warm, 1)
    return peak * ((1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done)


def total_steps(n: int, args) -> int:
    return args.max_steps or math.ceil(n / args.batch_size) * args.epochs


@torch.no_grad()
def evaluate(objective: Objective, n: int, step: int) -> dict[str, float]:
    """The metrics of an objective over all its n items, as `eval_<name>`."""
    totals: Counter = Counter()
    for _, stats in objective(step, list(range(n))):
        totals.update({name: float(value) for name, value in stats.items()})
    return {f"eval_{name}": value for name, value in totals.items() if name != "tokens"}


def fit(
    params: list[nn.Parameter],
    objective: Objective,
    n: int,
    args: argparse.Namespace,
    unit: str,
    held_out: tuple[Objective, int] | None = None,
) -> list[dict[str, float]]:
    """Train `params` on n items; return the held-out metrics before and after.

    Writes OUT/metrics.jsonl: a line a step, of the state before that step's update, and a line an
    evaluation. Everything follows from (step, params, optimizer state) and the seed.
    """
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0.0)
    total = total_steps(n, args)
    steps_per_epoch = math.ceil(n / args.batch_size)
    evaluations = []
    with open(Path(args.out) / "metrics.jsonl", "w") as log, tqdm(total=total, desc="step") as bar:

        def record(row):
            log.write(json.dumps(row) + "\n")
            log.flush()

        def measure(step):
            if held_out:
                evaluations.append(evaluate(*held_out, step))
                record({"step": step, "epoch": step / steps_per_epoch, **evaluations[-1]})

        measure(0)
        for step in range(total):
            start = time.perf_counter()
            indices = step_indices(n, args.batch_size, args.seed, step)
            totals: Counter = Counter()
            for loss, stats in objective(step, indices):  # forward, one micro-batch at a time
                loss.backward()
                totals.update(stats)
            norm = nn.utils.clip_grad_norm_(params, 1.0)
            metrics = {name: float(value) for name, value in totals.items()}
            if not math.isfinite(metrics["loss"] + float(norm)):
                raise UserError(
                    f"step {step}: the loss or its gradient is not finite; {unit} {indices}. "
                    "Nothing of this step was applied; a lower --lr may help"
                )
            lr = learning_rate(step, total, args.lr, args.schedule, args.warmup)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            rates = {
                f"{unit}_per_second": len(indices) / seconds,
                "tokens_per_second": metrics.pop("tokens") / seconds,
            }
            place = {"step": step, "epoch": step / steps_per_epoch}
            pace = {"grad_norm": float(norm), "lr": lr, "seconds": seconds}
            record(place | metrics | pace | rates)
            shown = {name: metrics[key] for name, key in SHOWN.items() if key in metrics}
            bar.set_postfix(shown | {f"{unit}/s": len(indices) / seconds})
            bar.update()
        measure(total)
    return evaluations


# --------------------------------------------------------------------------------------------------
# What every training command shares
# --------------------------------------------------------------------------------------------------


def add_training_flags(parser, lr: float, schedule: str, warmup: float, batch_size: int) -> None:
    """Flags of `fit` and LoRA, with the paper's values as defaults."""
    train = parser.add_argument_group("training")
    shown = " (default: %(default)s)"
    positive, whole = number(float, 0), number(int, 1)
    train.add_argument("--lr", type=positive, default=lr, help="peak learning rate" + shown)
    train.add_argument(
        "--schedule", choices=["linear", "cosine"], default=schedule, help="decay to zero" + shown
    )
    train.add_argument(
        "--warmup", type=number(float, 0, 1), default=warmup, help="share of all steps" + shown
    )
    train.add_argument("--epochs", type=whole, default=1, help="passes over the data" + shown)
    train.add_argument("--max-steps", type=whole, help="optimizer steps, instead of --epochs")
    train.add_argument(
        "--batch-size", type=whole, default=batch_size, help="items per optimizer step" + shown
    )
    train.add_argument(
        "--micro-tokens",
        type=whole,
        default=MICRO_TOKENS,
        help="tokens of one forward pass, padding aside: bounds the memory, changes no result"
        + shown,
    )
    train.add_argument(
        "--max-length",
        type=number(int, 8),
        default=1024,
        help="tokens of prompt and response; prompts are cut on the left, responses never" + shown,
    )
    train.add_argument(
        "--too-long",
        choices=["drop", "refuse"],
        default="drop",
        help="what to do with a response that --max-length has no room for" + shown,
    )
    train.add_argument(
        "--seed", type=number(int, 0, 2**32), default=42, help="of order and init" + shown
    )
    add_dtype_flag(train)
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--lora-r", type=whole, default=128, help="rank" + shown)
    lora.add_argument("--lora-alpha", type=positive, default=256, help="scale is alpha / r" + shown)
    lora.add_argument(
        "--lora-targets", nargs="+", help="linear layers, as q_proj v_proj (default: all of them)"
    )


def check_out(args) -> Path:
    """OUT, if it may be written to: a new folder, or with --overwrite that of another run."""
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: it is a file; name a folder")
    foreign = any((out / name).exists() for name in ("config.json", "adapter_config.json"))
    if foreign and not (out / "metrics.jsonl").exists():
        raise UserError(f"--out {out}: there is a model in it that is no run; name another folder")
    if (out / "metrics.jsonl").exists() and not args.overwrite:
        raise UserError(f"--out {out}: there is a run in it; add --overwrite, or name another")
    return out


def record_run(args, out: Path) -> None:
    """Write OUT/config.json: every flag, the versions, the hash of the data.

    With --from-scratch, where that is the name of the model's own file: OUT/run.json.
    """
    record = {
        "flags": vars(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "data_sha256": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(),
    }
    for name in ("merged", "adapter_model.safetensors", "adapter_config.json"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)  # of the run that --overwrite replaces
        (out / name).unlink(missing_ok=True)
    name = "run.json" if getattr(args, "from_scratch", False) else "config.json"
    write_file(out / name, json.dumps(record, indent=2) + "\n")


def limit_length(args, lm: LanguageModel) -> int:
    """--max-length, or the model's context where that is shorter."""
    if args.max_length > lm.context:
        print(f"max length  {lm.context} tokens, all that {lm.name} takes")
    return min(args.max_length, lm.context)


# --------------------------------------------------------------------------------------------------
# Supervised fine-tuning
# --------------------------------------------------------------------------------------------------


def sft_objective(
    lm: LanguageModel, table: Table, items: Sequence[int], micro_tokens: int
) -> Objective:
    """Cross-entropy of response tokens; items are indices into the table, repeats allowed."""
    share, window = layout(lm, table)

    def objective(step, indices):
        taken = [items[k] for k in indices]
        n_tokens = sum(len(table.responses[s]) for s in taken)
        each = [[s] for s in taken]
        for units, sequences in micro_batches(table, each, micro_tokens, share, window):
            batch = make_batch(table, sequences, share, window)
            logps = sequence_logps(lm, batch)  # [S]
            times = Counter(taken[u] for u in units)
            times = torch.tensor([times[s] for s in sequences], device=logps.device)
            loss = -(logps * times).sum() / n_tokens
            yield loss, {"loss": loss.detach(), "tokens": batch.tokens}

    return objective


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)


def fresh_lm(texts: Sequence[str], args) -> LanguageModel:
    """A small Llama with random weights, and a byte-level BPE tokenizer trained on the texts."""
    if args.hidden % (2 * args.heads):
        raise UserError(
            f"--hidden {args.hidden}: expected a multiple of twice --heads {args.heads}"
        )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=args.vocabulary,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=args.max_length,
    )
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.max_length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(pick_device())
    return LanguageModel.of(model, tokenizer, "the fresh Llama")


def add_scratch_flags(parser) -> None:
    scratch = parser.add_argument_group("--from-scratch: a fresh Llama, saved whole in bfloat16")
    scratch.add_argument(
        "--from-scratch",
        action="store_true",
        help="train every weight, no LoRA: --model, --lora-* and --merge have no meaning",
    )
    for name, default, what in (
        ("vocabulary", 2048, "tokens of the BPE vocabulary trained on the data"),
        ("hidden", 128, "hidden size"),
        ("layers", 5, "blocks"),
        ("heads", 4, "attention heads"),
    ):
        scratch.add_argument(
            f"--{name}", type=number(int, 1), default=default, help=f"{what} (default: {default})"
        )


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", required=True, help="JSONL of prompt and response, or messages")
    parser.add_argument("--model", default="tiny", help="hub name or folder (default: %(default)s)")
    parser.add_argument("--out", default="runs/sft", help="folder to write (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in --out")
    parser.add_argument("--merge", action="store_true", help="also write OUT/merged, a checkpoint")
    add_training_flags(parser, lr=3e-5, schedule="cosine", warmup=0.5, batch_size=8)
    add_scratch_flags(parser)
    args = parser.parse_args()

    out = check_out(args)
    samples = read_samples(args.data)
    if args.from_scratch:
        texts = [text for s in samples for text in (s.prompt[-1][1], s.response)]
        lm = fresh_lm(texts, args)
        params = list(lm.model.requires_grad_(True).parameters())
    else:
        lm = load_lm(args.model, pick_dtype(args.dtype))
        inject(lm.model, args.lora_r, args.lora_alpha, args.lora_targets, args.seed)
        params = [p for layer in lora_layers(lm.model).values() for p in (layer.A, layer.B)]
    table, index = build_table(
        lm.encoder, [(s.prompt, s.response) for s in samples], limit_length(args, lm), args.too_long
    )
    items = [s for s in index if s >= 0]
    if not items:
        raise UserError(f"{args.data}: every response is too long; raise --max-length")
    record_run(args, out)
    print(
        f"read        {len(samples):,} responses, {len(table.prompts):,} prompts; "
        f"{table.cut:,} prompts cut, {len(samples) - len(items):,} responses dropped as too long"
    )
    print(f"training    {sum(p.numel() for p in params):,} parameters of {lm.name}")
    say_layout(lm, table)
    fit(params, sft_objective(lm, table, items, args.micro_tokens), len(items), args, "responses")
    if args.from_scratch:
        save_checkpoint(lm.model.to(torch.bfloat16), lm.encoder, out)
    else:
        save_adapter(lm.model, out, args.model, beneath=None)
        if args.merge:
            merge(lm.model)
            save_checkpoint(lm.model, lm.encoder, out / "merged")
    print(f"saved       {out}/")


if __name__ == "__main__":
    run(main)
