"""eval.py generate: decodings, a file that can be gone on with, two processes, an endpoint.

What a model draws is tested in test_eval.py; here, what becomes of it.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import forked
import pytest
import torch

import data
import eval as evaluation
import scores
from data import UserError

PROMPTS = [
    {"task": "Uses", "prompt": "A use for a brick, a clock and a wall?", "split": "Training"},
    {"task": "Uses", "prompt": "A use for a wall?", "split": "HeldoutItem"},
    {"task": "Metaphors", "prompt": "What is boredom to a clock?", "split": "HeldoutTask"},
    {
        "task": "Metaphors",
        "prompt": [
            {"role": "system", "content": "Answer in a rhyme."},
            {"role": "user", "content": "Joy?"},
        ],
        "split": "HeldoutTask",
    },
    {"task": "Lies", "prompt": "Poker?", "split": "HeldoutTask"},
]
TEXTS = [row["prompt"] for row in PROMPTS]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the prompts in a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return tmp_path


@pytest.fixture
def argv(folder, checkpoints):
    """The command line of 4 short samples of each prompt, prompt by prompt."""
    flags = ["--model", checkpoints("llama"), "--prompts", "prompts.jsonl", "--out", "out.jsonl"]
    flags += ["--samples", "4", "--max-new-tokens", "5", "--batch-size", "4"]
    return ["eval.py", "generate", *flags]


@pytest.fixture
def run(monkeypatch, folder):
    """run(argv) calls the command in this process; the bytes of the file it writes."""

    def call(argv, *flags):
        monkeypatch.setattr(sys, "argv", [*argv, *map(str, flags)])
        evaluation.main()
        return (folder / "out.jsonl").read_bytes()

    return call


def rows_of(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]


# --------------------------------------------------------------------------------------------------
# Which rows
# --------------------------------------------------------------------------------------------------


def test_decodings_share_the_samples_and_are_written_whole(run, argv):
    decodings = ["t=0", "t=1.5,k=7,min_p=0.1", "p=0.5"]
    rows = rows_of(run(argv, "--samples", 6, "--seed", 7, "--decoding", *decodings))
    keys = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "seed", "samples")
    settings = [(0, 1, 0, 0), (1.5, 1, 7, 0.1), (1, 0.5, 0, 0)]
    expected = [(*s, 5, 7, 6) for s in settings for _ in range(2)]
    for text in TEXTS:
        own = [row for row in rows if row["prompt"] == text]
        assert [tuple(row["decoding"][key] for key in keys) for row in own] == expected
        assert own[0]["response"] == own[1]["response"]  # greedy


def test_each_decoding_reaches_its_own_draws(run, argv, monkeypatch):
    """Of two prompts in one batch: the settings of the first tokens that are drawn."""
    seen, draw = [], evaluation.draw

    def told(logits, noise, *settings):
        seen.append(torch.stack(settings, 1))
        return draw(logits, noise, *settings)

    monkeypatch.setattr(evaluation, "draw", told)
    decodings = ["t=0.7,p=0.9,k=5,min_p=0.1", "t=2", "t=0,k=9", "t=0.5,p=0.3"]
    run(argv, "--batch-size", 8, "--decoding", *decodings)
    expected = [(0.7, 0.9, 5, 0.1), (2, 1, 0, 0), (0, 1, 1, 0), (0.5, 0.3, 0, 0)] * 2
    assert torch.allclose(seen[0], torch.tensor(expected), atol=1e-5)


def test_a_name_stands_for_several_runs(run, argv, checkpoints):
    rows = rows_of(run(argv, "--name", "CrPO"))
    assert {(row["model"], row["run"]) for row in rows} == {("CrPO", checkpoints("llama"))}


def test_prompts_of_several_splits(run, argv):
    rows = rows_of(run(argv, "--split", "Training", "HeldoutItem"))
    assert [row["prompt"] for row in rows] == [TEXTS[1]] * 4 + [TEXTS[0]] * 4  # the shorter first


REFUSED = {
    "--decoding t=1,x=2": r"argument --decoding: 'x=2': expected t=, p=, k= or min_p= and a number",
    "--decoding t": r"argument --decoding: '' is not float from 0 to 100",
    "--decoding t=-1": r"argument --decoding: '-1' is not float",
    "--decoding t=nan": r"argument --decoding: 'nan' is not float",
    "--decoding p=0": r"argument --decoding: '0' is not float",
    "--decoding p=1.5": r"argument --decoding: '1.5' is not float",
    "--decoding k=1.5": r"argument --decoding: '1.5' is not int at least 0",
    "--decoding min_p=2": r"argument --decoding: '2' is not float from 0 to 1",
    "--decoding t=1 t=2 t=3": r"--samples 4: expected a multiple of 3, the number of decodings",
    "--out prompts.jsonl --overwrite": r"prompts.jsonl: this command names that file twice",
    "--split Training Tset": r"prompts.jsonl: no prompt has split 'Tset'; see its 'split' column",
    "--resume --overwrite": r"argument --overwrite: not allowed with argument --resume",
    "--endpoint http://localhost/v1 --adapter a": r"--adapter: not with --endpoint",
    "--endpoint localhost:8000": r"argument --endpoint: expected an address such as https://",
    "--endpoint ftp://host/v1": r"argument --endpoint: expected an address",
    "--endpoint http:///v1": r"argument --endpoint: expected an address",
    "--endpoint https://key@host/v1": r"argument --endpoint: .* and no key in it",
    "--endpoint https://host/v1?key=k": r"argument --endpoint: .* and no key in it",
    "--endpoint http://localhost:99999/v1": r"argument --endpoint: expected an address",
    "--concurrency 0": r"argument --concurrency: '0' is not int at least 1",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_is_refused_leaves_everything_as_it_was(run, argv, folder, flags):
    before = (folder / "prompts.jsonl").read_bytes()
    with pytest.raises(UserError, match=REFUSED[flags]):
        run(argv, *flags.split())
    assert not (folder / "out.jsonl").exists()
    assert (folder / "prompts.jsonl").read_bytes() == before


def test_several_processes_do_not_ask_a_server(run, argv, monkeypatch):
    monkeypatch.setattr(scores, "processes", lambda: (0, 2))
    with pytest.raises(UserError, match="--endpoint: one process asks it; raise --concurrency"):
        run(argv, "--endpoint", "http://localhost/v1")


# --------------------------------------------------------------------------------------------------
# Going on
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch):
    """The lengths of the prompts of each batch that is drawn."""
    found, sample = [], evaluation.sample

    def told(lm, ids, *args):
        found.append([len(row) for row in ids])
        return sample(lm, ids, *args)

    monkeypatch.setattr(evaluation, "sample", told)
    return found


def test_a_file_cut_anywhere_is_gone_on_with_to_the_same_bytes(run, argv, folder, batches):
    """Cut behind the 3rd of 4 rows of a prompt they are drawn again; behind the 4th they are not.

    The 5 prompts are 5 batches, shortest first. A cut within a row leaves the rows before it.
    """
    whole = run(argv)
    assert len(rows_of(whole)) == 20 and len(batches) == 5
    every, ends = list(batches), [m.end() for m in re.finditer(b"\n", whole)]
    cuts = [(0, 0), (5, 0), (ends[2], 0), (ends[3], 1), (ends[3] + 1, 1), (ends[4], 1)]
    cuts += [(ends[9] - 1, 2), (ends[10] + 30, 2), (ends[18], 4), (len(whole) - 1, 4)]
    for cut, done in [*cuts, (len(whole), 5)]:
        (folder / "out.jsonl").write_bytes(whole[:cut])
        batches.clear()
        assert run(argv, "--resume") == whole
        assert batches == every[done:], cut


def test_blank_responses_make_no_difference_to_where_it_goes_on(run, argv, folder, monkeypatch):
    """The first sample of each prompt is blank, and every sample of the second prompt."""
    sample = evaluation.sample
    lm, _ = scores.load_with_adapter(argv[3], None, scores.pick_dtype("auto"))
    lengths = sorted(map(len, lm.encoder.prompts(list(data.read_prompts("prompts.jsonl")))))
    assert len(set(lengths)) == 5

    def gappy(lm, ids, *args):
        drawn = sample(lm, ids, *args)
        return [
            [] if k % 4 == 0 or len(ids[k // 4]) == lengths[1] else drawn[k]
            for k in range(4 * len(ids))
        ]

    monkeypatch.setattr(evaluation, "sample", gappy)
    whole = run(argv, "--batch-size", 8)
    assert len(rows_of(whole)) == 4 * 3
    for cut in (m.end() for m in re.finditer(b"\n", whole)):
        (folder / "out.jsonl").write_bytes(whole[: cut + 9])
        assert run(argv, "--batch-size", 8, "--resume") == whole


def test_a_finished_file_is_left_as_it_is_and_needs_no_answer(run, argv, folder, batches, capsys):
    run(argv)
    before = (folder / "out.jsonl").stat()
    batches.clear()
    run(argv, "--resume")
    after = (folder / "out.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert batches == []
    assert "resume      5 prompts of out.jsonl are done" in capsys.readouterr().out


def test_more_prompts_join_those_that_are_done(run, argv, batches):
    """Two of the five first; the others follow, shortest first, each response what it was."""
    whole = run(argv)
    some = run(argv, "--overwrite", "--split", "Training", "HeldoutItem")
    batches.clear()
    more = run(argv, "--resume")
    assert more.startswith(some) and len(batches) == 3
    assert sorted(more.splitlines()) == sorted(whole.splitlines())


CHANGED = {
    "--name other": "'model' is ",
    "--model tiny": "'model' is ",
    "--seed 7": "'decoding' is ",
    "--max-new-tokens 4": "'decoding' is ",
    "--samples 8": "'decoding' is ",
    "--decoding t=1": "'decoding' is ",
    "--split HeldoutItem Training": "'prompt' is ",
}


@pytest.mark.parametrize("flags", CHANGED)
def test_a_file_of_other_flags_is_refused_and_kept(run, argv, folder, flags):
    """The shortest prompt comes first, in line 1, and is of none of these two splits."""
    whole = run(argv)
    with pytest.raises(
        UserError, match=f"^out.jsonl:1: {CHANGED[flags]}.* the file was begun with"
    ):
        run(argv, "--resume", *flags.split())
    assert (folder / "out.jsonl").read_bytes() == whole


def test_rows_of_a_prompt_are_in_the_order_of_its_decodings(run, argv, folder):
    """As many samples of the same decodings, in another order: the second row shows it."""
    whole = run(argv, "--decoding", "t=0", "t=1")
    with pytest.raises(UserError, match=r"^out\.jsonl:3: 'decoding' is "):
        run(argv, "--resume", "--decoding", "t=1", "t=0")
    assert (folder / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"precious\n", r"out.jsonl:1: not a line of JSON"),
        (b"precious", r"--resume out.jsonl: its last line was not begun by generate"),
        (b'{"prompt": "x", "response": "y"}\n', r"out.jsonl:1: 'model' is null, which this"),
        (b'{"model": "x"}\n', r"out.jsonl:1: 'prompt' is missing"),
    ],
)
def test_a_file_of_another_program_is_refused_and_kept(run, argv, folder, content, message):
    (folder / "out.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(argv, "--resume")
    assert (folder / "out.jsonl").read_bytes() == content


def test_what_is_replaced_stays_until_there_is_something_to_replace_it_with(
    run, argv, folder, monkeypatch
):
    whole = run(argv)

    def out_of_memory(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(evaluation, "sample", out_of_memory)
    with pytest.raises(RuntimeError):
        run(argv, "--overwrite")
    assert (folder / "out.jsonl").read_bytes() == whole


def killed_at(n: int):
    """The process kills itself in the middle of the n-th write to the file."""

    def prepare():
        turn, append = 0, data.append_jsonl

        def deadly(path, *rows):
            nonlocal turn
            turn += 1
            if turn == n:
                content = data.jsonl(rows).encode()
                with open(path, "ab") as file:
                    file.write(content[: len(content) * 2 // 3])
                os.kill(os.getpid(), signal.SIGKILL)
            append(path, *rows)

        data.append_jsonl = deadly

    return prepare


def test_killed_and_killed_again_it_ends_as_if_nothing_had_been(run, argv, folder):
    whole = run(argv)
    (folder / "out.jsonl").unlink()
    for n in (1, 2, 2):
        assert forked.run(folder, [*argv, "--resume"], killed_at(n)) == -signal.SIGKILL
        left = (folder / "out.jsonl").read_bytes()
        assert not left.endswith(b"\n") and whole.startswith(left)
    assert len(rows_of(left.rpartition(b"\n")[0])) >= 2 * 4  # what the first two have written
    assert forked.run(folder, [*argv, "--resume"]) == 0, forked.said(folder)
    assert (folder / "out.jsonl").read_bytes() == whole


# --------------------------------------------------------------------------------------------------
# Two processes
# --------------------------------------------------------------------------------------------------


def logged():
    """Each batch that a process draws goes into a file of that process."""
    sample = evaluation.sample

    def told(lm, ids, *args):
        with open(f"drawn-{scores.processes()[0]}", "a") as file:
            print(len(ids), file=file)
        return sample(lm, ids, *args)

    evaluation.sample = told


def test_two_processes_write_the_file_of_one(run, argv, folder):
    """Five batches of one prompt are three and two. Then the file is cut, and they go on."""
    whole = run(argv)
    (folder / "out.jsonl").unlink()
    assert forked.run_two(folder, argv, logged) == [0, 0], forked.said(folder, "said-0")
    assert (folder / "out.jsonl").read_bytes() == whole
    assert [len((folder / f"drawn-{rank}").read_text().split()) for rank in "01"] == [3, 2]
    assert forked.said(folder, "said-0").count("saved out.jsonl: 5 prompts, 0 blank") == 1
    assert "saved" not in forked.said(folder, "said-1")

    (folder / "out.jsonl").write_bytes(whole[: len(whole) // 2])
    assert forked.run_two(folder, [*argv, "--resume"], logged) == [0, 0]
    assert (folder / "out.jsonl").read_bytes() == whole
    assert [len((folder / f"drawn-{rank}").read_text().split()) for rank in "01"] == [5, 3]


# --------------------------------------------------------------------------------------------------
# An endpoint
# --------------------------------------------------------------------------------------------------

KEY = "sk-secret-0123456789"


def completion(text) -> dict:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def serve():
    """serve(answer) starts a server; answer(body, turn) gives (status, JSON or bytes, headers).

    turn: how often this body has come before. Of what it gives None drops the connection.
    """
    servers = []

    def start(answer):
        requests, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                with lock:
                    turn = sum(request.body == body for request in requests)
                    requests.append(
                        SimpleNamespace(path=self.path, headers=self.headers, body=body)
                    )
                given = answer(body, turn)
                if given is None:
                    return
                status, content, headers = (*given, {})[:3]
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(content), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                requests.append(SimpleNamespace(path=self.path, headers=self.headers, body=None))
                self.send_error(404)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

        server = Server(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *args: None  # who asked has gone
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return SimpleNamespace(url=url, requests=requests)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def asking(argv, monkeypatch):
    """asking(server) is the command line that asks it; the key is set, pauses are short."""
    monkeypatch.setattr(evaluation, "PAUSE", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    return lambda server: [*argv[:3], "gpt-x", *argv[4:], "--endpoint", server.url]


def echo(body, turn=0):
    """An answer that tells its request from every other one."""
    return 200, completion(f"{body['messages'][-1]['content']} {body['seed']}")


def test_the_requests_and_the_file(run, asking, serve):
    """Seeds are 42 * 4 + the sample's number. What a decoding leaves off is not sent."""
    server = serve(echo)
    decodings = ["t=0.7,p=0.95", "t=0,k=50", "t=1.5,min_p=0.1", "p=0.5"]
    rows = rows_of(run(asking(server), "--decoding", *decodings))
    settings = [(0.7, 0.95, 0, 0), (0, 1, 50, 0), (1.5, 1, 0, 0.1), (1, 0.5, 0, 0)]
    sent = [
        {"temperature": 0.7, "top_p": 0.95, "seed": 168},
        {"temperature": 0, "top_k": 50, "seed": 169},
        {"temperature": 1.5, "min_p": 0.1, "seed": 170},
        {"temperature": 1, "top_p": 0.5, "seed": 171},
    ]
    expected = []
    for text in TEXTS:
        chat = [{"role": "user", "content": text}] if isinstance(text, str) else text
        expected += [{"model": "gpt-x", "messages": chat, "max_tokens": 5} | own for own in sent]
    bodies = [request.body for request in server.requests]
    assert len(bodies) == 20 and all(body in bodies for body in expected)
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    assert [row["prompt"] for row in rows] == [text for text in TEXTS for _ in range(4)]
    assert [row["task"] for row in rows] == [row["task"] for row in PROMPTS for _ in range(4)]
    assert {(row["model"], row["run"]) for row in rows} == {("gpt-x", "gpt-x")}
    for row, body, setting in zip(rows, expected, settings * 5, strict=True):
        assert row["response"] == echo(body)[1]["choices"][0]["message"]["content"]
        own = dict(zip(("temperature", "top_p", "top_k", "min_p"), setting, strict=True))
        assert row["decoding"] == own | {"max_new_tokens": 5, "seed": 42, "samples": 4}


def test_a_key_goes_into_its_header_alone_and_no_other_is_taken(
    run, asking, serve, monkeypatch, capsys
):
    """Without the variable no key is sent, not even that of the Hugging Face hub."""
    server = serve(echo)
    content = run(asking(server))
    assert KEY not in content.decode() + "".join(capsys.readouterr())
    for request in server.requests:
        named = {name for name, value in request.headers.items() if KEY in value}
        assert named == {"Authorization"} and KEY not in str(request.body) + request.path
    server.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    for absent in (monkeypatch.delenv, lambda name: monkeypatch.setenv(name, " ")):
        absent("OPENAI_API_KEY")
        run(asking(server), "--overwrite")
    assert len(server.requests) == 40
    assert all(request.headers["Authorization"] is None for request in server.requests)
    assert not any("hf_token" in str(request.headers) for request in server.requests)


@pytest.mark.parametrize("key", [f"{KEY}\nHost: x", "schlüssel"])
def test_a_key_that_is_none_is_not_shown(run, asking, serve, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY: it holds what no key does") as told:
        run(asking(serve(echo)))
    assert KEY not in str(told.value)


FAULTS = {
    "busy": (429, {"error": {"message": "slow down"}}, {"Retry-After": 0}),
    "broken": (500, b"<html>"),
    "away": (503, b""),
    "late": (408, b""),
    "at odds": (409, b""),
    "dropped": None,
    "cut short": (200, b"{", {"Content-Length": 100}),
    "malformed": (200, b'{"choices": [{"mess'),
    "nested": (200, b"[" * 100_000),
    "no choices": (200, {"choices": []}),
    "a list": (200, [1]),
    "no text": (200, completion([{"type": "text"}])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_a_server_fails_is_made_again(run, asking, serve, fault):
    """Every request fails once: the file is that of a server that never fails."""
    whole = run(asking(serve(echo)))
    server = serve(lambda body, turn: echo(body) if turn else FAULTS[fault])
    assert run(asking(server), "--overwrite") == whole
    assert len(server.requests) == 40
    assert set(Counter(json.dumps(request.body) for request in server.requests).values()) == {2}


def test_a_timeout_is_a_fault_too(run, asking, serve, monkeypatch):
    monkeypatch.setattr(evaluation, "TIMEOUT", 0.2)

    def slow_once(body, turn):
        time.sleep(0 if turn else 0.6)
        return echo(body)

    server = serve(slow_once)
    assert len(rows_of(run(asking(server), "--split", "Training"))) == 4
    assert len(server.requests) == 8


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("busy", "HTTP 429: slow down"),
        ("broken", "HTTP 500: <html>"),
        ("malformed", 'HTTP 200: {"choices": [{"mess'),
    ],
)
def test_a_server_that_keeps_failing_is_given_up(
    run, asking, serve, monkeypatch, capsys, fault, message
):
    """After so many tries; those of the next request may have begun."""
    monkeypatch.setattr(evaluation, "TRIES", 3)
    server = serve(lambda body, turn: FAULTS[fault])
    with pytest.raises(UserError) as told:
        run(asking(server), "--concurrency", 1)
    assert str(told.value) == f"--endpoint {server.url}: no answer in 3 tries; {message}"
    assert f"no answer so far, trying on: {message}" in capsys.readouterr().err
    first = [request for request in server.requests if request.body == server.requests[0].body]
    assert len(first) == 3


def test_a_server_that_is_not_there_is_told(run, asking, monkeypatch):
    monkeypatch.setattr(evaluation, "TRIES", 2)
    nowhere = SimpleNamespace(url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"no answer in 2 tries; .*Connection refused"):
        run(asking(nowhere))


def test_a_pause_doubles_and_is_at_least_what_the_server_asks(monkeypatch):
    """Between half and all of 1, 2, 4, ... seconds, at most 60; a number, a date, or nonsense."""
    for turn, top in enumerate((1, 2, 4, 8, 16, 32, 60, 60)):
        pauses = [evaluation.pause(turn, "") for _ in range(200)]
        assert top / 2 <= min(pauses) < 0.6 * top and 0.9 * top < max(pauses) <= top
    assert evaluation.pause(0, "30") == 30
    assert 28 < evaluation.pause(0, formatdate(time.time() + 30, usegmt=True)) <= 30
    assert evaluation.pause(0, "9" * 400) == 3600
    for after in ("0", "soon", "-5", "nan", formatdate(time.time() - 30, usegmt=True)):
        assert 0.5 <= evaluation.pause(0, after) <= 1


def test_the_wait_is_what_retry_after_says(run, asking, serve, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "pause", lambda *args: asked.append(args) or 0.3)
    began, busy = time.perf_counter(), (429, b"", {"Retry-After": 17})
    run(asking(serve(lambda body, turn: busy if turn < 2 else echo(body))), "--split", "Training")
    assert sorted(asked) == [(0, "17")] * 4 + [(1, "17")] * 4
    assert time.perf_counter() - began > 0.6


REFUSALS = {
    "OpenAI's": (401, {"error": {"message": f"No such key:\n {KEY}"}}, "HTTP 401: No such key: "),
    "Gemini's": (400, [{"error": {"message": "Bad model"}}], "HTTP 400: Bad model"),
    "Ollama's": (404, {"error": "No model"}, 'HTTP 404: {"error": "No model"}'),
    "FastAPI's": (422, {"detail": "No field"}, 'HTTP 422: {"detail": "No field"}'),
    "a page": (404, b"<p>\nNot \xff\nfound", "HTTP 404: <p> Not \ufffd found"),
    "a long one": (403, b"x" * 290 + KEY.encode() * 9, "HTTP 403: xxx"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_ends_in_one_sentence_without_the_key(run, asking, serve, folder, case):
    """At once: the requests that would follow are not made. The file there was is not replaced."""
    status, content, message = REFUSALS[case]
    server = serve(lambda body, turn: time.sleep(0.05) or (status, content))
    (folder / "out.jsonl").write_text("precious\n")
    with pytest.raises(UserError) as told:
        run(asking(server), "--overwrite", "--concurrency", 2)
    said = str(told.value)
    assert said.startswith(f"--endpoint {server.url}: {message}")
    assert KEY[:9] not in said and "\n" not in said and len(said) < 400
    assert len(server.requests) < 20
    assert (folder / "out.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_take_the_key_elsewhere(run, asking, serve, status):
    other = serve(echo)
    server = serve(lambda body, turn: (status, b"", {"Location": f"{other.url}/chat/completions"}))
    with pytest.raises(UserError, match=f"HTTP {status}: $"):
        run(asking(server))
    assert other.requests == []


@pytest.mark.parametrize("concurrency", [1, 5])
def test_so_many_requests_are_under_way_at_a_time(run, asking, serve, concurrency):
    """20 requests in whole rounds of 5, or 1: a round is answered when all of it has arrived."""
    round_full = threading.Barrier(concurrency, timeout=5)
    now, most, lock = 0, 0, threading.Lock()

    def answer(body, turn):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        round_full.wait()
        time.sleep(0.01)  # one more would arrive meanwhile
        with lock:
            now -= 1
        return echo(body)

    run(asking(serve(answer)), "--concurrency", concurrency)
    assert most == concurrency


def test_answers_are_written_as_they_come_in_the_order_of_the_prompts(run, asking, serve, folder):
    """The first prompt is answered after the second, the last one when the file has begun."""
    second_is_here, out = threading.Event(), folder / "out.jsonl"

    def answer(body, turn):
        text = body["messages"][-1]["content"]
        if text == TEXTS[0]:
            assert second_is_here.wait(5)
        if text == TEXTS[1]:
            second_is_here.set()
        while text == TEXTS[-1] and not (out.exists() and out.read_bytes()):
            time.sleep(0.01)
        return echo(body)

    content = run(asking(serve(answer)), "--concurrency", 20)
    assert [row["prompt"] for row in rows_of(content)] == [t for t in TEXTS for _ in range(4)]


def test_blank_answers_and_what_no_file_may_hold(run, asking, serve, capsys):
    """Two blank ones of each prompt are left out; NUL and half of a surrogate pair go."""
    texts = [None, " \n", " a\0b ", "\ud83d!"]
    server = serve(lambda body, turn: (200, completion(texts[body["seed"] - 168])))
    rows = rows_of(run(asking(server)))
    assert [row["response"] for row in rows] == ["ab", "!"] * 5
    assert "5 prompts, 10 blank responses left out" in capsys.readouterr().out


def test_killed_and_resumed_it_asks_for_what_is_missing(run, asking, serve, folder):
    """Killed in the third prompt's rows: the first two are never asked for again."""
    whole = run(asking(serve(echo)))
    (folder / "out.jsonl").unlink()
    assert forked.run(folder, asking(serve(echo)), killed_at(3)) == -signal.SIGKILL
    assert whole.startswith((folder / "out.jsonl").read_bytes())
    server = serve(echo)  # to the other one, requests may still be on their way
    assert run(asking(server), "--resume") == whole
    asked = Counter(request.body["messages"][-1]["content"] for request in server.requests)
    assert asked == {TEXTS[2]: 4, "Joy?": 4, TEXTS[4]: 4}


def test_a_disk_that_refuses_ends_the_asking(run, asking, serve, monkeypatch):
    """After the first prompt nothing more is asked for, but what was under way."""

    def full(path, *rows):
        raise UserError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(data, "append_jsonl", full)
    server = serve(lambda body, turn: time.sleep(0.05) or echo(body))
    with pytest.raises(UserError, match="No space left") as told:
        run(asking(server), "--concurrency", 2)
    time.sleep(0.6)  # enough for all of them
    assert told.tb  # as long as that is kept, nothing is cleaned up by itself
    assert 4 <= len(server.requests) < 20


def test_an_end_does_not_wait_for_pauses(run, asking, serve):
    """The second sample's request is to be made again in 20 s when the first one is refused."""

    def answer(body, turn):
        if body["seed"] > 168:
            return 503, b"", {"Retry-After": 20}
        time.sleep(0.2)
        return 401, b""

    began = time.perf_counter()
    with pytest.raises(UserError, match="HTTP 401"):
        run(asking(serve(answer)), "--concurrency", 2)
    assert time.perf_counter() - began < 10
