"""KVQuant: what is stored is what the paper's equations give, and what a calibration finds."""

from __future__ import annotations

import itertools
from typing import Any

import kvpack
import pytest
import torch
from kvpack.calibration.kvquant import levels, measure, value_ranges
from kvpack.methods import KVQuant, KVQuantTables
from kvpack.rotation import rotations
from support import Tabled, filled_layer, forward, random_kv, tiny_config, tiny_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


class Reference:
    """The equations, in float64, of one KV head."""

    def __init__(self, codec: KVQuant, tables: KVQuantTables, head: int) -> None:
        self.codec, self.tables, self.head = codec, tables, head

    def steps(self, given: tuple[float, ...], norm: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Levels as they are held, with 8 bits; and as they are read, after Q-Norm."""
        exact = torch.tensor(given, dtype=torch.float64)
        span = exact[-1] - exact[0]
        held = exact[0] + span / 255 * ((exact - exact[0]) / span * 255).round()
        return held, held * norm[0] + norm[1] if self.codec.norm else held

    def turn(self, keys: Tensor, sign: float) -> Tensor:
        """Keys `[n, dim]` at positions 0, 1, ... turned forwards or back."""
        a, b = (list(side) for side in zip(*self.tables.pairs, strict=True))
        positions = torch.arange(keys.shape[0], dtype=torch.float64)[:, None]
        angles = sign * positions * torch.tensor(self.tables.frequencies, dtype=torch.float64)
        out = keys.double().clone()
        out[:, a] = keys[:, a] * angles.cos() - keys[:, b] * angles.sin()
        out[:, b] = keys[:, a] * angles.sin() + keys[:, b] * angles.cos()
        return out

    def places(self, dim: int) -> int:
        return max(round(self.codec.outliers * dim), 1) if self.codec.outliers else 0

    def keys(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, outliers as a mask, and what is read of keys before their rotation `[n, dim]`."""
        low, high = (torch.tensor(ends[self.head], dtype=torch.float64) for ends in (self.tables.low, self.tables.high))
        mid, half = (low + high) / 2, (high - low) / 2
        x = (keys - mid) / half
        held, read = self.steps(self.tables.key_levels, self.tables.key_norm)
        codes = (x[..., None] - held).abs().argmin(-1)
        furthest = x.abs().argsort(1, descending=True)[:, : self.places(keys.shape[1])]
        apart = torch.zeros_like(x, dtype=torch.bool).scatter_(1, furthest, True) & (x.abs() > 1)
        return codes, apart, torch.where(apart, keys, mid + half * read[codes])

    def values(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of values `[n, dim]`, token by token."""
        held, read = self.steps(self.tables.value_levels, self.tables.value_norm)
        codes, apart = torch.zeros_like(values, dtype=torch.int64), torch.zeros_like(values, dtype=torch.bool)
        out = values.double().clone()
        for t, x in enumerate(values.double()):
            inside = list(x.argsort())
            for _ in range(self.places(len(x))):
                above, below = x[inside[-1]] - x[inside[-2]], x[inside[1]] - x[inside[0]]
                apart[t, inside.pop(-1 if above > below else 0)] = True
            low, high = x[inside[0]], x[inside[-1]]
            mid, half = (low + high) / 2, (high - low) / 2
            codes[t] = ((x - mid)[:, None] / half - held).abs().argmin(1)
            read_here = mid + half * read[codes[t]]
            out[t] = torch.where(apart[t], x, read_here)
        return codes, apart, out


def site_tables(codec: Tabled, heads: int, dim: int) -> KVQuantTables:
    config = tiny_config(layers=1, heads=2 * heads, kv_heads=heads, head_dim=dim)
    return codec._of(kvpack.methods.Site(0, 1, config))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("bits", "dim", "outliers"), [(2, 64, 0.01), (3, 80, 0.05), (4, 128, 0.01), (3, 64, 0.0), (2, 256, 0.02)]
)
def test_what_is_stored_is_the_equations(bits: int, dim: int, outliers: float, norm: bool) -> None:
    codec = Tabled(bits=bits, outliers=outliers, norm=norm, window=7, sinks=4)
    tables = site_tables(codec, 2, dim)
    references = [Reference(codec, tables, head) for head in range(2)]
    plain, value = random_kv(1, 2, 300, dim)
    plain = plain * 3  # so that some are outliers
    key = torch.stack([reference.turn(plain[0, h], 1) for h, reference in enumerate(references)])[None].float()
    cache = filled_layer(codec, key, value)
    packed = slice(4, 293)
    for head, reference in enumerate(references):
        stored = cache.layers[0].packed(0, head)
        apart_keys, apart_values = cache.layers[0].outliers(0, head)
        wanted = (reference.keys(reference.turn(key[0, head], -1)[packed]), reference.values(value[0, head, packed]))
        for name, found, (codes, apart, read) in zip(("key", "value"), (apart_keys, apart_values), wanted, strict=True):
            different = stored[f"{name}_codes"] != codes
            assert different.float().mean() < 1e-3  # a number within rounding of a boundary
            where = torch.zeros_like(apart)
            where[found[:, 0].long(), found[:, 1].long()] = True
            assert (where & ~apart).float().mean() < 1e-4
            assert (apart & ~where).float().mean() < 1e-3  # a rest of exactly 0 is not told apart from none
            if outliers:
                assert apart.any()
            if name == "key":
                held = reference.turn(cache.layers[0].keys[0, head].double(), -1)[packed]
            else:
                held = cache.layers[0].values[0, head, packed].double()
            same = ~different.any(1)
            torch.testing.assert_close(held[same], read[same], rtol=2e-3, atol=5e-3)
    assert torch.equal(cache.layers[0].values[0, :, :4], value[0, :, :4])
    assert torch.equal(cache.layers[0].keys[0, :, 293:], key[0, :, 293:])


def test_every_token_can_be_packed_at_once() -> None:
    """Grids are static, so that it does not matter in what pieces tokens arrive."""
    key, value = random_kv(1, 2, 200, 64)
    codec = Tabled(bits=3)
    whole = filled_layer(codec, key, value)
    pieces = filled_layer(codec, key[:, :, :150], value[:, :, :150])
    for t in range(150, 200):
        pieces.update(key[:, :, t : t + 1], value[:, :, t : t + 1], 0)
    for one, other in ((whole, pieces), (pieces, whole)):
        torch.testing.assert_close(one.layers[0].keys[:, :, :199], other.layers[0].keys[:, :, :199], rtol=0, atol=1e-5)
        assert torch.equal(one.layers[0].values[:, :, :199], other.layers[0].values[:, :, :199])


def test_it_says_what_it_needs() -> None:
    with pytest.raises(kvpack.OptionError, match="calibration"):
        kvpack.PackedCache(tiny_config(), quantize=kvpack.KVQuant(bits=3))
    tables = site_tables(Tabled(), 2, 64)
    with pytest.raises(kvpack.OptionError, match="KV heads"):
        kvpack.PackedCache(tiny_config(layers=1, head_dim=32), quantize=kvpack.KVQuant(tables={0: tables}))
    cache = kvpack.PackedCache(
        tiny_config(layers=1, kv_heads=1, head_dim=64), quantize=kvpack.KVQuant(tables={0: tables})
    )
    with pytest.raises(kvpack.OptionError, match="KV heads"):
        cache.update(*random_kv(1, 1, 5, 64), 0)
    for options, words in (
        ({"bits": 8}, "bits=8"),
        ({"outliers": 0.5}, "outliers=0.5"),
        ({"norm": 1}, "norm=1"),
        ({"sinks": -1}, "sinks=-1"),
    ):
        with pytest.raises(kvpack.OptionError, match=words):
            kvpack.KVQuant(**options)


def test_angles_are_counted_once() -> None:
    key, value = random_kv(1, 2, 1000, 64)
    cache = kvpack.PackedCache(tiny_config(layers=3, heads=4, kv_heads=2, head_dim=64), quantize=Tabled(bits=3))
    for layer in range(3):
        forward(cache, key, value, layer=layer)
    memory = cache.memory()
    shared = memory.layers[0] - memory.layers[1]
    assert memory.layers[1] == memory.layers[2]
    assert 2 * 32 * 128 * 4 <= shared <= 2 * 32 * 128 * 4 + 20_000


# ---- calibration -----------------------------------------------------------------------------------------------------


ROTARY: dict[str, tuple[str, dict[str, Any], int]] = {
    "halves": ("llama", {}, 32),
    "some channels": ("gpt_neox", {"rotary_pct": 0.25}, 8),
    "neighbours": ("cohere", {}, 32),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "attention_factor": 1.2,
                "original_max_position_embeddings": 256,
            }
        },
        32,
    ),
    "none": ("gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}, 0),
}


@pytest.mark.parametrize("kind", ROTARY)
def test_the_rotation_is_found(kind: str) -> None:
    """Pre-RoPE, the same tokens have the same keys wherever they stand."""
    architecture, options, channels = ROTARY[kind]
    base: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**(base | options))).eval()
    ids = torch.randint(3, 99, (1, 100))
    found = rotations(model, ids)
    assert len(found) == 2
    for rotation in found:
        assert len({channel for pair in rotation.pairs for channel in pair}) == 2 * len(rotation.pairs) == channels
    if not channels:
        return
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    torch.testing.assert_close(
        torch.tensor(sorted(found[0].frequencies)), rotary.inv_freq.sort().values, rtol=1e-4, atol=1e-6
    )
    plain = []
    for first in (0, 777):
        cache = kvpack.forward.forward(model, ids, first=first)[0]
        plain.append(found[1].undo(cache.layers[1].keys, torch.arange(first, first + 100)))
    torch.testing.assert_close(plain[0], plain[1], rtol=1e-3, atol=1e-3)


def test_levels_are_a_weighted_k_means() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(3, 2000, 16), torch.rand(3, 2000, 16) ** 4
    low, high = torch.full((3, 1, 16), -2.0), torch.full((3, 1, 16), 2.0)
    found, norm = levels(x, weights, low, high, 3)
    inside = x.abs() <= 2
    normalised, cost = (x / 2)[inside].double(), weights[inside].double()
    centers = torch.tensor(found, dtype=torch.float64)
    nearest = (normalised[:, None] - centers).abs().argmin(1)
    for i, center in enumerate(centers):  # each level is the weighted mean of what is nearest to it
        own = nearest == i
        assert abs((normalised[own] * cost[own]).sum() / cost[own].sum() - center) < 5e-3
    error = (cost * (normalised - centers[nearest]).square()).sum()
    even = (torch.arange(8, dtype=torch.float64) + 0.5) / 4 - 1
    assert error < (cost * (normalised[:, None] - even).square().amin(1)).sum()
    read = norm[0] * centers[nearest] + norm[1]
    assert read.mean().item() == pytest.approx(normalised.mean().item(), abs=1e-6)
    assert read.std().item() == pytest.approx(normalised.std().item(), rel=1e-6)


def test_values_have_their_ranges_without_outliers() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0, 9.0], [-8.0, 1.0, 2.0, 3.0]])
    low, high = value_ranges(values, 0.25)
    assert low.tolist() == [[0.0], [1.0]]
    assert high.tolist() == [[2.0], [3.0]]


@pytest.mark.parametrize("gradients", [True, False])
def test_a_calibrated_cache_is_near_the_full_one(gradients: bool) -> None:
    model = tiny_model(tiny_config(initializer_range=0.3, max_position_embeddings=4096))
    documents = [torch.randint(3, 99, (1, 300)) for _ in range(3)]
    errors = {}
    with torch.no_grad():
        full = model(documents[0]).logits
        for bits, share in itertools.product((2, 4), (0.0, 0.1)):
            method = KVQuant(bits=bits, outliers=share)
            tables = measure(model, documents, method, gradients=gradients)
            assert sorted(tables) == [0, 1]
            cache = kvpack.PackedCache(model, quantize=KVQuant(bits=bits, outliers=share, tables=tables))
            out = [model(documents[0][:, i : i + 50], past_key_values=cache).logits for i in range(0, 300, 50)]
            errors[bits, share] = (torch.cat(out, 1) - full).square().mean().item()
    assert errors[4, 0.1] < errors[2, 0.1] / 4
    assert errors[4, 0.1] < errors[4, 0.0]
    assert errors[2, 0.1] < errors[2, 0.0]
