"""eval.py generate: what is drawn, a file that can be gone on with, two processes, an endpoint."""

import data
import eval as evaluation
import scores
import sft

import itertools
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import forked
import pytest
import torch
import transformers
from conftest import CONFIGS, LLAMA_LIKE, load_lm, make_checkpoint, read, write

TURNS = [{"role": "system", "content": "Answer in a rhyme."}, {"role": "user", "content": "Joy?"}]
PROMPTS = [
    {"task": "Uses", "prompt": "A use for a brick, a clock and a wall?", "split": "Training"},
    {"task": "Uses", "prompt": "A use for a wall?", "split": "HeldoutItem", "id": "wall-0"},
    {"task": "Metaphors", "prompt": "What is boredom to a clock?", "split": "HeldoutTask"},
    {"task": "Metaphors", "prompt": TURNS, "split": "HeldoutTask"},
    {"task": "Lies", "prompt": "Poker?", "split": "HeldoutTask"},
]
TEXTS = [row["prompt"] for row in PROMPTS]
GREEDY = evaluation.PLAIN | {"temperature": 0.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the prompts in a file."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "prompts.jsonl", PROMPTS)
    return tmp_path


@pytest.fixture
def flags(folder, checkpoints):
    """The command line of 4 short samples of each prompt, prompt by prompt."""
    flags = ["generate", "--model", checkpoints("llama"), "--prompts", "prompts.jsonl"]
    flags += ["--out", "out.jsonl", "--samples", "4", "--max-new-tokens", "5"]
    return [*flags, "--batch-tokens", "20"]


@pytest.fixture
def run(run_main, folder):
    """run(*flags) calls the command in this process; the bytes of the file it writes."""
    return lambda *flags: run_main("eval", *flags) and (folder / "out.jsonl").read_bytes()


def draw(lm, prompts, decodings, each=1, limit=5, tokens=10**6, seed=0, done=frozenset()):
    """The responses that `generate` yields, in its order."""
    args = SimpleNamespace(decoding=decodings, samples=each * len(decodings), seed=seed)
    args.max_new_tokens, args.batch_tokens = limit, tokens
    return list(evaluation.generate(lm, prompts, args, done))


def rows_of(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]


def scripted(folder, **follows):
    """A Llama that reads one token only: after `a` comes follows["a"], or one of several tokens.

    Its blocks are zero, its embeddings one-hot, its head a table of logits: 30, or 29, 28, ... for
    a second, third, ... token. The prompt is taken as it is; `<unk>` closes the assistant's turn.
    """
    template = "{% for m in messages %}{{ m.content }}"
    template += "{{ '<unk>' if m.role == 'assistant' }}{% endfor %}"
    sizes = {"hidden_size": 300, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**LLAMA_LIKE | sizes)
    make_checkpoint(folder, config, chat_template=template)
    lm = load_lm(str(folder), torch.float32)
    for parameter in lm.model.parameters():
        if parameter.dim() > 1:
            parameter.zero_()
    lm.model.get_input_embeddings().weight.copy_(torch.eye(300))
    for token, following in follows.items():
        (a,) = lm.encoder.ids([token])[0]
        for rank, text in enumerate(following.split("|")):
            (b,) = lm.encoder.ids([text])[0]
            lm.head[b, a] = (30 - rank) / 300**0.5  # the last norm scales a one-hot up
    lm.model.save_pretrained(folder)
    return str(folder)


def test_the_papers_decodings_and_columns(run, flags, tmp_path):
    model = scripted(tmp_path / "model", **{"?": "a", "a": "<eos>"})
    rows = rows_of(run(*flags, "--model", model, "--samples", 16))
    settings = [(0.7, 0.95, 0, 0), (0.9, 0.99, 0, 0), (0.7, 1.0, 50, 0), (0.8, 0.97, 0, 0)]
    common = {"max_new_tokens": 5, "seed": 42, "samples": 16, "batch_tokens": 20}
    made = [dict(zip(evaluation.PLAIN, s, strict=True)) | common for s in settings for _ in "1234"]
    assert len(rows) == 80
    for asked in PROMPTS:
        about = {"model": model, "run": model} | {k: asked[k] for k in asked if k != "split"}
        answers = [row for row in rows if row["prompt"] == asked["prompt"]]
        assert answers == [about | {"response": "a", "decoding": decoding} for decoding in made]


def test_given_decodings_a_name_and_splits(run, flags, checkpoints):
    """The longer prompt comes first."""
    decodings = ["--decoding", "t=0", "t=1.5,k=7,min_p=0.1", "p=0.5"]
    splits = ["--split", "Training", "HeldoutItem", "--name", "CrPO"]
    rows = rows_of(run(*flags, "--samples", 6, "--seed", 7, *decodings, *splits))
    assert [row["prompt"] for row in rows] == [TEXTS[0]] * 6 + [TEXTS[1]] * 6
    settings = [(0, 1, 0, 0), (1.5, 1, 7, 0.1), (1, 0.5, 0, 0)]
    for at, row in enumerate(rows):
        assert tuple(row["decoding"].values()) == (*settings[at % 6 // 2], 5, 7, 6, 20)
        assert (row["model"], row["run"]) == ("CrPO", checkpoints("llama"))
    assert rows[0]["response"] == rows[1]["response"]  # greedy


ASKED = [(("user", "brick " * n + "?"),) for n in (9, 1, 30, 4)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_likeliest_tokens_are_those_of_each_prompt_alone(checkpoints, name):
    """Prompts of several lengths in one batch; alone, one token after the other without a cache."""
    lm = load_lm(checkpoints(name), torch.float32)
    drawn = dict(draw(lm, ASKED, [GREEDY], each=2, limit=12))
    stop = lm.encoder.stop_ids()
    for k, prompt in enumerate(ASKED):
        ids = lm.encoder.ids([lm.encoder.head(prompt)])[0]
        new = []
        while len(new) < 12 and not (new and new[-1] in stop):
            logits = lm.model(torch.tensor([ids + new]), use_cache=False).logits[0, -1]
            if not new:
                logits[stop] = -torch.inf  # a response has at least one token
            new.append(logits.argmax().item())
        text = lm.encoder.tokenizer.decode(new, skip_special_tokens=True)
        assert drawn[k] == evaluation.tidy([text]) * 2


SETTINGS = ["t=0.7,p=0.95", "t=0.7,k=3", "t=2,k=4,p=0.8", "t=1.5,min_p=0.2", "t=1", "t=0"]


@pytest.mark.parametrize("decoding", SETTINGS)
def test_draws_have_the_distribution_of_the_decoding(tmp_path, decoding):
    """4,000 draws of one token with logits 30, 29, ... 25, and 0 for the 294 others.

    By hand: the k likeliest, of these those whose likelier ones have less than p of the
    probability, of these those with at least min_p of the likeliest one's.
    """
    letters = "abcdef"
    lm = load_lm(scripted(tmp_path / "m", **{"?": "|".join(letters)}), torch.float32)
    given = evaluation.parse_decoding(decoding)
    ((_, drawn),) = draw(lm, [(("user", "?"),)], [given], each=4000, limit=1)
    counts = Counter(drawn)
    logits = torch.tensor([30.0, 29, 28, 27, 26, 25] + [0] * 294, dtype=torch.float64)
    p = (logits / (given["temperature"] or 1e-3)).softmax(0)
    p[given["top_k"] or 300 :] = 0
    p = p / p.sum()
    p = p * (p.cumsum(0) - p < given["top_p"]) * (p >= given["min_p"] * p[0])
    p = (p / p.sum()).tolist()
    for letter, expected in zip(letters, p, strict=False):
        share = counts[letter] / 4000
        assert abs(share - expected) <= 4.5 * (expected * (1 - expected) / 4000) ** 0.5
    assert {*letters} & {*counts} == {*letters[: sum(x > 0 for x in p[:6])]}


def test_what_the_checkpoint_sets_for_generation_is_left_aside(checkpoints, tmp_path):
    folder = make_checkpoint(tmp_path / "model", CONFIGS["llama"]())
    leaks = {"top_k": 1, "repetition_penalty": 9.0, "max_length": 3, "no_repeat_ngram_size": 1}
    leaks |= {"do_sample": True, "suppress_tokens": list(range(4, 150)), "num_beams": 2}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(leaks))
    decodings = [GREEDY, evaluation.DECODINGS[0]]
    models = [load_lm(name, torch.float32) for name in (folder, checkpoints("llama"))]
    drawn = [draw(lm, ASKED, decodings, each=3, limit=9) for lm in models]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("turn_end", ["<eos>", "<unk>"])
def test_a_response_ends_with_its_turn_or_at_the_limit(run, flags, tmp_path, turn_end):
    """After x come y and the end, and what would follow that is never drawn; z goes on and on.

    A line break and the end are a blank response: it is left out, and counted.
    """
    write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("x", "z", "o", "?")])
    follows = {"x": "y", "y": turn_end, turn_end: "z", "z": "z", "o": "\n", "\n": turn_end}
    follows["?"] = f"{turn_end}|e"  # the likeliest first token is none
    model = scripted(tmp_path / "model", **follows, e=turn_end)
    rows = rows_of(run(*flags, "--model", model, "--decoding", "t=0"))
    expected = {("x", "y"): 4, ("z", "zzzzz"): 4, ("?", "e"): 4}
    assert Counter((row["prompt"], row["response"]) for row in rows) == expected


def test_the_seed_the_batch_and_the_decoding_decide_what_is_drawn(tmp_path):
    """Whatever the prompt, 2 of 26 letters follow: 676 responses, all equally likely."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    model = scripted(tmp_path / "m", **dict.fromkeys(["?", *letters], "a"))
    lm = load_lm(model, torch.float32)
    lm.head.zero_()
    lm.head[[lm.encoder.ids([letter])[0][0] for letter in letters]] = 30.0
    twins = [(("user", text),) for text in ("x?", "y?")]
    decodings = [evaluation.PLAIN | {"top_k": k} for k in (0, 290)]

    def answers(prompts=twins, **flags):
        return dict(draw(lm, prompts, decodings, each=3, limit=2, **flags))

    apart, together = answers(tokens=1), answers()
    assert apart == answers(tokens=1) and together == answers()
    for other in (answers(tokens=1, seed=1), together):
        assert other[0] != apart[0] and other[1] != apart[1]
    for both in (apart, together):
        assert len({text for texts in both.values() for text in texts}) >= 10  # of 12 draws
    assert answers(twins[::-1], tokens=1) == apart  # the place of a batch, not what is asked in it


def test_batches_are_of_like_length_and_have_so_many_tokens(checkpoints, monkeypatch):
    """Lengths 50, 40, ... 10, 5 new tokens, 3 responses of each of two decodings.

    Of 269 tokens: 3 x 55 alone; 3 x 45 alone, as 2 x 3 x 45 = 270; 2 x 3 x 35; what is left.
    """
    batches = []

    def sample(lm, ids, decoding, n, limit):
        batches.append((len(ids), n, limit))
        return ["x"] * (len(ids) * n)

    monkeypatch.setattr(evaluation, "sample", sample)
    lm = load_lm(checkpoints("llama"), torch.float32)
    monkeypatch.setattr(lm.encoder, "head", lambda prompt: prompt[0][1])
    monkeypatch.setattr(lm.encoder, "ids", lambda heads: [[5] * int(head) for head in heads])
    asked = [(("user", str(n)),) for n in (20, 50, 10, 40, 30)]
    both = [GREEDY, evaluation.PLAIN]
    assert draw(lm, asked, both, 3, tokens=269) == [(k, ["x"] * 6) for k in (1, 3, 4, 0, 2)]
    assert batches == [(p, 3, 5) for p in (1, 1, 2, 1) for _ in both]
    batches.clear()
    assert [k for k, _ in draw(lm, asked, both, 3, tokens=269, done={1, 4})] == [3, 0, 2]
    assert [batch[0] for batch in batches] == [1, 1, 2, 2, 1, 1]


def test_a_context_bounds_the_response_and_refuses_a_prompt_that_fills_it(tmp_path):
    """A context of 20: a prompt of 15 tokens has 5 to answer with, one of 20 none."""
    lm = load_lm(scripted(tmp_path / "model", x="x"), torch.float32)
    lm.context = 20

    def answer(n):
        return draw(lm, [(("user", "x" * n),)], [GREEDY], limit=99)

    assert answer(15) == [(0, ["x" * 5])]
    with pytest.raises(data.UserError, match="20 tokens leaves no room"):
        answer(20)


def test_the_adapter_is_applied(run, flags, checkpoints, tmp_path):
    lm = load_lm(checkpoints("llama"), torch.float32)
    sft.inject(lm.model, 4, 8)
    generator = torch.Generator().manual_seed(0)
    for layer in sft.lora_layers(lm.model).values():
        layer.B.data.normal_(0, 0.1, generator=generator)
    sft.save_adapter(lm.model, tmp_path / "tuned", checkpoints("llama"), beneath=None)
    merged, _ = sft.load_with_adapter(checkpoints("llama"), "tuned", torch.float32)
    assert merged.key != lm.key  # to the cache it is another model
    drawn = draw(merged, [*data.read_prompts("prompts.jsonl")], evaluation.DECODINGS, 1, 5, 20, 42)
    tuned, plain = rows_of(run(*flags, "--adapter", "tuned")), rows_of(run(*flags, "--overwrite"))
    assert {row["model"] for row in tuned} == {"tuned"}
    assert [row["response"] for row in tuned] == [text for _, texts in drawn for text in texts]
    assert [row["response"] for row in plain] != [row["response"] for row in tuned]


ENDPOINT = "--endpoint: expected http[s]://..., one process and no --adapter"
REFUSED = {
    "--decoding t=1,x=2": "--decoding: 'x=2': expected t=, p=, k= or min_p=",
    "--decoding p=0": "--decoding: '0': expected float",
    "--decoding min_p=2": "--decoding: '2': expected float from 0 to 1",
    "--decoding t=1 t=2 t=3": "--samples 4: expected a multiple of 3",
    "--samples 6": "--samples 6: expected a multiple of 4",
    "--out prompts.jsonl --overwrite": "prompts.jsonl: this command names that file twice",
    "--split Training Tset": "prompts.jsonl: no prompt has split 'Tset'; see its 'split' column",
    "--resume --overwrite": "not allowed with argument --resume",
    "--model none --out taken.jsonl": "--out taken.jsonl: it exists; add --resume",
    "--endpoint http://localhost/v1 --adapter a": ENDPOINT,
    "--endpoint localhost:8000": ENDPOINT,
    "--endpoint https://key@host/v1": ENDPOINT,
    "--endpoint https://host/v1?key=k": ENDPOINT,
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_wrong_flags_are_refused(refused, flags, folder, wrong):
    (folder / "taken.jsonl").write_text("precious\n")
    assert REFUSED[wrong] in refused("eval", *flags, *wrong.split())


def test_several_processes_do_not_ask_a_server(refused, flags, monkeypatch):
    monkeypatch.setattr(scores, "processes", lambda: (0, 2))
    assert refused("eval", *flags, "--endpoint", "http://localhost/v1") == ENDPOINT


def test_a_file_cut_anywhere_is_gone_on_with_to_the_same_bytes(run, flags, folder, monkeypatch):
    """Cut behind the 3rd of 4 rows of a prompt they are drawn again; behind the 4th they are not.

    The 5 prompts are 5 batches, longest first. A cut within a row leaves the rows before it. A
    finished file is not touched.
    """
    lengths, sample = [], evaluation.sample  # of each prompt that is sampled, once a decoding

    def noted(lm, ids, *args):
        lengths.extend(map(len, ids))
        return sample(lm, ids, *args)

    monkeypatch.setattr(evaluation, "sample", noted)
    whole = run(*flags)
    every, ends = list(lengths), [m.end() for m in re.finditer(b"\n", whole)]
    assert len(ends) == len(every) == 20 and every == sorted(every, reverse=True)
    cuts = [(0, 0), (5, 0), (ends[2], 0), (ends[3], 1), (ends[3] + 1, 1), (ends[4], 1)]
    cuts += [(ends[10] + 30, 2), (ends[18], 4), (len(whole) - 1, 4)]
    for cut, done in [*cuts, (len(whole), 5)]:
        (folder / "out.jsonl").write_bytes(whole[:cut])
        before = (folder / "out.jsonl").stat()
        lengths.clear()
        assert run(*flags, "--resume") == whole
        assert lengths == every[4 * done :], cut
    after = (folder / "out.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_blank_responses_make_no_difference_to_where_it_goes_on(run, flags, folder, monkeypatch):
    """The first sample of each prompt is blank, and every sample of the shortest prompt."""
    sample, wide = evaluation.sample, [*flags, "--batch-tokens", "80"]
    lm, _ = sft.load_with_adapter(flags[2], None, torch.float32)
    heads = [lm.encoder.head(prompt) for prompt in data.read_prompts("prompts.jsonl")]
    shortest = min(map(len, lm.encoder.ids(heads)))

    def gappy(lm, ids, decoding, n, limit):
        blank = [decoding["top_p"] == 0.95 or len(row) == shortest for row in ids]
        drawn = sample(lm, ids, decoding, n, limit)
        return ["" if b else text for b, text in zip(blank, drawn, strict=True)]

    monkeypatch.setattr(evaluation, "sample", gappy)
    whole = run(*wide)
    assert len(rows_of(whole)) == 4 * 3
    for cut in (m.end() for m in re.finditer(b"\n", whole)):
        (folder / "out.jsonl").write_bytes(whole[: cut + 9])
        assert run(*wide, "--resume") == whole


CHANGED = ["--name other", "--model tiny", "--seed 7", "--max-new-tokens 4", "--samples 8"]
CHANGED += ["--batch-tokens 40", "--decoding t=1", "--split HeldoutItem", "--limit-like l.jsonl"]


OTHERS = {
    "precious\n": "out.jsonl:1: not a line of JSON",
    "precious": "out.jsonl: its last line is not one that this command",
    '{"prompt": "x", "response": "y"}\n': "out.jsonl:1: this row is not one",
    '{"model": "x"}\n': "out.jsonl:1: 'prompt' is missing",
}


def test_a_file_of_other_flags_or_another_program_is_refused(run, refused, flags, folder):
    run(*flags)
    write(folder / "l.jsonl", [{"prompt": "p", "response": "r"}])
    for changed in CHANGED:
        message = refused("eval", *flags, "--resume", *changed.split())
        assert message.startswith("out.jsonl:1: this row is not one that this command would write")
    for content, message in OTHERS.items():
        (folder / "out.jsonl").write_text(content)
        assert message in refused("eval", *flags, "--resume")


def test_one_command_at_a_time_writes_a_file(run, refused, flags, folder):
    """As when a killed experiment has left its stage running, and the command is given again."""
    whole = run(*flags)
    with data.locked(folder / "out.jsonl"):
        message = refused("eval", *flags, "--resume")
    assert message == "--out out.jsonl: another command is writing it"
    assert run(*flags, "--resume") == whole


def logged():
    """Each call of `sample` is noted on stderr."""
    sample = evaluation.sample
    evaluation.sample = lambda *args: os.write(2, b"sampled\n") and sample(*args)


def test_two_processes_write_the_file_of_one(run, flags, folder):
    """Five batches of one prompt are three and two. Then the file is cut, and they go on."""
    whole, argv = run(*flags), ["eval.py", *flags]
    (folder / "out.jsonl").unlink()

    def drawn():
        return [forked.printed(folder, f"log-{rank}").count("sampled") / 4 for rank in "01"]

    assert forked.run_two(folder, argv, logged) == [0, 0], forked.printed(folder, "log-0")
    assert (folder / "out.jsonl").read_bytes() == whole
    assert drawn() == [3, 2]
    assert forked.printed(folder, "log-0").count("saved out.jsonl: 5 prompts, blank") == 1
    assert "saved" not in forked.printed(folder, "log-1")

    (folder / "out.jsonl").write_bytes(whole[: len(whole) // 2])
    assert forked.run_two(folder, [*argv, "--resume"], logged) == [0, 0]
    assert (folder / "out.jsonl").read_bytes() == whole
    assert drawn() == [5, 3]


KEY = "sk-secret-0123456789"


def completion(text) -> dict:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def serve():
    """serve(answer) starts a server; answer(body, turn) gives (status, JSON or bytes, headers).

    turn: how often this body has come before. If answer gives None the connection is dropped.
    """
    servers = []

    def start(answer):
        requests, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length) or "null")
                with lock:
                    turn = sum(request.body == body for request in requests)
                    note = {"path": self.path, "headers": self.headers, "body": body}
                    requests.append(SimpleNamespace(**note))
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

            do_GET = do_POST  # what a client makes of a redirected POST

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
def asking(flags, monkeypatch):
    """asking(server) is the command line that asks it; the key is set, pauses are short."""
    monkeypatch.setattr(evaluation, "PAUSE", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    return lambda server: [*flags, "--model", "gpt-x", "--endpoint", server.url]


def echo(body, turn=0):
    """An answer that tells its request from every other one."""
    return 200, completion(f"{body['messages'][-1]['content']} {body['seed']}")


def test_the_requests_and_the_file(run, asking, serve):
    """Seeds are 42 * 4 + the sample's number. What a decoding leaves off is not sent."""
    server = serve(echo)
    decodings = ["t=0.7,p=0.95", "t=0,k=50", "t=1.5,min_p=0.1", "p=0.5"]
    rows = rows_of(run(*asking(server), "--decoding", *decodings))
    settings = [(0.7, 0.95, 0, 0), (0, 1, 50, 0), (1.5, 1, 0, 0.1), (1, 0.5, 0, 0)]
    sent = [
        {"temperature": 0.7, "top_p": 0.95, "seed": 168},
        {"temperature": 0, "top_k": 50, "seed": 169},
        {"temperature": 1.5, "min_p": 0.1, "seed": 170},
        {"temperature": 1, "top_p": 0.5, "seed": 171},
    ]
    expected = []
    for text in TEXTS:
        chat = text if text is TURNS else [{"role": "user", "content": text}]
        expected += [{"model": "gpt-x", "messages": chat, "max_tokens": 5} | more for more in sent]
    bodies = [request.body for request in server.requests]
    assert len(bodies) == 20 and all(body in bodies for body in expected)
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    assert [row["prompt"] for row in rows[::4]] == TEXTS
    for row, body, setting in zip(rows, expected, settings * 5, strict=True):
        assert (row["model"], row["run"]) == ("gpt-x", "gpt-x")
        assert row["response"] == echo(body)[1]["choices"][0]["message"]["content"]
        assert tuple(row["decoding"].values()) == (*setting, 5, 42, 4)


def test_an_untuned_model_is_asked_to_be_as_long_as_tuned_ones(run, asking, serve, folder):
    """3, 2 and 4 sentences; 5, 6 and 8 words. "3.5" and "e.g." are within a sentence.

    What is appended is not saved as the prompt.
    """
    texts = ["墙。可以！门。", "It is 3.5 m. Big!", "A. B? No: e.g.this. Last one"]
    write(folder / "a.jsonl", [{"prompt": "p", "response": text} for text in texts])
    server = serve(echo)
    rows = rows_of(run(*asking(server), "--limit-like", "a.jsonl"))
    limit = "Limit your response to 3 sentences and at most 6 words."
    asked = {request.body["messages"][-1]["content"] for request in server.requests}
    assert asked == {f"{'Joy?' if text is TURNS else text}\n{limit}" for text in TEXTS}
    assert [row["prompt"] for row in rows[::4]] == TEXTS
    assert {row["decoding"]["append"] for row in rows} == {limit}


def test_a_key_goes_into_its_header_alone_and_no_other_is_sent(run, asking, serve, monkeypatch):
    """Without the variable no key is sent, not even that of the Hugging Face hub."""
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    server = serve(echo)
    assert KEY not in run(*asking(server)).decode()
    for request in server.requests:
        named = {name for name, value in request.headers.items() if KEY in value}
        assert named == {"Authorization"} and KEY not in str(request.body) + request.path
        assert request.headers["Authorization"] == f"Bearer {KEY}"
    server.requests.clear()
    for absent in (monkeypatch.delenv, lambda name: monkeypatch.setenv(name, " ")):
        absent("OPENAI_API_KEY")
        run(*asking(server), "--overwrite")
    assert len(server.requests) == 40
    assert all(request.headers["Authorization"] is None for request in server.requests)
    assert not any("hf_token" in str(request.headers) for request in server.requests)


@pytest.mark.parametrize("key", [f"{KEY}\nHost: x", "schlüssel"])
def test_a_key_that_is_none_is_not_shown(run, asking, serve, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(data.UserError, match=r"^OPENAI_API_KEY: a key has no line[^0-9]*$"):
        run(*asking(serve(echo)))


FAULTS = {
    "busy": lambda: (429, {"error": {"message": "slow down"}}, {"Retry-After": 0}),
    "broken": lambda: (500, b"<html>"),
    "late": lambda: (408, b""),
    "at odds": lambda: (409, b""),
    "slow": lambda: time.sleep(2),
    "dropped": lambda: None,
    "cut short": lambda: (200, b"{", {"Content-Length": 100}),
    "malformed": lambda: (200, b'{"choices": [{"mess'),
    "nested": lambda: (200, b"[" * 100_000),
    "no choices": lambda: (200, {"choices": []}),
    "a list": lambda: (200, [1]),
    "no text": lambda: (200, completion([{"type": "text"}])),
}


def test_a_request_that_a_server_fails_is_made_again(run, asking, serve, monkeypatch):
    """Each of 20 requests fails once, in one of 12 ways: the file is as if none had."""
    whole, ways = run(*asking(serve(echo))), itertools.cycle(FAULTS.values())
    monkeypatch.setattr(evaluation, "TIMEOUT", 1)
    server = serve(lambda body, turn: echo(body) if turn else next(ways)())
    assert run(*asking(server), "--overwrite") == whole
    assert set(Counter(json.dumps(request.body) for request in server.requests).values()) == {2}
    assert len(server.requests) == 40


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("busy", 'HTTP 429: {"error": {"message": "slow down"}}'),
        ("broken", "HTTP 500: <html>"),
        ("malformed", 'HTTP 200: {"choices": [{"mess'),
        ("dropped", "RemoteProtocolError('Server disconnected without sending a response.')"),
    ],
)
def test_a_server_that_keeps_failing_is_given_up(
    run, asking, serve, monkeypatch, capsys, fault, message
):
    """After so many tries; those of the next request may have begun."""
    monkeypatch.setattr(evaluation, "TRIES", 3)
    server = serve(lambda body, turn: FAULTS[fault]())
    with pytest.raises(data.UserError) as raised:
        run(*asking(server), "--concurrency", 1)
    assert str(raised.value) == f"--endpoint {server.url}: no answer in 3 tries; {message}"
    assert f"no answer so far, still trying: {message}" in capsys.readouterr().err
    first = [request for request in server.requests if request.body == server.requests[0].body]
    assert len(first) == 3


@pytest.mark.parametrize("limit", ["LONGEST_ANSWER", "TIMEOUT"])
def test_an_answer_without_end_is_not_read_for_ever(monkeypatch, limit):
    monkeypatch.setattr(evaluation, limit, 0.01)
    dripping = SimpleNamespace(iter_bytes=lambda: itertools.repeat(b"", 10**7))
    if limit == "LONGEST_ANSWER":
        dripping = SimpleNamespace(iter_bytes=lambda: [b"x"])
    with pytest.raises(ValueError, match="its answer does not end"):
        evaluation.read_answer(dripping)


def test_a_pause_doubles_and_is_at_least_what_the_server_asks(serve, monkeypatch):
    """Between half and all of 1, 2, 4, ... seconds, at most 60; up to 3600, or nonsense."""
    monkeypatch.setenv("no_proxy", "*")
    for after, asked in {"": 0, "30": 30, "9" * 400: 3600, "soon": 0, "-5": 0, "nan": 0}.items():
        pauses = []
        stop = SimpleNamespace(wait=pauses.append)  # None: go on
        server = serve(lambda body, turn, after=after: (503, b"", {"Retry-After": after}))
        with pytest.raises(data.UserError, match="no answer in 8 tries"):
            evaluation.chat(server.url, "", {}, stop)
        for pause, top in zip(pauses, (1, 2, 4, 8, 16, 32, 60), strict=True):
            assert max(top / 2, asked) <= pause <= max(top, asked)
        assert len({*pauses}) == 7 or asked


REFUSALS = {
    "OpenAI's": (401, {"error": {"message": f"No key:\n {KEY}"}}, 'HTTP 401: {"error": {"mess'),
    "Gemini's": (400, [{"error": {"message": "Bad model"}}], 'HTTP 400: [{"error": {"message": '),
    "a page": (404, b"<p>\nNot \xff\nfound", "HTTP 404: <p> Not \ufffd found"),
    "a long one": (403, b"x" * 275 + KEY.encode() * 9, "HTTP 403: xxx"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_ends_in_one_sentence_without_the_key(run, asking, serve, folder, case):
    """At once: the requests that would follow are not made. The file there was is not replaced."""
    status, content, message = REFUSALS[case]
    server = serve(lambda body, turn: time.sleep(0.05) or (status, content))
    (folder / "out.jsonl").write_text("precious\n")
    with pytest.raises(data.UserError) as raised:
        run(*asking(server), "--overwrite", "--concurrency", 2)
    sentence = str(raised.value)
    assert sentence.startswith(f"--endpoint {server.url}: {message}")
    assert KEY[:9] not in sentence and "\n" not in sentence and len(sentence) < 400
    assert len(server.requests) < 20
    assert (folder / "out.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_does_not_take_the_key_elsewhere(run, asking, serve, status):
    other = serve(echo)
    server = serve(lambda body, turn: (status, b"", {"Location": f"{other.url}/chat/completions"}))
    with pytest.raises(data.UserError, match=f"HTTP {status}:$"):
        run(*asking(server))
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

    run(*asking(serve(answer)), "--concurrency", concurrency)
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

    run(*asking(serve(answer)), "--concurrency", 20)
    assert [row["prompt"] for row in read(out)[::4]] == TEXTS


def test_blank_answers_and_what_no_file_may_hold(run, asking, serve, folder, run_main):
    """Two blank ones of each prompt are left out; NUL and half of a surrogate pair go."""
    texts = [None, " \n", " a\0b ", "\ud83d!"]
    server = serve(lambda body, turn: (200, completion(texts[body["seed"] - 168])))
    printed = run_main("eval", *asking(server))
    assert [row["response"] for row in read(folder / "out.jsonl")] == ["ab", "!"] * 5
    assert "5 prompts, blank and left out: 10" in printed


def killed_in_the_third_write():
    turns = itertools.count(1)

    def deadly(path, mode):
        file = open(path, mode, buffering=0)  # noqa: SIM115
        if next(turns) == 3:
            file.write(b'{"model": "gp')
            os.kill(os.getpid(), signal.SIGKILL)
        return file

    evaluation.open = deadly


def test_killed_and_resumed_it_asks_for_what_is_missing(run, asking, serve, folder):
    """The first two prompts are never asked for again."""
    whole = run(*asking(serve(echo)))
    (folder / "out.jsonl").unlink()
    argv = ["eval.py", *asking(serve(echo))]
    assert forked.run(folder, argv, killed_in_the_third_write) == -signal.SIGKILL
    assert whole.startswith((folder / "out.jsonl").read_bytes())
    server = serve(echo)  # to the other one, requests may still be on their way
    assert run(*asking(server), "--resume") == whole
    asked = Counter(request.body["messages"][-1]["content"] for request in server.requests)
    assert asked == {TEXTS[2]: 4, "Joy?": 4, TEXTS[4]: 4}


def test_an_end_waits_neither_for_pauses_nor_for_the_requests_to_come(run, asking, serve):
    """The second sample's request is to be made again in 20 s when the first one is refused."""

    def answer(body, turn):
        if body["seed"] > 168:
            return 503, b"", {"Retry-After": 20}
        time.sleep(0.2)
        return 401, b""

    began, server = time.perf_counter(), serve(answer)
    with pytest.raises(data.UserError, match="HTTP 401"):
        run(*asking(server), "--concurrency", 2)
    assert time.perf_counter() - began < 10
    assert len(server.requests) <= 3  # one may have begun when the first was refused
