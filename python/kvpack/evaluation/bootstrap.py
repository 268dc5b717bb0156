"""Confidence intervals: documents drawn again, with replacement, the same ones for both sides of a difference."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
DRAWS = 1000


def interval(
    documents: Sequence[T], statistic: Callable[[Sequence[T]], float], seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of `statistic` over `DRAWS` bootstrap samples of `documents`.

    Each item is a document with all that was measured on it, so that what is compared is paired (Efron and Tibshirani
    1993). With one document there is no spread to draw from: the interval is the statistic itself.
    """
    rng = random.Random(seed)
    drawn = sorted(statistic(rng.choices(documents, k=len(documents))) for _ in range(DRAWS))
    tail = (1 - level) / 2
    return quantile(drawn, tail), quantile(drawn, 1 - tail)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile of ordered numbers, linear between two."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
