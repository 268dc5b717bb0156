"""Options of evictions: what is accepted, and what is told."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
from evictions import cache_after, prompt
from support import Tabled, tiny_config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kvpack.SnapKV(budget=0), "budget=0 is not accepted; accepted: .*from 1"),
        (lambda: kvpack.SnapKV(budget=1.5), "budget=1.5 is not accepted"),
        (lambda: kvpack.SnapKV(budget="a"), "budget='a' is not accepted"),
        (lambda: kvpack.SnapKV(budget=()), "budget: given 0 numbers"),
        (lambda: kvpack.SnapKV(kernel=4), "kernel=4 is not accepted; accepted: odd"),
        (lambda: kvpack.SnapKV(pooling="min"), "pooling='min' is not accepted; accepted: 'avg', 'max'"),
        (lambda: kvpack.SnapKV(window=0), "window=0"),
        (lambda: kvpack.SnapKV(sinks=-1), "sinks=-1"),
        (lambda: kvpack.StreamingLLM(rerotate=1), "rerotate=1 is not accepted; accepted: True, False"),
        (lambda: kvpack.SnapKV(protect=((5, 2),)), r"protect: \(5, 2\) is not accepted"),
        (lambda: kvpack.SnapKV(protect=7), "protect=7 is not accepted"),
        (lambda: kvpack.H2O(decode="yes"), "decode='yes' is not accepted"),
        (lambda: kvpack.H2O(block=0), "block=0"),
        (lambda: kvpack.H2O(recent=-0.5), "recent=-0.5"),
        (lambda: kvpack.A2SF(alpha=2), "alpha=2 is not accepted; accepted: 0 to 1"),
        (lambda: kvpack.ExpectedAttention(future=0), "future=0"),
        (lambda: kvpack.ExpectedAttention(epsilon=-1), "epsilon=-1"),
        (lambda: kvpack.ExpectedAttention(values=1), "values=1 is not accepted; accepted: True, False"),
        (lambda: kvpack.AdaKV(kvpack.TOVA()), "all heads of a layer keep the same"),
        (lambda: kvpack.AdaKV(kvpack.SnapKV(), floor=3), "floor=3"),
        (lambda: kvpack.AdaKV(7), "method=7 is not accepted"),
        (
            lambda: kvpack.PackedCache(tiny_config(), evict="snapkv"),
            "evict='snapkv' is not accepted; accepted: kvpack.SnapKV",
        ),
    ],
)
def test_bad_options_are_named(make: Any, message: str) -> None:
    with pytest.raises(kvpack.OptionError, match=message):
        make()


def test_keys_before_rope_lose_no_token() -> None:
    """KVQuant's pages hold consecutive positions, alone, for keys only, or in one layer."""
    codec = Tabled(bits=3)
    for quantize in (codec, kvpack.KeyValue(codec, kvpack.Q8()), kvpack.PerLayer(kvpack.Q8(), {0: codec})):
        with pytest.raises(kvpack.OptionError, match=r"not accepted with .*consecutive positions"):
            kvpack.PackedCache(tiny_config(), evict=kvpack.KeyDiff(), quantize=quantize)
    kvpack.PackedCache(tiny_config(), evict=kvpack.KeyDiff(), quantize=kvpack.KeyValue(kvpack.Q8(), codec))


def test_methods_as_text() -> None:
    from kvpack.methods.spec import parse_spec

    options = parse_spec("adakv:floor=0.1(snapkv:budget=0.25:window=16)+kivi:bits=4").options
    assert options["evict"] == kvpack.AdaKV(kvpack.SnapKV(budget=0.25, window=16), floor=0.1)
    assert options["quantize"] == kvpack.KIVI(bits=4)
    assert parse_spec("h2o:budget=100").options == {"evict": kvpack.H2O(budget=100)}
    for text in ("adakv(kivi:bits=4)", "adakv(snapkv", "snapkv(h2o)", "adakv(adakv(snapkv))", "snapkv+h2o"):
        with pytest.raises(kvpack.OptionError):
            parse_spec(text)


def test_what_is_kept_is_told_layer_by_layer() -> None:
    cache = cache_after(kvpack.StreamingLLM(budget=10), *prompt(50))
    assert cache.kept(0, 1) == [0, 1, 2, 3, *range(44, 50)]
    with pytest.raises(kvpack.ShapeError, match="layer: given 1"):
        cache.kept(1, 0)
    with pytest.raises(kvpack.ShapeError, match="head"):
        cache.kept(0, 5)
    assert "StreamingLLM" in repr(cache)
    assert "StreamingLLM" in cache.info()["evict"]
