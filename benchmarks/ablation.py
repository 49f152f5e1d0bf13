"""What each measure against waste brings: the whole loop with all of them, and without one at a time, interleaved.

python benchmarks/ablation.py --size S --rounds 3
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from throughput import Measure

from common import UserError, run_script


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


def run_once(config: AblationConfig, without: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).with_name("throughput.py")), "--json"]
    command += ["--size", config.size, "--updates", str(config.updates), "--data-path", config.data_path]
    done = subprocess.run(command + (["--without", without] if without else []), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"throughput.py ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ablate(config: AblationConfig) -> str:
    """The table: medians over the rounds, and each variant's speed over that of all measures in the same round."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ("", *config.measures)}
    for _ in range(config.rounds):
        for name, runs in results.items():
            runs.append(run_once(config, name))
            print(f"{name or 'all measures'}: {runs[-1]['steps_per_s']} tokens/s", file=sys.stderr, flush=True)
    lines = [f"| {config.size} | tokens/s | speed against all | update s | peak RSS MB |", "|---|---|---|---|---|"]
    for name, runs in results.items():
        median = lambda key, runs=runs: statistics.median(run[key] for run in runs)
        ratios = [run["steps_per_s"] / whole["steps_per_s"] for run, whole in zip(runs, results[""])]
        lines.append(
            f"| {'without ' + name if name else 'all measures'} | {median('steps_per_s'):.3g} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {median('update_s'):.3g} | {median('peak_rss_mb'):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(lambda: print(ablate(tyro.cli(AblationConfig, description=__doc__))))
