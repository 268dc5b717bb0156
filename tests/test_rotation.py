"""The rotation that is found from keys is the one that turned them."""

from __future__ import annotations

import pytest
import torch
from kvpack.rotation import Rotation, _rotation
from torch import Tensor

DISTANCES = (1, 8, 64, 512, 4096)


def pairs_of(kind: str, width: int) -> list[tuple[int, int]]:
    """The pairs of the `width` first channels: half against half, or neighbours."""
    half = width // 2
    return [(i, i + half) if kind == "halves" else (2 * i, 2 * i + 1) for i in range(half)]


def keys_at(rotation: Rotation, still: Tensor, distance: int, noise: float) -> Tensor:
    """Keys as they are `distance` positions further."""
    back = Rotation(rotation.pairs, tuple(-f for f in rotation.frequencies))
    moved = back.undo(still, torch.full((len(still),), distance))
    return moved + noise * torch.randn(moved.shape, dtype=moved.dtype)


@pytest.mark.parametrize("kind", ["halves", "neighbours"])
@pytest.mark.parametrize(
    ("dim", "width"), [(128, 128), (64, 64), (64, 32), (64, 16), (40, 20), (33, 32), (80, 2), (2, 2)]
)
@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_halves_neighbours_and_a_part_of_the_channels(kind: str, dim: int, width: int, noise: float) -> None:
    torch.manual_seed(dim + width)
    still = torch.randn(400, dim, dtype=torch.float64)
    # The slowest pair turns by 1 in 100 positions: far enough to stand out of the noise.
    frequencies = torch.logspace(0, -2, width // 2, dtype=torch.float64)
    true = Rotation(tuple(pairs_of(kind, width)), tuple(frequencies.tolist()))
    found = _rotation(still, {n: keys_at(true, still, n, noise) for n in DISTANCES})
    # Whichever way a pair is written down, it is turned by the same angle.
    assert set(found.pairs) == set(true.pairs)
    got = dict(zip(found.pairs, found.frequencies, strict=True))
    for pair, frequency in zip(true.pairs, true.frequencies, strict=True):
        assert got[pair] == pytest.approx(frequency, abs=1e-12 if noise == 0 else 1e-6)


def test_keys_that_stay_have_no_rotation() -> None:
    still = torch.randn(100, 16, dtype=torch.float64)
    assert _rotation(still, {n: still.clone() for n in DISTANCES}) == Rotation((), ())
    assert _rotation(still, {}) == Rotation((), ())


def test_keys_that_change_in_another_way_have_no_rotation() -> None:
    torch.manual_seed(0)
    still = torch.randn(100, 16, dtype=torch.float64)
    assert _rotation(still, {n: torch.randn(100, 16, dtype=torch.float64) for n in DISTANCES}).pairs == ()


def test_channels_of_zeros_are_not_turned() -> None:
    torch.manual_seed(0)
    true = Rotation(tuple(pairs_of("halves", 16)), tuple(torch.logspace(0, -2, 8).tolist()))
    still = torch.randn(100, 16, dtype=torch.float64)
    still[:, [3, 11]] = 0
    found = _rotation(still, {n: keys_at(true, still, n, 0.0) for n in DISTANCES})
    assert set(found.pairs) == set(true.pairs) - {(3, 11)}
