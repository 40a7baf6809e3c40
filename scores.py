"""scores.py: a frozen model turns text into numbers.

    python scores.py --data pref.jsonl --out scored.jsonl --signals diversity novelty surprise \\
        --embedder sentence-transformers/all-MiniLM-L6-v2 --surprise-model gpt2
    python scores.py judge --data rated.jsonl --embedder E --out judge   # a --reward-model
    torchrun --nproc-per-node 8 -- scores.py --data pref.jsonl ...       # the same file, sooner

For a prompt x with preferred responses Y_x, the paper scores a response y by

    diversity  mean over y_i in Y_x, y_i != y, of semdis(y, y_i)     semdis = 1 - cosine
    novelty    2 | DSI(y) - DSI(Y_x) |     DSI(T) = mean semdis over pairs of distinct words of T
    surprise   P_S(y | x) ^ (-1 / |y|), the perplexity of y given x under a language model S
    quality    R(x, y), the scalar of a reward model R (or the human score)

and brings each to [0, 1] by min-max over the responses to x. Ours is a fifth, how few others had
the same idea: statistical infrequency, which creativity research has scored since Guilford (by
machine in MuseScorer, arXiv 2505.16232),

    infrequency  -log((1 + |{y_i in Y_x, y_i != y: cosine(y, y_i) >= 0.6}|) / |Y_x|)

Of unit vectors e_1..e_n with sum S, e_i is at a mean distance 1 - (e_i . S - 1) / (n - 1) from the
others, which is linear in n. Log-probs never form [tokens x vocabulary]: see `token_logps`. Nothing
is computed twice, in this run or the next: see `Cache`.

Deliberate departures from the authors' code:
 1. surprise is of the response given the prompt, without the token that ends the turn;
    --perplexity conversation gives theirs, of the whole templated conversation behind one more BOS;
 2. words are Unicode and lower case; apostrophes and hyphens inside a word stay, and all other
    punctuation separates; Chinese, Japanese and Korean are split into characters;
 3. a text of fewer than two distinct words has DSI 0; a response that is alone in Y_x has
    diversity 0; identical responses to a prompt count once;
 4. a number that cannot be computed is an error, never a silent zero;
 5. min-max takes the logarithm of surprise: of perplexities as they are, the rarest answer gets 1
    and all others next to 0 (effective share of the pairs on human answers 4 %; by the logarithm
    72 %). --surprise-scale raw is the paper's letter. The column of raw numbers is perplexity.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.numpy import save
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, stored [in, out]

import data

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# On recent GPUs torch prefers cuDNN's attention, which plans anew for every shape, in about half a
# second, and with a mask its gradient can be NaN (pytorch issue 196678, from torch 2.11 on).
torch.backends.cuda.enable_cudnn_sdp(False)
# Passes differ in size: without this, memory that is free in pieces is taken a second time. It is
# read when CUDA starts; a setting of the user's stays.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

HERE = Path(__file__).parent
# The tokens of one scoring pass without gradients. A CPU is no faster with more, and pads them.
TOKENS = 8192 if torch.cuda.is_available() else 2048
EMBEDDER = "jinaai/jina-embeddings-v3-hf"  # the paper's
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- Processes, checkpoints and adapters ---------------------------------------------------------


def processes() -> tuple[int, int]:
    """(rank, number) of the processes that torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes() -> None:
    """Under torchrun, meet the other processes; only the first one prints from now on."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if not dist.is_torchelastic_launched():
        raise data.UserError("WORLD_SIZE is set, but not by torchrun; use torchrun, or unset it")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def pick_dtype(name: str) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, name)


def add_model_flags(parser) -> None:
    help = "of the frozen weights; auto: bfloat16 on a GPU, float32 elsewhere"
    data.flag(parser, "--dtype", "auto", help, ["auto", "float32", "bfloat16"])
    help = """for chat templates, in JSON, as '{"enable_thinking": false}'"""
    data.flag(parser, "--template-kwargs", None, help, data.Encoder.template_kwargs, metavar="JSON")


@contextmanager
def user_error(failure: str, expected: str):
    """Turn an error in this context into a UserError: the failure, its reason, what is expected."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise data.UserError(f"{failure} ({reason}); expected {expected}") from None


def content_hash(path: str) -> str | None:
    """SHA-256 of a file, or of a model's or adapter's folder; None for a name on the hub."""
    folder = HERE / "tiny" if path == "tiny" else Path(path)
    if folder.is_file():
        return hashlib.sha256(folder.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for name in ("*.json", "*.jinja", "*.model", "*.safetensors", "text_matching/*"):
        for file in sorted(folder.glob(name)):
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest() if folder.is_dir() else None


# An adapter as {module name: (A [r, in], B [out, r])}, with the scale alpha / r multiplied into B.
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]

# What PEFT's configuration may say: it is read here, or the tensors tell it too, or it is harmless.
PEFT_KEYS = re.compile(
    "r|lora_alpha|use_rslora|init_lora_weights|lora_dropout|bias|fan_in_fan_out|(target|exclude)_"
    "modules|layers_.*|base_model_name_or_path|(peft|task)_type|inference_mode|auto_mapping|"
    "revision|peft_version|eva_config|megatron_core|qalora_group_size"
)
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base too


def read_adapter(name: str, task: str = "") -> Adapter:
    """Read an adapter in PEFT's format, from a folder or the hub.

    task: the subfolder of an encoder's adapter, which may change the token embeddings too.
    UserError if there is none, or if it does more than add B A to linear layers.
    """
    where, pairs = f"{name}/{task}" if task else name, {}
    files = ["adapter_config.json", "adapter_model.safetensors"]
    expected = f"{' and '.join(files)} of a plain LoRA; merge any other adapter with PEFT first"
    with user_error(f"adapter {where}: cannot be read", expected):
        files = [transformers.utils.cached_file(name, str(Path(task) / file)) for file in files]
        config, tensors = json.loads(Path(files[0]).read_text()), load_file(files[1])
        for key, value in config.items():
            start = key != "init_lora_weights" or value in STARTS
            if not start or (value and not PEFT_KEYS.fullmatch(key)):
                raise ValueError(f"{key} = {value!r} is not supported")
        for key, A in tensors.items():
            module, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
            head = module.endswith(("lm_head", "embed_out"))  # which stays frozen here
            if not head and (kind == "A.weight" or (task and kind == "embedding_A")):
                pairs[module] = A, tensors[key[: -len(kind)] + kind.replace("A", "B")]
        r, alpha = config["r"], config["lora_alpha"]
        shapes = all(len(A) == B.shape[1] == r for A, B in pairs.values())
        finite = all(tensor.isfinite().all() for tensor in tensors.values())
        if not pairs or len(tensors) != 2 * len(pairs) or not shapes or not finite:
            raise ValueError(f"it is not finite lora_A and lora_B of rank {r} on linear layers")
        scale = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
        return {module: (A.float(), B.float() * scale) for module, (A, B) in pairs.items()}


@torch.no_grad()
def merge_adapter(model: torch.nn.Module, adapter: Adapter, where: str) -> None:
    """Add B A to each weight in fp32, cast once. UserError if it was trained on another model."""
    modules = dict(model.named_modules())
    for name, (A, B) in adapter.items():
        layer, delta = modules.get(name), B @ A  # [out, in]
        if isinstance(layer, Conv1D | torch.nn.Embedding):
            delta = delta.T
        weight = getattr(layer, "weight", None)
        if weight is None or weight.shape != delta.shape:
            raise data.UserError(
                f"adapter {where}: it changes {name} of shape {tuple(delta.shape)}, which this "
                "model does not have; give the model that the adapter was trained on"
            )
        weight.copy_(weight.float() + delta.to(weight.device))


MODEL_FILES = "a folder with config.json, *.safetensors and a tokenizer, or such a name on the hub"


class Checkpoint:
    """A frozen model from a folder, the hub, or "tiny": safetensors alone, no remote code.

    Configuration and tokenizer are read at once (else UserError), the weights when first needed.
    """

    sharded = False  # see sft.shard

    def __init__(self, name: str, auto: type, dtype: torch.dtype):
        self.name, self.auto, self.dtype, self.device = name, auto, dtype, DEVICE
        self.source = source = str(HERE / "tiny") if name == "tiny" else name
        with user_error(f"model {name}: cannot be loaded", MODEL_FILES):
            code = {"trust_remote_code": False}
            self.config = transformers.AutoConfig.from_pretrained(source, **code)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **code)
            self.text = self.config.get_text_config()  # of what reads text in a multimodal model

    @property
    def context(self) -> int:
        """The longest sequence that the model takes, in tokens."""
        longest = getattr(self.text, "max_position_embeddings", None) or 10**9
        rope = getattr(self.text, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("longrope", "dynamic"):
            # beyond this a long row of a pass changes the positions of all the others
            longest = min(longest, rope.get("original_max_position_embeddings") or longest)
        return longest

    @cached_property
    def model(self) -> transformers.PreTrainedModel:
        """The model with its weights, frozen and in eval mode. UserError if some are missing."""
        options = {"dtype": self.dtype, "use_safetensors": True, "trust_remote_code": False}
        if getattr(self.text, "attn_logit_softcapping", None):
            options["attn_implementation"] = "eager"  # fused kernels do not know this soft cap
        options["output_loading_info"] = True
        with user_error(f"model {self.name}: cannot be loaded", MODEL_FILES):
            model, info = self.auto.from_pretrained(self.source, **options)
            # an encoder's pooler is not used here, and masked-LM checkpoints have none
            if missing := [k for k in info["missing_keys"] if not k.startswith("pooler.")]:
                raise ValueError(f"it has no {min(missing)} for a {type(model).__name__}")
        if self.config.model_type == "jina_embeddings_v3":
            adapter = read_adapter(self.source, "text_matching")
            adapter = {name.removeprefix("roberta."): pair for name, pair in adapter.items()}
            merge_adapter(model, adapter, f"{self.name}/text_matching")
        small = sum(p.numel() for p in model.parameters()) < 10**7
        if small and self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # a second saves little, and on a busy machine costs minutes
        return model.eval().requires_grad_(False).to(self.device)

    @cached_property
    def key(self) -> str:
        """What the cache knows this model by: its commit on the hub, or a hash of its files."""
        if not (version := content_hash(self.source)):
            file = transformers.utils.cached_file(self.source, "config.json")
            version = f"{self.name} {Path(file).parent.name}"
        return hashlib.sha256(f"{self.dtype}{version}".encode()).hexdigest()


class LanguageModel(Checkpoint):
    """A causal LM, and what has to be known to run it on packed rows."""

    micro_tokens, halved = 1024, False  # see sft.choose_micro_tokens and sft.gradient

    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__(name, transformers.AutoModelForCausalLM, dtype)
        self.softcap = getattr(self.text, "final_logit_softcapping", None)  # of its logits
        # the tokens that its attention spans; longer rows may not share prompts
        sizes = [getattr(self.text, key, None) for key in ("sliding_window", "window_size")]
        self.window = min([size for size in sizes if size] or [10**9])
        self.encoder = data.Encoder(self.tokenizer)

    @property
    def head(self) -> torch.Tensor:
        """The output embedding [V, H]."""
        return self.model.get_output_embeddings().weight

    @cached_property
    def share(self) -> bool:
        """Whether rows may share prompts, found out by trial."""
        return probe(self)


def load_with_adapter(
    name: str, adapter: str | None, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[LanguageModel, Adapter | None]:
    """A language model, tried out, with an adapter merged into it, if one is named; and that."""
    beneath = read_adapter(adapter) if adapter else None
    lm = LanguageModel(name, dtype)
    lm.device = device or lm.device
    lm.share = probe(lm)
    if beneath:
        merge_adapter(lm.model, beneath, adapter)
        digest = hashlib.sha256(lm.key.encode())  # to the cache it is another model now
        for module, (A, B) in sorted(beneath.items()):
            digest.update(module.encode() + A.numpy().tobytes() + B.numpy().tobytes())
        lm.key = digest.hexdigest()
    return lm, beneath


def sequence_logps_plain(lm: LanguageModel, table: data.Table) -> torch.Tensor:
    """log P(response | prompt) [S] in fp32 from the model's own logits, each run by itself."""
    logps = []
    for p, answer in zip(table.prompt_of, table.responses, strict=True):
        text = torch.tensor([table.prompts[p] + answer], device=lm.model.device)
        logits = lm.model(input_ids=text, use_cache=False).logits[0].float()  # [T, V]
        picked = logits.log_softmax(-1)[:-1].gather(1, text[0, 1:, None])[:, 0]
        logps.append(picked[-len(answer) :].sum())
    return torch.stack(logps)


@torch.no_grad()
def probe(lm: LanguageModel) -> bool:
    """Hold our log-probs of a few random tokens against the model's own logits; may rows share?

    An architecture that ignores position ids or the mask (ALiBi, recurrent ones) is run on plain
    rows. UserError if the logits are not head(hidden).
    """
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, len(lm.head), n).tolist() for n in (5, 7, 3, 4, 2, 6)]
    table = data.Table(ids[:2], ids[2:], [0, 0, 1, 0], keys=[])

    def error(share):  # relative to the log-probs
        batch = data.make_batch(table, range(4), share, lm.window)
        ours = sequence_logps(lm, batch)
        return ((ours - expected).abs() / (1 + expected.abs())).max().item()

    exact = lm.model.dtype == torch.float32
    with user_error(
        f"model {lm.name}: a {type(lm.model).__name__} is not supported", "a causal LM"
    ):
        expected = sequence_logps_plain(lm, table)
        if not expected.isfinite().all():
            raise ValueError("its logits are not finite")
        noise = error(share=False)
        if not noise <= (1e-4 if exact else 2e-2):  # nor may it be nan
            raise ValueError("its logits are not its output embedding times its last hidden state")
    try:
        return error(share=True) <= max(4 * noise, 1e-5 if exact else 3e-3)
    except Exception:  # the architecture does not take such a mask at all
        return False


# ---- Log-probs of tokens: the plain version, and the fused one -----------------------------------


def token_logps_plain(hidden, head, targets, softcap=None):
    """log softmax(softcap(hidden @ head.T))[targets], in fp32.

    hidden [N, H], head [V, H], targets [N] -> [N]. The definition, and what `token_logps` is
    tested against: it forms [N, V].
    """
    logits = (hidden @ head.T).float()  # [N, V]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


# Rows of logits that exist at a time: few, to save memory; on a GPU a multiple of its block of 128.
TILE = 256 if torch.cuda.is_available() else 224


class TokenLogps(torch.autograd.Function):
    """`token_logps_plain` over tiles of rows, [TILE, V] at a time, for a frozen head.

    The gradient d logp / d h = head[y] - softmax(h @ head.T) @ head needs the same tile of logits,
    so it is formed in the forward pass: backward is one scaling, for whatever loss follows, and the
    head costs two matrix products in all.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, softcap):
        assert not ctx.needs_input_grad[1], "the head must be frozen"
        N = len(hidden)
        logps = torch.empty(N, dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        buffer = hidden.new_empty(min(TILE, N), len(head))
        for at in range(0, N, TILE):
            rows = slice(at, at + TILE)
            h, y = hidden[rows], targets[rows, None]  # [n, H], [n, 1]
            logits = torch.mm(h, head.T, out=buffer[: len(h)]).float()  # [n, V]
            if softcap:
                logits = logits.div_(softcap).tanh_()
                slope = 1 - logits.square()  # of the soft cap
                logits = logits.mul_(softcap)
            top = logits.amax(-1, keepdim=True)
            picked = logits.gather(1, y) - top
            weights = logits.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            logps[rows] = (picked - total.log())[:, 0]
            if grads is not None:
                down = weights.scatter_add_(1, y, -total)  # total * (softmax - onehot(y))
                if softcap:
                    down = down.mul_(slope)
                grads[rows] = (down.to(head.dtype) @ head) / -total
        ctx.save_for_backward(grads)
        return logps

    @staticmethod
    def backward(ctx, upstream):  # [N]
        (grads,) = ctx.saved_tensors
        return (grads * upstream[:, None]).to(grads.dtype), None, None, None


def token_logps(hidden, head, targets, softcap=None):
    """`token_logps_plain` in tiles, differentiable in hidden; extra memory [TILE, V] + [N, H]."""
    return TokenLogps.apply(hidden, head, targets, softcap)


def response_hidden(lm: LanguageModel, batch: data.Batch) -> torch.Tensor:
    """Run the blocks on a batch; return the hidden states [N, H] that predict response tokens."""
    mask = batch.mask()
    if batch.share:  # as numbers to add to the scores, which every implementation accepts
        dtype = lm.model.dtype
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    out = lm.model.base_model(  # [R, T, H]
        input_ids=batch.ids, attention_mask=mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    # embedding() adds its gradient up in a fixed order; indexing does not
    return F.embedding(batch.predict, out.flatten(0, 1))


def sequence_logps(lm: LanguageModel, batch: data.Batch) -> torch.Tensor:
    """log P(response | prompt) of each of the batch's S sequences: [S] in fp32, differentiable."""
    batch = batch.to(lm.model.device)
    logps = token_logps(response_hidden(lm, batch), lm.head, batch.targets, lm.softcap)  # [N]
    return sum_by_sequence(logps, batch)


def sum_by_sequence(logps: torch.Tensor, batch: data.Batch) -> torch.Tensor:
    """Sum token log-probs [N] into their sequences [S]."""
    # not with index_add: on a GPU the order of its additions varies, and two equal passes differ
    return torch.segment_reduce(logps, "sum", lengths=batch.lengths, unsafe=True)


def layout(lm: LanguageModel, table: data.Table) -> tuple[bool, int]:
    """Whether this model may share prompts on this data, and how many tokens a row may hold."""
    # while a row fits into the attention window, the window does not matter
    return lm.share and table.longest() <= lm.window, lm.window


def say_layout(lm: LanguageModel, table: data.Table) -> None:
    """Print it if every response of the table needs a row, with its prompt, to itself."""
    if not layout(lm, table)[0]:
        reason = f"{type(lm.model).__name__} cannot share prompts at these lengths"
        print(f"layout      plain rows, one response each: {reason}")


@torch.no_grad()
def score_sequences(lm: LanguageModel, table: data.Table, what: str) -> np.ndarray:
    """log P(response | prompt) of every response of the table: [S] fp32, each computed once."""

    def plan(missing):
        say_layout(lm, table)
        units = [[s] for s in missing]
        return [batch for _, batch in data.micro_batches(table, units, TOKENS, *layout(lm, table))]

    def compute(batch):
        logps = sequence_logps(lm, data.make_batch(table, batch, *layout(lm, table)))
        return logps.cpu().numpy()[:, None]

    answers = zip(table.prompt_of, table.responses, strict=True)
    keys = [content_key(table.prompts[p], answer) for p, answer in answers]
    return Cache("logps", lm).fill(keys, plan, compute, what)[:, 0]


# ---- Never twice: a cache on disk ----------------------------------------------------------------


def content_key(*parts) -> bytes:
    """16 bytes that stand for the given texts, numbers or lists of ids."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


class Cache:
    """A model's numbers on disk: fixed-size records (key, float32 numbers), appended to a file.

    The folder is $CRPO_CACHE, by default ~/.cache/crpo. The next writer removes a record that a
    kill cut short; a lock keeps writers apart.
    """

    def __init__(self, kind: str, checkpoint: Checkpoint):
        self.root = Path(os.environ.get("CRPO_CACHE") or os.path.expanduser("~/.cache/crpo"))
        self.name, self.sharded = f"{kind}-{checkpoint.key[:32]}", checkpoint.sharded

    def record(self, width: int) -> np.dtype:
        return np.dtype([("key", "V16"), ("value", "<f4", (width,))])

    def read(self) -> dict[bytes, np.ndarray]:
        known = {}
        for path in self.root.glob(f"{self.name}-*.bin"):
            raw, record = path.read_bytes(), self.record(int(path.stem.rpartition("-")[2]))
            rows = np.frombuffer(raw, record, len(raw) // record.itemsize)[::-1]  # the first counts
            known |= zip(rows["key"].tolist(), rows["value"], strict=True)
        return known

    def append(self, keys: Sequence[bytes], values: np.ndarray) -> None:
        rows = np.empty(len(keys), self.record(values.shape[1]))
        rows["key"], rows["value"] = np.array(keys, "V16"), values
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / f"{self.name}-{values.shape[1]}.bin", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            file.truncate(size - size % rows.itemsize)
            file.write(rows.tobytes())

    def fill(self, keys: Sequence[bytes], plan, compute, what: str) -> np.ndarray:
        """Numbers [n, width] of n keys; what is missing is computed batch by batch, and cached.

        plan(missing indices) lists batches of indices, compute(batch) gives their numbers. Process
        r of W takes batches r, r + W, ... A sharded model needs all processes to run it equally
        often: one without a batch repeats the last one. UserError if a number is not finite.
        """
        rank, world = processes()
        first = {key: k for k, key in reversed([*enumerate(keys)])}
        missing = [sorted(first[key] for key in first.keys() - self.read().keys())]
        if world > 1:  # what another command writes meanwhile must not make the processes differ
            dist.broadcast_object_list(missing, 0)
        batches = plan(missing[0]) if missing[0] else []
        bar = data.progress(
            total=len(missing[0]), desc=what, disable=not batches or rank > 0, leave=False
        )
        for turn in range(0, len(batches), world):
            batch, mine = batches[min(turn + rank, len(batches) - 1)], turn + rank < len(batches)
            if mine or self.sharded:
                values = compute(batch)
                if not np.isfinite(values).all():
                    raise data.UserError(f"{what}: the model gives a number that is not finite")
            if mine:
                self.append([keys[k] for k in batch], values)
            bar.update(sum(map(len, batches[turn : turn + world])))
        bar.close()
        if world > 1:
            dist.barrier()  # all have written
        known = self.read()
        return np.array([known[key] for key in keys])


# ---- Embeddings, rewards, and whether two texts mean the same ------------------------------------


def by_length(lengths: Sequence[int], tokens: int, among=None) -> list[list[int]]:
    """Batches of indices (all, or `among`) of like lengths, of at most `tokens` with padding."""
    batches: list[list[int]] = []
    for k in sorted(range(len(lengths)) if among is None else among, key=lambda k: -lengths[k]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(k)
        else:
            batches.append([k])
    return batches


def fill_rows(what: str, checkpoint: Checkpoint, columns: dict, forward) -> np.ndarray:
    """[n, width] fp32 of n rows of ids, each distinct row computed once ever.

    columns: lists of n rows, `input_ids` and whatever else the model takes. forward(tensors [b, T]
    of rows of like lengths, padded on the right, and their attention_mask) -> [b, width].
    """
    rows = columns["input_ids"]

    def stack(some):
        padded = pad_sequence([torch.tensor(row) for row in some], batch_first=True)
        return padded.to(checkpoint.model.device)

    @torch.no_grad()
    def compute(batch):
        inputs = {name: stack([column[k] for k in batch]) for name, column in columns.items()}
        inputs["attention_mask"] = stack([[1] * len(rows[k]) for k in batch])
        return forward(inputs).float().cpu().numpy()

    plan = partial(by_length, [len(row) for row in rows], TOKENS)
    keys = [content_key(row) for row in rows]
    return Cache(what, checkpoint).fill(keys, plan, compute, what)


def sentence_modules(source: str) -> tuple[str, float]:
    """Pooling and greatest length of a sentence-transformers folder; else "mean" and infinity."""

    def read(*parts):
        optional = {"_raise_exceptions_for_missing_entries": False}
        file = transformers.utils.cached_file(source, str(Path(*parts)), **optional)
        return json.loads(Path(file).read_text()) if file else {}

    pooling, longest = "mean", math.inf
    failure = f"embedder {source}: modules.json is not supported"
    with user_error(failure, "pooling, then perhaps its norm"):
        for module in read("modules.json"):
            kind, path = module["type"].rpartition(".")[2], module["path"]
            if kind == "Transformer":
                longest = read(path, "sentence_bert_config.json").get("max_seq_length") or longest
            elif kind == "Pooling":
                config = read(path, "config.json")
                modes = [key for key, on in config.items() if on and "pooling_mode_" in key]
                names = [re.sub("pooling_mode_|_tokens?", "", key) for key in modes]
                pooling = config.get("pooling_mode") or "+".join(names) or "mean"
            elif kind != "Normalize":
                raise ValueError(kind)
        if pooling not in ("mean", "cls", "lasttoken"):
            raise ValueError(f"pooling {pooling}")
    return pooling, longest


class Embedder:
    """Texts to unit vectors: last hidden states, pooled over a text's tokens and normalised."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.pooling, self.longest = sentence_modules(checkpoint.source)

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """{text: [H] float32 unit vector}."""
        checkpoint, texts = self.checkpoint, list(dict.fromkeys(texts))
        if not texts:
            return {}
        limit = min(checkpoint.context, checkpoint.tokenizer.model_max_length, self.longest, 8192)
        rows = checkpoint.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        if long := sum(len(row) == limit for row in rows):
            print(f"embedding   {long:,} texts reach the {limit} tokens of {checkpoint.name}")

        def forward(inputs):
            failure = f"embedder {checkpoint.name}: it cannot embed a text"
            with user_error(failure, "an encoder or a causal LM"):
                hidden = checkpoint.model.base_model(**inputs).last_hidden_state  # [b, T, H]
            mask = inputs["attention_mask"]
            if self.pooling == "mean":
                pooled = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            else:
                place = mask.sum(1) - 1 if self.pooling == "lasttoken" else 0 * mask.sum(1)
                pooled = hidden[torch.arange(len(mask), device=mask.device), place].float()
            return F.normalize(pooled, dim=-1)

        kind = "embeddings" if self.pooling == "mean" else f"embeddings-{self.pooling}"
        vectors = fill_rows(kind, checkpoint, {"input_ids": rows}, forward)
        return dict(zip(texts, vectors, strict=True))


def load_embedder(name: str, dtype: torch.dtype) -> Embedder:
    return Embedder(Checkpoint(name, transformers.AutoModel, dtype))


class Classifier(Checkpoint):
    outputs = 1  # the labels that its checkpoint must have

    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__(name, transformers.AutoModelForSequenceClassification, dtype)
        if (labels := self.config.num_labels) != self.outputs:
            raise data.UserError(f"model {name}: it has {labels} outputs; expected {self.outputs}")

    def logits(self, what: str, columns: dict) -> np.ndarray:
        """[n, outputs] fp32; see `fill_rows`."""

        def forward(inputs):
            if not hasattr(self.model, "score"):
                return self.model(**inputs).logits
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            blocks = self.model.base_model
            hidden = blocks(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            # causal: read at the last token; PAD may be EOS
            last = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
            return self.model.score(last)

        return fill_rows(what, self, columns, forward)


class RewardModel(Classifier):
    def __call__(self, items: Sequence[tuple[data.Messages, str]]) -> np.ndarray:
        """Rewards [n] fp32 of (prompt, response) items."""
        if self.tokenizer.chat_template:
            encoder = data.Encoder(self.tokenizer)
            texts = [encoder.render((*p, ("assistant", y)), False) for p, y in items]
            columns = {"input_ids": encoder.ids(texts)}
        else:
            prompts = ["\n\n".join(content for _, content in p) for p, _ in items]
            encoded = self.tokenizer(prompts, [y for _, y in items])
            kinds = "input_ids", "token_type_ids"
            columns = {kind: encoded[kind] for kind in kinds if kind in encoded}
        for row, (_, text) in zip(columns["input_ids"], items, strict=True):
            if len(row) > self.context:
                limit = f"takes {self.context} tokens, too few for its prompt and"
                raise data.UserError(f"reward model {self.name}: it {limit} {text[:60]!r}")
        return self.logits("rewards", columns)[:, 0]


class Equivalence(Classifier):
    """(text, text) to the probability of label 1, that they say the same, as in NoveltyBench."""

    outputs = 2
    TOKENIZER = "microsoft/deberta-v3-large"  # the published classifier comes without a tokenizer

    def __init__(self, name: str):
        super().__init__(name, torch.float32)
        if set(self.tokenizer("A brick.")["input_ids"]) <= set(self.tokenizer.all_special_ids):
            # transformers returns an empty vocabulary if the tokenizer's files are missing
            self.tokenizer = Checkpoint(self.TOKENIZER, None, torch.float32).tokenizer

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Probabilities [n] fp32 of n (first, second) pairs."""
        ones, others = (
            self.tokenizer(list(texts), add_special_tokens=False).encodings
            for texts in zip(*pairs, strict=True)
        )
        for encoding in (*ones, *others):  # the length that the published classifier has seen
            encoding.truncate(min(128, self.context // 2 - 2))  # there are up to 4 special tokens
        rows = list(map(self.tokenizer.backend_tokenizer.post_process, ones, others))
        columns = {"input_ids": [row.ids for row in rows]}
        if "token_type_ids" in self.tokenizer.model_input_names:
            columns["token_type_ids"] = [row.type_ids for row in rows]
        return torch.from_numpy(self.logits("equivalence", columns)).softmax(-1)[:, 1].numpy()


class Judge:
    """(prompt, response) to the score a human would give, as `scores.py judge` has fitted it."""

    def __init__(self, folder: str):
        with user_error(f"judge {folder}: cannot be read", "what scores.py judge makes"):
            with safe_open(Path(folder) / "judge.safetensors", "np") as file:
                self.weight, self.bias = file.get_tensor("weight"), file.get_tensor("bias")
                about = json.loads(file.metadata()["judge"])
            self.embedder = load_embedder(about["embedder"], pick_dtype(about["dtype"]))
            self.checkpoint = self.embedder.checkpoint
            if self.checkpoint.key != about["key"]:
                raise ValueError(f"{about['embedder']} is no longer what it was fitted with")

    def __call__(self, items: Sequence[tuple[data.Messages, str]]) -> np.ndarray:
        """Scores [n] float64 of (prompt, response) items."""
        return judge_features(self.embedder, items) @ self.weight + self.bias


def load_reward_model(name: str, dtype: torch.dtype) -> RewardModel | Judge:
    judge = (Path(name) / "judge.safetensors").exists()
    return Judge(name) if judge else RewardModel(name, dtype)


# ---- The signals ---------------------------------------------------------------------------------


@dataclass
class Pool:
    """The n distinct responses to one prompt that are scored together.

    preferred [n] bool: which of them make up Y_x. human [n]: their human scores, nan where absent.
    raw: {signal: [n]}, as measured, filled in by `add_signals`.
    """

    prompt: data.Messages
    texts: list[str]
    preferred: np.ndarray
    human: np.ndarray
    task: str = ""
    raw: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Scorers:
    """The models behind the signals: either loaded, or names that are loaded when first used.

    perplexity: "response" given the prompt, or of the whole "conversation" as the authors have it.
    surprise_scale: "log" or "raw", before min-max. same_above: from this cosine on, two responses
    are the same idea to `infrequency`.
    """

    embedder: str | Embedder | None = None
    surprise_model: str | LanguageModel | None = None
    reward_model: str | RewardModel | Judge | None = None
    dtype: torch.dtype = torch.float32
    perplexity: str = "response"
    surprise_scale: str = "log"
    same_above: float = 0.6
    opened: set[str] = field(default_factory=set)

    def get(self, kind: str):
        """The scorer of this kind. Of those given by name, one has its weights in memory."""
        if isinstance(name := getattr(self, kind), str):
            load = {"embedder": load_embedder, "surprise_model": LanguageModel}
            setattr(self, kind, load.get(kind, load_reward_model)(name, self.dtype))
            self.opened.add(kind)
        for other in self.opened - {kind}:
            scorer = getattr(self, other)
            vars(getattr(scorer, "checkpoint", scorer)).pop("model", None)
        return getattr(self, kind)


JOINERS = "'’-"
CJK = re.compile("[\u2e80-\u2fdf\u3005-\u3007\u3040-\u31ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def running_words(text: str) -> list[str]:
    """The words of a text in order, lower case; see departure 2 above."""

    def mark(c):
        if c not in JOINERS and unicodedata.category(c)[0] not in "LNM":
            return " "
        return f" {c} " if CJK.match(c) or 0x20000 <= ord(c) < 0x40000 else c

    spaced = "".join(mark(c) for c in unicodedata.normalize("NFKC", text).lower())
    stripped = (word.strip(JOINERS) for word in spaced.split())
    return [word for word in stripped if any(c.isalnum() for c in word)]


def words(text: str) -> list[str]:
    """The distinct words of a text, in order."""
    return list(dict.fromkeys(running_words(text)))


def distance_to_set(vectors: Sequence[np.ndarray], member: np.ndarray) -> np.ndarray:
    """Means [n] of 1 - cosine of unit vectors [n, H] to the others in `member` [n]; 0 if none."""
    vectors = np.array(vectors, np.float64)
    squares = (vectors * vectors).sum(1)  # 1, but for rounding
    dots = vectors @ (member @ vectors) - member * squares  # [n]
    others = member.sum() - member  # [n]
    return np.where(others > 0, 1 - dots / np.maximum(others, 1), 0.0)


def diversity(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, the mean semantic distance of each response to the others in Y_x: [n]."""
    vector = scorers.get("embedder")([text for pool in pools for text in pool.texts])
    return [distance_to_set([vector[t] for t in pool.texts], pool.preferred) for pool in pools]


def novelty(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, 2 |DSI(y) - DSI(Y_x)| of each response: [n]."""
    words_of = {text: words(text) for pool in pools for text in pool.texts}
    vector = scorers.get("embedder")([word for some in words_of.values() for word in some])

    def dsi(some):  # the mean over pairs is the mean over words of the distance to the others
        vectors = [vector[word] for word in some]
        return distance_to_set(vectors, np.ones(len(vectors), bool)).mean() if vectors else 0.0

    measured = []
    for pool in pools:
        preferred = [t for t, member in zip(pool.texts, pool.preferred, strict=True) if member]
        whole = dsi(dict.fromkeys(word for text in preferred for word in words_of[text]))
        measured.append(np.array([2 * abs(dsi(words_of[text]) - whole) for text in pool.texts]))
    return measured


def infrequency(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, -log of the share of Y_x that is like a response, itself included: [n]."""
    vector, measured = scorers.get("embedder")([t for pool in pools for t in pool.texts]), []
    for pool in pools:
        vectors = np.array([vector[text] for text in pool.texts])
        others = vectors[pool.preferred].T
        tiles = (vectors[at : at + TILE] @ others for at in range(0, len(vectors), TILE))
        # 1e-6: a text and itself, at a threshold of 1
        like = np.concatenate([(tile >= scorers.same_above - 1e-6).sum(1) for tile in tiles])
        measured.append(-np.log((1 + like - pool.preferred) / pool.preferred.sum()))
    return measured


def split_by_pool(values: np.ndarray, pools: Sequence[Pool]) -> list[np.ndarray]:
    return np.split(values, np.cumsum([len(pool.texts) for pool in pools])[:-1])


def conversations(lm: LanguageModel, items: Sequence[tuple[data.Messages, str]]):
    """Like `build_table`, but for whole templated conversations with one more BOS in front."""
    bos = lm.tokenizer.bos_token_id
    if bos is None:
        raise data.UserError(f"model {lm.name}: --perplexity conversation needs a BOS token")
    rows = lm.encoder.ids([lm.encoder.render((*p, ("assistant", y)), False) for p, y in items])
    index = [s if len(row) < lm.context else -1 for s, row in enumerate(rows)]
    return data.Table([[bos]], rows, [0] * len(rows), items), index


def surprise(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, the perplexity of each response given the prompt: [n]."""
    lm = scorers.get("surprise_model")
    items = [(pool.prompt, text) for pool in pools for text in pool.texts]
    if scorers.perplexity == "conversation":
        table, index = conversations(lm, items)
    else:
        table, index = data.build_table(lm.encoder, items, lm.context, end=False)
    if min(index) < 0:
        raise data.UserError(
            f"surprise model {lm.name}: it takes {lm.context} tokens, too few for the response "
            f"{items[index.index(-1)][1][:60]!r}; choose another with --surprise-model"
        )
    logps = score_sequences(lm, table, "surprise").astype(np.float64)
    lengths = np.array([max(len(ids), 1) for ids in table.responses])
    return split_by_pool(np.exp(-logps / lengths)[index], pools)


def quality(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, the reward of each response: [n]; without a reward model, the human score."""
    items = [(pool.prompt, text) for pool in pools for text in pool.texts]
    if scorers.reward_model is not None:
        return split_by_pool(scorers.get("reward_model")(items).astype(np.float64), pools)
    unknown = np.isnan(np.concatenate([pool.human for pool in pools]))
    if unknown.any():
        raise data.UserError(
            "quality needs --reward-model, or score_chosen and score_rejected in the data; "
            f"there is no score for {items[unknown.argmax()][1][:60]!r}"
        )
    return [pool.human for pool in pools]


class Signal(NamedTuple):
    """function(pools, scorers) measures it; scorer: the field of `Scorers` that it needs."""

    function: Callable[[Sequence[Pool], Scorers], list[np.ndarray]]
    scorer: str | None = None


# A sixth signal is one more function, and one more entry here.
SIGNALS = {
    "diversity": Signal(diversity, "embedder"),
    "novelty": Signal(novelty, "embedder"),
    "surprise": Signal(surprise, "surprise_model"),
    "infrequency": Signal(infrequency, "embedder"),
    "quality": Signal(quality, "reward_model"),
}


def normalise(values: np.ndarray, signal: str, surprise_scale: str = "log") -> np.ndarray:
    """Min-max over one prompt's responses [n] -> [0, 1]; all equal: 0.5; one alone: diversity 0."""
    if len(values) == 1 and signal == "diversity":
        return np.zeros(1)
    if signal == "surprise" and surprise_scale == "log":
        values = np.log(values)
    low, high = values.min(), values.max()
    if high - low <= 1e-9 * max(1, abs(low), abs(high)):  # equal, but for rounding
        return np.full(len(values), 0.5)
    return (values - low) / (high - low)


def make_pools(pairs: Sequence[data.Pair], include_rejected: bool) -> list[Pool]:
    """Group the responses by prompt: Y_x is the distinct preferred ones."""
    preferred: dict[data.Messages, dict[str, bool]] = defaultdict(dict)
    human, task = {}, {pair.prompt: pair.task for pair in reversed(pairs)}
    for pair in pairs:
        preferred[pair.prompt][pair.chosen] = True
        for side in ("chosen", "rejected"):
            if (score := pair.row.get(f"score_{side}")) is not None:
                score = data.check_number(score, f"score_{side}", pair.where, -1e9, 1e9)
                human[pair.prompt, getattr(pair, side)] = score
    for pair in pairs if include_rejected else ():
        preferred[pair.prompt].setdefault(pair.rejected, False)
    pools = []
    for prompt, texts in preferred.items():
        scores = np.array([human.get((prompt, text), math.nan) for text in texts])
        pools.append(Pool(prompt, list(texts), np.array([*texts.values()]), scores, task[prompt]))
    return pools


def add_signals(
    pairs: Sequence[data.Pair], signals, scorers: Scorers, include_rejected: bool = False
) -> list[Pool]:
    """Write `<signal>_chosen` (and `_rejected`), in [0, 1], into the rows; return the pools."""
    pools = make_pools(pairs, include_rejected)
    for signal in signals:  # a wrong name is reported before another scorer has run for hours
        if SIGNALS[signal].scorer:
            scorers.get(SIGNALS[signal].scorer)
    for signal in signals:
        column: dict[tuple[data.Messages, str], float] = {}
        for pool, raw in zip(pools, SIGNALS[signal].function(pools, scorers), strict=True):
            pool.raw[signal] = raw
            values = normalise(raw, signal, scorers.surprise_scale).tolist()
            for text, value in zip(pool.texts, values, strict=True):
                column[pool.prompt, text] = round(value, 6)
        for pair in pairs:
            pair.row[f"{signal}_chosen"] = column[pair.prompt, pair.chosen]
            if include_rejected:
                pair.row[f"{signal}_rejected"] = column[pair.prompt, pair.rejected]
    return pools


# ---- A judge of quality from human scores --------------------------------------------------------


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [n], with ties at their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def within_prompts(*columns: Sequence[np.ndarray]) -> np.ndarray:
    """Spearman's correlation of two columns inside each prompt, and its n: [P, 2].

    A column is an array [n] for each prompt, nan where unknown. Of a third one, both are made
    independent first (partial correlation). Prompts with nothing to compare are left out.
    """
    rows = []
    for some in zip(*columns, strict=True):
        known = ~np.isnan(sum(some))
        if not known.any():
            continue
        x, y, *removed = (ranks(column[known]) - ranks(column[known]).mean() for column in some)
        for z in removed:
            x, y = (v - z * (v @ z) / max(z @ z, 1e-9) for v in (x, y))
        if min(x.std(), y.std()) > 1e-9:  # neither is all equal
            rows.append((x @ y / math.sqrt((x @ x) * (y @ y)), known.sum()))
    return np.array(rows).reshape(-1, 2)


def agreement(*columns: Sequence[np.ndarray]) -> str:
    """`within_prompts`, averaged by responses, and its 95 % bootstrap interval over prompts."""
    r, n = within_prompts(*columns).T
    if not len(n):
        return "-"
    drawn = np.random.default_rng(0).integers(len(n), size=(2000, len(n)))
    low, high = np.quantile((r * n)[drawn].sum(1) / n[drawn].sum(1), (0.025, 0.975))
    return f"{r @ n / n.sum():.2f} ({low:.2f} to {high:.2f})"


def judge_features(embedder: Embedder, items: Sequence[tuple[data.Messages, str]]) -> np.ndarray:
    """[n, 2H] of n (prompt, response) items: e(y), and sqrt(H) e(x) * e(y) elementwise."""
    prompts = ["\n\n".join(content for _, content in prompt) for prompt, _ in items]
    vector = embedder([*prompts, *(text for _, text in items)])
    x = np.array([vector[prompt] for prompt in prompts], np.float64)
    y = np.array([vector[text] for _, text in items], np.float64)
    return np.hstack([y, math.sqrt(y.shape[1]) * x * y])


def group_by_prompt(embedder: Embedder, samples: Sequence[data.Sample]) -> list:
    """For each prompt, the features [n, 2H] and the human scores [n] of its responses."""
    rows = defaultdict(list)
    for k, sample in enumerate(samples):
        rows[sample.prompt].append(k)
    X = judge_features(embedder, [(sample.prompt, sample.response) for sample in samples])
    score = np.array([sample.score for sample in samples])
    return [(X[some], score[some]) for some in rows.values()]


PENALTIES = 10.0 ** np.arange(-1, 4.1, 0.5)


def ridge(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Weights [P, d] of a linear fit of y to X, for each of PENALTIES; a group is (X [n, d], y)."""
    X, y = (np.concatenate(part) for part in zip(*groups, strict=True))
    eigenvalues, Q = np.linalg.eigh(X.T @ X)
    return (Q.T @ (X.T @ y) / (eigenvalues.clip(0) + PENALTIES[:, None])) @ Q.T


def fit_judge(groups: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0):
    """Ridge regression of the scores on the features, centred by prompt; see `group_by_prompt`.

    Returns the weights [d], the penalty that predicts best in ten-fold cross-validation over
    prompts, and for each prompt the predictions [n] of the other folds.
    """
    # raters are more lenient on some prompts, which does not make those responses better
    centred = [(X - X.mean(0), y - y.mean()) for X, y in groups]
    fold = np.random.default_rng(seed).permutation(len(groups)) % 10
    W = [
        ridge([group for group, f in zip(centred, fold, strict=True) if f != k])  # [P, d]
        for k in range(fold.max() + 1)
    ]
    errors = [(W[k] @ X.T - y) ** 2 for k, (X, y) in zip(fold, centred, strict=True)]
    best = np.concatenate(errors, 1).sum(1).argmin()
    held_out = [W[k][best] @ X.T for k, (X, _) in zip(fold, groups, strict=True)]
    return ridge(centred)[best], PENALTIES[best], held_out


def judge_command(args) -> None:
    """Fit a judge on the responses of a split, try it on the others, and save it."""
    splits = defaultdict(list)
    for sample in data.read_samples(args.data, rated=True):
        splits[str(sample.row.get("split")) if args.split else None].append(sample)
    training = splits.pop(args.split, [])
    if sum(count > 1 for count in Counter(s.prompt for s in training).values()) < 2:
        raise data.UserError(
            f"{args.data}: {len(training):,} rated responses in this split, and fewer than two "
            "prompts with several, of whose differences a judge learns"
        )
    embedder = load_embedder(args.embedder, pick_dtype(args.dtype))
    groups = group_by_prompt(embedder, training)
    weight, penalty, held_out = fit_judge(groups)
    X, score = (np.concatenate(part) for part in zip(*groups, strict=True))
    bias = np.array([score.mean() - X.mean(0) @ weight])
    print(f"fitted      ridge regression, penalty {penalty:g}, on {args.split or 'all'}")
    print("held out    rank correlation with human scores within prompts (95 % over prompts)")
    print(f"            {agreement(held_out, [y for _, y in groups])} by cross-validation")
    for split in sorted(splits, key=str):
        X, y = zip(*group_by_prompt(embedder, splits[split]), strict=True)
        print(f"            {agreement([x @ weight for x in X], y)} in {split}")
    if processes()[0] == 0:
        dtype = str(embedder.checkpoint.dtype).removeprefix("torch.")
        about = {"embedder": args.embedder, "key": embedder.checkpoint.key, "dtype": dtype}
        about = {"judge": json.dumps(about)}  # one string: several would be written in any order
        tensors = save({"weight": weight, "bias": bias}, about)
        data.write_file(Path(args.out) / "judge.safetensors", tensors)
    print(f"saved       {args.out}/, for --reward-model")


# ---- The command, and what it prints -------------------------------------------------------------


def print_signals(pools: Sequence[Pool], signals: Sequence[str]) -> None:
    """Print each signal as measured, and how it agrees with the human score, if there is one.

    That is the rank correlation within prompts, also with length in words removed.
    """
    columns = {signal: [pool.raw[signal] for pool in pools] for signal in signals}
    columns["words"] = [np.array([len(t.split()) for t in pool.texts], float) for pool in pools]
    human = [pool.human for pool in pools]
    heads = ("with human score (95 %)", "length removed")
    print(f"\n{'':12}{'mean':>10}{'least':>10}{'most':>10}{heads[0]:>26}{heads[1]:>26}")
    for signal, column in columns.items():
        raw = np.concatenate(column)
        print(f"{signal:12}{raw.mean():10.4g}{raw.min():10.4g}{raw.max():10.4g}", end="")
        whole, part = agreement(column, human), agreement(column, human, columns["words"])
        print(f"{whole:>26}{part:>26}")


def add_scorer_flags(parser, embedder, surprise_model, reward="the human scores of the data"):
    """Flags of `Scorers`; reward: what the help says of the default of --reward-model."""
    start = "" if embedder else " (default: the starting model)"
    help = "encoder or causal LM behind diversity and novelty" + start
    data.flag(parser, "--embedder", embedder, help)
    data.flag(parser, "--surprise-model", surprise_model, "causal LM behind surprise" + start)
    help = f"behind quality: sequence classifier, or folder of scores.py judge (default: {reward})"
    data.flag(parser, "--reward-model", None, help)
    help = "of the response alone, or as the authors of the whole templated conversation"
    data.flag(parser, "--perplexity", "response", help, ["response", "conversation"])


def score_command(args) -> None:
    pairs = data.read_preferences(args.data)
    models = args.embedder, args.surprise_model, args.reward_model, pick_dtype(args.dtype)
    scorers = Scorers(*models, args.perplexity, args.surprise_scale, args.same_above)
    pools = add_signals(pairs, args.signals, scorers, args.include_rejected)
    if processes()[0] == 0:
        data.write_jsonl(args.out, [pair.row for pair in pairs])
    n_scored = sum(len(pool.texts) for pool in pools)
    print(f"{len(pairs):,} pairs, {len(pools):,} prompts, {n_scored:,} distinct responses scored")
    print_signals(pools, args.signals)
    print(f"\nsaved {args.out}")


def main() -> None:
    parser = data.Parser(description=__doc__)
    judge = sys.argv[1:2] == ["judge"]
    if judge:
        parser.prog += " judge"
        data.flag(parser, "--data", ..., "JSONL of rated responses")
        data.flag(parser, "--out", ..., "folder to write")
        data.flag(parser, "--split", None, "rows to fit on, e.g. Training; others measure the fit")
        data.flag(parser, "--embedder", EMBEDDER, "encoder or causal LM")
    else:
        three, every = ["diversity", "novelty", "surprise"], list(SIGNALS)
        data.flag(parser, "--data", ..., "preference JSONL to read")
        data.flag(parser, "--out", ..., "the same rows with the scores, to write")
        data.flag(parser, "--signals", three, "which columns to compute", every)
        add_scorer_flags(parser, EMBEDDER, "google/gemma-2-27b-it")
        data.flag(parser, "--surprise-scale", "log", "on which min-max takes it", ["log", "raw"])
        cosine = data.number(float, -1, 1)
        help = "cosine from which on infrequency takes two responses for the same idea"
        data.flag(parser, "--same-above", 0.6, help, cosine)
        data.flag(parser, "--include-rejected", False, "score rejected responses too, against Y_x")
    add_model_flags(parser)
    args = parser.parse_args(sys.argv[1 + judge :])
    join_processes()
    judge_command(args) if judge else score_command(args)


if __name__ == "__main__":
    data.run(main)
