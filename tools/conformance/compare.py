"""Tensors of two runs of a mode: how far they are from each other, and how much that may be."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-4  # the largest difference of logits in float32, in their deviation
EIGHT_BIT_TOLERANCE = 0.03  # the root mean square of what 8 bits do to logits, in their deviation
HALF_RATIO, HALF_FLOOR = 1.5, 0.01  # in bfloat16: times the reference's own distance from float32, plus deviations


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference in deviations of what is expected; infinite for other tokens, shapes or no numbers."""
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not b.is_floating_point():
            worst = worst if torch.equal(a, b) else float("inf")
            continue
        known = b.isfinite()
        same = torch.equal(known, a.isfinite())
        scale = deviation([b])
        worst = max(worst, (a - b)[known].abs().max().item() / scale if same and known.any() else 0.0 if same else 1e9)
    return worst


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The root mean square of the difference, in deviations of what is expected."""
    a, b = (torch.cat([x.flatten() for x in side]) for side in (actual, expected))
    return float((a - b).square().mean().sqrt() / deviation(expected))


def deviation(tensors: list[Tensor]) -> float:
    """The standard deviation of all numbers, at least that of rounding; 1 of a single one."""
    values = torch.cat([x[x.isfinite()].flatten() for x in tensors])
    return max(float(values.std()), 1e-3) if values.numel() > 4 else 1.0
