"""The choices between two models, counted: how often one model's reply was better than another's.

    choices = read_choices("preferences.jsonl")    # what `python chat.py A --versus B --web --blind` wrote
    for tally in tallies(choices.rows):
        print(*tally.sentences(), sep="\\n")

A row names the models in MODEL_COLUMNS beside prompt, chosen and rejected. Without --blind it has no "tie". In a tie,
chosen and rejected are the replies of the two models in the order in which chat.py was given them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from support.errors import UserError, need_package

COLUMNS = ("prompt", "chosen", "rejected")
MODEL_COLUMNS = ("chosen_model", "rejected_model", "tie")
HOW = "python chat.py A --versus B --web --blind writes rows that can be counted"
TORN = "cut short at the end of the file"
NO_JSON = "not a JSON object"
NO_MODELS = "without chosen_model and rejected_model (an earlier version wrote none)"
SAME_MODEL = "with the same model on both sides"
NO_TIE = "whose 'tie' is neither true nor false"


class Choice(NamedTuple):
    """One choice between the replies of two models."""

    chosen: str  # the model; in a tie the order means nothing
    rejected: str
    tie: bool
    prompt: str  # the user's last words


class Choices(NamedTuple):
    """What a file holds."""

    rows: list[Choice]
    skipped: Counter[str]  # lines that were not counted, by reason
    unread: set[str]  # columns that mean nothing here
    in_view: int = 0  # rows of a page that showed the names of the models

    def notes(self) -> list[str]:
        """Sentences on what was left out."""
        notes = []
        if count := self.skipped.total():
            lines = "1 line was" if count == 1 else f"{count:,} lines were"
            notes.append(f"{lines} not counted: {reasons(self.skipped)}.")
        if self.in_view:
            choices = "1 choice was" if self.in_view == 1 else f"{self.in_view:,} choices were"
            notes.append(f"{choices} made with the names of the models in view (without --blind).")
        if self.unread:
            notes.append(f"columns that were not read: {', '.join(sorted(self.unread))}.")
        return notes


def reasons(skipped: Counter[str]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in skipped.most_common())


def read_choices(path: str | Path) -> Choices:
    """Read the choices in a file of preferences. Lines that are no choice are counted by reason.

    Raises UserError for a file that cannot be read or holds no choice between two models.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise UserError(f"there is no file '{path}'; {HOW}.") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.") from error
    choices, in_view = Choices([], Counter(), set()), 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a writer that was killed leaves a last line without its end
            choices.skipped[TORN if number == len(lines) else NO_JSON] += 1
            continue
        if why := _unusable(row):
            choices.skipped[why] += 1
            continue
        choices.rows.append(Choice(row["chosen_model"], row["rejected_model"], row.get("tie", False), last_words(row)))
        in_view += "tie" not in row
        choices.unread.update(row.keys() - {*COLUMNS, *MODEL_COLUMNS})
    if not choices.rows and not choices.skipped:
        raise UserError(f"'{path}' is empty: no choice was written to it yet.")
    if not choices.rows:
        raise UserError(f"'{path}' holds no choice between two models: {reasons(choices.skipped)}. {HOW}.")
    return choices._replace(in_view=in_view)


def _unusable(row: Any) -> str:
    """Why a line cannot be counted; "" if it can."""
    if not isinstance(row, dict):
        return NO_JSON
    models = row.get("chosen_model"), row.get("rejected_model")
    if not all(isinstance(model, str) and model for model in models):
        return NO_MODELS
    if models[0] == models[1]:
        return SAME_MODEL
    return "" if isinstance(row.get("tie", False), bool) else NO_TIE


def last_words(row: dict[str, Any]) -> str:
    """The last turn of the user in a row's prompt, which is a list of messages or a text; "" if there is none."""
    prompt = row.get("prompt")
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    said = [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
    return said[-1].strip() if said and isinstance(said[-1], str) else ""


@dataclass
class Count:
    """Comparisons of two models, A and B."""

    wins: int = 0  # of A
    ties: int = 0
    losses: int = 0

    @property
    def asked(self) -> int:
        return self.wins + self.ties + self.losses

    def add(self, choice: Choice, model: str) -> None:
        """Count a choice from the side of `model`."""
        if choice.tie:
            self.ties += 1
        elif choice.chosen == model:
            self.wins += 1
        else:
            self.losses += 1


@dataclass
class Tally(Count):
    """All comparisons of two models, and those of each prompt."""

    models: tuple[str, str] = ("A", "B")
    prompts: dict[str, Count] = field(default_factory=dict)

    @property
    def decided(self) -> int:
        return self.wins + self.losses

    def test(self) -> dict[str, Any]:
        """The share of wins among decided comparisons, its exact 95% interval (Clopper and Pearson, 1934), and the
        exact two-sided p-value of "both win equally often"; None for each where nothing is decided."""
        if not self.decided:
            return dict(share=None, interval=None, p_value=None)
        need_package("scipy", "the interval of a tally")
        from scipy.stats import binomtest  # here, because it takes a second, and --help need not wait

        found = binomtest(self.wins, self.decided, 0.5)
        low, high = map(float, found.proportion_ci(0.95, method="exact"))
        return dict(share=self.wins / self.decided, interval=[low, high], p_value=float(found.pvalue))

    def by_prompt(self) -> list[tuple[str, Count]]:
        """Prompts, those asked most often first."""
        return sorted(self.prompts.items(), key=lambda item: (-item[1].asked, item[0]))

    def sentences(self) -> list[str]:
        """The tally in words."""
        comparisons = f"{self.asked:,} comparison{'s' * (self.asked != 1)}"
        counts = f"A won {self.wins:,}, B won {self.losses:,}, {self.ties:,} tie{'s' * (self.ties != 1)}"
        lines = [f"{comparisons}: {counts}."]
        if self.decided:
            test = self.test()
            low, high = test["interval"]
            lines.append(
                f"A won {test['share']:.1%} of {self.decided:,} decided, 95% interval {low:.1%} to {high:.1%}; "
                f"exact two-sided p = {test['p_value']:.2g} for equal chances."
            )
        elif self.asked:
            lines.append("Nothing was decided, so there is no share of wins.")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The tally as JSON holds it."""
        prompts = [dict(prompt=prompt, asked=count.asked, **vars(count)) for prompt, count in self.by_prompt()]
        counts = dict(wins=self.wins, ties=self.ties, losses=self.losses)
        return dict(models=list(self.models), **counts, **self.test(), prompts=prompts)


def tally_of(choices: Iterable[Choice], models: tuple[str, str]) -> Tally:
    """Count the choices between these two models; others are left out."""
    tally = Tally(models=models)
    for choice in choices:
        if {choice.chosen, choice.rejected} == set(models):
            tally.add(choice, models[0])
            tally.prompts.setdefault(choice.prompt, Count()).add(choice, models[0])
    return tally


def tallies(choices: Iterable[Choice]) -> list[Tally]:
    """A tally for each pair of models, the two of a pair in the order of their names."""
    by_pair: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices:
        one, two = sorted((choice.chosen, choice.rejected))
        by_pair.setdefault((one, two), []).append(choice)
    return [tally_of(rows, models) for models, rows in sorted(by_pair.items())]


def one_line(text: str, most: int = 70) -> str:
    """A prompt for a line of a list: without control characters, and cut where it is long."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else text[: most - 1] + "…"
