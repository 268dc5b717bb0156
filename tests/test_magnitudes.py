"""Numbers of any size: what is stored is finite and errs no more than zeros would, or is refused before any change."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from support import CODECS, Tabled, codec_id, filled_layer, forward, tiny_config
from torch import Tensor

TOKENS, DIM = 150, 64
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MAGNITUDES = [1e-42, 1e-38, 1e-12, 3e-8, 1e-7, 1e-6, 1e-5, 1e-3, 1.0, 100.0, 3e3, 3e4, 6e4, 1e38]

FED = kvpack.GPTQ(threshold=0.0)
ALL = [
    *(codec for codec in CODECS if not isinstance(codec, kvpack.Exact | kvpack.KeyValue)),
    kvpack.KIVI(bits=8, compensation=FED),
    kvpack.Q4(),
    kvpack.Q4(compensation=FED),
    kvpack.Q8(compensation=FED),
    kvpack.Rotated(bits=2),
    kvpack.Rotated(bits=2, compensation=FED),
    kvpack.Rotated(bits=8, group=16),
    kvpack.Rotated(bits=2, levels="lloyd-max"),
    kvpack.Graded(key_bits=8, value_bits=8),
    kvpack.KVarN(bits=2),
    kvpack.KVarN(bits=8),
]


def normal() -> Tensor:
    return torch.randn(1, 1, TOKENS, DIM)


def signs() -> Tensor:
    return normal().sign()


def one_channel() -> Tensor:
    """All of a vector is in one of its channels, as good as."""
    x = 1e-3 * normal()
    x[..., 5] = 1
    return x


def one_coordinate() -> Tensor:
    """All of a vector is in one coordinate of a rotation: the signs with which the rotation begins."""
    units = torch.eye(DIM).reshape(1, 1, DIM, DIM)
    cache = filled_layer(kvpack.Rotated(bits=8, window=0, sinks=0), units, units)
    # The first coordinate of unit vector i has the i-th sign.
    codes = cache.layers[0].packed(0, 0)["key_codes"]
    return torch.where(codes[:, 0] > 127, 1.0, -1.0).expand(1, 1, TOKENS, DIM).clone()


def mixed() -> Tensor:
    """Tokens and channels of very different sizes."""
    sizes = torch.logspace(0, -6, TOKENS)[torch.randperm(TOKENS)]
    return sizes[:, None] * torch.logspace(0, -3, DIM) * signs()


# What an error may be at most, as a share of the numbers. Zeros err by 1. A grid without 0, or with one small number
# beside a large one, errs more than that whatever the magnitude is.
SHAPES = {normal: 1.0, signs: 1.0, one_channel: 1.0, one_coordinate: 4.0, mixed: 4.0}


def errors(codec: Any, x: Tensor) -> tuple[float, float] | None:
    """The errors of keys and of values `x`, as shares of their norm, without what the dtype itself rounds.

    None where they are refused, which then was before any change.
    """
    cache = kvpack.PackedCache(tiny_config(layers=1, heads=2, kv_heads=1, head_dim=DIM), quantize=codec)
    queries = torch.randn(1, 2, TOKENS, DIM) * torch.linspace(0.1, 2, DIM) + torch.randn(1, 1, 1, DIM)
    # Logits stay in range whatever the keys are.
    queries = (queries / max(x.float().abs().max().item(), 1.0)).to(x.dtype)
    try:
        forward(cache, x, x, queries)
    except kvpack.NonFiniteError:
        assert cache.get_seq_length() == 0
        ordinary = torch.ones(1, 1, 20, DIM, dtype=x.dtype)
        assert forward(cache, ordinary, ordinary, torch.ones(1, 2, 20, DIM, dtype=x.dtype)).isfinite().all()
        return None
    assert forward(cache, x[:, :, :1], x[:, :, :1], queries[:, :, :1]).isfinite().all()
    size = float(x.double().norm())
    own = 2**-24 * x.numel() ** 0.5 if x.dtype == torch.float16 else 0.0
    found = []
    for stored in (cache.layers[0].keys, cache.layers[0].values):
        assert stored.isfinite().all()
        error = float((stored[:, :, :TOKENS].double() - x.double()).norm())
        found.append(max(error - own, 0.0) / size if size else error)
    return found[0], found[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", ALL, ids=codec_id)
def test_any_magnitude_is_served_or_refused(codec: Any, dtype: torch.dtype) -> None:
    for shape, most in SHAPES.items():
        torch.manual_seed(0)
        x = shape()
        for magnitude in MAGNITUDES:
            scaled = (x * magnitude).to(dtype)
            found = errors(codec, scaled)
            if found is None:
                assert magnitude > 100, f"{shape.__name__} of {magnitude} is refused"
                continue
            keys, values = found
            # The grids of KVQuant's keys are those of its calibration, whatever the keys are.
            worst = values if isinstance(codec, Tabled) else max(keys, values)
            assert worst <= most, f"{shape.__name__} of {magnitude}: keys {keys:.3g}, values {values:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", ALL, ids=codec_id)
def test_down_to_1e_6_codes_keep_their_precision(codec: Any, dtype: torch.dtype) -> None:
    if isinstance(codec, Tabled):
        pytest.skip("its keys have the grids of a calibration")
    torch.manual_seed(1)
    x = normal()
    ordinary = max(errors(codec, x.to(dtype)) or ())
    for magnitude in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        if dtype == torch.float16 and magnitude < 1e-4:
            continue  # such numbers have few bits themselves
        if getattr(codec, "levels", "") == "lloyd-max" and magnitude < 1e-5:
            continue  # its scales are those of 255ths of the levels' span
        assert max(errors(codec, (magnitude * x).to(dtype)) or ()) <= 1.2 * ordinary + 0.02, magnitude
