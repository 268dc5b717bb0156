"""One cache in several threads."""

from __future__ import annotations

import sys
import threading
import time

import kvpack
import torch
from kvpack.attention import kvpack_attention
from kvpack.layer import PackedLayer
from support import FakeAttention, random_kv, tiny_config


def test_two_threads_in_one_cache() -> None:
    """While one thread attends, another one that changes the cache waits, or comes first: they never mix."""
    cache = kvpack.PackedCache(tiny_config(layers=1, heads=8, kv_heads=2, head_dim=64), quantize=kvpack.KIVI())
    key, value = random_kv(1, 2, 16_384, 64)
    cache.update(key, value, 0)
    query = torch.randn(1, 8, 4096, 64)
    handles = cache.update(key[:, :, :4096], value[:, :, :4096], 0)
    alone = kvpack_attention(FakeAttention(4), query[:, :, -1:], *handles, None)[0]
    outputs, stale = [], []

    def attend() -> None:
        with torch.no_grad():
            try:
                outputs.append(kvpack_attention(FakeAttention(4), query, *handles, None)[0])
            except kvpack.StaleHandleError as error:
                stale.append(error)

    thread = threading.Thread(target=attend)
    thread.start()
    while thread.is_alive():  # until it is in the cache, as far as can be told
        frame = sys._current_frames().get(thread.ident or 0)
        if frame is not None and frame.f_code is PackedLayer.attend.__code__:
            break
    time.sleep(0.05)
    cache.update(key[:, :, :1], value[:, :, :1], 0)
    thread.join()
    assert len(outputs) + len(stale) == 1
    for out in outputs:
        assert torch.allclose(out[:, -1:], alone, atol=1e-5)
    assert cache.get_seq_length() == 16_384 + 4096 + 1


def test_looking_from_several_threads_is_not_refused() -> None:
    """Forks, lengths and bytes may be asked for by any number of threads at once."""
    cache = kvpack.PackedCache(tiny_config(layers=1, heads=8, kv_heads=2, head_dim=64), quantize=kvpack.KIVI())
    cache.update(*random_kv(1, 2, 4096, 64), 0)
    memory = cache.memory()
    failures: list[Exception] = []

    def look() -> None:
        try:
            for _ in range(300):
                fork = cache.fork()
                assert fork.get_seq_length() == 4096
                assert cache.memory().parts == memory.parts
        except (AssertionError, kvpack.ConcurrencyError) as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
