"""sft.py: changing weights.

    python sft.py --data sft.jsonl --model M --out runs/sft
    torchrun --nproc-per-node 8 sft.py --data sft.jsonl ...      # the same run on eight devices

LoRA (Hu et al. 2021, arXiv 2106.09685), for each linear layer W of the blocks:

    y = W x + (alpha / r) B A x          A [r, in] random, B [out, r] zero: at the start, no change

the one training loop, `fit`, which takes an objective, and the simplest objective: supervised
fine-tuning, the cross-entropy of the response tokens given the prompt,

    L_SFT = - sum_t log P(y_t | x, y_<t) / (response tokens of the step)

The state of a run is its step, the trained parameters and Adam's two moments; everything else
follows from the flags. OUT/checkpoint-<step> holds that state and --resume goes on from it: the
result is that of a run without the interruption, bit for bit on a CPU. Under torchrun each process
takes its share of every step and the step's gradient is the sum over the processes, so the batch
depends neither on their number nor on how the frozen weights are kept (--shard).

Deliberate departures from the paper's configuration:
 1. bfloat16 or float32, never float16;
 2. lm_head and embeddings stay frozen (the authors' SFT saves full copies of both);
 3. adapters are kept in float32 whatever the dtype of the base is.
"""

import data
import scores

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import save
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

# ---- LoRA ----------------------------------------------------------------------------------------


def lora_plain(x, W, bias, A, B, scale):
    """W x + bias + scale B A x: x [.., in], W [out, in], bias [out] or None, A [r, in], B [out, r].

    The definition, and what `LoRALinear` is tested against.
    """
    return F.linear(x, W, bias) + scale * F.linear(F.linear(x, A), B)


class LoRALinear(torch.autograd.Function):
    """`lora_plain` for a frozen W: what is low-rank is added in place, forward and backward."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale):
        rows = x.reshape(-1, x.shape[-1])  # [n, in]
        down = (rows @ A.T).mul_(scale)  # [n, r]
        ctx.save_for_backward(rows, W, A, B, down)
        ctx.scale = scale
        y = F.linear(x, W, bias)  # [.., out]
        y.view(-1, y.shape[-1]).addmm_(down, B.T)
        return y

    @staticmethod
    def backward(ctx, upstream):  # [.., out]
        rows, W, A, B, down = ctx.saved_tensors
        g = upstream.reshape(-1, upstream.shape[-1])  # [n, out]
        up = (g @ B).mul_(ctx.scale)  # [n, r]
        grad = None
        if ctx.needs_input_grad[0]:
            grad = (g @ W).addmm_(up, A).view(*upstream.shape[:-1], -1)  # [.., in]
        return grad, None, None, up.T @ rows, g.T @ down, None


class LoRA(nn.Module):
    """A frozen linear layer and its low-rank update: x [.., in] -> base(x) + scale * B A x."""

    def __init__(self, base: nn.Module, r: int, alpha: float, generator, name: str = ""):
        super().__init__()
        W = base.weight.T if isinstance(base, transformers.Conv1D) else base.weight
        n_out, n_in = W.shape
        bound = 1 / math.sqrt(n_in)  # PEFT's initial A: kaiming_uniform(a=sqrt(5))
        A = torch.empty(r, n_in).uniform_(-bound, bound, generator=generator)
        self.base, self.scale, self.name = base, alpha / r, name
        self.on, self.cast = True, None
        self.A = nn.Parameter(A.to(W.device))
        self.B = nn.Parameter(torch.zeros(n_out, r, device=W.device))

    def forward(self, x):
        if not self.on:
            return self.base(x)
        W = self.base.weight.T if isinstance(self.base, transformers.Conv1D) else self.base.weight
        A, B = self.cast or (self.A.to(x.dtype), self.B.to(x.dtype))
        return LoRALinear.apply(x, W, self.base.bias, A, B, self.scale)

    @property
    def weight(self):
        reads = f"the model itself reads the weight of {self.name}"
        raise data.UserError(f"--lora-targets: {reads}, which cannot be adapted; name others")


def lora_layers(model: nn.Module) -> dict[str, LoRA]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained: A [r, in] and B [out, r] of every layer."""
    return {f"{name}.{w}": getattr(m, w) for name, m in lora_layers(model).items() for w in "AB"}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of the language model, not those of a vision tower beside it."""
    blocks = [m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise data.UserError(f"{type(model).__name__} cannot be trained: where are its blocks?")
    return blocks


def inject(
    model: nn.Module, r: int, alpha: float, targets: Sequence[str] | None = None, seed: int = 0
) -> float:
    """Give the linear layers of the blocks a LoRA: all, or those whose last name is in `targets`.

    Returns their share of the blocks' matrices, counted in parameters: experts are often not linear
    layers. Raises UserError if a target is not a linear layer of the blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(model)
    inside = {module for block in blocks for module in block.modules()}
    fused = any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())
    experts = ("gate_proj", "up_proj", "down_proj") if fused else ()  # what PEFT calls those
    linear = {
        name: module
        for name, module in model.named_modules()
        if module in inside and isinstance(module, nn.Linear | transformers.Conv1D)
        if name.rpartition(".")[2] not in experts
    }
    leaves = {name.rpartition(".")[2] for name in linear}
    if wrong := [target for target in targets or () if target not in leaves]:
        has = f"is no linear layer of the blocks; there are {', '.join(sorted(leaves))}"
        raise data.UserError(f"--lora-targets: {wrong[0]} {has}")
    matrices = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim > 1)
    adapted = 0
    for name, module in linear.items():
        parent, _, leaf = name.rpartition(".")
        if targets is None or leaf in targets:
            setattr(model.get_submodule(parent), leaf, LoRA(module, r, alpha, generator, name))
            adapted += module.weight.numel()
    return adapted / matrices


@contextmanager
def adapter_off(model: nn.Module):
    """Within this context the adapters are off: the model is DPO's reference."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


@contextmanager
def adapter_cast(model: nn.Module):
    """Within this context every A and B has been cast to the base's dtype, all in one piece."""
    layers, params = lora_layers(model).values(), lora_parameters(model).values()
    flat = nn.utils.parameters_to_vector(params).to(model.dtype)
    parts = iter(flat.split([p.numel() for p in params]))
    for layer in layers:
        layer.cast = next(parts).view_as(layer.A), next(parts).view_as(layer.B)
    try:
        yield
    finally:
        for layer in layers:
            layer.cast = None


def load_with_adapter(
    name: str, adapter: str | None, dtype: torch.dtype, device: torch.device = scores.DEVICE
) -> tuple[scores.LanguageModel, scores.Adapter | None]:
    """A language model with the adapter, if any, merged in; and that adapter."""
    beneath = scores.read_adapter(adapter) if adapter else None
    lm = scores.LanguageModel(name, dtype)
    lm.device = device
    if beneath:
        scores.merge_adapter(lm.model, beneath, adapter)
        digest = hashlib.sha256(lm.key.encode())  # to the cache it is another model now
        for module, (A, B) in sorted(beneath.items()):
            digest.update(module.encode() + A.numpy().tobytes() + B.numpy().tobytes())
        lm.key = digest.hexdigest()
    return lm, beneath


def save_adapter(
    model: nn.Module, out: Path, base_name: str, beneath: scores.Adapter | None
) -> None:
    """Write the adapter in PEFT's format, for the model `base_name`, a folder or a hub name.

    If another adapter was merged into that model first (`beneath`), the two are stacked: one
    adapter of rank r + r', whose product is their sum, so that what is saved is the whole change.
    """
    base_name = os.path.abspath(base_name) if Path(base_name).is_dir() else base_name
    layers = lora_layers(model)
    scale = 1 if beneath else next(iter(layers.values())).scale  # of what is saved
    parts = [{name: (m.A.data, m.B.data * (m.scale / scale)) for name, m in layers.items()}]
    parts += [beneath] if beneath else []
    ranks = [len(next(iter(part.values()))[0]) for part in parts]
    tensors = {}
    names = list(dict.fromkeys(name for part in parts for name in part))
    for name in names:
        n_in, n_out = next((p[name][0].shape[1], p[name][1].shape[0]) for p in parts if name in p)
        zeros = [(torch.zeros(r, n_in), torch.zeros(n_out, r)) for r in ranks]
        A, B = zip(*(p.get(name, zero) for p, zero in zip(parts, zeros, strict=True)), strict=True)
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.cat([a.cpu() for a in A]).contiguous()
        tensors[f"{stem}.lora_B.weight"] = torch.cat([b.cpu() for b in B], 1).contiguous()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name}
    config |= {"r": sum(ranks), "lora_alpha": sum(ranks) * scale, "target_modules": names}
    config |= {"lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    config["fan_in_fan_out"] = any(isinstance(m.base, transformers.Conv1D) for m in layers.values())
    data.write_file(out / "adapter_model.safetensors", save(tensors))
    data.write_file(out / "adapter_config.json", json.dumps(config, indent=2) + "\n")


# ---- Models too large for memory: recompute the blocks, or shard them over the processes ---------


def recompute(lm: scores.LanguageModel) -> None:
    """Keep only the input of each block for backward, and compute the rest again there."""
    for block in blocks_of(lm.model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(lm: scores.LanguageModel) -> None:
    """Shard the frozen blocks over the processes (FSDP2); each is gathered while it is used.

    Embeddings and head stay whole in every process, and so does what is trained: FSDP does not
    manage adapters that are injected afterwards.
    """
    if scores.processes()[1] == 1:
        raise data.UserError("--shard: expected several processes, as of torchrun")
    mesh = init_device_mesh(scores.DEVICE.type, (scores.processes()[1],))
    blocks = blocks_of(lm.model)
    whole = set(lm.model.parameters()) - {p for block in blocks for p in block.parameters()}
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(lm.model.base_model, mesh=mesh, ignored_params=whole)
    lm.model.to(scores.DEVICE)
    # all processes make equally many passes, so no row can have one to itself
    lm.sharded, lm.context = True, min(lm.context, lm.alone_above)


def load_to_train(args, adapter: str | None) -> tuple[scores.LanguageModel, scores.Adapter | None]:
    """--model with `adapter` merged into it and a fresh one injected, laid out as the flags say."""
    device = torch.device("cpu") if args.shard else scores.DEVICE
    lm, beneath = load_with_adapter(args.model, adapter, scores.pick_dtype(args.dtype), device)
    if args.gradient_checkpointing:
        recompute(lm)
    if args.shard:
        shard(lm)
    share = inject(lm.model, args.lora_r, args.lora_alpha, args.lora_targets, args.seed)
    n = sum(p.numel() for p in lora_parameters(lm.model).values())
    print(f"adapter     {n:,} parameters, on {share:.0%} of those in the blocks' matrices")
    lm.micro_tokens = args.micro_tokens or choose_micro_tokens(lm, args.gradient_checkpointing)
    lm.halved = False  # see `gradient`
    if args.max_length > lm.context:
        print(f"max length  {lm.context} tokens, all that {lm.name} takes")
        args.max_length = lm.context
    return lm, beneath


def choose_micro_tokens(lm: scores.LanguageModel, recomputed: bool) -> int:
    """Tokens of a pass for which the GPU has room: 8,192, beyond which it is no faster, or fewer.

    A block keeps 4 F + 10.25 H numbers a token for backward (counted in Llama's), or only its input
    where it is `recomputed`; a trained parameter takes 18 bytes beside its own.
    """
    if not torch.cuda.is_available():
        return 1024  # a CPU is no faster with more
    L, H = lm.text.num_hidden_layers, lm.head.shape[1]
    block = 4 * (getattr(lm.text, "intermediate_size", None) or 4 * H) + 10.25 * H
    numbers = L * H + block if recomputed else L * block
    room = 0.9 * torch.cuda.mem_get_info()[0]
    room -= 18 * sum(p.numel() for p in lora_parameters(lm.model).values())
    most = room / (numbers * lm.model.dtype.itemsize)
    tokens = torch.tensor(2 ** int(math.log2(min(max(most, 512), 8192))))
    return int(all_reduce(tokens, dist.ReduceOp.MIN))


def passes(
    lm: scores.LanguageModel, table: data.Table, units: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], list[int], data.Batch]]:
    """This process's share of the units, a forward pass at a time: units, sequences, batch.

    A pass has at most `lm.micro_tokens` (see `data.micro_batches`). Every process makes equally
    many passes, as a sharded model needs: one that has run out of units repeats the first process's
    first pass for none of them.
    """
    share, window = scores.layout(lm, table)
    plans = [
        list(data.micro_batches(table, units, part, lm.micro_tokens, share, window))
        for part in data.divide(table, units, scores.processes()[1])
    ]
    mine, spare = plans[scores.processes()[0]], plans[0][0][1]
    with adapter_cast(lm.model):
        for turn in range(max(map(len, plans))):
            taken, sequences = mine[turn] if turn < len(mine) else ([], spare)
            batch = data.make_batch(table, sequences, share, window)
            yield taken, sequences, batch.to(lm.model.device)


# ---- Checkpoints: the state of a run on disk -----------------------------------------------------


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all, as `data.write_file` a file; `write(folder)` fills it."""
    beside = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # left by a kill
        beside.mkdir()
        write(beside)
        os.umask(umask := os.umask(0))
        for path in beside.iterdir():
            path.chmod(0o666 & ~umask)  # what safetensors writes is for its owner alone
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    except Exception as error:  # on a full disk each library raises its own kind of error
        shutil.rmtree(beside, ignore_errors=True)
        raise data.UserError(f"{folder}: cannot be written ({error})") from None


def checkpoints(out: Path) -> list[Path]:
    """OUT/checkpoint-<step>, oldest first."""
    folders = [path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[11:]))


@dataclass
class State:
    """A run at a step: its parameters, Adam's two moments of each, and its metrics so far."""

    out: Path
    params: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    save_model: Callable[[Path], None]

    def write(self, folder: Path) -> None:
        state = {name: p.data for name, p in self.params.items()}
        torch.save([state, self.optimizer.state_dict()["state"]], folder / "state.pt")
        self.save_model(folder)

    def save(self, step: int) -> None:
        """Write OUT/checkpoint-<step>, the state before that step; the newest two stay."""
        if scores.processes()[0] == 0:
            write_folder(self.out / f"checkpoint-{step}", self.write)
            for old in checkpoints(self.out)[:-2]:
                shutil.rmtree(old)

    def begin(self, resume: bool) -> int:
        """Take over the newest checkpoint, and the metrics before it, or none; return its step."""
        folders, start = checkpoints(self.out) if resume else [], 0
        path = self.out / "metrics.jsonl"
        if resume:
            print(f"resume      from {folders[-1] if folders else 'the start'}")
        if folders:
            with scores.user_error(f"{folders[-1]}: cannot be read", "a whole one; remove it"):
                state, moments = torch.load(folders[-1] / "state.pt", "cpu", weights_only=True)
                for name, p in self.params.items():
                    p.data.copy_(state[name])
                self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
            start = int(folders[-1].name[11:])
        rows = data.read_jsonl(path, torn=True) if start else []
        steps = [(data.check_number(row.get("step"), "step", where), row) for where, row in rows]
        self.rows = [row for step, row in steps if step < start]
        if scores.processes()[0] == 0:
            data.write_file(path, data.jsonl(self.rows))
        return start

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if scores.processes()[0] == 0:
            with open(self.out / "metrics.jsonl", "ab") as file:
                file.write(data.jsonl([row]))


# ---- The loop ------------------------------------------------------------------------------------

# An objective takes the step's number and the indices of its items, and yields for each
# micro-batch its share of the step's loss, and its share of the step's metrics: both add up.
Objective = Callable[[int, list[int]], Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]]

# What the progress bar shows of the metrics.
SHOWN = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}


def all_reduce(values: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """In place, over all processes, if there are several."""
    if scores.processes()[1] > 1:
        dist.all_reduce(values, op)
    return values


def add_up(totals: dict[str, torch.Tensor]) -> dict[str, float]:
    """Metrics, summed over the processes."""
    values = torch.tensor([float(value) for value in totals.values()], dtype=torch.float64)
    return dict(zip(totals, all_reduce(values).tolist(), strict=True))


def add_up_gradients(params: dict[str, nn.Parameter]) -> None:
    """Sum the gradients over the processes in one flat all-reduce. UserError if one is missing."""
    if idle := [name for name, p in params.items() if p.grad is None]:
        unused = f"{idle[0]} takes no part in what the model answers"
        raise data.UserError(f"--lora-targets: {unused}; name the layers that do")
    if scores.processes()[1] > 1:
        grads = [p.grad for p in params.values()]
        flat = all_reduce(nn.utils.parameters_to_vector(grads))
        nn.utils.vector_to_parameters(flat, grads)


def gradient(lm, objective: Objective, step: int, indices: list[int], params) -> dict[str, float]:
    """Leave the step's gradient, clipped to norm 1, in the parameters; return its metrics.

    Where a GPU's memory runs out, the step is done again, once, with passes of half the size.
    """
    totals = Counter()
    try:
        for loss, stats in objective(step, indices):  # forward, one micro-batch at a time
            loss.backward()
            totals.update(stats)
        add_up_gradients(params)
        norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
        return add_up(totals) | {"grad_norm": float(norm)}
    except torch.OutOfMemoryError:
        if lm.halved or scores.processes()[1] > 1:
            raise
    # here the exception, which held the pass's tensors, is gone
    lm.micro_tokens, lm.halved = lm.micro_tokens // 2, True
    print(f"memory      ran out: from now on at most {lm.micro_tokens:,} tokens a pass")
    for p in params.values():
        p.grad = None
    return gradient(lm, objective, step, indices, params)


@torch.no_grad()
def evaluate(objective: Objective, n: int, step: int, epoch: float) -> dict[str, float]:
    """The metrics of an objective over all its n items, as `eval_<name>`."""
    totals, options = Counter(), {"leave": False, "disable": scores.processes()[0] > 0}
    for _, stats in data.progress(objective(step, list(range(n))), "held out", **options):
        totals.update(stats)
    del totals["tokens"]
    return {"step": step, "epoch": epoch} | {f"eval_{k}": v for k, v in add_up(totals).items()}


def fit(
    lm: scores.LanguageModel,
    objective: Objective,
    where: Sequence[str],
    args: argparse.Namespace,
    unit: str,
    save_model: Callable[[Path], None],
    held_out: tuple[Objective, int] | None = None,
) -> list[dict[str, float]]:
    """Train the adapter of `lm` on the items at `where` (file:line); return the held-out metrics.

    Writes OUT/metrics.jsonl, with a line for each step (of the state before that step's update) and
    for each evaluation, and OUT/checkpoint-<step>, with the model as `save_model` writes it. Raises
    UserError if the loss or gradient is not finite.
    """
    out, steps_per_epoch = Path(args.out), math.ceil(len(where) / args.batch_size)
    params = lora_parameters(lm.model)
    total = args.max_steps or steps_per_epoch * args.epochs
    every = args.save_every or math.ceil(total / 10)
    fused = torch.cuda.is_available()  # one kernel; on a CPU it would change the last bits
    optimizer = torch.optim.AdamW(params.values(), lr=args.lr, weight_decay=0.0, fused=fused)
    # of lr, by step: linear warm-up, then linear or cosine to zero
    warm = math.ceil(args.warmup * total)
    (share,) = transformers.get_scheduler(args.schedule, optimizer, warm, total).lr_lambdas
    state = State(out, params, optimizer, save_model)
    start = state.begin(args.resume)
    if held_out and not state.rows:
        state.log(evaluate(*held_out, 0, 0))
    bar = data.progress(total=total, initial=start, desc="step", disable=scores.processes()[0] > 0)
    with bar:
        for step in range(start, total):
            began = time.perf_counter()
            indices = data.step_indices(len(where), args.batch_size, args.seed, step)
            metrics = {"step": step, "epoch": step / steps_per_epoch}
            metrics |= gradient(lm, objective, step, indices, params)
            if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                state.save(step)
                items = f"{', '.join(where[k] for k in indices):.400}"
                raise data.UserError(
                    f"step {step}: the loss or its gradient is not finite; {unit} of it: {items}. "
                    f"checkpoint-{step} holds the state before it; a lower --lr may help"
                )
            optimizer.param_groups[0]["lr"] = lr = args.lr * share(step)
            optimizer.step()
            optimizer.zero_grad()
            metrics |= {"lr": lr, "seconds": time.perf_counter() - began}
            for name, count in ((unit, len(indices)), ("tokens", metrics.pop("tokens"))):
                metrics[f"{name}_per_second"] = count / metrics["seconds"]
            state.log(metrics)
            shown = {name: metrics[key] for name, key in SHOWN.items() if key in metrics}
            shown[f"{unit}/s"] = metrics[f"{unit}_per_second"]
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if (step + 1) % every == 0 or step + 1 == total:
                state.save(step + 1)
    if held_out:
        state.log(evaluate(*held_out, total, total / steps_per_epoch))
    return [row for row in state.rows if "eval_loss" in row]


# ---- What every training command shares ----------------------------------------------------------


def add_run_flags(parser, out: str) -> None:
    """Flags for where a run is written and how it is continued."""
    group = parser.add_argument_group("the run on disk")
    flag, again = partial(data.flag, group), group.add_mutually_exclusive_group()
    flag("--out", out, "folder to write")
    data.flag(again, "--overwrite", False, "replace the run in --out")
    data.flag(again, "--resume", False, "go on from the newest checkpoint in --out, if it has one")
    steps = "steps between checkpoints, of which two stay (default: a tenth of all)"
    flag("--save-every", None, steps, data.number(int, 1), metavar="STEPS")
    flag("--merge", False, "also write OUT/merged, a full checkpoint")


def add_training_flags(parser, lr: float, schedule: str, warmup: float, batch_size: int) -> None:
    """Flags of `fit` and LoRA, with the paper's values as defaults."""
    training, positive = parser.add_argument_group("training"), data.number(float, 0)
    flag, whole = partial(data.flag, training), data.number(int, 1)
    flag("--lr", lr, "peak learning rate", positive)
    flag("--schedule", schedule, "decay to zero", ["linear", "cosine"])
    flag("--warmup", warmup, "share of all steps", data.number(float, 0, 1))
    flag("--epochs", 1, "passes over the data", whole)
    flag("--max-steps", None, "optimizer steps, instead of --epochs", whole)
    flag("--batch-size", batch_size, "items per optimizer step, over all processes", whole)
    flag("--micro-tokens", None, "tokens of a pass (default: by a GPU's memory; CPU: 1024)", whole)
    flag("--max-length", 1024, "most tokens of prompt and response", data.number(int, 8))
    flag("--seed", 42, "of order and initialisation", data.number(int, 0, 2**32))
    scores.add_model_flags(training)
    flag("--gradient-checkpointing", False, "recompute blocks in backward: slower, less memory")
    flag("--shard", False, "under torchrun: split the frozen blocks over processes (FSDP2)")
    flag = partial(data.flag, parser.add_argument_group("LoRA"))
    flag("--lora-r", 128, "rank", whole)
    flag("--lora-alpha", 256.0, "scale is alpha / r", positive)
    flag("--lora-targets", None, "linear layers, e.g. q_proj v_proj (default: all)", nargs="+")


# What a resumed run may change: where and how it runs, not what comes out.
FREE = {"out", "overwrite", "save_every", "merge", "data", "eval_data", "torch", "transformers"}
FREE |= {"micro_tokens", "gradient_checkpointing", "shard"}


def check_out(args) -> dict:
    """What this run is (OUT/run.json): every flag, the versions, and hashes of its inputs.

    Raises UserError unless --out is new, empty, or, with --overwrite or --resume, holds a run;
    --resume wants the same flags and inputs.
    """
    out = Path(args.out)
    record = {name: value for name, value in vars(args).items() if name != "resume"}
    record |= {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("data", "eval_data", "model", "adapter"):
        if path := record.get(name):
            record[f"sha256 of {name}"] = scores.content_hash(path)
            if Path(path).exists() and Path(path).resolve().is_relative_to(out.resolve()):
                raise data.UserError(f"--out {out}: {path} lies in it; name another folder")
    if not (out / "run.json").is_file():
        if out.is_file() or any(not path.match("run.json.*.part") for path in out.glob("*")):
            raise data.UserError(f"--out {out}: it holds no run; name an empty or a new folder")
        return record
    if not (args.overwrite or args.resume):
        choices = "--resume to go on, --overwrite to replace it, or name another"
        raise data.UserError(f"--out {out}: there is a run in it; add {choices}")
    if args.resume:
        with scores.user_error(f"--resume {out}: run.json cannot be read", "that of a run"):
            before = dict(json.loads((out / "run.json").read_text()))
        changed = [
            f"{name} was {before.get(name)}, not {record.get(name)}"
            for name in sorted({*before, *record} - FREE)
            if before.get(name) != record.get(name)
        ]
        if changed:
            what = f"{'; '.join(changed)}; give what the run began with, or --overwrite"
            raise data.UserError(f"--resume {out}: {what}")
    return record


def prepare_out(args, record: dict) -> None:
    """Leave no results of an older run in OUT, but `record` alone; a resumed run keeps its own."""
    rank, world = scores.processes()
    if world > 1:
        dist.barrier()  # every process has seen OUT as it was
    if rank:
        return
    out, stale = Path(args.out), checkpoints(Path(args.out))[:-2]
    if anew := not (args.resume and checkpoints(out)):
        names = ("metrics.jsonl", "adapter_model.safetensors", "adapter_config.json", "merged")
        stale = [*checkpoints(out), *(out / name for name in names)]
    for path in (*out.glob("*.part"), *stale):  # a .part was left by a kill
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if anew:
        data.write_file(out / "run.json", json.dumps(record, indent=2) + "\n")


def save_run(args, lm: scores.LanguageModel, save_model: Callable[[Path], None]) -> None:
    """Write adapter and tokenizer into OUT, and with --merge the checkpoint that they make."""
    if scores.processes()[0]:
        return
    save_model(Path(args.out))
    lm.tokenizer.save_pretrained(args.out)
    if args.merge:
        dtype, cpu = scores.pick_dtype(args.dtype), torch.device("cpu")
        whole, _ = load_with_adapter(args.model, args.out, dtype, cpu)

        def save_checkpoint(folder):
            whole.model.save_pretrained(folder)
            whole.tokenizer.save_pretrained(folder)

        write_folder(Path(args.out) / "merged", save_checkpoint)


# ---- Supervised fine-tuning ----------------------------------------------------------------------


def sft_objective(lm: scores.LanguageModel, table: data.Table, items: Sequence[int]) -> Objective:
    """Cross-entropy of response tokens; items are indices into the table, repeats allowed."""

    def objective(step, indices):
        taken = [items[k] for k in indices]
        n_tokens = sum(len(table.responses[s]) for s in taken)
        for units, sequences, batch in passes(lm, table, [[s] for s in taken]):
            logps = scores.sequence_logps(lm, batch)  # [S]
            repeats = Counter(taken[u] for u in units)
            repeats = data.send(torch.tensor([repeats[s] for s in sequences]), logps.device)
            loss = -(logps * repeats).sum() / n_tokens
            yield loss, {"loss": loss.detach(), "tokens": batch.tokens if units else 0}

    return objective


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = data.Parser(description=__doc__)
    data.flag(parser, "--data", ..., "JSONL of prompt and response, or messages")
    data.flag(parser, "--model", "tiny", "hub name or folder")
    add_run_flags(parser, "runs/sft")
    add_training_flags(parser, lr=3e-5, schedule="cosine", warmup=0.5, batch_size=8)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    scores.join_processes()
    samples = data.read_samples(args.data)
    record = check_out(args)
    lm, _ = load_to_train(args, adapter=None)
    pairs = [(sample.prompt, sample.response) for sample in samples]
    table, index = data.build_table(lm.encoder, pairs, args.max_length)
    items = [s for s in index if s >= 0]
    where = [sample.where for sample, s in zip(samples, index, strict=True) if s >= 0]
    if not items:
        limit = f"--max-length {args.max_length}"
        raise data.UserError(f"{args.data}: every response, with its prompt, exceeds {limit}")
    count, dropped = data.plural, len(samples) - len(items)
    read = f"{count(len(samples), 'response')}, {count(len(table.prompts), 'prompt')}"
    print(f"read        {read}; {count(dropped, 'response')} dropped as too long")
    scores.layout(lm, table)  # refuses a model that is not supported

    def save_model(folder):
        save_adapter(lm.model, folder, lm.source, beneath=None)

    with data.locked(args.out):
        prepare_out(args, record)
        objective = sft_objective(lm, table, items)
        fit(lm, objective, where, args, "responses", save_model)
        save_run(args, lm, save_model)
    print(f"saved       {args.out}/")


if __name__ == "__main__":
    data.run(main)
