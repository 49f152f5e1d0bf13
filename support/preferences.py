"""Preferences: pairs of replies to one conversation, of which one was chosen."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from support.data import Dialogue, Dialogues, has_splits, load_choices
from support.data_forms import EQUAL, IMPLICIT, PREFERENCES, UNREADABLE
from support.errors import UserError
from support.text import Message

FEW = 500  # pairs, below which a fifth of them is held out rather than a tenth


@dataclass(frozen=True)
class Pair:
    """Two replies to a conversation. Pairs of one `source`, such as a dialogue, belong to the same half of the data."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str

    @property
    def prompt(self) -> str:
        """The conversation as one text, to find pairs with the same prompt."""
        return "\n".join(f"{m['role']}: {m['content'].strip()}" for m in self.messages)


@dataclass
class Preferences:
    """Pairs to learn from and pairs with other prompts to measure on, and what was left out."""

    train: list[Pair]
    held_out: list[Pair]
    left_out: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """`900 pairs to learn from, 100 held out; ties, left out: 3`."""
        said = f"{len(self.train):,} pairs to learn from, {len(self.held_out):,} held out"
        return said + "".join(f"; {what}: {n:,}" for what, n in self.left_out.items())


def load_preferences(data_path: str, skip_bad_rows: bool = False, half: str = "all") -> Preferences:
    """Load pairs. The validation split is held out; without one, a part of the prompts.

    `half` is "first", "second" or "all" of the sources to learn from. UserError for data without preferences.
    """
    found, held_out = Preferences([], []), []
    split = "train" if has_splits(data_path) else ""
    place = f"the train split of '{data_path}'" if split else f"'{data_path}'"
    pairs = pairs_of(load_choices(data_path, split, skip_bad_rows), place, found.left_out)
    if split:
        held_out = _validation_pairs(data_path, skip_bad_rows, found.left_out)
    if not held_out:
        share = 5 if len(pairs) < FEW else 10
        held_out = _cut(pairs, share)
    prompts = {pair.prompt for pair in held_out}
    apart = [pair for pair in pairs if pair.prompt not in prompts]
    if split and len(apart) < len(pairs):
        found.left_out["pairs with a held-out prompt, left out"] = len(pairs) - len(apart)
    found.held_out = held_out
    found.train = [pair for pair in apart if half == "all" or _number(pair.source) % 2 == (half == "second")]
    if not found.train or not found.held_out:
        raise UserError(
            f"'{data_path}' has {found.describe()}; expected pairs with at least two different prompts, of which one "
            "can be held out."
        )
    return found


def _cut(pairs: list[Pair], share: int) -> list[Pair]:
    """The pairs of one prompt in `share`, at least of one, in an order that does not depend on the rows'."""
    prompts = sorted({pair.prompt for pair in pairs}, key=_number)
    chosen = set(prompts[: max(1, len(prompts) // share)])
    return [pair for pair in pairs if pair.prompt in chosen]


def _validation_pairs(data_path: str, skip_bad_rows: bool, left_out: Counter[str]) -> list[Pair]:
    """The pairs of the validation split; none for data without one."""
    try:
        dialogues = load_choices(data_path, "validation", skip_bad_rows)
    except UserError as error:
        if "has no validation split" in str(error):
            return []
        raise
    return pairs_of(dialogues, f"the validation split of '{data_path}'", left_out)


def pairs_of(dialogues: Dialogues, place: str, left_out: Counter[str]) -> list[Pair]:
    """The pairs of the rows of `place`; `left_out` counts other rows. UserError for no rows, or for another form."""
    rows = dialogues.rows
    if not (rows.numbers or rows.without_choice or rows.rejected):
        raise UserError(
            f"{place} has no rows; expected preferences: 'prompt', 'chosen' and 'rejected'. The page of chat.py --web "
            "writes a row for each choice."
        )
    if rows.form not in (PREFERENCES, IMPLICIT) and dialogues:
        raise UserError(
            f"the rows of {place} are of '{dialogues.form.name}'; expected preferences: 'prompt', 'chosen' and "
            "'rejected'. With dialogues give --from-dialogues MODEL, whose replies are then the rejected ones."
        )
    if dialogues.n_skipped:
        left_out["malformed rows, left out"] += dialogues.n_skipped
    left_out.update(rows.without_choice)
    pairs = []
    for dialogue in dialogues:
        if why := _why_no_pair(dialogue):
            left_out[why] += 1
            continue
        pairs.append(pair := pair_of(dialogue))
        if not (pair.chosen.strip() and pair.rejected.strip()):
            left_out["pairs with an empty side, kept"] += 1
    return pairs


def _why_no_pair(dialogue: Dialogue) -> str:
    """Why a row of preferences gives no pair; "" if it gives one."""
    if dialogue.rejected is None:
        return UNREADABLE
    if dialogue.rejected.strip() == dialogue.utterances[dialogue.first_reply].strip():
        return EQUAL
    return ""


def pair_of(dialogue: Dialogue) -> Pair:
    """The pair of a row of preferences."""
    n = dialogue.first_reply
    turns = [{"role": role, "content": text} for role, text in zip(dialogue.roles[:n], dialogue.utterances)]
    system = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
    source = dialogue.columns.get("dialogue")
    prompt = "\n".join(dialogue.utterances[:n])
    return Pair((*system, *turns), dialogue.utterances[n], dialogue.rejected, str(prompt if source is None else source))


def row_of(messages: Sequence[Message], chosen: str, rejected: str, source: Any) -> dict[str, Any]:
    """A row of preferences in TRL's form, with the number of its dialogue."""
    sides = {"chosen": chosen, "rejected": rejected}
    row: dict[str, Any] = {"prompt": [dict(message) for message in messages]}
    return row | {n: [{"role": "assistant", "content": text}] for n, text in sides.items()} | {"dialogue": source}


def _number(text: str) -> int:
    """A number that depends on the text alone, in any process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big")
