"""Scores of the reward model that PPO was trained on, and of one that it never saw, by the distance from the start.

    python benchmarks/overoptimisation.py runs/one runs/two --trained-on rm_a --unseen rm_b --output curve.png

Both are parts of the runs' reward, the unseen one with weight 0 (docs/preferences.md). The distance is the root of the
KL divergence of a whole reply from the supervised model, in nats, as in Gao et al. (2023). Scores are in deviations
from the supervised model's mean. Where the first curve rises and the second falls, the policy pleases the first model's
errors.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from pydantic import PositiveInt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from support.config import command_line  # noqa: E402
from support.errors import UserError, run_script  # noqa: E402
from support.files import is_number  # noqa: E402
from support.live_display import read_rows  # noqa: E402
from support.options import check_values  # noqa: E402
from support.paths import check_file_to_write, check_run  # noqa: E402


@dataclass
class CurveConfig:
    """Runs, and the two reward models."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs with the same reward, such as several seeds."""
    trained_on: str = "rm_a"
    """Metric of the reward model that was rewarded."""
    unseen: str = "rm_b"
    """Metric of the reward model that was measured alone."""
    bins: PositiveInt = 8
    """Rows of the table, each of as many updates as another."""
    output: str = ""
    """PNG of both curves."""

    def check(self) -> None:
        """UserError without a run, for values out of range, and for an output that cannot be written."""
        check_values(self)
        check_file_to_write("output", self.output)
        if not self.runs:
            raise UserError("no run was given; expected the folders of one or several runs, such as runs/preferred.")


def points_of(run: Path, trained_on: str, unseen: str) -> np.ndarray:
    """Return for each update (N, 4): root of the KL of a reply, both scores in deviations, and the update's number.

    Updates whose figures are not all finite are left out. UserError for a run that did not measure both models.
    """
    check_run(run)
    rows = read_rows(run / "metrics.jsonl", sys.maxsize)
    states = sorted(run.glob("checkpoints/*/progress.json"))
    scales = json.loads(states[-1].read_text(encoding="utf-8"))["reward_scales"] if states else {}
    for name in (trained_on, unseen):
        if name not in scales:
            raise UserError(f"'{run}' has no reward model '{name}'; it has {', '.join(scales) or 'none'}.")
    needed = (trained_on, unseen, "kl_div", "mean_output_length")
    rows = [row for row in rows if all(is_number(row.get(name)) for name in needed)]
    if not rows:
        raise UserError(
            f"'{run}' has no update with finite {', '.join(needed)}; expected a run whose reward has both models."
        )
    points = []
    for row in rows:
        scores = [(row[name] - scales[name][0]) / scales[name][1] for name in (trained_on, unseen)]
        points.append([max(0.0, row["kl_div"] * row["mean_output_length"]) ** 0.5, *scores, row["update"]])
    return np.array(points)


def main() -> None:
    config = command_line(CurveConfig, __doc__)
    config.check()
    runs = [points_of(run, config.trained_on, config.unseen) for run in config.runs]
    points = np.concatenate(runs)
    order = np.argsort(points[:, 0], kind="stable")
    print(f"| root of KL, nats | {config.trained_on} (trained on) | {config.unseen} (unseen) | updates |")
    print("|---|---|---|---|")
    for chunk in np.array_split(points[order], min(config.bins, len(points))):
        distance, trained, unseen, _ = chunk.mean(0)
        print(f"| {distance:.2f} | {trained:+.2f} | {unseen:+.2f} | {len(chunk)} |")
    if config.output:
        draw(points[order], config)


def draw(points: np.ndarray, config: CurveConfig) -> None:
    """Draw each update as a dot, and the mean of its neighbours as a line, for both models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=150)
    width = max(1, len(points) // 8)
    for column, name in ((1, f"{config.trained_on} (trained on)"), (2, f"{config.unseen} (unseen)")):
        [line] = axes.plot(
            *(np.convolve(points[:, k], np.ones(width) / width, "valid") for k in (0, column)), label=name
        )
        axes.plot(points[:, 0], points[:, column], ".", color=line.get_color(), alpha=0.35, markersize=4)
    axes.set_xlabel("root of the KL divergence of a reply, nats")
    axes.set_ylabel("score, deviations from the supervised model")
    axes.legend(frameon=False)
    figure.tight_layout()
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output)
    print(f"written to {config.output}")


if __name__ == "__main__":
    run_script(main)
