"""Dialogues, how they become prompts and tokens, and the environment that hands them out.

    dialogues = load_dialogues("builtin", "train")            # or a hub name, a folder, a file, the original release
    codec = DialogueCodec(load_tokenizer("gpt2"), DialogueFormat())
    env = DialogueVectorEnv(make_samples(dialogues, codec.format), codec, env_num=2, reward=my_reward)
    observations, infos = env.reset(seed=0)
    observations, rewards, terminations, truncations, infos = env.step(["Sure, why not.", "At six."])

One row of a dataset is one dialogue: `dialog` (utterances), `act` (dialogue acts, 1 to 4) and `emotion` (0 to 6), lists
of equal length. Text format and episode ends are those of the OpenRL and RL4LMs DailyDialog task, so a model that was
fine-tuned for them works unchanged; every number in it is an option.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
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

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

import builtin_corpus
from common import UserError, first_line, nearest
from dataset_checks import check_content, check_json_lines, form_of, line_hint, same_words

ACTS = ("inform", "question", "directive", "commissive")  # dialogue act k of DailyDialog is ACTS[k - 1]
SPLITS = ("train", "validation", "test")
# `datasets` 4 and later refuse script datasets, which these names are; the copy is the same rows as parquet.
HUB_ALIASES = {"daily_dialog": "OpenRL/daily_dialog", "li2017dailydialog/daily_dialog": "OpenRL/daily_dialog"}
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


# ---------------------------------------------------------------------------------------------------------------------
# Reading dialogues


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
            raise UserError(f"split '{split}' is unknown; expected one of {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
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
        hint = row.get("_hint") or form_of({k: _parsed(v) for k, v in row.items() if not str(k).startswith("_")})
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
    return same_words(dialogue.utterances) if isinstance(dialogue, Dialogue) else f"\0\0{where}"


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
    found = lambda value: {"_error": f"expected an object, found {value!r:.40}", "_hint": hint}
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


# ---------------------------------------------------------------------------------------------------------------------
# Text format and tokens

FORMAT_FILE = "dialogue_format.json"


@dataclass(frozen=True)
class DialogueFormat:
    """How a dialogue is written for the model. The defaults are those of OpenRL's and RL4LMs' DailyDialog task."""

    context_utterances: int = 5
    """Utterances of context in a prompt; only utterances with at least so many before them are samples."""
    eou_marker: str = "<EOU>"
    """End of an utterance: plain text (one or several tokens) or a special token of the tokenizer."""
    max_prompt_tokens: int = 128
    """Longer prompts lose their beginning."""
    max_new_tokens: int = 20
    """A response ends after so many tokens if neither the marker nor EOS came before."""

    def __post_init__(self):
        for name in ("context_utterances", "max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not self.eou_marker.strip():
            raise UserError("eou_marker is blank; expected text such as '<EOU>' that ends an utterance.")

    def prompt(self, utterances: Sequence[str]) -> str:
        """The last utterances joined by the marker, then a blank and the marker.

        A dialogue that has just begun (in a chat) has fewer than `context_utterances`. Models know such contexts from
        the beginnings of longer prompts, where no blank stands before the marker.
        """
        end = " " + self.eou_marker if len(utterances) >= self.context_utterances else self.eou_marker
        return self.eou_marker.join(utterances[-self.context_utterances :]) + end

    def target(self, reply: str) -> str:
        """What the model should write after the prompt."""
        return reply + self.eou_marker

    def save(self, folder: Path) -> None:
        (folder / FORMAT_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, **overrides: Any) -> DialogueFormat:
        """The format kept beside a model, with the given fields replaced; the defaults where none is kept."""
        file = Path(folder) / FORMAT_FILE
        kept = {}
        if file.is_file():
            try:
                kept = json.loads(file.read_text())
                cls(**kept)
            except (ValueError, TypeError) as error:
                raise UserError(f"'{file}' is not a dialogue format that can be read: {error}") from error
        return cls(**kept | overrides)


@dataclass
class FormatOptions:
    """Text format as settings of a script; what is left out is as the model's folder says, else the tutorial's."""

    # text format
    context_utterances: int | None = None
    """Utterances of context in a prompt; only utterances with at least so many before them are samples [5]."""
    eou_marker: str | None = None
    """End of an utterance: plain text (one or several tokens) or a special token [<EOU>]."""
    max_prompt_tokens: int | None = None
    """Longer prompts lose their beginning [128]."""
    max_new_tokens: int | None = None
    """A response ends after so many tokens if neither the marker nor EOS came before [20]."""

    def dialogue_format(self, model_folder: str | Path) -> DialogueFormat:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(FormatOptions)}
        return DialogueFormat.load(model_folder, **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True)
class Sample:
    """One reply to learn: its context, the human reply and that reply's dialogue act (0 where unlabelled)."""

    context: tuple[str, ...]
    prompt: str
    reply: str
    act: int


def make_samples(dialogues: Sequence[Dialogue], fmt: DialogueFormat) -> list[Sample]:
    """Every utterance with at least `context_utterances` before it, in the order of the data."""
    n = fmt.context_utterances
    return [
        Sample(d.utterances[i - n : i], fmt.prompt(d.utterances[i - n : i]), d.utterances[i], d.acts[i])
        for d in dialogues
        for i in range(n, len(d.utterances))
    ]


def count_of_samples(samples: Sequence[Sample]) -> str:
    """`500 samples`, with the number of those that have a dialogue act where some have one and others do not."""
    labelled = sum(bool(s.act) for s in samples)
    some = f" ({labelled} with a dialogue act)" if 0 < labelled < len(samples) else ""
    return f"{len(samples)} samples{some}"


class PlainText:
    """Text to token ids in which no text becomes a special token by spelling one, but for `marker` where it is one.

    A user may write "</s>" or "<|im_end|>". As a special token that would end a turn, or begin another role.
    """

    def __init__(self, tokenizer: Any, marker: str = ""):
        self.tokenizer = tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        spelled = "|".join(map(re.escape, special)) or r"(?!)"  # without special tokens nothing matches
        self.pattern = re.compile(f"{re.escape(marker)}|({spelled})" if marker else f"({spelled})")

    def split(self, text: str) -> list[str]:
        """The text cut where it spells a special token: what spells one stands at every second place."""
        parts, end = [], 0
        for match in self.pattern.finditer(text):
            if match[1] is not None:
                parts += [text[end : match.start()], match[1]]
                end = match.end()
        return [*parts, text[end:]]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without what the tokenizer puts before or after a text."""
        rows = self.tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
        for i, text in enumerate(texts):
            if len(parts := self.split(text)) > 1:
                rows[i] = [id for k, part in enumerate(parts) if part for id in self._ids(part, spelled=k % 2 == 1)]
        return rows

    def _ids(self, text: str, spelled: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=spelled).input_ids


def put_before(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text, such as BOS. What it puts after a text has no place in a prompt that
    is to be continued."""
    with_special, plain = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    starts = (i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain)
    return list(with_special[: next(starts, 0)])


def without_torn_characters(text: str) -> str:
    """Decoded text without U+FFFD, which stands for bytes that are no whole character: a reply that was cut, say."""
    return text.replace("\ufffd", "")


class DialogueCodec:
    """Prompts to tokens and response tokens to text, for one tokenizer and one format."""

    def __init__(self, tokenizer: Any, fmt: DialogueFormat):
        self.tokenizer, self.format = tokenizer, fmt
        self.eos_token_id = tokenizer.eos_token_id
        self.text, self.prefix = PlainText(tokenizer, fmt.eou_marker.strip()), put_before(tokenizer)
        # The marker may come as several tokens, and merged with what stands before it (".<" + "EOU" + ">"), so its end
        # is found in the decoded text; only after a token that holds the marker's last character can it be complete.
        last = fmt.eou_marker.rstrip()[-1]
        pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=False)
        self.may_end = [last in piece or "\ufffd" in piece for piece in pieces]
        marker_ids = tokenizer(fmt.eou_marker, add_special_tokens=False).input_ids
        self.marker_token_id = marker_ids[0] if len(marker_ids) == 1 else None
        if fmt.eou_marker.strip() not in tokenizer.decode(marker_ids):
            raise UserError(
                f"the tokenizer cannot write the marker '{fmt.eou_marker}' that ends an utterance (it makes of it "
                f"'{tokenizer.decode(marker_ids)}'), so no reply could end; use a tokenizer that can, or train "
                "with another eou_marker."
            )

    def encode_prompts(self, prompts: Sequence[str], pad_to_max: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask (B, P), cut and padded on the left; P is the longest of the batch, or the maximum."""
        rows = self.prompt_ids(prompts)
        width = self.format.max_prompt_tokens if pad_to_max else max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
            mask[i, width - len(row) :] = 1
        return ids, mask

    def prompt_ids(self, prompts: Sequence[str], most: int | None = None) -> list[list[int]]:
        """Token ids of each prompt, of which the last `most` (max_prompt_tokens) stay, after what the tokenizer puts
        before a text."""
        room = max(1, (self.format.max_prompt_tokens if most is None else most) - len(self.prefix))
        return [self.prefix + ids[-room:] for ids in self.text.encode(prompts)]

    def encode_target(self, reply: str) -> list[int]:
        """Token ids of a human reply with its marker, uncut."""
        return self.text.encode([self.format.target(reply)])[0]

    def ended(self, response_ids: Sequence[int]) -> bool:
        """Whether a response is complete: its last token is EOS, or closes the marker."""
        if not len(response_ids) or not self.can_end(last := int(response_ids[-1])):
            return False
        return last == self.eos_token_id or self.format.eou_marker.strip() in self.tokenizer.decode(response_ids)

    def can_end(self, token: int) -> bool:
        """Whether a response may be complete with this token: most are not, and need no closer look."""
        # a model may embed ids that the tokenizer lacks
        return token == self.eos_token_id or (token < len(self.may_end) and self.may_end[token])

    def decode_response(self, response_ids: Sequence[int]) -> str:
        """The text of a response, without marker, EOS and surrounding blanks. Negative ids are padding."""
        ids = [int(i) for i in response_ids if i >= 0]
        if self.eos_token_id in ids:
            ids = ids[: ids.index(self.eos_token_id)]
        marker = self.format.eou_marker.strip()
        text, *after = without_torn_characters(self.tokenizer.decode(ids)).split(marker)
        return (text if after else without_torn(text, marker)).strip()


def without_torn(text: str, marker: str) -> str:
    """Without the beginning of a marker that the limit of tokens has cut: it belongs to no word of the reply.

    A marker that begins with a letter is only taken for one where it stands by itself.
    """
    for length in range(len(marker) - 1, 0, -1):
        before = text.removesuffix(marker[:length])
        if before != text and not (marker[0].isalnum() and before[-1:].strip()):
            return before
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The environment


class DialogueVectorEnv(VectorEnv):
    """`env_num` dialogues at a time; an action is a whole response and ends the episode (Gymnasium's vector API).

    Observations: `{"input_ids": (n, max_prompt_tokens), "attention_mask": the same}`, int64, padded on the left.
    Actions: response tokens (n, max_new_tokens), int64, padded on the right with -1; a list of n strings works too.
    Rewards: what `reward(prompts, responses, references, acts)` gives (see rewards.py), 0 without one.
    Every step terminates every episode and the next prompt comes at once (`AutoresetMode.SAME_STEP`), with what
    belongs to the finished episode in `infos["final_obs"]` and `infos["final_info"]`.

    Which dialogue comes when depends on the seed alone: each pass over the data is one permutation, dealt out over
    all `env_num` slots, or over groups of `samples_per_prompt` neighbours that answer the same one. With several
    processes each gets `env_num / num_processes` of the slots.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        samples: Sequence[Sample],
        codec: DialogueCodec,
        env_num: int,
        reward: Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]] | None = None,
        process_index: int = 0,
        num_processes: int = 1,
        samples_per_prompt: int = 1,
    ):
        if not samples:
            n = codec.format.context_utterances
            raise UserError(
                f"no dialogue has more than {n} utterances: none gives a sample with context_utterances {n}."
            )
        if env_num < 1 or env_num % num_processes:
            raise UserError(f"env_num is {env_num}; expected a positive multiple of the {num_processes} process(es).")
        self.samples_per_prompt = samples_per_prompt
        self.samples, self.codec, self.reward = samples, codec, reward
        self.env_num, self.num_envs = env_num, env_num // num_processes
        self.slots = slice(process_index * self.num_envs, (process_index + 1) * self.num_envs)  # of all env_num
        fmt, vocabulary = codec.format, len(codec.tokenizer)
        self.single_observation_space = spaces.Dict(
            {
                "input_ids": spaces.Box(0, vocabulary - 1, (fmt.max_prompt_tokens,), np.int64),
                "attention_mask": spaces.Box(0, 1, (fmt.max_prompt_tokens,), np.int64),
            }
        )
        self.single_action_space = spaces.Box(-1, vocabulary - 1, (fmt.max_new_tokens,), np.int64)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.statistics: tuple[str, ...] = ()  # names of what the reward had to tell in the last step
        self.seed, self.rounds, self._current, self._epoch_order = 0, 0, None, (None, None)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Observations and infos of the first dialogues; a seed restarts the order, none goes on in it.

        With a seed, `options={"round": n}` starts at the dialogues that come after n steps.
        """
        if seed is not None:
            super().reset(seed=seed)
            self.seed, self.rounds = seed, (options or {}).get("round", 0)
        return self._next_dialogues()

    def step(self, actions: np.ndarray | Sequence[str]):
        if self._current is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        if len(actions) != self.num_envs:
            raise UserError(f"step() was given {len(actions)} responses for {self.num_envs} dialogues.")
        said = lambda text: without_torn_characters(text).split(self.codec.format.eou_marker.strip())[0].strip()
        responses = [said(a) if isinstance(a, str) else self.codec.decode_response(a) for a in actions]
        finished, final_obs = self._current, self._observations
        rewards, statistics = np.zeros(self.num_envs), {}
        if self.reward is not None:
            rewards, statistics = self.reward(
                [s.prompt for s in finished],
                responses,
                [s.reply.strip() for s in finished],
                [s.act for s in finished],
            )
        final_info = self._infos(finished) | _column("response", responses)
        for name, values in statistics.items():
            if name in final_info:
                raise UserError(f"the reward calls a statistic '{name}', which the environment uses itself; rename it.")
            final_info |= _column(name, values)
        self.statistics = tuple(statistics)
        observations, infos = self._next_dialogues()
        everyone = np.ones(self.num_envs, dtype=bool)
        infos |= {"final_obs": final_obs, "_final_obs": everyone, "final_info": final_info, "_final_info": everyone}
        return observations, np.asarray(rewards, np.float64), everyone.copy(), ~everyone, infos

    def _next_dialogues(self):
        first = self.rounds * self.env_num + self.slots.start
        self._current = [self._sample((first + slot) // self.samples_per_prompt) for slot in range(self.num_envs)]
        self.rounds += 1
        ids, mask = self.codec.encode_prompts([s.prompt for s in self._current], pad_to_max=True)
        self._observations = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return self._observations, self._infos(self._current)

    def _sample(self, position: int) -> Sample:
        epoch, index = divmod(position, len(self.samples))
        if self._epoch_order[0] != (self.seed, epoch):
            self._epoch_order = (
                (self.seed, epoch),
                np.random.default_rng([self.seed, epoch]).permutation(len(self.samples)),
            )
        return self.samples[self._epoch_order[1][index]]

    def _infos(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        infos = {}
        for name in ("prompt", "reply", "act"):
            infos |= _column(name, [getattr(s, name) for s in samples])
        return infos


def _column(name: str, values: Sequence[Any]) -> dict[str, np.ndarray]:
    """One entry of a Gymnasium vector info: an array and the mask of who has it."""
    values = np.asarray(values) if not isinstance(values[0], str) else np.array(values, dtype=object)
    return {name: values, f"_{name}": np.ones(len(values), dtype=bool)}
