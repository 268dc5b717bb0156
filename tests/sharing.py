"""What tests of sharing and of crops share."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from reference import attention
from support import contents, forward, random_kv, relative_error, tiny_config
from torch import Tensor

LOSSY = pytest.mark.parametrize("bits", [2, 4, 8])


def filled(codec: Any, tokens: int, batch: int = 1, seed: int = 0, layers: int = 2) -> kvpack.PackedCache:
    """A cache that was given `tokens` tokens in one prompt; equal seeds give equal tokens."""
    torch.manual_seed(seed)
    cache = kvpack.PackedCache(tiny_config(layers=layers), quantize=codec)
    for layer in range(layers):
        forward(cache, *random_kv(batch, 2, tokens, 32), layer=layer)
    return cache


def grow(cache: kvpack.PackedCache, sizes: list[int], seed: int) -> list[Tensor]:
    """Feeds random tokens, equal for equal seeds, and returns what attention gave."""
    torch.manual_seed(seed)
    batch = cache.layers[0].batch_size
    return [
        forward(cache, *random_kv(batch, 2, new, 32), query=torch.randn(batch, 4, new, 32), layer=layer)
        for new in sizes
        for layer in range(len(cache.layers))
    ]


def assert_attends_to_what_it_holds(cache: kvpack.PackedCache, new: int) -> None:
    """Attention of `new` tokens more equals attention over the materialised keys and values."""
    batch, past = cache.layers[0].batch_size, cache.get_seq_length()
    query = torch.randn(batch, 4, new, 32)
    for layer in range(len(cache.layers)):
        key, value = random_kv(batch, 2, new, 32)
        held = [torch.cat(pair, dim=2) for pair in zip(contents(cache.fork())[layer], (key, value), strict=True)]
        out = forward(cache, key, value, query, layer=layer)
        visible = torch.ones(new, past + new, dtype=torch.bool).tril(past)
        expected = [attention(query[row], held[0][row], held[1][row], visible) for row in range(batch)]
        assert relative_error(out, torch.stack(expected)) < 1e-4
