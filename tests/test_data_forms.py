"""Rows of every form and source give the same dialogues, in little memory, and a load says what the data is."""

import csv
import functools
import itertools
import json
import tracemalloc
from dataclasses import dataclass

import datasets
import pyarrow as pa
import pytest
from chat_templates import chat_model, load

import support.data
from support.data import Dialogue, Dialogues, form_sentence, load_dialogues, load_splits
from support.data_forms import FORMS, PROMPT, form_of
from support.errors import UserError
from support.spool import Spool

SPLITS = ("train", "validation", "test")
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
HI, HELLO, ASK, ANSWER = "Hi , “là-bas” ?", 'Hello "you" , 日本語 .', "What time\nis it ?", "It is six \U0001f600 ."
KIND = "Be kind ."


def messages(*texts, system="", names=(USER, ASSISTANT), keys=("role", "content"), content=str):
    """A list of messages, the user's first."""
    said = [(SYSTEM, system)] * bool(system) + list(zip(itertools.cycle(names), texts))
    return [dict(zip(keys, (role, content(text)))) for role, text in said]


def parts(text):
    """The text in two parts."""
    return [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]


def said(*texts, first=0, system="", acts=None, emotions=None):
    """What the rows below should become."""
    n = len(texts)
    roles = tuple(itertools.islice(itertools.cycle((USER, ASSISTANT)), n))
    return Dialogue(texts, acts or (0,) * n, emotions or (0,) * n, roles, system, first)


sharegpt = functools.partial(messages, names=("human", "gpt"), keys=("from", "value"))


@dataclass
class Case:
    """Rows of a form, the dialogues that they are, and what is said of them."""

    rows: list[dict]
    dialogues: list[Dialogue]
    form: str
    sentence: str


WHOLE = [said(HI, HELLO, ASK, ANSWER, system=KIND), said(ASK, ANSWER)]
LAST = [said(HI, HELLO, ASK, ANSWER, system=KIND, first=3), said(ASK, ANSWER, first=1)]  # the last turn is the reply
PAIRS = [said(HI, HELLO, first=1), said(ASK, ANSWER, first=1)]
ONE_WORD = [said("Say :", "yes .", first=1), said("What time\nis it ?", "Six .", first=1)]
HISTORY = messages(HI, HELLO, ASK, system=KIND), messages(ASK)
ASSISTANTS = "the assistant's turns are the replies"
CHOSEN, COMPLETIONS = "the chosen ones are the replies", "the completions are the replies"
BOTH = "chosen, rejected"
PREFERENCES, IMPLICIT = "(preferences); ", "(preferences with the prompt in both); "


def reply(text, role=ASSISTANT):
    return [{"role": role, "content": text}]


CASES = {
    "dialog": Case(
        [{"dialog": [HI, HELLO, ASK], "act": [2, 1, 2], "emotion": [0, 4, 6]}, {"dialog": [ASK], "act": [3]}],
        [Dialogue((HI, HELLO, ASK), (2, 1, 2), (0, 4, 6)), Dialogue((ASK,), (3,), (0,))],
        "dialog",
        "(utterances); who speaks is not said",
    ),
    "messages": Case(
        [{"messages": messages(HI, HELLO, ASK, ANSWER, system=KIND)}, {"messages": messages(ASK, ANSWER)}],
        WHOLE,
        "messages",
        f"(role, content); {ASSISTANTS}",
    ),
    "messages with acts": Case(
        [
            {"messages": messages(HI, HELLO, system=KIND), "act": [2, 1]},
            {"messages": messages(HI, HELLO, system=KIND), "act": [4, 2, 1]},  # one for the system message
            {"messages": messages(ASK, ANSWER, ASK), "act": [2, None, 3]},
            {"messages": messages(ASK, ANSWER), "act": None},
        ],
        [said(HI, HELLO, system=KIND, acts=(2, 1))] * 2 + [said(ASK, ANSWER, ASK, acts=(2, 0, 3)), said(ASK, ANSWER)],
        "messages",
        f"(role, content); {ASSISTANTS}",
    ),
    "messages in parts": Case(
        [
            {"messages": messages(HI, HELLO, ASK, ANSWER, system=KIND, content=parts)},
            {"messages": messages(ASK, ANSWER, content=parts)},
        ],
        WHOLE,
        "messages",
        f"(role, content); {ASSISTANTS}",
    ),
    "conversations": Case(
        [{"conversations": sharegpt(HI, HELLO, ASK, ANSWER, system=KIND)}, {"conversations": sharegpt(ASK, ANSWER)}],
        WHOLE,
        "conversations",
        f"(ShareGPT: from, value); {ASSISTANTS}",
    ),
    "conversations in both namings": Case(  # a table of both has all four columns
        [{"conversations": sharegpt(HI, HELLO, ASK, ANSWER, system=KIND)}, {"conversations": messages(ASK, ANSWER)}],
        WHOLE,
        "conversations",
        f"(ShareGPT: from, value); {ASSISTANTS}",
    ),
    "prompt, chosen and rejected texts": Case(
        [
            {"prompt": HI, "chosen": HELLO, "rejected": "No ."},
            {"prompt": f" {ASK} ", "chosen": f"{ANSWER}\n", "rejected": ""},
        ],
        PAIRS,
        "prompt, chosen, rejected",
        PREFERENCES + CHOSEN,
    ),
    "prompt, chosen and rejected lists": Case(
        [{"prompt": p, "chosen": reply(ANSWER), "rejected": reply("No .")} for p in HISTORY],
        LAST,
        "prompt, chosen, rejected",
        PREFERENCES + CHOSEN,
    ),
    "prompt text, chosen and rejected with it": Case(
        [
            {"prompt": HI, "chosen": messages(HI, HELLO), "rejected": messages(HI, "No .")},
            {"prompt": ASK, "chosen": messages(ASK, ANSWER), "rejected": messages(ASK, "No .")},
        ],
        PAIRS,
        "prompt, chosen, rejected",
        PREFERENCES + CHOSEN,
    ),
    "chosen and rejected lists": Case(
        [{"chosen": p + reply(ANSWER), "rejected": p + reply("No .")} for p in HISTORY],
        LAST,
        BOTH,
        IMPLICIT + CHOSEN,
    ),
    "chosen and rejected transcripts": Case(
        [
            {BOTH: f"\n\nHuman: {HI}\n\nAssistant: {HELLO}\n\nHuman: {ASK}\n\nAssistant:"},
            {BOTH: f"\n\nHuman: {ASK}\n\nAssistant:"},
        ],
        [said(HI, HELLO, ASK, ANSWER, first=3), LAST[1]],
        BOTH,
        IMPLICIT + CHOSEN,
    ),
    "chosen and rejected texts": Case(
        [{"chosen": "Say : yes .", "rejected": "Say : yesterday ."}, {"chosen": f"{ASK} Six .", "rejected": f"{ASK} "}],
        ONE_WORD,
        BOTH,
        IMPLICIT + CHOSEN,
    ),
    "prompt and completion texts": Case(
        [{"prompt": f"{HI} ", "completion": f" {HELLO}"}, {"prompt": ASK, "completion": ANSWER}],
        PAIRS,
        "prompt, completion",
        f"(a prompt and its reply); {COMPLETIONS}",
    ),
    "prompt and completion lists": Case(
        [{"prompt": p, "completion": reply(ANSWER)} for p in HISTORY],
        LAST,
        "prompt, completion",
        f"(a prompt and its reply); {COMPLETIONS}",
    ),
    "prompt and completion with labels": Case(
        [
            {"prompt": HI, "completion": "Go away .", "label": False},
            {"prompt": HI, "completion": HELLO, "label": True},
            {"prompt": HI, "completion": "", "label": False},
            {"prompt": ASK, "completion": ANSWER, "label": True},
        ],
        PAIRS,
        "prompt, completion",
        f"(a prompt and its reply); {COMPLETIONS}, 2 rows with a rejected completion left out",
    ),
    "prompt texts": Case(
        [{"prompt": HI, "id": 1}, {"prompt": ASK, "id": 2}],
        [said(HI, first=1), said(ASK, first=1)],
        "prompt",
        "(a prompt alone); there are no human replies",
    ),
    "prompt lists": Case(
        [{"prompt": p} for p in HISTORY],
        [said(HI, HELLO, ASK, system=KIND, first=3), said(ASK, first=1)],
        "prompt",
        "(a prompt alone); there are no human replies",
    ),
}
for row in CASES["chosen and rejected transcripts"].rows:
    beginning = row.pop(BOTH)
    row |= {"chosen": f"{beginning} {ANSWER}", "rejected": f"{beginning} No ."}


def jsonl(folder, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")


def array(folder, rows):
    (folder / "train.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def as_csv(folder, rows, dump=json.dumps):
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: dump(v) if isinstance(v, (list, dict)) else v for k, v in row.items()} for row in rows)


def arrow(folder, rows, writer=pa.ipc.new_file):
    table = datasets.Dataset.from_list(rows).data.table
    with writer(str(folder / "train.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=2)


SOURCES = {
    "JSON lines": jsonl,
    "JSON array": array,
    "CSV of JSON": as_csv,
    "CSV of Python": functools.partial(as_csv, dump=repr),
    "parquet": lambda folder, rows: datasets.Dataset.from_list(rows).to_parquet(str(folder / "train.parquet")),
    "arrow": arrow,
    "arrow stream": functools.partial(arrow, writer=pa.ipc.new_stream),
    "save_to_disk": lambda folder, rows: datasets.Dataset.from_list(rows).save_to_disk(str(folder / "train")),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CASES)
def test_every_form_from_every_source_gives_the_same_dialogues(name, source, tmp_path):
    case = CASES[name]
    SOURCES[source](tmp_path, case.rows)
    found = load_dialogues(str(tmp_path), "train")
    assert list(found) == case.dialogues and found.skipped == [] and found.form.name == case.form
    assert form_sentence("chats", found) == f"data: chats has rows of '{case.form}' {case.sentence}"
    assert found.has_acts == any(any(d.acts) for d in case.dialogues)


# ---------------------------------------------------------------------------------------------------------------------
# Which form it is


@pytest.fixture
def chats(tmp_path):
    """Writes rows as the training split of a folder and returns its path."""

    def write(rows, split="train"):
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return str(tmp_path)

    return write


ALL = {"dialog": [HI], "messages": messages(HI, HELLO), "conversations": sharegpt(HI, HELLO), "prompt": HI}
ALL |= {"chosen": f"{HI} Yes .", "rejected": f"{HI} No .", "completion": "Yes ."}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_row_of_several_forms_is_the_first_of_them(form, chats):
    earlier = {column for other in FORMS[: FORMS.index(form)] for column in other.columns} - set(form.columns)
    earlier |= {"completion"} if form is PROMPT else set()
    row = {column: value for column, value in ALL.items() if column not in earlier}
    for columns in (row, dict(reversed(row.items())), row | dict.fromkeys(earlier)):  # null is no column
        assert form_of(columns) is form
        assert load_dialogues(chats([columns]), "train").form is form


@pytest.mark.parametrize("name", ["response", "output", "answer", "reply", "assistant", "target", "chosen"])
def test_a_prompt_with_a_reply_of_another_name_is_no_prompt_alone(name):
    assert form_of({"prompt": HI, name: HELLO}) is None
    assert form_of({"prompt": HI, name: None}) is PROMPT


ROLE_NAMES = [
    (SYSTEM, USER, ASSISTANT),
    ("developer", "human", "gpt"),
    (" System ", "USER", "Model"),
    (SYSTEM, "prompter", "bot"),
    (SYSTEM, "Human", "ChatGPT"),
    (SYSTEM, "user ", "AI"),
]


@pytest.mark.parametrize("names", ROLE_NAMES)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_roles_and_keys_have_other_names(names, keys, column, chats):
    row = [dict(zip(keys, pair)) for pair in zip(names, (KIND, HI, HELLO))]
    [found] = load_dialogues(chats([{column: row}]), "train")
    assert found == said(HI, HELLO, system=KIND)


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_system_message_is_none(blank, chats):
    row = {"messages": [{"role": SYSTEM, "content": blank}, *messages(HI, HELLO)], "act": [3, 2, 1]}
    assert list(load_dialogues(chats([row]), "train")) == [said(HI, HELLO, acts=(2, 1))]


@pytest.mark.parametrize("key", ["id", "name", "content", "weight"])
def test_messages_as_text_may_begin_with_any_key(key, chats):
    prompt = [{key: "1"} | message for message in messages(HI, HELLO, ASK)]
    row = {"prompt": json.dumps(prompt), "completion": json.dumps([{key: "1"} | reply(ANSWER)[0]])}
    assert list(load_dialogues(chats([row]), "train")) == [said(HI, HELLO, ASK, ANSWER, first=3)]


@pytest.mark.parametrize("text", ['[{"a": 1}]', "[{'x': 2}, 3] is what ?", "[ {", '{"role": "user"}'])
def test_a_prompt_that_only_looks_like_messages_is_text(text, chats):
    assert list(load_dialogues(chats([{"prompt": text, "completion": HELLO}]), "train")) == [said(text, HELLO, first=1)]


@pytest.mark.parametrize("bad", ["{", '{"messages": []}', '{"dialog": [""]}', '{"prompt": " "}', '{"text": "Hi ."}'])
def test_the_first_good_row_decides_the_form(bad, chats):
    good = [{"conversations": sharegpt(HI, HELLO)}, {"messages": messages(HI, HELLO)}, {"conversations": sharegpt(ASK)}]
    found = load_dialogues(chats([bad, *good]), "train", skip_bad_rows=True)
    assert found.form.name == "conversations" and list(found) == [said(HI, HELLO), said(ASK)]
    assert found.n_skipped == 2 and "line 3: has no column 'conversations' (columns: messages)" in found.skipped[1]


@pytest.mark.parametrize("later", ["completion", "response", "chosen"])
def test_replies_after_prompts_alone_are_not_lost_in_silence(later, chats):
    path = chats([{"prompt": HI}, {"prompt": ASK, later: ANSWER}, {"prompt": ASK, later: None}])
    with pytest.raises(UserError, match=rf"line 2: has a '{later}', while .* prompt alone"):
        load_dialogues(path, "train")
    assert list(load_dialogues(path, "train", skip_bad_rows=True)) == [said(HI, first=1), said(ASK, first=1)]


@pytest.mark.parametrize("false", [False, "False", " false ", "FALSE"])
def test_rejected_completions_are_left_out_whatever_they_hold(false, chats):
    rows = [{"prompt": HI, "completion": HELLO, "label": label} for label in (false, True, None, "true", "x")]
    found = load_dialogues(chats(rows), "train")
    assert len(found) == 4 and found.rows.rejected == 1 and found.n_skipped == 0
    assert form_sentence("a", found).endswith(", 1 rows with a rejected completion left out")


@pytest.mark.parametrize("as_file", [True, False])
def test_data_of_rejected_completions_alone_is_said(as_file, chats, tmp_path):
    path = chats([{"prompt": f"{i}", "completion": HELLO, "label": False} for i in range(30)])
    with pytest.raises(UserError, match="train split of .* holds no dialogue.*30 rows have a rejected completion"):
        load_dialogues(f"{path}/train.jsonl" if as_file else path, "train")


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a split, the cut of a file, memory


@pytest.fixture
def twenty(chats):
    return load_dialogues(chats([{"messages": messages(f"{i} ?", f"{i} .")} for i in range(20)]), "train")


def test_dialogues_are_a_sequence(twenty):
    listed = list(twenty)
    assert len(twenty) == 20 and twenty == listed and listed == twenty and twenty == twenty[:]
    assert twenty[-1] == listed[-1] and twenty[-20] == listed[0] and twenty.index(listed[7]) == 7
    for part in (slice(3, 9), slice(-4, None), slice(None, None, 3), slice(None, None, -1), slice(5, 5), slice(99)):
        assert isinstance(twenty[part], Dialogues) and list(twenty[part]) == listed[part]
        assert twenty[part].form is twenty.form and twenty[part].n_skipped == 0
    assert twenty != twenty[1:] and twenty[2:12][3:-1] == listed[5:11] and twenty != tuple(listed)
    for outside in (20, -21):
        with pytest.raises(IndexError):
            twenty[outside]


def test_a_dialogue_knows_its_place(twenty, tmp_path):
    assert twenty.place(0) == f"{tmp_path}/train.jsonl, line 1" and twenty.place(-1).endswith("line 20")
    assert twenty[5:].place(2).endswith("line 8") and twenty[::-1].place(0).endswith("line 20")


def numbered(name, i, copy):
    """Row i of a form; `copy` changes blanks, and labels or the replies that are not learned."""
    hi, hello, blank = f"Number {i} ?", f"Yes , it is {i} .", " " * copy
    return {
        "messages": {"messages": messages(hi + blank, hello), "act": [1 + copy, 1]},
        "prompt, completion": {"prompt": hi + blank, "completion": hello},
        "prompt": {"prompt": hi + blank, "id": copy},
        "chosen, rejected": {"chosen": messages(hi + blank, hello), "rejected": messages(hi + blank, f"{copy} .")},
    }[name]


@pytest.mark.parametrize("source", ["train.jsonl", "train.parquet", "train.arrow", "train"])
@pytest.mark.parametrize("name", ["messages", "prompt, completion", "prompt", "chosen, rejected"])
def test_copies_of_any_form_are_in_one_split_of_a_file(name, source, tmp_path):
    rows = [numbered(name, i, copy) for copy in range(3) for i in range(40)]
    writers = {"train.jsonl": "JSON lines", "train.parquet": "parquet", "train.arrow": "arrow", "train": "save_to_disk"}
    SOURCES[writers[source]](tmp_path, rows)
    splits = load_splits(str(tmp_path / source), SPLITS)
    assert [len(splits[split]) for split in SPLITS] == [108, 6, 6]
    numbers = [{d.utterances[0].strip() for d in splits[split]} for split in SPLITS]
    assert list(map(len, numbers)) == [36, 2, 2] and len(set.union(*numbers)) == 40
    assert {s: list(splits[s]) for s in SPLITS} == {s: list(load_dialogues(str(tmp_path / source), s)) for s in SPLITS}


def test_dialogues_of_other_system_messages_are_no_copies(chats, tmp_path):
    chats([{"messages": messages(HI, HELLO, system=f"Be {i} .")} for i in range(20)])
    assert len(load_dialogues(str(tmp_path / "train.jsonl"), "validation")) == 1


@pytest.mark.parametrize("form", ["messages", "dialog"])
def test_many_rows_need_little_memory(form, chats, monkeypatch):
    monkeypatch.setattr(support.data, "Spool", functools.partial(Spool, 2**18))
    words = "and so on " * 40
    rows = ((f"{i} ? {words}", f"{i} . {words}") for i in range(20_000))
    path = chats({"messages": messages(*r)} if form == "messages" else {"dialog": r} for r in rows)
    tracemalloc.start()
    found = load_dialogues(path, "train")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 20_000 and found[12_345].utterances[1].startswith("12345 . and")
    assert peak < 4e6  # the text has 16 MB


# ---------------------------------------------------------------------------------------------------------------------
# What a load says


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model with the template of that name."""
    return functools.cache(lambda name: chat_model(tmp_path_factory.mktemp("model"), name))


def test_a_load_says_what_the_data_is(model, chats):
    many = [f"{i} times {HI} " * 6 for i in range(21)]
    rows = [{"messages": messages(*(f"{i} {u}" for u in (HI, HELLO, ASK, ANSWER)), system=KIND)} for i in range(30)]
    rows[4]["act"] = [1, 2, 1, 4]
    path = chats([*rows, {"messages": messages(*many, system=KIND)}, {"messages": messages("x " * 500, HELLO)}, "{"])
    chats([*rows[:1], {"messages": messages("Who ?", "Me .")}], "validation")
    loaded = load(model("ChatML"), path, ["train", "validation"], skip_bad_rows=True, max_prompt_tokens=300)
    long = [messages(*many[:n], system=KIND) for n in range(1, 21, 2)]
    shortened = sum(len(ids) > 300 for ids in loaded.codec.prompt_ids(long))
    assert 0 < shortened < 10 and loaded.lines == [
        f"data: {path} has rows of 'messages' (role, content); {ASSISTANTS}",
        f"note: of 2 validation dialogues 1 are also in train ({path}/validation.jsonl, line 1 is like "
        f"{path}/train.jsonl, line 1): scores on them say less about new dialogues.",
        "chat template: replies end with !, <|endoftext|>, <|im_end|>",
        f"train: 32 dialogues, 70 samples (2 with a dialogue act), {shortened} prompts lose their oldest turns, "
        f"1 left out, longer than 300 tokens with the last turn alone ({path}/train.jsonl, line 32), 1 rows skipped",
        "validation: 2 dialogues, 3 samples",
    ]
    assert loaded.codec.format.max_prompt_tokens == 300 and loaded.codec.format.common_system == ""


def test_the_one_system_message_of_all_conversations_is_kept(model, chats):
    path = chats([{"prompt": messages(f"{i} ?", system=KIND)} for i in range(20)])
    loaded = load(model("Llama 3"), path)
    assert loaded.lines[0] == f"data: {path} has rows of 'prompt' (a prompt alone); there are no human replies"
    assert loaded.lines[-2:] == [
        "train: 20 dialogues, 20 samples",
        "all conversations have the same system message: chat.py will use it too",
    ]
    assert loaded.codec.format.common_system == KIND and not loaded.samples["train"].has_references
    assert {s.reply for s in loaded.samples["train"]} == {""}


def test_rows_of_other_forms_in_other_splits_are_said_each(model, chats):
    chats([{"prompt": f"{i} ?"} for i in range(4)])
    path = chats([{"prompt": "Who ?", "completion": "Me ."}], "validation")
    loaded = load(model("ChatML"), path, ["train", "validation"])
    assert [line for line in loaded.lines if line.startswith("data")] == [
        f"data: {path} has rows of 'prompt' (a prompt alone); there are no human replies",
        f"data: {path} has rows of 'prompt, completion' (a prompt and its reply); {COMPLETIONS}",
    ]
    assert [s.reply for s in loaded.samples["validation"]] == ["Me ."]


ROLES_ROW, NO_ROLES = {"messages": messages(HI, HELLO)}, {"dialog": [HI, HELLO]}
SHORT = {"max_prompt_tokens": 40}
REFUSED = [  # model, row, settings, what is said
    ("", ROLES_ROW, {}, r"name roles \(messages\), and '.*' has no chat template.*Give --template FILE\.jinja"),
    ("", {"prompt": HI}, {}, r"name roles \(prompt\), and '.*' has no chat template"),
    ("ChatML", ROLES_ROW, {"speaker": "second"}, "speaker is 'second', but the rows of .* Leave --speaker out"),
    ("ChatML", {"conversations": sharegpt(HI)}, {"speaker": "first"}, r"name roles \(conversations\)"),
    ("Gemma", ROLES_ROW, {"system_prompt": KIND}, "has no place for a system prompt: System role not supported"),
    ("Gemma", NO_ROLES, {"system_prompt": KIND}, "has no place for a system prompt"),
    ("ChatML", {"messages": messages(HI)}, {}, "no dialogue of the train split has a reply to learn"),
    ("ChatML", {"messages": messages(HI, HELLO)[1:]}, {}, "the assistant's turn after one of the user"),
    ("ChatML", {"dialog": [HI]}, {}, "no dialogue of the train split has a reply to learn"),
    ("", NO_ROLES, {}, "no train dialogue has more than 5 utterances.*lower context_utterances"),
    ("", NO_ROLES | {"dialog": ["x " * 50] * 6}, SHORT, "no prompt of the train split fits: 3 have more than 40"),
    ("ChatML", {"messages": messages("x " * 50, HI)}, SHORT, r"fits: 3 .*\(.*train\.jsonl, line 1\); raise"),
    ("ChatML", {"messages": messages(HI, HELLO, system=KIND * 40)}, SHORT, "the last turn and the system message"),
]


@pytest.mark.parametrize("name, row, settings, fault", REFUSED, ids=range(len(REFUSED)))
def test_data_that_gives_no_samples_is_refused_in_a_sentence(name, row, settings, fault, model, chats, tiny_lm):
    with pytest.raises(UserError, match=fault):
        load(model(name) if name else tiny_lm, chats([row] * 3), **settings)


def test_roles_of_a_later_split_are_checked_as_well(model, chats, tiny_lm):
    chats([{"dialog": [f"{HI} {i}"] * 6} for i in range(9)])
    path = chats([{"messages": messages(*[HI] * 6)}], "validation")
    for folder, settings in ((tiny_lm, {}), (model("ChatML"), {"speaker": "second"})):
        with pytest.raises(UserError, match=r"name roles \(messages\)"):
            load(folder, path, ["train", "validation"], **settings)


def test_the_dialogue_format_takes_roles_when_it_is_asked_for(chats, tiny_lm):
    rows = [{"messages": messages(*(f"{u} {i}" for u in (HI, HELLO) * 3))} for i in range(3)]
    loaded = load(tiny_lm, chats(rows), template="dialogue")
    assert loaded.lines[-1] == "train: 3 dialogues, 3 samples"
