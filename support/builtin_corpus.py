"""The built-in corpus: everyday dialogues written by this project, for training where no dataset can be downloaded.

    python support/builtin_corpus.py --split test --limit 3      # read a few dialogues
    python support/builtin_corpus.py --mistakes                  # those of absent-minded people

Its text is in builtin_corpus.txt, which explains how to add a situation. The code here draws dialogues from it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import re
from pathlib import Path
from typing import NamedTuple

CORPUS_VERSION = 1  # part of cache keys: raise it whenever a change makes generate_corpus() print something else
SPLIT_SIZES = {"train": 5000, "validation": 400, "test": 600}  # dialogues
MIN_TURNS, MAX_TURNS = 6, 12  # utterances in a dialogue
ACTS = ("inform", "question", "directive", "commissive")  # dialogue act k of DailyDialog is ACTS[k - 1]
EMOTIONS = {"": 0, "a": 1, "d": 2, "f": 3, "h": 4, "s": 5, "u": 6}  # anger, disgust, fear, happiness, sadness, surprise

_parts = re.split(r"^== (.+)\n", Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
SITUATIONS = dict(zip(_parts[1::2], _parts[2::2]))  # the rows of each by its name
COMMON = SITUATIONS.pop("every situation")
PHRASES = dict(row.split(" = ") for row in SITUATIONS.pop("phrases").strip().split("\n"))


class Line(NamedTuple):
    """One thing that a speaker can say: a row of a situation."""

    state: str
    act: int  # 1..4
    emotion: int  # 0..6
    texts: list[str]  # the ways of saying it, with {slots} and <phrases>
    next_states: list[str]  # of the other speaker
    slot: str | None  # from here on it has the value of the slot `source`
    source: str | None
    tag: str  # lines of one tag exclude each other


class Situation(NamedTuple):
    """A parsed table: what a dialogue is drawn from."""

    slots: list[tuple[list[str], list[str]]]  # (names, values), each still with its "/"
    lines: dict[tuple[str, str], list[Line]]  # by (speaker, state); the first key opens the dialogue


OTHER = {"A": "B", "B": "A"}
# dialogues of absent-minded people
PROMPT = 5  # utterances without a mistake, at the start
MISTAKES = 0.4  # probability that a later utterance begins another conversation
COPIES = 4  # of each training dialogue, with other mistakes
LINE = re.compile(r"([AB*]) (\w+) +([1-4])([adfhsu]?) (.+) -> ([\w ]+?)(?: (\w+)=(\w+))?(?: !(\w+))?")


def parse_situation(text: str) -> Situation:
    """Read a situation's rows.

    Raises ValueError for a row that is not understood and for an arrow to a state where the other speaker has no line.
    """
    slots, lines = [], {}
    for row in filter(None, f"{text}\n{COMMON}".splitlines()):
        if match := LINE.fullmatch(row):
            who, state, act, emotion, texts, states, slot, source, tag = match.groups()
            ways, states = texts.split(" | "), states.split()
            line = Line(state, int(act), EMOTIONS[emotion], ways, states, slot, source, tag or row)
            for speaker in who.replace("*", "AB"):
                lines.setdefault((speaker, state), []).append(line)
        elif " = " in row:
            names, values = row.split(" = ")
            slots.append((names.split(), values.split("; ")))
        else:
            raise ValueError(f"this row is neither a slot nor a line of a situation: {row!r}")
    for (speaker, _), group in lines.items():
        for state in {state for line in group for state in line.next_states} - {"end"}:
            if (OTHER[speaker], state) not in lines:
                raise ValueError(f"{OTHER[speaker]} has no line in state {state!r}, to which a line of {speaker} leads")
    return Situation(slots, lines)


@functools.cache
def parsed_situations() -> dict[str, Situation]:
    """All situations by name."""
    return {name: parse_situation(text) for name, text in SITUATIONS.items()}


def _pick(rng: random.Random, options: list):
    # Of random.Random only random() is promised to give the same numbers in every Python version; choice() is not.
    return options[int(rng.random() * len(options))]


def _draw_slots(rng: random.Random, situation: Situation) -> dict[str, str]:
    """One value for each slot; slots of one row get different values."""
    drawn = {}
    for names, values in situation.slots:
        left = list(values)
        for name in names:
            value = left.pop(int(rng.random() * len(left)))
            drawn.update(zip(name.split("/"), value.split("/"), strict=True))
    return drawn


def next_line(rng: random.Random, situation: Situation, walk: list[Line], length: int) -> Line | None:
    """Draw what is said after the lines of `walk`; None if all that could be said has been, or the walk is too long.

    `length` is the number of utterances to steer for.
    """
    speaker, state = next(iter(situation.lines))
    states = walk[-1].next_states if walk else [state]
    speaker = OTHER[speaker] if len(walk) % 2 else speaker
    said_next = [line for state in states if state != "end" for line in situation.lines[speaker, state]]
    used = {line.tag for line in walk}
    pool = [line for line in said_next if line.tag not in used]
    late = len(walk) + 4 >= length and rng.random() < 0.8  # not always: the last topic may continue
    wanted = [line for line in pool if (line.state == "close") == late]
    return None if not pool or len(walk) == MAX_TURNS else _pick(rng, wanted or pool)


def _draw_walk(rng: random.Random, situation: Situation) -> tuple[list[Line], int] | None:
    """The lines of one dialogue and the length steered for; None if it got stuck or came out too short or too long."""
    walk: list[Line] = []
    length = _pick(rng, [6, 7, 8, 8, 9, 9, 10, 11])  # a goodbye has about four utterances
    while not walk or "end" not in walk[-1].next_states or (len(walk[-1].next_states) > 1 and len(walk) < length):
        line = next_line(rng, situation, walk, length)
        if line is None:
            return None
        walk.append(line)
    return (walk, length) if len(walk) >= MIN_TURNS else None


def say(rng: random.Random, line: Line, slots: dict[str, str]) -> str:
    """Say a line in one of its ways: fill in <phrases> and {slots}, then correct a/an and the capital letters."""
    template = _pick(rng, line.texts)

    def fill(match: re.Match) -> str:
        return slots[match[1]] if match[1] else _pick(rng, PHRASES[match[2]].split("; "))

    text = re.sub(r"\{(\w+)\}|<(\w+)>", fill, template)
    text = re.sub(r"\b([Aa]) (?=[aeiou])(?!one)", r"\1n ", text)
    return re.sub(r"(?:^|[.?!] )[a-z]", lambda match: match[0].upper(), text)


class Draw(NamedTuple):
    """A dialogue, and what it was made of."""

    row: dict[str, list]
    situation: Situation
    walk: list[Line]
    length: int  # that was steered for
    slots: list[dict[str, str]]  # their values at each utterance


def _draw_dialogue(rng: random.Random, situation: Situation) -> Draw:
    while (found := _draw_walk(rng, situation)) is None:
        pass
    walk, length = found
    slots, dialog, before = _draw_slots(rng, situation), [], []
    for line in walk:
        before.append(dict(slots))
        dialog.append(say(rng, line, slots))
        if line.slot:
            slots[line.slot] = slots[line.source]
    row = {"dialog": dialog, "act": [line.act for line in walk], "emotion": [line.emotion for line in walk]}
    return Draw(row, situation, walk, length, before)


def draw_corpus(seed: int = 0) -> dict[str, list[Draw]]:
    """Draw the dialogues of generate_corpus."""
    rng = random.Random(seed)
    situations = list(parsed_situations().values())
    draws: dict[str, Draw] = {}  # by their texts
    while len(draws) < sum(SPLIT_SIZES.values()):
        draw = _draw_dialogue(rng, situations[len(draws) % len(situations)])  # in turn: each split has its share of all
        draws.setdefault("\n".join(draw.row["dialog"]), draw)
    left = iter(draws.values())
    return {split: list(itertools.islice(left, size)) for split, size in SPLIT_SIZES.items()}


def generate_corpus(seed: int = 0) -> dict[str, list[dict]]:
    """Draw the corpus: SPLIT_SIZES dialogues per split; no two of them, in any split, have the same text.

    A row is {"dialog": list[str], "act": list[int], "emotion": list[int]}. Each list has MIN_TURNS to MAX_TURNS
    entries, and A and B take turns. The same seed gives the same corpus on every machine.
    """
    return {split: [draw.row for draw in draws] for split, draws in draw_corpus(seed).items()}


def generate_mistakes(seed: int = 0) -> dict[str, list[dict]]:
    """Draw the dialogues that the built-in policy imitates: those of generate_corpus, spoken by absent-minded people.

    Each utterance after the first PROMPT is, with probability MISTAKES, one that begins another dialogue of the split:
    its first or its second. The dialogue ends there. A training dialogue appears COPIES times. Rows have the columns of
    generate_corpus.
    """
    rng, mistaken = random.Random(seed), {}
    for split, rows in generate_corpus(seed).items():
        copies = COPIES if split == "train" else 1
        mistaken[split] = [_end_with_mistake(rng, row, rows) for _ in range(copies) for row in rows]
    return mistaken


def _end_with_mistake(rng: random.Random, row: dict[str, list], rows: list[dict]) -> dict[str, list]:
    for turn in range(PROMPT, len(row["dialog"])):
        if rng.random() < MISTAKES:
            other, wrong = _pick(rng, rows), _pick(rng, [0, 1])
            return {column: [*row[column][:turn], other[column][wrong]] for column in row}
    return row


def main() -> None:
    """Print a few dialogues."""
    parser = argparse.ArgumentParser(description="Print dialogues of the embedded corpus.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus")
    parser.add_argument("--split", choices=list(SPLIT_SIZES), default="train", help="which part of it")
    parser.add_argument("--limit", type=int, default=5, help="how many dialogues")
    parser.add_argument("--mistakes", action="store_true", help="dialogues that end with a mistake")
    args = parser.parse_args()
    generate = generate_mistakes if args.mistakes else generate_corpus
    for number, row in enumerate(generate(args.seed)[args.split][: max(args.limit, 0)]):
        print(f"--- {args.split} {number}")
        for text, act in zip(row["dialog"], row["act"], strict=True):
            print(f"{ACTS[act - 1]:>10}  {text}")


if __name__ == "__main__":
    main()
