"""Tensors of two runs of a mode: how far they are from each other, and how much that may be."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-4  # the largest difference of logits in float32, in their deviation
EIGHT_BIT_TOLERANCE = 0.03  # the root mean square of what 8 bits do to logits, in their deviation
HALF_RATIO, HALF_FLOOR = 1.5, 0.01  # in bfloat16: times the reference's own distance from float32, plus deviations


HUGE = 1e30  # what some models set the logits of tokens to that must not come


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference in deviations of what is expected; infinite for other tokens or shapes, and NaN."""
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not b.is_floating_point():
            worst = worst if torch.equal(a, b) else float("inf")
        elif not torch.equal(_said(a), _said(b)):
            return float("inf")
        elif _said(b).any():
            worst = max(worst, float((a - b)[_said(b)].abs().max()) / deviation([b]))
    return worst


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The root mean square of the difference, in deviations of what is expected; infinite where one is not finite."""
    a, b = (torch.cat([x.flatten() for x in side]) for side in (actual, expected))
    if not torch.equal(_said(a), _said(b)):
        return float("inf")
    return float((a - b)[_said(b)].square().mean().sqrt() / deviation(expected))


def token_distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The mean over tokens of the root mean square of a token's difference, in deviations of what is expected.

    Where experts are chosen, rounding may choose another one for a token or two: that says nothing of the others.
    """
    of_tokens = [
        (a - b).where(_said(b), 0).square().mean(-1).sqrt().flatten() for a, b in zip(actual, expected, strict=True)
    ]
    return float(torch.cat(of_tokens).mean() / deviation(expected))


def deviation(tensors: list[Tensor]) -> float:
    """The standard deviation of all numbers, at least that of rounding; 1 of a few."""
    values = torch.cat([x[_said(x)] for x in tensors])
    return max(float(values.std()), 1e-3) if values.numel() > 4 else 1.0


def _said(x: Tensor) -> Tensor:
    """Which logits say something."""
    return x.isfinite() & (x.abs() < HUGE)
