"""What is wrong with a dataset as a whole: content of another kind, rows of another form, copies across its splits.

data.py reads the data; the functions here put the fault into words and say what to do. See docs/data.md.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Content of another kind

UNPACK = "unpack it and give the file that comes out"
SIGNATURES = (  # first bytes, what they say, what to do
    (b"\x1f\x8b", "is packed by gzip", UNPACK),
    (b"BZh", "is packed by bzip2", UNPACK),
    (b"\xfd7zXZ\0", "is packed by xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "is packed by zstd", UNPACK),
    (b"7z\xbc\xaf", "is a 7z archive", UNPACK),
    (b"\xd0\xcf\x11\xe0", "is an Excel workbook", "save it as 'CSV UTF-8'"),
    (b"PAR1", "is a parquet file", "rename it to .parquet"),
    (b"ARROW1", "is an Arrow file", "give the folder that save_to_disk wrote, or write it as parquet"),
    (b"\xff\xff\xff\xff", "is an Arrow file", "give the folder that save_to_disk wrote, or write it as parquet"),
    (b"SQLite format 3", "is an SQLite database", "export the table as CSV"),
    (b"%PDF", "is a PDF", "give the data as JSON lines"),
    (
        b"version https://git-lfs",
        "is only the pointer of a file in Git LFS",
        "fetch the file itself with 'git lfs pull'",
    ),
)
RECODE = "write it anew as UTF-8, such as with 'iconv -f {} -t UTF-8 OLD > NEW'"


def check_content(file: Path, content: bytes, text: bool = True) -> None:
    """UserError where a file's content is of another kind than the file's name says.

    `text` says whether the name promises text (JSON, CSV); else it promises parquet.
    """
    found = _kind_of(content)
    if not text and not found and content.lstrip()[:1] in (b"{", b"[", b'"') and b"\0" not in content:
        found = "holds text", "rename it to .jsonl (a JSON object a line), .json or .csv"
    if found and not (not text and content.startswith(b"PAR1")):
        expected = "UTF-8 text" if text else "parquet"
        raise UserError(f"'{file}' {found[0]}; expected {expected}. {found[1][0].upper()}{found[1][1:]}.")


def _kind_of(content: bytes) -> tuple[str, str] | None:
    head = content[:4096]
    for signature, what, advice in SIGNATURES:
        if head.startswith(signature):
            return what, advice
    if head.startswith(b"PK\x03\x04"):
        if b"xl/" in content or b"[Content_Types].xml" in head:
            return "is an Excel workbook", "save it as 'CSV UTF-8'"
        return "is a zip archive", UNPACK
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or _null_bytes(head) > 0.6:
        return "is UTF-32 text", RECODE.format("UTF-32")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16 text", RECODE.format("UTF-16")
    if _null_bytes(head) > 0.05:
        return "is UTF-16 text", RECODE.format("UTF-16LE" if _null_bytes(head[1::2]) > 0.05 else "UTF-16BE")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:100].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page (a download that failed?)", "fetch the file itself"
    if start.startswith(b"<?xml"):
        return "is XML", "give the data as JSON lines"
    return None


def _null_bytes(content: bytes) -> float:
    return content.count(0) / max(1, len(content))


def check_json_lines(file: Path, text: str) -> None:
    """UserError for JSON that is neither an object a line nor an array: one object, or objects over several lines.

    One object that is a row of its own passes.
    """
    first = text.lstrip().split("\n", 1)[0]
    try:
        json.loads(first)
        if text.strip() != first.strip():
            return  # a complete first line: JSON lines
    except (ValueError, RecursionError):
        if not first.startswith("{"):
            return
    try:
        value, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return
    if not isinstance(value, dict):
        return
    rest = text.lstrip()[end:].strip()
    what = "" if rest else _container(value)
    if not what and "\n" in text.lstrip()[:end]:
        what = "JSON objects that are spread over several lines. Write each of them on one line"
        if rest.startswith(","):
            what += ", without a comma after it"
        what += ", or all of them as one array [...]"
        if "dialog" not in value and (form := describe_form(value)):
            what += f". {form}"
    if what:
        raise UserError(f"{file}, line 1: expected a JSON object on each line, or one array of objects; found {what}.")


def line_hint(line: str) -> str:
    """What a line that is not JSON looks like, and what to do; "" for an unknown form."""
    line = line.strip()
    if line.endswith("},"):
        return "The lines end with a comma: leave it out"
    try:
        if isinstance(ast.literal_eval(line), (dict, list)):
            return "The lines are Python, not JSON: write them with json.dumps"
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    return ""


def _container(value: dict[str, Any]) -> str:
    """What a file that is one object holds, and what to do, where the dialogues are within that object."""
    rows = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)}
    inside = {k: v for k, v in rows.items() if "dialog" in v[0] or not any(name in v[0] for name in TEXT)}
    by_column = "one object of columns. Write a row for each dialogue: {}"
    if isinstance(value.get("dialog"), dict):
        return by_column.format('pandas does with to_json(FILE, orient="records", lines=True)')
    if isinstance(value.get("dialog"), list) and any(isinstance(x, list) for x in value["dialog"]):
        return by_column.format("datasets.Dataset.from_dict(json.load(open(OLD))).to_json(NEW)")
    if {"columns", "data"} <= set(value):
        return by_column.format('pandas does with to_json(FILE, orient="records", lines=True)')
    if "dialog" in value or "utterances" in inside:
        return ""
    if len(inside) > 1:
        return f"one object with several lists ({', '.join(inside)}). Write a file for each, train.jsonl and so on"
    if inside:
        name = next(iter(inside))
        form = "" if "dialog" in inside[name][0] else describe_form(inside[name][0])
        found = f"one object with the rows in its list '{name}'. Write that list: json.load(open(OLD))[\"{name}\"]"
        return f"{found}. {form}" if form else found
    values = list(value.values())
    if values and all(isinstance(v, dict) and ("dialog" in v or describe_form(v)) for v in values):
        return "one object with a dialogue under each name. Write its values: list(json.load(open(OLD)).values())"
    if len(values) > 1 and all(isinstance(v, list) and v and all(isinstance(u, str) for u in v) for v in values):
        return 'one object with a dialogue under each name. Write {"dialog": [...]} for each of its values'
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Rows of another form

TEXT = ("content", "value", "text", "utterance", "message", "body")  # what a message's words are called
SPEAKER = ("role", "from", "speaker", "sender", "author", "user", "name")
FIRST = ("prompt", "instruction", "question", "query", "input", "context", "user", "human")  # what is said ...
SECOND = ("completion", "chosen", "response", "output", "answer", "reply", "assistant", "target")  # ... and the reply
MESSAGE_ID = re.compile(r"(conv\w*|dialog\w*|chat|thread|session|ticket)[ _-]?(id|no|number)|id", re.IGNORECASE)


def describe_form(row: Mapping[str, Any]) -> str:
    """What a row without a usable column `dialog` looks like, and what makes one of it; "" for an unknown form.

    Text cells that hold a list must have been parsed.
    """

    def use(what, expression):
        return f"This looks like {what}: write `{expression}` as 'dialog' (see docs/data.md)"

    spread = next((column for column in row if isinstance(column, str) and re.search(r"[;\t|]", column)), None)
    if spread:
        separator = re.search(r"[;\t|]", spread)[0]
        return (
            f"The columns are separated by {'tabs' if separator == chr(9) else repr(separator)}, not by commas: write "
            f"the file anew, as pandas.read_csv(OLD, sep={separator!r}).to_csv(NEW, index=False) does"
        )
    if any(isinstance(column, str) and column.lstrip().startswith("[") for column in row):
        return "The file has no header: add a first line with the names of the columns, such as dialog,act"

    lists = {k: v for k, v in row.items() if isinstance(v, list) and v}
    messages = {k: v for k, v in lists.items() if all(isinstance(m, dict) for m in v)}
    for column, value in messages.items():
        if "history" in value[-1] and "candidates" in value[-1]:
            last = f'row["{column}"][-1]'
            return use("Persona-Chat", f'{last}["history"] + {last}["candidates"][-1:]')
        key = next((k for k in TEXT if all(isinstance(m.get(k), str) for m in value)), None)
        if key is None:
            continue
        second = next((k for k in SECOND if k in messages and column in FIRST), None)
        listed = f'row["{column}"]' + (f' + row["{second}"]' if second else "")
        speaker = next((k for k in SPEAKER if k in value[0]), None)
        only = f' if m["{speaker}"] != "system"' if speaker in ("role", "from") else ""
        what = {"content": "chat messages", "value": "ShareGPT conversations"}.get(key, "messages")
        return use(what, f'[m["{key}"] for m in {listed}{only}]')
    first, second = (next((k for k in names if isinstance(row.get(k), (str, list))), None) for names in (FIRST, SECOND))
    if first is None:
        first = next((k for k, v in lists.items() if k not in SECOND and all(isinstance(u, str) for u in v)), None)
    if first and second and isinstance(row[second], str):
        listed = f'[row["{first}"]' if isinstance(row[first], str) else f'row["{first}"] + ['
        listed += f'{", " if isinstance(row[first], str) else ""}row["{second}"]]'
        more = "" if isinstance(row[first], list) else ", and train with context_utterances 1"
        return use(f"pairs of '{first}' and '{second}'", listed) + more
    if named := [k for k, v in lists.items() if k != "dialog" and all(isinstance(u, str) for u in v)]:
        column = min(named, key=lambda k: "dialog" not in str(k).casefold())
        return f"The column '{column}' holds a list of texts: if they are the utterances, rename it to 'dialog'"

    names = {str(k).casefold(): k for k in row}
    text = next(
        (names[k] for k in (*TEXT, "dialog", "dialogue", "chat", "chosen") if isinstance(row.get(names.get(k)), str)),
        "",
    )
    if text and any(MESSAGE_ID.fullmatch(k) or k in SPEAKER for k in names):
        return (
            "This looks like one message in each row: as a CSV with the columns conversation_id, speaker and text, "
            "examples/own_dataset.py converts it"
        )
    if text and row[text].lstrip().startswith("["):
        return (
            "The lists were written as numpy prints them, without commas: write the data with "
            'to_json(FILE, orient="records", lines=True) of pandas, or as parquet'
        )
    if text and "__eou__" in row[text]:
        return use("text with marks", f'[u for u in row["{text}"].split("__eou__") if u.strip()]')
    if text and "\n" in row[text].strip():
        return use("a text with a line for each utterance", f'[u for u in row["{text}"].splitlines() if u.strip()]')
    if text:
        return f"The column '{text}' holds one text: 'dialog' must be a list of utterances, [\"Hi.\", \"Hello!\"]"
    close = [] if "dialog" in row else difflib.get_close_matches("dialog", names, n=1)
    return f"If the column '{names[close[0]]}' holds the utterances, rename it to 'dialog'" if close else ""


# ---------------------------------------------------------------------------------------------------------------------
# Copies across splits

COMMON = 20  # a pair of utterances in more than so many held-out dialogues does not tell which of them is meant


NO_WORD = {i: None for i in range(1, 128) if not chr(i).isalnum()}  # all of ASCII that tells no words apart


def _words(utterances: Sequence[str]) -> str:
    """The utterances, NUL between them, without case, punctuation and blanks."""
    text = "\0".join(utterances)
    if text.isascii():  # the same, ten times as fast
        return text.lower().translate(NO_WORD)
    return re.sub(r"[^\w\0]+|_+", "", unicodedata.normalize("NFKC", text).casefold())


def overlap_note(data_path: str, splits: Mapping[str, Any]) -> str:
    """A sentence on dialogues of other splits that are in `train` as well, or nearly so; "" where there are none.

    `splits` maps names to what load_splits gave for `data_path`; those of `builtin` combine the same phrases by design,
    so nothing is said about them. At least three quarters of the utterances of a near-copy are in one
    training dialogue, two of them in a row; case, punctuation and blanks are set aside. Takes time in proportion to
    the number of dialogues.
    """
    found = []
    for name, held_out in splits.items():
        if name != "train" and data_path != "builtin" and (copies := copies_in(splits["train"], held_out)):
            same = sum(exact for _, exact in copies.values())
            counts = [f"{same:,} are also in train"] * (same > 0)
            counts += [f"{len(copies) - same:,} are near-copies of training dialogues"] * (same < len(copies))
            i = min(copies)
            places = f"{held_out.places[i]} is like {splits['train'].places[copies[i][0]]}"
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
            if i not in found or not found[i][1]:
                exact = normalized_text(dialogue.utterances) == normalized_text(held_out[i].utterances)
                if exact or i not in found:
                    found[i] = (j, exact)
        parts = text.split("\0")
        near = {i for pair in zip(parts, parts[1:]) if pair in pairs for i in pairs[pair] if i not in found}
        for i in near:
            said = words[i].split("\0")
            if 4 * (Counter(said) & Counter(parts)).total() >= 3 * len(said):
                found[i] = (j, False)
    return found


def normalized_text(utterances: Sequence[str]) -> str:
    """What two copies of a dialogue have in common, whatever their blanks and labels."""
    return "".join("\0".join(utterances).split())
