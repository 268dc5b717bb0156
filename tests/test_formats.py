"""Block, rotated and graded formats: what is stored is what slow references give, in the bits that are named."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import kvpack
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from reference import quantise
from support import (
    CODECS,
    causal_mask,
    codec_id,
    contents,
    filled_layer,
    forward,
    left_padding,
    random_kv,
    relative_error,
    stored_bits,
    tiny_config,
)
from torch import Tensor

# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_those_of_gguf(bits: int, dim: int) -> None:
    """Codes and scales against the reference implementation of GGUF's own formats."""
    key, value = random_kv(1, 2, 140, dim)
    cache = filled_layer(kvpack.Q8() if bits == 8 else kvpack.Q4(), key, value)
    kind = GGMLQuantizationType.Q8_0 if bits == 8 else GGMLQuantizationType.Q4_0
    for head, (name, x) in itertools.product(range(2), (("key", key), ("value", value))):
        stored = cache.layers[0].packed(0, head)
        rows = torch.nn.functional.pad(x[0, head], (0, -dim % 32))
        blocks = quants.quantize(rows.numpy(), kind).reshape(140, -1, 2 + 4 * bits)
        scales = blocks[:, :, :2].copy().view(np.float16)[:, :, 0].astype(np.float32)
        raw = blocks[:, :, 2:]
        if bits == 8:
            codes = raw.view(np.int8).astype(np.int32) + 128
        else:
            codes = np.concatenate([raw & 15, raw >> 4], axis=2).astype(np.int32)
        expected = torch.from_numpy(codes.reshape(140, -1)[:, :dim]).to(torch.uint8)
        assert torch.equal(stored[f"{name}_scale"], torch.from_numpy(scales))
        assert torch.equal(stored[f"{name}_codes"], expected)
        read = torch.from_numpy(quants.dequantize(blocks.reshape(140, -1), kind))[:, :dim]
        held = (cache.layers[0].keys if name == "key" else cache.layers[0].values)[0, head]
        torch.testing.assert_close(held, read, rtol=1e-6, atol=1e-7)


# ---- rotated ---------------------------------------------------------------------------------------------------------


def hadamard(dim: int, seed: int) -> Tensor:
    """The rotation as a matrix `[dim, dim]`, from its definition."""

    def random(i: int) -> int:  # SplitMix64
        mask = 2**64 - 1
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    block = dim & -dim
    signs = torch.tensor([-1.0 if random(i) >> 63 else 1.0 for i in range(dim)], dtype=torch.float64)
    i = torch.arange(block)
    bits = torch.tensor([[bin(int(a) & int(b)).count("1") for b in i] for a in i])
    one = (-1.0) ** bits.double() / math.sqrt(block)
    return torch.block_diag(*[one] * (dim // block)) * signs


def deviations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rows and of columns that leave a block with equal deviations, as KVarN divides by them, in float64."""
    t, c, rest = torch.ones(len(x), 1, dtype=torch.float64), torch.ones(1, x.shape[1], dtype=torch.float64), x.double()
    for _ in range(6):
        columns = rest.std(0, unbiased=False, keepdim=True)
        rest, c = rest / columns, c * columns
        rows = rest.std(1, unbiased=False, keepdim=True)
        rest, t = rest / rows, t * rows
    return (t / t.mean()).half().double(), (c / c.mean()).half().double()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 80])
def test_kvarn_is_a_normalised_block_on_asymmetric_grids(bits: int, dim: int) -> None:
    key, value = random_kv(1, 2, 4 + 128 + 128 + 9, dim)
    value = value * torch.rand(1, 2, value.shape[2], 1).mul(3).exp()  # tokens of very different sizes
    cache = filled_layer(kvpack.KVarN(bits=bits, seed=5), key, value)
    turn = hadamard(dim, 5)
    for head in range(2):
        stored = cache.layers[0].packed(0, head)
        for first in (0, 128):
            at = slice(first, first + 128)
            for name, x, axis in (("key", key, 0), ("value", value, 1)):
                y = x[0, head, 4:][at].double() @ turn.T
                factor = deviations(y)[axis]
                codes, scale, zero = quantise(y / factor, bits, axis)
                assert (stored[f"{name}_codes"][at] == codes.to(torch.uint8)).double().mean() > 0.995
                read = (codes * scale + zero) * factor @ turn
                held = getattr(cache.layers[0], f"{name}s")[0, head, 4:][at]
                difference = (held - read).abs().max() / read.abs().max()
                assert (held - read).norm() < 0.01 * read.norm() + 0.02 * (read - x[0, head, 4:][at]).norm(), difference
    assert torch.equal(cache.layers[0].keys[:, :, -9:], key[:, :, -9:])


def test_kvarn_counts_its_factors() -> None:
    key, value = random_kv(1, 2, 4 + 8 * 128, 64)
    parts = filled_layer(kvpack.KVarN(bits=2), key, value).memory().parts
    numbers = 2 * 8 * 128 * 64
    assert parts["codes"] * 8 == 2 * numbers * 2
    keys, values = numbers * (32 / 128 + 16 / 64), numbers * (32 / 64 + 16 / 128)
    assert parts["scales"] * 8 == keys + values


def rotated_reference(x: Tensor, bits: int, group: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[n, dim]`, scales `[n, groups]` and what is read, in float64."""
    dim = x.shape[1]
    turn, middle = hadamard(dim, seed), (2**bits - 1) / 2
    best = {2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}[bits]
    codes, scales = [], []
    for y in (x.double() @ turn.T).split(group or dim, dim=1):

        def at(step: Tensor, y: Tensor = y) -> Tensor:
            return (y / step + middle).clamp(0, 2**bits - 1).round()

        normal = best * y.square().mean(1, keepdim=True).sqrt()
        whole = y.abs().amax(1, keepdim=True) / middle
        errors = [(y - step * (at(step) - middle)).square().sum(1, keepdim=True) for step in (normal, whole)]
        chosen = at(torch.where(errors[1] < errors[0], whole, normal))
        codes.append(chosen)
        scales.append(y.square().sum(1, keepdim=True) / (y * (chosen - middle)).sum(1, keepdim=True))
    stored = torch.cat(scales, 1).half().double()
    spread = stored.repeat_interleave(group or dim, dim=1)[:, :dim]
    return torch.cat(codes, 1), stored, ((torch.cat(codes, 1) - middle) * spread) @ turn


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("dim", "group"), [(64, 0), (128, 32), (80, 16), (96, 0), (40, 0)])
def test_rotated_tokens_are_the_equations(bits: int, dim: int, group: int) -> None:
    key, value = random_kv(1, 2, 300, dim)
    codec = kvpack.Rotated(bits=bits, group=group, window=32, sinks=4, seed=11)
    cache = filled_layer(codec, key, value)
    for head, (name, x) in itertools.product(range(2), (("key", key), ("value", value))):
        stored = cache.layers[0].packed(0, head)
        codes, scales, read = rotated_reference(x[0, head, 4:-32], bits, group, seed=11)
        different = stored[f"{name}_codes"] != codes
        assert different.float().mean() < 1e-3  # a number within rounding of a boundary
        same = ~different.any(1)
        torch.testing.assert_close(stored[f"{name}_scale"][same], scales[same].float(), rtol=1e-3, atol=0)
        held = (cache.layers[0].keys if name == "key" else cache.layers[0].values)[0, head]
        torch.testing.assert_close(held[4:-32][same], read[same].float(), rtol=1e-3, atol=2e-3)
        assert torch.equal(held[:4], x[0, head, :4])
        assert torch.equal(held[-32:], x[0, head, -32:])


def test_rotated_tokens_keep_their_projection() -> None:
    """What is read of a token, projected on the token, is the token: attention's averages do not shrink."""
    key, value = random_kv(1, 1, 400, 64)
    held = filled_layer(kvpack.Rotated(bits=2, window=0, sinks=0), key, value).layers[0].values[0, 0]
    share = (held * value[0, 0]).sum(1) / value[0, 0].square().sum(1)
    torch.testing.assert_close(share, torch.ones(400), rtol=2e-3, atol=0)
    error = (held - value[0, 0]).square().sum(1) / value[0, 0].square().sum(1)
    assert 0.1 < error.mean() < 0.16  # 0.1189 of the best uniform grid, over 1 - 0.1189 for not shrinking


def test_zeros_stay_zeros() -> None:
    key, value = (torch.zeros(1, 1, 300, 64) for _ in range(2))
    for codec in (kvpack.Q8(), kvpack.Q4(), kvpack.Rotated(bits=2), kvpack.Graded()):
        for held in contents(filled_layer(codec, key, value))[0]:
            assert torch.equal(held, key)


# ---- graded ----------------------------------------------------------------------------------------------------------


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


# ---- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS[1:], ids=codec_id)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_bits_that_are_named_are_the_bits_that_are_held(codec: object, dim: int) -> None:
    tokens = 128 * 40
    key, value = random_kv(1, 2, tokens + 500, dim)
    cache = filled_layer(codec, key, value)
    memory = cache.memory()
    stored = cache.layers[0].packed(0, 0)
    numbers = 2 * dim * (stored["key_codes"].shape[0] + stored["value_codes"].shape[0])
    held = 8 * (memory.parts["codes"] + memory.parts["scales"]) / numbers
    # A page of tokens that is not full yet has its whole room.
    assert held <= stored_bits(codec, dim) * (1 + 128 / tokens) + 0.01
    assert held > stored_bits(codec, dim) - 0.3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: kvpack.Q8(window=-1), "window=-1"),
        (lambda: kvpack.Rotated(bits=5), "bits=5"),
        (lambda: kvpack.Rotated(group=24), "group=24"),
        (lambda: kvpack.Rotated(seed="a"), "seed='a'"),
        (lambda: kvpack.Graded(key_bits=0.5), "key_bits=0.5"),
        (lambda: kvpack.Graded(key_bits="2"), "key_bits='2'"),
        (lambda: kvpack.Graded(window=100), "window=100"),
        (lambda: kvpack.KeyValue(kvpack.KIVI(), "q8"), "values='q8'"),
        (lambda: kvpack.PackedCache(tiny_config(head_dim=20), quantize=kvpack.Graded()), "multiples of 8"),
    ],
)
def test_what_does_not_fit_is_named(make: object, words: str) -> None:
    with pytest.raises(kvpack.OptionError, match=words):
        make()


# ---- keys less their mean --------------------------------------------------------------------------------------------


def test_centred_keys_are_packed_less_the_mean_of_the_first_prompt() -> None:
    codec = kvpack.Rotated(bits=4, window=16, center=True)
    config = tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64)
    centred, plain = (kvpack.PackedCache(config, quantize=c) for c in (codec, dataclasses.replace(codec, center=False)))
    valid = left_padding([200, 150])
    key, value = random_kv(2, 2, 200, 64)
    query = torch.randn(2, 4, 200, 64)
    weights = valid[:, None, :, None].float()
    mean = (key * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True)
    mask = causal_mask(valid, 200)
    forward(centred, key, value, query, mask)
    forward(plain, key - mean, value, query, mask)
    for _ in range(40):
        valid = torch.cat([valid, torch.ones(2, 1, dtype=valid.dtype)], 1)
        (key, value), query = random_kv(2, 2, 1, 64), torch.randn(2, 4, 1, 64)
        mask = causal_mask(valid, 1)
        out = forward(centred, key, value, query, mask)
        assert relative_error(out, forward(plain, key - mean, value, query, mask)) < 1e-5
    for row in range(2):
        for head in range(2):
            ours, theirs = (cache.layers[0].packed(row, head) for cache in (centred, plain))
            assert (ours["key_codes"] != theirs["key_codes"]).float().mean() < 1e-3  # the mean's last bit
    real = valid[:, None, :, None].bool().expand_as(centred.layers[0].keys)
    assert torch.allclose(centred.layers[0].keys[real], (plain.layers[0].keys + mean)[real], atol=1e-2)
    assert (centred.layers[0].keys[~real] == 0).all()
    assert centred.memory().total > plain.memory().total
    forked = centred.fork()
    forked.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(forked.layers[0].keys[0], centred.layers[0].keys[1])


@pytest.mark.parametrize("options", [{"softcap": 20.0}, {"s_aux": torch.zeros(4)}], ids=["softcap", "sinks"])
def test_keys_are_not_centred_where_attention_would_change(options: dict[str, Any]) -> None:
    config = tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64)
    cache = kvpack.PackedCache(config, quantize=kvpack.Rotated(center=True))
    key, value = random_kv(1, 2, 30, 64)
    layer, sinks = cache.layers[0], torch.zeros(4) if "s_aux" in options else None
    layer.update(key, value)
    with pytest.raises(kvpack.OptionError, match="center=True, for a model with learned sinks"):
        layer.commit(layer.version, torch.randn(1, 4, 30, 64), None, 0.1, options.get("softcap"), sinks)
    assert cache.get_seq_length() == 0
    forward(cache, key, value, torch.randn(1, 4, 30, 64))
    with pytest.raises(kvpack.OptionError, match="center=True"):
        forward(cache, *random_kv(1, 2, 1, 64), torch.randn(1, 4, 1, 64), **options)


def test_evictions_that_look_at_keys_do_not_see_centred_ones() -> None:
    codec = kvpack.KeyValue(kvpack.Rotated(center=True), kvpack.Q4())
    for evict in (kvpack.KeyDiff(), kvpack.L2Norm(), kvpack.AdaKV(kvpack.KeyDiff())):
        with pytest.raises(kvpack.OptionError, match="held less their mean"):
            kvpack.PackedCache(tiny_config(), evict=evict, quantize=codec)
    kvpack.PackedCache(tiny_config(), evict=kvpack.SnapKV(), quantize=codec)
    layers = kvpack.PerLayer(kvpack.Q8(), {0: kvpack.Rotated(center=True)})
    assert [layers.centers(kvpack.methods.Site(i, 2, None)) for i in range(2)] == [True, False]
    with pytest.raises(kvpack.OptionError, match="center=1 is not accepted"):
        kvpack.Rotated(center=1)
