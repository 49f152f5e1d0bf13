"""Every form of data gives the same conversations from every kind of file, and what is wrong names its row."""

import csv
import json
import tracemalloc
from dataclasses import dataclass

import datasets
import pyarrow
import pytest
from chat_templates import chat_model
from conftest import make_tokenizer

import support.data
import support.spool
from support.data import Dialogue, load_dialogues, load_splits
from support.data_forms import form_of
from support.errors import UserError
from support.models import load_codec
from support.options import FormatOptions, SampleOptions, TextOptions
from support.samples import load_samples
from support.text import DialogueCodec, DialogueFormat

SYSTEM, ASK, REPLY, MORE = "Be kind .", "How are you ?", "Fine , thanks .", "Good ."


def message(role, content):
    return {"role": role, "content": content}


TALK = [message("system", SYSTEM), message("user", ASK), message("assistant", REPLY)]
LONGER = [*TALK, message("user", MORE), message("assistant", "Bye !")]
WORSE = [*LONGER[:-1], message("assistant", "What ?")]
SHAREGPT = [{"from": "system", "value": SYSTEM}, {"from": "human", "value": ASK}, {"from": "gpt", "value": REPLY}]
PARTS = [message("user", [{"type": "text", "text": "How are "}, {"type": "text", "text": "you ?"}]),
         message("assistant", [{"type": "text", "text": REPLY}])]  # fmt: skip
OTHER_ROLES = [message("developer", SYSTEM), message("Human", ASK), message("model", REPLY)]
HH = "\n\nHuman: How are you ?\n\nAssistant: Fine , thanks .\n\nHuman: Good .\n\nAssistant: "


def dialogue(texts, system="", first_reply=0, acts=None):
    zeros, roles = (0,) * len(texts), ("user", "assistant") * 4
    return Dialogue(tuple(texts), acts or zeros, zeros, roles[: len(texts)], system, first_reply)


PAIR, FOUR = dialogue([ASK, REPLY], SYSTEM), [ASK, REPLY, MORE, "Bye !"]
FORMS = {  # a row, the name of its form, and the conversation
    "dialog": ({"dialog": [ASK, REPLY]}, "dialog", Dialogue((ASK, REPLY), (0, 0), (0, 0))),
    "messages": ({"messages": TALK}, "messages", PAIR),
    "messages with acts": ({"messages": TALK, "act": [2, 1]}, "messages", dialogue([ASK, REPLY], SYSTEM, 0, (2, 1))),
    "an act for the system message": (
        {"messages": TALK, "act": [1, 2, 1]}, "messages", dialogue([ASK, REPLY], SYSTEM, 0, (2, 1))
    ),
    "roles of other names": ({"messages": OTHER_ROLES}, "messages", PAIR),
    "text parts": ({"messages": PARTS}, "messages", dialogue([ASK, REPLY])),
    "messages before other columns": ({"prompt": "x", "messages": TALK, "source": "y"}, "messages", PAIR),
    "ShareGPT": ({"conversations": SHAREGPT}, "conversations", PAIR),
    "prompt and completion": (
        {"prompt": ASK, "completion": REPLY}, "prompt, completion", dialogue([ASK, REPLY], "", 1)
    ),
    "prompt and completion of messages": (
        {"prompt": LONGER[:4], "completion": LONGER[4:]}, "prompt, completion", dialogue(FOUR, SYSTEM, 3)
    ),
    "a labelled completion": (
        {"prompt": ASK, "completion": REPLY, "label": True}, "prompt, completion", dialogue([ASK, REPLY], "", 1)
    ),
    "preferences": (
        {"prompt": ASK, "chosen": REPLY, "rejected": "No ."}, "prompt, chosen, rejected", dialogue([ASK, REPLY], "", 1)
    ),
    "preferences that repeat the prompt": (
        {"prompt": LONGER[:4], "chosen": LONGER, "rejected": WORSE}, "prompt, chosen, rejected",
        dialogue(FOUR, SYSTEM, 3)
    ),
    "implicit prompts": ({"chosen": LONGER, "rejected": WORSE}, "chosen, rejected", dialogue(FOUR, SYSTEM, 3)),
    "transcripts": ({"chosen": HH + "Bye !", "rejected": HH + "What ?"}, "chosen, rejected", dialogue(FOUR, "", 3)),
    "texts with one beginning": (
        {"chosen": "How are you ? Fine", "rejected": "How are you ? Bad"},
        "chosen, rejected",
        dialogue(["How are you ?", "Fine"], "", 1),
    ),
    "a prompt": ({"prompt": ASK}, "prompt", dialogue([ASK], "", 1)),
    "a prompt of messages": ({"prompt": LONGER[:4]}, "prompt", dialogue(FOUR[:3], SYSTEM, 3)),
}  # fmt: skip


def json_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(file, rows):
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})


def arrow_file(file, rows):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)


def arrow_stream(file, rows):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)


SOURCES = {
    "train.jsonl": json_lines,
    "train.json": lambda file, rows: file.write_text(json.dumps(rows)),
    "train.csv": write_csv,
    "train.parquet": lambda file, rows: datasets.Dataset.from_list(rows).to_parquet(str(file)),
    "train.arrow": arrow_file,
    "train-00000.arrow": arrow_stream,
    "train": lambda file, rows: datasets.Dataset.from_list(rows).save_to_disk(str(file)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_from_every_source(name, source, tmp_path):
    row, form, expected = FORMS[name]
    SOURCES[source](tmp_path / source, [row] * 3)
    found = load_dialogues(str(tmp_path), "train")
    assert found == [expected] * 3 and found.form.name == form and found.skipped == []
    assert found.has_acts == any(expected.acts) and found.place(1).startswith(str(tmp_path / source))
    assert form in support.data.form_sentence(str(tmp_path), found)


def test_a_split_is_a_sequence(tmp_path):
    rows = [{"messages": [message("user", f"Number {i} ?"), message("assistant", f"It is {i} .")]} for i in range(9)]
    json_lines(tmp_path / "train.jsonl", rows)
    found = load_dialogues(str(tmp_path), "train")
    assert len(found) == 9 and found[-1].utterances[0] == "Number 8 ?" and [d.utterances for d in found[1::4]] == [
        ("Number 1 ?", "It is 1 ."), ("Number 5 ?", "It is 5 .")
    ]  # fmt: skip
    assert found[1::4].place(1).endswith("line 6") and found == list(found) != list(found)[:-1]
    with pytest.raises(IndexError):
        found[9]


def test_rejected_completions_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": ASK, "completion": f"{REPLY} {i}", "label": i % 2 == 0} for i in range(6)]
    json_lines(tmp_path / "train.jsonl", rows)
    found = load_dialogues(str(tmp_path), "train")
    assert [d.utterances[1][-1] for d in found] == ["0", "2", "4"] and found.skipped == []
    assert "3 rows with a rejected completion left out" in support.data.form_sentence("data", found)


def test_all_copies_of_a_conversation_are_in_one_split(tmp_path):
    rows = [{"messages": [message("user", f"Number {i} ?"), message("assistant", "Yes .")]} for i in range(40)] * 3
    json_lines(tmp_path / "all.jsonl", rows)
    splits = load_splits(str(tmp_path / "all.jsonl"), ("train", "validation", "test"))
    first = [{d.utterances[0] for d in split} for split in splits.values()]
    assert [len(texts) for texts in first] == [36, 2, 2] and len(set.union(*first)) == 40
    assert [len(split) for split in splits.values()] == [108, 6, 6]


def test_many_rows_take_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(support.spool.Spool.__init__, "__defaults__", (2**16,))
    text = "word " * 200
    with (tmp_path / "train.jsonl").open("w") as out:
        for i in range(20_000):
            out.write(json.dumps({"messages": [message("user", f"{text}{i}"), message("assistant", text)]}) + "\n")
    seen = []
    tracemalloc.start()
    found = load_splits(str(tmp_path), ["train"], report=seen.append)["train"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "train.jsonl").stat().st_size > 40e6 and peak < 4e6
    assert (
        len(found) == 20_000
        and found[19_999].utterances[0] == f"{text}19999"
        and seen == list(range(1000, 20_001, 1000))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Wrong rows

U, A = message("user", ASK), message("assistant", REPLY)
DEEP = "[" * 2000 + "]" * 2000
WRONG = {  # rows or lines, and what is said of them
    "empty content": ({"messages": [U, message("assistant", "")]}, r"message 2 of 2 \(assistant\) is empty"),
    "blank content": ({"messages": [message("user", " \n\t"), A]}, r"message 1 of 2 \(user\) is empty"),
    "invisible content": ({"messages": [message("user", "\u200b\u200f\ufeff"), A]}, r"message 1 .* is empty"),
    "NUL": ({"messages": [message("user", "a\0b"), A]}, "message 1 .* holds a NUL character"),
    "lone surrogate": ({"messages": [message("user", "a\ud83d"), A]}, "message 1 .* is not valid UTF-8"),
    "replacement character": ({"messages": [message("user", "a\ufffd"), A]}, "message 1 .* is not valid UTF-8"),
    "NUL in a dialog": ({"dialog": ["Hi .", "a\0"]}, "utterance 2 of 2 holds a NUL character"),
    "surrogate in a prompt": ({"prompt": "\udc00", "completion": "b"}, "'prompt' is not valid UTF-8"),
    "unknown role": ({"messages": [message("narrator", ASK), A]}, "the role 'narrator'; expected system, user or"),
    "no role": ({"messages": [{"content": ASK}, A]}, "message 1 of 2 has no role"),
    "a role that is a number": ({"messages": [message(3, ASK), A]}, "message 1 of 2 has the role 3"),
    "a late system message": ({"messages": [U, TALK[0], A]}, "message 2 .* only at the beginning"),
    "two system messages": ({"messages": [TALK[0], TALK[0], U, A]}, "message 2 .* only at the beginning"),
    "a call of a tool": ({"messages": [U, A | {"tool_calls": [{"name": "f"}]}]}, "message 2 of 2 calls a tool"),
    "an answer of a tool": ({"messages": [U, message("tool", "4"), A]}, "message 2 of 3 calls a tool or is its answer"),
    "no content": ({"messages": [U, message("assistant", None)]}, r"message 2 of 2 \(assistant\) has no content"),
    "a number": ({"messages": [message("user", 7), A]}, "the content of message 1 .* is not text but 7"),
    "an object": ({"messages": [message("user", {"a": 1}), A]}, "the content of message 1 .* is not text but"),
    "an image": ({"messages": [message("user", [{"type": "image"}]), A]}, "part 1 of message 1 .* but image"),
    "nested parts": ({"messages": [message("user", [{"type": "text", "text": [{"type": "image"}]}]), A]}, "part 1 of"),
    "an image beside text": (
        {"messages": [message("user", [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": "x"}]), A]},
        "part 2 of message 1 .* but image_url; expected text alone",
    ),
    "no list": ({"messages": 5}, "'messages' should be a list, found 5"),
    "a text": ({"messages": "Hello"}, "'messages' should be a list, found 'Hello'"),
    "a list of texts": ({"messages": [ASK, REPLY]}, "message 1 of 2 is not an object with role and content"),
    "an empty list": ({"messages": []}, "'messages' has no turn"),
    "a system message alone": ({"messages": TALK[:1]}, "'messages' has no turn"),
    "too few acts": ({"messages": [U, A], "act": [1]}, "2 utterances but 1 values in 'act'"),
    "an act out of range": ({"messages": [U, A], "act": [1, 9]}, "act 9 is out of range; expected 1 to 4"),
    "another form": ({"prompt": ASK, "completion": REPLY}, r"has no column 'messages' \(columns: prompt, completion\)"),
    "an empty cell": ({"messages": None}, "the column 'messages' is empty"),
    "ShareGPT of a function": ({"conversations": [{"from": "function_call", "value": "f"}]}, "message 1 of 1 calls a"),
    "an empty prompt": ({"prompt": " ", "completion": REPLY}, "'prompt' is empty"),
    "an empty completion": ({"prompt": ASK, "completion": ""}, "'completion' is empty"),
    "a prompt that is a number": ({"prompt": 3, "completion": REPLY}, "'prompt' should be a text or a list of mess"),
    "a completion of the user": ({"prompt": [U], "completion": [U]}, "'completion' begins with a turn of the user"),
    "a prompt of the assistant": ({"prompt": [U, A], "completion": [A]}, "'prompt' ends with a turn of the assistant"),
    "a prompt alone of the assistant": ({"prompt": [U, A]}, "'prompt' ends with a turn of the assistant"),
    "an empty side": ({"prompt": ASK, "chosen": "", "rejected": "No ."}, "'chosen' is empty"),
    "no common turns": ({"chosen": [U, A], "rejected": [message("user", "x"), A]}, "do not begin with the same turns"),
    "no common text": ({"chosen": "Fine", "rejected": "Bad"}, "no common beginning"),
    "equal texts": ({"chosen": "So it is", "rejected": "So it is"}, "'chosen' and 'rejected' are the same text"),
    "a text and a list": ({"chosen": "Fine", "rejected": [U, A]}, "should both be texts, or both lists"),
    "an empty turn of a transcript": (
        {"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": "\n\nHuman: \n\nAssistant: b"},
        r"turn 1 of 2 \(user\) of 'chosen' is empty"
    ),
    "a reply under another name": ({"prompt": ASK, "response": REPLY}, "rename the columns to 'prompt' and"),
    "brackets without end": (f'{{"messages": {DEEP}}}', "not valid JSON|should be a list|message 1 of 1 is not"),
    "torn JSON": ('{"messages": [{"role": "user"', "not valid JSON"),
    "a list": ("[1, 2]", "expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_named_or_skipped(name, tmp_path):
    row, said = WRONG[name]
    form = None if isinstance(row, str) else form_of(row)
    good = {"messages": LONGER} if form is None or name in ("another form", "an empty cell") else GOOD[form.name]
    good = row if name == "a reply under another name" else good
    lines = [json.dumps(good)] * 2 + [row if isinstance(row, str) else json.dumps(row)] + [json.dumps(good)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    line = 1 if good is row else 3
    with pytest.raises(UserError, match=rf"train\.jsonl, line {line}: .*({said})") as error:
        load_dialogues(str(tmp_path), "train")
    assert len(str(error.value)) < 700
    if line == 3:
        kept = load_dialogues(str(tmp_path), "train", skip_bad_rows=True)
        assert len(kept) == 3 and kept.n_skipped == 1 and "line 3: " in kept.skipped[0]


GOOD = {form: row for row, form, _ in FORMS.values()}


def test_a_turn_that_holds_the_text_of_an_end_is_a_bad_row(tmp_path):
    json_lines(tmp_path / "train.jsonl", [{"messages": LONGER}, {"messages": [U, message("assistant", "a ### b")]}])
    with pytest.raises(UserError, match="line 2: utterance 2 of 2 holds the marker '###'"):
        load_dialogues(str(tmp_path), "train", markers=["###"])


@pytest.mark.parametrize("content", [b"ARROW1\0\0torn", b"\xff\xff\xff\xff", b"PAR1 no arrow", b""])
def test_an_arrow_file_that_is_none_is_said(content, tmp_path):
    (tmp_path / "train.arrow").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.arrow' is not an Arrow file|holds no dialogue"):
        load_dialogues(str(tmp_path), "train")


def test_an_arrow_file_of_another_name_is_told_so(tmp_path):
    arrow_file(tmp_path / "train.jsonl", [{"messages": TALK}])
    with pytest.raises(UserError, match="is an Arrow file; expected UTF-8 text. Rename it to .arrow"):
        load_dialogues(str(tmp_path), "train")


# ---------------------------------------------------------------------------------------------------------------------
# With a template


@dataclass
class Options(FormatOptions, TextOptions, SampleOptions):
    data_path: str = ""
    skip_bad_rows: bool = False


def samples_of(folder, form="ChatML", rows=(), codec=None, model="nowhere", **settings):
    json_lines(folder / "train.jsonl", list(rows))
    options, said = Options(data_path=str(folder), **settings), []
    if codec is None:
        model = chat_model(folder / "model", form)
        codec = load_codec(model, options=options)
    codec, samples = load_samples(options, codec, model, ["train"], said.append, 512)
    return codec, samples["train"], said


def test_what_the_data_is_and_what_is_learned_is_said(tmp_path):
    codec, samples, said = samples_of(tmp_path, rows=[{"messages": LONGER}] * 5)
    assert f"data: {tmp_path} has rows of 'messages' (role, content); the assistant's turns are the replies" in said
    assert "chat template: replies end with !, <|endoftext|>, <|im_end|>" in said
    assert "train: 5 dialogues, 10 samples" in said and len(samples) == 10
    assert said[-1] == "all conversations have the same system message: chat.py will use it too"
    assert codec.format.common_system == SYSTEM and codec.format.max_new_tokens == 16


def test_one_message_of_a_megabyte_and_text_of_every_direction_are_read(tmp_path):
    huge = [message("user", "word " * 200_000), A]
    bidi = [message("user", "שלום 👋🏽 \u202eevil\u202c क्षि"), message("assistant", "مرحبا بك")]
    _, samples, said = samples_of(tmp_path, rows=[{"messages": huge}, {"messages": bidi}, {"messages": [U, A]}])
    assert [s.reply for s in samples] == ["مرحبا بك", REPLY]
    assert samples[0].context == ("שלום 👋🏽 \u202eevil\u202c क्षि",)
    assert "1 left out, longer than" in said[-1] and "train.jsonl, line 1)" in said[-1]


@pytest.mark.parametrize(
    ("form", "rows", "settings", "said"),
    [
        (
            "Mistral",
            [[U, A], [U, U, A]],
            {},
            r"train\.jsonl, line 2: the chat template refuses .* roles must alternate",
        ),
        ("Gemma", [[U, A], TALK], {}, r"train\.jsonl, line 2: .*System role not supported"),
        ("Gemma", [[U, A]], {"system_prompt": "Be kind ."}, "has no place for a system prompt: System role not"),
        ("ChatML", [[U, A]], {"speaker": "first"}, "speaker is 'first', but the rows of .* name roles"),
        ("ChatML", [[U, U]], {}, "no dialogue of the train split has a reply to learn"),
        ("ChatML", [[U, A]], {"max_prompt_tokens": 8}, r"no prompt of the train split fits: 1 have more than 8 tokens"),
    ],
)
def test_conversations_that_a_template_cannot_take_are_said(form, rows, settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        samples_of(tmp_path, form, [{"messages": row} for row in rows], **settings)


def test_refused_conversations_are_skipped_and_counted(tmp_path):
    rows = [{"messages": row} for row in ([U, A], [U, U, A], [U, A])]
    _, samples, said = samples_of(tmp_path, "Mistral", rows, skip_bad_rows=True)
    assert len(samples) == 2 and "1 conversations skipped" in said[-1] and "line 2" in said[-1]


def test_roles_without_a_template_are_said(tmp_path):
    codec = DialogueCodec(make_tokenizer(), DialogueFormat(1))
    with pytest.raises(UserError, match="name roles .*no chat template .*--template FILE.jinja"):
        samples_of(tmp_path, rows=[{"messages": [U, A]}], codec=codec)
    _, samples, _ = samples_of(tmp_path, rows=[{"messages": [U, A]}], codec=codec, template="dialogue")
    assert samples[0].prompt == f"{ASK} <EOU>"
