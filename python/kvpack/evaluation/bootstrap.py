"""Confidence intervals: of what is measured on documents, and of the share of tasks that were solved."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
DRAWS = 1000


def interval(
    documents: Sequence[T], statistic: Callable[[Sequence[T]], float], seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of `statistic` over `DRAWS` bootstrap samples of `documents`.

    Documents are drawn with replacement, the same ones for both sides of a difference. Each item is a document with
    all that was measured on it, so that what is compared is paired (Efron and Tibshirani 1993). With one document there
    is no spread to draw from: the interval is the statistic itself.
    """
    rng = random.Random(seed)
    drawn = sorted(statistic(rng.choices(documents, k=len(documents))) for _ in range(DRAWS))
    tail = (1 - level) / 2
    return quantile(drawn, tail), quantile(drawn, 1 - tail)


def wilson(share: float, samples: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's (1927) 95 % interval of a share of right answers: it has a width even where all were right.

    For answers that are right in part it is too wide, never too narrow.
    """
    shrunk = 1 + z * z / samples
    middle = (share + z * z / (2 * samples)) / shrunk
    half = z / shrunk * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile of ordered numbers, linear between two."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
