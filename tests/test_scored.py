"""Scores from Python functions: they keep what Rust keeps, and their errors leave no trace."""

from __future__ import annotations

import threading
from typing import Any

import kvpack
import pytest
import torch
from evictions import keydiff
from support import ids_of, tiny_config, tiny_model
from torch import Tensor

LAYERS = 2


def generated(model: Any, evict: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> kvpack.PackedCache:
    cache = kvpack.PackedCache(model, evict=evict, **options)
    model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, min_new_tokens=40, do_sample=False
    )
    return cache


def kept(cache: kvpack.PackedCache, batch: int) -> list[list[int]]:
    heads = cache.config.num_key_value_heads
    return [cache.kept(i, h, b) for i in range(len(cache.layers)) for h in range(heads) for b in range(batch)]


@pytest.mark.parametrize("quantize", [None, kvpack.KIVI(bits=4, group=8, window=16), kvpack.Rotated(bits=8, window=8)])
@pytest.mark.parametrize("pads", [0, 7])
@pytest.mark.parametrize("adakv", [False, True])
def test_keydiff_in_python_keeps_what_the_one_in_rust_keeps(quantize: Any, pads: int, adakv: bool) -> None:
    model, ids = tiny_model(tiny_config(LAYERS)), ids_of(3, 90)
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    options = {"budget": 24, "sinks": 2, "recent": 4, "decode": True, "block": 5}
    caches = []
    for method in (kvpack.KeyDiff(**options), kvpack.Scored(keydiff, **options)):
        method = kvpack.AdaKV(method) if adakv else method
        caches.append(generated(model, method, ids, mask, quantize=quantize))
    rust, python = caches
    assert kept(rust, 3) == kept(python, 3)
    assert max(map(len, kept(rust, 3))) < 90
    assert torch.equal(rust.layers[1].keys, python.layers[1].keys)


def test_a_function_sees_keys_values_queries_and_positions() -> None:
    config = tiny_config(LAYERS, heads=4, kv_heads=2, head_dim=32)
    model, ids = tiny_model(config), ids_of(1, 50)
    seen: list[tuple[Any, ...]] = []

    def score(keys: Tensor, values: Tensor, queries: Tensor, positions: Tensor, layer: int) -> Tensor:
        seen.append((keys.clone(), values.clone(), queries.clone(), positions.clone(), layer))
        return positions.float()

    cache = kvpack.PackedCache(model, evict=kvpack.Scored(score, budget=20, queries=6))
    full = kvpack.PackedCache(model)
    queries: dict[int, Tensor] = {}

    def watch(module: Any, query: Tensor, *args: Any, **options: Any) -> Any:
        queries[module.layer_idx] = query.clone()
        return kvpack.attention.kvpack_attention(module, query, *args, **options)

    from transformers import AttentionInterface

    AttentionInterface.register("kvpack", watch)
    try:
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model(ids, past_key_values=full)
    finally:
        AttentionInterface.register("kvpack", kvpack.attention.kvpack_attention)
    assert [layer for *_, layer in seen] == [0, 1]
    for keys, values, q, positions, layer in seen:
        assert keys.dtype == torch.float32
        torch.testing.assert_close(keys, full.layers[layer].keys[0])
        torch.testing.assert_close(values, full.layers[layer].values[0])
        scale = config.head_dim**-0.5
        torch.testing.assert_close(q, queries[layer][0, :, -6:].transpose(0, 1) * scale)
        assert positions.dtype == torch.int64
        assert torch.equal(positions, torch.arange(50).expand(2, -1))
    assert cache.kept(0, 0) == list(range(30, 50))


def test_queries_are_none_where_none_are_wanted() -> None:
    seen = []

    def score(keys: Tensor, values: Tensor, queries: Tensor | None, positions: Tensor) -> Tensor:
        seen.append(queries)
        return positions.float()

    generated(tiny_model(tiny_config(LAYERS)), kvpack.Scored(score, budget=20), ids_of(1, 60))
    assert seen == [None, None]


def test_it_works_with_attention_that_is_not_ours() -> None:
    model, ids = tiny_model(tiny_config(LAYERS), "sdpa"), ids_of(1, 60)
    rust = generated(model, kvpack.KeyDiff(budget=24), ids)
    python = generated(model, kvpack.Scored(keydiff, budget=24), ids)
    assert kept(rust, 1) == kept(python, 1)


class BrokenError(Exception):
    """The user's own."""


@pytest.mark.parametrize("quantize", [None, kvpack.Q8()])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_what_a_function_raises_comes_through_and_nothing_is_lost(quantize: Any, layer: int) -> None:
    model, ids = tiny_model(tiny_config(LAYERS)), ids_of(2, 60)
    fails = False

    def score(keys: Tensor, values: Tensor, queries: Any, positions: Tensor, layer: int, at: int = layer) -> Tensor:
        if fails and layer == at:
            raise BrokenError("here")
        return keydiff(keys, values, queries, positions)

    method = kvpack.Scored(score, budget=24, decode=True, block=4)
    cache, fork = generated(model, method, ids, quantize=quantize), None
    fork = cache.fork()
    before = (kept(cache, 2), cache.memory(), cache.get_seq_length())
    fails = True
    token = ids_of(2, 1)

    def go_on() -> None:
        nonlocal before, fork
        for _ in range(9):
            model(token, past_key_values=cache)
            before = (kept(cache, 2), cache.memory(), cache.get_seq_length())
            fork = cache.fork()

    with torch.no_grad():
        with pytest.raises(BrokenError, match="here") as raised:
            go_on()
        assert raised.traceback[-1].name == "score"
        assert (kept(cache, 2), cache.memory(), cache.get_seq_length()) == before
        fails = False
        assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=fork).logits)


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        (lambda keys: 3, kvpack.ShapeError, "returned int, expected a tensor"),
        (lambda keys: keys, kvpack.ShapeError, r"returned \(2, 40, 32\), expected a tensor \(2, 40\)"),
        (lambda keys: keys.mean(-1) * torch.nan, kvpack.OptionError, "returned NaN"),
    ],
)
def test_what_is_no_score_is_refused(result: Any, error: type[Exception], words: str) -> None:
    model, ids = tiny_model(tiny_config(LAYERS)), ids_of(1, 40)
    cache = kvpack.PackedCache(model, evict=kvpack.Scored(lambda keys, *_: result(keys), budget=10))
    with torch.no_grad(), pytest.raises(error, match=words):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert cache.memory().total == kvpack.PackedCache(model).memory().total


def test_an_interrupt_in_a_function_leaves_the_cache_as_it_was() -> None:
    model, ids = tiny_model(tiny_config(LAYERS)), ids_of(1, 40)

    def score(keys: Tensor, *_: Any) -> Tensor:
        raise KeyboardInterrupt

    cache = kvpack.PackedCache(model, evict=kvpack.Scored(score, budget=10))
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_function_that_asks_its_cache_is_refused_and_does_not_wait_for_itself() -> None:
    model, ids = tiny_model(tiny_config(LAYERS)), ids_of(1, 40)
    cache: kvpack.PackedCache

    def score(keys: Tensor, values: Tensor, queries: Any, positions: Tensor) -> Tensor:
        cache.memory()
        return positions.float()

    cache = kvpack.PackedCache(model, evict=kvpack.Scored(score, budget=10))
    with torch.no_grad(), pytest.raises(kvpack.ConcurrencyError, match="calling the function"):
        model(ids, past_key_values=cache)


def test_others_may_look_while_a_function_computes() -> None:
    model, ids = tiny_model(tiny_config(LAYERS)), ids_of(1, 60)
    cache: kvpack.PackedCache
    seen: list[int] = []

    def score(keys: Tensor, values: Tensor, queries: Any, positions: Tensor) -> Tensor:
        looker = threading.Thread(target=lambda: seen.append(cache.get_seq_length()))
        looker.start()  # it waits for this forward, and not the other way round
        return positions.float()

    cache = kvpack.PackedCache(model, evict=kvpack.Scored(score, budget=10))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(10)
    assert len(seen) == LAYERS


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"function": 3}, r"function=3 is not accepted; accepted: fn\(keys, values, queries, positions\)"),
        ({"function": keydiff, "budget": 0.0}, "budget"),
        ({"function": keydiff, "recent": -1}, "recent=-1"),
        ({"function": keydiff, "queries": 1.5}, "queries=1.5"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(kvpack.OptionError, match=words):
        kvpack.Scored(**options)


def test_codecs_whose_keys_are_moved_are_refused() -> None:
    with pytest.raises(kvpack.OptionError, match="it looks at keys"):
        kvpack.PackedCache(
            tiny_config(), evict=kvpack.Scored(keydiff, budget=9), quantize=kvpack.Rotated(bits=4, center=True)
        )
