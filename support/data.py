"""Reading dialogues: the built-in corpus, hub datasets, folders, files, and DailyDialog's original release.

    dialogues = load_dialogues("builtin", "train")

One row of a dataset is one dialogue: `dialog` (utterances), `act` (dialogue acts, 1 to 4) and `emotion` (0 to 6), lists
of equal length. A new form of data is a function here that yields such rows.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import io
import itertools
import json
import random
import re
import tokenize
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support import builtin_corpus
from support.data_checks import check_content, check_json_lines, describe_form, line_hint, normalized_text
from support.errors import UserError, did_you_mean, first_line

ACTS = ("inform", "question", "directive", "commissive")  # dialogue act k of DailyDialog is ACTS[k - 1]
SPLITS = ("train", "validation", "test")
# `datasets` 4 and later refuse script datasets, which these names are; the copy is the same rows as parquet.
HUB_ALIASES = {"daily_dialog": "OpenRL/daily_dialog", "li2017dailydialog/daily_dialog": "OpenRL/daily_dialog"}
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Dialogue:
    """One conversation: n utterances with a dialogue act (1 to 4, 0 where unlabelled) and an emotion (0 to 6) each."""

    utterances: tuple[str, ...]
    acts: tuple[int, ...]
    emotions: tuple[int, ...]


class Dialogues(list):
    """A split: a list of `Dialogue`.

    `places` says where each of them stands ("chats.csv, line 3"); `skipped` holds a sentence for each row that was
    left out.
    """

    def __init__(self, dialogues: Sequence[Dialogue], places: Sequence[str] = (), skipped: Sequence[str] = ()):
        super().__init__(dialogues)
        self.places, self.skipped = list(places), list(skipped)


Row = tuple[str, dict[str, Any]]  # where it stands ("chats.csv, line 3"), and its columns
Checked = tuple[str, Dialogue | str]  # where it stands, and the dialogue, or what is wrong with the row


def load_dialogues(data_path: str, split: str, skip_bad_rows: bool = False, markers: Sequence[str] = ()) -> Dialogues:
    """All dialogues of one split ("train", "validation" or "test").

    `data_path` is `builtin`; the name of a hub dataset (`OpenRL/daily_dialog`; `daily_dialog` means that one); a folder
    written by `save_to_disk`; a folder with a parquet, JSON, JSON-lines or CSV file for each split (`train.csv`,
    `train-00000-of-00001.parquet`, `validation/rows.json`); one such file, then cut 90/5/5 into splits; or the original
    DailyDialog release, zipped or not.

    Raises UserError naming file and line of the first bad row: unequal lengths, an empty utterance, a label out of
    range, text that is not UTF-8 or holds one of the `markers` that end an utterance. With `skip_bad_rows` those rows
    are left out and listed in `.skipped`. A file whose rows are all bad is refused in either case, with what it looks
    like.
    """
    return load_splits(data_path, [split], skip_bad_rows, markers)[split]


def load_splits(
    data_path: str, splits: Sequence[str], skip_bad_rows: bool = False, markers: Sequence[str] = ()
) -> dict[str, Dialogues]:
    """Several splits at once, as load_dialogues gives each of them. A file that is cut into splits is read once."""
    for split in splits:
        if split not in SPLITS:
            raise UserError(
                f"split '{split}' is unknown; expected one of {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
            )
    uncut = _uncut_rows(str(data_path))
    if uncut is not None:
        checked = _check_rows(uncut, skip_bad_rows, markers)
        parts = _cut(checked)
    loaded = {}
    for split in splits:
        if uncut is None:
            part = _check_rows(_rows(str(data_path), split), skip_bad_rows, markers)
        else:
            part = parts[split]
        good = [(where, d) for where, d in part if isinstance(d, Dialogue)]
        if not good:
            why = "."
            if uncut is not None and checked:
                why = (
                    f": of {len(checked)} rows, {_different(checked)} are different dialogues. A single file is cut "
                    "90/5/5, with all copies of a dialogue in one split, so give at least 20 different dialogues, or a "
                    "folder with a file for each split."
                )
                if faults := [f"{where}: {fault}" for where, fault in checked if isinstance(fault, str)]:
                    why += f" {len(faults)} rows are malformed ({faults[0]})."
            elif Path(data_path).is_file():
                why = ": the file is empty."
            raise UserError(f"the {split} split of '{data_path}' holds no dialogue{why}")
        loaded[split] = Dialogues(
            [d for _, d in good],
            [where for where, _ in good],
            [f"{where}: {fault}" for where, fault in part if isinstance(fault, str)],
        )
    return loaded


def _check_rows(rows: Iterator[Row], skip_bad_rows: bool, markers: Sequence[str]) -> list[Checked]:
    """All rows, each with its dialogue or its fault.

    Raises UserError about the first bad row; with `skip_bad_rows` only where no row is good.
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
    """What to do about bad rows: mend or skip them where they are few, mend the source where nearly all are bad."""
    recode = ""
    if fault.endswith("is not valid UTF-8"):
        recode = " Text in Latin-1 or Windows-1252 becomes UTF-8 with 'iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW'."
    if bad >= 0.9 * rows:
        hint = row.get("_hint") or describe_form({k: _parsed(v) for k, v in row.items() if not str(k).startswith("_")})
        also = f"{bad} of {rows} rows are malformed." + recode
        return f"{also} {hint}." if hint else also if recode else f"{also} Correct the file as a whole."
    if bad == 1:
        return f"Mend the row, or leave out all such rows with --skip-bad-rows.{recode}"
    return f"{bad} of {rows} rows are malformed: mend them, or leave them out with --skip-bad-rows.{recode}"


def _parsed(value: Any) -> Any:
    """A cell that holds a list as that list, for a message about its row."""
    try:
        return _as_list(value, "dialog")
    except ValueError:
        return value


def _checked(row: dict[str, Any], markers: Sequence[str]) -> Dialogue:
    """The row as a Dialogue; ValueError says what is wrong with it."""
    if "_error" in row:
        raise ValueError(row["_error"])
    if "dialog" not in row:
        raise ValueError(f"has no column 'dialog' (columns: {', '.join(map(str, row)) or 'none'})")
    utterances = _as_list(row["dialog"], "dialog")
    if not utterances:
        raise ValueError("the dialogue has no utterance")
    labels = [
        _labels(row.get(column), column, low, high, len(utterances))
        for column, low, high in (("act", 1, 4), ("emotion", 0, 6))
    ]
    for i, utterance in enumerate(utterances):
        if not isinstance(utterance, str):
            raise ValueError(f"utterance {i + 1} is not text but {utterance!r:.40}")
        if not utterance.strip():
            raise ValueError(f"utterance {i + 1} of {len(utterances)} is empty")
        if not utterance.isascii() and UNDECODABLE.search(utterance):
            raise ValueError(f"utterance {i + 1} of {len(utterances)} is not valid UTF-8")
        for marker in markers:
            if marker in utterance:
                raise ValueError(
                    f"utterance {i + 1} of {len(utterances)} holds the marker '{marker}', which ends an utterance"
                )
    return Dialogue(tuple(utterances), *labels)


# U+FFFD is what undecodable bytes become when a file is read; JSON can hold half of a surrogate pair
UNDECODABLE = re.compile("[\ufffd\ud800-\udfff]")
MISSING = {"", "[]", "null", "none", "nan", "na", "n/a", "<na>"}  # text for "no label", in any case


def _is_missing(value: Any) -> bool:
    """Whether a cell, or a value in a list of labels, stands for "no label"."""
    if isinstance(value, str):
        return value.strip().casefold() in MISSING
    return value is None or (isinstance(value, float) and value != value)


def _labels(cell: Any, column: str, low: int, high: int, n: int) -> tuple[int, ...]:
    """The labels of n utterances, 0 for each that has none: one of a list, or all of them (a missing or empty cell)."""
    values = [] if _is_missing(cell) else _as_list(cell, column)
    if not values:
        return (0,) * n
    if len(values) != n:
        raise ValueError(f"{n} utterances but {len(values)} values in '{column}'")
    with contextlib.suppress(TypeError):  # a value that is a list
        if set(values) <= set(range(low, high + 1)):
            return tuple(map(int, values))
    numbers = []
    for value in values:
        if _is_missing(value):
            numbers.append(0)
            continue
        try:
            number = int(as_float := float(value))
            if number != as_float:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"'{column}' should hold whole numbers, found {values!r:.60}") from None
        if not low <= number <= high:
            raise ValueError(f"{column} {number} is out of range; expected {low} to {high}")
        numbers.append(number)
    return tuple(numbers)


def _as_list(value: Any, column: str) -> list[Any]:
    """A list column as it comes from parquet or JSON, or as text in a CSV cell: JSON, a Python list, or `1 2 1`."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str):
        text = value.strip()
        if column != "dialog" and text and not text.startswith("["):
            return _label_words(text)
        for parse in (json.loads, ast.literal_eval):
            try:
                parsed = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(parsed, (list, tuple)) and not (parse is ast.literal_eval and _lacks_commas(text)):
                return list(parsed)
        if column != "dialog" and re.fullmatch(r"\[[^\[\]]*\]", text):  # `[1.0, nan]` of pandas, `[1 2]` of numpy
            return _label_words(re.sub(r"[\[\]'\"]", " ", text))
    raise ValueError(f"'{column}' should be a list, found {value!r:.60}")


def _label_words(text: str) -> list[str]:
    """`1 2 1`, `1, 2, 1`; between two commas a label is missing."""
    return re.split(r"\s*,\s*|\s+", text.strip().removesuffix(",").strip())


def _lacks_commas(text: str) -> bool:
    """Whether two strings stand side by side: numpy prints lists so, and Python would read 'a' 'b' as one string."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    kinds = [kind for kind in kinds if kind not in (tokenize.NL, tokenize.NEWLINE)]
    return (tokenize.STRING, tokenize.STRING) in zip(kinds, kinds[1:])


_corpus = functools.cache(builtin_corpus.generate_corpus)  # once for all its splits


def _uncut_rows(data_path: str) -> Iterator[Row] | None:
    """Every row of a source that has no splits of its own, a file or one stored Dataset; None for another source."""
    path = Path(data_path).expanduser()
    if data_path == "builtin":
        return None
    if path.is_file():
        return _file_rows(path)
    if (path / "state.json").is_file():
        return _dataset_rows(_stored(path), str(path))
    return None


def _rows(data_path: str, split: str) -> Iterator[Row]:
    """Every row of a split of a source that has splits, and the place where each stands."""
    path = Path(data_path).expanduser()
    if data_path == "builtin":
        yield from ((f"built-in {split} row {i}", row) for i, row in enumerate(_corpus()[split]))
    elif path.is_dir():
        yield from _folder_rows(path, split)
    elif path.is_absolute() or data_path.startswith((".", "~")) or data_path.count("/") > 1:
        raise UserError(f"data path '{data_path}' does not exist.")
    else:
        yield from _hub_rows(data_path, split)


def _cut(rows: list[Checked]) -> dict[str, list[Checked]]:
    """90/5/5 of the different dialogues by a fixed shuffle: the same rows in the same split in every run.

    All copies of a dialogue, whatever their blanks and labels, go to one split.
    """
    rows = list(rows)
    random.Random(0).shuffle(rows)
    numbers: dict[Any, int] = {}  # of the different dialogues; a bad row counts as one
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
    """The same for all copies of a dialogue; a bad row has no copies."""
    where, dialogue = row
    return normalized_text(dialogue.utterances) if isinstance(dialogue, Dialogue) else f"\0\0{where}"


def _different(rows: list[Checked]) -> int:
    return len({_same_dialogue(row) for row in rows if isinstance(row[1], Dialogue)})


def _stored(folder: Path) -> Any:
    """What save_to_disk wrote: a Dataset or a DatasetDict."""
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets raise many kinds for a torn folder
        raise UserError(f"'{folder}' was not written whole by save_to_disk: {error}") from error


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    for candidate in (folder / split, folder):
        if (candidate / f"dialogues_{split}.txt").is_file():
            texts = {n: (str(candidate / n), (candidate / n).read_bytes()) for n in _release_names(split, candidate)}
            return (yield from _release_rows(texts, split))
    if (folder / f"{split}.zip").is_file():
        if not zipfile.is_zipfile(folder / f"{split}.zip"):
            raise UserError(f"'{folder / f'{split}.zip'}' is not a zip archive that can be read.")
        with zipfile.ZipFile(folder / f"{split}.zip") as archive:
            names = {Path(n).name: n for n in archive.namelist()}
            texts = {
                n: (f"{folder / f'{split}.zip'}:{names[n]}", archive.read(names[n]))
                for n in _release_names(split)
                if n in names
            }
        if f"dialogues_{split}.txt" not in texts:
            raise UserError(f"'{folder / f'{split}.zip'}' holds no dialogues_{split}.txt, as the release does.")
        return (yield from _release_rows(texts, split))
    for candidate, mark in ((folder / split, "state.json"), (folder, "dataset_dict.json")):  # of save_to_disk
        if (candidate / mark).is_file():
            stored = _stored(candidate)
            if isinstance(stored, dict):  # a DatasetDict
                stored = _pick_split(stored, split, str(folder))
            return (yield from _dataset_rows(stored, str(candidate)))
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
    for part in reversed(file.relative_to(folder).with_suffix("").parts):
        head = part.lower().replace("_", "-").split("-")[0].split(".")[0]
        for split, names in SPLIT_NAMES.items():
            if head in names:
                return split
    return None


def _pick_split(stored: Any, split: str, name: str) -> Any:
    for candidate in SPLIT_NAMES[split]:
        if candidate in stored:
            return stored[candidate]
    raise UserError(f"'{name}' has no {split} split; it has {', '.join(stored)}.")


def _dataset_rows(stored: Any, name: str) -> Iterator[Row]:
    for i, row in enumerate(stored):
        yield f"{name}, row {i + 1}", row


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


def _release_names(split: str, folder: Path | None = None) -> list[str]:
    """The files of a split of the original release; with a folder, those of them that are there."""
    names = [f"dialogues_{split}.txt", f"dialogues_act_{split}.txt", f"dialogues_emotion_{split}.txt"]
    return [n for n in names if folder is None or (folder / n).is_file()]


def _release_rows(texts: dict[str, tuple[str, bytes]], split: str) -> Iterator[Row]:
    """Rows of the original release: one dialogue a line, utterances closed by __eou__, labels beside them.

    `texts` maps a file's name to where it stands and its bytes.
    """
    columns = {}
    for column, name in zip(("dialog", "act", "emotion"), _release_names(split)):
        if name in texts:
            columns[column] = texts[name][1].decode("utf-8", errors="replace").removesuffix("\n").split("\n")
    where = texts[f"dialogues_{split}.txt"][0]
    for number, cells in enumerate(itertools.zip_longest(*columns.values()), start=1):
        row = dict(zip(columns, cells))
        missing = [column for column, cell in row.items() if cell is None]
        if missing:
            row = {"_error": f"the files differ in length: no line in {', '.join(missing)}"}
        else:
            # What follows the last marker is an utterance that was never closed; a well-formed line has only a blank.
            utterances = row["dialog"].split("__eou__")
            row["dialog"] = utterances[:-1] if not utterances[-1].strip() else utterances
            row |= {column: row[column].split() for column in row if column != "dialog"}
        yield f"{where}, line {number}", row


def _file_rows(file: Path) -> Iterator[Row]:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        with file.open("rb") as start:
            check_content(file, start.read(4096))
        raise UserError(f"'{file}' is none of the forms that can be read: {', '.join(READERS)}.")
    yield from reader(file)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        with file.open("rb") as start:
            check_content(file, start.read(4096), text=False)
        raise UserError(f"'{file}' is not a parquet file that can be read: {first_line(error)}.") from error
    yield from _dataset_rows(table.to_pylist(), str(file))


def _text(file: Path) -> str:
    # Bytes that are not UTF-8 become U+FFFD, which the row check names with its line; a BOM (Excel) is dropped.
    content = file.read_bytes()
    check_content(file, content)
    return content.decode("utf-8-sig", errors="replace")


def _json_rows(file: Path) -> Iterator[Row]:
    """JSON lines, or one JSON array of objects."""
    text = _text(file)
    if text.lstrip().startswith("["):
        try:
            yield from _dataset_rows(_objects(json.loads(text)), str(file))
            return
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # else each line is a list
                raise UserError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}).") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
            raise UserError(f"{file}: not valid JSON of dialogues ({error}).") from error
    check_json_lines(file, text)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{file}, line {number}", _objects([json.loads(line)])[0]
        except (ValueError, RecursionError) as error:
            yield f"{file}, line {number}", {"_error": f"not valid JSON ({error})", "_hint": line_hint(line)}


def _objects(values: list[Any]) -> list[dict[str, Any]]:
    hint = 'Write each dialogue as {"dialog": [...]}'

    def found(value):
        return {"_error": f"expected an object, found {value!r:.40}", "_hint": hint}

    return [v if isinstance(v, dict) else found(v) for v in values]


def _csv_rows(file: Path) -> Iterator[Row]:
    """CSV with a header; the list columns hold a JSON or Python list, labels may also be written `1 2 1`."""
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
