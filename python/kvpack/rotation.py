"""What a model's rotary embedding does to its keys, found from the keys themselves."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forward import forward

_TOKENS = 128
# A pair counts as turned when a rotation explains all but this share of its change.
_UNEXPLAINED = 1e-3
# Positions by which keys are moved: each angle is known well enough to tell its whole turns at the next distance.
_DISTANCES = (1, 8, 64, 512, 4096)


@dataclass(frozen=True)
class Rotation:
    """Pairs of channels that are rotated with the position, and by what angle (radians) from one to the next."""

    pairs: tuple[tuple[int, int], ...]
    frequencies: tuple[float, ...]

    def options(self) -> dict[str, Any]:
        """As options of a method in Rust."""
        return {"pairs": self.pairs, "frequencies": self.frequencies}

    def angles(self, positions: Tensor) -> Tensor:
        """Angles `[n, pairs]` at positions `[n]`, in float64."""
        return positions[:, None].double() * torch.tensor(self.frequencies, dtype=torch.float64)

    def undo(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys `[..., n, D]` at positions `[n]` as they were before the rotation."""
        if not self.pairs:
            return keys
        first, second = (list(side) for side in zip(*self.pairs, strict=True))
        angles = self.angles(positions)
        cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
        out = keys.clone()
        out[..., first] = keys[..., first] * cos + keys[..., second] * sin
        out[..., second] = keys[..., second] * cos - keys[..., first] * sin
        return out


def rotations(model: Any, ids: Tensor) -> list[Rotation]:
    """Return the rotation of each layer's keys.

    A rotary embedding is relative: the same tokens, all moved by some positions, have the same hidden states in every
    layer, and keys that differ by the rotation of that distance alone. So the rotation is read off the keys of two
    forwards, whatever the architecture: halves or neighbours as pairs, all channels or some, any scaling of the
    frequencies. Keys without a rotary embedding show none.

    Args:
        model: the transformers model.
        ids: tokens `[1, n]`; the first 128 are used.
    """
    ids = ids[:, :_TOKENS]
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048
    still = _keys(model, ids, 0)
    moved = {n: _keys(model, ids, n) for n in _DISTANCES if n + ids.shape[1] <= longest}
    return [
        _rotation(keys, {n: layers[i] for n, layers in moved.items()}) if keys is not None else Rotation((), ())
        for i, keys in enumerate(still)
    ]


_KNOWN: weakref.WeakKeyDictionary[Any, list[Rotation]] = weakref.WeakKeyDictionary()


def rotations_of(model: Any) -> list[Rotation]:
    """Return the rotation of each layer's keys, which is found once for each model, from tokens drawn by lot."""
    if model not in _KNOWN:
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
        _KNOWN[model] = rotations(model, ids)
    return _KNOWN[model]


def _keys(model: Any, ids: Tensor, distance: int) -> list[Tensor | None]:
    """Keys `[samples, D]` of every layer, of tokens that begin at position `distance`."""
    cache, _ = forward(model, ids, first=distance)
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return [x.double().flatten(0, 2) if isinstance(x, Tensor) and x.dim() == 4 else None for x in keys]


def _rotation(still: Tensor, moved: dict[int, Tensor]) -> Rotation:
    """The pairing of channels, and how many of them, that explains most of how keys move."""
    dim = still.shape[1]
    if not moved or torch.allclose(still, moved[1], rtol=1e-4, atol=1e-5):
        return Rotation((), ())
    turned, frequency = _angles(still, moved)
    changed = _changed(still, moved).long()
    explains = turned * (changed[:, None] + changed[None, :])
    neighbours = explains.diagonal(1)[::2].cumsum(0)
    best: tuple[int, list[tuple[int, int]]] = (0, [])
    for n in range(1, dim // 2 + 1):
        # Halves of 2n channels, whose pairs are n apart, and neighbours in as many.
        if (explained := int(explains.diagonal(n)[:n].sum())) > best[0]:
            best = explained, [(i, i + n) for i in range(n)]
        if (explained := int(neighbours[n - 1])) > best[0]:
            best = explained, [(i, i + 1) for i in range(0, 2 * n, 2)]
    pairs = tuple(pair for pair in best[1] if turned[pair])
    return Rotation(pairs, tuple(float(frequency[pair]) for pair in pairs))


def _changed(still: Tensor, moved: dict[int, Tensor]) -> Tensor:
    """Which channels a move changes."""
    change = torch.stack([(keys - still).square().sum(0) for keys in moved.values()]).amax(0)
    return change > 1e-8 * still.square().sum(0).clamp(min=1e-12)


def _angles(still: Tensor, moved: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Which pairs `[D, D]` of channels are turned, and by what angle from one position to the next.

    A pair is a complex number `z`, and `w` when it is moved. The factor that fits best is `sum conj(z) w / sum |z|^2`,
    and what it does not explain `sum |w|^2 / sum |z|^2 - |factor|^2`: products of channels are all that is needed.
    """
    square = still.square().sum(0)
    energy = square[:, None] + square[None, :]
    frequency = torch.zeros_like(energy)
    turned = known = energy > 0
    for distance, keys in sorted(moved.items()):
        products = still.T @ keys
        own, moved_square = products.diagonal(), keys.square().sum(0)
        real, imaginary = (own[:, None] + own[None, :]) / energy, (products - products.T) / energy
        size = real.square() + imaginary.square()
        rest = (moved_square[:, None] + moved_square[None, :]) / energy - size
        known = known & (rest <= _UNEXPLAINED) & ((size.sqrt() - 1).abs() <= 0.01)
        if distance == 1:
            turned = known
        angle = torch.atan2(imaginary, real)
        turns = ((frequency * distance - angle) / (2 * torch.pi)).round()
        frequency = torch.where(known, (angle + 2 * torch.pi * turns) / distance, frequency)
    return turned, frequency
