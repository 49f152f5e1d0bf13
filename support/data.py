"""Reading dialogues: the built-in corpus, hub datasets, folders, files, and DailyDialog's original release.

    dialogues = load_dialogues("builtin", "train")

One row of a dataset is one dialogue: `dialog` (utterances), `act` (dialogue acts, 1 to 4) and `emotion` (0 to 6), lists
of equal length. To read a new form of data, write a function here that yields such rows.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import random
import re
import tokenize
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.builtin_corpus import ACTS as ACTS
from support.builtin_corpus import generate_corpus
from support.data_checks import check_content, check_json_lines, describe_form, line_hint, normalized_text
from support.errors import UserError, did_you_mean, first_line

# the names that a split may have; ours come first
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SPLITS = tuple(SPLIT_NAMES)
# `datasets` 4 and later refuse datasets that are a script, as these are; the copy has the same rows as parquet.
HUB_ALIASES = dict.fromkeys(("daily_dialog", "li2017dailydialog/daily_dialog"), "OpenRL/daily_dialog")
RELEASE = {"dialog": "dialogues_{}.txt", "act": "dialogues_act_{}.txt", "emotion": "dialogues_emotion_{}.txt"}


@dataclass(frozen=True)
class Dialogue:
    """One conversation: n utterances with a dialogue act (1 to 4, 0 if unlabelled) and an emotion (0 to 6) each."""

    utterances: tuple[str, ...]
    acts: tuple[int, ...]
    emotions: tuple[int, ...]
    roles: tuple[str, ...] = ()
    system: str = ""
    first_reply: int = 0


@dataclass(frozen=True)
class Form:
    name: str = "dialog"
    has_roles: bool = False
    has_references: bool = True


def form_sentence(path, dialogues):
    return f"{path}: rows of '{dialogues.form.name}', {len(dialogues)} dialogues"


Row = tuple[str, dict[str, Any]]  # its place ("chats.csv, line 3") and its columns
Checked = tuple[str, Dialogue | str]  # its place, and the dialogue or what is wrong with the row


class Dialogues(list):
    """A split: a list of `Dialogue`, with the `places` of each, and in `skipped` a sentence for each row left out."""

    def __init__(self, rows: Sequence[Checked]):
        super().__init__(d for _, d in rows if isinstance(d, Dialogue))
        self.places = [where for where, d in rows if isinstance(d, Dialogue)]
        self.skipped = [f"{where}: {fault}" for where, fault in rows if isinstance(fault, str)]
        self.n_skipped = len(self.skipped)
        self.form = Form()

    def place(self, i):
        return self.places[i]

    def __getitem__(self, i):
        if isinstance(i, slice):
            other = Dialogues([])
            other.extend(list(self)[i])
            other.places = self.places[i]
            return other
        return super().__getitem__(i)


def load_dialogues(data_path: str, split: str, skip_bad_rows: bool = False, markers: Sequence[str] = ()) -> Dialogues:
    """Load all dialogues of one split ("train", "validation" or "test").

    `data_path` is `builtin`; the name of a hub dataset (`OpenRL/daily_dialog`; `daily_dialog` means that one); a folder
    written by `save_to_disk`; a folder with a parquet, JSON, JSON-lines or CSV file for each split (`train.csv`,
    `train-00000-of-00001.parquet`, `validation/rows.json`); one such file, which is then cut 90/5/5 into splits; or the
    original DailyDialog release, zipped or not.

    Raises UserError with file and line of the first bad row: unequal lengths, an empty utterance, a label out of
    range, text that is not UTF-8 or contains one of the `markers` that end an utterance. With `skip_bad_rows` those
    rows are left out and listed in `.skipped`. If all rows of a file are bad, the error says what the file looks like.
    """
    return load_splits(data_path, [split], skip_bad_rows, markers)[split]


def load_splits(
    data_path: str, splits: Sequence[str], skip_bad_rows: bool = False, markers: Sequence[str] = ()
) -> dict[str, Dialogues]:
    """Load several splits as load_dialogues does; a file that is cut into splits is read once."""
    if unknown := [split for split in splits if split not in SPLITS]:
        hint = did_you_mean(unknown[0], SPLITS)
        raise UserError(f"split '{unknown[0]}' is unknown; expected one of {', '.join(SPLITS)}.{hint}")
    name, path = str(data_path), Path(data_path).expanduser()
    parts = checked = None
    if name != "builtin" and (path.is_file() or (path / "state.json").is_file()):  # it has no splits of its own
        rows = _file_rows(path) if path.is_file() else _dataset_rows(_stored(path), str(path))
        checked = _check_rows(rows, skip_bad_rows, markers)
        parts = _cut(checked)
    loaded = {}
    for split in splits:
        loaded[split] = Dialogues(parts[split] if parts else _check_rows(_rows(name, split), skip_bad_rows, markers))
        if not loaded[split]:
            why = _why_no_dialogue(checked) if checked else ": the file is empty." if path.is_file() else "."
            raise UserError(f"the {split} split of '{data_path}' holds no dialogue{why}")
    return loaded


def _why_no_dialogue(checked: list[Checked]) -> str:
    """Why a split of a single file has no dialogue, and what to do."""
    different = len({_same_dialogue(row) for row in checked if isinstance(row[1], Dialogue)})
    faults = Dialogues(checked).skipped
    malformed = f" {len(faults)} rows are malformed ({faults[0]})." if faults else ""
    return (
        f": of {len(checked)} rows, {different} are different dialogues. A single file is cut 90/5/5, with all copies "
        "of a dialogue in one split, so give at least 20 different dialogues, or a folder with a file for each split."
    ) + malformed


def _check_rows(rows: Iterator[Row], skip_bad_rows: bool, markers: Sequence[str]) -> list[Checked]:
    """All rows, each with its dialogue or its fault.

    Raises UserError about the first bad row; with `skip_bad_rows` only if no row is good.
    """
    checked, bad, first = [], 0, None
    for where, row in rows:
        try:
            checked.append((where, _checked(row, markers)))
        except ValueError as error:
            checked.append((where, str(error)))
            bad, first = bad + 1, first or (f"{where}: {error}", row)
    if bad and (bad == len(checked) or not skip_bad_rows):
        raise UserError(f"{first[0]}. {_advice(*first, bad, len(checked))}")
    return checked


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
        return _as_list(value, "dialog")
    except ValueError:
        return value


# U+FFFD replaces undecodable bytes when a file is read; JSON can contain half of a surrogate pair
UNDECODABLE = re.compile("[\ufffd\ud800-\udfff]")
MISSING = {"", "[]", "null", "none", "nan", "na", "n/a", "<na>"}  # text for "no label", in any case


def _checked(row: dict[str, Any], markers: Sequence[str]) -> Dialogue:
    """The row as a Dialogue; ValueError says what is wrong with it."""
    if "_error" in row:
        raise ValueError(row["_error"])
    if "dialog" not in row:
        raise ValueError(f"has no column 'dialog' (columns: {', '.join(map(str, row)) or 'none'})")
    utterances = _as_list(row["dialog"], "dialog")
    n = len(utterances)
    if not n:
        raise ValueError("the dialogue has no utterance")
    acts, emotions = _labels(row.get("act"), "act", 1, 4, n), _labels(row.get("emotion"), "emotion", 0, 6, n)
    for i, utterance in enumerate(utterances, start=1):
        if not isinstance(utterance, str):
            raise ValueError(f"utterance {i} is not text but {utterance!r:.40}")
        if not utterance.strip():
            raise ValueError(f"utterance {i} of {n} is empty")
        if not utterance.isascii() and UNDECODABLE.search(utterance):
            raise ValueError(f"utterance {i} of {n} is not valid UTF-8")
        for marker in markers:
            if marker in utterance:
                raise ValueError(f"utterance {i} of {n} holds the marker '{marker}', which ends an utterance")
    return Dialogue(tuple(utterances), acts, emotions)


def _is_missing(value: Any) -> bool:
    """Whether a cell, or a value in a list of labels, means "no label"."""
    if isinstance(value, str):
        return value.strip().casefold() in MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def _labels(cell: Any, column: str, low: int, high: int, n: int) -> tuple[int, ...]:
    """The labels of n utterances; 0 for each that has none, and for all if the cell is missing or empty."""
    values = [] if _is_missing(cell) else _as_list(cell, column)
    if not values:
        return (0,) * n
    if len(values) != n:
        raise ValueError(f"{n} utterances but {len(values)} values in '{column}'")
    if set(map(type, values)) == {int} and low <= min(values) and max(values) <= high:  # nearly always
        return tuple(values)
    numbers = []
    for value in values:
        try:
            number = None if _is_missing(value) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.inf
        if number is not None and not number.is_integer():
            raise ValueError(f"'{column}' should hold whole numbers, found {values!r:.60}")
        if number is not None and not low <= number <= high:
            raise ValueError(f"{column} {int(number)} is out of range; expected {low} to {high}")
        numbers.append(int(number or 0))
    return tuple(numbers)


def _as_list(value: Any, column: str) -> list[Any]:
    """A list column as it comes from parquet or JSON, or as text in a CSV cell: JSON, a Python list, or `1 2 1`."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str):
        text = value.strip()
        if column != "dialog" and text and not text.startswith("["):
            return _label_words(text)
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                parsed = parse(text)
                if isinstance(parsed, (list, tuple)) and not (parse is ast.literal_eval and _lacks_commas(text)):
                    return list(parsed)
        if column != "dialog" and re.fullmatch(r"\[[^\[\]]*\]", text):  # `[1.0, nan]` of pandas, `[1 2]` of numpy
            return _label_words(re.sub(r"[\[\]'\"]", " ", text))
    raise ValueError(f"'{column}' should be a list, found {value!r:.60}")


def _label_words(text: str) -> list[str]:
    """`1 2 1` or `1, 2, 1`; nothing between two commas is a missing label."""
    return re.split(r"\s*,\s*|\s+", text.strip().removesuffix(",").strip())


def _lacks_commas(text: str) -> bool:
    """Whether two strings follow each other: numpy prints lists so, and Python would read 'a' 'b' as one string."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [token.type for token in tokens if token.type not in (tokenize.NL, tokenize.NEWLINE)]
    return (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds)


def _cut(rows: list[Checked]) -> dict[str, list[Checked]]:
    """90/5/5 of the different dialogues by a fixed shuffle: the same rows in the same split in every run.

    All copies of a dialogue, whatever their blanks and labels, go to one split.
    """
    rows = list(rows)
    random.Random(0).shuffle(rows)
    numbers: dict[str, int] = {}  # of the different dialogues; a bad row counts as one
    number = [numbers.setdefault(_same_dialogue(row), len(numbers)) for row in rows]
    n = len(numbers)
    ends = [int(n * 0.9), int(n * 0.95)]
    if 3 <= n < len(rows):  # a few dialogues with many copies: one for each split
        ends[0] = min(ends[0], ends[1] - 1)
    parts: dict[str, list[Checked]] = {split: [] for split in SPLITS}
    for row, k in zip(rows, number):
        parts[SPLITS[(k >= ends[0]) + (k >= ends[1])]].append(row)
    return parts


def _same_dialogue(row: Checked) -> str:
    """A key that all copies of a dialogue share; a bad row has no copies."""
    where, dialogue = row
    return normalized_text(dialogue.utterances) if isinstance(dialogue, Dialogue) else f"\0\0{where}"


_corpus = functools.cache(generate_corpus)  # once for all its splits


def _rows(data_path: str, split: str) -> Iterator[Row]:
    """Every row of a split, with its place, from a source that has splits."""
    path = Path(data_path).expanduser()
    if data_path == "builtin":
        yield from ((f"built-in {split} row {i}", row) for i, row in enumerate(_corpus()[split]))
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
            f"'{resolved}' ({type(error).__name__}). Give a local path, 'builtin', or a hub name while online."
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
    return ((f"{name}, row {i}", row) for i, row in enumerate(stored, start=1))


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
    content = file.read_bytes()
    check_content(file, content)
    return content.decode("utf-8-sig", errors="replace")  # without Excel's BOM; see UNDECODABLE


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        check_content(file, _beginning(file), text=False)
        raise UserError(f"'{file}' is not a parquet file that can be read: {first_line(error)}.") from error
    yield from _dataset_rows(table.to_pylist(), str(file))


def _json_rows(file: Path) -> Iterator[Row]:
    """JSON lines, or one JSON array of objects."""
    text = _text(file)
    if text.lstrip().startswith("["):
        try:
            return (yield from _dataset_rows(map(_object, json.loads(text)), str(file)))
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # else each line is a list
                raise UserError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}).") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
            raise UserError(f"{file}: not valid JSON of dialogues ({error}).") from error
    check_json_lines(file, text)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = _object(json.loads(line))
            except (ValueError, RecursionError) as error:
                row = {"_error": f"not valid JSON ({error})", "_hint": line_hint(line)}
            yield f"{file}, line {number}", row


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return {"_error": f"expected an object, found {value!r:.40}", "_hint": 'Write each dialogue as {"dialog": [...]}'}


def _csv_rows(file: Path) -> Iterator[Row]:
    """CSV with a header; lists are written in JSON or Python, labels also as `1 2 1`."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(_text(file), newline=""))
    try:
        for row in reader:
            yield f"{file}, line {reader.line_num}", {k: v for k, v in row.items() if k is not None}
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not a CSV file that can be read ({error}).") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _parquet_rows,
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
}
