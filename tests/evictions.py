"""What tests of evictions share: the methods, prompts, and what a cache holds of one."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from kvpack.methods import EVICT
from kvpack.rotation import Rotation
from support import forward, random_kv, tiny_config, with_registered
from torch import Tensor

FREQUENCIES = 0.9 * 0.7 ** torch.arange(16)
ROTATION = Rotation(tuple((i, i + 16) for i in range(16)), tuple(FREQUENCIES.tolist()))


class Rotary:
    """Of a model whose rotary embedding is known: halves are pairs."""

    def _rotations(self, site: Any) -> list[Rotation]:
        return [ROTATION] * site.layers


class Turned(Rotary, kvpack.ExpectedAttention):
    """Expected attention of it."""


class Streaming(Rotary, kvpack.StreamingLLM):
    """Positions within the cache of it."""


def keydiff(keys: Tensor, values: Tensor, queries: Tensor | None, positions: Tensor) -> Tensor:
    """KeyDiff as a user writes it: `-cos(k, m)` with the mean `m` of all keys' directions."""
    mean = torch.nn.functional.normalize(keys, dim=-1).mean(1, keepdim=True)
    return -torch.nn.functional.cosine_similarity(keys, mean, dim=-1)


EVICTIONS = with_registered(
    [
        kvpack.SnapKV(budget=0.25, window=16),
        kvpack.SnapKV(budget=60, window=8, kernel=3, pooling="max", decode=True, block=32),
        kvpack.PyramidKV(budget=0.3, window=8),
        kvpack.H2O(budget=0.25, block=32),
        kvpack.A2SF(budget=48, alpha=0.9, recent=8, block=32),
        kvpack.TOVA(budget=0.25, block=32),
        kvpack.StreamingLLM(budget=64, block=32),
        Streaming(budget=64, block=32, rerotate=True),
        kvpack.Longformer(window=24, dilation=3, block=32),
        Turned(budget=0.25),
        kvpack.KeyDiff(budget=0.25),
        kvpack.L2Norm(budget=0.25, recent=4, decode=True, block=32),
        kvpack.Random(budget=0.25, seed=3),
        kvpack.AdaKV(kvpack.SnapKV(budget=0.25, window=16)),
        kvpack.AdaKV(Turned(budget=0.25)),
        kvpack.AdaKV(kvpack.H2O(budget=0.25, block=32), floor=0.5),
        kvpack.Scored(keydiff, budget=0.25, recent=4, decode=True, block=32),
    ],
    EVICT,
)
CODECS = [kvpack.Exact(), kvpack.KIVI(bits=8, window=32), kvpack.Q8(), kvpack.Rotated(bits=8, window=16)]


def name(method: Any) -> str:
    inner = getattr(method, "method", method)
    return f"{'adakv-' if inner is not method else ''}{inner.name}" if hasattr(inner, "name") else str(inner)


every_eviction = pytest.mark.parametrize("evict", EVICTIONS, ids=name)
every_codec = pytest.mark.parametrize("codec", CODECS, ids=name)


def prompt(
    tokens: int, batch: int = 1, heads: int = 2, groups: int = 2, dim: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and queries that look at some of the keys more than at others."""
    key, value = random_kv(batch, heads, tokens, dim)
    return key, value, torch.randn(batch, heads * groups, tokens, dim) / 2


def cache_after(
    evict: Any, key: Tensor, value: Tensor, query: Tensor, codec: Any = None, mask: Tensor | None = None
) -> kvpack.PackedCache:
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    config = tiny_config(layers=1, heads=heads * groups, kv_heads=heads, head_dim=key.shape[3])
    cache = kvpack.PackedCache(config, evict=evict, quantize=codec)
    forward(cache, key, value, query, mask)
    return cache


def kept(cache: kvpack.PackedCache, layer: int = 0, row: int = 0) -> list[list[int]]:
    heads = cache.layers[layer].kv_heads
    return [cache.kept(layer, head, row) for head in range(heads)]
