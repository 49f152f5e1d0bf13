"""What the benchmarks share: work in processes of its own, interleaved, and tables of medians and ratios."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
Figures = dict[str, float]  # what throughput.py measures, by its names
FORMATS = {"mfu": ".2f", "peak_rss_mb": ".0f", "positions_per_s": ".0f"}


@dataclass
class WorkOptions:
    """What is run."""

    size: Literal["tiny", "S", "M"] = "S"
    """As throughput.py's."""
    rounds: int = 3
    """Times that each variant runs."""
    updates: int = 3
    """Updates of a run; the first is dropped."""
    data_path: str = ""
    """As throughput.py's."""


def run_process(name: str, command: list[str], **environment: str) -> str:
    """Run a command and return what it prints. UserError with its last lines if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-20:])
        raise UserError(f"{name} ended with status {done.returncode}:\n{tail}")
    return done.stdout


def run_json(name: str, command: list[str], **environment: str) -> Figures:
    """Run a command and parse the last line that is a JSON object."""
    lines = [line for line in run_process(name, command, **environment).splitlines() if line.startswith("{")]
    if not lines:
        raise UserError(f"{name} printed no figures; expected a JSON object in its last line.")
    return json.loads(lines[-1])


def run_throughput(config: WorkOptions, *options: str) -> Figures:
    """Return what throughput.py measures with these options in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--json", "--size", config.size]
    command += ["--updates", str(config.updates), "--data-path", config.data_path, *options]
    return run_json("throughput.py", command)


def interleave(variants: Iterable[str], rounds: int, run: Callable[[str], Figures]) -> dict[str, list[Figures]]:
    """Run each variant once in every round, so that a busy hour of the machine affects all of them."""
    results: dict[str, list[Figures]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, runs in results.items():
            runs.append(run(name))
            print(f"{name}: {runs[-1]}", file=sys.stderr, flush=True)
    return results


def medians(runs: list[Figures], *names: str) -> list[str]:
    """Format the median of each figure; one that was not measured is blank."""
    shown = {n: f"{statistics.median(r[n] for r in runs):{FORMATS.get(n, '.3g')}}" for n in names if n in runs[0]}
    return [shown.get(n, "") for n in names]


def ratios(runs: list[Figures], others: list[Figures], name: str) -> list[float]:
    """Divide a figure by that of the others, round by round."""
    return [run[name] / other[name] for run, other in zip(runs, others)]


def with_range(values: list[float], digits: str = ".2f") -> str:
    return f"{statistics.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def table(heading: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heading, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heading), *lines[1:]])
