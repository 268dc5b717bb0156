"""KVQuant's calibration: ranges of key channels, and the levels of keys and of values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..forward import forward
from ..methods import KVQuant, KVQuantTables
from ..rotation import Rotation, rotations

# Bins of the histogram that stands for a layer's normalised numbers, and steps of the k-means on it (the paper's 50).
_BINS = 8192
_STEPS = 50


def measure(
    model: Any,
    documents: Sequence[Tensor],
    method: KVQuant,
    *,
    gradients: bool = True,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[int, KVQuantTables]:
    """Return KVQuant's tables of every full-attention layer.

    Args:
        model: the transformers model, on the CPU.
        documents: tokens `[1, n]`, one forward (and with gradients one backward pass) each.
        method: bits, outliers and sinks.
        gradients: whether the k-means weighs errors with the squares of the loss' gradients (Fisher information), as
            the paper does; otherwise all errors weigh the same.
        progress: called with the tokens of each document that was read.
    """
    found = rotations(model, documents[0])
    samples: dict[int, list[_Sample]] = {}
    for ids in documents:
        for layer, sample in _read(model, ids, found, method.sinks, gradients).items():
            samples.setdefault(layer, []).append(sample)
        progress(ids.shape[1])
    return {layer: _tables(found[layer], of_layer, method) for layer, of_layer in samples.items()}


class _Sample:
    """Pre-RoPE keys, values, and what their errors weigh, each `[H, n, D]`, of one document."""

    def __init__(self, keys: Tensor, values: Tensor, key_weights: Tensor, value_weights: Tensor) -> None:
        self.keys, self.values = keys, values
        self.key_weights, self.value_weights = key_weights, value_weights


def _read(model: Any, ids: Tensor, found: list[Rotation], sinks: int, gradients: bool) -> dict[int, _Sample]:
    """Keys and values of a document by layer, without its first tokens, which stay exact."""
    cache, loss = forward(model, ids, gradients=gradients)
    layers = {
        i: layer for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer and layer.keys is not None
    }
    if gradients:
        tensors = [x for layer in layers.values() for x in (layer.keys, layer.values)]
        slopes = iter(torch.autograd.grad(loss, tensors))
    positions = torch.arange(ids.shape[1])
    samples = {}
    for i, layer in layers.items():
        weights = [next(slopes).float() for _ in range(2)] if gradients else [torch.ones(1)] * 2
        if gradients:
            weights[0] = found[i].undo(weights[0], positions)
        keys, values = found[i].undo(layer.keys.detach().float(), positions), layer.values.detach().float()
        both = [w.square().expand_as(x)[0, :, sinks:] for w, x in zip(weights, (keys, values), strict=True)]
        samples[i] = _Sample(keys[0, :, sinks:], values[0, :, sinks:], *both)
    return samples


def _tables(rotation: Rotation, samples: list[_Sample], method: KVQuant) -> KVQuantTables:
    keys, key_weights = (torch.cat([getattr(s, name) for s in samples], 1) for name in ("keys", "key_weights"))
    values, value_weights = (torch.cat([getattr(s, name) for s in samples], 1) for name in ("values", "value_weights"))
    ends = torch.tensor([method.outliers / 2, 1 - method.outliers / 2])
    low, high = torch.quantile(keys, ends, dim=1)
    key_levels, key_norm = levels(keys, key_weights, low[:, None], high[:, None], method.bits)
    value_low, value_high = value_ranges(values, method.outliers)
    value_levels, value_norm = levels(values, value_weights, value_low, value_high, method.bits)
    return KVQuantTables(
        low=tuple(map(tuple, low.tolist())),
        high=tuple(map(tuple, high.tolist())),
        key_levels=key_levels,
        value_levels=value_levels,
        key_norm=key_norm,
        value_norm=value_norm,
        pairs=rotation.pairs,
        frequencies=rotation.frequencies,
    )


def value_ranges(values: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each value `[..., D]` without its outliers, `[..., 1]` each."""
    dim = values.shape[-1]
    places = min(max(round(share * dim), 1), dim - 1) if share else 0
    ordered = values.sort(-1).values
    low = torch.zeros((*values.shape[:-1], 1), dtype=torch.int64)
    high = torch.full_like(low, dim - 1)

    def at(index: Tensor) -> Tensor:
        return ordered.gather(-1, index)

    for _ in range(places):
        from_above = at(high) - at(high - 1) > at(low + 1) - at(low)
        low, high = torch.where(from_above, low, low + 1), torch.where(from_above, high - 1, high)
    return at(low), at(high)


def levels(
    x: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int
) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Return the levels of `x` normalised to its ranges, and factor and offset of Q-Norm.

    The levels minimise `sum weight (x - x')^2` over the numbers that are no outliers: a k-means (Lloyd) on a
    histogram, from the weighted quantiles on. Q-Norm's affine map gives what codes stand for the mean and the
    deviation of what they were made of.
    """
    half = (high - low) / 2
    normalised = ((x - (low + high) / 2) / half.clamp(min=torch.finfo(x.dtype).tiny)).flatten()
    cost = (weights * half.square()).expand_as(x).flatten().double()
    inside = normalised.abs() <= 1
    normalised, cost = normalised[inside].double(), cost[inside]
    if not cost.sum() > 0:
        cost = torch.ones_like(cost)
    bins = ((normalised + 1) / 2 * _BINS).long().clamp(max=_BINS - 1)
    mass = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, cost)
    moment = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, cost * normalised)
    centers = _k_means(mass, moment, 2**bits)
    nearest = centers[torch.bucketize(normalised, (centers[1:] + centers[:-1]) / 2)]
    factor = (normalised.std() / nearest.std()).item()
    return tuple(centers.tolist()), (factor, (normalised.mean() - factor * nearest.mean()).item())


def _k_means(mass: Tensor, moment: Tensor, count: int) -> Tensor:
    """`count` centers, ascending, of a weighted histogram over -1 .. 1."""
    share = mass.cumsum(0) / mass.sum()
    starts = torch.searchsorted(share, (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    # Quantiles alone can coincide.
    spread = torch.linspace(-1, 1, count, dtype=torch.float64)
    centers = 0.9 * ((starts.double() + 0.5) / len(mass) * 2 - 1) + 0.1 * spread
    for _ in range(_STEPS):
        edges = ((centers[1:] + centers[:-1]) / 2 + 1) / 2 * len(mass)
        cell = torch.bucketize(torch.arange(len(mass), dtype=torch.float64) + 0.5, edges)
        weight = torch.zeros(count, dtype=torch.float64).index_add_(0, cell, mass)
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, cell, moment)
        centers = torch.where(weight > 0, sums / weight, centers)
    return centers
