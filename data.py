"""data.py: text becomes token batches.

    python data.py pairs --data rated.jsonl --out pref.jsonl   # rated responses -> preference pairs
    python data.py sft   --data rated.jsonl --out sft.jsonl    # rated responses -> SFT examples
    python data.py stats --data pref.jsonl                     # prompts and samples per task

The file reads in the order in which text travels:

    JSONL -> records      a preference (prompt, chosen, rejected) or a sample (prompt, response)
    records -> Table      every distinct prompt once, every distinct (prompt, response) once, as ids
    Table -> Batch        rows that hold a prompt once, followed by several of its responses

Why batches share prompts. In creativity data one prompt has hundreds of short responses and each
response stands in up to ten pairs. So a row of a batch is

    prompt | response 1 | response 2 | ...        position ids restart after the prompt for each

and the attention mask lets each response see the prompt and itself, never its siblings. The model
computes for each response what it would compute for it alone, and the prompt is paid for once. A
short row takes a second such group behind the first, masked off from it in the same way.

The paper's sets (section 3 and appendix A of arXiv 2505.14442):
    MuCE-PREF   two responses to one prompt, both scored >= 20, at least 5 apart, each response in
                at most 10 pairs, first come first served
    MuCE-SFT    responses scored >= 30
Deliberate departure: two ratings of one identical text never make a pair.
"""

import argparse
import heapq
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

# A conversation as ((role, content), ...): hashable, so that equal prompts are found by equality.
Messages = tuple[tuple[str, str], ...]

PREFERENCE_EXAMPLE = '{"prompt": "Name a use for a brick.", "chosen": "...", "rejected": "..."}'
SAMPLE_EXAMPLE = '{"prompt": "Name a use for a brick.", "response": "A door stop."}'
RATED_EXAMPLE = '{"prompt": "Name a use for a brick.", "response": "A door stop.", "score": 23}'
PROMPT_EXAMPLE = '{"task": "Uses", "prompt": "Name a use for a brick."}'


class UserError(ValueError):
    """What the user gave is wrong; the message says where, what, and what right looks like."""


# --------------------------------------------------------------------------------------------------
# The command line: one sentence for the user's mistakes, exit status 2
# --------------------------------------------------------------------------------------------------


# What gloo and NCCL say when a process at the other end is gone.
LOST = re.compile("closed by peer|reset by peer|Broken pipe|remote process", re.IGNORECASE)


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and exit status 2."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    name, rank = Path(sys.argv[0]).name, os.environ.get("RANK", "0")
    try:
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        if rank != "0":
            time.sleep(3)  # if rank 0 met the same error it has said so, and torchrun ends us now
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not torch.distributed.is_initialized() or not LOST.search(str(error)):
            raise
        why = "another process has ended; see what that one said"
        print(f"{name}: process {rank} ends: {why}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence instead of a page when a flag is wrong; no abbreviations."""

    def __init__(self, **options):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite int or float in [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or math.isinf(value):
            bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__} {bound}")
        return value

    return parse


# --------------------------------------------------------------------------------------------------
# JSONL in and out
# --------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", object) for each non-blank line; UserError where a line is not an object.

    UTF-8, with or without a byte-order mark, LF or CRLF.
    """

    def refuse_constant(name):
        raise ValueError(f"{name} is not a JSON number")

    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a JSONL file") from None
    count = 0
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{i}"
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a line of JSON in UTF-8 ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object such as {PREFERENCE_EXAMPLE}")
        count += 1
        yield where, row
    if not count:
        raise UserError(f"{path}: no records; expected one JSON object a line")


def sync(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: beside, fsync, rename. UserError where the disk refuses."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except (OSError, UnicodeError) as error:
        if beside.is_file():
            beside.unlink()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason})") from None


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """What `write` puts into a folder, whole or not at all, as in `write_file`."""
    folder = Path(folder)
    beside = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # what a kill has left
        beside.mkdir()
        write(beside)
        for path in (*beside.iterdir(), beside):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
        sync(folder.parent)
    except Exception as error:  # on a full disk every library raises what it likes
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({error})") from None


def append_jsonl(path: str | Path, row: dict) -> None:
    """Add a row to a file that is there. UserError where the disk refuses."""
    try:
        with open(path, "r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(row).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def write_jsonl(path: str | Path, rows: Sequence[dict]) -> None:
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A preference: `chosen` is better than `rejected` as an answer to `prompt`."""

    prompt: Messages
    chosen: str
    rejected: str
    row: dict = field(repr=False)  # as it stood in the file, unknown columns included
    where: str  # file:line

    @property
    def task(self) -> str:
        return str(self.row.get("task", ""))


@dataclass
class Sample:
    """A response to a prompt; `score` is the human rating (10 to 50) where there is one."""

    prompt: Messages
    response: str
    row: dict = field(repr=False)
    where: str
    score: float = math.nan

    @property
    def task(self) -> str:
        return str(self.row.get("task", ""))


def check_text(value, key: str, where: str, example: str) -> str:
    """A non-blank string that UTF-8 can hold, or a UserError."""
    if not isinstance(value, str) or not value.strip():
        got = "missing" if value is None else f"{json.dumps(value)[:60]}"
        raise UserError(f"{where}: {key!r} is {got}; expected a non-empty string, as in {example}")
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: {key!r} holds a NUL or a lone surrogate; remove it")
    return value


def check_number(value, key: str, where: str, low: float, high: float) -> float:
    """A finite JSON number in [low, high], or a UserError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        got = "missing" if value is None else f"{value!r:.60}"
        raise UserError(f"{where}: {key!r} is {got}; expected a number {low:g} to {high:g}")
    return float(value)


def parse_messages(value, key: str, where: str, example: str) -> Messages:
    """A string is one user turn; a list of {"role", "content"} is taken as it is."""
    if not isinstance(value, list):
        return (("user", check_text(value, key, where, example)),)
    messages = []
    for turn in value:
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ("system", "user", "assistant") or (role == "system" and messages):
            raise UserError(
                f"{where}: {key!r} holds a turn with role {role!r}; expected an optional system "
                'turn, then user and assistant turns, as {"role": "user", "content": "..."}'
            )
        messages.append((role, check_text(turn.get("content"), f"{key}.content", where, example)))
    if not messages:
        raise UserError(f"{where}: {key!r} is an empty list; expected at least one turn")
    return tuple(messages)


def check_prompt(prompt: Messages, where: str) -> Messages:
    roles = [role for role, _ in prompt if role != "system"]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise UserError(
            f"{where}: the turns of the prompt are {[role for role, _ in prompt]}; expected user "
            "and assistant by turns, the last of them the user's"
        )
    return prompt


def parse_pair(row: dict, where: str) -> tuple[Messages, str, str]:
    """Prompt, chosen and rejected of a preference row, in any of the four forms.

    Plain strings; message lists beside a prompt (TRL's explicit form); whole conversations without
    a prompt (TRL's implicit form); whole texts without a prompt, whose shared beginning is it.
    """
    sides = []
    for key in ("chosen", "rejected"):
        if isinstance(row.get(key), list):
            sides.append(parse_messages(row[key], key, where, PREFERENCE_EXAMPLE))
        else:
            text = check_text(row.get(key), key, where, PREFERENCE_EXAMPLE)
            sides.append((("assistant", text),))
    if "prompt" in row:
        prompt = parse_messages(row["prompt"], "prompt", where, PREFERENCE_EXAMPLE)
        sides = [prompt + side for side in sides]
    elif all(isinstance(row[key], str) for key in ("chosen", "rejected")):
        texts = row["chosen"], row["rejected"]
        differ = (k for k, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
        shared = texts[0][: next(differ, min(map(len, texts)))]
        cut = max(shared.rfind(" "), shared.rfind("\n"), 0)  # never in the middle of a word
        sides = [(("user", t[:cut]), ("assistant", t[cut:].lstrip())) for t in texts]
        if any(not content.strip() for side in sides for _, content in side):
            raise UserError(
                f"{where}: there is no 'prompt', and 'chosen' and 'rejected' do not begin alike "
                f"and then differ; expected {PREFERENCE_EXAMPLE}"
            )
    (*prompt, chosen), (*other, rejected) = sides
    if chosen[0] != "assistant" or rejected[0] != "assistant":
        raise UserError(f"{where}: 'chosen' and 'rejected' must each end with an assistant turn")
    if prompt != other:
        raise UserError(f"{where}: 'chosen' and 'rejected' answer different prompts")
    if chosen == rejected:
        raise UserError(f"{where}: 'chosen' and 'rejected' are the same text; remove the line")
    return check_prompt(tuple(prompt), where), chosen[1], rejected[1]


def read_preferences(path: str | Path) -> list[Pair]:
    """Read a preference file; see `parse_pair` for the forms it may take."""
    return [Pair(*parse_pair(row, where), row, where) for where, row in read_jsonl(path)]


# The columns of the MuCE table, as its authors released it, and ours.
MUCE_COLUMNS = {
    "TasksNamesFull": "task",
    "Prompt": "prompt",
    "FullPrompt": "prompt",
    "Response": "response",
    "facsco_grm_scaled": "score",
    "Set": "split",
    "Language": "language",
    "Dataset": "dataset",
    "RatingLabel": "label",
}


def read_muce(path: str | Path) -> Iterator[tuple[str, dict]]:
    """`read_jsonl`, with our names beside MuCE's."""
    for where, row in read_jsonl(path):
        yield where, {ours: row[muce] for muce, ours in MUCE_COLUMNS.items() if muce in row} | row


def read_samples(path: str | Path, rated: bool = False) -> list[Sample]:
    """Read responses: SFT, rated (`rated=True` insists on a score), MuCE's or generated ones.

    A row has `prompt` and `response`, or `messages` that end with the assistant's turn.
    """
    samples, example = [], RATED_EXAMPLE if rated else SAMPLE_EXAMPLE
    for where, row in read_muce(path):
        if "messages" in row:
            messages = parse_messages(row["messages"], "messages", where, example)
            if messages[-1][0] != "assistant":
                raise UserError(f"{where}: 'messages' must end with the assistant's turn")
            prompt, response = messages[:-1], messages[-1][1]
        else:
            prompt = parse_messages(row.get("prompt"), "prompt", where, example)
            response = check_text(row.get("response"), "response", where, example)
        score = row.get("score")
        if rated and score is None:
            raise UserError(f"{where}: 'score' is missing; expected {example}")
        score = math.nan if score is None else check_number(score, "score", where, -1e9, 1e9)
        samples.append(Sample(check_prompt(prompt, where), response, row, where, score))
    return samples


def read_prompts(path: str | Path, split: str | None = None) -> dict[Messages, str]:
    """Distinct prompts of any file that has a `prompt` column, in order, with the task of each."""
    prompts: dict[Messages, str] = {}
    for where, row in read_muce(path):
        if split is None or row.get("split") == split:
            prompt = parse_messages(row.get("prompt"), "prompt", where, PROMPT_EXAMPLE)
            prompts.setdefault(check_prompt(prompt, where), str(row.get("task", "")))
    if not prompts:
        raise UserError(f"{path}: no prompt has split {split!r}; see its 'split' column")
    return prompts


# --------------------------------------------------------------------------------------------------
# Records -> token ids
# --------------------------------------------------------------------------------------------------

# For a model without a chat template: BOS, the prompt, an empty line, the response, EOS.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n\n' }}{% endfor %}"
)


class Encoder:
    """A tokenizer with its chat template: where a prompt ends and its response begins, as ids.

    The ids of a prompt are those of the template with its generation prompt, whatever follows.
    BOS comes from the template alone, so it is there once. A response ends with the token that
    closes the assistant's turn, and that token is trained on. Masks are made from lengths, never
    from ids, so it does not matter whether PAD and EOS are the same token.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
        self.special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def render(self, messages: Messages, generation_prompt: bool) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            return self.tokenizer.apply_chat_template(
                chat,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:  # a template is a program: it may raise what it likes
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} refuses the roles "
                f"{[role for role, _ in messages]}: {error}"
            ) from None

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def prompts(self, prompts: Sequence[Messages]) -> list[list[int]]:
        """Token ids of each prompt, generation prompt included."""
        return self.ids([self.render(prompt, True) for prompt in prompts])

    def responses(
        self, items: Sequence[tuple[Messages, str]], prompt_ids: Sequence[list[int]]
    ) -> list[list[int]]:
        """Token ids of each response, its end-of-turn token included.

        Prompt and response are tokenised together where the seam allows it (as the model met such
        text in training), else the response alone: the ids of the prompt are the same either way.
        """
        heads = [self.render(prompt, True) for prompt, _ in items]
        whole = [self.render((*prompt, ("assistant", text)), False) for prompt, text in items]
        for head, full in zip(heads, whole, strict=True):
            if not full.startswith(head):
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} is not prefix-stable: a "
                    "prompt with its answer does not begin with the prompt's generation form; "
                    "give the tokenizer a template whose text only grows"
                )
        tails = [full[len(head) :] for head, full in zip(heads, whole, strict=True)]
        found = []
        for ids, head_ids, alone in zip(self.ids(whole), prompt_ids, self.ids(tails), strict=True):
            joined = ids[: len(head_ids)] == head_ids
            found.append(self.close(ids[len(head_ids) :] if joined else alone))
        return found

    def close(self, ids: list[int]) -> list[int]:
        """Cut what a template writes behind the end of the turn; add EOS where it wrote none."""
        last = max((k for k, i in enumerate(ids) if i in self.special), default=-1)
        if last >= 0 and not self.tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {self.tokenizer.name_or_path} has no EOS token")
        return [*ids, self.tokenizer.eos_token_id]

    def stop_ids(self) -> list[int]:
        """The tokens that end a generated response: EOS and the template's end of turn."""
        probe = (("user", "a"),)
        ends = {self.responses([(probe, "b")], self.prompts([probe]))[0][-1]}
        return sorted(ends | ({self.tokenizer.eos_token_id} - {None}))


@dataclass
class Table:
    """Each distinct prompt and each distinct (prompt, response) of a data set, once.

    prompts: ids of each prompt. responses: ids of each of the S responses. prompt_of: for each
    response, the index of its prompt. keys: for each response, its (prompt, text).
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    prompt_of: list[int]
    keys: list[tuple[Messages, str]]
    cut: int = 0  # prompts that lost their beginning to max_length
    dropped: int = 0  # responses too long for max_length

    def longest(self) -> int:
        """Tokens of the longest prompt with response."""
        both = zip(self.prompt_of, self.responses, strict=True)
        return max((len(self.prompts[p]) + len(ids) for p, ids in both), default=0)


def build_table(
    encoder: Encoder,
    items: Sequence[tuple[Messages, str]],
    max_length: int,
    too_long: str = "drop",
    end: bool = True,
) -> tuple[Table, list[int]]:
    """Encode (prompt, response) items; return the table and each item's index in it (-1: dropped).

    Length: a response stays if it fits beside its whole prompt, or takes at most half of
    `max_length`; the prompt is then cut from the left to what its longest remaining response
    leaves, and keeps its BOS. Other responses are dropped, or refused with too_long="refuse".
    end=False leaves the end-of-turn token out (for perplexities of a text as it stands).
    """
    keys = list(dict.fromkeys(items))
    distinct = list(dict.fromkeys(prompt for prompt, _ in keys))
    number_of = {prompt: k for k, prompt in enumerate(distinct)}
    prompts = encoder.prompts(distinct)
    prompt_of = [number_of[prompt] for prompt, _ in keys]
    responses = encoder.responses(keys, [prompts[p] for p in prompt_of])
    if not end:
        responses = [ids[:-1] for ids in responses]

    room = [len(ids) for ids in prompts]
    keep = []
    for s, (p, ids) in enumerate(zip(prompt_of, responses, strict=True)):
        if len(ids) <= max(max_length - len(prompts[p]), max_length // 2):
            keep.append(s)
            room[p] = min(room[p], max_length - len(ids))
        elif too_long == "refuse":
            raise UserError(
                f"a response of {len(ids)} tokens is too long for --max-length {max_length}: "
                f"{keys[s][1][:60]!r}; raise --max-length, or drop such pairs with --too-long drop"
            )
    bos = encoder.tokenizer.bos_token_id
    cut = sum(length < len(ids) for length, ids in zip(room, prompts, strict=True))
    prompts = [left_cut(ids, length, bos) for ids, length in zip(prompts, room, strict=True)]
    table = Table(
        prompts,
        [responses[s] for s in keep],
        [prompt_of[s] for s in keep],
        [keys[s] for s in keep],
        cut,
        len(keys) - len(keep),
    )
    index = {key: s for s, key in enumerate(table.keys)}
    return table, [index.get(item, -1) for item in items]


def left_cut(ids: list[int], length: int, bos: int | None) -> list[int]:
    """The last `length` ids, with BOS kept in front if it was there."""
    if len(ids) <= length:
        return ids
    if ids[0] == bos and length > 1:
        return [bos, *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]


# --------------------------------------------------------------------------------------------------
# Token ids -> batches
# --------------------------------------------------------------------------------------------------

LINEAR = 2048  # a token's linear layers cost about as much as attention over so many columns


@dataclass
class Batch:
    """One forward pass over S sequences in R rows of T tokens, N response tokens in all.

    ids, positions [R, T] int64. mask [R, 1, T, T] bool, True where row i may look at column j, or
    [R, T] int64 where prompts are not shared. For each response token: predict [N], the flat index
    row * T + column of the hidden state that predicts it; targets [N], its id; owner [N], which of
    the S sequences it belongs to. size = S. tokens: ids that are not padding.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    size: int
    tokens: int

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def segment_room(prompt: int, window: int) -> int:
    """Tokens to which a segment grows before its prompt is better repeated in another one.

    A long segment pays for attention, a short one for its prompt: per response token a segment of
    L tokens costs L / (L - prompt) * (L + LINEAR), which is least at this L.
    """
    return min(prompt + math.isqrt(prompt * (prompt + LINEAR)), window)


def pack(lengths: list[int], window: int) -> list[list[int]]:
    """Segments into rows of like length, none longer than `window`; rows of indices.

    As many rows as are cheapest: few long ones pay for attention, many short ones for padding.
    """
    longest = max(lengths)
    found, least = [[k] for k in range(len(lengths))], math.inf
    for stretch in (1, 1.25, 1.5, 2, 3, 4):
        rows = balance(lengths, math.ceil(sum(lengths) / min(stretch * longest, window)))
        T = max(sum(lengths[k] for k in row) for row in rows)
        cost = len(rows) * T * (T + LINEAR)
        if window >= T and cost < least:
            found, least = rows, cost
    return found


def balance(lengths: list[int], R: int) -> list[list[int]]:
    """Segments into R rows: longest first, each into the row that is shortest so far."""
    rows: list[tuple[int, list[int]]] = [(0, []) for _ in range(R)]
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        length, members = rows[0]
        heapq.heapreplace(rows, (length + lengths[k], [*members, k]))
    return [members for _, members in rows if members]


def make_batch(table: Table, sequences: Sequence[int], share: bool, window: int) -> Batch:
    """Lay the given sequences of the table out as one forward pass.

    share=True: a segment is a prompt with some of its responses (`segment_room`), and rows, of at
    most `window` tokens, hold several segments (`pack`). share=False: a segment is one prompt with
    one response, a row is one segment, padded on the right, under the model's own causal mask.
    """
    by_prompt: dict[int, list[int]] = defaultdict(list)
    for k, s in enumerate(sequences):
        by_prompt[table.prompt_of[s]].append(k)
    segments: list[tuple[int, list[int]]] = []  # (prompt, positions in `sequences`)
    lengths: list[int] = []
    for prompt, members in by_prompt.items():
        for k in members:
            tokens = len(table.responses[sequences[k]])
            room = segment_room(len(table.prompts[prompt]), window)
            fits = share and segments and segments[-1][0] == prompt
            if fits and lengths[-1] + tokens <= room:
                segments[-1][1].append(k)
                lengths[-1] += tokens
            else:
                segments.append((prompt, [k]))
                lengths.append(len(table.prompts[prompt]) + tokens)
    rows = pack(lengths, max(window, *lengths)) if share else [[k] for k in range(len(segments))]

    R, T = len(rows), max(sum(lengths[k] for k in row) for row in rows)
    ids, positions = np.zeros((R, T), np.int64), np.zeros((R, T), np.int64)
    segment = np.full((R, T), -1)  # padding is a segment of its own, so no row of the mask is empty
    response = np.full((R, T), -1)  # -1 in a prompt, else which response
    predict, targets, owner = [], [], []
    for r, row in enumerate(rows):
        at = 0
        for k in row:
            prompt_ids, start = table.prompts[segments[k][0]], at
            P = len(prompt_ids)
            segment[r, at : at + lengths[k]] = k
            ids[r, at : at + P] = prompt_ids
            positions[r, at : at + P] = np.arange(P)
            at += P
            for member in segments[k][1]:
                answer = table.responses[sequences[member]]
                N = len(answer)
                ids[r, at : at + N] = answer
                positions[r, at : at + N] = np.arange(P, P + N)
                response[r, at : at + N] = member
                # the prompt's last token predicts the first of each response
                predict += [r * T + start + P - 1, *range(r * T + at, r * T + at + N - 1)]
                targets += answer
                owner += [member] * N
                at += N
    if share:
        mask = np.tril(np.ones((T, T), bool)) & (segment[:, :, None] == segment[:, None, :])
        mask &= (response[:, None, :] == -1) | (response[:, :, None] == response[:, None, :])
        mask = torch.from_numpy(mask[:, None])
    else:
        mask = torch.from_numpy((segment >= 0).astype(np.int64))
    tensors = [torch.tensor(x, dtype=torch.int64) for x in (predict, targets, owner)]
    both = torch.from_numpy(ids), torch.from_numpy(positions)
    return Batch(*both, mask, *tensors, len(sequences), sum(lengths))


def micro_batches(
    table: Table,
    units: Sequence[Sequence[int]],
    tokens: int,
    share: bool = True,
    window: int = 10**9,
) -> Iterator[tuple[list[int], list[int]]]:
    """Split units of work into forward passes of at most `tokens` tokens, padding aside.

    A pass that holds a single unit may be longer.

    A unit is the sequences that must meet in one pass: a pair for the loss, one sequence for
    scoring. Units are taken prompt by prompt, longest first, so that passes share prompts and pad
    little. Yields (indices of the units, distinct sequences they need).
    """

    def size(unit):
        return sum(len(table.responses[s]) for s in unit)

    order = sorted(
        range(len(units)), key=lambda u: (table.prompt_of[units[u][0]], -size(units[u]), u)
    )
    taken: list[int] = []
    seen: dict[int, None] = {}
    total, last, filled = 0, -1, 0  # tokens of this pass; its last segment, as make_batch has it
    for u in order:
        prompt = table.prompt_of[units[u][0]]
        for fresh in (False, True):
            if fresh:
                taken, seen, total, last = [], {}, 0, -1
            room = segment_room(len(table.prompts[prompt]), window)
            cost, fill = 0, filled if prompt == last else room
            for s in dict.fromkeys(units[u]):
                n = len(table.responses[s]) if s not in seen else 0
                joins = share and fill + n <= room
                step = n if joins or not n else n + len(table.prompts[prompt])
                cost, fill = cost + step, fill + n if joins else step
            if not taken or total + cost <= tokens:
                break
            yield taken, list(seen)
        taken.append(u)
        seen.update(dict.fromkeys(units[u]))
        total, last, filled = total + cost, prompt, fill
    if taken:
        yield taken, list(seen)


def divide(table: Table, units: Sequence[Sequence[int]], parts: int) -> list[list[int]]:
    """Units of work into parts of about as many tokens, prompt by prompt: indices of each part.

    The first part is never empty, the others may be.
    """
    order = sorted(range(len(units)), key=lambda u: (table.prompt_of[units[u][0]], u))
    ends = np.cumsum([sum(len(table.responses[s]) for s in units[u]) for u in order])
    starts = np.append(0, ends[:-1])
    found: list[list[int]] = [[] for _ in range(parts)]
    for u, part in zip(order, starts * parts // ends[-1], strict=True):
        found[part].append(u)
    return found


def step_indices(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which of n items the optimizer step takes: a pure function of (seed, step).

    Every epoch is a fresh permutation; its last batch may be smaller.
    """
    steps_per_epoch = math.ceil(n / batch_size)
    epoch, k = divmod(step, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[k * batch_size : (k + 1) * batch_size].tolist()


# --------------------------------------------------------------------------------------------------
# The paper's data sets from rated responses
# --------------------------------------------------------------------------------------------------


def prompt_column(prompt: Messages) -> str | list[dict]:
    """A prompt as files hold it: one user turn as a string, more as a list of turns."""
    chat = [{"role": role, "content": content} for role, content in prompt]
    return chat[0]["content"] if len(chat) == 1 else chat


def make_pairs(
    samples: Sequence[Sample], min_score: float = 20, min_gap: float = 5, max_pairs: int = 10
) -> list[dict]:
    """MuCE-PREF's rule: preference rows from rated responses (see the head of this file)."""
    groups: dict[tuple[str, Messages], list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.score >= min_score:
            groups[sample.task, sample.prompt].append(sample)
    rows = []
    for group in groups.values():
        left = [max_pairs] * len(group)
        for i, one in enumerate(group):
            for j in range(i + 1, len(group)):
                if not left[i]:
                    break
                two = group[j]
                gap = abs(one.score - two.score)
                if gap < min_gap or not gap or not left[j] or one.response == two.response:
                    continue
                left[i] -= 1
                left[j] -= 1
                best, worst = (one, two) if one.score > two.score else (two, one)
                kept = ("task", "dataset", "language", "label")
                rows.append(
                    {key: best.row[key] for key in kept if key in best.row}
                    | {"prompt": prompt_column(best.prompt)}
                    | {"chosen": best.response, "rejected": worst.response}
                    | {"score_chosen": best.score, "score_rejected": worst.score}
                )
    return rows


def print_stats(path: str) -> None:
    """A row a task: distinct prompts and samples, as in tables 2 and 3 of the paper."""
    prompts: dict[str, set] = defaultdict(set)
    samples: dict[str, int] = defaultdict(int)
    pairs = any("chosen" in row for _, row in read_jsonl(path))
    for record in read_preferences(path) if pairs else read_samples(path):
        prompts[record.task].add(record.prompt)
        samples[record.task] += 1
    rows = [(task or "(no task)", len(prompts[task]), samples[task]) for task in samples]
    rows.append(("total", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    width = max(len(row[0]) for row in rows)
    print(f"{'task':{width}}  {'prompts':>8}  {'pairs' if pairs else 'samples':>8}")
    for task, n_prompts, n_samples in rows:
        print(f"{task:{width}}  {n_prompts:8,}  {n_samples:8,}")


def main() -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("pairs", "preference pairs from rated responses (MuCE-PREF's rule)"),
        ("sft", "SFT examples from rated responses (MuCE-SFT's rule)"),
        ("stats", "prompts and samples per task of any file"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--data", required=True, help="JSONL file to read")
        if name == "stats":
            continue
        command.add_argument("--out", required=True, help="JSONL file to write")
        command.add_argument("--split", help="only rows whose `split` is this, e.g. Training")
        command.add_argument(
            "--min-score",
            type=number(float, -1e9),
            default=20 if name == "pairs" else 30,
            help="lowest score of a response that is used (default: %(default)s)",
        )
        if name == "pairs":
            command.add_argument(
                "--min-gap",
                type=number(float, 0),
                default=5,
                help="least difference of the two scores (default: %(default)s)",
            )
            command.add_argument(
                "--max-pairs",
                type=number(int, 1),
                default=10,
                help="most pairs a response may stand in (default: %(default)s)",
            )
    args = parser.parse_args()
    if args.command == "stats":
        return print_stats(args.data)

    samples = read_samples(args.data, rated=True)
    if args.split is not None:
        samples = [s for s in samples if s.row.get("split") == args.split]
    if args.command == "pairs":
        rows = make_pairs(samples, args.min_score, args.min_gap, args.max_pairs)
    else:
        kept = ("task", "prompt", "response", "messages", "score")
        good = [s.row for s in samples if s.score >= args.min_score]
        rows = [{key: row[key] for key in kept if key in row} for row in good]
    if not rows:
        raise UserError(
            f"{args.data}: nothing is left of its rated responses ({len(samples):,} in this "
            "split); lower --min-score or --min-gap, or name another --split"
        )
    write_jsonl(args.out, rows)
    print(f"{len(samples):,} rated responses -> {len(rows):,} records in {args.out}")
    print_stats(args.out)


if __name__ == "__main__":
    run(main)
