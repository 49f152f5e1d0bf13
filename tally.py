"""Count the choices between two models: wins, ties and losses of each pair of models in a file.

    python chat.py A --versus B --web --blind            # writes choices to preferences.jsonl
    python tally.py preferences.jsonl                    # who won how often, with an exact 95% interval
    python tally.py preferences.jsonl --by-prompt --output tally.json

A and B are the two models of a pair in the order of their names. The share of wins leaves ties out. Its interval is
that of Clopper and Pearson, and the p-value is that of the exact two-sided binomial test. Both take the choices as
independent of each other.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from support.config import command_line
from support.errors import UserError, run_script
from support.files import write_json
from support.paths import check_file_to_write
from support.tally import Tally, one_line, read_choices, tallies


@dataclass
class TallyConfig:
    """Count the choices between two models."""

    preferences: tyro.conf.Positional[str]
    """File of choices that chat.py wrote with --versus and --web; those with --blind are fairer."""
    by_prompt: bool = False
    """List each prompt (the user's last words), how often it was asked, and who won."""
    output: str = ""
    """JSON file to write the tally to, with all prompts."""

    def check(self) -> None:
        """Raise UserError for an output that cannot be written or is the file of choices itself."""
        check_file_to_write("output", self.output)
        if self.output and os.path.realpath(self.output) == os.path.realpath(self.preferences):
            raise UserError(f"output '{self.output}' is the file of choices itself; give another name.")


def describe(tally: Tally, by_prompt: bool) -> list[str]:
    """Return the lines about a pair of models."""
    lines = ["", *(f"{name}: {one_line(model, 200)}" for name, model in zip("AB", tally.models))]
    lines += [f"  {sentence}" for sentence in tally.sentences()]
    if by_prompt:
        lines.append("  asked  A won   ties  B won  prompt")
        for prompt, count in tally.by_prompt():
            numbers = "  ".join(f"{n:5,}" for n in (count.asked, count.wins, count.ties, count.losses))
            lines.append(f"  {numbers}  {one_line(prompt) or '(no words)'}")
    return lines


def main() -> None:
    config = command_line(TallyConfig, __doc__)
    config.check()
    sys.stdout.reconfigure(errors="replace")
    choices = read_choices(config.preferences)
    found = tallies(choices.rows)
    lines = [f"{config.preferences}: {len(choices.rows):,} choice{'s' * (len(choices.rows) != 1)}"]
    lines += [f"note: {note}" for note in choices.notes()]
    lines += [line for tally in found for line in describe(tally, config.by_prompt)]
    if config.output:
        pairs = [tally.as_dict() for tally in found]
        counted = dict(choices=len(choices.rows), skipped=dict(choices.skipped), pairs=pairs)
        write_json(Path(config.output), dict(file=config.preferences, **counted))
        lines += ["", f"written to {config.output}"]
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_script(main)
