"""data.py: what is read, what is refused, and what every response of a batch sees.

Hand-derived ids: the tokenizer of conftest.py has <bos> 0, <eos> 1, <pad> 2, <unk> 3, then single
bytes, and no merge of digits or newlines. So a digit d is the token 19 + d, a newline 202.
"""

import data
from data import Encoder, Sample, Table, UserError

import errno
import gzip
import itertools
import json
import math
import os
from collections import Counter

import numpy as np
import pytest
import tokenizers
import torch
from conftest import make_tokenizer, read, write

ASK = (("user", "Name a use."),)
USER = {"role": "user", "content": "Name a use."}
SYSTEM = {"role": "system", "content": "Be odd."}


def says(text):
    return {"role": "assistant", "content": text}


def user(text):
    return (("user", text),)


def test_bom_crlf_blank_lines_and_line_numbers(tmp_path):
    """U+2028 is text, not the end of a line; blank lines are skipped but counted."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n \r\n{"b": 2}')
    assert list(data.read_jsonl(path)) == [(f"{path}:1", {"a": "\u2028"}), (f"{path}:3", {"b": 2})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{', ":3: not a line of JSON"),
        (b"PAR1", ": parquet; give what"),
        (b'{"a": 1}\n\n[1]', ":3: expected a JSON object"),
        (b'{"a": NaN}', ":1: not a line of JSON"),
        (b'{"a": 1e999}', ":1: not a line of JSON"),
        (b'{"a": ["\\ud800"]}', ":1: not a line of JSON in UTF-8 .*surrogates"),
        (b'{"a": 1}\n"\xff"', ":2: cannot be read .*0xff"),
        (gzip.compress(b'{"a": 1}')[:-1], ":1: cannot be read .*ended"),
        (b"\x1f\x8b" + bytes(9), ":1: cannot be read .*method"),
    ],
)
def test_a_file_that_is_not_jsonl_is_refused_with_the_place(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}{message}"):
        list(data.read_jsonl(path))


def test_a_file_without_records_is_refused(tmp_path):
    for name in "a.jsonl", "a.csv":
        (tmp_path / name).write_bytes(b"\n")
        with pytest.raises(UserError, match=f"{name}: no records"):
            data.read_samples(tmp_path / name)


def test_jsonl_is_written_as_readable_utf8_into_a_new_folder(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    data.write_file(path, data.jsonl([{"a": "é\n"}]))
    assert path.read_bytes() == '{"a": "é\\n"}\n'.encode()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    data.write_file(path, "old")
    monkeypatch.setattr(data.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        data.write_file(path, "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_only_plain_files_are_replaced(tmp_path):
    """Nor is what stands beside them: another's .part, or a link of the name that we write."""
    (tmp_path / "a.part").write_text("theirs")
    (tmp_path / f"b.{os.getpid()}.part").symlink_to("a.part")
    data.write_file(tmp_path / "a", "new")
    data.write_file(tmp_path / "b", "new")
    assert (tmp_path / "a.part").read_text() == "theirs"
    (tmp_path / "link").symlink_to("elsewhere")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(UserError, match=f"{name}: not a plain file"):
            data.write_file(tmp_path / name, "new")


TALK = (*ASK, ("assistant", "A step."), ("user", "Another."))


PREFERENCES = {
    "plain strings": ({"prompt": "Name a use.", "chosen": "A", "rejected": "B"}, ASK),
    "prompt as messages": ({"prompt": [USER], "chosen": "A", "rejected": "B"}, ASK),
    "TRL explicit": ({"prompt": [USER], "chosen": [says("A")], "rejected": [says("B")]}, ASK),
    "TRL implicit": ({"chosen": [USER, says("A")], "rejected": [USER, says("B")]}, ASK),
    "system turn": (
        {"chosen": [SYSTEM, USER, says("A")], "rejected": [SYSTEM, USER, says("B")]},
        (("system", "Be odd."), *ASK),
    ),
    "a prompt beside conversations that begin with it": (
        {"prompt": "Name a use.", "chosen": [USER, says("A")], "rejected": [USER, says("B")]},
        ASK,
    ),
    "a column system": (
        {"system": "Be odd.", "question": "Name a use.", "chosen": "A", "rejected": "B"},
        (("system", "Be odd."), *ASK),
    ),
    "several turns": (
        {
            "prompt": [USER, says("A step."), {"role": "user", "content": "Another."}],
            "chosen": [says("A")],
            "rejected": "B",
        },
        TALK,
    ),
}


@pytest.mark.parametrize(("row", "prompt"), PREFERENCES.values(), ids=PREFERENCES)
def test_every_form_of_a_preference(tmp_path, row, prompt):
    row = row | {"task": "Uses", "unknown": [1]}
    path = write(tmp_path / "p.jsonl", [row])
    (pair,) = data.read_preferences(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "A", "B")
    assert row.items() <= pair.row.items()
    assert (pair.where, pair.task) == (f"{path}:1", "Uses")


def test_a_compressed_file_and_one_array_read_like_lines(tmp_path):
    rows = [{"prompt": "p", "chosen": "A", "rejected": text} for text in ("B", "C")]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(data.jsonl(rows)))
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), "utf-16")
    for path in tmp_path.iterdir():
        pairs = data.read_preferences(path)
        assert [(pair.row, pair.where) for pair in pairs] == [
            (row, f"{path}:{k}") for k, row in enumerate(rows, 1)
        ]


MUCE = {
    "TasksNamesFull": "Uses",
    "Dataset": "d",
    "Prompt": "brick",
    "FullPrompt": "Name a use.",
    "Response": "A",
    "Language": "English",
    "RatingLabel": "creativity",
    "facsco_grm_scaled": 23.5,
    "Set": "Training",
}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Name a use.", "response": "A"}, ASK),
        ({"prompt": [USER], "response": "A"}, ASK),
        ({"messages": [SYSTEM, USER, says("A")]}, (("system", "Be odd."), *ASK)),
        ({"instruction": "Name a use.", "input": "", "response": "A"}, ASK),
    ],
    ids=["plain", "prompt as messages", "messages", "an empty input"],
)
def test_every_form_of_a_sample(tmp_path, row, prompt):
    """A score is needed of rated responses only."""
    path = write(tmp_path / "s.jsonl", [row, row | {"score": 23.5, "task": "Uses"}])
    plain, rated = data.read_samples(path)
    assert plain.prompt == rated.prompt == prompt
    assert plain.response == rated.response == "A"
    assert math.isnan(plain.score)
    assert (rated.score, rated.task, rated.where) == (23.5, "Uses", f"{path}:2")
    assert rated.row | row == rated.row


def test_muce_columns_get_our_names_and_our_own_win(tmp_path):
    (sample,) = data.read_samples(write(tmp_path / "s.jsonl", [MUCE | {"task": "Ours"}]))
    ours = {"split": "Training", "language": "English", "dataset": "d", "label": "creativity"}
    ours |= {"task": "Ours", "prompt": "Name a use.", "response": "A", "score": 23.5}
    assert sample.row == MUCE | ours


GOOD = {"prompt": r'Human: say "role": "a", \u0000.', "chosen": '{"from": "b"}', "rejected": "B"}
PRINTED = [json.dumps([USER], indent=2), f"{USER}", f"({USER},)", f"array([{USER}], dtype=object)"]
PRINTED += ['[{"from": "human", "value": "p"}]', "\n\nHuman: p\n\nAssistant: A\n\nHuman: q"]
BAD_ROWS = [
    ("'rejected' is missing", {"prompt": "p", "chosen": "A"}),
    ("'prompt' is missing", GOOD | {"prompt": None}),
    ("'prompt' is missing; expected", {"chosen": "One", "rejected": "Two"}),
    ("'prompt' is \"\"", GOOD | {"prompt": ""}),
    ("'chosen' is 3", GOOD | {"chosen": 3}),
    ("'chosen' is \" \"", GOOD | {"chosen": " "}),
    (r".0000; remove", GOOD | {"chosen": "A\0"}),
    (r".009b; remove", GOOD | {"chosen": "A\x9b"}),
    *(("not printed as a text", GOOD | {"prompt": text}) for text in PRINTED),
    ("'chosen.content' is missing", GOOD | {"chosen": [{"role": "assistant"}]}),
    ('is "tool"; expected user and', GOOD | {"prompt": [USER | {"role": "tool"}]}),
    ('is "None"; expected user and', GOOD | {"prompt": [{"content": "Name a use."}]}),
    ("'prompt.content' is missing", GOOD | {"prompt": ["Name a use."]}),
    ('is "user system"', GOOD | {"prompt": [USER, SYSTEM]}),
    ('is "system"', GOOD | {"prompt": [SYSTEM]}),
    ('is "user user"', GOOD | {"prompt": [USER, USER]}),
    (r"'prompt' is \[\]", GOOD | {"prompt": []}),
    ("by turns", GOOD | {"prompt": [USER, says("A step.")]}),
    ('is ""; expected user', {"chosen": [says("A")], "rejected": [says("B")]}),
    ('of rejected\' is "user"', {"chosen": [USER, says("A")], "rejected": [USER]}),
    ("the same prompt", {"chosen": [USER, says("A")], "rejected": [SYSTEM, USER, says("B")]}),
    ("two different answers", GOOD | {"chosen": "B"}),
    ("'response' is missing", {"prompt": "p"}),
    ("'prompt' is missing", {"response": "r"}),
    ('of messages\' is "user"; expected assistant', {"messages": [USER]}),
    (r"'messages' is \[\]", {"messages": []}),
    ("by turns", {"messages": [says("A")], "score": 23}),
    ("'score' is \"x\"", {"prompt": "p", "response": "r", "score": "x"}),
    ("'score' is true", {"prompt": "p", "response": "r", "score": True}),
    ("'score' is missing", {"prompt": "p", "response": "r"}),
]


@pytest.mark.parametrize(("message", "row"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_place(tmp_path, message, row):
    """One that has a chosen or a rejected text is a preference, any other a rated response."""
    preference = bool({"chosen", "rejected"} & {*row})
    path = write(tmp_path / "a.jsonl", [GOOD if preference else MUCE, row])
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{message}"):
        data.read_preferences(path) if preference else data.read_samples(path, rated=True)


def test_prompts_are_distinct_in_order_and_of_the_splits_named(tmp_path):
    rows = [MUCE, {"prompt": "p", "split": "Test", "id": 7}, MUCE | {"Response": "B"}]
    path = write(tmp_path / "s.jsonl", rows)
    assert list(data.read_prompts(path).items()) == [
        (ASK, {"task": "Uses"}),
        (user("p"), {"task": "", "id": 7}),
    ]
    assert data.read_prompts(path, "Test") == {user("p"): {"task": "", "id": 7}}
    assert list(data.read_prompts(path, "Test", MUCE["Set"])) == [ASK, user("p")]
    chats = [{"chosen": [USER, says("A")], "rejected": [USER, says("B")]}]
    chats += [{"messages": [SYSTEM, USER, says("A")]}, {"system": "Be brief.", "prompt": [USER]}]
    assert list(data.read_prompts(write(tmp_path / "chats.jsonl", chats))) == [
        ASK,
        (("system", "Be odd."), *ASK),
        (("system", "Be brief."), *ASK),
    ]
    for splits in (("Tset",), ("Test", "Tset")):
        with pytest.raises(UserError, match="no prompt has split 'Tset'"):
            data.read_prompts(path, *splits)


def test_a_csv_file_reads_like_its_jsonl(tmp_path):
    """A byte-order mark, quotes, a comma, a line break, MuCE's names, a blank line, empty cells."""
    path = tmp_path / "a.CSV"
    text = (
        "\ufeffTasksNamesFull,FullPrompt,Response,facsco_grm_scaled,Set,year\r\n"
        'Uses,"Say ""hi"", please","two\nlines",23.5,Training,1999\r\n'
        "\r\n"
        "Uses,p,r,40,,\r\n"
    )
    path.write_bytes(text.encode())
    first, second = data.read_samples(path, rated=True)
    assert (first.prompt, first.response) == (user('Say "hi", please'), "two\nlines")
    assert (first.score, first.row["split"], first.row["year"]) == (23.5, "Training", "1999")
    assert (second.score, "Set" in second.row) == (40, False)
    assert (first.where, second.where) == (f"{path}:3", f"{path}:5")

    for delimiter, suffix in (",", "csv"), (";", "csv.gz"), ("\t", "TSV.gz"):
        lines = "\ufeffprompt,chosen,rejected,score_chosen,diversity_chosen\np,A,B,40,0.5\n"
        path = tmp_path / f"b.{suffix}"
        path.write_bytes(gzip.compress(lines.replace(",", delimiter).encode("utf-16-be")))
        (pair,) = data.read_preferences(path)
        assert (pair.prompt, pair.chosen, pair.rejected) == (user("p"), "A", "B")
        assert data.check_number(pair.row["diversity_chosen"], "d", "", 0, 1) == 0.5
    assert data.read_prompts(path) == {user("p"): {"task": ""}}


BAD_CSV = {
    ":2: 'response' is missing": "p,r,40\np,r,40\n",
    ":2: 'prompt' is missing": "prompt,response\n,r\n",
    ":2: not a line of CSV (expected as many": "prompt,response,prompt\np,r,p\n",
    ":3: not a line of CSV (expected as many": "prompt,response\np,r\np,r,s\n",
    ":2: not a line of CSV (expected": "prompt,response\np\n",
    ":2: not a line of CSV ('": 'prompt,response\np,"r"s\n',
    ":2: not a line of CSV (unexpected end": 'prompt,response\np,"r',
    ":2: 'score' is \"nan\"; expected a number": "prompt,response,score\np,r,nan\n",
}


@pytest.mark.parametrize(("message", "text"), BAD_CSV.items())
def test_a_bad_csv_file_is_refused_with_its_place(tmp_path, message, text):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        data.read_samples(path)
    assert str(error.value).startswith(f"{path}{message}")


# A chat template that writes a newline behind the end of each turn, as ChatML does.
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<eot>{{ '\n' }}"
    "{% endfor %}{{ 'a:' if add_generation_prompt }}"
)


def make_encoder(template=None, **special):
    tokenizer = make_tokenizer(template)
    if template and "<eot>" in template:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<eot>"]})
    for name, token in special.items():
        setattr(tokenizer, name, token)
    return Encoder(tokenizer)


def encode(encoder, prompt, text):
    prompts = encoder.ids([encoder.head(prompt)])
    return prompts[0], encoder.responses([(prompt, text)], prompts)[0]


def test_golden_ids_and_text_without_a_template():
    """BOS, the prompt, an empty line; the response, EOS: each special token exactly once."""
    encoder = make_encoder()
    assert encode(encoder, user("12"), "345") == ([0, 20, 21, 202, 202], [22, 23, 24, 1])
    talk = encode(encoder, (("system", "Be odd."), *TALK), "A wall.")
    prompt, response = map(encoder.tokenizer.decode, talk)
    assert prompt == "<bos>Be odd.\n\nName a use.\n\nA step.<eos>Another.\n\n"
    assert response == "A wall.<eos>"


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", "<eot>"])
def test_golden_text_of_a_chat_template_whatever_pads(pad):
    """One BOS; the end of the turn is trained on, the newline behind it not, even if it is PAD."""
    encoder = make_encoder(CHAT, pad_token=pad)
    prompt, response = encode(encoder, (("system", "1"), *user("2")), "A wall.")
    decode = encoder.tokenizer.decode
    assert decode(prompt) == "<bos>s:1<eot>\nu:2<eot>\na:"
    assert decode(response) == "A wall.<eot>"


@pytest.mark.parametrize("template", [None, CHAT])
def test_a_control_token_that_a_person_types_stays_text(template):
    """The special ids are those that the template writes, the texts are what was typed."""
    encoder, typed, plain = make_encoder(template), "A <eos> or <bos><unk>.", "A wall."
    ids, expected = (encode(encoder, user(text), text) for text in (typed, plain))
    for some, harmless in zip(ids, expected, strict=True):
        control = encoder.tokenizer.all_special_ids
        special = [[i for i in row if i in control] for row in (some, harmless)]
        assert special[0] == special[1]
        decode = encoder.tokenizer.decode
        assert decode(some) == decode(harmless).replace(plain, typed)


def test_a_model_without_bos_gets_none_and_one_without_eos_is_refused():
    assert encode(make_encoder(bos_token=None), user("1"), "2")[0] == [20, 202, 202]
    with pytest.raises(UserError, match="has no EOS token"):
        encode(make_encoder(eos_token=None), user("1"), "2")


BEHIND = {" ": "<eos>", " <eos>": "<eos>", " Sure: 9<eos>": "<eos>", "<eot>\n<eos>": "<eot>"}


@pytest.mark.parametrize("text", ["brick", " brick", "2", "\n2"])
@pytest.mark.parametrize(("behind", "end"), BEHIND.items())
def test_the_seam_keeps_the_prompt_and_a_response_ends_with_one_token(behind, end, text):
    """Behind a space, " brick" is one token: the two would melt together. EOS is never missing."""
    turns = "{% for m in messages %}{{ m['content'] }}" + behind + "{% endfor %}"
    encoder = make_encoder("{{ bos_token }}" + turns)
    decoded = [encoder.tokenizer.decode(ids) for ids in encode(encoder, user("1"), text)]
    assert decoded == ["<bos>1" + behind, text + end]


@pytest.mark.parametrize(
    ("before", "head", "response"),
    [("(hm)", "a:(hm)", "3 <eot>"), ("", "a:", "3 <eot>"), (" ", "a:", " 3 <eot>")],
    ids=["an empty thought", "nothing", "a space, which is part of the first word"],
)
@pytest.mark.parametrize("asks", ["{{ 'a:' if add_generation_prompt }}", ""])
def test_what_a_template_writes_before_a_response_is_not_the_response(asks, before, head, response):
    template = CHAT.replace("{{ 'a:' if add_generation_prompt }}", asks)
    thought = f"}}}}:{{{{ '{before}' if m['role'] == 'assistant' }}}}"
    encoder = make_encoder(template.replace("}}:", thought))
    decoded = [encoder.tokenizer.decode(ids) for ids in encode(encoder, user("12"), "3 ")]
    assert decoded == [f"<bos>u:12<eot>\n{head}", response]


def test_prompt_and_response_are_tokenised_together_where_the_seam_allows_it():
    """This tokenizer puts a space before a text; in the middle of one it must not."""
    encoder = make_encoder()
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    encoder.tokenizer.backend_tokenizer.pre_tokenizer = byte_level
    assert encoder.tokenizer.decode(encode(encoder, user("1"), "2")[1]) == "2<eos>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT.replace("'a:'", "'a:<think>'"), "odd is not prefix-stable: an answer changes"),
        ("{{ raise_exception('no user') }}", r"refuses the roles \['system', 'user', .*: no user"),
        (CHAT.replace("m['content']", "m['content'][0]['text']"), "leaves out what the system"),
        (CHAT.replace("m['content']", "m['content'] | upper"), "leaves out what the system says"),
        (CHAT.replace("in messages", "in messages[1:]"), "odd leaves out what the system says: Be"),
        (CHAT.replace("in messages", "in messages if m != messages[1]"), "the user says: Name a"),
        (CHAT.replace("in messages", "in messages if m != messages[3]"), "the user says: Another"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_name(template, message):
    """One that leaves out an earlier answer can be used: some drop the thoughts in it."""
    with pytest.raises(UserError, match=message):
        encode(make_encoder(template, name_or_path="odd"), (("system", "Be odd."), *TALK), "A")
    encode(make_encoder(CHAT.replace("in messages", "in messages if m != messages[1]")), TALK, "A")


def test_template_kwargs_reach_the_template(monkeypatch):
    monkeypatch.setattr(Encoder, "kwargs", {})
    template = CHAT.replace("'a:'", "'a:' + ('' if quiet else '<think>')")
    with pytest.raises(UserError, match="is not prefix-stable"):
        encode(make_encoder(template), ASK, "A")
    assert Encoder.template_kwargs('{"quiet": true}') == {"quiet": True}
    encoder = make_encoder(template)
    assert encoder.tokenizer.decode(encode(encoder, ASK, "A")[0]).endswith("a:")


@pytest.mark.parametrize(("template", "ends"), [(None, ["<eos>"]), (CHAT, ["<eos>", "<eot>"])])
def test_generation_stops_at_eos_and_at_the_end_of_turn(template, ends):
    encoder = make_encoder(template)
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids()) == ends


LONG, SHORT = user("12345678"), user("1")  # 11 and 4 tokens


def decoded(encoder, rows):
    return encoder.tokenizer.batch_decode(rows)


def test_the_table_holds_every_prompt_and_every_response_once():
    items = [(SHORT, "11"), (LONG, "11"), (SHORT, "2"), (SHORT, "11")]
    encoder = make_encoder()
    table, index = data.build_table(encoder, items, 99)
    assert index == [0, 1, 2, 0]
    assert table.prompt_of == [0, 1, 0]
    assert decoded(encoder, table.prompts) == ["<bos>1\n\n", "<bos>12345678\n\n"]
    assert decoded(encoder, table.responses) == ["11<eos>", "11<eos>", "2<eos>"]
    assert table.lengths == [7, 14, 6]


def test_what_is_longer_than_max_length_is_dropped_and_never_cut():
    """Of 14 tokens 11 or 4 are the prompt's and one is the EOS, so 2 or 9 are left."""
    items = [(LONG, "99"), (LONG, "999"), (SHORT, "9" * 9), (SHORT, "9" * 10), (SHORT, "1")]
    encoder = make_encoder()
    table, index = data.build_table(encoder, [*items, items[2]], 14)
    assert index == [0, -1, 1, -1, 2, 1]
    assert table.lengths == [14, 14, 6]


def random_table(seed=0):
    """Five prompts of 1 to 6 tokens with four answers each, of 1 to 5 tokens."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 99, rng.integers(1, 7)).tolist() for _ in range(5)]
    responses = [rng.integers(3, 99, rng.integers(1, 6)).tolist() for _ in range(20)]
    return Table(prompts, responses, [k % 5 for k in range(20)])


def view(mask, row, column):
    """The columns that this place of a batch looks at."""
    if mask.dim() == 4:
        return mask[row, 0, column].nonzero()[:, 0].tolist()
    return [k for k in range(column + 1) if mask[row, k]]


@pytest.mark.parametrize(("share", "window"), [(True, 32), (True, 9), (True, 1), (False, 32)])
def test_each_response_is_computed_as_if_it_were_alone(share, window):
    """What predicts token t of a response sees its prompt and t tokens, at positions 0, 1, 2, ...

    and each place that it sees sees those before it, and nothing else. What is so seen, with the
    last token of each response, is all there is: padding is never seen and predicts nothing.
    """
    table = random_table()
    sequences = np.random.default_rng(1).permutation(20)[:15].tolist()
    batch = data.make_batch(table, sequences, share, window)
    (_, T), mask = batch.ids.shape, batch.mask()
    done, seen = Counter(), set()
    lengths = [len(table.responses[s]) for s in sequences]
    assert batch.lengths.tolist() == lengths
    owner = torch.arange(len(sequences)).repeat_interleave(batch.lengths)
    columns = batch.predict, batch.targets, owner
    for place, target, k in zip(*(x.tolist() for x in columns), strict=True):
        prompt = table.prompts[table.prompt_of[sequences[k]]]
        response = table.responses[sequences[k]]
        row, column = divmod(place, T)
        columns = view(mask, row, column)
        assert batch.ids[row, columns].tolist() == prompt + response[: done[k]]
        assert batch.positions[row, columns].tolist() == list(range(len(prompt) + done[k]))
        assert target == response[done[k]]
        assert all(view(mask, row, c) == columns[: i + 1] for i, c in enumerate(columns))
        seen |= {(row, c) for c in columns}
        done[k] += 1
    assert done == dict(enumerate(lengths))
    assert len(seen) + len(sequences) == batch.tokens
    assert not share or mask.any(-1).all()  # softmax over nothing is nan


@pytest.mark.parametrize(
    ("lengths", "window", "rows"),
    [
        # 2 rows would reach 11; 3 rows of 7 hold 21 places, 4 rows of 6 hold 24
        ([2, 6, 5, 4, 3], 10, [[0, 2], [1], [3, 4]]),
        ([2, 6, 5, 4, 3], 99, [[0, 1, 2, 3, 4]]),  # one row of 20 pads nothing
        ([1000] * 4, 10**9, [[0], [1], [2], [3]]),  # nothing to pad either way: less attention
        ([2, 5, 5], 6, [[0], [1], [2]]),  # two rows would be cheaper, but of 7
    ],
)
def test_segments_are_packed_into_the_cheapest_rows(lengths, window, rows):
    assert sorted(sorted(row) for row in data.pack(lengths, window)) == rows


@pytest.mark.parametrize("prompt", [1, 30, 160])
def test_a_segment_grows_as_long_as_that_saves(prompt):
    """Held against every other length: cost per response token of L / (L - prompt) * (L + C)."""
    table = Table([[9] * prompt], [[7]] * 4000, [0] * 4000)
    lengths = range(prompt + 1, 4000)
    best = min(lengths, key=lambda L: L / (L - prompt) * (L + data.LINEAR))
    for window in (10**9, prompt + 2):
        length = data.make_segments(table, range(4000), True, window)[0][2]
        assert abs(length - min(best, window)) <= (window > 1e6)


@pytest.mark.parametrize("seed", range(20))
def test_passes_hold_every_unit_once_and_as_many_as_the_bound_allows(seed):
    """Answers may be longer than a segment has room for, and stand in several pairs."""
    rng = np.random.default_rng(seed)
    answers = [[7] * n for n in rng.integers(1, 400, 20)]
    prompts = [[9] * n for n in rng.integers(1, 60, 5)]
    table = Table(prompts, answers, [k % 5 for k in range(20)])
    pairs = [[p + 5 * k for k in rng.permutation(4)[:2]] for p in rng.integers(0, 5, 40)]
    (order,) = data.divide(table, pairs, 1)
    lengths = [sum(len(answers[s]) for s in pair) for pair in pairs]
    assert order == sorted(range(40), key=lambda u: (pairs[u][0] % 5, -lengths[u]))
    passes = list(data.micro_batches(table, pairs, order, 1000, True, 10**9))
    assert order == [u for units, _ in passes for u in units]
    assert len(passes) > 2
    for units, sequences in passes:
        assert len(set(sequences)) == len(sequences)
        assert set(sequences) == {s for u in units for s in pairs[u]}
        assert len(units) == 1 or data.make_batch(table, sequences, True, 10**9).tokens <= 1000
    for (_, sequences), (units, _) in itertools.pairwise(passes):
        more = dict.fromkeys([*sequences, *pairs[units[0]]])
        assert data.make_batch(table, list(more), True, 10**9).tokens > 1000


def test_every_epoch_is_a_permutation_that_follows_from_seed_and_epoch_alone():
    """Ten items, four a step: three steps an epoch, of which the last takes two."""

    def order(seed, epoch):
        steps = [data.step_indices(10, 4, seed, 3 * epoch + k) for k in range(3)]
        assert [len(step) for step in steps] == [4, 4, 2]
        return [k for step in steps for k in step]

    orders = {key: order(*key) for key in itertools.product((7, 42), range(3))}
    assert all(sorted(order) == list(range(10)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6
    np.random.seed(0)
    assert {key: order(*key) for key in reversed(orders)} == orders


def rated(*scores, texts=None, **row):
    texts = texts or [str(k) for k in range(len(scores))]
    row = {"task": "Uses", "prompt": "Name a use."} | row
    return [
        Sample(user(row["prompt"]), text, row | {"response": text, "score": score}, "", score)
        for text, score in zip(texts, scores, strict=True)
    ]


def plain_pairs(samples, min_gap, max_pairs):
    """The paper's rule in two loops over the responses."""
    pairs, count = [], Counter()
    for i, one in enumerate(samples):
        for j, two in enumerate(samples[i + 1 :], i + 1):
            gap = abs(one.score - two.score)
            full = count[i] == max_pairs or count[j] == max_pairs
            if gap and gap >= min_gap and one.response != two.response and not full:
                count[i] += 1
                count[j] += 1
                best, worst = (one, two) if one.score > two.score else (two, one)
                pairs.append((best.response, worst.response, best.score, worst.score))
    return pairs


@pytest.mark.parametrize("seed", range(40))
def test_pairs_are_exactly_those_of_two_plain_loops(seed):
    """Ties, repeated texts, gaps that are no binary fractions, two prompts and tasks, any rule."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    step = rng.choice([5.0, 0.1, 1 / 3, 1e-3])
    scores = 20 + step * rng.integers(-5, int(30 / step), n)
    texts = [str(k) for k in rng.integers(rng.choice([5, 1000]), size=n)]
    samples = [
        sample
        for score, text in zip(scores.tolist(), texts, strict=True)
        for sample in rated(score, texts=[text], prompt=rng.choice(["p", "q"]), task=rng.choice(2))
    ]
    rule = {"min_gap": float(rng.choice([0, 0.1, 5, 10])), "max_pairs": int(rng.integers(1, 12))}
    rows = data.make_pairs(samples, **rule)
    columns = ("chosen", "rejected", "score_chosen", "score_rejected")
    for group in itertools.product("pq", range(2)):
        members = [s for s in samples if (s.row["prompt"], s.row["task"]) == group]
        made = [row for row in rows if (row["prompt"], row["task"]) == group]
        assert [tuple(row[key] for key in columns) for row in made] == plain_pairs(members, **rule)


@pytest.fixture
def muce(tmp_path):
    """Two tasks: 40, 30, 20, and 50, 29.5 in Training; one more of 10 in Test."""
    rows = [MUCE | {"Response": f"r{k}", "facsco_grm_scaled": k} for k in (40, 30, 20)]
    rows += [MUCE | {"Response": "x", "facsco_grm_scaled": 10, "Set": "Test"}]
    poems = MUCE | {"TasksNamesFull": "Poems", "FullPrompt": "Write a poem."}
    rows += [poems | {"Response": f"r{k}", "facsco_grm_scaled": k} for k in (50, 29.5)]
    return write(tmp_path / "muce.jsonl", rows)


@pytest.fixture
def make(tmp_path, run_main):
    """make("pairs", path, *flags): the rows that the command writes, and the lines it prints."""

    def call(name, path, *flags):
        out = tmp_path / "out.jsonl"
        lines = run_main("data", name, "--data", path, "--out", out, *flags).splitlines()
        return read(out), lines

    return call


def test_the_pairs_command(make, muce):
    """40-30, 40-20, 30-20 and 50-29.5; a pair keeps its prompt's columns and both scores."""
    rows, printed = make("pairs", muce, "--split", "Training")
    shared = {"dataset": "d", "language": "English", "label": "creativity"}
    assert rows == [
        {"task": task, "prompt": prompt, "chosen": f"r{high}", "rejected": f"r{low}"}
        | {"score_chosen": high, "score_rejected": low}
        | shared
        for task, prompt, high, low in (
            ("Uses", "Name a use.", 40, 30),
            ("Uses", "Name a use.", 40, 20),
            ("Uses", "Name a use.", 30, 20),
            ("Poems", "Write a poem.", 50, 29.5),
        )
    ]
    counts = ["task prompts pairs", "Uses 1 3", "Poems 1 1", "total 2 4"]
    assert [" ".join(line.split()) for line in printed[3:]] == counts


def test_the_flags_choose_rows_and_what_they_leave_is_printed(tmp_path, make):
    """Scores 50, 40, 30, 28, 10; 50 again in another split and in another language.

    10 is too low. With one pair a response 50-40 comes first; 30-28, the rest, is too near.
    """
    rows = [
        {"prompt": "p", "response": text, "score": score, "split": split, "language": "L"}
        for text, score, split in zip("abcde", (50, 40, 30, 28, 10), "TTTTV", strict=True)
    ]
    rows += [rows[0] | {"split": "W"}, rows[0] | {"language": "M"}]
    flags = ("--max-pairs", 1, "--split", "T", "V", "--languages", "L")
    pairs, printed = make("pairs", write(tmp_path / "a.jsonl", rows), *flags)
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("a", "b")]
    assert printed[:3] == [
        "             7 rated responses, scored 10 to 50",
        "             4 of those 5 score 20 or more",
        f"1 record in {tmp_path / 'out.jsonl'}",
    ]


def test_the_sft_command(make, muce, tmp_path):
    """30 is good enough, 29.5 is not; conversations stay as they are."""
    rows, printed = make("sft", muce)
    assert rows == [
        {"task": task, "prompt": prompt, "response": f"r{score}", "score": score}
        for task, prompt, score in (
            ("Uses", "Name a use.", 40),
            ("Uses", "Name a use.", 30),
            ("Poems", "Write a poem.", 50),
        )
    ]
    assert printed[1] == "             3 of those 6 score 30 or more"
    assert printed[-1].split() == ["total", "2", "3"]
    chats = [{"messages": [SYSTEM, USER, says(text)], "score": 30} for text in "AB"]
    assert make("sft", write(tmp_path / "chats.jsonl", chats))[0] == chats


def test_the_stats_command(tmp_path, run_main):
    """1,234 samples of two prompts."""
    rows = [{"prompt": f"p{k % 2}", "response": "r"} for k in range(1234)]
    path = write(tmp_path / "a.jsonl", rows)
    assert run_main("data", "stats", "--data", path).splitlines() == [
        "task        prompts   samples",
        "(no task)         2     1,234",
        "total             2     1,234",
    ]


@pytest.mark.parametrize(
    ("row", "leak"),
    [
        ({"prompt": "NAME a  use."}, True),
        ({"prompt": "Name a use.", "response": "C"}, True),
        ({"messages": [USER, says("C")]}, True),
        ({"prompt": [USER], "chosen": "C", "rejected": "D"}, True),
        ({"prompt": [SYSTEM, USER], "response": "C"}, False),
    ],
    ids=["prompt", "sample", "messages", "preference", "another system turn"],
)
def test_a_prompt_in_two_files_is_a_leak_whatever_its_form(tmp_path, run_main, row, leak):
    pairs = [
        {"chosen": [USER, says("A")], "rejected": [USER, says("B")]},
        {"prompt": "Mine alone.", "chosen": "A", "rejected": "B"},
    ]
    mine, other = write(tmp_path / "a.jsonl", pairs), write(tmp_path / "b.jsonl", [row])
    lines = run_main("data", "stats", "--data", mine, "--against", other).splitlines()
    message = f"{leak:d} of the 2 prompts are in {other} too"
    assert lines[3:] == [message, *["  'Name a use.'"] * leak]


@pytest.mark.parametrize("name", ["pairs", "sft"])
def test_flags_that_leave_nothing_are_refused_in_one_sentence(tmp_path, refused, muce, name):
    for flags, message in (
        (("--min-score", 60), f"{muce}: no row is left; for pairs, lower"),
        (("--split", "Odd"), f"{muce}: no split is 'Odd'; there is ['Test', 'Training']"),
        (("--languages", "English", "Odd"), f"{muce}: no language is 'Odd'; there is"),
    ):
        out = tmp_path / "out.jsonl"
        assert refused("data", name, "--data", muce, "--out", out, *flags).startswith(message)
