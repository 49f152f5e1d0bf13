"""Wrong and hostile rows and files of each form: a sentence names the file and the line, or the rows are counted."""

import functools
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from chat_templates import chat_model
from chat_templates import load as load_as

from support.data import load_dialogues, load_splits
from support.data_forms import form_of
from support.errors import UserError

USER, REPLY = {"role": "user", "content": "Hi ."}, {"role": "assistant", "content": "Hello ."}
SYSTEM = {"role": "system", "content": "Be kind ."}
EXPECTED = "; expected system, user or assistant"
NOT_UTF8 = "is not valid UTF-8"


def said(content):
    """A row of messages whose second message has that content."""
    return {"messages": [USER, {"role": "assistant", "content": content}]}


def by(role, **others):
    """A row of messages whose first message has that role."""
    return {"messages": [{"role": role, "content": "Hi ."} | others, REPLY]}


def nested(n, begin="[", end="]"):
    return begin * n + ("1" if end == "}" else "") + end * n


def row_of(content):
    """JSON of a row whose content is that JSON."""
    return f'{{"messages": [{{"role": "user", "content": {content}}}]}}'


GOOD = {"messages": [USER, REPLY]}
SECOND = r"message 2 of 2 \(assistant\)"
MESSAGES = [  # a row, and what is said of it
    (said(""), f"{SECOND} is empty"),
    (said(" \t\n\u3000"), f"{SECOND} is empty"),
    (said("\u200b\u2060\ufeff\u200d"), f"{SECOND} is empty"),
    (said("\u202e\u2066"), f"{SECOND} is empty"),  # marks of direction
    (said([]), f"{SECOND} is empty"),
    (said("Hel\0lo"), f"{SECOND} holds a NUL character"),
    (row_of('"Hi \\ud83d"'), rf"message 1 of 1 \(user\) {NOT_UTF8}"),
    (row_of('"\\udc00\\ud800"'), NOT_UTF8),
    (said("caf\ufffd"), f"{SECOND} {NOT_UTF8}"),
    (row_of('"caf\xe9"').encode("latin-1"), rf"message 1 of 1 \(user\) {NOT_UTF8}"),
    ({"messages": [SYSTEM | {"content": "\0"}, USER, REPLY]}, r"message 1 of 3 \(system\) holds a NUL"),
    ({"messages": [SYSTEM | {"content": "\u200b"}, USER, REPLY]}, r"message 1 of 3 \(system\) is empty"),
    (by("boss"), f"message 1 of 2 has the role 'boss'{EXPECTED}"),
    (by("\u202euser"), r"message 1 of 2 has the role '\\u202euser'"),
    (by("x" * 5000), "message 1 of 2 has the role 'x{39}; expected"),
    (by(""), f"message 1 of 2 has the role ''{EXPECTED}"),
    (by(None), f"message 1 of 2 has no role{EXPECTED}"),
    ({"messages": [{"content": "Hi ."}, REPLY]}, "message 1 of 2 has no role"),
    (by(3), "message 1 of 2 has the role 3;"),
    (by(["user"]), r"message 1 of 2 has the role \['user'\];"),
    (by({"user": 1}), "message 1 of 2 has the role {'user': 1};"),
    ({"messages": [USER, SYSTEM, REPLY]}, r"message 2 of 3 \(system\) comes after others; expected .* beginning"),
    ({"messages": [SYSTEM, SYSTEM, USER]}, r"message 2 of 3 \(system\) comes after others"),
    (by("assistant", tool_calls=[{"id": "1"}]), "message 1 of 2 calls a tool or is its answer; expected text"),
    (by("assistant", content=None, tool_calls=[{"id": "1"}]), "message 1 of 2 calls a tool"),
    (by("tool"), "message 1 of 2 calls a tool or is its answer"),
    (by("Function"), "message 1 of 2 calls a tool or is its answer"),
    ({"messages": [{"from": "observation", "value": "3"}]}, "message 1 of 1 calls a tool"),
    (said(None), f"{SECOND} has no content"),
    ({"messages": [USER, {"role": "assistant"}]}, f"{SECOND} has no content"),
    ({"messages": [USER, {"role": "assistant", "text": "Hello ."}]}, f"{SECOND} has no content"),
    (said(3), f"the content of {SECOND} is not text but 3"),
    (said(True), f"the content of {SECOND} is not text but True"),
    (said({"text": "Hello ."}), f"the content of {SECOND} is not text but {{'text'"),
    (
        said([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]),
        f"part 2 of {SECOND} is no text but",
    ),
    (said([{"type": "image"}]), f"part 1 of {SECOND} is no text but image; expected text alone"),
    (said([{"type": "image", "text": "a cat"}]), f"part 1 of {SECOND} is no text but image"),
    (said([{"type": "text"}]), f"part 1 of {SECOND} has no text but None"),
    (said([{"text": 3}]), f"part 1 of {SECOND} has no text but 3"),
    (said([{"type": "text", "text": "a"}, None]), f"part 2 of {SECOND} has no text but None"),
    (said([{"type": "text", "text": "a\0"}]), f"{SECOND} holds a NUL"),
    ({"messages": {"role": "user"}}, "'messages' should be a list, found {'role'"),
    ({"messages": 3}, "'messages' should be a list, found 3"),
    ({"messages": ["Hi ."]}, "message 1 of 1 is not an object with role and content but 'Hi .'"),
    ({"messages": [USER, None]}, "message 2 of 2 is not an object with role and content but None"),
    ({"messages": [[USER]]}, r"message 1 of 1 is not an object with role and content but \[{"),
    ({"messages": "Hi ."}, "'messages' should be a list, found 'Hi .'"),
    ({"messages": '[{"role": "user", "content": "Hi'}, r"'messages' should be a list, found '\[{"),
    ({"messages": '{"role": "user", "content": "Hi ."}'}, "'messages' should be a list"),
    ({"messages": "__import__('os').abort()"}, "'messages' should be a list"),
    ({"messages": []}, "'messages' has no turn of a user or an assistant"),
    ({"messages": [SYSTEM]}, "'messages' has no turn of a user or an assistant"),
    (GOOD | {"act": [1]}, "2 utterances but 1 values in 'act'"),
    (GOOD | {"act": [1, 1, 1]}, "2 utterances but 3 values in 'act'"),  # there is no system message
    ({"messages": [SYSTEM, USER, REPLY], "act": [1] * 4}, "2 utterances but 4 values in 'act'"),
    (GOOD | {"act": [1, 5]}, "act 5 is out of range; expected 1 to 4"),
    ({"messages": [SYSTEM, USER, REPLY], "act": [9, 0, 1]}, "act 0 is out of range"),
    (GOOD | {"act": ["inform", "question"]}, "'act' should hold whole numbers"),
    (GOOD | {"act": 2}, "'act' should be a list, found 2"),
    (GOOD | {"emotion": [7, 0]}, "emotion 7 is out of range; expected 0 to 6"),
    ({"messages": None}, "the column 'messages' is empty"),
    ({"text": "Hi ."}, r"has no column 'messages' \(columns: text\)"),
    ({}, r"has no column 'messages' \(columns: none\)"),
    ({"dialog": ["Hi ."]}, r"has no column 'messages' \(columns: dialog\)"),
    ({"prompt": "Hi .", "completion": "Hello ."}, r"has no column 'messages' \(columns: prompt, completion\)"),
    ("null", "expected an object, found None"),
    ("[1, 2]", r"expected an object, found \[1, 2\]"),
    ('{"messages": NaN}', "'messages' should be a list, found nan"),
    ('{"messages": ' + "9" * 5000 + "}", "not valid JSON"),
    ('{"messages": [', "not valid JSON"),
    (row_of(nested(1000)), "not valid JSON|part 1 of message 1 of 1"),  # which one depends on Python
    (row_of(nested(900)), r"part 1 of message 1 of 1 \(user\) has no text but \[{40}"),
    (row_of(nested(900, '{"a":', "}")), r"the content of message 1 of 1 \(user\) is not text but {'a': {'a'"),
    (row_of('"Hi"') + nested(1000), "not valid JSON"),
    (f'{{"messages": {nested(100_000)}}}', "not valid JSON"),
    ({"messages": nested(100_000)}, r"'messages' should be a list, found '\[{59}"),
]

PAIR = {"prompt": "Hi .", "completion": "Hello ."}
PAIRS = [
    (PAIR | {"prompt": ""}, "'prompt' is empty"),
    (PAIR | {"prompt": "\u200b \n"}, "'prompt' is empty"),
    (PAIR | {"completion": " "}, "'completion' is empty"),
    (PAIR | {"prompt": "a\0"}, "'prompt' holds a NUL character"),
    (PAIR | {"completion": "caf\ufffd"}, f"'completion' {NOT_UTF8}"),
    (PAIR | {"prompt": None}, "the column 'prompt' is empty"),
    ({"prompt": "Hi ."}, r"has no column 'completion' \(columns: prompt\)"),
    ({"prompt": "Hi .", "response": "Hello ."}, r"has no column 'completion' \(columns: prompt, response\)"),
    (PAIR | {"prompt": []}, "'prompt' has no turn"),
    (PAIR | {"prompt": [SYSTEM]}, "'prompt' has no turn"),
    (PAIR | {"completion": []}, "'completion' has no turn"),
    (
        PAIR | {"prompt": "Ho .", "completion": [USER, REPLY]},
        "'completion' begins with a turn of the user; expected the assistant's",
    ),
    ({"prompt": [USER], "completion": [USER]}, "'completion' begins with a turn of the user"),
    (PAIR | {"prompt": [USER, REPLY]}, "'prompt' ends with a turn of the assistant; expected the user's"),
    (PAIR | {"prompt": [REPLY]}, "'prompt' ends with a turn of the assistant"),
    (PAIR | {"prompt": [{"role": "user", "content": ""}]}, r"message 1 of 1 \(user\) is empty"),
    (PAIR | {"prompt": '[{"role": "user", "content": "Hi'}, "'prompt' should be a list, found"),
    (PAIR | {"prompt": 3}, "'prompt' should be a text or a list of messages, found 3"),
    (PAIR | {"prompt": ["Hi ."]}, "message 1 of 1 is not an object"),
]

CHOICE = {"prompt": "Hi .", "chosen": "Hello .", "rejected": "No ."}
CHOICES = [
    (CHOICE | {"chosen": None}, "the column 'chosen' is empty"),
    (CHOICE | {"rejected": None}, "the column 'rejected' is empty"),
    (CHOICE | {"chosen": ""}, "'chosen' is empty"),
    (CHOICE | {"chosen": [USER]}, "'chosen' begins with a turn of the user"),
    (CHOICE | {"chosen": [USER, REPLY], "prompt": [REPLY, USER]}, "'chosen' begins with a turn of the user"),
    (CHOICE | {"prompt": [USER, REPLY]}, "'prompt' ends with a turn of the assistant"),
]

IMPLICIT = {"chosen": "Hi . Hello .", "rejected": "Hi . No ."}
NO_BEGINNING = "'chosen' and 'rejected' have no common beginning that could be the prompt"
NO_TURNS = "'chosen' and 'rejected' do not begin with the same turns of a user"
HUMAN = "\n\nHuman: Hi .\n\nAssistant:"
BOTH = [
    (IMPLICIT | {"chosen": None}, "the column 'chosen' is empty"),
    ({"chosen": "Yes .", "rejected": "No ."}, NO_BEGINNING),
    ({"chosen": "", "rejected": ""}, "are the same text"),
    ({"chosen": "Hi . Hello .", "rejected": "Hi . Hello ."}, "are the same text, so that nothing says where"),
    ({"chosen": "Hi . ", "rejected": "Hi . No ."}, NO_BEGINNING),  # there is no reply
    ({"chosen": "Hi .", "rejected": [USER, REPLY]}, "should both be texts, or both lists of messages"),
    ({"chosen": [USER, REPLY], "rejected": "Hi . No ."}, "should both be texts, or both lists of messages"),
    ({"chosen": f"{HUMAN} Hello .", "rejected": "No ."}, NO_BEGINNING),
    ({"chosen": HUMAN, "rejected": f"{HUMAN} No ."}, r"turn 2 of 2 \(assistant\) of 'chosen' is empty"),
    ({"chosen": f"{HUMAN} \0", "rejected": f"{HUMAN} No ."}, r"turn 2 of 2 \(assistant\) of 'chosen' holds a NUL"),
    ({"chosen": "\n\nHuman: Hi .", "rejected": "\n\nHuman: Hi ."}, NO_TURNS),
    ({"chosen": [USER, REPLY], "rejected": [USER | {"content": "Ho ."}, REPLY]}, NO_TURNS),
    ({"chosen": [REPLY, USER], "rejected": [REPLY, USER]}, NO_TURNS),
    ({"chosen": [], "rejected": []}, "'chosen' has no turn of a user or an assistant"),
    ({"chosen": [USER, REPLY], "rejected": []}, NO_TURNS),
    ({"chosen": 3, "rejected": 3}, "'chosen' should be a list, found 3"),
]
PROMPTS = [
    ({"prompt": " "}, "'prompt' is empty"),
    ({"prompt": [USER, REPLY]}, "'prompt' ends with a turn of the assistant"),
    ({"prompt": None}, "the column 'prompt' is empty"),
    (PAIR, "has a 'completion', while the rows before it are a prompt alone"),
    ({"prompt": "Hi .", "chosen": [REPLY]}, "has a 'chosen', while"),
]
TABLE = [(GOOD, *case) for case in MESSAGES] + [(PAIR, *case) for case in PAIRS] + [(CHOICE, *c) for c in CHOICES]
TABLE += [(IMPLICIT, *case) for case in BOTH] + [({"prompt": "Hi ."}, *case) for case in PROMPTS]


def line_of(row):
    text = row if isinstance(row, (str, bytes)) else json.dumps(row)
    return (text if isinstance(text, bytes) else text.encode()) + b"\n"


@pytest.fixture
def chats(tmp_path):
    """Writes rows as a split of a folder and returns the folder's path."""

    def write(rows, split="train"):
        (tmp_path / f"{split}.jsonl").write_bytes(b"".join(map(line_of, rows)))
        return str(tmp_path)

    return write


@pytest.mark.parametrize("good, bad, fault", TABLE, ids=range(len(TABLE)))
def test_a_bad_row_is_named_or_left_out(good, bad, fault, chats, tmp_path):
    path = chats([good, bad, good])
    with pytest.raises(UserError) as refused:
        load_dialogues(path, "train")
    answer = str(refused.value)
    assert re.match(rf"{tmp_path}/train\.jsonl, line 2: .*(?:{fault})", answer), answer
    assert "Mend the row, or leave out all such rows with --skip-bad-rows." in answer
    assert len(answer) - len(path) < 500 and "\0" not in answer
    found = load_dialogues(path, "train", skip_bad_rows=True)
    assert (
        len(found) == 2 and found.n_skipped == 1 and found[0] == found[1] == load_dialogues(chats([good]), "train")[0]
    )
    assert found.skipped == [answer.partition(". Mend")[0]]


ALONE = [bad for good, bad, _ in TABLE if not isinstance(bad, dict) or form_of(bad) in (None, form_of(good))]


@pytest.mark.parametrize("bad", ALONE, ids=range(len(ALONE)))
def test_advice_for_a_file_of_bad_rows_never_names_the_columns_that_it_has(bad, chats):
    for skip in (False, True):
        with pytest.raises(UserError, match="9 of 9 rows are malformed") as refused:
            load_dialogues(chats([bad] * 9), "train", skip_bad_rows=skip)
        answer = str(refused.value)
        assert "--skip-bad-rows" not in answer
        for names in re.findall(r"rename (?:it|the columns) to ('\w+'(?: and '\w+')*)", answer):
            assert not set(re.findall(r"\w+", names)) - {"and"} <= bad.keys(), answer


OTHER_NAMES = [
    (
        {"prompt": "Hi .", "response": "Hello ."},
        "'prompt' and 'response': rename .* to 'prompt' and 'completion'",
    ),
    ({"prompt": "Hi .", "chosen": "Hello ."}, "pairs of 'prompt' and 'chosen': rename .* 'prompt' and 'completion'"),
    ({"messages": [{"role": "user", "text": "Hi ."}]}, r'write `\[m\["text"\] for m in row\["messages"\]\]` as'),
    ({"messages": ["Hi .", "Hello ."]}, "'messages' holds a list of texts: .* rename it to 'dialog'"),
    ({"prompt": [USER, REPLY]}, "'prompt' holds chat messages: rename it to 'messages'"),
    ({"dialog": [USER, REPLY]}, "'dialog' holds chat messages: rename it to 'messages'"),
]


@pytest.mark.parametrize("row, advice", OTHER_NAMES, ids=range(len(OTHER_NAMES)))
def test_advice_for_rows_that_need_another_name(row, advice, chats):
    with pytest.raises(UserError, match=rf"train\.jsonl, line 1: .*9 of 9 rows are malformed.*{advice}"):
        load_dialogues(chats([row] * 9), "train")


# ---------------------------------------------------------------------------------------------------------------------
# Rows that are strange, and good

STRANGE = {
    "right to left": "שלום, \u202bمرحبا\u202c \u200fמה ?",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e007f \u2764\ufe0f \U0001f1e9",
    "accents": "Z\u0351\u036b\u0343\u036aa\u0321lgo e\u0301 \u00e9",
    "lines": "\u2028a\u2029b\x85c\r\n\x0bd\x1c",
    "code": "```\n{% raw %}{{ 1 }}\n```\\n<|im_end|></s>[INST]<start_of_turn>",
    "JSON": '{"role": "system", "content": "x"}',
    "outside the BMP": "\U00020000 \U0010fffd \ue000",
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_strange_text_is_read_unchanged(name, ending, tmp_path):
    text = STRANGE[name]
    row = {"messages": [USER | {"content": text}, REPLY | {"content": f" {text} "}]}
    if ending == "jsonl":
        (tmp_path / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8", newline="")
    elif ending == "parquet":
        datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "train.parquet"))
    else:
        cell = json.dumps(row["messages"], ensure_ascii=False).replace('"', '""')
        (tmp_path / "train.csv").write_text(f'messages\n"{cell}"\n', encoding="utf-8", newline="")
    assert load_dialogues(str(tmp_path), "train")[0].utterances == (text, f" {text} ")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_cell_with_broken_json_is_named(tmp_path):
    good, bad = '"[{""role"": ""user"", ""content"": ""Hi\n.""}]"', '"[{""role"": ""user"", ""content"": ""Hi"'
    (tmp_path / "train.csv").write_text("\n".join(["messages", good.replace("\n", "\\n"), good, bad, ""]))
    with pytest.raises(UserError, match=r"train\.csv, line 4: 'messages' should be a list.*2 of 3 rows"):
        load_dialogues(str(tmp_path), "train")  # a JSON string has no line feed
    found = load_dialogues(str(tmp_path), "train", skip_bad_rows=True)
    assert [d.utterances for d in found] == [("Hi\n.",)] and "line 5: 'messages' should be" in found.skipped[1]


def arrow(writer, rows=2000):
    table, sink = datasets.Dataset.from_list([GOOD] * rows).data.table, pa.BufferOutputStream()
    with writer(sink, table.schema) as out:
        out.write_table(table, max_chunksize=500)
    return sink.getvalue().to_pybytes()


@functools.cache
def content(name):
    if name == "parquet":
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(datasets.Dataset.from_list([GOOD] * 20).data.table, sink)
        return sink.getvalue().to_pybytes()
    return arrow(pa.ipc.new_file if name == "file" else pa.ipc.new_stream)


CUT = "is not an Arrow file that can be read"
FILES = [  # name, content, what is said
    *((f"cut{n}.arrow", lambda n=n, k=k: content(k)[:n], CUT) for k in ("file", "stream") for n in (3, 8, 100, 20_000)),
    ("a.arrow", lambda: content("parquet"), r"is a parquet file; expected Arrow\. Rename it to \.parquet"),
    ("a.arrow", lambda: line_of(GOOD) * 30, r"holds text; expected Arrow\. Rename it to \.jsonl"),
    ("a.arrow", lambda: b"", CUT),
    ("a.arrow", lambda: b"\x1f\x8b" + b"x" * 50, "is packed by gzip; expected Arrow. Unpack it"),
    ("a.arrow", lambda: b"\xff\xff\xff\xff\xff\xff\xff\x7f", CUT),
    ("a.jsonl", lambda: content("file"), r"is an Arrow file; expected UTF-8 text\. Rename it to \.arrow"),
    ("a.jsonl", lambda: content("stream"), r"is an Arrow file; expected UTF-8 text\. Rename it to \.arrow"),
    ("a.csv", lambda: content("parquet"), r"is a parquet file; expected UTF-8 text\. Rename it to \.parquet"),
    ("a.parquet", lambda: content("file"), r"is an Arrow file; expected parquet\. Rename it to \.arrow"),
    ("a.parquet", lambda: content("stream"), r"is an Arrow file; expected parquet\. Rename it to \.arrow"),
    ("a.parquet", lambda: content("parquet")[:-9], "is not a parquet file that can be read"),
    ("a.json", lambda: b"[" + b",".join([line_of(GOOD)] * 9), r"line \d+: not valid JSON"),
    ("a.json", lambda: json.dumps({str(i): PAIR for i in range(9)}).encode(), "one object with a dialogue under each"),
    ("a.json", lambda: json.dumps({"data": [GOOD] * 9}).encode(), "one object with the rows in its list 'data'"),
]


@pytest.mark.parametrize("name, written, fault", FILES, ids=range(len(FILES)))
@pytest.mark.parametrize("skip", [False, True])
def test_a_file_of_another_kind_or_a_torn_one_is_refused(name, written, fault, skip, tmp_path):
    (tmp_path / name).write_bytes(written())
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / name.partition('.')[0]))}.*{fault}") as refused:
        load_splits(str(tmp_path / name), ["train"], skip_bad_rows=skip)
    assert "\n" not in str(refused.value)


def test_a_row_of_a_table_is_named_by_its_number(tmp_path):
    rows = [GOOD] * 1500 + [by("boss"), said(None)] + [GOOD] * 20
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(UserError, match=r"train\.parquet, row 1501: .* the role 'boss'.*2 of 1522 rows"):
        load_dialogues(str(tmp_path), "train")
    found = load_dialogues(str(tmp_path), "train", skip_bad_rows=True)
    assert len(found) == 1520 and "row 1502: message 2 of 2 (assistant) has no content" in found.skipped[1]
    assert found.place(-1).endswith("train.parquet, row 1522")


# ---------------------------------------------------------------------------------------------------------------------
# What a template or its lengths have against a row


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model with the template of that name."""
    return functools.cache(lambda name: chat_model(tmp_path_factory.mktemp("model"), name))


def load(*args, **settings):
    """The samples of each split, and the lines that a load says."""
    found = load_as(*args, **settings)
    return found.samples, found.lines


TALK = [[USER | {"content": f"{i} ?"}, REPLY] for i in range(12)]
TWICE = [USER, USER | {"content": "Well ?"}, REPLY]
REFUSED = [  # template, messages, what it says
    ("Mistral", TWICE, "After the optional system message, roles must alternate user/assistant"),
    ("Mistral", [SYSTEM, REPLY, USER, REPLY], "After the optional system message, roles must alternate"),
    ("Gemma", [SYSTEM, USER, REPLY], "System role not supported"),
    ("Gemma", TWICE, "Conversation roles must alternate"),
]


@pytest.mark.parametrize("name, messages, fault", REFUSED, ids=range(len(REFUSED)))
def test_a_row_that_the_template_refuses_is_named_or_counted(name, messages, fault, model, chats):
    rows = [{"messages": talk} for talk in TALK]
    rows[7:7] = [{"messages": messages}, {"messages": [*messages, *TWICE]}]
    path = chats(rows)
    sentence = f"{path}/train.jsonl, line 8: the chat template refuses the conversation: {fault}"
    with pytest.raises(UserError, match=f"{sentence}.*Mend the row, or leave out such rows with --skip-bad-rows"):
        load(model(name), path)
    samples, lines = load(model(name), path, skip_bad_rows=True)
    assert len(samples["train"]) == 12 and len(samples["train"].refused) == 2
    assert lines[-1].startswith(f"train: 14 dialogues, 12 samples, 2 conversations skipped ({sentence}")
    with pytest.raises(UserError, match="refuses all conversations of the train split; .*line 1: the chat template"):
        load(model(name), chats([{"messages": messages}] * 3), skip_bad_rows=True)


@pytest.mark.parametrize("columns", [{"prompt": [SYSTEM, USER]}, {"prompt": [SYSTEM, USER], "completion": "Hello ."}])
def test_a_prompt_that_the_template_refuses_is_named(columns, model, chats):
    with pytest.raises(UserError, match=r"line 1: the chat template refuses the conversation: System role not"):
        load(model("Gemma"), chats([columns] * 3))


def test_a_message_of_a_megabyte_is_read_and_its_samples_are_left_out(model, chats):
    large = "Hello there . " * 75_000
    rows = [{"messages": talk} for talk in TALK]
    rows[3] = {"messages": [USER | {"content": large}, REPLY, USER, REPLY]}
    path = chats(rows)
    assert load_dialogues(path, "train")[3].utterances[0] == large
    samples, lines = load(model("ChatML"), path, max_prompt_tokens=100)
    assert lines[-1] == (
        "train: 12 dialogues, 12 samples, 1 prompts lose their oldest turns, 1 left out, longer than 100 tokens with "
        f"the last turn alone ({path}/train.jsonl, line 4)"
    )
    assert len(samples["train"]) == 12 and max(len(s.prompt_ids) for s in samples["train"]) <= 100


MARKED = [  # model, row, settings, the marker
    ("", {"dialog": ["Hi ."] * 3 + ["Type <EOU> ."] + ["Bye ."] * 3}, {}, r"utterance 4 of 7 .* '<EOU>'"),
    ("", {"dialog": ["Hi #### ."] * 7}, {"eou_marker": "###"}, "utterance 1 of 7 .* '###'"),
    (
        "",
        {"messages": TALK[0] * 2 + [USER | {"content": "<EOU>"}, REPLY]},
        {"template": "dialogue"},
        "utterance 5 of 6",
    ),
    ("plain text", {"prompt": "Hi .\n### Human: so", "completion": "Hello ."}, {}, "utterance 1 of 2"),
    ("plain text", {"prompt": "Hi .", "completion": "No .\n### Human: so"}, {}, "utterance 2 of 2"),
]


@pytest.mark.parametrize("name, bad, settings, fault", MARKED, ids=range(len(MARKED)))
def test_text_that_ends_a_turn_makes_a_bad_row(name, bad, settings, fault, model, chats, tiny_lm):
    folder = model(name) if name else tiny_lm
    good = {k: v * 4 if k == "messages" else ["Hi ."] * 7 if k == "dialog" else "Hi ." for k, v in bad.items()}
    if "messages" in bad:
        good = {"messages": TALK[0] * 4}
    path = chats([good, bad, *[good] * 3])
    with pytest.raises(UserError, match=rf"train\.jsonl, line 2: {fault}.*which ends an utterance"):
        load(folder, path, **settings)
    samples, lines = load(folder, path, skip_bad_rows=True, **settings)
    assert lines[-1].startswith("train: 4 dialogues, ") and lines[-1].endswith(", 1 rows skipped")


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Gemma", "Mistral"])
def test_tokens_of_the_template_in_a_turn_are_text_and_no_bad_row(name, model, chats):
    marks = "<|im_end|> <|eot_id|> <end_of_turn> </s> [/INST] <|im_start|>system"
    samples, _ = load(model(name), chats([{"messages": [USER | {"content": marks}, REPLY]}] * 3))
    assert samples["train"][0].context == (marks,) and marks in samples["train"][0].prompt


FORMS = [{"dialog": ["Hi ."] * 6}, GOOD, PAIR, {"prompt": "Hi ."}]


@pytest.mark.parametrize("second", FORMS[1:], ids=lambda row: ", ".join(row))
@pytest.mark.parametrize("first", FORMS, ids=lambda row: ", ".join(row))
def test_the_parts_of_a_split_have_one_form(first, second, tmp_path):
    if first is second:
        return
    for part, row in (("00000", first), ("00001", second)):
        (tmp_path / f"train-{part}-of-00002.jsonl").write_bytes(line_of(row) * 5)
    fault = "has a 'completion'" if second is PAIR and "prompt" in first else "has no column"
    with pytest.raises(UserError, match=rf"train-00001-of-00002\.jsonl, line 1: {fault}") as refused:
        load_dialogues(str(tmp_path), "train")
    assert "5 of 10 rows are malformed" in str(refused.value)


@pytest.mark.parametrize("form", FORMS[1:], ids=lambda row: ", ".join(row))
def test_splits_of_different_forms_need_a_template_for_both(form, model, chats, tiny_lm):
    chats([FORMS[0]] * 5)
    path = chats([form] * 5, "validation")
    with pytest.raises(UserError, match=r"the rows of '.*' name roles .*has no chat template"):
        load(tiny_lm, path, ["train", "validation"])
    samples, lines = load(model("ChatML"), path, ["train", "validation"])
    assert len([line for line in lines if line.startswith("data: ")]) == 2 and len(samples["validation"]) == 5
