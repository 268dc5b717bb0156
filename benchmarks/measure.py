"""Interleaved sampling: what disturbs the machine meets all engines alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

LEAST_ROUNDS, MOST_ROUNDS = 5, 200


def interleaved(samplers: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Call every sampler once a round, after one round to warm up; return the samples of each.

    Nothing waits in between: they work on one team of threads, so that none finds a core taken by another's.

    Args:
        samplers: each takes one sample and returns it.
        seconds: how long to go on; between `LEAST_ROUNDS` and `MOST_ROUNDS` rounds in any case.
    """
    for sampler in samplers.values():
        sampler()
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    end = time.perf_counter() + seconds
    for round_ in range(MOST_ROUNDS):
        if round_ >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, sampler in samplers.items():
            samples[name].append(sampler())
    return samples


def spread(samples: list[float]) -> dict[str, Any]:
    """Return the median of `samples`, the 10th and 90th percentile, the extremes, and how many there are."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return {
        "median": statistics.median(samples),
        "p10": deciles[0],
        "p90": deciles[-1],
        "min": min(samples),
        "max": max(samples),
        "samples": len(samples),
    }
