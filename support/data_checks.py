"""What is wrong with a dataset as a whole: content of another kind, rows of another form, copies across its splits.

data.py reads the data; the functions here put the fault into words and say what to do. See docs/data.md.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.data_forms import COMPLETION, IMPLICIT, PREFERENCES, form_of
from support.errors import UserError

UNPACK = "Unpack it and give the file that comes out"
RECODE = "Write it anew as UTF-8, such as with 'iconv -f {} -t UTF-8 OLD > NEW'"
BOM = rb"(\xef\xbb\xbf)?\s*"
KINDS = (  # how the content begins, what it is, what to do
    (rb"\x1f\x8b", "packed by gzip", UNPACK),
    (rb"BZh", "packed by bzip2", UNPACK),
    (rb"\xfd7zXZ\0", "packed by xz", UNPACK),
    (rb"\x28\xb5\x2f\xfd", "packed by zstd", UNPACK),
    (rb"7z\xbc\xaf", "a 7z archive", UNPACK),
    (rb"\xd0\xcf\x11\xe0", "an Excel workbook", "Save it as 'CSV UTF-8'"),
    (rb"PK\x03\x04(.*xl/|.{0,4000}\[Content_Types\]\.xml)", "an Excel workbook", "Save it as 'CSV UTF-8'"),
    (rb"PK\x03\x04", "a zip archive", UNPACK),
    (rb"PAR1", "a parquet file", "Rename it to .parquet"),
    (rb"ARROW1|\xff\xff\xff\xff", "an Arrow file", "Rename it to .arrow"),
    (rb"SQLite format 3", "an SQLite database", "Export the table as CSV"),
    (rb"%PDF", "a PDF", "Give the data as JSON lines"),
    (rb"version https://git-lfs", "only the pointer of a file in Git LFS", "Fetch the file itself with 'git lfs pull'"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", RECODE.format("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", RECODE.format("UTF-16")),
    (BOM + rb"(?i:<!doctype html|<html)", "a web page (a download that failed?)", "Fetch the file itself"),
    (BOM + rb"(?i:<\?xml)", "XML", "Give the data as JSON lines"),
)


def check_content(file: Path, content: bytes, expected: str = "UTF-8 text") -> None:
    """UserError if a file's content is not what its name promises: UTF-8 text (JSON, CSV), parquet or Arrow."""
    text = expected == "UTF-8 text"
    found = next((kind for begin, *kind in KINDS if re.match(begin, content, re.DOTALL)), None)
    found = found or (_wide_text(content) if text else None)
    if found and f" {expected} " not in found[0]:
        raise UserError(f"'{file}' is {found[0]}; expected {expected}. {found[1]}.")
    if not text and content.lstrip()[:1] in (b"{", b"[", b'"') and b"\0" not in content:
        rename = "Rename it to .jsonl (a JSON object a line), .json or .csv."
        raise UserError(f"'{file}' holds text; expected {expected}. {rename}")


def _wide_text(content: bytes) -> tuple[str, str] | None:
    """UTF-32 or UTF-16 without a mark at its beginning, by the share of its bytes that are 0."""
    head = content[:4096]
    nulls, odd = (part.count(0) / max(1, len(part)) for part in (head, head[1::2]))
    if nulls <= 0.05:
        return None
    code = "UTF-32" if nulls > 0.6 else "UTF-16LE" if odd > 0.05 else "UTF-16BE"
    return f"{code[:6]} text", RECODE.format(code)


def check_json_lines(file: Path, text: str) -> None:
    """UserError for JSON that is neither an object a line nor an array: one object, or objects over several lines.

    One object that is a row of its own passes.
    """
    text = text.strip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return
    if not isinstance(value, dict):
        return
    rest = text[end:].strip()
    what = "" if rest else _container(value)
    if not what and "\n" in text[:end]:
        comma = ", without a comma after it" if rest.startswith(",") else ""
        form = "" if "dialog" in value else describe_form(value)
        what = f"JSON objects that are spread over several lines. Write each of them on one line{comma}, "
        what += f"or all of them as one array [...]{form and '. '}{form}"
    if what:
        raise UserError(f"{file}, line 1: expected a JSON object on each line, or one array of objects; found {what}.")


def line_hint(line: str) -> str:
    """What a line that is not JSON looks like, and what to do; "" for an unknown form."""
    line = line.strip()
    if line.endswith("},"):
        return "The lines end with a comma: leave it out"
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        if isinstance(ast.literal_eval(line), (dict, list)):
            return "The lines are Python, not JSON: write them with json.dumps"
    return ""


def _container(value: dict[str, Any]) -> str:
    """What is in a file that is one object, and what to do, if the dialogues are within that object."""
    inside = {k: v[0] for k, v in _lists_of(dict, value).items() if "dialog" in v[0] or not v[0].keys() & TEXT}
    dialog, values = value.get("dialog"), list(value.values())
    by_column = "one object of columns. Write a row for each dialogue: {}"
    if isinstance(dialog, dict) or {"columns", "data"} <= set(value):
        return by_column.format('pandas does with to_json(FILE, orient="records", lines=True)')
    if isinstance(dialog, list) and any(isinstance(x, list) for x in dialog):
        return by_column.format("datasets.Dataset.from_dict(json.load(open(OLD))).to_json(NEW)")
    if "dialog" in value or "utterances" in inside:
        return ""
    if len(inside) > 1:
        return f"one object with several lists ({', '.join(inside)}). Write a file for each, train.jsonl and so on"
    for name, row in inside.items():
        form = "" if "dialog" in row else describe_form(row)
        found = f"one object with the rows in its list '{name}'. Write that list: json.load(open(OLD))[\"{name}\"]"
        return f"{found}. {form}" if form else found
    if values and all(isinstance(v, dict) and ("dialog" in v or form_of(v) or describe_form(v)) for v in values):
        return "one object with a dialogue under each name. Write its values: list(json.load(open(OLD)).values())"
    if len(values) > 1 and len(_lists_of(str, value)) == len(values):
        return 'one object with a dialogue under each name. Write {"dialog": [...]} for each of its values'
    return ""


TEXT = ("content", "value", "text", "utterance", "message", "body")  # what a message's words are called
SPEAKER = ("role", "from", "speaker", "sender", "author", "user", "name")
FIRST = ("prompt", "instruction", "question", "query", "input", "context", "user", "human")  # what is said ...
SECOND = ("completion", "chosen", "response", "output", "answer", "reply", "assistant", "target")  # ... and the reply
MESSAGE_ID = re.compile(r"(conv\w*|dialog\w*|chat|thread|session|ticket)[ _-]?(id|no|number)|id", re.IGNORECASE)


def describe_form(row: Mapping[str, Any]) -> str:
    """What a row without a usable column `dialog` looks like, and how to convert it; "" for an unknown form.

    Lists that were text in a cell must have been parsed.
    """
    if form_of(row) in (PREFERENCES, IMPLICIT, COMPLETION):
        return ""  # the columns are right
    return _header_form(row) or _messages_form(row) or _pair_form(row) or _text_form(row)


def _use(what: str, expression: str) -> str:
    return f"This looks like {what}: write `{expression}` as 'dialog' (see docs/data.md)"


def _lists_of(kind: type, row: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {k: v for k, v in row.items() if isinstance(v, list) and v and all(isinstance(x, kind) for x in v)}


def _header_form(row: Mapping[str, Any]) -> str:
    """A CSV with another separator, or without a header."""
    columns = [column for column in row if isinstance(column, str)]
    if found := re.search(r"[;\t|]", ",".join(columns)):
        name = "tabs" if found[0] == "\t" else repr(found[0])
        anew = f"write the file anew, as pandas.read_csv(OLD, sep={found[0]!r}).to_csv(NEW, index=False) does"
        return f"The columns are separated by {name}, not by commas: {anew}"
    if any(column.lstrip().startswith("[") for column in columns):
        return "The file has no header: add a first line with the names of the columns, such as dialog,act"
    return ""


def _messages_form(row: Mapping[str, Any]) -> str:
    """A list of messages in a column of another name, such as Persona-Chat's."""
    messages = _lists_of(dict, row)
    for column, value in messages.items():
        if {"history", "candidates"} <= value[-1].keys():
            last = f'row["{column}"][-1]'
            return _use("Persona-Chat", f'{last}["history"] + {last}["candidates"][-1:]')
        if key := next((k for k in TEXT if all(isinstance(m.get(k), str) for m in value)), None):
            known = {("role", "content"): "chat messages", ("from", "value"): "ShareGPT conversations"}
            if what := next((known[k] for k in known if k[0] in value[0] and k[1] == key), ""):
                name = what.split()[-1]
                return "" if column == name else f"The column '{column}' holds {what}: rename it to '{name}'"
            return _use("messages", f'[m["{key}"] for m in row["{column}"]]')
    return ""


def _pair_form(row: Mapping[str, Any]) -> str:
    """A prompt (or a history) and a reply, or a list of texts under another name."""
    texts = _lists_of(str, row)
    first, second = (next((k for k in names if isinstance(row.get(k), (str, list))), None) for names in (FIRST, SECOND))
    first = first or next((k for k in texts if k not in SECOND), None)
    if first and second and isinstance(row[second], str):
        pair = f"pairs of '{first}' and '{second}'"
        if isinstance(row[first], list):
            return _use(pair, f'row["{first}"] + [row["{second}"]]')
        return f"This looks like {pair}: rename the columns to 'prompt' and 'completion' (see docs/data.md)"
    if named := [k for k in texts if k != "dialog"]:
        column = min(named, key=lambda k: "dialog" not in str(k).casefold())
        return f"The column '{column}' holds a list of texts: if they are the utterances, rename it to 'dialog'"
    return ""


def _text_form(row: Mapping[str, Any]) -> str:
    """One text: a message, several utterances joined, or a list as numpy prints it; else a name close to 'dialog'."""
    names = {str(k).casefold(): k for k in row}
    columns = [names.get(k) for k in (*TEXT, "dialog", "dialogue", "chat", "chosen")]
    column = next((k for k in columns if isinstance(row.get(k), str)), "")
    if not column:
        close = [] if "dialog" in row else difflib.get_close_matches("dialog", names, n=1)
        return f"If the column '{names[close[0]]}' holds the utterances, rename it to 'dialog'" if close else ""
    text, utterances = row[column], '[u for u in row["{}"].{} if u.strip()]'
    if any(MESSAGE_ID.fullmatch(k) or k in SPEAKER for k in names):
        return (
            "This looks like one message in each row: as a CSV with the columns conversation_id, speaker and text, "
            "examples/own_dataset.py converts it"
        )
    if text.lstrip().startswith("["):
        return (
            "The lists were written as numpy prints them, without commas: write the data with "
            'to_json(FILE, orient="records", lines=True) of pandas, or as parquet'
        )
    if "__eou__" in text:
        return _use("text with marks", utterances.format(column, 'split("__eou__")'))
    if "\n" in text.strip():
        return _use("a text with a line for each utterance", utterances.format(column, "splitlines()"))
    return f"The column '{column}' holds one text: 'dialog' must be a list of utterances, [\"Hi.\", \"Hello!\"]"


COMMON = 20  # a pair of utterances that is in more held-out dialogues than this is no sign of a copy
NO_WORD = {i: None for i in range(1, 128) if not chr(i).isalnum()}  # ASCII characters that are not part of words


def normalized_text(utterances: Sequence[str]) -> str:
    """What two copies of a dialogue have in common, whatever their blanks and labels."""
    return "".join("\0".join(utterances).split())


def _words(utterances: Sequence[str]) -> str:
    """The utterances, NUL between them, without case, punctuation and blanks."""
    text = "\0".join(utterances)
    if text.isascii():  # the same, ten times as fast
        return text.lower().translate(NO_WORD)
    return re.sub(r"[^\w\0]+|_+", "", unicodedata.normalize("NFKC", text).casefold())


def overlap_note(data_path: str, splits: Mapping[str, Any]) -> str:
    """A sentence on dialogues of other splits that are in `train` as well, or nearly so; "" if there are none.

    `splits` maps names to what load_splits gave for `data_path`. Those of `builtin` combine the same phrases by design,
    so nothing is said about them. A near-copy has at least three quarters of its utterances in one training dialogue,
    two of them in a row; case, punctuation and blanks do not count. Takes time in proportion to the number of
    dialogues.
    """
    found = []
    for name, held_out in splits.items():
        if name != "train" and data_path != "builtin" and (copies := copies_in(splits["train"], held_out)):
            same = sum(exact for _, exact in copies.values())
            counts = [f"{same:,} are also in train"] * (same > 0)
            counts += [f"{len(copies) - same:,} are near-copies of training dialogues"] * (same < len(copies))
            i = min(copies)
            places = f"{held_out.place(i)} is like {splits['train'].place(copies[i][0])}"
            found.append(f"of {len(held_out):,} {name} dialogues {' and '.join(counts)} ({places})")
    return f"{'; '.join(found)}: scores on them say less about new dialogues." if found else ""


def copies_in(train: Sequence[Any], held_out: Sequence[Any]) -> dict[int, tuple[int, bool]]:
    """For each held-out dialogue with a copy in `train`: its index -> (index of the copy, whether it is exact)."""
    words, whole, pairs = [_words(d.utterances) for d in held_out], {}, {}
    for i, text in enumerate(words):  # index of held-out dialogues by all their words, and by two utterances in a row
        whole.setdefault(text, []).append(i)
        parts = text.split("\0")
        for pair in set(zip(parts, parts[1:])):
            pairs.setdefault(pair, []).append(i)
    pairs = {pair: indices for pair, indices in pairs.items() if len(indices) <= COMMON}
    found: dict[int, tuple[int, bool]] = {}
    for j, dialogue in enumerate(train):
        text = _words(dialogue.utterances)
        for i in whole.get(text, ()):
            exact = normalized_text(dialogue.utterances) == normalized_text(held_out[i].utterances)
            if i not in found or (exact and not found[i][1]):
                found[i] = (j, exact)
        parts = text.split("\0")
        for i in {i for pair in zip(parts, parts[1:]) for i in pairs.get(pair, ())} - found.keys():
            said = words[i].split("\0")
            if 4 * (Counter(said) & Counter(parts)).total() >= 3 * len(said):
                found[i] = (j, False)
    return found
