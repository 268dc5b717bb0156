"""Rows and forks share pages; crop, reorder, select, repeat and reset change who holds what, never what is stored."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import kvpack
import pytest
import torch
from sharing import filled, grow
from support import (
    assert_same_contents,
    assert_same_packed,
    contents,
    every_codec,
    forward,
    random_kv,
    relative_error,
    tiny_config,
    tiny_model,
)

# ---- bytes and time -----------------------------------------------------------------------------------------------


@every_codec
def test_four_beams_share_the_prompt(codec: Any) -> None:
    cache = filled(codec, 4096)
    one = cache.memory().total
    cache.batch_repeat_interleave(4)
    assert cache.layers[0].batch_size == 4
    assert cache.memory().total <= 1.15 * one


@every_codec
def test_beam_search_shares_the_prompt(codec: Any) -> None:
    model = tiny_model(tiny_config(layers=2, head_dim=64))
    ids = torch.randint(3, 128, (1, 4096))
    one = kvpack.PackedCache(model, quantize=codec)
    model(ids, past_key_values=one)
    beams = kvpack.PackedCache(model, quantize=codec)
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=beams, num_beams=4, max_new_tokens=1)
    assert beams.layers[0].batch_size == 4
    assert beams.memory().total <= 1.15 * one.memory().total


@every_codec
def test_beams_that_part_hold_only_their_own_tokens_twice(codec: Any) -> None:
    cache = kvpack.PackedCache(tiny_config(layers=1, heads=3, kv_heads=3, head_dim=64), quantize=codec)
    forward(cache, *random_kv(1, 3, 3000, 64))
    one = cache.memory().total
    cache.batch_repeat_interleave(4)
    orders = [[0, 0, 1, 2], [3, 1, 1, 0], [0, 1, 2, 3], [2, 2, 2, 2]]
    for step in range(1, 180):
        forward(cache, *random_kv(4, 3, 1, 64))
        if step == 2:
            # Each has its own page that takes the next tokens, where a token is packed alone.
            assert cache.memory().total <= (1.1 if isinstance(codec, kvpack.KIVI) and codec.bits > 2 else 1.17) * one
        cache.reorder_cache(torch.tensor(orders[step % 4]))
    token = 3 * (64 + 64) * 4
    assert cache.memory().total <= 1.17 * one + 180 * token
    assert cache.layers[0].keys.shape == (4, 3, 3179, 64)


@every_codec
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_share_their_window_go_on_as_if_alone(codec: Any, seed: int) -> None:
    """Whatever comes after rows were repeated: tokens, rows in another order, crops, copies."""
    rows = filled(codec, 180)
    rows.batch_repeat_interleave(2)
    alone = [filled(codec, 180) for _ in range(2)]
    steps = random.Random(seed)
    for _ in range(16):
        match steps.randrange(5):
            case 0 | 1:
                new = steps.choice([1, 1, 7, 40, 150])
                key, value, query = *random_kv(2, 2, new, 32), torch.randn(2, 4, new, 32)
                for layer in range(2):
                    out = forward(rows, key, value, query, layer=layer)
                    for i, cache in enumerate(alone):
                        one = forward(cache, key[i, None], value[i, None], query[i, None], layer=layer)
                        assert relative_error(out[i, None], one) < 1e-5
            case 2:
                order = [steps.randrange(2), steps.randrange(2)]
                rows.reorder_cache(torch.tensor(order))
                alone = [alone[i].fork() for i in order]
            case 3:
                n, refused = steps.choice([1, 3, 20]), 0
                for cache in (rows, *alone):
                    try:
                        cache.crop(-n)
                    except kvpack.CropError:
                        refused += 1
                assert refused in (0, 3)
            case 4:
                rows = rows.fork()
        for layer in range(2):
            for i, cache in enumerate(alone):
                assert torch.equal(rows.layers[layer].keys[i], cache.layers[layer].keys[0])
                assert torch.equal(rows.layers[layer].values[i], cache.layers[layer].values[0])
                for head in range(2):
                    assert_same_packed(rows.layers[layer], cache.layers[layer], i, head, 0)


@every_codec
def test_fork_of_16k_tokens_takes_less_than_a_millisecond(codec: Any) -> None:
    config = tiny_config(layers=30, heads=9, kv_heads=3, head_dim=64)
    cache = kvpack.PackedCache(config, quantize=codec)
    key, value = random_kv(1, 3, 16_384, 64, dtype=torch.bfloat16)
    for layer in range(30):
        cache.update(key, value, layer)
        cache.update(key[:, :, :1], value[:, :, :1], layer)
    before = cache.memory().total
    cache.fork()
    seconds = []
    forks = []
    for _ in range(15):
        start = time.perf_counter()
        forks.append(cache.fork())
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1e-3
    assert forks[-1].get_seq_length() == 16_385
    assert cache.memory().total == before
    assert torch.equal(forks[-1].layers[29].keys, cache.layers[29].keys)


# ---- forks are apart ----------------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("sizes", [[1], [1] * 40, [150, 1]], ids=str)
def test_writes_after_a_fork_stay_on_their_side(codec: Any, sizes: list[int]) -> None:
    cache = filled(codec, 300, batch=2)
    before = contents(cache)
    fork = cache.fork()
    there = grow(fork, sizes, seed=1)
    for layer, held in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, held[0])
        assert torch.equal(layer.values, held[1])
    here = grow(cache, sizes, seed=1)
    assert_same_contents(cache, fork)
    assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))
    grow(cache, sizes, seed=2)
    alone = filled(codec, 300, batch=2)
    grow(alone, sizes, seed=1)
    assert_same_contents(fork, alone)


@every_codec
def test_a_fork_outlives_its_origin(codec: Any) -> None:
    cache = filled(codec, 300)
    fork = cache.fork()
    cache.reset()
    del cache
    assert_same_contents(fork, filled(codec, 300))


@every_codec
def test_cropping_a_fork_leaves_the_origin_whole(codec: Any) -> None:
    cache = filled(codec, 300)
    fork = cache.fork()
    fork.activate_past_recording()  # a short window packs what is cropped here
    fork.crop(-40)
    grow(fork, [50], seed=1)
    assert fork.get_seq_length() == 310
    assert_same_contents(cache, filled(codec, 300))


# ---- rows ---------------------------------------------------------------------------------------------------------


def reorder(cache: kvpack.PackedCache, rows: list[int]) -> None:
    cache.reorder_cache(torch.tensor(rows))


def select(cache: kvpack.PackedCache, rows: list[int]) -> None:
    cache.batch_select_indices(torch.tensor(rows))


@every_codec
@pytest.mark.parametrize(
    ("change", "rows"),
    [(reorder, [0, 1, 2]), (reorder, [2, 2, 0]), (select, [1]), (select, [2, 0])],
    ids=["keep", "reorder", "select one", "select two"],
)
def test_rows_move_with_their_codes(codec: Any, change: Callable[..., None], rows: list[int]) -> None:
    cache = filled(codec, 300, batch=3)
    before = cache.fork()
    change(cache, rows)
    assert cache.layers[1].batch_size == len(rows)
    for new, old in enumerate(rows):
        assert torch.equal(cache.layers[1].keys[new], before.layers[1].keys[old])
        assert torch.equal(cache.layers[1].values[new], before.layers[1].values[old])
        for head in range(2):
            assert cache.layers[1].positions(new, head) == before.layers[1].positions(old, head)
            assert_same_packed(cache.layers[1], before.layers[1], new, head, old)


@every_codec
def test_repeat_interleave_copies_each_row_in_place(codec: Any) -> None:
    cache = filled(codec, 300, batch=2)
    before = cache.fork()
    cache.batch_repeat_interleave(3)
    for new, old in enumerate([0, 0, 0, 1, 1, 1]):
        assert torch.equal(cache.layers[0].keys[new], before.layers[0].keys[old])
        for head in range(2):
            assert_same_packed(cache.layers[0], before.layers[0], new, head, old)


@every_codec
def test_moved_rows_go_on_as_rows_that_were_always_there(codec: Any) -> None:
    """A reordered cache equals one that was built in that order from the start, also in what it packs later."""
    rows = [1, 1, 0]
    moved = filled(codec, 300, batch=2)
    moved.batch_select_indices(torch.tensor(rows))
    rebuilt = kvpack.PackedCache(tiny_config(layers=2), quantize=codec)
    torch.manual_seed(0)
    for layer in range(2):
        key, value = random_kv(2, 2, 300, 32)
        forward(rebuilt, key[rows], value[rows], layer=layer)
    sizes = [1] * 140
    for one, other in zip(grow(moved, sizes, seed=3), grow(rebuilt, sizes, seed=3), strict=True):
        assert relative_error(one, other) < 1e-6
    assert_same_contents(moved, rebuilt)
    for row in range(3):
        assert_same_packed(moved.layers[0], rebuilt.layers[0], row, 1)
