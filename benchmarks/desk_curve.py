"""Draw the share of conversations of the desk that succeed, during the training of one run or several.

    python benchmarks/desk_curve.py runs/desk --output desk.png

Each run has a curve of its own color.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.config import command_line
from support.errors import UserError, run_script


@dataclass
class CurveConfig:
    """What is drawn."""

    runs: Annotated[list[Path], tyro.conf.Positional]
    """Folders of runs with --partner desk."""
    output: Path = Path("desk.png")
    """The picture."""


def main() -> None:
    config = command_line(CurveConfig, __doc__)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    from report import load_runs, running_mean

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for run in load_runs(config.runs):
        if not run.metrics or "partner" not in run.metrics[0]:
            raise UserError(f"'{run.folder}' is no run with the reward 'partner'; expected one with --partner desk.")
        steps = [row["env_steps"] for row in run.metrics]
        values = [row["partner"] for row in run.metrics]
        [line] = axes.plot(steps, running_mean(values), label=run.name)
        axes.plot(steps, values, ".", markersize=3, alpha=0.4, color=line.get_color())
    axes.set(ylim=(0, 1), xlabel="tokens of the policy", title="conversations that succeed, of each rollout")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(config.output, dpi=110)
    print(f"written to {config.output}")


if __name__ == "__main__":
    run_script(main)
