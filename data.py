"""data.py: text becomes token batches.

    python data.py ratings --data raters.jsonl --out rated.jsonl # raw ratings -> factor scores
    python data.py pairs   --data rated.jsonl --out pref.jsonl   # rated responses -> preferences
    python data.py sft     --data rated.jsonl --out sft.jsonl    # rated responses -> SFT examples
    python data.py stats   --data pref.jsonl                     # prompts and samples per task

    JSONL -> records      a preference (prompt, chosen, rejected) or a sample (prompt, response)
    records -> Table      every distinct prompt once, every distinct (prompt, response) once, as ids
    Table -> Batch        rows of prompt | response 1 | response 2 | ...

Creativity data have few prompts and hundreds of short responses to each. In a batch a response sees
its prompt and itself alone, at positions that go on from the prompt's: the model computes what it
would compute for it alone, and the prompt is computed once.

The paper's sets (section 3 and appendix A of arXiv 2505.14442):
    MuCE-PREF   two responses to one prompt, scored >= 20, >= 5 apart, each in at most 10 pairs
    MuCE-SFT    responses scored >= 30
    scores      Judge Response Theory (Myszkowski and Storme 2019): theta ~ N(0, 1) is how creative
                a response is, and a rater is an item of a graded response model (Samejima 1969),
                    P(rating >= k | theta) = s(slope theta - cut_k),   s(x) = 1 / (1 + e^-x),
                fitted by marginal maximum likelihood; the score is the posterior mean, on 10 to 50
Deliberate departures:
    1. Two ratings of one identical text never make a pair.
    2. Slopes have a weak prior, N(1, 2^2), so that a rater of few responses has a finite slope.
    3. Raters with a slope below 0.35, very low by Baker (2001), are left out, without a search.
"""

import sys

# Ctrl-C while torch is imported should print no traceback, so each file imports ours first
if sys.excepthook is sys.__excepthook__:
    sys.excepthook = lambda kind, *it: kind is KeyboardInterrupt or sys.__excepthook__(kind, *it)

import argparse
import bisect
import contextlib
import csv
import fcntl
import gzip
import hashlib
import heapq
import io
import json
import math
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, NoReturn

import numpy as np
import torch
from tqdm import tqdm

# A conversation as ((role, content), ...): hashable, so that equal prompts can be looked up.
Messages = tuple[tuple[str, str], ...]
Item = tuple[Messages, str]  # a prompt and a response to it


class UserError(ValueError):
    """The user's input is wrong; the message says where, what is wrong and what is expected."""


# ---- The command line ----------------------------------------------------------------------------

# A progress bar; piped into a file, a line every ten seconds.
LINES = SimpleNamespace(flush=sys.stderr.flush)
LINES.write = lambda text: sys.stderr.write(text.strip() and text.strip() + "\n")
progress = partial(tqdm, **({} if sys.stderr.isatty() else {"mininterval": 10, "file": LINES}))


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def run(main: Callable[[], None]) -> None:
    """Call `main`; the user's mistakes become one line on stderr and exit status 2."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    except BrokenPipeError:  # whoever reads our output, `head` for instance, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(128 + signal.SIGINT)  # at once, whatever a thread waits for
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # rank 0 reports the same error first, and torchrun then ends us
        message = str(error)
    except (RuntimeError, IndexError) as error:
        if re.search("(?i)(closed|reset) by peer|broken pipe|remote process", str(error)):
            message = "this process ends, as another one has ended; see its message"
        elif "index out of range in self" in str(error):
            message = "the model lacks tokens of its tokenizer; give it its own tokenizer"
        elif isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            remedy = "lower --micro-tokens, --batch-size or --lora-r, or --gradient-checkpointing"
            message = f"out of memory; in training {remedy} ({error!s:.200})"
        else:
            raise
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", message)  # printable
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


# What other programs call some of our flags.
OTHER_FLAGS = {"--learning-rate": "--lr", "--learning_rate": "--lr", "--num-samples": "--samples"}
OTHER_FLAGS |= {"--temperature": "--decoding t=", "--num-epochs": "--epochs", "--output": "--out"}


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence instead of a page when a flag is wrong; no abbreviations."""

    def __init__(self, **options):
        if "\n" in (options.get("description") or ""):  # a file's docstring comes after its flags
            options["epilog"] = options.pop("description")
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message: str):
        for theirs, ours in OTHER_FLAGS.items():
            message += f"; {theirs} is {ours} here" if theirs in message else ""
        raise UserError(f"{message}; see --help")


def number(kind: type, low: float, high: float = 10**9) -> Callable[[str], float]:
    """An argparse type: an int or float in [low, high]."""

    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        expected = f"expected {kind.__name__} from {low:,} to {high:,}"
        raise argparse.ArgumentTypeError(f"{text!r}: {expected}")

    return parse


def flag(group, name: str, default, help: str, kind=None, **options) -> None:
    """Add a flag to an argparse group, with its default in the help.

    The default gives the type: False makes a switch, None optional text, `...` required text, a
    list one or more values. kind: another type (see `number`), or a list of choices.
    """
    if default is False:
        group.add_argument(name, action="store_true", help=help)
        return
    shown = default
    if isinstance(default, list):
        options, shown = {"nargs": "+"} | options, " ".join(map(str, default))
    elif kind is None and default not in (None, ...):
        kind = type(default)
    options |= {"choices": kind} if isinstance(kind, list) else {"type": kind or str}
    if default is ...:
        options["required"] = True
    elif default is not None:
        options["default"] = default
        help += f" (default: {shown})" if default != [] else ""
    group.add_argument(name, help=help, **options)


# ---- JSONL -> records ----------------------------------------------------------------------------


def read_text(path: str | Path, torn: bool = False) -> str:
    """A file's text, plain or in gzip, or UserError; torn: drop a last line that a kill cut."""
    content = Path(path).read_bytes()
    if content[:4] == b"PAR1":
        raise UserError(f"{path}: parquet; give what Dataset.from_parquet(...).to_json(...) writes")
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        content = content[: content.rfind(b"\n") + 1] if torn else content
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        return content.decode("utf-16" if utf16 else "utf-8").removeprefix("\ufeff")
    except Exception as error:  # gzip raises several kinds
        line = content.count(b"\n", 0, getattr(error, "start", 0)) + 1
        raise UserError(f"{path}:{line}: cannot be read ({error}); expected UTF-8") from None


def read_jsonl(path: str | Path, torn: bool = False) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", object) of a JSONL file or of one JSON array, or UserError."""
    text = read_text(path, torn)
    lines = text.split("\n")
    if text.lstrip()[:1] == "[":
        with contextlib.suppress(ValueError, RecursionError):  # the lines will say what is wrong
            lines = [json.dumps(row) for row in json.loads(text)]
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            # refuses what JSON or UTF-8 cannot hold: NaN, 1e999, a lone surrogate
            json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{i}: not a line of JSON in UTF-8 ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{i}: expected a JSON object")
        yield f"{path}:{i}", row


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: beside its name, then renamed."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: not a plain file, which could be replaced; name another")
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)  # left by a killed process with our id, or a planted link
    try:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_files(*paths: str | Path | None) -> None:
    """UserError if two of these are one file: what is read would be replaced, or counted twice."""
    places = [Path(path).resolve() for path in paths if path]
    if twice := [place for place in places if places.count(place) > 1]:
        raise UserError(f"{twice[0]}: this command names that file twice; name another")


def cache_folder() -> Path:
    """Where scores and locks are kept: $CRPO_CACHE, or ~/.cache/crpo."""
    return Path(os.environ.get("CRPO_CACHE") or os.path.expanduser("~/.cache/crpo"))


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Within this context no other command that shares our cache writes the path, or UserError."""
    lock = cache_folder() / "locks" / hashlib.sha256(os.path.realpath(path).encode()).hexdigest()
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            if os.environ.get("RANK", "0") == "0":  # torchrun's first process locks for all
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {path}: another command is writing it") from None
        except OSError:  # a disk without locks, as some clusters have
            pass
        yield


def jsonl(rows: Sequence[dict]) -> bytes:
    """A line for each row, in UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@dataclass
class Pair:
    """A preference: `chosen` is better than `rejected` as an answer to `prompt`."""

    prompt: Messages
    chosen: str
    rejected: str
    row: dict = field(repr=False)  # as it stands in the file, unknown columns included
    where: str  # file:line

    @property
    def task(self) -> str:
        return str(self.row.get("task", ""))


@dataclass
class Sample:
    """A response to a prompt; `score` is the human rating (10 to 50) if there is one."""

    prompt: Messages
    response: str
    row: dict = field(repr=False)
    where: str
    score: float = math.nan

    task = Pair.task


def fail(where: str, key: str, got, want: str) -> NoReturn:
    """Raise the UserError of a record that is wrong: where, what it holds, what is expected."""
    value = "missing" if got is None else json.dumps(got, ensure_ascii=False)[:60]
    raise UserError(f"{where}: {key!r} is {value}; expected {want}")


def check_text(value, key: str, where: str) -> str:
    """A non-blank string, or a UserError."""
    if not isinstance(value, str) or not value.strip():
        fail(where, key, value, "a non-empty string")
    turn = r"""['"](role|from)['"]\s*:\s*['"](system|user|human|assistant|gpt)\b"""
    if re.match(rf"\s*(array)?[\[({{].*?{turn}|\s*Human:.*\n\nAssistant:", value, re.DOTALL):
        fail(where, key, value, "a text, or a list of messages that is not printed as a text")
    return value


def check_number(value, key: str, where: str, low=-1e9, high=1e9) -> float:
    """A number in [low, high], perhaps in a cell of a CSV file, or a UserError."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if low <= float(value) <= high and not isinstance(value, bool):
            return float(value)
    fail(where, key, value, f"a number {low:g} to {high:g}" if high < 1e9 else "a number")


def parse_messages(value, key: str, where: str, role: str = "user") -> Messages:
    """A string is one turn of this role; a list of {"role", "content"} is a conversation."""
    if not value or not isinstance(value, list):
        return ((role, check_text(value, key, where)),)
    turns = [turn if isinstance(turn, dict) else {} for turn in value]
    key += ".content"
    return tuple((str(t.get("role")), check_text(t.get("content"), key, where)) for t in turns)


def parse_answer(row: dict, key: str, where: str) -> Item:
    """A prompt and its answer, which stands under `key`: a text, a turn, or the conversation."""
    turns = parse_messages(row.get(key), key, where, "assistant")
    if isinstance(row[key], str) or ("prompt" in row and key != "messages"):
        prompt = parse_messages(row.get("prompt"), "prompt", where)
        turns = turns if turns[: len(prompt)] == prompt else prompt + turns
    if row.get("system") and key != "messages" and turns[0][0] != "system":
        turns = (("system", check_text(row["system"], "system", where)), *turns)
    *prompt, (role, answer) = turns
    if role != "assistant":
        fail(where, f"role of the last turn of {key}", role, "assistant")
    roles = " ".join(role for role, _ in prompt)
    if not re.fullmatch("(system )?(user assistant )*user", roles):
        fail(where, "roles of the prompt", roles, "user and assistant by turns, the user last")
    return tuple(prompt), answer


# What others call our columns: preference data, and MuCE as its authors released it.
OTHER_NAMES = {
    "task": ["category", "TasksNamesFull"],
    "prompt": ["question", "instruction", "input", "Prompt", "FullPrompt"],
    "response": ["Response"],
    "score": ["facsco_grm_scaled"],
    "split": ["Set"],
    "language": ["Language"],
    "dataset": ["Dataset"],
    "label": ["RatingLabel"],
}


def read_csv(path: str | Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", cells that are not empty) of a CSV file with at least these columns."""
    text = read_text(path)
    delimiter = max(",;\t", key=next(filter(str.strip, io.StringIO(text, newline="")), "").count)
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        if missing := [name for name in columns if name not in (lines.fieldnames or ())]:
            raise ValueError(f"no column {missing[0]!r}")
        for row in lines:
            if None in row or None in row.values() or len(row) < len(lines.fieldnames):
                raise ValueError("expected as many cells as columns, each of another name")
            if cells := {k: cell for k, cell in row.items() if cell}:
                yield f"{path}:{lines.line_num}", cells
    except (csv.Error, ValueError) as error:
        number = max(1, lines.reader.line_num)
        raise UserError(f"{path}:{number}: not a line of CSV ({error})") from None


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The rows of a JSONL file, or of one in .csv, with our column names added to others'."""
    if Path(path).is_dir() or not Path(path).exists():
        remedy = "of a data set in a folder or on the hub give what its to_json(...) writes"
        raise UserError(f"{path}: no such file; {remedy}")
    table, where = re.search(r"\.[ct]sv(\.gz)?$", str(path).lower()), None
    for where, row in (read_csv if table else read_jsonl)(path):
        asked = [name for name in OTHER_NAMES["prompt"][:3] if row.get(name)]
        if len(asked) > 1 and "prompt" not in row:
            raise UserError(f"{where}: join {' and '.join(map(repr, asked))} into one 'prompt'")
        # NUL, or what begins a terminal's commands
        if control := re.search(r"(?<!\\)(?:\\\\)*\\u00(00|1b|9b)", json.dumps(row)):
            raise UserError(f"{where}: it holds the character U+00{control[1]}; remove it")
        names = [(ours, name) for ours, theirs in OTHER_NAMES.items() for name in theirs]
        yield where, {k: row[name] for k, name in names if row.get(name) not in (None, "")} | row
    if where is None:
        raise UserError(f"{path}: no records; expected one a line")


def read_preferences(path: str | Path) -> list[Pair]:
    """Read plain strings, or TRL's forms, with the prompt explicit or implicit."""
    pairs = []
    for where, row in read_rows(path):
        prompt, chosen = parse_answer(row, "chosen", where)
        other, rejected = parse_answer(row, "rejected", where)
        if prompt != other or chosen.strip() == rejected.strip():
            raise UserError(f"{where}: expected two different answers to the same prompt")
        keys = [k for k in ("score_chosen", "score_rejected") if row.get(k) is not None]
        values = [check_number(row[key], key, where) for key in keys]
        if values != sorted(values, reverse=True):
            fail(where, keys[0], row[keys[0]], f"no less than score_rejected, {values[1]:g}")
        pairs.append(Pair(prompt, chosen, rejected, row, where))
    return pairs


def read_samples(path: str | Path, rated: bool = False) -> list[Sample]:
    """Read rows with `prompt` and `response`, or `messages`; `rated` insists on a score."""
    samples = []
    for where, row in read_rows(path):
        item = parse_answer(row, "messages" if "messages" in row else "response", where)
        absent = row.get("score") is None and not rated
        score = math.nan if absent else check_number(row.get("score"), "score", where)
        samples.append(Sample(*item, row, where, score))
    return samples


def read_prompts(path: str | Path, *splits: str) -> dict[Messages, dict]:
    """Distinct prompts of any file, or of its rows of these splits, with their `task` and `id`."""
    rows, prompts = list(read_rows(path)), {}
    for split in {*splits} - {str(row.get("split")) for _, row in rows}:
        raise UserError(f"{path}: no prompt has split {split!r}; see its 'split' column")
    for where, row in rows:
        if splits and str(row.get("split")) not in splits:
            continue
        others = ("messages", "chosen") if "prompt" not in row else ()
        key = next((key for key in others if key in row), "answer")
        prompt, _ = parse_answer(row | {"answer": "-"}, key, where)  # any answer will do
        about = {"task": str(row.get("task", ""))} | {k: row[k] for k in ("id",) if k in row}
        prompts.setdefault(prompt, about)
    return prompts


# ---- Records -> table ----------------------------------------------------------------------------

# For a model without a chat template: BOS, the prompt, an empty line, the response, EOS.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n\n' }}{% endfor %}"
)
ANSWER = "zqxjk"  # stands where a response will
MARK = "\U0010fffe"  # parts what a person has typed, but would be a control token, an EOS say


class Encoder:
    """A tokenizer with its chat template, which alone adds BOS.

    A prompt ends where its response begins; a response ends with the token that closes the turn.
    """

    kwargs: ClassVar[dict] = {}  # of all templates

    @classmethod
    def template_kwargs(cls, text: str) -> dict:
        """The argparse type of --template-kwargs."""
        cls.kwargs = dict(json.loads(text))
        return cls.kwargs

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
        self.name = f"the chat template of {tokenizer.name_or_path}"
        added = tokenizer.added_tokens_decoder.values()
        names = [t.content for t in added if t.special or re.fullmatch("<[|｜].*[|｜]>", t.content)]
        self.control = re.compile("|".join(map(re.escape, filter(None, names))) or "(?!)")

    def mark(self, text: str) -> str:
        return self.control.sub(lambda typed: typed[0][0] + MARK + typed[0][1:], text)

    def render(self, messages: Messages, ask: bool = False) -> str:
        chat = [{"role": role, "content": self.mark(content)} for role, content in messages]
        options = {"chat_template": self.template, "add_generation_prompt": ask} | self.kwargs
        try:
            return self.tokenizer.apply_chat_template(chat, tokenize=False, **options)
        except Exception as error:  # a template is a program and may raise anything
            roles = [role for role, _ in messages]
            raise UserError(f"{self.name} refuses the roles {roles}: {error}") from None

    def head(self, prompt: Messages) -> str:
        """The text before a response: the generation prompt, and perhaps an empty thought."""
        head = self.render((*prompt, ("assistant", ANSWER))).rpartition(ANSWER)[0]
        ask = self.render(prompt, ask=True)
        for role, text in prompt:  # but for answers, whose thoughts some templates drop
            if role != "assistant" and self.mark(text.strip()) not in ask:
                raise UserError(f"{self.name} leaves out what the {role} says: {text:.60}")
        if not head.startswith(ask):
            raise UserError(f"{self.name} is not prefix-stable: an answer changes its prompt")
        return ask + head[len(ask) :].rstrip(" ")  # a space is part of the word behind it

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered texts; those parted by MARK are tokenised part by part."""
        parts = [text.split(MARK) for text in texts]
        flat = [part for some in parts for part in some]
        ids = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
        return [[i for _ in some for i in next(ids)] for some in parts]

    def responses(self, items: Sequence[Item], prompt_ids: list[list[int]]) -> list[list[int]]:
        """Token ids of each response: tokenised with its prompt, if the prompt's stay the same.

        Of what the template writes behind the answer, only the token that ends the turn counts.
        """
        heads = {p: self.head(p) for p in dict.fromkeys(prompt for prompt, _ in items)}
        tails, ends, eos = [], [], self.tokenizer.eos_token_id
        for prompt, answer in items:
            text = self.render((*prompt, ("assistant", answer)))
            tail, full = text.removeprefix(heads[prompt]), self.mark(answer)
            before, shown, after = tail.partition(full if full in tail else full.strip())
            if tail == text or not shown:
                where = f"the answer {answer[:60]!r} does not stand behind its prompt"
                raise UserError(f"{self.name} is not prefix-stable: {where}")
            end = self.control.search(after)
            tails.append(before + shown + (end[0] if end else ""))
            ends.append([] if end else [eos])
        if [eos] in ends and eos is None:
            raise UserError(f"the tokenizer of {self.tokenizer.name_or_path} has no EOS token")
        whole = [heads[prompt] + tail for (prompt, _), tail in zip(items, tails, strict=True)]
        columns = self.ids(whole), prompt_ids, self.ids(tails), ends
        return [
            (ids[len(prompt) :] if ids[: len(prompt)] == prompt else tail) + end
            for ids, prompt, tail, end in zip(*columns, strict=True)
        ]

    def stop_ids(self) -> list[int]:
        """The tokens that end a generated response: EOS and the template's end of turn."""
        probe = (("user", "a"),)
        ends = {self.responses([(probe, "b")], self.ids([self.head(probe)]))[0][-1]}
        return sorted(ends | ({self.tokenizer.eos_token_id} - {None}))


@dataclass
class Table:
    """Each distinct prompt of a data set, and each of its S distinct (prompt, response), once."""

    prompts: list[list[int]]  # token ids
    responses: list[list[int]]  # [S]
    prompt_of: list[int]  # [S]: the index of its prompt

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each response, with its prompt."""
        both = zip(self.prompt_of, self.responses, strict=True)
        return [len(self.prompts[p]) + len(ids) for p, ids in both]


def build_table(encoder: Encoder, items: list[Item], max_length: int) -> tuple[Table, list[int]]:
    """Encode (prompt, response) items; return the table and each item's index in it.

    Nothing is ever cut: an item of more than `max_length` tokens is dropped, with index -1.
    """
    keys = list(dict.fromkeys(items))
    number_of = {p: k for k, p in enumerate(dict.fromkeys(prompt for prompt, _ in keys))}
    prompts = encoder.ids([encoder.head(prompt) for prompt in number_of])
    prompt_of = [number_of[prompt] for prompt, _ in keys]
    responses = encoder.responses(keys, [prompts[p] for p in prompt_of])
    lengths = Table(prompts, responses, prompt_of).lengths
    fits = [s for s, length in enumerate(lengths) if length <= max_length]
    table = Table(prompts, *([column[s] for s in fits] for column in (responses, prompt_of)))
    index = {keys[s]: k for k, s in enumerate(fits)}
    return table, [index.get(item, -1) for item in items]


# ---- Table -> batch ------------------------------------------------------------------------------

LINEAR = 2048  # attention over this many columns costs about as much as a token's linear layers


@dataclass
class Batch:
    """One forward pass over S sequences in R rows of T tokens, N response tokens in all."""

    ids: torch.Tensor  # [R, T]
    positions: torch.Tensor  # [R, T]
    segment: torch.Tensor  # [R, T]: which a token belongs to (see `make_segments`); -1: padding
    response: torch.Tensor  # [R, T]: which sequence it belongs to; -1: a prompt
    predict: torch.Tensor  # [N]: the state that predicts a response token, as row * T + column
    targets: torch.Tensor  # [N]: the id of that token, sequence by sequence
    lengths: torch.Tensor  # [S]: the response tokens of each sequence
    share: bool  # whether segments hold several responses, which the mask must separate
    tokens: int  # of all segments

    def to(self, device: torch.device) -> "Batch":
        moved = {k: send(v, device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def mask(self) -> torch.Tensor:
        """[R, 1, T, T] bool, True where a token may look; [R, T] int64 where nothing is shared."""
        if not self.share:
            return (self.segment >= 0).long()
        T = self.ids.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool, device=self.ids.device).tril()
        mask = mask & (self.segment[:, :, None] == self.segment[:, None, :])
        prompt, reader = self.response[:, None, :], self.response[:, :, None]
        return (mask & ((prompt == -1) | (prompt == reader)))[:, None]


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; a copy to a GPU does not wait for what the GPU is computing."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def make_segments(
    table: Table, sequences: Sequence[int], share: bool, window: int
) -> list[tuple[int, list[int], int]]:
    """Prompts with some of their responses: (prompt, positions in `sequences`, tokens) of each.

    A segment has one response, or with `share` as many as pay: a long one pays for attention, a
    short one for its prompt of P tokens. A response token in a segment of L tokens costs
    L / (L - P) * (L + LINEAR), which is least at L = P + sqrt(P (P + LINEAR)).
    """
    segments = [(-1, [], 0)]
    for k in sorted(range(len(sequences)), key=lambda k: table.prompt_of[sequences[k]]):
        prompt = table.prompt_of[sequences[k]]
        P, N = len(table.prompts[prompt]), len(table.responses[sequences[k]])
        room = min(P + math.isqrt(P * (P + LINEAR)), window)
        before, members, length = segments[-1]
        if share and prompt == before and length + N <= room:
            segments[-1] = (prompt, [*members, k], length + N)
        else:
            segments.append((prompt, [k], P + N))
    return segments[1:]


def pack(lengths: list[int], window: int) -> list[list[int]]:
    """Put segments into rows of similar length, none longer than `window`; rows of indices.

    Few long rows pay for attention, many short ones for padding: the cheapest of six numbers.
    """
    cheapest, least = [[k] for k in range(len(lengths))], math.inf
    for stretch in (1, 1.25, 1.5, 2, 3, 4):
        R = math.ceil(sum(lengths) / min(stretch * max(lengths), window))
        rows: list[tuple[int, list[int]]] = [(0, []) for _ in range(R)]
        for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
            length, members = rows[0]  # longest first, each into the row that is shortest so far
            heapq.heapreplace(rows, (length + lengths[k], [*members, k]))
        T = max(length for length, _ in rows)
        packed = [members for _, members in rows if members]
        cost = len(packed) * T * (T + LINEAR)
        if window >= T and cost < least:
            cheapest, least = packed, cost
    return cheapest


def make_batch(table: Table, sequences: Sequence[int], share: bool, window: int) -> Batch:
    """Lay the given sequences of the table out as one forward pass.

    share=True: rows, of at most `window` tokens, hold several segments (see `pack`). share=False: a
    row is one prompt with one response, padded on the right, under the model's own causal mask.
    """
    segments = make_segments(table, sequences, share, window)
    lengths = [length for _, _, length in segments]
    rows = pack(lengths, max(window, *lengths)) if share else [[k] for k in range(len(segments))]

    R, T = len(rows), max(sum(lengths[k] for k in row) for row in rows)
    ids, positions = np.zeros((2, R, T), np.int64)
    segment, response = np.full((2, R, T), -1)
    targets = [table.responses[s] for s in sequences]
    predict: list[list[int]] = [[] for _ in sequences]
    for r, row in enumerate(rows):
        at = 0
        for k in row:
            prompt, members, length = segments[k]
            P = len(table.prompts[prompt])
            last = r * T + at + P - 1  # the prompt's last token predicts the first of each response
            segment[r, at : at + length] = k
            ids[r, at : at + P] = table.prompts[prompt]
            positions[r, at : at + P] = np.arange(P)
            at += P
            for member in members:
                N = len(targets[member])
                ids[r, at : at + N] = targets[member]
                positions[r, at : at + N] = np.arange(P, P + N)
                response[r, at : at + N] = member
                predict[member] = [last, *range(r * T + at, r * T + at + N - 1)]
                at += N
    flat = np.concatenate(predict), np.concatenate(targets), np.array(list(map(len, targets)))
    tensors = map(torch.from_numpy, (ids, positions, segment, response, *flat))
    return Batch(*tensors, share, sum(lengths))


def divide(table: Table, units: Sequence[Sequence[int]], parts: int) -> list[list[int]]:
    """Indices of units, by prompt and length, in parts of like size; the first is never empty."""
    sizes = np.array([sum(len(table.responses[s]) for s in unit) for unit in units])
    order = np.lexsort((-sizes, [table.prompt_of[unit[0]] for unit in units]))
    part = (sizes[order].cumsum() - sizes[order]) * parts // sizes.sum()
    return [order[part == r].tolist() for r in range(parts)]


def micro_batches(
    table: Table, units: Sequence, order: list[int], tokens: int, share: bool, window: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Split units of work, in this order, into forward passes of at most `tokens`, padding aside.

    A unit is what must be in one pass, however long: the sequences of a pair for the loss, or one
    to score. Yields (indices of the units, distinct sequences that they need).
    """

    def total(n):  # tokens of the next n units
        sequences = dict.fromkeys(s for u in order[:n] for s in units[u])
        return sum(length for *_, length in make_segments(table, [*sequences], share, window))

    while order:
        most = min(len(order), tokens)  # a unit adds a token or more
        taken = order[: max(1, bisect.bisect(range(1, most + 1), tokens, key=total))]
        yield taken, list(dict.fromkeys(s for u in taken for s in units[u]))
        order = order[len(taken) :]


def step_indices(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """A step's items, by (seed, step) alone: an epoch is a permutation, its last batch the rest."""
    epoch, k = divmod(step, math.ceil(n / batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[k * batch_size : (k + 1) * batch_size].tolist()


# ---- Raw ratings -> scores: a graded response model whose items are the raters -------------------

RATINGS = ("raters", "ratings", "rater", "rating")  # the columns of a raters' record
GROUP_BY = ("task", "dataset", "language")  # each combination has a scale of its own
MAX_CATEGORIES = 10  # a finer scale, such as a slider's, is cut into this many
SLOPE_MEAN, SLOPE_SD = 1.0, 2.0  # the prior of a rater's slope
NOISE = 0.35  # raters whose slope is lower are left out
FLOOR = 2  # a response keeps at least so many ratings when raters are dropped, or has no score

# Creativities theta [Q] and their log-weights [Q] under N(0, 1), by Gauss and Hermite: enough nodes
# for the narrow posterior of a response with 75 raters; those below 1e-10 are left out, so Q = 57.
nodes, weights = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(201))
weights /= weights.sum()
THETA, LOG_WEIGHT = nodes[weights > 1e-10], weights[weights > 1e-10].log()


def one_hot(rated: Sequence[dict[str, float]]) -> tuple[torch.Tensor, list[str]]:
    """[N, J, K], 1 where rater j gives response n their k-th category, else 0; the raters' names.

    A category is a value that the rater uses or, if there are too many, a tenth of all ratings.
    """
    names = list(dict.fromkeys(name for row in rated for name in row))
    response = np.repeat(np.arange(len(rated)), [len(row) for row in rated])
    rater = np.array([names.index(name) for row in rated for name in row], int)
    value = np.array([value for row in rated for value in row.values()])
    distinct, category, counts = np.unique(value, return_inverse=True, return_counts=True)
    if len(distinct) > MAX_CATEGORIES:
        middle = (counts.cumsum() - counts / 2) / len(value)
        category = (MAX_CATEGORIES * middle).astype(int)[category]
    uses = np.zeros((len(names), MAX_CATEGORIES), int)
    uses[rater, category] = 1
    ratings = torch.zeros(len(rated), len(names), max(2, *uses.sum(1)), dtype=torch.float64)
    ratings[response, rater, (uses.cumsum(1) - 1)[rater, category]] = 1
    return ratings, names


def joint_logps(ratings: torch.Tensor, slope: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
    """log P(a response's ratings, theta), of which the posterior is the softmax: [N, Q].

    ratings [N, J, K], slope [J], ascending cuts [J, K-1], of which a rater of C categories has C-1.
    """
    last = ratings.amax(0).sum(1, keepdim=True) - 1  # [J, 1]
    cuts = cuts.masked_fill(torch.arange(cuts.shape[1]) >= last, math.inf)
    above = torch.sigmoid(slope[:, None, None] * THETA - cuts[..., None])  # [J, K-1, Q]
    end = torch.ones_like(above[:, :1])
    P = torch.cat([end, above], 1) - torch.cat([above, 0 * end], 1)  # of each category [J, K, Q]
    return ratings.flatten(1) @ P.clamp(min=1e-12).log().flatten(0, 1) + LOG_WEIGHT  # never log 0


def fit_raters(ratings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slopes [J], negative if reversed, and cuts [J, K-1] of greatest marginal likelihood."""
    N, J, K = ratings.shape
    slope = torch.ones(J, dtype=torch.float64, requires_grad=True)
    first = torch.full((J, 1), 1 - K / 2, dtype=torch.float64, requires_grad=True)
    steps = torch.zeros(J, K - 2, dtype=torch.float64, requires_grad=True)  # their logarithms
    options = {"tolerance_grad": 1e-7, "tolerance_change": 1e-10, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([slope, first, steps], max_iter=500, **options)

    def cuts() -> torch.Tensor:
        return torch.cat([first, steps.exp()], 1).cumsum(1)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        prior = ((slope - SLOPE_MEAN) / SLOPE_SD).square() / 2
        value = (prior.sum() - joint_logps(ratings, slope, cuts()).logsumexp(1).sum()) / N
        value.backward()
        return value

    optimizer.step(loss)
    return slope.detach(), cuts().detach()


def score_responses(rated: Sequence[dict], where: str = "") -> tuple[torch.Tensor, list, float]:
    """Score N responses from {rater: rating} of each: fit, drop noisy raters, fit again.

    Returns the scores [N], 10 to 50, NaN where fewer than FLOOR ratings are left; the table of
    raters, of the first fit; and the reliability, the variance of the expected theta, where that of
    theta itself is 1. UserError if the scores are all alike.
    """
    check_codes([value for row in rated for value in row.values()], where)
    ratings, names = one_hot(rated)
    rates = ratings.sum(2)
    slope, cuts = fit_raters(ratings)
    slope = slope * (ratings.amax(0).sum(1) > 1)  # who gives one value alone tells nothing
    theta = joint_logps(ratings, slope, cuts).softmax(1) @ THETA  # the posterior mean [N]
    used = slope >= slope.sort(descending=True).values[:FLOOR][-1].clamp(max=NOISE)
    if not used.all():
        theta = joint_logps(ratings[:, used], *fit_raters(ratings[:, used])).softmax(1) @ THETA
    scored = rates[:, used].sum(1) >= rates.sum(1).clamp(max=FLOOR)
    low, high = theta[scored].aminmax() if scored.any() else (0, 0)
    if high - low < 1e-3:
        raise UserError(f"{where} no two responses can be told apart; leave out or join groups")
    score = torch.where(scored, 10 + 40 * (theta - low) / (high - low), math.nan)
    columns = (x.tolist() for x in (slope, rates.sum(0).long(), used))
    raters = [
        {"rater": name, "discrimination": round(a, 3), "rated": count, "kept": stays}
        for name, a, count, stays in zip(names, *columns, strict=True)
    ]
    return score, raters, float(theta[scored].var(correction=0))


def check_codes(values: Sequence[float], where: str) -> None:
    """UserError if some of these values stand apart, as codes of missing ones do: -9, 99, 999."""
    distinct, code = np.unique(values), "-1|-?(7+|8+|9+[678]?)"
    plain = [i for i, x in enumerate(distinct) if not re.fullmatch(code, f"{x:g}")]
    if plain and len(values) >= 12:  # fewer are often far apart
        below, rest, above = np.split(distinct, [plain[0], plain[-1] + 1])
        far = 8 * np.ptp(rest) or math.inf
        codes = [x for x in above if x - rest[-1] > far]
        codes += [x for x in below if x < 0 and (rest[0] > 0 or x < -distinct[-1])]
        if codes:
            raise UserError(f"{where} {codes[-1]:g} stands apart; leave what is missing blank")


def parse_ratings(row: dict, where: str, columns: Sequence[str] = ()) -> dict[str, float]:
    """{rater: rating} of a record with lists, a column a rater, or one rating; no missing ones."""
    if columns:
        raters, ratings = columns, [row.get(name) for name in columns]
    elif "rater" in row:
        raters, ratings = [row["rater"]], [row.get("rating")]
    else:
        raters, ratings = (row[k] if isinstance(row.get(k), list) else [] for k in RATINGS[:2])
    names = {str(rater) for rater in raters if isinstance(rater, str | int) and rater != ""}
    if not 0 < len(names) == len(raters) == len(ratings):
        want = "different names, as many as there are 'ratings'; or name their columns by --raters"
        fail(where, "raters", raters or None, want)
    given = {str(k): v for k, v in zip(raters, ratings, strict=True) if v is not None}
    return {k: check_number(v, f"rating of {k}", where) for k, v in given.items()}


def run_ratings(args: argparse.Namespace) -> None:
    """Write the rated rows and the table of raters; print a line for each group."""
    samples, groups, raters = read_samples(args.data), defaultdict(dict), []
    if len(args.raters) == 1:  # as one argument
        args.raters = args.raters[0].split()
    for column in args.raters:
        if not any(column in sample.row for sample in samples):
            raise UserError(f"{args.data}: no row has a column {column!r} (--raters)")
    for sample in samples:
        row, group = sample.row, tuple(str(sample.row.get(column, "")) for column in GROUP_BY)
        # a row a rating: those of one response belong together
        answer = (sample.prompt, sample.response) if "rater" in row else sample.where
        if rated := parse_ratings(row, sample.where, args.raters):
            _, others = groups[group].setdefault(answer, (sample, {}))
            if others.keys() & rated.keys():
                fail(sample.where, "rater", row["rater"], "one rating of a response by each")
            others |= rated
    print("responses    scored  raters  dropped  reliability  group")
    for group, members in groups.items():
        some, rated = zip(*members.values(), strict=True)
        name = " / ".join(filter(None, group)) or "all"
        where = f"{some[0].where}: in the group {name[:60]!r}, which begins here,"
        score, table, reliability = score_responses(rated, where)
        raters += [dict(zip(GROUP_BY, group, strict=True)) | row for row in table]
        for sample, x in zip(some, score.tolist(), strict=True):
            sample.score, sample.row["score"] = x, round(x, 3)
        good, dropped = (~score.isnan()).sum(), sum(not row["kept"] for row in table)
        print(f"{len(some):9,} {good:9,} {len(table):7,} {dropped:8,} {reliability:12.3f}  {name}")
    rows = [sample.row for sample in samples if not math.isnan(sample.score)]
    inputs = {*RATINGS, *args.raters}
    write_rows(args, [{k: v for k, v in row.items() if k not in inputs} for row in rows])
    write_file(args.out + ".raters.json", json.dumps(raters, ensure_ascii=False, indent=1) + "\n")


# ---- The paper's data sets, and the commands -----------------------------------------------------


def prompt_column(prompt: Messages) -> str | list[dict]:
    """A prompt as files hold it: one user turn as a string, more as a list of turns."""
    chat = [{"role": role, "content": content} for role, content in prompt]
    return chat[0]["content"] if len(chat) == 1 else chat


def make_pairs(samples: Sequence[Sample], min_gap: float = 5, max_pairs: int = 10) -> list[dict]:
    """The preference rows of MuCE-PREF's rule, as two loops over i < j."""
    groups: dict[tuple[str, Messages], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.task, sample.prompt].append(sample)
    rows = []
    for group in groups.values():
        score = np.array([sample.score for sample in group])
        text = np.array([sample.response for sample in group], object)
        left = np.full(len(group), max_pairs)
        for i, one in enumerate(group):
            gap, differ = np.abs(score[i + 1 :] - score[i]), text[i + 1 :] != text[i]
            fits = (gap >= min_gap) & (gap > 0) & differ & (left[i + 1 :] > 0)
            partners = i + 1 + np.flatnonzero(fits)[: left[i]]
            left[partners] -= 1
            left[i] -= len(partners)
            for two in (group[j] for j in partners):
                best, worst = (one, two) if one.score > two.score else (two, one)
                columns = ("task", "dataset", "language", "label")
                row = {key: best.row[key] for key in columns if key in best.row}
                row |= {"prompt": prompt_column(best.prompt)}
                row |= {"chosen": best.response, "rejected": worst.response}
                rows.append(row | {"score_chosen": best.score, "score_rejected": worst.score})
    return rows


def print_stats(path: str, against: str | None = None) -> None:
    """Tables 2 and 3 of the paper for any file; then the prompts that `against` has too: leaks."""
    pairs = any("chosen" in row for _, row in read_rows(path))
    records = read_preferences(path) if pairs else read_samples(path)
    tasks: dict[str, list] = defaultdict(list)
    for record in records:
        tasks[record.task or "(no task)"].append(record)
    width, kind = max(map(len, (*tasks, "total"))), "pairs" if pairs else "samples"
    print(f"{'task':{width}}   prompts  {kind:>8}")
    for task, members in (*tasks.items(), ("total", records)):
        prompts = {(record.task, record.prompt) for record in members}
        print(f"{task:{width}}{len(prompts):10,}{len(members):10,}")
    if against:  # whatever their case and punctuation
        mine, theirs = read_prompts(path), read_prompts(against)
        words = {p: str([re.findall(r"\w+", t.lower()) for _, t in p]) for p in mine | theirs}
        others = {words[prompt] for prompt in theirs}
        shared = [prompt for prompt in mine if words[prompt] in others]
        print(f"{len(shared):,} of the {len(mine):,} prompts are in {against} too")
        for prompt in shared[:5]:
            print(f"  {prompt[-1][1][:90]!r}")


def select_samples(args: argparse.Namespace) -> list[Sample]:
    """The rated responses that the flags leave. UserError: none has a value that they name."""
    samples = read_samples(args.data, rated=True)
    scale = [sample.score for sample in samples]
    check_codes(scale, f"{args.data}: the score")
    print(f"{len(samples):14,} rated responses, scored {min(scale):g} to {max(scale):g}")
    for column, wanted in ("split", args.split), ("language", args.languages):
        values = [str(sample.row.get(column, "")) for sample in samples]
        for name in {*(wanted or ())} - {*values}:
            raise UserError(f"{args.data}: no {column} is {name!r}; there is {sorted({*values})}")
        samples = [s for s, v in zip(samples, values, strict=True) if v in (wanted or values)]
    good = [sample for sample in samples if sample.score >= args.min_score]
    print(f"{len(good):14,} of those {len(samples):,} score {args.min_score:g} or more")
    return good


def run_pairs(args: argparse.Namespace) -> None:
    write_rows(args, make_pairs(select_samples(args), args.min_gap, args.max_pairs))


def run_sft(args: argparse.Namespace) -> None:
    columns = ("task", "prompt", "response", "messages", "score")
    rows = [sample.row | {"score": sample.score} for sample in select_samples(args)]
    write_rows(args, [{key: row[key] for key in columns if key in row} for row in rows])


def write_rows(args: argparse.Namespace, rows: list[dict]) -> None:
    if not rows:
        raise UserError(f"{args.data}: no row is left; for pairs, lower --min-score or --min-gap")
    write_file(args.out, jsonl(rows))
    print(f"{plural(len(rows), 'record')} in {args.out}")
    print_stats(args.out)


def main() -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, call: Callable, what: str, out: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what)
        command.set_defaults(call=call)
        flag(command, "--data", ..., "JSONL or CSV file to read")
        if out:
            flag(command, "--out", ..., "JSONL file to write")
        return command

    command = add("ratings", run_ratings, "factor scores from raw ratings (Judge Response Theory)")
    flag(command, "--raters", [], "columns that hold the ratings of one rater each")

    pairs = add("pairs", run_pairs, "preference pairs from rated responses (MuCE-PREF's rule)")
    examples = add("sft", run_sft, "SFT examples from rated responses (MuCE-SFT's rule)")
    for command, lowest in (pairs, 20.0), (examples, 30.0):
        flag(command, "--split", None, "only rows of these splits, e.g. Training", nargs="+")
        flag(command, "--languages", None, "only these languages, e.g. English", nargs="+")
        flag(command, "--min-score", lowest, "lowest score to use", number(float, -1e9))
    flag(pairs, "--min-gap", 5.0, "least difference of the two scores", number(float, 0))
    flag(pairs, "--max-pairs", 10, "most pairs a response may stand in", number(int, 1))

    command = add("stats", lambda args: print_stats(args.data, args.against), "counts", out=False)
    flag(command, "--against", None, "another file: which prompts are in both")
    args = parser.parse_args()
    check_files(args.data, *([args.out, f"{args.out}.raters.json"] if "out" in args else ()))
    args.call(args)


if __name__ == "__main__":
    run(main)
