"""Dialogues are the same whatever form they come in, bad rows are named, and the environment keeps its promises."""

import csv
import functools
import gzip
import json
import random
import re
import tempfile
import zipfile
from pathlib import Path
from unittest.mock import Mock

import datasets
import gymnasium as gym
import numpy as np
import pytest
from conftest import make_tokenizer
from gymnasium.vector import AutoresetMode, VectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from envs import DialogueVectorEnv
from support.data import Dialogue, load_dialogues, load_splits
from support.data_checks import overlap_note
from support.data_forms import INVISIBLE
from support.errors import UserError
from support.samples import make_samples
from support.text import DialogueCodec, DialogueFormat, messages_of

SPLITS = ("train", "validation", "test")
ROWS = [
    {"dialog": ["Hi , Jim . ", " What's up ?", "Not much ."], "act": [1, 2, 1], "emotion": [0, 0, 4]},
    {"dialog": ["Où est la gare ? — “là-bas”"], "act": [2], "emotion": [0]},
    {"dialog": ['He said "go" "now" .', "日本語 \U0001f600", "[odd] , yes"], "act": [1, 4, 3], "emotion": [6, 5, 0]},
    {"dialog": ["Could you wait ?", "It's fine ."], "act": [3, 4], "emotion": [0, 1]},
    {"dialog": ["Good bye ."], "act": [1], "emotion": [2]},
    {"dialog": ["See you .", "Bye\\n"], "act": [4, 4], "emotion": [3, 0]},
]
ROWS_OF = {"train": ROWS[:3], "validation": ROWS[3:5], "test": ROWS[5:]}


def dialogues_of(rows):
    return [Dialogue(tuple(r["dialog"]), tuple(r["act"]), tuple(r["emotion"])) for r in rows]


# ---------------------------------------------------------------------------------------------------------------------
# The forms


def write_release(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    columns = {name: [words_of(r[name]) + " " for r in rows] for name in ("act", "emotion")}
    columns[""] = ["".join(u + "__eou__" for u in r["dialog"]) for r in rows]
    for name, lines in columns.items():
        file = folder / f"dialogues_{name}_{split}.txt".replace("__", "_")
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_csv(file, rows, as_list=json.dumps, labels=json.dumps, **options):
    with file.open("w", newline="", **{"encoding": "utf-8"} | options) as out:
        writer = csv.DictWriter(out, ["dialog", "act", "emotion"])
        writer.writeheader()
        for r in rows:
            writer.writerow({"dialog": as_list(r["dialog"]), "act": labels(r["act"]), "emotion": labels(r["emotion"])})


def zipped_release(folder):
    for split, rows in ROWS_OF.items():
        write_release(folder / "unpacked" / split, split, rows)
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            archive.mkdir(f"{split}/")
            for file in sorted((folder / "unpacked" / split).iterdir()):
                archive.write(file, f"{split}/{file.name}")


def parquet(file, rows):
    datasets.Dataset.from_list(rows).to_parquet(str(file))


def store(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))


def sharded_parquet(folder):
    parts = {"train-00000-of-00002": ROWS[:2], "train-00001-of-00002": ROWS[2:3]}
    parts |= {"validation-00000-of-00001": ROWS[3:5], "test-00000-of-00001": ROWS[5:]}
    for name, rows in parts.items():
        parquet(folder / f"{name}.parquet", rows)


def each_split(write, name):
    def form(folder):
        for split, rows in ROWS_OF.items():
            file = folder / name.format(split=split, short={"validation": "dev"}.get(split, split))
            file.parent.mkdir(exist_ok=True)
            write(file, rows)

    return form


def as_text(dump):
    return lambda file, rows: file.write_text(dump(rows), encoding="utf-8")


def json_lines(rows):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


@pytest.fixture
def chats(tmp_path):
    """Writes rows to a file of JSON lines and returns its path."""
    file = tmp_path / "chats.jsonl"
    return lambda rows: file.write_text(json_lines(rows)) and str(file)


def words_of(numbers):
    return " ".join(map(str, numbers))


def dataset_dict(rows_of=ROWS_OF):
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in rows_of.items()})


FORMS = {
    "DatasetDict": lambda folder: dataset_dict().save_to_disk(str(folder)),
    "DatasetDict of tensors": lambda folder: dataset_dict().with_format("torch").save_to_disk(str(folder)),
    "a Dataset each": each_split(store, "{split}"),
    "parquet": each_split(parquet, "{split}.parquet"),
    "parquet in folders": each_split(parquet, "{split}/rows.parquet"),
    "parquet in parts": sharded_parquet,
    "JSON array": each_split(as_text(lambda rows: json.dumps(rows, indent=1)), "{split}.json"),
    "JSON lines": each_split(as_text(json_lines), "{split}.jsonl"),
    "JSON lines called json": each_split(as_text(lambda rows: json_lines(rows).rstrip()), "{split}.json"),
    "JSON lines of a dev split": each_split(as_text(json_lines), "{short}/part.jsonl"),
    "CSV of JSON": each_split(write_csv, "{split}.csv"),
    "CSV of Python lists": each_split(lambda file, rows: write_csv(file, rows, repr, repr), "{split}.csv"),
    "CSV with plain labels": each_split(lambda file, rows: write_csv(file, rows, repr, words_of), "{split}.csv"),
    "CSV of Excel": each_split(lambda file, rows: write_csv(file, rows, encoding="utf-8-sig"), "{split}.CSV"),
    "release": lambda folder: [write_release(folder / split, split, rows) for split, rows in ROWS_OF.items()],
    "release in one folder": lambda folder: [write_release(folder, split, rows) for split, rows in ROWS_OF.items()],
    "release zipped": zipped_release,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_dialogues(form, tmp_path):
    FORMS[form](tmp_path)
    for split in SPLITS:
        dialogues = load_dialogues(str(tmp_path), split)
        assert dialogues == dialogues_of(ROWS_OF[split]) and dialogues.skipped == []


NO_LABELS = [None, "", " ", "[]", "null", "None", "nan", "NaN", "NA", "<NA>", "[null, null, null]", "None None None"]
SOME_LABELS = ["[1, null, 2]", "[1, None, 2]", "[1.0, nan, 2.0]", "[ 1. nan  2.]", "1 null 2", "1,,2", "1, nan, 2,"]
THREE = ["Hi .", "Oh !", "Bye ."]
UNLABELLED, PARTLY = Dialogue(tuple(THREE), (0,) * 3, (0,) * 3), Dialogue(tuple(THREE), (1, 0, 2), (1, 0, 2))


def test_labels_that_are_missing_in_a_csv_are_0(tmp_path):
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dialog", "act", "emotion"])
        writer.writerows([json.dumps(THREE), cell, cell] for cell in [*NO_LABELS, *SOME_LABELS])
        writer.writerow([json.dumps(THREE)])  # a row that ends early
    expected = [UNLABELLED] * len(NO_LABELS) + [PARTLY] * len(SOME_LABELS) + [UNLABELLED]
    assert load_dialogues(str(tmp_path), "train") == expected


@pytest.mark.parametrize("form", ["train.jsonl", "train.json", "train.parquet", "train"])
def test_labels_that_are_missing_are_0_in_every_form(form, tmp_path):
    labels = [[], None, [None, None, None], [1, None, 2], [1.0, float("nan"), 2.0]]
    rows = [{"dialog": THREE, "act": values, "emotion": values} for values in labels]
    if form.endswith((".json", ".jsonl")):
        rows += [{"dialog": THREE}, *({"dialog": THREE, "act": c, "emotion": c} for c in (*NO_LABELS, float("nan")))]
        text = json_lines(rows) if form.endswith("l") else json.dumps(rows)
        (tmp_path / form).write_text(text)
    else:
        (parquet if form.endswith(".parquet") else store)(tmp_path / form, rows)
    expected = [UNLABELLED] * 3 + [PARTLY] * 2
    assert load_dialogues(str(tmp_path), "train") == expected + [UNLABELLED] * (len(rows) - 5)


def test_labels_that_are_missing_in_the_release_are_0(tmp_path):
    (tmp_path / "dialogues_train.txt").write_text("".join("__eou__".join([*THREE, "\n"]) for _ in range(2)))
    (tmp_path / "dialogues_act_train.txt").write_text("\n1 null 2\n")
    assert load_dialogues(str(tmp_path), "train") == [UNLABELLED, Dialogue(tuple(THREE), (1, 0, 2), (0, 0, 0))]


@pytest.mark.parametrize("cell", ["[1, 2]", "1 2", "[1, 0, 2]", "[1, x, 2]", "[1, 2", "7"])
def test_labels_that_are_wrong_are_no_missing_ones(cell, tmp_path):
    (tmp_path / "train.csv").write_text(f'dialog,act\n"{str(THREE)}","{cell}"\n')
    with pytest.raises(UserError, match=r"train\.csv, line 2: .*act"):
        load_dialogues(str(tmp_path), "train")


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def numbered(n, copies=1):
    """Rows with n different dialogues, each `copies` times with other blanks and labels."""
    return [
        {"dialog": [f"Number {i} .", f"{' ' * copy}Yes ,  it is {i} .", "Good ."], "act": [1 + copy % 4] * 3}
        for copy in range(copies)
        for i in range(n)
    ]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("different, sizes", [(40, [36, 2, 2]), (10, [8, 1, 1]), (3, [1, 1, 1])])
def test_all_copies_of_a_dialogue_are_in_one_split(different, sizes, stored, chats, tmp_path):
    path = chats(numbered(different, 5))
    if stored:
        store(path := tmp_path / "stored", numbered(different, 5))
    splits = load_splits(str(path), SPLITS)
    assert [len(splits[s]) for s in SPLITS] == [5 * size for size in sizes]
    numbers = [{d.utterances[0] for d in splits[s]} for s in SPLITS]
    assert [len(n) for n in numbers] == sizes and len(set.union(*numbers)) == different
    assert overlap_note(str(path), splits) == ""
    assert all(load_dialogues(str(path), s) == splits[s] for s in SPLITS)


def test_a_file_without_copies_and_a_stored_dataset_are_cut_as_ever(chats, tmp_path):
    for n in (*range(11, 60), 200):
        rows = numbered(n)
        splits = load_splits(chats(rows), SPLITS)
        if n == 200:
            store(tmp_path / "stored", rows)
            assert load_splits(str(tmp_path / "stored"), SPLITS) == splits
        random.Random(0).shuffle(rows)
        cuts = [0, int(n * 0.9), int(n * 0.95), n]
        for split, first, end in zip(SPLITS, cuts, cuts[1:]):
            assert [list(d.utterances) for d in splits[split]] == [r["dialog"] for r in rows[first:end]]


def test_a_file_of_too_few_different_dialogues_is_refused(chats):
    with pytest.raises(UserError, match="validation split.*of 100 rows, 2 are different dialogues.*at least 20"):
        load_splits(chats(numbered(2, 50)), SPLITS)


def test_bad_rows_of_a_file_are_left_out_and_no_copy_crosses_the_splits(chats):
    rows = numbered(40, 2)
    rows[3]["act"] = [9] * 3  # its copy is a good row
    splits = load_splits(file := chats(rows), SPLITS, skip_bad_rows=True)
    assert sum(map(len, splits.values())) == 79
    skipped = [sentence for split in splits.values() for sentence in split.skipped]
    assert skipped == [f"{file}, line 4: act 9 is out of range; expected 1 to 4"]
    assert overlap_note("chats", splits) == ""


TALK = ["Is the shop open ?", "Yes , until six .", "Do you sell bread ?", "We do , it is fresh .", "Two , please ."]
COPIES = {  # of TALK, which is in the training split: what is said of it
    "the same": (TALK, "1 are also in train"),
    "other blanks": ([f" {u}  " for u in TALK], "1 are also in train"),
    "other case and punctuation": ([u.upper().replace(" .", "!") for u in TALK], "1 are near-copies"),
    "other apostrophes": ([*TALK[:4], "Two\u2009, please\u2026"], "1 are near-copies"),
    "one turn more": ([*TALK, "Here you are ."], "1 are near-copies"),
    "one turn less": (TALK[:-1], "1 are near-copies"),
    "another reply": ([*TALK[:2], "And cake ?", *TALK[3:]], "1 are near-copies"),
    "half of it": ([*TALK[:2], "Thanks .", "Bye .", "See you ."], ""),
    "the same words in another order": ([TALK[i] for i in (4, 2, 0, 3, 1)], ""),
    "another dialogue": (["Who is it ?", "It is me .", "Come in ."], ""),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_and_near_copies_across_splits_are_said_with_their_places(name, tmp_path):
    dialog, said = COPIES[name]
    for split, dialogs in {"train": [["Hm .", "So ."], TALK], "validation": [["Ah ?", "Oh !"], dialog]}.items():
        (tmp_path / f"{split}.jsonl").write_text(json_lines([{"dialog": d} for d in dialogs]))
    note = overlap_note(str(tmp_path), load_splits(str(tmp_path), ["train", "validation"]))
    assert note.count("\n") == 0 and bool(note) == bool(said)
    if said:
        assert f"of 2 validation dialogues {said}" in note
        assert f"({tmp_path / 'validation.jsonl'}, line 2 is like {tmp_path / 'train.jsonl'}, line 2)" in note


def test_builtin_needs_no_file_and_no_check_of_copies():
    splits = load_splits("builtin", ["train", "validation"])
    assert len(splits["validation"]) > 100 and not splits["validation"].skipped
    assert {act for d in splits["validation"] for act in d.acts} == {1, 2, 3, 4}
    assert overlap_note("builtin", splits) == ""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", Mock())
    return datasets.load_dataset


@pytest.mark.parametrize("name", ["daily_dialog", "li2017dailydialog/daily_dialog", "somebody/chats"])
def test_a_hub_name_is_loaded_from_the_hub(name, hub):
    hub.return_value = dataset_dict()
    for split in SPLITS:
        assert load_dialogues(name, split) == dialogues_of(ROWS_OF[split])
        hub.assert_called_with("OpenRL/daily_dialog" if "daily" in name else name)


def test_a_hub_that_does_not_have_it_is_one_sentence(hub):
    hub.side_effect = ConnectionError("no route to host")
    with pytest.raises(UserError, match=r"'daily_dialog' is neither .* as 'OpenRL/daily_dialog' \(ConnectionError\)"):
        load_dialogues("daily_dialog", "train")
    hub.side_effect, hub.return_value = None, dataset_dict({"train": ROWS})
    with pytest.raises(UserError, match="'somebody/chats' has no test split; it has train"):
        load_dialogues("somebody/chats", "test")


texts = st.text(min_size=1, max_size=12).filter(
    lambda text: not INVISIBLE.fullmatch(text) and not {*"\ufffd\0"} & {*text}
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.lists(texts, min_size=1, max_size=4), min_size=1, max_size=3))
def test_any_text_survives_csv_and_json(dialogs):
    rows = [{"dialog": d, "act": [1] * len(d), "emotion": [0] * len(d)} for d in dialogs]
    with tempfile.TemporaryDirectory() as folder:
        for name, write in {
            "a/train.csv": write_csv,
            "b/train.csv": lambda file, rows: write_csv(file, rows, lambda v: json.dumps(v, ensure_ascii=False)),
            "c/train.csv": lambda file, rows: write_csv(file, rows, repr, words_of),
            "d/train.jsonl": as_text(json_lines),
            "e/train.json": as_text(json.dumps),
        }.items():
            file = Path(folder, name)
            file.parent.mkdir()
            write(file, rows)
            assert load_dialogues(str(file.parent), "train") == dialogues_of(rows), name


# ---------------------------------------------------------------------------------------------------------------------
# Bad rows and bad paths

GOOD_LINE = '{"dialog": ["Hi .", "Bye ."], "act": [1, 1], "emotion": [0, 0]}'


BAD_LINES = [
    ("jsonl", '{"dialog": ["Hi .", "Bye ."], "act": [1]}', "2 utterances but 1 values in 'act'"),
    ("jsonl", '{"dialog": ["Hi ."], "act": [1], "emotion": [0, 1]}', "1 utterances but 2 values in 'emotion'"),
    ("jsonl", '{"dialog": ["Hi .", "  "], "act": [1, 1]}', "utterance 2 of 2 is empty"),
    ("jsonl", '{"dialog": ["Hi ."], "act": [5]}', "act 5 is out of range; expected 1 to 4"),
    ("jsonl", '{"dialog": ["Hi ."], "act": [0]}', "act 0 is out of range"),
    ("jsonl", '{"dialog": ["Hi ."], "emotion": [7]}', "emotion 7 is out of range; expected 0 to 6"),
    ("jsonl", '{"dialog": ["Hi ."], "act": ["inform"]}', "'act' should hold whole numbers"),
    ("jsonl", '{"dialog": ["Hi ."], "act": 1}', "'act' should be a list"),
    ("jsonl", '{"dialog": "Hi ."}', "'dialog' should be a list"),
    ("jsonl", '{"dialog": ["Hi .", 7]}', "utterance 2 is not text but 7"),
    ("jsonl", '{"dialog": []}', "the dialogue has no utterance"),
    ("jsonl", '{"text": ["Hi ."]}', r"has no column 'dialog' \(columns: text\)"),
    ("jsonl", '{"dialog": ["Hi ."', "not valid JSON"),
    ("jsonl", "[1, 2]", "expected an object"),
    ("jsonl", b'{"dialog": ["caf\xe9 ."]}', "utterance 1 of 1 is not valid UTF-8"),
    ("jsonl", '{"dialog": ["Hi ."], "act": [Infinity]}', "'act' should hold"),
    ("jsonl", '{"dialog": ["Hi ."], "act": [1.5]}', "'act' should hold whole numbers"),
    ("jsonl", '{"dialog": ["Hi \\ud800"]}', "utterance 1 of 1 is not valid"),
    ("csv", '"[""Hi .""]",1 2', "1 utterances but 2 values in 'act'"),
    ("csv", '"[""Hi ."", """"]",1 2', "utterance 2 of 2 is empty"),
    ("csv", '"[""Hi .""]",[9]', "act 9 is out of range"),
    ("csv", '"[""Hi .""]",x', "'act' should hold whole numbers"),
    ("csv", "Hi .,1", "'dialog' should be a list"),
    ("csv", '"[""Hi .""', "'dialog' should be a list"),
    ("csv", b'"[""caf\xe9 .""]",1', "utterance 1 of 1 is not valid UTF-8"),
]


@pytest.mark.parametrize("ending, line, fault", BAD_LINES)
def test_a_bad_line_is_named_or_skipped(ending, line, fault, tmp_path):
    good = {"jsonl": GOOD_LINE + "\n", "csv": 'dialog,act\r\n"[""Hi ."", ""Bye .""]",1 1\r\n'}[ending].encode()
    (tmp_path / f"train.{ending}").write_bytes(good + (line if isinstance(line, bytes) else line.encode()))
    place = rf"train\.{ending}, line {1 + len(good.splitlines())}"
    with pytest.raises(UserError, match=rf"{place}: {fault}.*--skip-bad-rows"):
        load_dialogues(str(tmp_path), "train")
    dialogues = load_dialogues(str(tmp_path), "train", skip_bad_rows=True)
    assert len(dialogues) == 1 and len(dialogues.skipped) == 1 and re.search(f"{place}: ", dialogues.skipped[0])


def test_rows_of_an_array_or_a_table_are_counted(tmp_path):
    rows = [*ROWS[:2], {"dialog": ["Hi ."], "act": [8], "emotion": [0]}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    parquet(tmp_path / "validation.parquet", rows)
    store(tmp_path / "test", rows)
    for split in SPLITS:
        with pytest.raises(UserError, match=rf"{split}.*, row 3: act 8 is out of range"):
            load_dialogues(str(tmp_path), split)
        assert len(load_dialogues(str(tmp_path), split, skip_bad_rows=True)) == 2


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("dialogues_train.txt", "Hi .__eou__\nYes .__eou__No\n", "2 utterances but 1 values in 'act'"),  # not closed
        ("dialogues_train.txt", "Hi .__eou__\n__eou__\n", "utterance 1 of 1 is empty"),
        ("dialogues_train.txt", "Hi .__eou__\n\n", "the dialogue has no utterance"),
        ("dialogues_train.txt", b"Hi .__eou__\nYes \xff__eou__\n", "utterance 1 of 1 is not valid UTF-8"),
        ("dialogues_train.txt", "Hi .__eou__\n", "the files differ in length: no line in dialog"),
        ("dialogues_act_train.txt", "1\n1 2\n", "1 utterances but 2 values in 'act'"),
        ("dialogues_act_train.txt", "1\n6\n", "act 6 is out of range"),
        ("dialogues_act_train.txt", "1\n", "the files differ in length: no line in act"),
        ("dialogues_emotion_train.txt", "0\nhappy\n", "'emotion' should hold whole numbers"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_bad_line_of_the_release_is_named_or_skipped(name, content, fault, zipped, tmp_path):
    write_release(tmp_path / "train", "train", [{"dialog": [t], "act": [1], "emotion": [0]} for t in ("Hi .", "Yes .")])
    (tmp_path / "train" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if zipped:
        with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
            for file in (tmp_path / "train").iterdir():
                archive.write(file, f"train/{file.name}")
                file.unlink()
    with pytest.raises(UserError, match=rf"dialogues_train\.txt, line 2: {fault}"):
        load_dialogues(str(tmp_path), "train")
    dialogues = load_dialogues(str(tmp_path), "train", skip_bad_rows=True)
    assert len(dialogues) == 1 and len(dialogues.skipped) == 1


UNPARSED = '[\n {"dialog": ["Hi ."]},\n {"dialog": \n]'
UNREADABLE = [  # name, content, what is said
    ("chats.txt", "Hi .", r"none of the forms that can be read: \.parquet, \.arrow, \.json, \.jsonl, \.csv"),
    ("chats.csv", "", "the train split of .* holds no dialogue"),
    ("chats.jsonl", "\n", "the train split of .* holds no dialogue"),
    ("chats.json", "[]", "the train split of .* holds no dialogue"),
    ("chats.json", UNPARSED, r"chats\.json, line 4: not valid JSON"),
    ("chats.json", "[" * 100_000, "not valid JSON"),
    ("chats.csv", "dialog\n\"['Hi .' 'Bye .']\"\n", r"chats\.csv, line 2: 'dialog' should be a list"),  # by numpy
    ("chats.parquet", "PAR1", "is not a parquet file that can be read"),
]


@pytest.mark.parametrize("name, content, fault", UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_file_that_cannot_be_used(name, content, fault, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=fault):
        load_dialogues(str(tmp_path / name), "train")


def test_paths_and_splits_that_are_not_there(tmp_path, monkeypatch):
    for path in (tmp_path / "none", "./none", "~/none_of_this", "a/b/c"):
        with pytest.raises(UserError, match="does not exist"):
            load_dialogues(str(path), "train")
    with pytest.raises(UserError, match="has no train split: found no dataset file"):
        load_dialogues(str(tmp_path), "train")
    with pytest.raises(UserError, match="split 'valid' is unknown.*Did you mean 'validation'"):
        load_dialogues("builtin", "valid")
    (tmp_path / "train.jsonl").write_text(GOOD_LINE)
    with pytest.raises(UserError, match=r"has no test split: found train\.jsonl; expected a file such as test\.csv"):
        load_dialogues(str(tmp_path), "test")
    (tmp_path / "torn" / "train").mkdir(parents=True)
    (tmp_path / "torn" / "train" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="was not written whole by save_to_disk"):
        load_dialogues(str(tmp_path / "torn"), "train")


def test_an_archive_that_is_not_the_release(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("train/readme.txt", "nothing")
    with pytest.raises(UserError, match=r"train\.zip' holds no dialogues_train\.txt"):
        load_dialogues(str(tmp_path), "train")
    (tmp_path / "train.zip").write_bytes(b"PK\x03\x04torn")
    with pytest.raises(UserError, match=r"train\.zip' is not a zip archive"):
        load_dialogues(str(tmp_path), "train")


# ---------------------------------------------------------------------------------------------------------------------
# Files that are wrong as a whole

SAID = [{"role": "system", "content": "Be kind ."}, {"role": "user", "content": "Hi ."}]
SAID += [{"role": "assistant", "content": "Hello ."}]
SHAREGPT = [{"from": "human", "value": "Hi ."}, {"from": "gpt", "value": "Hello ."}]
ROW_FORMS = {  # a row of another form, and what it becomes by the expression that the error gives
    "turns": ({"turns": [{"speaker": "A", "utterance": "Hi ."}]}, ["Hi ."]),
    "history and response": ({"history": ["Hi ."], "response": "Hello ."}, ["Hi .", "Hello ."]),
    "Persona-Chat": ({"utterances": [{"history": ["Hi ."], "candidates": ["No .", "Hello ."]}]}, ["Hi .", "Hello ."]),
    "lines": ({"text": "Hi .\nHello ."}, ["Hi .", "Hello ."]),
    "marks": ({"text": "Hi .__eou__Hello .__eou__"}, ["Hi .", "Hello ."]),
}
RENAMED = {  # a row with known content under other names, and what the error says
    "messages as dialog": ({"dialog": SAID}, "'dialog' holds chat messages: rename it to 'messages'"),
    "messages": ({"chat": SAID}, "'chat' holds chat messages: rename it to 'messages'"),
    "ShareGPT": ({"items": SHAREGPT}, "'items' holds ShareGPT conversations: rename it to 'conversations'"),
    "Alpaca": ({"instruction": "Hi .", "input": "", "output": "Hello ."}, "rename .* to 'prompt' and 'completion'"),
    "prompt and response": ({"prompt": "Hi .", "response": "Hello ."}, "rename .* to 'prompt' and 'completion'"),
}


@pytest.mark.parametrize("form", ROW_FORMS)
@pytest.mark.parametrize("skip", [False, True])
def test_rows_of_another_form_are_answered_with_what_makes_dialogues_of_them(form, skip, chats):
    row, dialog = ROW_FORMS[form]
    file = chats([row] * 200)
    with pytest.raises(UserError) as refused:
        load_dialogues(file, "validation", skip_bad_rows=skip)
    said = str(refused.value)
    assert said.startswith(f"{file}, line 1: ") and "200 of 200 rows" in said
    assert "--skip-bad-rows" not in said and len(said) < 600
    assert eval(re.search("write `(.*)` as 'dialog'", said)[1], {"row": row}) == dialog


@pytest.mark.parametrize("form", RENAMED)
def test_columns_of_other_names_are_answered_with_the_known_ones(form, chats):
    row, advice = RENAMED[form]
    with pytest.raises(UserError, match=f"line 1: .*200 of 200 rows.*{advice}"):
        load_dialogues(chats([row] * 200), "validation")


def test_the_page_converts_other_forms_as_the_errors_say(chats):
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    table = re.findall(r"^\| `.*\| `(\{.*\})` \|$", page[page.index("## Other columns") :], re.MULTILINE)
    rows = [{"instruction": "Hi .", "output": "Hello ."}, {"history": ["Hi ."], "response": "Hello ."}]
    rows.append({"text": "Hi .\nHello ."})
    converted = [eval(expression, {"row": row}) for expression, row in zip(table, rows, strict=True)]
    for row in converted:
        different = [{name: [*v, f"{i} ."] if isinstance(v, list) else v} for i in range(40) for name, v in row.items()]
        if "dialog" in row:
            assert load_dialogues(chats(different), "train")[0].utterances[:2] == ("Hi .", "Hello .")
    assert converted[0] == {"prompt": "Hi .", "completion": "Hello ."}


PRETTY = "\n".join(json.dumps(row, indent=1) for row in ROWS)
HTML = "<!DOCTYPE html>\n<html></html>"
COLUMNS = {column: {str(i): row[column] for i, row in enumerate(ROWS)} for column in ROWS[0]}
LISTED = '"[""Hi .""]"'
WHOLE_FILES = [  # name, content, phrases of the answer
    ("a.json", PRETTY, ["line 1: ", "spread over several lines", "on one line"]),
    ("a.json", json.dumps(ROWS[0], indent=1), ["spread over several lines"]),
    ("a.json", PRETTY.replace("\n}\n", "\n},\n"), ["spread over several lines", "without a comma"]),
    ("a.json", json.dumps({"data": ROWS}), ["list 'data'"]),
    ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1), ["list 'data'"]),
    ("a.json", json.dumps({"data": [{"messages": SAID}]}), ["list 'data'"]),
    ("a.json", json.dumps({"train": ROWS, "test": ROWS}), ["several lists (train, test)", "a file for each"]),
    ("a.json", json.dumps(COLUMNS), ["object of columns", 'orient="records"']),
    ("a.json", json.dumps({c: list(v.values()) for c, v in COLUMNS.items()}), ["object of columns", "from_dict"]),
    ("a.json", json.dumps({str(i): row for i, row in enumerate(ROWS)}), ["a dialogue under each name"]),
    ("a.jsonl", "\n".join(json.dumps(row["dialog"]) for row in ROWS), ["line 1: ", '{"dialog": [...]}']),
    ("a.jsonl", "\n".join(map(repr, ROWS)), ["line 1: ", "Python, not JSON"]),
    ("a.jsonl", "".join(json.dumps(row) + ",\n" for row in ROWS), ["line 1: ", "end with a comma"]),
    ("a.jsonl", json_lines([{"Dialogue": ["Hi ."]}] * 9), ["line 1: ", "rename it to 'dialog'"]),
    ("a.jsonl", json_lines([{"chat_id": 1, "text": "Hi ."}] * 9), ["one message in each row", "own_dataset.py"]),
    ("a.csv", "conversation_id,speaker,text\n" + "1,a,Hi\n" * 9, ["line 2: ", "examples/own_dataset.py"]),
    ("a.csv", "dialog;act\n" + f"{LISTED};1\n" * 9, ["separated by ';'", "sep=';'"]),
    ("a.csv", "dialog\tact\n" + f"{LISTED}\t1\n" * 9, ["separated by tabs", r"sep='\t'"]),
    ("a.csv", f"{LISTED},1\n" * 9, ["no header"]),
    ("a.csv", "dialog\n" + "\"['Hi .' 'Bye .']\"\n" * 9, ["as numpy prints them"]),
    ("a.jsonl", json_lines(ROWS).encode("utf-16"), ["is UTF-16 text", "iconv -f UTF-16 "]),
    ("a.csv", f"dialog\n{LISTED}\n".encode("utf-16-le"), ["is UTF-16 text", "iconv -f UTF-16LE "]),
    ("a.jsonl", json_lines(ROWS).encode("utf-16-be"), ["is UTF-16 text", "iconv -f UTF-16BE "]),
    ("a.jsonl", json_lines(ROWS).encode("utf-32"), ["is UTF-32 text"]),
    ("a.jsonl", '{"dialog": ["Où ?"]}\n'.encode("latin-1") * 9, ["line 1: ", "iconv -f WINDOWS-1252"]),
    ("a.jsonl", gzip.compress(b"{}", mtime=0), ["packed by gzip", "npack it"]),
    ("a.jsonl.gz", gzip.compress(b"{}", mtime=0), ["packed by gzip", "npack it"]),
    ("a.csv", b"PK\x03\x04" + b"\0" * 9 + b"xl/workbook.xml", ["Excel workbook", "CSV UTF-8"]),
    ("a.json", b"PAR1\0\0", ["is a parquet file", ".parquet"]),
    ("a.parquet", json_lines(ROWS), ["holds text", ".jsonl"]),
    ("a.parquet", HTML, ["a web page"]),
    ("a.json", HTML, ["a web page"]),
    ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
    ("a.jsonl", "", ["the file is empty"]),
]


@pytest.mark.parametrize("name, content, phrases", WHOLE_FILES)
@pytest.mark.parametrize("skip", [False, True])
def test_a_file_that_is_wrong_as_a_whole_is_answered_as_a_whole(name, content, phrases, skip, tmp_path):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if skip and "end with a comma" in phrases:
        phrases = ["line 1: ", "rows are malformed"]  # the last row is good
    with pytest.raises(UserError) as refused:
        load_splits(str(file), SPLITS, skip_bad_rows=skip)
    said = str(refused.value)
    assert name in said and "--skip-bad-rows" not in said and all(phrase in said for phrase in phrases), said
    assert len(said) - len(str(file)) < 600 and len(re.findall(r"[.!?](?= [A-Z]|$)", said)) <= 4


def test_a_stored_dataset_of_another_form_is_answered_alike(tmp_path):
    store(tmp_path / "one", [{"chat": SAID}] * 9)
    dataset_dict({"train": [{"chat": SAID}] * 9}).save_to_disk(str(tmp_path / "two"))
    for name in ("one", "two"):
        with pytest.raises(UserError, match="row 1: .*9 of 9 rows.*chat messages"):
            load_dialogues(str(tmp_path / name), "train")


def test_the_first_bad_row_is_that_of_the_file_and_all_are_counted(chats):
    rows = numbered(200)
    for i in (150, 17, 5):
        rows[i]["act"] = [9] * 3
    for split in SPLITS:
        with pytest.raises(UserError, match=r"chats\.jsonl, line 6: act 9 .*3 of 200 rows.*--skip-bad-rows"):
            load_dialogues(chats(rows), split)


def test_a_lone_file_in_a_folder_can_be_given_itself(tmp_path):
    (tmp_path / "chats.jsonl").write_text(GOOD_LINE)
    with pytest.raises(UserError, match=r"Give '.*chats\.jsonl' itself"):
        load_dialogues(str(tmp_path), "train")


# ---------------------------------------------------------------------------------------------------------------------
# DailyDialog itself


def test_daily_dialog_train_has_one_bad_row_and_validation_copies_of_it(shared):
    folder = str(shared / "data" / "dailydialog")
    with pytest.raises(UserError, match=r"dialogues_train\.txt, line 7852: 12 utterances but 11 values in 'act'"):
        load_dialogues(folder, "train")
    splits = load_splits(folder, ["train", "validation"], skip_bad_rows=True)
    assert len(splits["train"]) == 11_117 and len(splits["train"].skipped) == 1
    note = overlap_note(folder, splits)
    assert note.startswith("of 1,000 validation dialogues 89 are also in train and 92 are near-copies")
    with pytest.raises(UserError, match="no test split"):
        load_dialogues(folder, "test")


def test_daily_dialog_validation_zipped_and_not(shared, tmp_path):
    folder = shared / "data" / "dailydialog"
    validation = load_dialogues(str(folder), "validation")
    assert len(validation) == 1000 and not validation.skipped
    samples = make_samples(validation, DialogueCodec(make_tokenizer(True), DialogueFormat(max_prompt_tokens=4000)))
    assert len(samples) == 3388
    for sample in samples:
        assert len(sample.context) == 5 and sample.act in (1, 2, 3, 4)
        assert sample.prompt == "<EOU>".join(sample.context) + " <EOU>"
    with zipfile.ZipFile(folder / "validation.zip") as archive:
        archive.extractall(tmp_path)
    assert load_dialogues(str(tmp_path), "validation") == validation


# ---------------------------------------------------------------------------------------------------------------------
# Markers


def test_an_utterance_that_holds_the_marker_is_a_bad_row(chats):
    rows = [{"dialog": [f"Hi {i} .", "Well ?"]} for i in range(40)]
    rows[7]["dialog"][1] = "Type <EOU> to end ."
    file = chats(rows)
    assert len(load_dialogues(file, "train")) == 36  # the judge reads no markers
    with pytest.raises(UserError, match="line 8: utterance 2 of 2 holds the marker '<EOU>', which ends.*Mend the row"):
        load_dialogues(file, "train", markers=["<EOU>"])
    kept = [load_dialogues(file, split, True, ["<EOU>"]) for split in SPLITS]
    assert sum(map(len, kept)) == 39 and sum(len(part.skipped) for part in kept) == 1
    assert all("<EOU>" not in u for part in kept for d in part for u in d.utterances)


# ---------------------------------------------------------------------------------------------------------------------
# The environment

TALKS = [Dialogue(tuple(f"line {i} of talk {talk}" for i in range(4)), (1, 2, 3, 4), (0,) * 4) for talk in range(15)]


@pytest.fixture(scope="module")
def small_codec():
    fmt = DialogueFormat(context_utterances=2, max_prompt_tokens=64, max_new_tokens=12)
    return DialogueCodec(make_tokenizer(True), fmt)


@pytest.fixture(scope="module")
def samples(small_codec):
    return make_samples(TALKS, small_codec)  # 30, no prompt twice


@pytest.fixture
def make_env(samples, small_codec):
    return functools.partial(DialogueVectorEnv, samples, small_codec)


def length_reward(prompts, responses, references, acts):
    assert all(isinstance(text, str) for text in [*prompts, *responses, *references])
    lengths = np.array([float(len(r)) for r in responses])
    return lengths, {"length": lengths}


def play(env, rounds, seed):
    """The prompts of so many rounds."""
    _, infos = env.reset(seed=seed)
    prompts = [list(infos["prompt"])]
    for _ in range(rounds - 1):
        *_, infos = env.step(["ok"] * env.num_envs)
        prompts.append(list(infos["prompt"]))
    return prompts


def test_env_is_a_gymnasium_vector_env(make_env, small_codec):
    env = make_env(3, length_reward)
    assert isinstance(env, VectorEnv) and env.num_envs == 3
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    with pytest.raises(gym.error.ResetNeeded):
        env.step(["a", "b", "c"])
    observations, infos = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(12):  # past the end of an epoch
        assert env.observation_space.contains(observations)
        assert env.single_observation_space.contains({k: v[0] for k, v in observations.items()})
        for i, prompt in enumerate(infos["prompt"]):
            mask = observations["attention_mask"][i].astype(bool)
            assert small_codec.tokenizer.decode(observations["input_ids"][i][mask]) == prompt
        actions = env.action_space.sample()
        assert env.action_space.contains(actions)
        before, infos_before = observations, infos
        observations, rewards, terminations, truncations, infos = env.step(actions)
        assert rewards.shape == terminations.shape == truncations.shape == (3,)
        assert rewards.dtype == np.float64 and terminations.all() and not truncations.any()
        final = infos["final_info"]
        assert all((infos["final_obs"][k] == before[k]).all() for k in before)
        assert infos["_final_obs"].all() and infos["_final_info"].all()
        for name in ("prompt", "reply", "act"):
            assert list(final[name]) == list(infos_before[name]) and final[f"_{name}"].all()
        assert list(final["response"]) == [small_codec.decode_response(a) for a in actions]
        assert list(final["length"]) == list(rewards) == [len(r) for r in final["response"]]
    env.close()


def test_without_a_reward_rewards_are_0(make_env):
    env = make_env(2)
    env.reset(seed=0)
    assert env.step(["a", "b"])[1].tolist() == [0.0, 0.0]


def test_text_actions_equal_token_actions(make_env, small_codec):
    by_text, by_tokens = (make_env(3, length_reward) for _ in range(2))
    by_text.reset(seed=1), by_tokens.reset(seed=1)
    replies = ["Sure .", "", " It is six . "]
    width = small_codec.format.max_new_tokens
    actions = np.full((3, width), -1)
    for i, reply in enumerate(replies):
        ids = small_codec.encode_targets([messages_of(["Hi"])], [reply])[0][:width]
        actions[i, : len(ids)] = ids
    texts, ids = by_text.step(replies), by_tokens.step(actions)
    assert texts[1].tolist() == ids[1].tolist() == [6.0, 0.0, 11.0]
    for name in ("response", "prompt", "reply", "act"):
        assert list(texts[4]["final_info"][name]) == list(ids[4]["final_info"][name])
    assert (texts[0]["input_ids"] == ids[0]["input_ids"]).all()


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_episodes_of_one(make_env, num_processes):
    alone = play(make_env(8), 9, seed=3)
    parts = [play(make_env(8, None, index, num_processes), 9, seed=3) for index in range(num_processes)]
    assert [sum(prompts, []) for prompts in zip(*parts)] == alone


def test_each_epoch_is_a_permutation_of_all_samples(make_env, samples):
    env = make_env(4)
    dealt = sum(play(env, 23, seed=0), [])
    everything = sorted(s.prompt for s in samples)
    first, second, third = dealt[:30], dealt[30:60], dealt[60:90]
    assert sorted(first) == sorted(second) == sorted(third) == everything
    assert first != second and second != third and first != [s.prompt for s in samples]


def test_neighbours_may_answer_the_same_prompt(make_env):
    """Twice each, in the order of single ones, and the same over two processes."""
    single = sum(play(make_env(2), 4, seed=0), [])
    pairs = play(make_env(4, samples_per_prompt=2), 4, seed=0)
    assert sum(pairs, []) == [prompt for prompt in single for _ in range(2)]
    halves = [play(make_env(4, None, i, 2, 2), 4, seed=0) for i in range(2)]
    assert [a + b for a, b in zip(*halves)] == pairs


def test_the_seed_decides_the_order(make_env):
    env = make_env(4)
    order, other = play(env, 5, seed=0), play(env, 5, seed=1)  # a new seed takes effect in the same env
    assert order != other and [play(make_env(4), 5, seed) for seed in (0, 1)] == [order, other]
    # without a seed it goes on where it is
    assert play(env, 2, seed=0) == order[:2] and list(env.reset()[1]["prompt"]) == order[2]


def test_wrong_numbers_are_refused(make_env, small_codec):
    env = make_env(3)
    env.reset(seed=0)
    for actions in (["a", "b"], np.zeros((4, 12), np.int64), []):
        with pytest.raises(UserError, match=f"given {len(actions)} responses for 3 dialogues"):
            env.step(actions)
    for env_num, num_processes in ((0, 1), (-2, 2), (3, 2), (6, 4)):
        with pytest.raises(UserError, match=f"env_num is {env_num}; .* positive multiple of the {num_processes}"):
            make_env(env_num, None, 0, num_processes)
    with pytest.raises(UserError, match="no dialogue has 3 utterances or more"):
        DialogueVectorEnv([], small_codec, 2)
