"""scores.py: a frozen model turns text into numbers.

    python scores.py --data pref.jsonl --out scored.jsonl --signals diversity novelty surprise \\
        --embedder sentence-transformers/all-MiniLM-L6-v2 --surprise-model gpt2
    python scores.py judge --data rated.jsonl --embedder E --out judge   # a --reward-model
    torchrun --nproc-per-node 8 -- scores.py --data pref.jsonl ...       # the same file, sooner

For a prompt x with preferred responses Y_x, a response y is measured by

    diversity    mean over y_i in Y_x, y_i != y, of semdis(y, y_i)     semdis = 1 - cosine
    novelty      2 | DSI(y) - DSI(Y_x) |     DSI(T) = mean semdis over pairs of distinct words of T
    surprise     P_S(y | x) ^ (-1 / |y|), the perplexity of y given x under a language model S
    quality      R(x, y), the scalar of a reward model R (or the human score)
    infrequency  -log((1 + |{y_i in Y_x, y_i != y: cosine(y, y_i) >= 0.6}|) / |Y_x + y|)

and each is brought to [0, 1] by min-max over the responses to x. The last is not the paper's: how
few others had the same idea, as psychologists score it (by machine in MuseScorer, 2505.16232).

Deliberate departures from the authors' code:
 1. surprise is of the response given the prompt, without the token that ends the turn;
    --perplexity conversation gives theirs, of the whole templated conversation behind one more BOS;
 2. words are Unicode and lower case, with apostrophes and hyphens inside; CJK is cut by character;
 3. a text of under two words has DSI 0, one alone in Y_x diversity 0; identical ones count once;
 4. min-max takes the logarithm of surprise; by --surprise-scale raw, the paper's letter, the rarest
    answer gets 1 and all others next to 0 (effective share of the pairs: 4 % instead of 72 %).
"""

import data

import hashlib
import json
import math
import os
import re
import sqlite3
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import cached_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# cuDNN's attention plans for half a second per shape; its gradient can be NaN (pytorch 196678).
torch.backends.cuda.enable_cudnn_sdp(False)
# Passes differ in size: without this, memory that is free in pieces is taken a second time.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

HERE = Path(__file__).parent
# The tokens of one scoring pass without gradients. A CPU is no faster with more, and pads them.
TOKENS = 8192 if torch.cuda.is_available() else 2048
EMBEDDER = "jinaai/jina-embeddings-v3-hf"  # the paper's
THREADS = torch.get_num_threads()
PENALTY = 30.0  # of a judge: what cross-validation chose for 26,692 responses, no worse for 300
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
    auto = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, auto if name == "auto" else name)


def add_model_flags(parser) -> None:
    help = "of the frozen weights; auto: bfloat16 on a GPU, float32 elsewhere"
    data.flag(parser, "--dtype", "auto", help, ["auto", "float32", "bfloat16"])
    help = """for chat templates, in JSON, such as '{"enable_thinking": false}'"""
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
    for name in ("*.json", "*.jinja", "*.model", "*.safetensors", "[0-9]_*/*", "text_matching/*"):
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
    """Read PEFT's format (`task`: in that subfolder). UserError if it does more than add B A."""
    where, pairs = f"{name}/{task}" if task else name, {}
    files = ["adapter_config.json", "adapter_model.safetensors"]
    expected = f"{' and '.join(files)} of a plain LoRA; merge any other adapter with PEFT first"
    with user_error(f"adapter {where}: cannot be read", expected):
        files = [cached_file(name, str(Path(task, file))) for file in files]
        config, tensors = json.loads(Path(files[0]).read_text()), load_file(files[1])
        for key, value in config.items():
            start = key != "init_lora_weights" or value in STARTS
            if not start or (value and not PEFT_KEYS.fullmatch(key)):
                raise ValueError(f"{key:.60} = {value!r:.60} is not supported")
        for key, A in tensors.items():
            module, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
            head = module.endswith(("lm_head", "embed_out"))  # which stays frozen here
            if not head and (kind == "A.weight" or (task and kind == "embedding_A")):
                pairs[module] = A, tensors[key[: -len(kind)] + kind.replace("A", "B")]
        r, alpha = config["r"], config["lora_alpha"]
        shapes = all(len(A) == B.shape[1] == r for A, B in pairs.values())
        scale = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
        finite = all(tensor.mul(scale).isfinite().all() for tensor in tensors.values())
        if not pairs or len(tensors) != 2 * len(pairs) or not shapes or not finite:
            raise ValueError(f"it is not finite lora_A and lora_B of rank {r} on linear layers")
        return {module: (A.float(), B.float() * scale) for module, (A, B) in pairs.items()}


@torch.no_grad()
def merge_adapter(model: torch.nn.Module, adapter: Adapter, where: str) -> None:
    """Add B A to each weight in fp32, cast once. UserError if it was trained on another model."""
    modules, merged = dict(model.named_modules()), set()
    for name, (A, B) in adapter.items():
        layer, delta = modules.get(name), B @ A  # [out, in]
        if isinstance(layer, transformers.Conv1D | torch.nn.Embedding):  # these are [in, out]
            delta = delta.T
        weight = getattr(layer, "weight", None)
        if weight is None or weight.shape != delta.shape or id(weight) in merged:
            lacking = f"{name} of shape {tuple(delta.shape)}, which this model lacks or has tied"
            raise data.UserError(f"adapter {where}: it changes {lacking}; give its own model")
        weight.copy_(weight.float() + delta.to(weight.device))
        merged.add(id(weight))


class Checkpoint:
    """A frozen model from a folder, the hub or "tiny"; its weights are read when first needed."""

    FILES = "a folder with config.json, *.safetensors and a tokenizer, or such a name on the hub"

    def __init__(self, name: str, auto: type, dtype: torch.dtype):
        self.name, self.auto, self.dtype, self.device = name, auto, dtype, DEVICE
        self.sharded, self.threads = False, THREADS  # see sft.shard, and `model`
        self.source = source = str(HERE / "tiny") if name == "tiny" else name
        with user_error(f"model {name}: cannot be loaded", self.FILES):
            code = {"trust_remote_code": False}
            self.config = transformers.AutoConfig.from_pretrained(source, **code)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **code)
            self.text = self.config.get_text_config()  # of what reads text in a multimodal model
        rope = getattr(self.text, "rope_parameters", None) or {}
        kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # of layers
        start = "original_max_position_embeddings"
        scaled = {kind.get("rope_type"): kind.get(start) or 10**9 for kind in kinds}
        # the tokens that it takes: with more, dynamic NTK would change later passes
        self.context = min([scaled.get("dynamic", 10**9), *self.facts("max_position_embeddings")])
        # a longer row changes the others of its pass: sparse attention selects among padding too
        selected = self.facts("index_topk", "keep_window_size")
        self.alone_above = min([scaled.get("longrope", 10**9), *selected])

    def facts(self, *names: str) -> list[float]:
        """The numbers above 0 that the configuration has under some of these names."""
        values = [getattr(self.text, name, None) for name in names]
        return [value for value in values if isinstance(value, int | float) and value > 0]

    @cached_property
    def model(self) -> transformers.PreTrainedModel:
        """The model with its weights, frozen and in eval mode. UserError if some are missing."""
        options = {"dtype": self.dtype, "use_safetensors": True, "output_loading_info": True}
        if self.facts("attn_logit_softcapping"):
            options["attn_implementation"] = "eager"  # fused kernels do not know this soft cap
        with user_error(f"model {self.name}: cannot be loaded", self.FILES):
            model, info = self.auto.from_pretrained(self.source, trust_remote_code=False, **options)
            # an encoder's pooler is not used here, and masked-LM checkpoints have none
            if missing := [k for k in info["missing_keys"] if not k.startswith("pooler.")]:
                raise ValueError(f"it has no {min(missing)} for a {type(model).__name__}")
        if self.config.model_type == "jina_embeddings_v3":
            adapter = read_adapter(self.source, "text_matching")
            adapter = {name.removeprefix("roberta."): pair for name, pair in adapter.items()}
            merge_adapter(model, adapter, f"{self.name}/text_matching")
        if self.device.type == "cpu" and not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & {*os.environ}:
            # a second thread saves a small model little, and on a busy machine costs minutes
            self.threads = THREADS if model.num_parameters() >= 10**7 else 1
            if self.threads != torch.get_num_threads():
                torch.set_num_threads(self.threads)
        return model.eval().requires_grad_(False).to(self.device)

    @cached_property
    def key(self) -> str:
        """What the cache knows this model by: its commit on the hub, or a hash of its files."""
        if not (version := content_hash(self.source)):
            version = f"{self.name} {Path(cached_file(self.source, 'config.json')).parent.name}"
        return hashlib.sha256(f"{self.dtype}{version}".encode()).hexdigest()


class LanguageModel(Checkpoint):
    """A causal LM, and what has to be known to run it on packed rows."""

    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__(name, transformers.AutoModelForCausalLM, dtype)
        caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        self.softcap = next(iter(self.facts(*caps)), None)
        self.logit_scale = math.prod(self.facts("logit_scale", "lm_head_multiplier"))
        self.logit_scale /= math.prod(self.facts("logits_scaling"))
        # the tokens that its attention spans; longer rows may not share prompts
        self.window = min([self.alone_above, *self.facts("sliding_window", "window_size")])
        layers = " ".join(getattr(self.text, "layer_types", None) or ())
        if re.search("conv|linear|hybrid|compressed|minimax", layers):
            self.window = 0  # these run over the whole row
        self.encoder, self.share, self.probed = data.Encoder(self.tokenizer), None, 0

    @property
    def head(self) -> torch.Tensor:
        """The output embedding [V, H]."""
        return self.model.get_output_embeddings().weight


def sequence_logps_plain(lm: LanguageModel, table: data.Table) -> torch.Tensor:
    """log P(response | prompt) [S] in fp32 from the model's own logits, each run by itself."""
    logps = []
    for p, answer in zip(table.prompt_of, table.responses, strict=True):
        text = torch.tensor([table.prompts[p] + answer], device=lm.model.device)
        logits = lm.model(input_ids=text, use_cache=False).logits[0]  # [T, V]
        of_answer = logits[-len(answer) - 1 : -1].float().log_softmax(-1)  # [n, V]
        logps.append(of_answer.gather(1, text[0, -len(answer) :, None]).sum())
    return torch.stack(logps)


@torch.no_grad()
def probe(lm: LanguageModel, longest: int) -> bool:
    """Try whether rows of up to so many tokens may share prompts; recurrent models, say, may not.

    UserError if short rows and a long one, in one pass, are off without that too.
    """
    rng, half = np.random.default_rng(0), longest // 2 + 1
    # behind a long response, short ones are far from their prompt but for their positions
    sizes = half, 5, max(1, longest - half), 3, 4, 2
    ids = [rng.integers(0, len(lm.head), n).tolist() for n in sizes]
    table = data.Table(ids[:2], ids[2:], [0, 0, 0, 1])

    def error(share):  # relative to the log-probs
        ours = sequence_logps(lm, data.make_batch(table, range(4), share, lm.window))
        return ((ours - expected).abs() / (1 + expected.abs())).max().item()

    exact = lm.model.dtype == torch.float32
    with user_error(f"model {lm.name}: {type(lm.model).__name__} is not supported", "a causal LM"):
        expected = sequence_logps_plain(lm, table)
        if not expected.isfinite().all():
            raise ValueError("its logits are not finite")
        noise = error(share=False)
        if not noise <= (1e-4 if exact else 2e-2):  # nor may it be nan
            raise ValueError("its logits are not its output embedding times its hidden states")
    try:
        return longest <= lm.window and error(share=True) <= max(4 * noise, 2e-6 if exact else 3e-3)
    except Exception:  # the architecture does not take such a mask at all
        return False


# ---- Log-probs of tokens: the plain version, and the fused one -----------------------------------


def token_logps_plain(hidden, head, targets, softcap=None):
    """Definition: log softmax(softcap(hidden [N, H] @ head [V, H].T)) at targets [N]: fp32 [N]."""
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
    inputs = {"input_ids": batch.ids, "attention_mask": mask, "position_ids": batch.positions}
    runs = [inputs]
    if batch.ids.shape[1] > lm.alone_above:  # each row by itself, without its padding
        runs = [{k: x[r : r + 1, :n] for k, x in inputs.items()} for r, n in enumerate(mask.sum(1))]
    states = [lm.model.base_model(**run, use_cache=False).last_hidden_state for run in runs]
    out = states[0] if len(states) == 1 else pad_sequence([h[0] for h in states], batch_first=True)
    # embedding() adds its gradient up in a fixed order; indexing does not
    return F.embedding(batch.predict, out.flatten(0, 1)) * lm.logit_scale


def sequence_logps(lm: LanguageModel, batch: data.Batch) -> torch.Tensor:
    """log P(response | prompt) of each of the batch's S sequences: [S] in fp32, differentiable."""
    batch = batch.to(lm.model.device)
    logps = token_logps(response_hidden(lm, batch), lm.head, batch.targets, lm.softcap)  # [N]
    # not with index_add: on a GPU the order of its additions varies, and two equal passes differ
    return torch.segment_reduce(logps, "sum", lengths=batch.lengths, unsafe=True)


def layout(lm: LanguageModel, table: data.Table) -> tuple[bool, int]:
    """Whether prompts are shared, and the tokens of a shared row; tried anew if rows are longer."""
    if (longest := max(table.lengths, default=0)) > lm.probed:
        share, lm.probed = probe(lm, longest), longest
        if not share and lm.share is not False:
            print(f"layout      plain rows, as {type(lm.model).__name__} cannot share prompts here")
        lm.share = share or bool(lm.share and longest > lm.window)  # shorter rows still may
    return lm.share and longest <= lm.window, lm.window


@torch.no_grad()
def score_sequences(lm: LanguageModel, table: data.Table) -> np.ndarray:
    """log P(response | prompt) of every response of the table: [S] fp32, each computed once."""
    if max(table.lengths) > lm.context:
        text = lm.tokenizer.decode(table.responses[table.lengths.index(max(table.lengths))])
        few = f"{lm.context} tokens, too few for its prompt and {text!r:.60}; choose another"
        raise data.UserError(f"model {lm.name}: it takes {few}")

    def compute(batch):
        logps = sequence_logps(lm, data.make_batch(table, batch, *layout(lm, table)))
        return logps.cpu().numpy()[:, None]

    def plan(missing):
        units = [[s] for s in missing]
        (order,) = data.divide(table, units, 1)
        passes = data.micro_batches(table, units, order, TOKENS, *layout(lm, table))
        return [sequences for _, sequences in passes]

    answers = zip(table.prompt_of, table.responses, strict=True)
    keys = [content_key(table.prompts[p], answer) for p, answer in answers]
    return compute_once("logps", lm, keys, plan, compute)[:, 0]


# ---- Embeddings and rewards, each computed once --------------------------------------------------


def content_key(*parts) -> bytes:
    """16 bytes that stand for the given texts, numbers or lists of ids."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


@contextmanager
def open_cache(path: Path) -> Iterator[sqlite3.Connection]:
    """An SQLite file of numbers by their keys, for one transaction, or UserError."""
    with user_error(f"cache {path}: cannot be used", "room and locks; if it is damaged, remove it"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=600)) as table, table:
            table.execute("CREATE TABLE IF NOT EXISTS numbers (key PRIMARY KEY, value, crc)")
            yield table


def read_cache(path: Path) -> dict[bytes, bytes]:
    with open_cache(path) as table:
        table.create_function("crc32", 1, zlib.crc32)
        table.execute("DELETE FROM numbers WHERE crc != crc32(value)")  # to be computed again
        return dict(table.execute("SELECT key, value FROM numbers"))


def compute_once(kind: str, checkpoint: Checkpoint, keys: list[bytes], plan, compute) -> np.ndarray:
    """Numbers [n, width] of n keys, computed if no cache has them. UserError if not finite.

    plan(missing indices) lists batches of indices, compute(batch) gives the numbers of one.
    """
    (rank, world), name = processes(), f"{kind}-{checkpoint.key[:32]}.sqlite"
    known = read_cache(path := data.cache_folder() / name)
    missing = [list({key: k for k, key in enumerate(keys) if key not in known}.values())]
    if world > 1:  # what another command writes meanwhile must not make the processes differ
        dist.broadcast_object_list(missing, 0)
    if checkpoint.threads != torch.get_num_threads():  # another model has changed it
        torch.set_num_threads(checkpoint.threads)
    batches = plan(missing[0]) if missing[0] else []
    if checkpoint.sharded:  # then all processes run equally many
        batches += batches[-1:] * (-len(batches) % world)
    options = {"desc": kind, "disable": rank > 0 or not batches, "leave": False}
    for batch in data.progress(batches[rank::world], **options):
        values = compute(batch).astype("<f4")
        if not np.isfinite(values).all():
            raise data.UserError(f"{kind}: {checkpoint.name} gives a number that is not finite")
        values = [row.tobytes() for row in values]
        rows = zip([keys[k] for k in batch], values, map(zlib.crc32, values), strict=True)
        with open_cache(path) as table:  # of two commands the first counts, for both
            table.executemany("INSERT OR IGNORE INTO numbers VALUES (?, ?, ?)", rows)
    if world > 1:
        dist.barrier()  # all have written
    if not (known := read_cache(path)).keys() >= set(keys):
        raise data.UserError(f"cache {path}: expected one that all processes share")
    return np.array([np.frombuffer(known[key], "<f4") for key in keys])


def by_length(lengths: Sequence[int], tokens: int, among=None) -> list[list[int]]:
    """Batches of indices (all, or `among`) of like lengths, of at most `tokens` with padding."""
    batches: list[list[int]] = []
    for k in sorted(range(len(lengths)) if among is None else among, key=lambda k: -lengths[k]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(k)
        else:
            batches.append([k])
    return batches


def fill_rows(kind: str, checkpoint: Checkpoint, columns: dict, forward) -> np.ndarray:
    """[n, width] fp32 of n rows of ids, each distinct row computed once ever.

    columns: lists of n rows, `input_ids` and whatever else the model takes. forward(tensors [b, T]
    of rows of like lengths, padded on the right, and their attention_mask) -> [b, width].
    """
    rows = columns["input_ids"]
    columns = columns | {"attention_mask": [[1] * len(row) for row in rows]}

    @torch.no_grad()
    def compute(batch):
        inputs = {}
        for name, column in columns.items():
            padded = pad_sequence([torch.tensor(column[k]) for k in batch], batch_first=True)
            inputs[name] = padded.to(checkpoint.model.device)
        return forward(inputs).float().cpu().numpy()

    most = min(checkpoint.context, checkpoint.alone_above)
    if len(longest := max(rows, key=len, default=[])) > most:
        end = f"a text that ends in {checkpoint.tokenizer.decode(longest[-15:])!r}"
        raise data.UserError(f"model {checkpoint.name}: it takes {most} tokens, too few for {end}")
    plan = partial(by_length, [len(row) for row in rows], TOKENS)
    keys = [content_key(row) for row in rows]
    return compute_once(kind, checkpoint, keys, plan, compute)


def at_last_token(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The states [b, H], of [b, T, H], at the last token of each row in the mask [b, T]."""
    rows, columns = (torch.arange(n, device=mask.device) for n in mask.shape)
    return hidden[rows, (mask * columns).argmax(1)]


class Embedder:
    """Texts to unit vectors: last hidden states, pooled as modules.json says or by their mean."""

    def __init__(self, model: str | Checkpoint, dtype: torch.dtype = torch.float32):
        def read(name):
            file = cached_file(model.source, name, _raise_exceptions_for_missing_entries=False)
            return json.loads(Path(file).read_text()) if file else {}

        if isinstance(model, str):
            model = Checkpoint(model, transformers.AutoModel, dtype)
        self.checkpoint, self.dense = model, torch.nn.Sequential()
        failure = f"embedder {model.name}: modules.json is not supported"
        with user_error(failure, "pooling, then perhaps dense layers and the norm"):
            config, modules = read("sentence_bert_config.json"), read("modules.json")
            kinds = [module["type"].rpartition(".")[2] for module in modules]
            if kinds != sorted(kinds, key=["Transformer", "Pooling", "Dense", "Normalize"].index):
                raise ValueError(" ".join(kinds))
            for kind, path in zip(kinds, (module["path"] for module in modules), strict=True):
                if kind == "Pooling":
                    config |= read(f"{path}/config.json")
                elif kind == "Dense":
                    state = load_file(cached_file(model.source, f"{path}/model.safetensors"))
                    layer = torch.nn.Linear(*state["linear.weight"].T.shape, "linear.bias" in state)
                    layer.load_state_dict({key[7:]: tensor for key, tensor in state.items()})
                    name = read(f"{path}/config.json")["activation_function"].rpartition(".")[2]
                    self.dense.extend([layer, getattr(torch.nn, name)()])
            about = read("config_sentence_transformers.json")
            self.prefix = about.get("prompts", {}).get(about.get("default_prompt_name"), "")
            modes = [key for key, on in config.items() if on and "pooling_mode_" in key]
            names = [re.sub("pooling_mode_|_tokens?", "", key) for key in modes]
            self.pooling = config.get("pooling_mode") or "+".join(names) or "mean"
            if self.pooling not in ("mean", "cls", "lasttoken"):
                raise ValueError(f"pooling {self.pooling}")
            if self.prefix and config.get("include_prompt") is False:
                raise ValueError("pooling without the prompt")
            self.lower = config.get("do_lower_case")
        limits = model.context, model.alone_above, model.tokenizer.model_max_length
        self.limit = min(*limits, config.get("max_seq_length") or 8192, 8192)

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """{text: [H] float32 unit vector}."""
        checkpoint, texts = self.checkpoint, list(dict.fromkeys(texts))
        if not texts:
            return {}
        prefixed = [self.prefix + (text.lower() if self.lower else text) for text in texts]
        rows = checkpoint.tokenizer(prefixed, truncation=True, max_length=self.limit)["input_ids"]
        if long := sum(len(row) == self.limit for row in rows):
            print(f"embedding   {long:,} texts reach the {self.limit} tokens of {checkpoint.name}")

        def forward(inputs):
            with user_error(f"{checkpoint.name} cannot embed a text", "an encoder or a causal LM"):
                hidden = checkpoint.model.base_model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"]
            if self.pooling == "mean":
                pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            else:
                pooled = hidden[:, 0] if self.pooling == "cls" else at_last_token(hidden, mask)
            return F.normalize(self.dense.to(pooled.device)(pooled), dim=-1)

        vectors = fill_rows(f"embeddings-{self.pooling}", checkpoint, {"input_ids": rows}, forward)
        return dict(zip(texts, vectors, strict=True))


class Classifier(Checkpoint):
    def __init__(self, name: str, dtype: torch.dtype, outputs: int = 1):
        super().__init__(name, transformers.AutoModelForSequenceClassification, dtype)
        if (labels := self.config.num_labels) != outputs:
            raise data.UserError(f"model {name}: it has {labels} outputs; expected {outputs}")

    def logits(self, inputs: dict) -> torch.Tensor:  # [b, outputs]
        if not hasattr(self.model, "score"):
            return self.model(**inputs).logits
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        blocks, pad = self.model.base_model, self.text.pad_token_id
        out = blocks(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        # as transformers reads it: at the last token that is not PAD, even where EOS is
        return self.model.score(at_last_token(out, mask if pad is None else mask * (ids != pad)))


class RewardModel(Classifier):
    def __call__(self, items: Sequence[data.Item]) -> np.ndarray:
        """Rewards [n] fp32 of (prompt, response) items."""
        if self.tokenizer.chat_template:
            encoder = data.Encoder(self.tokenizer)
            texts = [encoder.render((*p, ("assistant", y))) for p, y in items]
            columns = {"input_ids": encoder.ids(texts)}
        else:
            prompts = ["\n\n".join(content for _, content in p) for p, _ in items]
            columns = dict(self.tokenizer(prompts, [response for _, response in items]))
        return fill_rows("rewards", self, columns, self.logits)[:, 0]


class Judge:
    """(prompt, response) to the score a human would give, as `scores.py judge` has fitted it."""

    def __init__(self, folder: str):
        with user_error(f"judge {folder}: cannot be read", "what scores.py judge makes"):
            with safetensors.safe_open(Path(folder) / "judge.safetensors", "np") as file:
                self.weight, self.bias = file.get_tensor("weight"), file.get_tensor("bias")
                about = json.loads(file.metadata()["judge"])
            if zlib.crc32(self.weight.tobytes() + self.bias.tobytes()) != about["crc"]:
                raise ValueError("it is damaged")
            self.embedder = Embedder(about["embedder"], pick_dtype(about["dtype"]))
            if self.embedder.checkpoint.key != about["key"]:
                raise ValueError(f"{about['embedder']} is no longer what it was fitted with")

    def __call__(self, items: Sequence[data.Item]) -> np.ndarray:
        """Scores [n] float64 of (prompt, response) items."""
        return judge_features(self.embedder, items) @ self.weight + self.bias


def load_reward_model(name: str, dtype: torch.dtype) -> RewardModel | Judge:
    judge = (Path(name) / "judge.safetensors").exists()
    return Judge(name) if judge else RewardModel(name, dtype)


# ---- The signals ---------------------------------------------------------------------------------


@dataclass
class Pool:
    """The n distinct responses to one prompt that are scored together."""

    prompt: data.Messages
    texts: list[str]
    preferred: np.ndarray  # [n] bool: which of them make up Y_x
    human: np.ndarray  # [n]: their human scores, nan where absent
    raw: dict[str, np.ndarray] = field(default_factory=dict)  # {signal: [n]}, as measured


@dataclass
class Scorers:
    """The models behind the signals, loaded or by name; of those by name, one exists at a time."""

    embedder: str | Embedder | None = None
    surprise_model: str | LanguageModel | None = None
    reward_model: str | RewardModel | Judge | None = None
    dtype: torch.dtype = torch.float32
    perplexity: str = "response"  # given the prompt, or that of the whole "conversation"
    surprise_scale: str = "log"  # or "raw", before min-max
    same_above: float = 0.6  # from this cosine on, `infrequency` takes two responses for one idea
    opened: tuple[str, object] = ("", None)  # the last kind that was given by name, and its scorer

    def get(self, kind: str):
        """The scorer of this kind; one that is given by name replaces the last such one."""
        if not isinstance(scorer := getattr(self, kind), str):
            return scorer
        if kind != self.opened[0]:
            load = {"embedder": Embedder, "surprise_model": LanguageModel}
            self.opened = kind, load.get(kind, load_reward_model)(scorer, self.dtype)
        return self.opened[1]


JOINERS = "'’-"
CJK = re.compile("[\u2e80-\u2fdf\u3005-\u3007\u3040-\u31ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def running_words(text: str) -> list[str]:
    """The words of a text in order, lower case; see departure 2 above."""

    def mark(c):
        if c not in JOINERS and unicodedata.category(c)[0] not in "LNM":
            return " "
        return f" {c} " if CJK.match(c) or 0x20000 <= ord(c) < 0x40000 else c

    spaced = "".join(mark(c) for c in unicodedata.normalize("NFKC", text).lower())
    return [w.strip(JOINERS) for w in spaced.split() if any(c.isalnum() for c in w)]


def words(text: str) -> list[str]:
    """The distinct words of a text, in order."""
    return list(dict.fromkeys(running_words(text)))


def distance_to_set(vectors: Sequence[np.ndarray], member: np.ndarray) -> np.ndarray:
    """Means [n] of 1 - cosine of unit vectors [n, H] to the others in `member` [n]; 0 if none."""
    vectors = np.array(vectors, np.float64)
    squares = (vectors * vectors).sum(1)  # 1, but for rounding
    dots = vectors @ (member @ vectors) - member * squares  # [n], with the sum of the others
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
    """For each pool, -log of the share of Y_x and a response itself that is like it: [n]."""
    vector, measured = scorers.get("embedder")([t for pool in pools for t in pool.texts]), []
    for pool in pools:
        vectors = np.array([vector[text] for text in pool.texts])
        others = vectors[pool.preferred].T
        tiles = (vectors[at : at + TILE] @ others for at in range(0, len(vectors), TILE))
        # 1e-6: a text and itself, at a threshold of 1
        like = np.concatenate([(tile >= scorers.same_above - 1e-6).sum(1) for tile in tiles])
        size = pool.preferred.sum() + 1 - pool.preferred  # [n]: of Y_x with the response
        measured.append(-np.log((1 + like - pool.preferred) / size))
    return measured


def split_by_pool(values: np.ndarray, pools: Sequence[Pool]) -> list[np.ndarray]:
    return np.split(values, np.cumsum([len(pool.texts) for pool in pools])[:-1])


def surprise(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, the perplexity of each response given the prompt: [n]."""
    lm = scorers.get("surprise_model")
    items = [(pool.prompt, text) for pool in pools for text in pool.texts]
    if scorers.perplexity == "response":
        table, index = data.build_table(lm.encoder, items, max_length=10**9)
        table = replace(table, responses=[ids[:-1] for ids in table.responses])  # no end of turn
    elif (bos := lm.tokenizer.bos_token_id) is None:
        raise data.UserError(f"model {lm.name}: --perplexity conversation needs a BOS token")
    else:
        rows = lm.encoder.ids([lm.encoder.render((*p, ("assistant", y))) for p, y in items])
        table, index = data.Table([[bos]], rows, [0] * len(rows)), range(len(rows))
    logps = score_sequences(lm, table).astype(np.float64)
    lengths = np.array([max(len(ids), 1) for ids in table.responses])
    return split_by_pool(np.exp(-logps / lengths)[index], pools)


def quality(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, the reward of each response: [n]; without a reward model, the human score."""
    items = [(pool.prompt, text) for pool in pools for text in pool.texts]
    if scorers.reward_model is not None:
        return split_by_pool(scorers.get("reward_model")(items).astype(np.float64), pools)
    unknown = np.isnan(np.concatenate([pool.human for pool in pools]))
    if unknown.any():
        needs = "quality needs --reward-model, or score_chosen and score_rejected in the data"
        raise data.UserError(f"{needs}; there is none for {items[unknown.argmax()][1][:60]!r}")
    return [pool.human for pool in pools]


class Signal(NamedTuple):
    function: Callable[[Sequence[Pool], Scorers], list[np.ndarray]]
    scorer: str | None = None  # the field of `Scorers` that it needs


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
    preferred, human = defaultdict(dict), {}
    for pair in pairs:
        preferred[pair.prompt][pair.chosen] = True
        for side in ("chosen", "rejected"):
            if (score := pair.row.get(f"score_{side}")) is not None:
                human[pair.prompt, getattr(pair, side)] = float(score)
    for pair in pairs if include_rejected else ():
        preferred[pair.prompt].setdefault(pair.rejected, False)
    pools = []
    for prompt, texts in preferred.items():
        scores = np.array([human.get((prompt, text), math.nan) for text in texts])
        pools.append(Pool(prompt, list(texts), np.array([*texts.values()]), scores))
    return pools


def add_signals(
    pairs: Sequence[data.Pair], signals, scorers: Scorers, include_rejected: bool = False
) -> list[Pool]:
    """Write `<signal>_chosen` (and `_rejected`), in [0, 1], into the rows; return the pools."""
    pools = make_pools(pairs, include_rejected)
    for kind in dict.fromkeys(filter(None, (SIGNALS[signal].scorer for signal in signals))):
        scorers.get(kind)  # a wrong name is reported before another scorer has run for hours
    for signal in signals:
        column: dict[data.Item, float] = {}
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


# ---- Agreement with people, a judge, and the command ---------------------------------------------


def within_prompts(*columns: Sequence[np.ndarray]) -> np.ndarray:
    """Spearman's correlation of two columns inside each prompt, and its n: [P, 2].

    A column is an array [n] for each prompt, nan where unknown. Of a third one, both are made
    independent first (partial correlation). Prompts with nothing to compare are left out.
    """

    def ranks(values):  # around 0, with ties at their mean
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts + len(values)) / 2)[place]

    rows = []
    for some in zip(*columns, strict=True):
        known = ~np.isnan(sum(some))
        x, y, *removed = (ranks(column[known]) for column in some)
        for z in removed:
            x, y = (v - z * (v @ z) / max(z @ z, 1e-9) for v in (x, y))
        if min(x @ x, y @ y) > 1e-12:  # neither is all equal
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


def judge_features(embedder: Embedder, items: Sequence[data.Item]) -> np.ndarray:
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


def fit_judge(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Weights [d] of ridge regression of the scores on the features; see `group_by_prompt`."""
    # raters are more lenient on some prompts, which does not make those responses better
    X = np.concatenate([X - X.mean(0) for X, _ in groups])
    y = np.concatenate([y - y.mean() for _, y in groups])
    return np.linalg.solve(X.T @ X + PENALTY * np.eye(X.shape[1]), X.T @ y)


def cross_validate(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """For each prompt, predictions [n] of a judge that never saw it, in ten folds of prompts."""
    fold = np.random.default_rng(0).permutation(len(groups)) % 10
    W = [fit_judge([groups[i] for i in np.flatnonzero(fold != k)]) for k in range(fold.max() + 1)]
    return [X @ W[k] for k, (X, _) in zip(fold, groups, strict=True)]


def judge_command(args) -> None:
    """Fit a judge on the responses of a split, or all, try it by cross-validation, and save it."""
    samples = data.read_samples(args.data, rated=True)
    training = [s for s in samples if args.split in (None, str(s.row.get("split")))]
    if sum(count > 1 for count in Counter(s.prompt for s in training).values()) < 2:
        rated = f"{data.plural(len(training), 'rated response')} in this split"
        raise data.UserError(f"{args.data}: {rated}, and fewer than two prompts with several")
    embedder = Embedder(args.embedder, pick_dtype(args.dtype))
    groups = group_by_prompt(embedder, training)
    weight = fit_judge(groups)
    bias = np.concatenate([y - X @ weight for X, y in groups]).mean(keepdims=True)
    print(f"fitted      ridge regression on {args.split or 'all'}, {len(training):,} responses")
    r = agreement(cross_validate(groups), [y for _, y in groups])
    print(f"held out    {r}, rank correlation within prompts with human scores, cross-validated")
    if processes()[0] == 0:
        key, dtype = embedder.checkpoint.key, f"{embedder.checkpoint.dtype}".removeprefix("torch.")
        about = {"embedder": args.embedder, "key": key, "dtype": dtype}
        about = json.dumps(about | {"crc": zlib.crc32(weight.tobytes() + bias.tobytes())})
        content = safetensors.numpy.save({"weight": weight, "bias": bias}, {"judge": about})
        data.write_file(Path(args.out) / "judge.safetensors", content)
    print(f"saved       {args.out}/, for --reward-model")


def print_signals(pools: Sequence[Pool], signals: Sequence[str]) -> None:
    """Print each signal as measured, and its rank correlation with human scores within prompts."""
    columns = {signal: [pool.raw[signal] for pool in pools] for signal in signals}
    columns["words"] = [np.array([len(running_words(t)) for t in p.texts], float) for p in pools]
    human = [pool.human for pool in pools]
    heads = ("with human score (95 %)", "length removed")
    print(f"\n{'':12}{'mean':>10}{'least':>10}{'most':>10}{heads[0]:>26}{heads[1]:>26}")
    for signal, column in columns.items():
        raw = np.concatenate(column)
        print(f"{signal:12}{raw.mean():10.3g}{raw.min():10.3g}{raw.max():10.3g}", end="")
        whole, part = agreement(column, human), agreement(column, human, columns["words"])
        print(f"{whole:>26}{part:>26}")


def add_scorer_flags(parser, embedder, surprise_model, reward="the human scores of the data"):
    """Flags of `Scorers`; reward: what the help says of the default of --reward-model."""
    flag, start = partial(data.flag, parser), "" if embedder else " (default: the starting model)"
    flag("--embedder", embedder, "encoder or causal LM behind diversity and novelty" + start)
    flag("--surprise-model", surprise_model, "causal LM behind surprise" + start)
    help = f"behind quality: sequence classifier, or folder of scores.py judge (default: {reward})"
    flag("--reward-model", None, help)
    help = "of the response alone or, as the authors do, of the whole templated conversation"
    flag("--perplexity", "response", help, ["response", "conversation"])


def score_command(args) -> None:
    pairs = data.read_preferences(args.data)
    models = args.embedder, args.surprise_model, args.reward_model, pick_dtype(args.dtype)
    scorers = Scorers(*models, args.perplexity, args.surprise_scale, args.same_above)
    pools = add_signals(pairs, args.signals, scorers, args.include_rejected)
    if processes()[0] == 0:
        data.write_file(args.out, data.jsonl([pair.row for pair in pairs]))
    scored = data.plural(sum(len(pool.texts) for pool in pools), "distinct response")
    read = data.plural(len(pairs), "pair")
    print(f"{read}, {data.plural(len(pools), 'prompt')}, {scored} scored")
    print_signals(pools, args.signals)
    print(f"\nsaved {args.out}")


def main() -> None:
    parser = data.Parser(description=__doc__)
    flag = partial(data.flag, parser)
    judge = sys.argv[1:2] == ["judge"]
    if judge:
        parser.prog += " judge"
        flag("--data", ..., "JSONL of rated responses")
        flag("--out", ..., "folder to write")
        flag("--split", None, "rows to fit on, e.g. Training")
        flag("--embedder", EMBEDDER, "encoder or causal LM")
    else:
        flag("--data", ..., "preference JSONL to read")
        flag("--out", ..., "the same rows with the scores, to write")
        flag("--signals", ["diversity", "novelty", "surprise"], "which to compute", list(SIGNALS))
        add_scorer_flags(parser, EMBEDDER, "google/gemma-2-27b-it")
        flag("--surprise-scale", "log", "on which min-max takes it", ["log", "raw"])
        flag("--same-above", 0.6, "cosine from which texts are one idea", data.number(float, -1, 1))
        flag("--include-rejected", False, "score rejected responses too, against the preferred")
    add_model_flags(parser)
    args = parser.parse_args(sys.argv[1 + judge :])
    data.check_files(args.data, args.out)
    join_processes()
    judge_command(args) if judge else score_command(args)


if __name__ == "__main__":
    data.run(main)
