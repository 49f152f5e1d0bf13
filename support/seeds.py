"""Runs that differ by their seed alone: which they are, and what they say together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from support.config import NOT_COMPUTED

MANY = 5  # seeds, from which on the interquartile mean is taken
RESAMPLES = 2000


def settings_but_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change what a run computes, without its seed."""
    return {name: value for name, value in config.items() if name != "seed" and name not in NOT_COMPUTED}


def group_by_settings(configs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the places of the runs that differ by their seed alone, a list for each setting.

    Settings keep the order of their first run. A run without settings stays alone, and so does one with the seed of
    another run of its setting.
    """
    groups: dict[str, list[int]] = {}
    for place, config in enumerate(configs):
        key = json.dumps(settings_but_seed(config), sort_keys=True, default=str)
        seeds = [configs[i].get("seed") for i in groups.get(key, ())]
        if not config or config.get("seed") in seeds:
            key += f" {place}"
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each of several settings what tells it from the others, by option."""
    settings = [settings_but_seed(config) for config in configs]
    names = dict.fromkeys(name for values in settings for name in values)
    differ = [n for n in names if any(values.get(n) != settings[0].get(n) for values in settings)]
    return [{name: values.get(name) for name in differ} for values in settings]


def over_seeds(values: Sequence[float], half_widths: Iterable[float] = ()) -> tuple[float, float, float]:
    """Return the centre of the seeds' values and its 95% interval, as (centre, low, high).

    Fewer than MANY seeds: the mean, and Student's t. Otherwise the interquartile mean, and a percentile bootstrap over
    the seeds, which is what rliable computes for one task (Agarwal et al. 2021). `half_widths` are those of the seeds'
    own intervals over the samples. All seeds answer the same samples, so more seeds do not narrow that part: the mean
    half width is added in squares to that over the seeds.
    """
    from scipy import stats

    numbers = np.asarray(values, float)
    centre, low, high = (float(v[0]) for v in centre_of(numbers[:, None]))
    if 1 < len(numbers) < MANY:
        half = float(stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
        low, high = centre - half, centre + half
    widths = list(half_widths)
    of_samples = sum(widths) / len(widths) if widths else 0.0
    return centre, centre - math.hypot(centre - low, of_samples), centre + math.hypot(high - centre, of_samples)


def centre_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return centre, low and high (P) of curves (seeds, P).

    Fewer than MANY seeds: the mean, the lowest and the highest. Otherwise the interquartile mean and its 95% interval.
    """
    if len(values) < MANY:
        return values.mean(0), values.min(0), values.max(0)
    from scipy import stats

    def interquartile_mean(array: np.ndarray, axis: int) -> np.ndarray:
        return stats.trim_mean(array, 0.25, axis=axis)

    found = stats.bootstrap(
        (values,), interquartile_mean, axis=0, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    return interquartile_mean(values, 0), found.confidence_interval.low, found.confidence_interval.high
