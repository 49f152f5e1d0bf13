"""How well replies to the built-in dialogues can score: those of an oracle that knows the script, and the human ones.

    python eval_metrics.py --model-path builtin --replies replies.jsonl
    python benchmarks/ceiling.py replies.jsonl
    python eval_metrics.py --model-path oracle.jsonl --baseline-path replies.jsonl --no-perplexity
    python eval_metrics.py --model-path human.jsonl --baseline-path replies.jsonl --no-perplexity

The oracle knows situation, values and plan of each dialogue. It says one of the lines that can follow, as the script
would. So it differs from the human reply where the script has a choice. It writes oracle.jsonl and human.jsonl: the
file of replies, with other replies.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.builtin_corpus import Draw, draw_corpus, next_line, say
from support.errors import UserError, run_script


@dataclass
class CeilingConfig:
    """What is written."""

    replies: tyro.conf.Positional[str]
    """File that eval_metrics.py --replies wrote, of built-in dialogues."""
    split: str = "test"
    """Their split."""
    seed: int = 0
    """Seed of the oracle."""


def oracle(rng: random.Random, draw: Draw, turn: int) -> str:
    """Say what could be said at a turn, 0 the first, by somebody who knows the script."""
    line = next_line(rng, draw.situation, draw.walk[:turn], draw.length)
    return say(rng, line or draw.walk[turn], draw.slots[turn])


def main(config: CeilingConfig) -> None:
    """Write both files to the working folder."""
    try:
        head, *lines = Path(config.replies).read_text(encoding="utf-8").rstrip("\n").split("\n")
        rows = [json.loads(line) for line in lines]
        draws = draw_corpus()[config.split]
        known = all(draws[row["dialogue"]].row["dialog"][row["utterance"]] == row["reply"] for row in rows)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"'{config.replies}' is not a file of replies that eval_metrics.py wrote ({error}).") from error
    if not known:
        raise UserError(f"'{config.replies}' answers other dialogues than split '{config.split}' of the built-in ones.")
    rng = random.Random(config.seed)
    texts = {
        "oracle.jsonl": [oracle(rng, draws[row["dialogue"]], row["utterance"]) for row in rows],
        "human.jsonl": [row["reply"] for row in rows],
    }
    for name, replies in texts.items():
        changed = [json.dumps(row | {"text": text}, ensure_ascii=False) for row, text in zip(rows, replies)]
        Path(name).write_text("\n".join([head, *changed]) + "\n", encoding="utf-8")
        print(f"{name}: {len(replies)} replies")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(CeilingConfig, description=__doc__)))
