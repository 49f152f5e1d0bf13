"""What each measure against waste brings: the whole loop with all, without one at a time, without any; interleaved.

python benchmarks/ablation.py --size S --rounds 3
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from throughput import Measure, run_apart

from support.errors import run_script


@dataclass
class AblationConfig:
    """What is run."""

    size: Literal["tiny", "S", "M"] = "S"
    """As throughput.py's."""
    rounds: int = 3
    """Times that each variant runs."""
    updates: int = 3
    """Updates of a run; the first is dropped."""
    measures: tuple[Measure, ...] = get_args(Measure)
    """Measures to do without, one at a time."""
    data_path: str = ""
    """As throughput.py's."""


def label(without: str) -> str:
    return "without any" if " " in without else f"without {without}" if without else "all measures"


def ablate(config: AblationConfig) -> str:
    """The table: medians over the rounds, and each variant's speed over that of all measures in the same round."""
    common = ["--size", config.size, "--updates", str(config.updates), "--data-path", config.data_path]
    every = " ".join(config.measures)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ("", *config.measures, every)}
    for _ in range(config.rounds):
        for name, runs in results.items():
            runs.append(run_apart(*common, *(["--without", *name.split()] if name else [])))
            print(f"{label(name)}: {runs[-1]['steps_per_s']} tokens/s", file=sys.stderr, flush=True)
    lines = [f"| {config.size} | tokens/s | speed against all | update s | peak RSS MB |", "|---|---|---|---|---|"]
    for name, runs in results.items():

        def median(key, runs=runs):
            return statistics.median(run[key] for run in runs)

        ratios = [run["steps_per_s"] / whole["steps_per_s"] for run, whole in zip(runs, results[""])]
        lines.append(
            f"| {label(name)} | {median('steps_per_s'):.3g} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {median('update_s'):.3g} | {median('peak_rss_mb'):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(lambda: print(ablate(tyro.cli(AblationConfig, description=__doc__))))
