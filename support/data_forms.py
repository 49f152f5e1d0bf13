"""The forms of a row: which columns make a dialogue, and how. One function for each form. See docs/data.md."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import tokenize
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Dialogue:
    """One conversation of n utterances."""

    utterances: tuple[str, ...]  # what was said, without the system message
    acts: tuple[int, ...]  # dialogue acts, 1 to 4; 0 if unlabelled
    emotions: tuple[int, ...]  # 0 to 6
    roles: tuple[str, ...] = ()  # "user" or "assistant" of each utterance; empty if the data does not say
    system: str = ""  # the system message at the beginning
    first_reply: int = 0
    """Utterances from here on may be replies to learn; earlier ones are context. n: a reply to the whole is wanted,
    and the data has none. 0: the data does not say."""
    rejected: str | None = field(default=None, compare=False)  # of preferences: the other reply at `first_reply`
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the other columns of the row


@dataclass(frozen=True)
class Form:
    """What the columns of a row mean."""

    name: str  # the columns
    columns: tuple[str, ...]
    content: str  # what a row is, for a line of output
    has_roles: bool = True
    has_references: bool = True

    @property
    def replies(self) -> str:
        """Which utterances are replies to learn, in words."""
        if not self.has_references:
            return "there are no human replies"
        if not self.has_roles:
            return "who speaks is not said"
        named = {"chosen": "the chosen ones are the replies", "completion": "the completions are the replies"}
        return next(
            (said for column, said in named.items() if column in self.columns), "the assistant's turns are the replies"
        )


DIALOG = Form("dialog", ("dialog",), "utterances", has_roles=False)
MESSAGES = Form("messages", ("messages",), "role, content")
CONVERSATIONS = Form("conversations", ("conversations",), "ShareGPT: from, value")
PREFERENCES = Form("prompt, chosen, rejected", ("prompt", "chosen", "rejected"), "preferences")
IMPLICIT = Form("chosen, rejected", ("chosen", "rejected"), "preferences with the prompt in both")
COMPLETION = Form("prompt, completion", ("prompt", "completion"), "a prompt and its reply")
PROMPT = Form("prompt", ("prompt",), "a prompt alone", has_references=False)
FORMS = (DIALOG, MESSAGES, CONVERSATIONS, PREFERENCES, IMPLICIT, COMPLETION, PROMPT)  # the first that fits is taken

REPLY_NAMES = ("response", "output", "answer", "reply", "assistant", "target", "chosen")  # of a reply to a prompt

ROLES = dict.fromkeys(("system", "developer"), "system")
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "ai"), "assistant")
TOOLS = {"tool", "function", "observation", "function_call", "tool_call", "ipython"}
# U+FFFD replaces undecodable bytes when a file is read; JSON can contain half of a surrogate pair
UNDECODABLE = re.compile("[\ufffd\ud800-\udfff]")
MISSING = {"", "[]", "null", "none", "nan", "na", "n/a", "<na>"}  # text for "no label", in any case
# blanks, zero-width characters and marks of direction, of which a text may not consist
INVISIBLE = re.compile(
    r"[\s\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]*"
)

Turn = tuple[str, str]  # role and text


# Why a row of preferences has no choice between two replies
TIE = "ties, left out"
EQUAL = "pairs with equal sides, left out"
UNREADABLE = "rows without a readable rejected reply, left out"


class Rejected(Exception):
    """A row whose completion was rejected by its label: no reply to learn."""


class NoChoice(Exception):
    """A row of preferences that says nothing of which reply is better: TIE, EQUAL or UNREADABLE."""


def form_of(row: Mapping[str, Any], choices: bool = False) -> Form | None:
    """The form of a row by its columns; None for an unknown one.

    With `choices` preferences come first: some datasets have the messages of the chosen side beside them. A prompt
    beside a reply under another name is no prompt alone.
    """
    forms = (PREFERENCES, IMPLICIT, *FORMS) if choices else FORMS
    form = next((form for form in forms if all(row.get(column) is not None for column in form.columns)), None)
    return None if form is PROMPT and _other_reply(row) else form


def _other_reply(row: Mapping[str, Any]) -> str:
    """The column beside a prompt that holds a reply, a text or messages, under another name; "" without one."""
    for name in REPLY_NAMES:
        value = row.get(name)
        if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            return name
    return ""


def check_choice(row: Mapping[str, Any]) -> None:
    """NoChoice for a row of preferences whose columns alone say so, whatever its texts are."""
    if not {"chosen", "rejected"} <= row.keys():
        return
    chosen, rejected = (side.strip() if isinstance(side, str) else side for side in (row["chosen"], row["rejected"]))
    if str(row.get("tie")).strip().lower() == "true":
        raise NoChoice(TIE)
    if rejected is None:
        raise NoChoice(UNREADABLE)
    if chosen == rejected:
        raise NoChoice(EQUAL)
    if chosen is None:  # else the row would be a prompt alone
        raise ValueError("the column 'chosen' is empty")


def read_row(row: Mapping[str, Any], form: Form, markers: Sequence[str] = (), choice: bool = False) -> Dialogue:
    """The row as a Dialogue. ValueError says what is wrong with it. Rejected for a reply that was rejected.

    `markers` are texts that end a turn, so that no turn may contain them. `choice`: both replies of preferences are
    wanted, and not a dialogue alone. Then the assistant's turns may be empty, and NoChoice is raised for some rows.
    """
    for column in form.columns:
        if row.get(column) is None and column in row:
            raise ValueError(f"the column '{column}' is empty")
        if column not in row:
            raise ValueError(f"has no column '{column}' (columns: {', '.join(map(str, row)) or 'none'})")
    dialogue = (CHOICE_READERS if choice else READERS)[form](row)
    for i, utterance in enumerate(dialogue.utterances, start=1):
        for marker in markers:
            if marker in utterance:
                n = len(dialogue.utterances)
                raise ValueError(f"utterance {i} of {n} holds the marker {marker!r}, which ends an utterance")
    if named := next((marker for marker in markers if marker in dialogue.system), ""):
        raise ValueError(f"the system message holds the marker {named!r}, which ends an utterance")
    return replace(dialogue, columns=_other_columns(row, form))


def _other_columns(row: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """The columns of a row that are no part of the dialogue, for rewards; also the dialogue's prompt, if it is a text.

    A prompt beside a whole conversation is left out: it is that of the first reply alone.
    """
    names = (name for name in row if isinstance(name, str) and name[:1] != "_")  # cells beyond the header have no name
    columns = {name: row[name] for name in names if name not in (*form.columns, *LABELS, "prompt")}
    is_text = "prompt" in form.columns and isinstance(row["prompt"], str)
    return columns | ({"prompt": row["prompt"]} if is_text else {})


# ---------------------------------------------------------------------------------------------------------------------
# One function for each form


def _dialog(row: Mapping[str, Any]) -> Dialogue:
    utterances = as_list(row["dialog"], "dialog")
    n = len(utterances)
    if not n:
        raise ValueError("the dialogue has no utterance")
    for i, utterance in enumerate(utterances, start=1):
        if not isinstance(utterance, str):
            raise ValueError(f"utterance {i} is not text but {utterance!r:.40}")
        check_text(utterance, f"utterance {i} of {n}")
    return Dialogue(tuple(utterances), *_labels(row, n))


def _messages(row: Mapping[str, Any], column: str = "messages") -> Dialogue:
    system, turns = read_messages(row[column], column)
    if not turns:
        raise ValueError(f"'{column}' has no turn of a user or an assistant")
    acts = row.get("act")
    if system is not None and not is_missing(acts) and len(values := as_list(acts, "act")) == len(turns) + 1:
        row = {**row, "act": values[1:]}  # one for the system message too
    return _dialogue(system, turns, 0, _labels(row, len(turns)))


def _completion(row: Mapping[str, Any], column: str = "completion", may_be_empty: bool = False) -> Dialogue:
    if column == "completion" and str(row.get("label")).strip().lower() in ("false", "0"):
        raise Rejected
    system, prompt = _side(row["prompt"], "prompt", "user", may_be_empty)
    own_system, reply = _side(row[column], column, "assistant", may_be_empty)
    if reply[: len(prompt)] == prompt and len(reply) > len(prompt):  # some datasets repeat the prompt
        reply = reply[len(prompt) :]
    if reply[0][0] != "assistant":
        raise ValueError(f"'{column}' begins with a turn of the {reply[0][0]}; expected the assistant's")
    if prompt[-1][0] != "user":
        raise ValueError(f"'prompt' ends with a turn of the {prompt[-1][0]}; expected the user's")
    dialogue = _dialogue(system or own_system, [*prompt, *reply], len(prompt))
    return replace(dialogue, rejected=_rejected(row, prompt)) if column == "chosen" else dialogue


def _rejected(row: Mapping[str, Any], prompt: Sequence[Turn]) -> str | None:
    """The rejected reply to a prompt, which may be empty; None if it cannot be read, or is no reply of an assistant."""
    try:
        _, reply = _side(row.get("rejected"), "rejected", "assistant", may_be_empty=True)
    except ValueError:
        return None
    reply = reply[len(prompt) :] if reply[: len(prompt)] == list(prompt) else reply
    return reply[0][1] if reply and reply[0][0] == "assistant" else None


def _implicit(row: Mapping[str, Any], choice: bool = False) -> Dialogue:
    side = _transcript(row["chosen"], "chosen", may_be_empty=choice)
    try:
        other_side = _transcript(row["rejected"], "rejected", may_be_empty=choice)
    except ValueError:
        if choice:
            raise NoChoice(UNREADABLE) from None
        raise
    if side is None or other_side is None:
        return _shared_beginning(row, choice)
    (system, chosen), (_, rejected) = side, other_side
    if not chosen:
        raise ValueError("'chosen' has no turn of a user or an assistant")
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected)))
    first = min(same, len(chosen) - 1)
    while first and chosen[first][0] != "assistant":
        first -= 1
    if not first or chosen[first - 1][0] != "user":
        raise ValueError("'chosen' and 'rejected' do not begin with the same turns of a user, so there is no prompt")
    other = rejected[first][1] if first < len(rejected) and rejected[first][0] == "assistant" else None
    return replace(_dialogue(system, chosen, first), rejected=other)


def _shared_beginning(row: Mapping[str, Any], choice: bool) -> Dialogue:
    """Two texts with the same beginning, cut back to the last blank, as TRL does."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError("'chosen' and 'rejected' should both be texts, or both lists of messages")
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same text, so that nothing says where the reply begins")
    same = os.path.commonprefix([chosen, rejected])
    cut = max((i + 1 for i, letter in enumerate(same) if letter.isspace()), default=0)
    prompt, reply = chosen[:cut].strip(), chosen[cut:].strip()
    other: str | None = rejected[cut:].strip()
    if not prompt or not (reply or choice):
        raise ValueError("'chosen' and 'rejected' have no common beginning that could be the prompt")
    check_text(prompt, "the prompt")
    check_text(reply, "'chosen'", may_be_empty=choice)
    try:
        check_text(other, "'rejected'", may_be_empty=True)
    except ValueError:
        other = None
    return replace(_dialogue(None, [("user", prompt), ("assistant", reply)], 1), rejected=other)


def _prompt(row: Mapping[str, Any]) -> Dialogue:
    if reply := "completion" if row.get("completion") is not None else _other_reply(row):
        raise ValueError(f"has a '{reply}', while the rows before it are a prompt alone")
    system, prompt = _side(row["prompt"], "prompt", "user")
    if prompt[-1][0] != "user":
        raise ValueError(f"'prompt' ends with a turn of the {prompt[-1][0]}; expected the user's")
    return _dialogue(system, prompt, len(prompt))


READERS: dict[Form, Callable[[Mapping[str, Any]], Dialogue]] = {
    DIALOG: _dialog,
    MESSAGES: _messages,
    CONVERSATIONS: functools.partial(_messages, column="conversations"),
    PREFERENCES: functools.partial(_completion, column="chosen"),
    IMPLICIT: _implicit,
    COMPLETION: _completion,
    PROMPT: _prompt,
}
CHOICE_READERS = READERS | {
    PREFERENCES: functools.partial(_completion, column="chosen", may_be_empty=True),
    IMPLICIT: functools.partial(_implicit, choice=True),
}


def _dialogue(
    system: str | None, turns: Sequence[Turn], first_reply: int, labels: tuple[tuple[int, ...], ...] | None = None
) -> Dialogue:
    roles, texts = zip(*turns)
    acts, emotions = labels or ((0,) * len(texts),) * 2
    return Dialogue(texts, acts, emotions, roles, system or "", first_reply)


# ---------------------------------------------------------------------------------------------------------------------
# Messages and text


def read_messages(value: Any, column: str, may_be_empty: bool = False) -> tuple[str | None, list[Turn]]:
    """The system message (None without one) and the turns of a list of messages. ValueError for another value.

    `may_be_empty`: the assistant's turns may be.
    """
    messages = as_list(value, column)
    n, system, turns = len(messages), None, []
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {i} of {n} is not an object with role and content but {message!r:.40}")
        said = _either(message, "role", "from")
        role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
        where = f"message {i} of {n} ({role})"
        if message.get("tool_calls") or (isinstance(said, str) and said.lower() in TOOLS):
            raise ValueError(f"message {i} of {n} calls a tool or is its answer; expected text")
        if role is None:
            found = f"the role {said!r:.40}" if said is not None else "no role"
            raise ValueError(f"message {i} of {n} has {found}; expected system, user or assistant")
        text = _content(_either(message, "content", "value"), where)
        if role == "system":
            if i > 1:
                raise ValueError(f"{where} comes after others; expected a system message only at the beginning")
            system = text.strip() and text
            if system:
                check_text(text, where)
            continue
        check_text(text, where, may_be_empty and role == "assistant")
        turns.append((role, text))
    return system, turns


def _either(message: Mapping[str, Any], key: str, other: str) -> Any:
    """The value of one of two keys; a table of messages of both kinds has both, one of them null."""
    return message.get(other) if message.get(key) is None else message[key]


def _content(content: Any, where: str) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(content, str):
        return content
    if content is None:
        raise ValueError(f"{where} has no content")
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"the content of {where} is not text but {content!r:.40}")
    texts = []
    for i, part in enumerate(content, start=1):
        kind = part.get("type") or "text" if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text":
            raise ValueError(f"part {i} of {where} is no text but {kind!s:.40}; expected text alone")
        if not isinstance(text, str):
            raise ValueError(f"part {i} of {where} has no text but {text!r:.40}")
        texts.append(text)
    return "".join(texts)


def check_text(text: str, where: str, may_be_empty: bool = False) -> None:
    """ValueError for text that is empty or invisible, or holds what no tokenizer should read."""
    if not may_be_empty and INVISIBLE.fullmatch(text):
        raise ValueError(f"{where} is empty")
    if not text.isascii() and UNDECODABLE.search(text):
        raise ValueError(f"{where} is not valid UTF-8")
    if "\0" in text:
        raise ValueError(f"{where} holds a NUL character")


def _side(value: Any, column: str, role: str, may_be_empty: bool = False) -> tuple[str | None, list[Turn]]:
    """The system message and the turns of a prompt or a reply: a text is one turn. The assistant's `may_be_empty`."""
    if isinstance(value, str) and not _is_message_list(value):
        check_text(value, f"'{column}'", may_be_empty and role == "assistant")
        return None, [(role, value.strip())]
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"'{column}' should be a text or a list of messages, found {value!r:.60}")
    system, turns = read_messages(value, column, may_be_empty)
    if not turns:
        raise ValueError(f"'{column}' has no turn of a user or an assistant")
    return system, turns


def _is_message_list(text: str) -> bool:
    """Whether a text is a list of messages as JSON or Python write it."""
    if not (begin := re.match(r"\s*\[\s*\{\s*['\"](\w*)['\"]\s*:", text)):
        return False
    if begin[1] in ("role", "from", "content", "value"):
        return True
    with contextlib.suppress(ValueError):  # another key comes first
        return all(isinstance(m, Mapping) and not m.keys().isdisjoint(("role", "from")) for m in as_list(text, "text"))
    return False


SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def _transcript(value: Any, column: str, may_be_empty: bool) -> tuple[str | None, list[Turn]] | None:
    """The turns of a list of messages, or of a transcript of "Human:" and "Assistant:"; None for other text."""
    if not isinstance(value, str) or _is_message_list(value):
        return read_messages(value, column, may_be_empty)
    before, *parts = SPEAKER.split(value)
    if not parts or before.strip():
        return None
    turns = [("user" if who == "Human" else "assistant", text.strip()) for who, text in zip(parts[::2], parts[1::2])]
    for i, (role, text) in enumerate(turns, start=1):
        check_text(text, f"turn {i} of {len(turns)} ({role}) of '{column}'", may_be_empty and role == "assistant")
    return None, turns


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def is_missing(cell: Any) -> bool:
    """Whether a cell, or a value in a list of labels, means "no label"."""
    if isinstance(cell, str):
        return cell.strip().casefold() in MISSING
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _labels(row: Mapping[str, Any], n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dialogue acts and emotions of n utterances."""
    return read_labels(row.get("act"), "act", 1, 4, n), read_labels(row.get("emotion"), "emotion", 0, 6, n)


def read_labels(cell: Any, column: str, low: int, high: int, n: int) -> tuple[int, ...]:
    """The labels of n utterances; 0 for each that has none, and for all if the cell is missing or empty."""
    values = [] if is_missing(cell) else as_list(cell, column)
    if not values:
        return (0,) * n
    if len(values) != n:
        raise ValueError(f"{n} utterances but {len(values)} values in '{column}'")
    if set(map(type, values)) == {int} and low <= min(values) and max(values) <= high:  # nearly always
        return tuple(values)
    numbers = []
    for value in values:
        try:
            number = None if is_missing(value) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.inf
        if number is not None and not number.is_integer():
            raise ValueError(f"'{column}' should hold whole numbers, found {values!r:.60}")
        if number is not None and not low <= number <= high:
            raise ValueError(f"{column} {int(number)} is out of range; expected {low} to {high}")
        numbers.append(int(number or 0))
    return tuple(numbers)


LABELS = ("act", "emotion")


def as_list(value: Any, column: str) -> list[Any]:
    """A list column as it comes from parquet or JSON, or as text in a CSV cell: JSON, a Python list, or `1 2 1`."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str):
        text = value.strip()
        if column in LABELS and text and not text.startswith("["):
            return _label_words(text)
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                parsed = parse(text)
                if isinstance(parsed, (list, tuple)) and not (parse is ast.literal_eval and _lacks_commas(text)):
                    return list(parsed)
        if column in LABELS and re.fullmatch(r"\[[^\[\]]*\]", text):  # `[1.0, nan]` of pandas, `[1 2]` of numpy
            return _label_words(re.sub(r"[\[\]'\"]", " ", text))
    raise ValueError(f"'{column}' should be a list, found {value!r:.60}")


def _label_words(text: str) -> list[str]:
    """`1 2 1` or `1, 2, 1`; nothing between two commas is a missing label."""
    return re.split(r"\s*,\s*|\s+", text.strip().removesuffix(",").strip())


def _lacks_commas(text: str) -> bool:
    """Whether two strings follow each other: numpy prints lists so, and Python would read 'a' 'b' as one string."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds: Iterable[int] = [token.type for token in tokens if token.type not in (tokenize.NL, tokenize.NEWLINE)]
    return (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds)
