"""How cost grows: with the prompt, with the rollout, with the reply.

python benchmarks/scaling.py --size S
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from throughput import run_apart

from support.errors import run_script


@dataclass
class ScalingConfig:
    """What is run."""

    size: Literal["tiny", "S", "M"] = "S"
    """As throughput.py's."""
    prompts: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Prompt lengths, in tokens."""
    rollouts: tuple[int, ...] = (16, 64, 256)
    """Dialogues in a rollout."""
    replies: tuple[int, ...] = (20, 50, 100, 200)
    """Lengths of a reply, in tokens."""
    updates: int = 2
    """Updates of a run; the first is dropped."""
    data_path: str = ""
    """As throughput.py's."""


def scale(config: ScalingConfig) -> str:
    """Three tables. `positions/s` counts every position of prompt and reply once for each generated reply."""
    options = {
        "prompt tokens": [(n, ["--full-prompts", "--max-prompt-tokens", str(n)]) for n in config.prompts],
        "dialogues": [(n, ["--env-num", str(n)]) for n in config.rollouts],
        "reply tokens": [(n, ["--max-new-tokens", str(n), "--env-num", "16"]) for n in config.replies],
    }
    common = ["--size", config.size, "--updates", str(config.updates), "--data-path", config.data_path]
    tables = []
    for axis, runs in options.items():
        rows = [f"| {axis} | tokens/s | positions/s | MFU | rollout s | update s | peak RSS MB |", "|" + "---|" * 7]
        for n, extra in runs:
            r = run_apart(*common, *extra)
            print(r, file=sys.stderr, flush=True)
            positions = r["steps_per_s"] * (r["prompt_tokens"] + r["reply_tokens"]) / r["reply_tokens"]
            rows.append(
                f"| {n} | {r['steps_per_s']:.3g} | {positions:.0f} | {r['mfu']:.2f} | {r['rollout_s']:.3g} "
                f"| {r['update_s']:.3g} | {r['peak_rss_mb']:.0f} |"
            )
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    run_script(lambda: print(scale(tyro.cli(ScalingConfig, description=__doc__))))
