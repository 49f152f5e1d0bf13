"""The desk: conversations of a customer and a clerk, whose success can be checked.

    python -m support.desk --split test --limit 3      # read a few, each with its verdict

The customer wants a table, a room, a train or an appointment, and tells the four values of its goal bit by bit. The
clerk asks for what is missing and closes with a confirmation: any text with the word "booked" that names all values.
`Customer` is the partner of a policy. `generate_desk` writes conversations of a clerk who makes mistakes, for
supervised learning. The texts are in desk.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

DESK_VERSION = 2  # part of cache keys: raise it whenever a change makes generate_desk() print something else
SPLIT_SIZES = {"train": 15000, "validation": 500, "test": 1000}  # conversations
TURNS = 6  # the most that a clerk may take, with the confirmation; then the customer hangs up
CORRECTS, VOLUNTEERS = 0.35, 0.25  # probabilities: of a correction in a conversation, of telling more than was asked
ANSWERS = 2  # a customer answers at most so many questions of one turn

Message = Mapping[str, str]  # {"role": "user" or "assistant", "content": ...}


def _read_sections(text: str) -> dict[str, dict[str, list[str]]]:
    """The texts of each row of each section of desk.txt."""
    parts = re.split(r"^== (.+)\n", text, flags=re.MULTILINE)[1:]
    rows = ([row.split(" = ", 1) for row in part.strip().split("\n")] for part in parts[1::2])
    return {name: {key: texts.split(" | ") for key, texts in found} for name, found in zip(parts[::2], rows)}


class Domain(NamedTuple):
    """A kind of booking."""

    name: str
    opening: list[str]  # how a customer begins
    booked: list[str]  # how a clerk begins the confirmation
    goal: str
    assumed: str  # the slot that a bad clerk does not ask for
    slots: dict[str, str]  # the fragment of each, such as "on {}"

    @classmethod
    def of(cls, name: str, rows: dict[str, list[str]]) -> Domain:
        slots = {slot: texts[0] for slot, texts in rows.items() if slot in VALUES}
        return cls(name, rows["opening"], rows["booked"], rows["goal"][0], rows["assumed"][0], slots)


SECTIONS = _read_sections(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))
VALUES, NAMES = SECTIONS.pop("values"), SECTIONS.pop("names of slots")
ASKING, QUESTIONS = SECTIONS.pop("words of a question"), SECTIONS.pop("questions")
ANSWER_TEXTS, PHRASES = SECTIONS.pop("answers"), SECTIONS.pop("phrases")
DOMAINS = {name: Domain.of(name, rows) for name, rows in SECTIONS.items()}
SPELLED = {value.lower(): value for values in VALUES.values() for value in values}
DIGITS = dict(
    zip("2 3 4 5 6 7 8 9 10 11 12".split(), "two three four five six seven eight nine ten eleven twelve".split())
)


def _pick(rng: random.Random, options: Sequence[str]) -> str:
    # Of random.Random only random() is promised to give the same numbers in every Python version; choice() is not.
    return options[int(rng.random() * len(options))]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, with numbers up to twelve as words."""
    return [DIGITS.get(word, word) for word in re.findall(r"[^\W\d_]+|\d+", text.lower())]


def values_in(text: str) -> list[str]:
    """The values that a text names, of any slot of any domain, as often as it names them."""
    return [SPELLED[word] for word in words_of(text) if word in SPELLED]


def is_confirmation(text: str) -> bool:
    """Whether a clerk's text closes the conversation."""
    return "booked" in words_of(text)


def split_of(domain: str, goal: Mapping[str, str]) -> str:
    """The split that a combination of values belongs to: a tenth each is for validation and for test."""
    digest = hashlib.sha256(" ".join([domain, *goal.values()]).encode()).digest()
    return {0: "test", 1: "validation"}.get(digest[0] % 10, "train")


class Customer:
    """A customer at the desk: the "user" of a conversation in which the policy is the clerk, the "assistant".

    `split` is that of its goals. `domain` is one of DOMAINS, or "" for any of them.
    """

    def __init__(self, split: str = "train", domain: str = ""):
        if split not in SPLIT_SIZES or domain not in ("", *DOMAINS):
            raise ValueError(f"split {split!r}, domain {domain!r}; expected {[*SPLIT_SIZES]} and {['', *DOMAINS]}")
        self.split, self.among = split, [domain] if domain else list(DOMAINS)

    def reset(self, rng: random.Random) -> str:
        """Draw a goal and return the opening. What it says later depends on the replies and on this `rng` alone."""
        self.rng = rng = random.Random(int(rng.random() * 2**53))
        while True:
            self.domain = DOMAINS[_pick(rng, self.among)]
            self.goal = {slot: _pick(rng, VALUES[slot]) for slot in self.domain.slots}
            if split_of(self.domain.name, self.goal) == self.split:
                break
        slots = sorted(self.goal, key=lambda _: rng.random())
        opening = slots[: 1 + int(rng.random() * 3)]
        self.shy = slots[-1]  # told only when asked for
        self.told: dict[str, str] = {}  # the values said last
        self.to_correct, self.first = "", ""  # a slot of the opening, and the wrong value that is told first
        if rng.random() < CORRECTS:
            self.to_correct = opening[0]
            self.first = _pick(rng, [v for v in VALUES[opening[0]] if v != self.goal[opening[0]]])
        fragments = [self._tell(slot, self.domain.slots[slot]) for slot in self.goal if slot in opening]
        greeting = f"{_pick(rng, PHRASES['greeting'])} " if rng.random() < 0.5 else ""
        return f"{greeting}{_pick(rng, self.domain.opening)} {' '.join(fragments)}."

    def reply(self, messages: Sequence[Message]) -> str | None:
        """Answer the clerk's last message. None after a confirmation, and when the clerk has had all its turns."""
        replies = _replies(messages)
        if len(replies) >= TURNS or any(map(is_confirmation, replies)):
            return None
        asked = self._asked(replies[-1])[:ANSWERS] if replies else []
        if not asked:
            return _pick(self.rng, PHRASES["confused"])
        said = [self._repeat(slot) if slot in self.told else self._tell(slot) for slot in asked]
        others = [slot for slot in self.goal if slot not in self.told and slot != self.shy]
        if others and self.rng.random() < VOLUNTEERS:
            slot = _pick(self.rng, others)
            said.append(_pick(self.rng, PHRASES["more"]).format(self._tell(slot, self.domain.slots[slot])))
        # a goal can be known as soon as all of it has been told
        if self.to_correct and (len(self.told) == len(self.goal) or self.rng.random() < 0.5):
            said.append(self._correct())
        return " ".join(said)

    def score(self, messages: Sequence[Message]) -> float:
        """1.0 if the clerk booked exactly what was told, in time; else 0.0."""
        return float(not self._fault(messages))

    def describe(self) -> str:
        """The goal, for a person who plays the customer."""
        fragments = " ".join(text.format(self.goal[slot]) for slot, text in self.domain.slots.items())
        return self.domain.goal.format(fragments=fragments)

    def verdict(self, messages: Sequence[Message]) -> str:
        """A sentence on whether the clerk got it right, and if not, what was wrong."""
        fault = self._fault(messages)
        return (
            f"Failure: {fault}." if fault else f"Success: all was booked as wanted in {len(_replies(messages))} turns."
        )

    def follow(self, messages: Sequence[Message]) -> str:
        """Take a person's words for the customer's. Return the verdict once the conversation is over, "" before."""
        self.told = {}
        for text in (message["content"] for message in messages if message["role"] == "user"):
            for value in values_in(text):
                self.told |= {slot: value for slot in self.goal if value in VALUES[slot]}
        self.goal |= self.told  # a person may want something else
        replies = _replies(messages)
        over = len(replies) >= TURNS or any(map(is_confirmation, replies))
        return self.verdict(messages) if over else ""

    def _asked(self, text: str) -> list[str]:
        """The slots that a text asks for, in its order. If it has questions, nothing else is looked at."""
        words = words_of(" ".join(part for part in re.split(r"(?<=[.!?])", text) if part.endswith("?")) or text)
        places = {slot: [words.index(word) for word in ASKING[slot] if word in words] for slot in self.goal}
        return sorted((slot for slot in self.goal if places[slot]), key=lambda slot: min(places[slot]))

    def _tell(self, slot: str, text: str = "") -> str:
        self.told[slot] = self.first if slot == self.to_correct else self.goal[slot]
        return (text or _pick(self.rng, ANSWER_TEXTS[slot])).format(self.told[slot])

    def _repeat(self, slot: str) -> str:
        return _pick(self.rng, PHRASES["repeat"]).format(self.domain.slots[slot].format(self.told[slot]))

    def _correct(self) -> str:
        slot, self.to_correct = self.to_correct, ""
        self.told[slot] = self.goal[slot]
        return _pick(self.rng, PHRASES["correction"]).format(new=self.goal[slot])

    def _fault(self, messages: Sequence[Message]) -> str:
        """What is wrong with the first confirmation, "" if it is right. A lucky guess of what was not told is wrong."""
        replies = _replies(messages)
        number = next((i for i, text in enumerate(replies, start=1) if is_confirmation(text)), 0)
        if not number:
            return "nothing was booked"
        if number > TURNS:
            return f"the confirmation came in turn {number}, and the customer waits for {TURNS}"
        named = values_in(replies[number - 1])
        for slot, value in self.goal.items():
            wrong = [other for other in named if other in VALUES[slot] and other != value]
            name = NAMES.get(slot, [slot])[0]
            if slot not in self.told:
                return f"the {name} was not known yet" + (f", and {wrong[0]} is invented" if wrong else "")
            if wrong:
                return f"the {name} is {value}, not {wrong[0]}"
            if named.count(value) != 1:
                return f"the {name} is named more than once" if value in named else f"the {name} is missing"
        extra = [value for value in named if value not in self.goal.values()]
        return f"{extra[0]} was not wanted" if extra else ""


def _replies(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


# ---------------------------------------------------------------------------------------------------------------------
# Scripted conversations

IGNORES = 0.3  # share of conversations in which the clerk overhears corrections
ASSUMES = 0.9  # ... in which it does not ask for one slot, but invents its value
HASTY = 0.03  # probability at each turn that it closes, and invents what it does not know
NOTES = 0.5  # probability that a question begins with what the clerk has understood
FORGETS = 0.06  # ... that it asks for something that was said
SLIPS = 0.005  # probability that a value of the confirmation is another


class Clerk:
    """A scripted clerk, who understands a customer's texts. It makes mistakes, unless it is `perfect`."""

    def __init__(self, domain: Domain, rng: random.Random, perfect: bool = False):
        self.domain, self.rng, self.perfect = domain, rng, perfect
        self.ignores, self.assumes = self._errs(IGNORES), self._errs(ASSUMES)
        self.known: dict[str, str] = {}

    def reply(self, messages: Sequence[Message]) -> str:
        """Ask for what is missing, or confirm."""
        new = self.listen(messages[-1]["content"])
        missing = [slot for slot in self.domain.slots if slot not in self.known]
        wanted = [slot for slot in missing if not (self.assumes and slot == self.domain.assumed)]
        if self.known and self._errs(FORGETS):
            wanted = list(self.known)
        if not wanted or self._errs(HASTY):
            return self.confirm()
        slot = wanted[0] if self.rng.random() < 0.7 else _pick(self.rng, wanted)
        noted = " ".join(text.format(self.known[slot]) for slot, text in self.domain.slots.items() if slot in new)
        noted = f"{_pick(self.rng, PHRASES['noted'])} ".format(noted) if noted and self.rng.random() < NOTES else ""
        return noted + _pick(self.rng, QUESTIONS[slot])

    def listen(self, text: str) -> set[str]:
        """Note the values of a customer's text; return their slots. A value beside a known one corrects it."""
        named, heard = values_in(text), set()
        for slot in self.domain.slots:
            new = [value for value in named if value in VALUES[slot] and value != self.known.get(slot)]
            if new and not (slot in self.known and self.ignores):
                self.known[slot] = new[0]
                heard.add(slot)
        return heard

    def confirm(self) -> str:
        """The confirmation, with values from nowhere for what is not known."""
        fragments = [
            text.format(
                _pick(self.rng, VALUES[slot]) if slot not in self.known or self._errs(SLIPS) else self.known[slot]
            )
            for slot, text in self.domain.slots.items()
        ]
        return f"{_pick(self.rng, self.domain.booked)} {' '.join(fragments)}."

    def _errs(self, probability: float) -> bool:
        return self.rng.random() < probability and not self.perfect


def converse(customer: Customer, rng: random.Random, perfect: bool = False) -> list[Message]:
    """A conversation of a customer and a scripted clerk."""
    messages = [{"role": "user", "content": customer.reset(rng)}]
    clerk = Clerk(customer.domain, rng, perfect)
    while messages[-1]["role"] == "user":
        messages.append({"role": "assistant", "content": clerk.reply(messages)})
        if (text := customer.reply(messages)) is not None:
            messages.append({"role": "user", "content": text})
    return messages


def generate_desk(seed: int = 0) -> dict[str, list[dict]]:
    """Write the conversations of each split: rows {"messages": [...]}, no two with the same text.

    They have SPLIT_SIZES rows. The same seed gives the same conversations on every machine.
    """
    seen: set[str] = set()
    rows: dict[str, list[dict]] = {}
    for number, (split, size) in enumerate(SPLIT_SIZES.items()):
        rng, customer, rows[split] = random.Random(len(SPLIT_SIZES) * seed + number), Customer(split), []
        while len(rows[split]) < size:
            messages = converse(customer, rng)
            text = "\n".join(message["content"] for message in messages)
            if text not in seen:
                seen.add(text)
                rows[split].append({"messages": messages})
    return rows


def main() -> None:
    """Print a few conversations."""
    parser = argparse.ArgumentParser(description="Print conversations of customers and the scripted clerk.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the conversations")
    parser.add_argument("--split", choices=list(SPLIT_SIZES), default="train", help="split of the goals")
    parser.add_argument("--limit", type=int, default=5, help="how many")
    args = parser.parse_args()
    rng, customer = random.Random(args.seed), Customer(args.split)
    for number in range(max(args.limit, 0)):
        messages = converse(customer, rng)
        print(f"--- {args.split} {number}: {customer.describe()}")
        for message in messages:
            print(f"{'customer' if message['role'] == 'user' else 'clerk':>10}  {message['content']}")
        print(f"{'':>10}  {customer.verdict(messages)}")


if __name__ == "__main__":
    main()
