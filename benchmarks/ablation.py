"""What each measure against waste brings: the whole loop with all, without one at a time, without any; interleaved.

python benchmarks/ablation.py --size S --rounds 3
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from interleaved import WorkOptions, interleave, medians, ratios, run_throughput, table, with_range
from throughput import MEASURES, Measure

from support.errors import run_script


@dataclass
class AblationConfig(WorkOptions):
    """What is run."""

    measures: tuple[Measure, ...] = tuple(MEASURES)
    """Measures to leave out, one at a time and then all."""


def ablate(config: AblationConfig) -> str:
    """Return a table: medians over the rounds, and each variant's speed over that of all measures in the same round."""
    variants = {"all measures": (), **{f"without {m}": (m,) for m in config.measures}, "without any": config.measures}
    options = {name: ["--without", *left_out] if left_out else [] for name, left_out in variants.items()}
    results = interleave(variants, config.rounds, lambda name: run_throughput(config, *options[name]))
    rows = []
    for name, runs in results.items():
        speed = with_range(ratios(runs, results["all measures"], "steps_per_s"))
        rows.append([name, *medians(runs, "steps_per_s"), speed, *medians(runs, "update_s", "peak_rss_mb")])
    return table([config.size, "tokens/s", "speed against all", "update s", "peak RSS MB"], rows)


if __name__ == "__main__":
    run_script(lambda: print(ablate(tyro.cli(AblationConfig, description=__doc__))))
