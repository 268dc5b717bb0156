"""95 % intervals: of means over documents, and of the share of tasks that were solved.

There are often few documents, and few of them lose most. The percentile bootstrap covers 80 % with 4 documents and
87 % with 8, and BCa no more, as both draw from the few that are there; so the intervals here rest on Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean

LEAST = 4
"""Documents that an interval needs: fewer say nothing about how far apart documents are."""
LEVEL = 0.95

Interval = tuple[float, float]


def of_mean(values: Sequence[float]) -> Interval | None:
    """Return the interval of the mean of what was found on documents; None where they are fewer than `LEAST`.

    It is Student's, `mean - t e` to `mean + t e` with `e` the standard error, and on the side to which documents are
    skewed longer by `e G (2 t^2 + 1) / (6 sqrt(n))`, the first term of Edgeworth's expansion of t (Hall 1992), with G
    their skewness (without bias). For normal documents it covers 95 to 96 % from 4 on; for lognormal ones, whose logs
    have a deviation of 0.5 (0.8, 1), 94 % (91 %, 88 %) with 8 of them and 95 % (94 %, 92 %) with 32.
    """
    n = len(values)
    if n < LEAST:
        return None
    mean, deviation = fmean(values), math.sqrt(_variance(values))
    if deviation == 0:
        return mean, mean
    skewness = math.fsum(((x - mean) / deviation) ** 3 for x in values) * n / ((n - 1) * (n - 2))
    t = student(n - 1)
    longer = skewness * (2 * t * t + 1) / (6 * math.sqrt(n))
    error = deviation / math.sqrt(n)
    return mean - error * (t - min(longer, 0)), mean + error * (t + max(longer, 0))


def of_positive_mean(values: Sequence[float]) -> Interval | None:
    """Return the interval of the mean of what cannot be below zero, such as KL; None for fewer than `LEAST` documents.

    Such numbers spread by factors: their logarithms are near normal. So the interval is one of factors: with s^2 the
    variance of the logs, the logarithm of a lognormal mean has the variance `s^2 / n + s^4 / (2 (n - 1))` (Cox, in Land
    1972). For lognormal documents it covers 93 to 95 % from 4 on, for normal ones that are all positive 95 to 96 %. A
    document with 0 has no logarithm: then the interval is that of `of_mean`.
    """
    n = len(values)
    if n < LEAST or min(values) <= 0:
        plain = of_mean(values)
        return plain and (max(plain[0], 0.0), max(plain[1], 0.0))
    spread = _variance([math.log(x) for x in values])
    reach = student(n - 1) * math.sqrt(spread / n + spread**2 / (2 * (n - 1)))
    return fmean(values) * math.exp(-reach), fmean(values) * math.exp(reach)


def _variance(values: Sequence[float]) -> float:
    mean = fmean(values)
    return math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)


def wilson(share: float, samples: int, z: float = 1.96) -> Interval:
    """Return Wilson's (1927) 95 % interval of a share of right answers: it has a width even where all were right.

    For answers that are right in part it is too wide, never too narrow.
    """
    shrunk = 1 + z * z / samples
    middle = (share + z * z / (2 * samples)) / shrunk
    half = z / shrunk * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return max(middle - half, 0.0), min(middle + half, 1.0)


@cache
def student(freedom: int) -> float:
    """Return the t such that `LEVEL` of Student's distribution lies between -t and t."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """The share between -t and t, where `t = tan(angle) sqrt(freedom)` (Abramowitz and Stegun 26.7)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= (k - 1) / k * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile of ordered numbers, linear between two."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
