"""Graded: channels have the bits that they are worth, by a search over all ways to share them out."""

from __future__ import annotations

import itertools
import math

import kvpack
import pytest
import torch
from reference import quantise
from support import filled_layer, forward, left_padding, random_kv, stored_bits, tiny_config
from torch import Tensor


def graded_cost(bits: Tensor, key: Tensor, weight: Tensor, group: int) -> float:
    """`sum_c weight_c E[e_c^2]` of keys `[n, dim]` when channel `c` has `bits[c]` bits, in groups of tokens."""
    parts = key.double().reshape(-1, group, key.shape[1])
    span = parts.amax(1) - parts.amin(1)
    error = span.square() / (12 * (2.0 ** bits.double() - 1).square())
    error = torch.where(bits == 0, parts.var(1, unbiased=False), error)
    return float((error.mean(0) * weight.double()).sum())


def test_graded_bits_are_the_best_within_their_budget() -> None:
    """No other cut of the channels, in whole blocks of codes, costs less: all of them are tried."""
    torch.manual_seed(5)
    key, value = random_kv(1, 1, 132, 16)
    key = key * torch.linspace(0.1, 3, 16)
    query = torch.randn(1, 2, 132, 16) * torch.linspace(2, 0.5, 16)
    cache = filled_layer(kvpack.Graded(key_bits=3.0, value_bits=2), key, value, query)
    bits = cache.layers[0].key_bits(0, 0)[0]
    weight = query[0].square().sum((0, 1))
    weight = weight + 1e-4 * weight.mean()
    order = sorted(range(16), key=lambda c: -graded_cost(torch.full((1,), 3), key[0, 0, 4:, c : c + 1], weight[c], 128))
    best = math.inf
    for n8, n4, n3, n2 in itertools.product(range(0, 17, 4), range(0, 17, 8), (0, 16), (0, 16)):
        if n8 + n4 + n3 + n2 > 16 or 8 * n8 + 4 * n4 + 3 * n3 + 2 * n2 > 48:
            continue
        widths = torch.zeros(16)
        for width, channels in zip([8] * n8 + [4] * n4 + [3] * n3 + [2] * n2, order[: n8 + n4 + n3 + n2], strict=True):
            widths[channels] = width
        best = min(best, graded_cost(widths, key[0, 0, 4:], weight, 128))
    assert bits.float().mean() <= 3
    assert graded_cost(bits, key[0, 0, 4:], weight, 128) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("group", [16, 64, 128])
@pytest.mark.parametrize("key_bits", [1.5, 2.5, 4, 8])
@pytest.mark.parametrize("dim", [32, 64, 72, 128])
def test_graded_keys_are_kivis_with_other_bits(dim: int, key_bits: float, group: int) -> None:
    key, value = random_kv(1, 2, 4 + 256 + 9, dim)
    key = key * torch.logspace(-1, 1, dim)
    cache = filled_layer(kvpack.Graded(key_bits=key_bits, group=group, window=128), key, value)
    for head in range(2):
        stored, bits = cache.layers[0].packed(0, head), cache.layers[0].key_bits(0, head)
        assert stored["key_codes"].shape == (256, dim)
        assert bits.shape == (2, dim)
        assert bits.float().mean() <= key_bits
        for page, tokens in enumerate(key[0, head, 4:260].split(128)):
            for first in range(0, 128, group):
                x = tokens[first : first + group]
                for c in range(dim):
                    at = (page * 128 + first) // group
                    codes = stored["key_codes"][page * 128 + first :][:group, c]
                    scale, zero = stored["key_scale"][at, c], stored["key_zero"][at, c]
                    if bits[page, c] == 0:
                        assert not codes.any()
                        assert zero == pytest.approx(float(x[:, c].mean()), rel=1e-3, abs=1e-3)
                        continue
                    expected = quantise(x[:, c], int(bits[page, c]), dim=0)
                    assert torch.equal(codes, expected[0].to(torch.uint8))
                    assert (scale, zero) == (expected[1].item(), expected[2].item())


def test_channels_that_queries_read_get_the_bits() -> None:
    key, value = random_kv(1, 1, 300, 64)
    query = torch.full((1, 2, 300, 64), 1e-3)
    query[..., 10:18] = 1.0
    bits = filled_layer(kvpack.Graded(key_bits=2), key, value, query).layers[0].key_bits(0, 0)
    assert bits[0, 10:18].min() > bits[0].float().mean()
    assert bits[0, 10:18].float().mean() >= 4
    # Without queries a channel's range alone decides.
    cache = kvpack.PackedCache(tiny_config(layers=1, kv_heads=1, head_dim=64), quantize=kvpack.Graded(key_bits=2))
    key[..., 40:44] *= 30
    cache.update(key, value, 0)
    cache.update(key[:, :, :1], value[:, :, :1], 0)  # stores the first ones
    assert cache.layers[0].key_bits(0, 0)[0, 40:44].min() == 8


def test_queries_that_read_nothing_decide_nothing() -> None:
    key, value = random_kv(1, 1, 300, 64)
    blind = filled_layer(kvpack.Graded(key_bits=3), key, value, torch.zeros(1, 2, 300, 64)).layers[0].key_bits(0, 0)
    unseen = kvpack.PackedCache(tiny_config(layers=1, kv_heads=1, head_dim=64), quantize=kvpack.Graded(key_bits=3))
    unseen.update(key, value, 0)
    unseen.update(key[:, :, :1], value[:, :, :1], 0)  # stores the first ones
    assert torch.equal(blind, unseen.layers[0].key_bits(0, 0))
    assert blind.float().mean() > 2.7


def test_bits_are_chosen_again_when_the_tokens_have_doubled() -> None:
    cache = kvpack.PackedCache(tiny_config(layers=1, heads=2, kv_heads=1, head_dim=64), quantize=kvpack.Graded())
    for step in range(12):
        key, value = random_kv(1, 1, 128, 64)
        key[..., 8 * (step % 8) : 8 * (step % 8) + 8] *= 20
        forward(cache, key, value, torch.randn(1, 2, 128, 64))
    bits = cache.layers[0].key_bits(0, 0)
    changes = [page for page in range(1, len(bits)) if not torch.equal(bits[page], bits[page - 1])]
    assert changes == [2, 4, 8]


def test_graded_rows_of_a_batch_are_single_rows() -> None:
    """Pads neither count as keys nor as queries."""
    lengths = [300, 180]
    valid = left_padding(lengths)
    key, value = random_kv(2, 2, 300, 32)
    query = torch.randn(2, 4, 300, 32)
    batch = kvpack.PackedCache(tiny_config(layers=1), quantize=kvpack.Graded(key_bits=2.5))
    visible = valid.bool()[:, None, None, :] & torch.ones(300, 300, dtype=torch.bool).tril()
    forward(batch, key, value, query, visible)
    for row, length in enumerate(lengths):
        single = kvpack.PackedCache(tiny_config(layers=1), quantize=kvpack.Graded(key_bits=2.5))
        forward(single, *(x[row : row + 1, :, -length:] for x in (key, value, query)))
        for head in range(2):
            ours, alone = (cache.layers[0] for cache in (batch, single))
            assert torch.equal(ours.key_bits(row, head), alone.key_bits(0, head))
            for name, stored in ours.packed(row, head).items():
                assert torch.equal(torch.as_tensor(stored), torch.as_tensor(alone.packed(0, head)[name])), name


def test_presets_are_what_they_promise() -> None:
    """Largest first, and each within the bits that its documentation names."""
    bits = [stored_bits(codec, 64) for codec in kvpack.presets.values()]
    assert list(kvpack.presets) == ["lossless", "near-lossless", "balanced", "small", "tiny"]
    assert bits == sorted(bits, reverse=True)
    for held, most in zip(bits[1:], (8.6, 5, 4, 3), strict=True):
        assert held <= most
    with pytest.raises(TypeError):
        kvpack.presets["tiny"] = kvpack.Exact()
