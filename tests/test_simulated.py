"""Codecs from Python functions: what they return is held, and their errors leave no trace."""

from __future__ import annotations

import threading

import kvpack
import pytest
import torch
from evictions import keydiff
from support import ids_of, random_kv, tiny_config, tiny_model
from torch import Tensor

LAYERS = 2


class BrokenError(Exception):
    """The user's own."""


def halved(x: Tensor) -> Tensor:
    return x / 2


def test_a_simulated_codec_holds_what_its_functions_return() -> None:
    model, ids = tiny_model(tiny_config(LAYERS)), ids_of(2, 70)
    full = kvpack.PackedCache(model)
    codec = kvpack.Simulated(keys=halved, group=8, window=16, sinks=3)
    cache = kvpack.PackedCache(model, quantize=codec)
    with torch.no_grad():
        for one in (full, cache):
            model(ids, past_key_values=one)
    packed = (70 - 3 - 16) // 8 * 8
    for got, want in zip(cache.layers, full.layers, strict=True):
        expected = want.keys.clone()
        expected[:, :, 3 : 3 + packed] /= 2
        if got.index == 0:  # what the second layer is given depends on the first one
            assert torch.equal(got.keys, expected)
            assert torch.equal(got.values, want.values)
    assert 0 < cache.lossy_share() < 0.5
    assert cache.layers[0].memory()["codes"] == 0


def test_a_simulated_codec_is_one_among_others() -> None:
    """Rounded to what KIVI's grids give, group by group: the same outputs as KIVI's."""
    torch.manual_seed(0)

    def grid(x: Tensor, dim: int) -> Tensor:
        low, high = x.aminmax(dim=dim, keepdim=True)
        low, step = low.half().float(), ((high - low) / 15).half().float()
        return ((x - low) / step).round().clamp(0, 15) * step + low

    codec = kvpack.Simulated(keys=lambda k: grid(k, 0), values=lambda v: grid(v, 1), group=32, window=0, sinks=0)
    config = tiny_config(1)
    key, value = random_kv(1, 2, 96, 32)
    caches = [
        kvpack.PackedCache(config, quantize=quantize)
        for quantize in (codec, kvpack.KIVI(bits=4, group=32, window=32, sinks=0))
    ]
    for cache in caches:
        cache.update(key, value, 0)
        cache.update(*random_kv(1, 2, 1, 32), 0)
    mine, kivi = (cache.layers[0] for cache in caches)
    torch.testing.assert_close(mine.keys[:, :, :96], kivi.keys[:, :, :96], atol=1e-5, rtol=1e-5)
    assert not torch.equal(mine.keys[:, :, :96], key)


def test_what_a_codecs_function_raises_comes_through() -> None:
    model, ids = tiny_model(tiny_config(LAYERS)), ids_of(1, 40)

    def broken(x: Tensor) -> Tensor:
        raise BrokenError("codec")

    cache = kvpack.PackedCache(model, quantize=kvpack.Simulated(values=broken, group=4, window=0))
    with torch.no_grad(), pytest.raises(BrokenError, match="codec"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    for wrong, error in ((lambda x: x[:1], kvpack.ShapeError), (lambda x: x / 0, kvpack.NonFiniteError)):
        cache = kvpack.PackedCache(model, quantize=kvpack.Simulated(values=wrong, group=4, window=0))
        with torch.no_grad(), pytest.raises(error):
            model(ids, past_key_values=cache)
    with pytest.raises(kvpack.OptionError, match="keys=3 is not accepted"):
        kvpack.Simulated(keys=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("after", [1, 2, 3, 7])
def test_a_codecs_function_may_fail_at_any_call_while_decoding(after: int) -> None:
    model, ids, token = tiny_model(tiny_config(LAYERS)), ids_of(2, 40), ids_of(2, 1)
    left = 10_000

    def countdown(x: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise BrokenError("codec")
        return x / 2

    cache = kvpack.PackedCache(model, quantize=kvpack.Simulated(countdown, countdown, group=4, window=8))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(3):
            model(token, past_key_values=cache)
        left = after
        for _ in range(12):
            fork, before = cache.fork(), (cache.memory(), cache.get_seq_length(), cache.layers[1].keys)
            try:
                model(token, past_key_values=cache)
            except BrokenError:
                break
        else:
            pytest.fail("it was never called")
        left = 10_000
        assert (cache.memory(), cache.get_seq_length()) == before[:2]
        assert torch.equal(cache.layers[1].keys, before[2])
        assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=fork).logits)


def test_a_codecs_function_that_asks_its_cache_is_refused_and_does_not_wait_for_itself() -> None:
    cache: kvpack.PackedCache

    def asking(x: Tensor) -> Tensor:
        cache.memory()
        return x

    # Enough tokens that other codecs would be at work on several threads.
    cache = kvpack.PackedCache(tiny_config(1), quantize=kvpack.Simulated(values=asking, group=8, window=0))
    with pytest.raises(kvpack.ConcurrencyError, match="calling the function"):
        cache.layers[0].load(*random_kv(1, 2, 2000, 32), None)


@pytest.mark.parametrize("threads", [1, 2])
def test_functions_are_called_on_the_callers_thread(threads: int) -> None:
    """Another thread would wait for what the caller holds: a look, such as that for the size of a mask, has the GIL."""
    seen = set()

    def halving(x: Tensor) -> Tensor:
        seen.add(threading.current_thread())
        return x / 2

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = tiny_model(tiny_config(LAYERS), "sdpa")
        codec = kvpack.Simulated(keys=halving, values=halving, group=8, window=0)
        cache = kvpack.PackedCache(model, evict=kvpack.KeyDiff(budget=900, decode=True, block=4), quantize=codec)
        with torch.no_grad():
            model(ids_of(1, 2000), past_key_values=cache)
            model(ids_of(1, 1), past_key_values=cache)
    finally:
        torch.set_num_threads(before)
    assert seen == {threading.current_thread()}


def test_both_are_measured_like_any_method() -> None:
    contenders = kvpack.evaluation.contenders.parse_all(
        ["q8", kvpack.Scored(keydiff, budget=0.25), kvpack.Simulated(keys=halved), kvpack.KIVI(bits=2)]
    )
    assert [one.label for one in contenders] == [
        "q8", "Scored(keydiff, budget=0.25)", "Simulated(keys=halved, group=32, window=128)", "kivi:bits=2"
    ]  # fmt: skip
    assert isinstance(contenders[1].new_cache(tiny_config()), kvpack.PackedCache)
