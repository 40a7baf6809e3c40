"""scores.py: a frozen model turns text into numbers.

    python scores.py --data pref.jsonl --out scored.jsonl
    python scores.py --data pref.jsonl --out scored.jsonl --signals diversity novelty surprise \\
        --embedder sentence-transformers/all-MiniLM-L6-v2 --surprise-model gpt2

For a prompt x with preferred responses Y_x, the paper scores a response y by

    diversity  mean over y_i in Y_x, y_i != y, of semdis(y, y_i)     semdis = 1 - cosine
    novelty    2 | DSI(y) - DSI(Y_x) |     DSI(T) = mean semdis over pairs of distinct words of T
    surprise   P_S(y | x) ^ (-1 / |y|), the perplexity of y given x under a language model S
    quality    R(x, y), the scalar of a reward model R (or the human score)

and brings each to [0, 1] by min-max over the responses to x. With unit vectors e_1..e_n and their
sum S, the means over pairs have closed forms, linear in n, and no pair is ever visited:

    mean pairwise distance            1 - (|S|^2 - n) / (n (n - 1))
    mean distance of e_i to the rest  1 - (e_i . S - 1) / (n - 1)

Log-probs never form [tokens x vocabulary]: see `token_logps`, with its plain version above it.

Deliberate departures from the authors' code:
 1. surprise is of the response given the prompt, not of the whole templated conversation; the
    token that ends the turn belongs to the template and is not counted;
 2. words: Unicode, lower case, apostrophes and hyphens inside a word stay, other punctuation
    separates; Chinese, Japanese and Korean by character. A text of fewer than two words has DSI 0;
 3. a number that cannot be computed is an error, never a silent zero.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from data import (
    ROW_TOKENS,
    Batch,
    Encoder,
    Messages,
    Pair,
    Table,
    UserError,
    build_table,
    check_number,
    make_batch,
    micro_batches,
    read_preferences,
    run,
    write_jsonl,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HERE = Path(__file__).parent
TOKENS = 8192  # of one scoring pass without gradients


# --------------------------------------------------------------------------------------------------
# Loading a Hugging Face checkpoint
# --------------------------------------------------------------------------------------------------


@dataclass
class LanguageModel:
    """A causal LM with its tokenizer, and what has to be known to run it on packed rows.

    share: may rows share prompts (found by trial, `probe`)? window: rows longer than its
    attention window may not, whatever the trial says.
    """

    model: transformers.PreTrainedModel
    encoder: Encoder
    name: str
    window: int
    share: bool = False

    @property
    def head(self) -> torch.Tensor:
        """The output embedding [V, H]."""
        return self.model.get_output_embeddings().weight

    @property
    def softcap(self) -> float | None:
        return getattr(self.model.config, "final_logit_softcapping", None)

    @property
    def context(self) -> int:
        """The longest sequence the model takes, in tokens."""
        return getattr(self.model.config, "max_position_embeddings", None) or 10**9


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def add_dtype_flag(parser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the frozen weights; float16 is not offered, its range is too small for training "
        "(default: auto, bfloat16 on a GPU and float32 elsewhere)",
    )


def load_checkpoint(name: str, auto_class, dtype: torch.dtype):
    """Load (model, tokenizer) from a hub name, a folder, or "tiny"; safetensors, no remote code.

    The model is frozen and in eval mode. UserError if it cannot be had or lacks weights.
    """
    source = str(HERE / "tiny") if name == "tiny" else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        # fused attention kernels do not know Gemma-2's soft-capped attention
        capped = getattr(config, "attn_logit_softcapping", None)
        model, info = auto_class.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({"attn_implementation": "eager"} if capped else {}),
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"model {name}: cannot be loaded ({reason}); expected a folder with config.json, "
            "*.safetensors and a tokenizer, or such a name on the Hugging Face hub"
        ) from None
    # an encoder's pooler is not used here, and masked-LM checkpoints have none
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"model {name}: the checkpoint has no {missing[0]}, which {type(model).__name__} "
            "needs; it was saved for another use"
        )
    return model.eval().requires_grad_(False).to(pick_device()), tokenizer


def load_lm(name: str, dtype: torch.dtype) -> LanguageModel:
    """Load a causal language model; see `load_checkpoint` and `probe`."""
    model, tokenizer = load_checkpoint(name, transformers.AutoModelForCausalLM, dtype)
    windows = [getattr(model.config, key, None) for key in ("sliding_window", "window_size")]
    lm = LanguageModel(model, Encoder(tokenizer), name, min([w for w in windows if w] or [10**9]))
    if model.get_output_embeddings().bias is not None:
        raise UserError(f"model {name}: its output layer has a bias, which is not supported")
    probe(lm)
    return lm


@torch.no_grad()
def probe(lm: LanguageModel) -> None:
    """Hold our log-probs of a few random tokens against the model's own logits; set `lm.share`.

    An architecture that ignores position ids or the mask (ALiBi, recurrent ones) cannot share
    prompts, and is run on plain rows. One whose logits are not head(hidden) is refused.
    """
    vocabulary = lm.head.shape[0]
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, vocabulary, n).tolist() for n in (5, 7, 3, 4, 2, 6)]
    table = Table(ids[:2], ids[2:], [0, 0, 1, 0], keys=[])
    everything = range(len(table.responses))
    own = []
    for p, answer in zip(table.prompt_of, table.responses, strict=True):
        text = torch.tensor([table.prompts[p] + answer], device=lm.model.device)
        logits = lm.model(input_ids=text, use_cache=False).logits[0].float()  # [T, V]
        picked = logits.log_softmax(-1)[:-1].gather(1, text[0, 1:, None])[:, 0]
        own.append(picked[-len(answer) :].sum())
    own = torch.stack(own).cpu()

    def error(share):  # relative to the log-probs
        batch = make_batch(table, everything, share, ROW_TOKENS)
        try:
            ours = sequence_logps(lm, batch).cpu()
        except Exception:  # the architecture does not take such a mask at all
            return math.inf
        return ((ours - own).abs() / (1 + own.abs())).max().item()

    exact = lm.model.dtype == torch.float32
    noise = error(share=False)
    if not noise <= (1e-4 if exact else 2e-2):
        raise UserError(
            f"model {lm.name}: architecture {type(lm.model).__name__} is not supported, its "
            "logits are not those of its output embedding on its last hidden state"
        )
    lm.share = error(share=True) <= max(4 * noise, 1e-5 if exact else 3e-3)


# --------------------------------------------------------------------------------------------------
# Log-probs of tokens: the plain version, and the fused one
# --------------------------------------------------------------------------------------------------


def token_logps_plain(hidden, head, targets, softcap=None):
    """log softmax(softcap(hidden @ head.T))[targets], in fp32.

    hidden [N, H], head [V, H], targets [N] -> [N]. The definition, and what `token_logps` is
    tested against: it forms [N, V].
    """
    logits = (hidden @ head.T).float()  # [N, V]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


TILE = 256  # rows of logits that exist at one time


class TokenLogps(torch.autograd.Function):
    """`token_logps_plain` over tiles of rows, [TILE, V] at a time.

    With a frozen head the gradient with respect to a hidden state is known in the forward pass,

        d logp / d h = head[y] - softmax(h @ head.T) @ head

    and the tile of logits it needs is at hand, so it is formed there: backward is one scaling, for
    whatever loss follows, and the head costs two matrix products in all. With a trained head the
    tiles are computed again in backward, where the upstream gradient is known.
    """

    @staticmethod
    def tile(hidden, head, targets, softcap, buffer):
        """One tile: logps [n], exp(logits - max) [n, V] with its row sums [n, 1], slope [n, V]."""
        logits = torch.mm(hidden, head.T, out=buffer[: len(hidden)]).float()
        slope = None
        if softcap:
            logits = logits.div_(softcap).tanh_()
            slope = 1 - logits.square()  # of the soft cap
            logits = logits.mul_(softcap)
        top = logits.amax(-1, keepdim=True)
        picked = logits.gather(1, targets[:, None]) - top
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        return (picked - total.log())[:, 0], weights, total, slope

    @staticmethod
    def descend(weights, total, slope, targets):
        """[n, V] in place: total * (softmax - onehot(y)), times the slope of the soft cap."""
        weights.scatter_add_(1, targets[:, None], -total)
        return weights if slope is None else weights.mul_(slope)

    @staticmethod
    def forward(ctx, hidden, head, targets, softcap):
        N = len(hidden)
        logps = torch.empty(N, dtype=torch.float32, device=hidden.device)
        ctx.frozen = not ctx.needs_input_grad[1]
        grads = torch.empty_like(hidden) if ctx.frozen and ctx.needs_input_grad[0] else None
        buffer = hidden.new_empty(min(TILE, N), len(head))
        for at in range(0, N, TILE):
            rows = slice(at, at + TILE)
            part = TokenLogps.tile(hidden[rows], head, targets[rows], softcap, buffer)
            logps[rows], weights, total, slope = part
            if grads is not None:
                down = TokenLogps.descend(weights, total, slope, targets[rows])
                grads[rows] = (down.to(head.dtype) @ head) / -total
        ctx.softcap = softcap
        ctx.save_for_backward(*((grads,) if ctx.frozen else (hidden, head, targets)))
        return logps

    @staticmethod
    def backward(ctx, upstream):  # [N]
        if ctx.frozen:
            (grads,) = ctx.saved_tensors
            return (grads * upstream[:, None]).to(grads.dtype), None, None, None
        hidden, head, targets = ctx.saved_tensors
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        buffer = hidden.new_empty(min(TILE, len(hidden)), len(head))
        for at in range(0, len(hidden), TILE):
            rows = slice(at, at + TILE)
            part = TokenLogps.tile(hidden[rows], head, targets[rows], ctx.softcap, buffer)
            _, weights, total, slope = part
            down = TokenLogps.descend(weights, total, slope, targets[rows])
            down = down.mul_(-upstream[rows, None] / total).to(head.dtype)
            grad_hidden[rows] = down @ head
            grad_head += down.T @ hidden[rows]
        return grad_hidden, grad_head, None, None


def token_logps(hidden, head, targets, softcap=None):
    """`token_logps_plain` in tiles: hidden [N, H], head [V, H], targets [N] -> [N] in fp32.

    Differentiable in hidden, and in head where it is trained; extra memory [TILE, V] + [N, H].
    """
    return TokenLogps.apply(hidden, head, targets, softcap)


def response_hidden(lm: LanguageModel, batch: Batch) -> torch.Tensor:
    """Run the blocks on a batch; return the hidden states [N, H] that predict response tokens."""
    mask = batch.mask
    if mask.dim() == 4:  # to what is added to attention scores: every implementation takes that
        lowest = torch.finfo(lm.model.dtype).min
        mask = torch.zeros_like(mask, dtype=lm.model.dtype).masked_fill_(~mask, lowest)
    out = lm.model.base_model(
        input_ids=batch.ids,
        attention_mask=mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state  # [R, T, H]
    return out.flatten(0, 1)[batch.predict]


def sequence_logps(lm: LanguageModel, batch: Batch) -> torch.Tensor:
    """log P(response | prompt) of each of the batch's S sequences: [S] in fp32, differentiable."""
    batch = batch.to(lm.model.device)
    logps = token_logps(response_hidden(lm, batch), lm.head, batch.targets, lm.softcap)  # [N]
    return sum_by_sequence(logps, batch)


def sum_by_sequence(logps: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum token log-probs [N] into their sequences [S], always in the same order.

    Not with index_add: on a GPU it adds as threads arrive, and two equal passes would differ.
    """
    order = batch.owner.argsort(stable=True)
    lengths = batch.owner.bincount(minlength=batch.size)
    return torch.segment_reduce(logps[order], "sum", lengths=lengths)


def layout(lm: LanguageModel, table: Table) -> tuple[bool, int]:
    """Whether this model may share prompts on this data, and how many tokens a row may hold.

    Inside one attention window a row of any layout looks the same to the model.
    """
    longest_prompt = max(map(len, table.prompts), default=0)
    capacity = min(longest_prompt + ROW_TOKENS, lm.window)
    return lm.share and table.longest() <= lm.window, capacity


def say_layout(lm: LanguageModel, table: Table) -> None:
    if not layout(lm, table)[0]:
        print(
            f"layout      plain rows, one response each: {type(lm.model).__name__} cannot share "
            "prompts at these lengths"
        )


@torch.no_grad()
def score_sequences(lm: LanguageModel, table: Table, what: str) -> np.ndarray:
    """log P(response | prompt) of every response of the table: [S] fp32, each computed once."""
    share, capacity = layout(lm, table)
    say_layout(lm, table)

    def plan(missing):
        each = [[s] for s in missing]
        return (batch for _, batch in micro_batches(table, each, TOKENS, share, capacity))

    def compute(sequences):
        logps = sequence_logps(lm, make_batch(table, sequences, share, capacity))
        return logps.cpu().numpy()[:, None]

    keys = [
        content_key(table.prompts[p], answer)
        for p, answer in zip(table.prompt_of, table.responses, strict=True)
    ]
    cache = Cache("logps", fingerprint(lm.model), width=1)
    return cache.fill(keys, plan, compute, what)[:, 0]


# --------------------------------------------------------------------------------------------------
# Never twice: a cache on disk
# --------------------------------------------------------------------------------------------------


def content_key(*parts) -> bytes:
    """16 bytes that stand for the given texts, numbers or lists of ids."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def fingerprint(model: torch.nn.Module) -> bytes:
    """A key of the weights as they are now (merged adapters included), dtype and configuration.

    Sums and strided samples of every tensor, not all its bytes: an 8B model takes a second.
    """
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.named_parameters():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 1024)].float().cpu().numpy()
        total = flat.sum(dtype=torch.float64).item()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total!r}".encode())
        digest.update(some.tobytes())
    return digest.digest()


class Cache:
    """Numbers of a model on texts, on disk: fixed-size records (key, `width` float32), appended.

    In $CRPO_CACHE, by default ~/.cache/crpo. A record cut short by a kill is cut off by the next
    writer; a lock keeps two writers apart.
    """

    def __init__(self, kind: str, model_key: bytes, width: int):
        root = Path(os.environ.get("CRPO_CACHE", Path.home() / ".cache" / "crpo"))
        self.path = root / f"{kind}-{model_key.hex()[:32]}-{width}.bin"
        self.record = np.dtype([("key", "<u8", (2,)), ("value", "<f4", (width,))])

    def read(self) -> dict[bytes, np.ndarray]:
        if not self.path.exists():
            return {}
        raw = self.path.read_bytes()
        size = self.record.itemsize
        rows = np.frombuffer(raw[: len(raw) // size * size], self.record)
        return {row["key"].tobytes(): row["value"] for row in rows}

    def append(self, keys: Sequence[bytes], values: np.ndarray) -> None:
        rows = np.empty(len(keys), self.record)
        rows["key"] = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        rows["value"] = values
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = file.seek(0, os.SEEK_END)
                file.truncate(size - size % self.record.itemsize)
                file.write(rows.tobytes())
        except OSError as error:
            raise UserError(
                f"{self.path}: the cache cannot be written ({error.strerror}); point the "
                "environment variable CRPO_CACHE at a folder that can"
            ) from None

    def fill(
        self,
        keys: Sequence[bytes],
        plan: Callable[[list[int]], Iterable[list[int]]],
        compute: Callable[[list[int]], np.ndarray],
        what: str,
    ) -> np.ndarray:
        """Values [n, width] of n keys; what is missing is computed batch by batch and kept.

        plan(missing indices) yields batches of indices, compute(batch) their values.
        """
        known = self.read()
        missing = [k for k, key in enumerate(keys) if key not in known]
        with tqdm(total=len(missing), desc=what, disable=not missing, leave=False) as bar:
            for batch in plan(missing):
                values = compute(batch)
                if not np.isfinite(values).all():
                    raise UserError(f"{what}: the model gives a number that is not finite")
                self.append([keys[k] for k in batch], values)
                known.update((keys[k], value) for k, value in zip(batch, values, strict=True))
                bar.update(len(batch))
        return np.array([known[key] for key in keys], np.float32).reshape(len(keys), -1)


# --------------------------------------------------------------------------------------------------
# Embeddings and rewards
# --------------------------------------------------------------------------------------------------


def by_length(lengths: Sequence[int], tokens: int) -> Iterable[list[int]]:
    """Indices in batches of like lengths, each at most `tokens` when padded."""
    batch: list[int] = []
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(k)
    if batch:
        yield batch


def pad(rows: Sequence[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask, both [n, T]."""
    T = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (T - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(T, device=device) < lengths[:, None]).long()


class Embedder:
    """Texts to unit vectors: the mean of the last hidden states over a text's tokens, normalised.

    Of an encoder, or of a causal LM's blocks.
    """

    def __init__(self, blocks, tokenizer, name: str):
        self.blocks, self.tokenizer, self.name = blocks, tokenizer, name
        context = getattr(blocks.config, "max_position_embeddings", None) or 8192
        self.limit = min(context, tokenizer.model_max_length, 8192)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """{text: [H] float32 unit vector}, each distinct text computed once ever."""
        texts = list(dict.fromkeys(texts))
        if not texts:
            return {}
        rows = self.tokenizer(texts, truncation=True, max_length=self.limit)["input_ids"]
        pad_id = self.tokenizer.pad_token_id or 0

        def compute(batch):
            ids, mask = pad([rows[k] for k in batch], pad_id, self.blocks.device)
            hidden = self.blocks(input_ids=ids, attention_mask=mask).last_hidden_state  # [n, T, H]
            mean = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return F.normalize(mean, dim=-1).cpu().numpy()

        def plan(missing):
            for batch in by_length([len(rows[k]) for k in missing], TOKENS):
                yield [missing[k] for k in batch]

        cache = Cache("embeddings", fingerprint(self.blocks), self.blocks.config.hidden_size)
        long = sum(len(row) == self.limit for row in rows)
        if long:
            print(
                f"embedding   {long:,} texts reach the {self.limit} tokens that {self.name} takes"
            )
        keys = [content_key(row) for row in rows]
        return dict(zip(texts, cache.fill(keys, plan, compute, "embedding"), strict=True))


def load_embedder(name: str, dtype: torch.dtype) -> Embedder:
    """Load an encoder, or the blocks of a causal LM."""
    source = str(HERE / "tiny") if name == "tiny" else name
    try:
        kind = (AutoConfig.from_pretrained(source, trust_remote_code=False).architectures or [""])[
            0
        ]
    except Exception:
        kind = ""  # load_checkpoint says what is wrong
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        model, tokenizer = load_checkpoint(name, transformers.AutoModelForCausalLM, dtype)
        return Embedder(model.base_model, tokenizer, name)
    return Embedder(*load_checkpoint(name, transformers.AutoModel, dtype), name)


class RewardModel:
    """(prompt, response) to a scalar: a sequence-classification checkpoint with one output."""

    def __init__(self, model, tokenizer, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        if model.config.num_labels != 1:
            raise UserError(
                f"reward model {name}: it has {model.config.num_labels} outputs; expected one"
            )

    @torch.no_grad()
    def __call__(self, items: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """Rewards [n] fp32 of (prompt, response) items."""
        kinds = None  # which of two texts a token is of, where the model asks for it
        if self.tokenizer.chat_template:
            encoder = Encoder(self.tokenizer)
            rows = encoder.ids([encoder.render((*p, ("assistant", y)), False) for p, y in items])
        else:
            prompts = ["\n\n".join(content for _, content in p) for p, _ in items]
            encoded = self.tokenizer(prompts, [y for _, y in items])
            rows, kinds = encoded["input_ids"], encoded.get("token_type_ids")
        context = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        for row, (_, text) in zip(rows, items, strict=True):
            if len(row) > context:
                raise UserError(
                    f"reward model {self.name}: it takes {context} tokens, too few for a prompt "
                    f"with the response {text[:60]!r}"
                )
        pad_id = self.tokenizer.pad_token_id or 0

        def compute(batch):
            ids, mask = pad([rows[k] for k in batch], pad_id, self.model.device)
            head = getattr(self.model, "score", None)
            if head is None:  # an encoder: it reads its first token
                extra = {}
                if kinds:
                    extra["token_type_ids"] = pad([kinds[k] for k in batch], 0, ids.device)[0]
                out = self.model(input_ids=ids, attention_mask=mask, **extra)
                return out.logits.float().cpu().numpy()
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            last = mask.sum(1) - 1  # found by length: PAD may be EOS
            final = hidden.last_hidden_state[torch.arange(len(batch), device=last.device), last]
            return head(final).float().cpu().numpy()

        def plan(missing):
            for batch in by_length([len(rows[k]) for k in missing], TOKENS):
                yield [missing[k] for k in batch]

        cache = Cache("rewards", fingerprint(self.model), width=1)
        return cache.fill([content_key(row) for row in rows], plan, compute, "rewards")[:, 0]


def load_reward_model(name: str, dtype: torch.dtype) -> RewardModel:
    auto = transformers.AutoModelForSequenceClassification
    return RewardModel(*load_checkpoint(name, auto, dtype), name)


# --------------------------------------------------------------------------------------------------
# The four signals
# --------------------------------------------------------------------------------------------------


@dataclass
class Pool:
    """The n distinct responses to one prompt that are scored together.

    preferred [n] bool: which of them make up Y_x. human: their human scores, nan where absent.
    """

    prompt: Messages
    texts: list[str]
    preferred: np.ndarray
    human: np.ndarray


@dataclass
class Scorers:
    """The models behind the signals: loaded, or by name and then loaded when first needed."""

    embedder: str | Embedder | None = None
    surprise_model: str | LanguageModel | None = None
    reward_model: str | RewardModel | None = None
    dtype: torch.dtype = torch.float32
    loaded: dict = field(default_factory=dict, repr=False)

    def get(self, kind: str):
        """The scorer of this kind; of those given by name only the last one used stays loaded."""
        model = getattr(self, kind)
        if not isinstance(model, str):
            return model
        if kind not in self.loaded:
            self.loaded.clear()  # three 27B models do not fit together
            load = {"embedder": load_embedder, "surprise_model": load_lm}
            self.loaded[kind] = load.get(kind, load_reward_model)(model, self.dtype)
        return self.loaded[kind]


JOINERS = "'’-"
CJK = re.compile("[\u2e80-\u2fdf\u3005-\u3007\u3040-\u31ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def words(text: str) -> list[str]:
    """The distinct words of a text, lower case, in order; see departure 2 above."""

    def mark(c):
        if c not in JOINERS and unicodedata.category(c)[0] not in "LNM":
            return " "
        return f" {c} " if CJK.match(c) or 0x20000 <= ord(c) < 0x40000 else c

    spaced = "".join(mark(c) for c in unicodedata.normalize("NFKC", text).lower())
    found = (w.strip(JOINERS) for w in spaced.split())
    return list(dict.fromkeys(w for w in found if any(c.isalnum() for c in w)))


def mean_pairwise_distance(vectors: np.ndarray) -> float:
    """Mean of 1 - cosine over ordered pairs i != j of unit vectors [n, H]; 0 if n < 2."""
    n = len(vectors)
    if n < 2:
        return 0.0
    vectors = vectors.astype(np.float64)
    total = vectors.sum(0)
    own = (vectors * vectors).sum()  # n, but for rounding
    return float(1 - (total @ total - own) / (n * (n - 1)))


def distance_to_set(vectors: np.ndarray, member: np.ndarray) -> np.ndarray:
    """For each unit vector of [n, H], the mean of 1 - cosine to the members other than itself: [n].

    member [n] bool. 0 where there is no other member.
    """
    vectors = vectors.astype(np.float64)
    total = vectors[member].sum(0)
    others = member.sum() - member  # [n]
    own = np.where(member, (vectors * vectors).sum(1), 0)
    return np.where(others > 0, 1 - (vectors @ total - own) / np.maximum(others, 1), 0.0)


def diversity(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, the mean semantic distance of each response to the other ones of Y_x: [n]."""
    vector = scorers.get("embedder")([text for pool in pools for text in pool.texts])
    return [
        distance_to_set(np.stack([vector[text] for text in pool.texts]), pool.preferred)
        for pool in pools
    ]


def novelty(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, 2 |DSI(y) - DSI(Y_x)| of each response: [n]."""
    vocabulary = {text: words(text) for pool in pools for text in pool.texts}
    vector = scorers.get("embedder")([w for found in vocabulary.values() for w in found])

    def dsi(found):
        return mean_pairwise_distance(np.array([vector[w] for w in found]))

    scores = []
    for pool in pools:
        preferred = [t for t, member in zip(pool.texts, pool.preferred, strict=True) if member]
        whole = dsi(dict.fromkeys(w for text in preferred for w in vocabulary[text]))
        scores.append(np.array([2 * abs(dsi(vocabulary[text]) - whole) for text in pool.texts]))
    return scores


def surprise(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, the perplexity of each response given the prompt: [n]."""
    lm = scorers.get("surprise_model")
    items = [(pool.prompt, text) for pool in pools for text in pool.texts]
    table, index = build_table(lm.encoder, items, lm.context, end=False)
    if min(index) < 0:
        text = items[index.index(-1)][1]
        raise UserError(
            f"surprise model {lm.name}: it takes {lm.context} tokens, too few for the response "
            f"{text[:60]!r}; choose another with --surprise-model"
        )
    logps = score_sequences(lm, table, "surprise").astype(np.float64)
    lengths = np.array([max(len(ids), 1) for ids in table.responses])
    flat = np.exp(-logps / lengths)[index]
    return np.split(flat, np.cumsum([len(pool.texts) for pool in pools])[:-1])


def quality(pools: Sequence[Pool], scorers: Scorers) -> list[np.ndarray]:
    """For each pool, the reward of each response: [n]; without a reward model, the human score."""
    if scorers.reward_model is None:
        for pool in pools:
            for text, score in zip(pool.texts, pool.human, strict=True):
                if math.isnan(score):
                    raise UserError(
                        "quality needs --reward-model, or score_chosen and score_rejected in the "
                        f"data; there is no score for {text[:60]!r}"
                    )
        return [pool.human for pool in pools]
    items = [(pool.prompt, text) for pool in pools for text in pool.texts]
    flat = scorers.get("reward_model")(items).astype(np.float64)
    return np.split(flat, np.cumsum([len(pool.texts) for pool in pools])[:-1])


# A fifth signal is one more function here.
SIGNALS = {
    "diversity": diversity,
    "novelty": novelty,
    "surprise": surprise,
    "quality": quality,
}


def normalise(values: np.ndarray, signal: str) -> np.ndarray:
    """Min-max over one prompt's responses [n] -> [0, 1]; all equal: 0.5; one alone: diversity 0."""
    if len(values) == 1 and signal == "diversity":
        return np.zeros(1)
    low, high = values.min(), values.max()
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal, but for rounding
        return np.full(len(values), 0.5)
    return (values - low) / (high - low)


def make_pools(pairs: Sequence[Pair], include_rejected: bool) -> list[Pool]:
    """Group the responses by prompt: Y_x is the distinct preferred ones."""
    preferred: dict[Messages, dict[str, None]] = {}
    human: dict[tuple[Messages, str], float] = {}
    rejected: dict[Messages, dict[str, None]] = {}
    for pair in pairs:
        preferred.setdefault(pair.prompt, {})[pair.chosen] = None
        rejected.setdefault(pair.prompt, {})[pair.rejected] = None
        for side in ("chosen", "rejected"):
            score = pair.row.get(f"score_{side}")
            if score is not None:
                score = check_number(score, f"score_{side}", pair.where, -1e9, 1e9)
                human[pair.prompt, getattr(pair, side)] = score
    pools = []
    for prompt, best in preferred.items():
        texts = list(best | rejected[prompt] if include_rejected else best)
        scores = np.array([human.get((prompt, text), math.nan) for text in texts], np.float64)
        pools.append(Pool(prompt, texts, np.array([text in best for text in texts]), scores))
    return pools


def add_signals(
    pairs: Sequence[Pair],
    signals: Iterable[str],
    scorers: Scorers,
    include_rejected: bool = False,
) -> int:
    """Write `<signal>_chosen` (and `_rejected`), in [0, 1], into the rows of the pairs.

    Returns the number of distinct responses that were scored.
    """
    pools = make_pools(pairs, include_rejected)
    for signal in signals:
        of: dict[tuple[Messages, str], float] = {}
        for pool, values in zip(pools, SIGNALS[signal](pools, scorers), strict=True):
            for text, value in zip(pool.texts, normalise(values, signal), strict=True):
                of[pool.prompt, text] = round(float(value), 6)
        for pair in pairs:
            pair.row[f"{signal}_chosen"] = of[pair.prompt, pair.chosen]
            if include_rejected:
                pair.row[f"{signal}_rejected"] = of[pair.prompt, pair.rejected]
    return sum(len(pool.texts) for pool in pools)


def add_scorer_flags(parser, embedder: str | None, surprise_model: str | None) -> None:
    """--embedder, --surprise-model, --reward-model."""
    parser.add_argument(
        "--embedder",
        default=embedder,
        help="encoder or causal LM behind diversity and novelty "
        f"(default: {embedder or 'the starting model'})",
    )
    parser.add_argument(
        "--surprise-model",
        default=surprise_model,
        help=f"causal LM behind surprise (default: {surprise_model or 'the starting model'})",
    )
    parser.add_argument(
        "--reward-model",
        help="sequence-classification model behind quality; the paper's is "
        "Skywork/Skywork-Reward-Gemma-2-27B-v0.2 (default: the human scores of the data)",
    )


def main() -> None:
    doc = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=doc)
    parser.add_argument("--data", required=True, help="preference JSONL to read")
    parser.add_argument("--out", required=True, help="the same rows with the scores, to write")
    parser.add_argument(
        "--signals",
        nargs="+",
        choices=list(SIGNALS),
        default=["diversity", "novelty", "surprise"],
        help="which columns to compute (default: %(default)s)",
    )
    add_scorer_flags(parser, "jinaai/jina-embeddings-v3-hf", "google/gemma-2-27b-it")
    parser.add_argument(
        "--include-rejected",
        action="store_true",
        help="score rejected responses too, against the same Y_x",
    )
    add_dtype_flag(parser)
    args = parser.parse_args()

    pairs = read_preferences(args.data)
    dtype = pick_dtype(args.dtype)
    scorers = Scorers(args.embedder, args.surprise_model, args.reward_model, dtype)
    had = {name: sum(f"{name}_chosen" in pair.row for pair in pairs) for name in args.signals}
    n_scored = add_signals(pairs, args.signals, scorers, args.include_rejected)
    write_jsonl(args.out, [pair.row for pair in pairs])
    print(f"{len(pairs):,} pairs, {n_scored:,} distinct responses scored")
    for signal in args.signals:
        values = np.array([pair.row[f"{signal}_chosen"] for pair in pairs])
        note = f"  (replaces {had[signal]:,} scores of the file)" if had[signal] else ""
        print(f"  {signal:9}  mean {values.mean():.3f}  sd {values.std():.3f}{note}")
    print(f"saved {args.out}")


if __name__ == "__main__":
    run(main)
