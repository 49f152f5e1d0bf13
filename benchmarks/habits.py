"""Count habits of replies: first words, exclamation marks, three words said twice, replies that were cut off.

    python eval_metrics.py --model-path models/mine --replies mine.jsonl
    python eval_metrics.py --model-path runs/one --replies one.jsonl
    python benchmarks/habits.py mine.jsonl one.jsonl

The last row is that of the human replies in the first file. A policy that games a reward often has a habit that humans
do not have.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from support.config import command_line  # noqa: E402
from support.errors import UserError, run_script  # noqa: E402


@dataclass
class HabitsConfig:
    """Files of replies."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files that eval_metrics.py --replies wrote."""


def habits_of(texts: Sequence[str]) -> str:
    """Return the cells of a row: the three commonest first words, and the replies with an exclamation mark."""
    words = [text.lower().split()[:1] for text in texts]
    first = Counter(word[0].strip(",.!?") for word in words if word).most_common(3)
    shown = ", ".join(f"{word} {count / len(texts):.0%}" for word, count in first)
    return f"{shown} | {sum('!' in text for text in texts) / len(texts):.1%}"


def main() -> None:
    config = command_line(HabitsConfig, __doc__)
    if not config.files:
        raise UserError("no file was given; expected files of replies that eval_metrics.py --replies wrote.")
    from reproduce.results import habits, read

    for file in config.files:
        if not file.is_file():
            raise UserError(f"there is no file '{file}'; expected replies that eval_metrics.py --replies wrote.")
    print("| replies | first words | with '!' | three words twice | cut off |\n|---|---|---|---|---|")
    for file in config.files:
        found = habits(file)
        texts = [row["text"] for row in read(file)[1:]]
        print(f"| {file.stem} | {habits_of(texts)} | {found['repeating']:.1%} | {found['at_limit']:.1%} |")
    print(f"| human | {habits_of([row['reply'] for row in read(config.files[0])[1:]])} | | |")


if __name__ == "__main__":
    run_script(main)
