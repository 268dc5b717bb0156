"""What tests of refusals share: a filled cache, and what has to be the same after one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kvpack
import pytest
import torch
from support import assert_same_contents, forward, random_kv, tiny_config
from torch import Tensor

TOKENS = 300


def filled(codec: Any = None, batch: int = 2, dtype: torch.dtype = torch.float32) -> kvpack.PackedCache:
    cache = kvpack.PackedCache(tiny_config(layers=1), quantize=codec)
    forward(cache, *random_kv(batch, 2, TOKENS, 32, dtype=dtype), query=torch.zeros(batch, 4, TOKENS, 32, dtype=dtype))
    forward(cache, *random_kv(batch, 2, 1, 32, dtype=dtype), query=torch.zeros(batch, 4, 1, 32, dtype=dtype))
    return cache


def next_output(cache: kvpack.PackedCache) -> Tensor | None:
    """What attention over the cache and three tokens more gives; asked of a fork, so that the cache stays."""
    if cache.get_seq_length() == 0:
        return None
    held = cache.layers[0].keys
    generator = torch.Generator().manual_seed(5)
    key, value, query = (
        torch.randn(held.shape[0], heads, 3, held.shape[3], generator=generator).to(held.dtype) for heads in (2, 2, 4)
    )
    return forward(cache.fork(), key, value, query)


@contextmanager
def refused(cache: kvpack.PackedCache, error: Any, *named: object) -> Iterator[None]:
    """The block raises exactly `error` (or one of them), its message has all of `named`, and `cache` stays."""
    before, twin, output = cache.memory().total, cache.fork(), next_output(cache)
    with pytest.raises(error) as caught:
        yield
    assert caught.type in (error if isinstance(error, tuple) else (error,))
    for word in named:
        assert str(word) in str(caught.value)
    assert cache.memory().total == before
    assert [layer.get_seq_length() for layer in cache.layers] == [layer.get_seq_length() for layer in twin.layers]
    assert_same_contents(cache, twin)
    if output is not None:
        assert torch.equal(next_output(cache), output)
