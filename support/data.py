"""Reading conversations: the built-in corpus, hub datasets, folders, files, and DailyDialog's original release.

    dialogues = load_dialogues("builtin", "train")

A source yields rows, and support/data_forms.py makes a `Dialogue` of each. To read a new kind of file, write a function
here that yields such rows.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import marshal
import random
import re
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from support.builtin_corpus import ACTS as ACTS
from support.builtin_corpus import generate_corpus, generate_mistakes
from support.data_checks import check_content, check_json_lines, describe_form, line_hint, normalized_text
from support.data_forms import DIALOG, Dialogue, Form, NoChoice, Rejected, as_list, check_choice, form_of, read_row
from support.desk import generate_desk
from support.errors import UserError, did_you_mean, first_line
from support.spool import Spool

# the names that a split may have; ours come first
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SPLITS = tuple(SPLIT_NAMES)
# `datasets` 4 and later refuse datasets that are a script, as these are; the copy has the same rows as parquet.
HUB_ALIASES = dict.fromkeys(("daily_dialog", "li2017dailydialog/daily_dialog"), "OpenRL/daily_dialog")
RELEASE = {"dialog": "dialogues_{}.txt", "act": "dialogues_act_{}.txt", "emotion": "dialogues_emotion_{}.txt"}
TOLD = 1000  # sentences about rows that are left out, of which the others are only counted
BATCH = 1000  # rows that are read together

Row = tuple[str, dict[str, Any]]  # its place ("chats.csv, line 3") and its columns
Report = Callable[[int], None]  # is called with the number of rows read so far


def no_report(rows: int) -> None:
    """Do nothing: for readers that show no progress."""


class Rows:
    """The rows of a source: good ones, outside memory where they are many, and what was wrong with others.

    With `compare` it numbers the different texts, to keep copies of a dialogue in one split. With `choices` rows of
    preferences are choices between two replies, see `read_row`.
    """

    def __init__(self, compare: bool = False, choices: bool = False):
        self.compare, self.choices = compare, choices
        self.good = Spool()  # place and fields of a Dialogue
        self.numbers = array("q")  # of each row: that of the dialogue in `good`, or -1 - that of the bad row
        self.texts = array("q")  # of each row: a number that all copies of a dialogue share
        self.skipped: list[str] = []  # sentences about bad rows
        self.bad = self.rejected = 0
        self.without_choice: Counter[str] = Counter()  # rows by reason
        self.form: Form | None = None
        self.has_acts = False
        self._known: dict[bytes, int] = {}

    def add(self, place: str, dialogue: Dialogue) -> None:
        self.numbers.append(len(self.good))
        try:
            self.good.append((place, *vars(dialogue).values()))
        except ValueError:  # another column holds what is neither text nor number, such as a date
            columns = {name: _storable(value) for name, value in dialogue.columns.items()}
            self.good.append((place, *vars(dataclasses.replace(dialogue, columns=columns)).values()))
        self.has_acts = self.has_acts or any(dialogue.acts)
        if not self.compare:
            return
        text = f"{dialogue.system}\0{normalized_text(dialogue.utterances)}" if dialogue.system else ""
        text = text or normalized_text(dialogue.utterances)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        self.texts.append(self._known.setdefault(digest, len(self._known)))

    def add_bad(self, sentence: str) -> None:
        self.bad += 1
        self.numbers.append(-self.bad)
        self.texts.append(-self.bad)  # a bad row has no copies
        if len(self.skipped) < TOLD:
            self.skipped.append(sentence)

    @property
    def different(self) -> int:
        """How many different dialogues there are."""
        return len(self._known)


def _storable(value: Any) -> Any:
    """A value as it can be kept outside memory: one of another type as text."""
    try:
        return marshal.loads(marshal.dumps(value))
    except ValueError:
        return str(value)


class Dialogues(Sequence):
    """A split, or some of it: `Dialogue` by index, Dialogues by slice. They are read again from `rows` each time."""

    def __init__(self, rows: Rows, numbers: Sequence[int] | None = None):
        """`numbers` are those of the rows; all rows if they are left out."""
        self.rows = rows
        numbers = rows.numbers if numbers is None else numbers
        self.numbers = array("q", (number for number in numbers if number >= 0))
        bad = [-1 - number for number in numbers if number < 0]
        self.n_skipped = len(bad)
        self.skipped = [rows.skipped[k] for k in bad if k < len(rows.skipped)]

    @property
    def form(self) -> Form:
        """What the columns of the rows mean."""
        return self.rows.form or DIALOG

    @property
    def has_acts(self) -> bool:
        return self.rows.has_acts

    def place(self, i: int) -> str:
        """Where dialogue i stands: `chats.csv, line 3`."""
        return self.rows.good[self.numbers[i]][0]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return Dialogues(self.rows, self.numbers[i])
        return Dialogue(*self.rows.good[self.numbers[i]][1:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, Dialogues)) and list(self) == list(other)


def load_dialogues(data_path: str, split: str, skip_bad_rows: bool = False, markers: Sequence[str] = ()) -> Dialogues:
    """Load all dialogues of one split ("train", "validation" or "test").

    `data_path` is `builtin`, `builtin_mistakes` or `desk`; the name of a hub dataset (`daily_dialog` means
    `OpenRL/daily_dialog`, its copy as parquet); a folder written by `save_to_disk`; a folder with a parquet, JSON,
    JSON-lines, CSV or Arrow file for each split (`train.csv`, `train-00000-of-00001.parquet`,
    `validation/rows.json`); one such file, which is then cut 90/5/5 into splits; or the original DailyDialog release,
    zipped or not.

    Raises UserError with file and line of the first bad row: unequal lengths, an empty utterance, an unknown role, a
    label out of range, text that is not UTF-8 or contains one of the `markers` that end an utterance. With
    `skip_bad_rows` those rows are left out and listed in `.skipped`. If all rows of a file are bad, the error says what
    the file looks like.
    """
    return load_splits(data_path, [split], skip_bad_rows, markers)[split]


def has_splits(data_path: str) -> bool:
    """Whether data has splits of its own: it is neither a single file nor one stored dataset."""
    path = Path(data_path).expanduser()
    return data_path in EMBEDDED or not (path.is_file() or (path / "state.json").is_file())


def load_choices(data_path: str, split: str = "", skip_bad_rows: bool = False) -> Dialogues:
    """Load preferences: those of a split, or all of a file or stored dataset without splits. There may be none.

    `rows.without_choice` counts ties and other rows that were left out. UserError as load_dialogues, for other rows.
    """
    rows = Rows(choices=True)
    if not split:
        return Dialogues(_read_whole(rows, data_path, skip_bad_rows, (), no_report))
    return Dialogues(_read(rows, _rows(data_path, split), skip_bad_rows, (), no_report))


def _read_whole(rows: Rows, data_path: str, *how: Any) -> Rows:
    path = Path(data_path).expanduser()
    return _read(rows, _file_rows(path) if path.is_file() else _dataset_rows(_stored(path), str(path)), *how)


def load_splits(
    data_path: str,
    splits: Sequence[str],
    skip_bad_rows: bool = False,
    markers: Sequence[str] = (),
    report: Report = no_report,
) -> dict[str, Dialogues]:
    """Load several splits as load_dialogues does; a file that is cut into splits is read once."""
    if unknown := [split for split in splits if split not in SPLITS]:
        hint = did_you_mean(unknown[0], SPLITS)
        raise UserError(f"split '{unknown[0]}' is unknown; expected one of {', '.join(SPLITS)}.{hint}")
    name, parts, whole = str(data_path), None, None
    if not has_splits(name):
        whole = _read_whole(Rows(compare=True), name, skip_bad_rows, markers, report)
        parts = _cut(whole)
    loaded = {}
    for split in splits:
        if parts:
            loaded[split] = Dialogues(whole, parts[split])
        else:
            loaded[split] = Dialogues(_read(Rows(), _rows(name, split), skip_bad_rows, markers, report))
        if not loaded[split]:
            why = _why_no_dialogue(loaded[split].rows, cut=parts is not None)
            raise UserError(f"the {split} split of '{data_path}' holds no dialogue{why}")
    return loaded


def form_sentence(data_path: str, dialogues: Dialogues) -> str:
    """A line that says what the data is: its form, how many dialogues, and what is learned of them."""
    form = dialogues.form
    rejected = (
        f", {dialogues.rows.rejected:,} rows with a rejected completion left out" if dialogues.rows.rejected else ""
    )
    return f"data: {data_path} has rows of '{form.name}' ({form.content}); {form.replies}{rejected}"


def _why_no_dialogue(rows: Rows, cut: bool) -> str:
    """Why a split has no dialogue, and what to do; `cut` if it is part of a single file."""
    if not len(rows.numbers):
        rejected = f"all {rows.rejected:,} rows have a rejected completion (label false)"
        return f": {rejected}." if rows.rejected else ": the file is empty." if cut else "."
    malformed = f" {rows.bad} rows are malformed ({rows.skipped[0]})." if rows.bad else ""
    return (
        f": of {len(rows.numbers)} rows, {rows.different} are different dialogues. A single file is cut 90/5/5, with "
        "all copies of a dialogue in one split, so give at least 20 different dialogues, or a folder with a file for "
        "each split."
    ) + malformed


def _read(read: Rows, rows: Iterator[Row], skip_bad_rows: bool, markers: Sequence[str], report: Report) -> Rows:
    """Read all rows into `read`.

    Raises UserError about the first bad row; with `skip_bad_rows` only if no row is good.
    """
    first = None
    for count, (place, row) in enumerate(rows, start=1):
        try:
            read.add(place, _checked(row, read, markers))
        except ValueError as error:
            read.add_bad(f"{place}: {error}")
            first = first or (f"{place}: {error}", row)
        except Rejected:
            read.rejected += 1
        except NoChoice as why:
            read.without_choice[str(why)] += 1
        if count % BATCH == 0:
            report(count)
    if read.bad and (not len(read.good) or not skip_bad_rows):
        raise UserError(f"{first[0]}. {_advice(*first, read.bad, len(read.numbers))}")
    return read


def _checked(row: dict[str, Any], read: Rows, markers: Sequence[str]) -> Dialogue:
    """The row as a Dialogue; ValueError says what is wrong with it. The first row with a form decides that of all."""
    if "_error" in row:
        raise ValueError(row["_error"])
    if read.choices:
        check_choice(row)
    form = read.form or form_of(row, read.choices)
    if form is None:
        raise ValueError(f"has no column 'dialog' (columns: {', '.join(map(str, row)) or 'none'})")
    dialogue = read_row(row, form, markers, read.choices)
    read.form = form
    return dialogue


def _advice(fault: str, row: dict[str, Any], bad: int, rows: int) -> str:
    """What to do about bad rows: correct or skip a few of them; if nearly all are bad, correct the source."""
    recode = ""
    if fault.endswith("is not valid UTF-8"):
        recode = " Text in Latin-1 or Windows-1252 becomes UTF-8 with 'iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW'."
    if bad >= 0.9 * rows:
        hint = row.get("_hint") or describe_form({k: _parsed(v) for k, v in row.items() if not str(k).startswith("_")})
        hint = f" {hint}." if hint else "" if recode else " Correct the file as a whole."
        return f"{bad} of {rows} rows are malformed.{recode}{hint}"
    if bad == 1:
        return f"Mend the row, or leave out all such rows with --skip-bad-rows.{recode}"
    return f"{bad} of {rows} rows are malformed: mend them, or leave them out with --skip-bad-rows.{recode}"


def _parsed(value: Any) -> Any:
    """The list in a cell, or the cell itself if it is no list; for a message about its row."""
    try:
        return as_list(value, "dialog")
    except ValueError:
        return value


def _cut(rows: Rows) -> dict[str, list[int]]:
    """90/5/5 of the different dialogues by a fixed shuffle: the same rows in the same split in every run.

    All copies of a dialogue, whatever their blanks and labels, go to one split.
    """
    order = list(range(len(rows.numbers)))
    random.Random(0).shuffle(order)
    numbers: dict[int, int] = {}  # of the different dialogues; a bad row counts as one
    number = [numbers.setdefault(rows.texts[i], len(numbers)) for i in order]
    n = len(numbers)
    ends = [int(n * 0.9), int(n * 0.95)]
    if 3 <= n < len(order):  # a few dialogues with many copies: one for each split
        ends[0] = min(ends[0], ends[1] - 1)
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    for i, k in zip(order, number):
        parts[SPLITS[(k >= ends[0]) + (k >= ends[1])]].append(rows.numbers[i])
    return parts


# data of this project's own: its rows of each split, made once for all splits
EMBEDDED = {
    "builtin": functools.cache(generate_corpus),
    "builtin_mistakes": functools.cache(generate_mistakes),
    "desk": functools.cache(generate_desk),
}


def _rows(data_path: str, split: str) -> Iterator[Row]:
    """Every row of a split, with its place, from a source that has splits."""
    path = Path(data_path).expanduser()
    if data_path in EMBEDDED:
        label = data_path.replace("_", " ").replace("builtin", "built-in")
        yield from ((f"{label} {split} row {i}", row) for i, row in enumerate(EMBEDDED[data_path]()[split]))
    elif path.is_dir():
        yield from _folder_rows(path, split)
    elif path.is_absolute() or data_path.startswith((".", "~")) or data_path.count("/") > 1:
        raise UserError(f"data path '{data_path}' does not exist.")
    else:
        yield from _hub_rows(data_path, split)


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    import datasets

    resolved = HUB_ALIASES.get(name, name)
    try:
        stored = datasets.load_dataset(resolved)
    except Exception as error:  # offline, unknown, gated or a script: the library has a class for each
        raise UserError(
            f"dataset '{name}' is neither a folder or file on this machine nor could it be loaded from the hub as "
            f"'{resolved}' ({type(error).__name__}). Give a local path, 'builtin', 'desk', or a hub name while "
            "online."
        ) from error
    yield from _dataset_rows(_pick_split(stored, split, name), name)


def _stored(folder: Path) -> Any:
    """What save_to_disk wrote: a Dataset or a DatasetDict."""
    import datasets

    try:
        return datasets.load_from_disk(str(folder)).with_format(None)  # rows of lists, not of tensors
    except Exception as error:  # pyarrow and datasets raise many kinds for an incomplete folder
        raise UserError(f"'{folder}' was not written whole by save_to_disk: {error}") from error


def _pick_split(stored: Any, split: str, name: str) -> Any:
    for candidate in SPLIT_NAMES[split]:
        if candidate in stored:
            return stored[candidate]
    raise UserError(f"'{name}' has no {split} split; it has {', '.join(stored)}.")


def _dataset_rows(stored: Any, name: str) -> Iterator[Row]:
    if hasattr(stored, "iter"):  # a dataset of the library, by batches of columns
        stored = itertools.chain.from_iterable(map(_rows_of_columns, stored.iter(batch_size=BATCH)))
    return ((f"{name}, row {i}", row) for i, row in enumerate(stored, start=1))


def _rows_of_columns(columns: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, values)) for values in zip(*columns.values()))


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    if texts := _release_texts(folder, split):
        return (yield from _release_rows(texts))
    if (folder / split / "state.json").is_file():  # save_to_disk of a Dataset
        return (yield from _dataset_rows(_stored(folder / split), str(folder / split)))
    if (folder / "dataset_dict.json").is_file():  # save_to_disk of a DatasetDict
        return (yield from _dataset_rows(_pick_split(_stored(folder), split, str(folder)), str(folder)))
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in READERS and p.is_file())
    matching = [p for p in files if _split_of(p, folder) == split]
    if not matching:
        found = ", ".join(sorted({str(p.relative_to(folder)) for p in files})[:8]) or "no dataset file"
        alone = f" Give '{files[0]}' itself to have it cut into splits." if len(files) == 1 else ""
        raise UserError(
            f"'{folder}' has no {split} split: found {found}; expected a file such as {split}.csv, {split}.jsonl or "
            f"{split}.parquet, a folder written by save_to_disk, or the DailyDialog release.{alone}"
        )
    for file in matching:
        yield from _file_rows(file)


def _split_of(file: Path, folder: Path) -> str | None:
    """The split that a file's name or folder names: train.csv, train-00000-of-00002.parquet, validation/rows.json."""
    parts = reversed(file.relative_to(folder).with_suffix("").parts)
    heads = (re.split("[-_.]", part.lower())[0] for part in parts)
    return next((split for head in heads for split, names in SPLIT_NAMES.items() if head in names), None)


def _release_texts(folder: Path, split: str) -> dict[str, tuple[str, bytes]]:
    """The files of a split of the original release by column: place and content. Empty if `folder` has no release."""
    names = {column: name.format(split) for column, name in RELEASE.items()}
    for place in (folder / split, folder):
        if (place / names["dialog"]).is_file():
            files = {column: place / name for column, name in names.items()}
            return {column: (str(file), file.read_bytes()) for column, file in files.items() if file.is_file()}
    archive = folder / f"{split}.zip"
    if not archive.is_file():
        return {}
    if not zipfile.is_zipfile(archive):
        raise UserError(f"'{archive}' is not a zip archive that can be read.")
    with zipfile.ZipFile(archive) as opened:
        inside = {Path(n).name: n for n in opened.namelist()}
        found = {column: inside[name] for column, name in names.items() if name in inside}
        if "dialog" not in found:
            raise UserError(f"'{archive}' holds no {names['dialog']}, as the release does.")
        return {column: (f"{archive}:{name}", opened.read(name)) for column, name in found.items()}


def _release_rows(texts: dict[str, tuple[str, bytes]]) -> Iterator[Row]:
    """Rows of the original release: one dialogue a line, utterances closed by __eou__; other files have the labels."""
    columns = [text.decode("utf-8", errors="replace").removesuffix("\n").split("\n") for _, text in texts.values()]
    for number, cells in enumerate(itertools.zip_longest(*columns), start=1):
        row = dict(zip(texts, cells))
        if missing := [column for column, cell in row.items() if cell is None]:
            row = {"_error": f"the files differ in length: no line in {', '.join(missing)}"}
        else:
            # What follows the last marker is an utterance that was never closed; a well-formed line has only a blank.
            *closed, last = row["dialog"].split("__eou__")
            row["dialog"] = [*closed, last] if last.strip() else closed
            row |= {column: row[column].split() for column in row if column != "dialog"}
        yield f"{texts['dialog'][0]}, line {number}", row


def _file_rows(file: Path) -> Iterator[Row]:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        check_content(file, _beginning(file))
        raise UserError(f"'{file}' is none of the forms that can be read: {', '.join(READERS)}.")
    yield from reader(file)


def _beginning(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096)


def _text(file: Path) -> str:
    return file.read_bytes().decode("utf-8-sig", errors="replace")  # without Excel's BOM; see UNDECODABLE


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    def rows() -> Iterator[dict[str, Any]]:
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=BATCH):
                    yield from batch.to_pylist()
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            check_content(file, _beginning(file), "parquet")
            raise UserError(f"'{file}' is not a parquet file that can be read: {first_line(error)}.") from error

    return _dataset_rows(rows(), str(file))


def _arrow_rows(file: Path) -> Iterator[Row]:
    """Arrow's file form or its stream form, as `datasets` keeps it."""
    import pyarrow

    def rows() -> Iterator[dict[str, Any]]:
        try:
            with pyarrow.memory_map(str(file)) as source:
                if source.read(6) == b"ARROW1":
                    reader = pyarrow.ipc.open_file(source)
                    batches = map(reader.get_batch, range(reader.num_record_batches))
                else:
                    source.seek(0)
                    batches = iter(pyarrow.ipc.open_stream(source))
                for batch in batches:
                    for start in range(0, batch.num_rows, BATCH):
                        yield from batch.slice(start, BATCH).to_pylist()
        except (OSError, ValueError) as error:
            check_content(file, _beginning(file), "Arrow")
            raise UserError(f"'{file}' is not an Arrow file that can be read: {first_line(error)}.") from error

    return _dataset_rows(rows(), str(file))


def _json_rows(file: Path) -> Iterator[Row]:
    """JSON lines, or one JSON array of objects. An array is read whole."""
    head = _beginning(file)
    check_content(file, head)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        try:
            return (yield from _dataset_rows(map(_object, json.loads(_text(file))), str(file)))
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # else each line is a list
                raise UserError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}).") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
            raise UserError(f"{file}: not valid JSON of dialogues ({error}).") from error
    elif not _has_object_lines(file):
        check_json_lines(file, _text(file))
    with file.open(encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = _object(json.loads(line))
                except (ValueError, RecursionError) as error:
                    row = {"_error": f"not valid JSON ({error})", "_hint": line_hint(line)}
                yield f"{file}, line {number}", row


def _has_object_lines(file: Path) -> bool:
    """Whether the first line of a file is a JSON object, and others follow."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        filled = list(itertools.islice((line for line in lines if line.strip()), 2))
    try:
        return len(filled) == 2 and isinstance(json.loads(filled[0]), dict)
    except (ValueError, RecursionError):
        return False


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return {"_error": f"expected an object, found {value!r:.40}", "_hint": 'Write each dialogue as {"dialog": [...]}'}


def _csv_rows(file: Path) -> Iterator[Row]:
    """CSV with a header; lists are written in JSON or Python, labels also as `1 2 1`."""
    csv.field_size_limit(2**31 - 1)
    check_content(file, _beginning(file))
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                yield f"{file}, line {reader.line_num}", {k: v for k, v in row.items() if k is not None}
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: not a CSV file that can be read ({error}).") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
}
