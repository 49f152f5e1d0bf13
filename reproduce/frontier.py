"""Read the evaluations of one model at several temperatures, and choose a temperature.

    python reproduce/frontier.py runs/reproduce/validation/frontier/sft --best meteor
    python reproduce/frontier.py runs/reproduce/validation/frontier/ppo-0 --like runs/reproduce/validation/frontier/sft

reproduce.sh writes the folders, a file for each temperature and top-p (`t0.8-p1.0.json`). `--best` prints the
temperature at which a metric is highest. `--like` prints the temperature at which distinct-2 is that of another model
at temperature 1, by linear interpolation between the temperatures on either side.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.config import command_line
from support.errors import UserError, run_script

POINT = re.compile(r"t(?P<temperature>[\d.]+)-p(?P<top_p>[\d.]+)")


@dataclass
class FrontierConfig:
    """What is read, and what is asked."""

    folder: tyro.conf.Positional[Path]
    """Evaluations of one model."""
    best: str = ""
    """Metric whose best temperature is printed."""
    like: Path | None = None
    """Evaluations of another model, whose distinct-2 at temperature 1 is to be reached."""


def read_points(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations in a folder by top-p and temperature, highest top-p first.

    Each has temperature, top_p, samples, metrics, and the difference from the supervised model at temperature 1.
    UserError if there is none, or one that cannot be read.
    """
    points = []
    for file in folder.glob("t*.json"):
        try:
            place = {name: float(value) for name, value in POINT.fullmatch(file.stem).groupdict().items()}
            result = json.loads(file.read_text(encoding="utf-8"))
            known = {"samples": result["settings"]["samples"], "metrics": result["policy"]}
            points.append(place | known | {"difference": result["difference"], "win_rate": result["win_rate"]})
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"'{file}' is not an evaluation of reproduce.sh ({type(error).__name__}).") from error
    if not points:
        split = folder.absolute().parent.parent.name  # OUT/SPLIT/frontier/NAME
        stage = f"`SPLIT={split} bash reproduce/reproduce.sh frontier-{folder.name}`"
        raise UserError(f"'{folder}' has no evaluations; run {stage} first.")
    return sorted(points, key=lambda point: (-point["top_p"], point["temperature"]))


def without_top_p(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points at top-p 1, where reproduce.sh compares two models. UserError if there is none."""
    curve = [point for point in points if point["top_p"] == 1.0]
    if not curve:
        raise UserError("there is no evaluation at top-p 1, where the models are compared; add 1.0 to TOP_PS.")
    return curve


def best_temperature(points: list[dict[str, Any]], metric: str) -> float:
    """Return the temperature at which a metric is highest, at top-p 1. UserError for an unknown metric."""
    curve = without_top_p(points)
    values = [point["metrics"].get(metric) for point in curve]
    if None in values:
        known = ", ".join(name for name, value in curve[0]["metrics"].items() if value is not None)
        raise UserError(f"best is '{metric}', which the evaluations do not have; expected one of {known}.")
    return curve[int(np.argmax(values))]["temperature"]


def temperature_like(points: list[dict[str, Any]], distinct2: float) -> float:
    """Return the temperature at which distinct-2 has a value, between two points at top-p 1 that have less and more.

    If no point has less, or none has more, it is the lowest or the highest temperature.
    """
    curve = without_top_p(points)
    values = np.maximum.accumulate([point["metrics"]["distinct2"] for point in curve])
    return float(np.interp(distinct2, values, [point["temperature"] for point in curve]))


def main() -> None:
    config = command_line(FrontierConfig, __doc__)
    if bool(config.best) == bool(config.like):
        raise UserError("expected either a metric (best) or a folder (like), and not both.")
    points = read_points(config.folder)
    if config.like is None:
        print(best_temperature(points, config.best))
        return
    start = [point for point in without_top_p(read_points(config.like)) if point["temperature"] == 1.0]
    if not start:
        raise UserError(f"'{config.like}' has no evaluation at temperature 1; add 1.0 to TEMPERATURES of reproduce.sh.")
    print(round(temperature_like(points, start[0]["metrics"]["distinct2"]), 3))


if __name__ == "__main__":
    run_script(main)
