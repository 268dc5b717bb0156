"""Block, rotated and graded formats: what is stored is what slow references give, in the bits that are named."""

from __future__ import annotations

import itertools
import math

import kvpack
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from reference import quantise
from support import CODECS, codec_id, contents, filled_layer, random_kv, stored_bits, tiny_config
from torch import Tensor

# ---- blocks -------------------------------------------------------------------------------------------------------


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


# ---- rotated ------------------------------------------------------------------------------------------------------


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


# ---- all ----------------------------------------------------------------------------------------------------------


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
