"""Rows and forks share pages; crop, reorder, select, repeat and reset change who holds what, never what is stored."""

from __future__ import annotations

import copy
import pickle
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import kvpack
import pytest
import torch
from reference import Kivi, attention
from support import (
    assert_same_contents,
    assert_same_packed,
    causal_mask,
    contents,
    every_codec,
    forward,
    left_padding,
    random_kv,
    relative_error,
    tiny_config,
    tiny_model,
)
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


# ---- bytes and time ----------------------------------------------------------------------------------------------


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


# ---- forks are apart ---------------------------------------------------------------------------------------------


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


# ---- rows --------------------------------------------------------------------------------------------------------


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


# ---- length ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [299, 260, 131, 5, 4, 3, 1])
@pytest.mark.parametrize("absolute", [False, True], ids=["tokens to remove", "length to keep"])
def test_exact_crops_to_any_length(left: int, absolute: bool) -> None:
    key, value = random_kv(2, 2, 300, 32)
    cache = kvpack.PackedCache(tiny_config(layers=1))
    forward(cache, key, value)
    cache.crop(left if absolute else left - 300)
    assert cache.get_seq_length() == left
    assert torch.equal(cache.layers[0].keys, key[:, :, :left])
    assert torch.equal(cache.layers[0].values, value[:, :, :left])
    assert cache.layers[0].positions(1, 1) == list(range(left))
    assert_attends_to_what_it_holds(cache.fork(), 1)
    rebuilt = kvpack.PackedCache(tiny_config(layers=1))
    forward(rebuilt, key[:, :, :left], value[:, :, :left])
    assert all(torch.equal(*pair) for pair in zip(grow(cache, [3, 1], 5), grow(rebuilt, [3, 1], 5), strict=True))
    assert_same_contents(cache, rebuilt)


@every_codec
def test_crop_of_nothing_changes_nothing(codec: Any) -> None:
    cache = filled(codec, 300)
    cache.crop(0)
    assert_same_contents(cache, filled(codec, 300))


@every_codec
def test_crop_takes_the_tensors_that_some_releases_pass(codec: Any) -> None:
    cache, other = filled(codec, 300), filled(codec, 300)
    for each in (cache, other):
        each.activate_past_recording()
    cache.crop(torch.tensor(-5))
    other.crop(-5)
    assert_same_contents(cache, other)
    cache.crop(torch.tensor(0))
    assert cache.get_seq_length() == 295


@every_codec
def test_the_last_forward_can_be_cropped_and_written_again(codec: Any) -> None:
    """What speculation does: each round appends candidates and takes the wrong ones back."""
    cache, straight = filled(codec, 260), filled(codec, 260)
    for round_ in range(120):
        grow(cache, [5], seed=1000 + round_)
        cache.crop(-5)
        one, other = grow(cache, [2], seed=round_), grow(straight, [2], seed=round_)
        assert relative_error(one[0], other[0]) < 1e-6
    assert_same_contents(cache, straight)
    assert_same_packed(cache.layers[0], straight.layers[0], 0, 0)


@LOSSY
def test_kivi_crops_within_what_is_exact(bits: int) -> None:
    codec = kvpack.KIVI(bits=bits)
    reference = Kivi(bits)
    key, value = random_kv(1, 2, 300, 32)
    reference.forward(key[0, 0], value[0, 0], first=True)
    assert 0 < reference.croppable < 128
    for remove in (1, reference.croppable):
        cache = kvpack.PackedCache(tiny_config(layers=1), quantize=codec)
        forward(cache, key, value)
        whole = cache.fork()
        cache.crop(-remove)
        assert torch.equal(cache.layers[0].keys, whole.layers[0].keys[:, :, :-remove])
        assert torch.equal(cache.layers[0].values, whole.layers[0].values[:, :, :-remove])
        assert_same_packed(cache.layers[0], whole.layers[0], 0, 0)


@LOSSY
@pytest.mark.parametrize("prompt", [300, 517, 1000])
def test_kivi_refuses_to_crop_what_it_packed(bits: int, prompt: int) -> None:
    cache = filled(kvpack.KIVI(bits=bits), prompt)
    reference = Kivi(bits)
    reference.forward(torch.randn(prompt, 32), torch.randn(prompt, 32), first=True)
    before = cache.fork()
    with pytest.raises(kvpack.CropError, match=rf"{reference.croppable + 1}\b.*\b{reference.croppable}\b"):
        cache.crop(-reference.croppable - 1)
    assert cache.get_seq_length() == prompt
    assert_same_contents(cache, before)
    cache.crop(-reference.croppable)


@LOSSY
@pytest.mark.parametrize("left", [299, 250, 140, 133, 60, 4, 2])
def test_recording_lets_kivi_crop_anywhere_without_new_codes(bits: int, left: int) -> None:
    cache = filled(kvpack.KIVI(bits=bits), 300)
    whole = cache.fork()
    cache.activate_past_recording()
    cache.crop(left - 300)
    assert cache.get_seq_length() == left
    for layer, old in zip(cache.layers, whole.layers, strict=True):
        assert torch.equal(layer.keys, old.keys[:, :, :left])
        assert torch.equal(layer.values, old.values[:, :, :left])
    for new in (1, 7):
        assert_attends_to_what_it_holds(cache, new)
    assert cache.get_seq_length() == left + 8


@LOSSY
def test_recording_postpones_packing_to_the_next_crop(bits: int) -> None:
    cache = filled(kvpack.KIVI(bits=bits), 300)
    stored = cache.layers[0].packed(0, 0)["value_codes"].shape[0]
    cache.activate_past_recording()
    grow(cache, [50] * 4, seed=6)
    assert cache.layers[0].packed(0, 0)["value_codes"].shape[0] == stored
    cache.crop(-50)
    assert cache.layers[0].packed(0, 0)["value_codes"].shape[0] == 450 - 4 - 128
    straight = filled(kvpack.KIVI(bits=bits), 300)
    grow(straight, [50] * 4, seed=6)
    straight.activate_past_recording()
    straight.crop(-50)
    assert_same_contents(cache, straight)


def test_a_codec_without_a_window_refuses_to_crop_a_prompt() -> None:
    cache = filled(kvpack.Q8(), 300)
    before = cache.fork()
    with pytest.raises(kvpack.CropError, match=r"\b1\b.*\b0\b"):
        cache.crop(-1)
    assert_same_contents(cache, before)
    grow(cache, [3], seed=1)
    cache.crop(-3)  # what came after the prompt waits for the next forward
    assert_same_contents(cache, before)


def test_left_padded_rows_crop_by_position() -> None:
    lengths = [40, 30]
    key, value = random_kv(2, 2, 40, 32)
    valid = left_padding(lengths)
    cache = kvpack.PackedCache(tiny_config(layers=1))
    forward(cache, key, value, mask=causal_mask(valid, 40))
    for left in (35, 12, 9):  # at 9 the second row holds nothing but pads
        cache.crop(left - cache.get_seq_length())
        shown = valid[:, None, :left, None]
        assert torch.equal(cache.layers[0].keys, key[:, :, :left] * shown)
        assert cache.layers[0].positions(1, 1) == list(range(10, left))
    key, value = random_kv(2, 2, 1, 32)
    mask = causal_mask(torch.cat([valid[:, :9], torch.ones(2, 1)], dim=1), 1)
    out = forward(cache, key, value, mask=mask)
    assert torch.allclose(out[1, 0], value[1, :, 0])  # alone with itself


@every_codec
def test_reset_gives_the_memory_back_and_starts_anew(codec: Any) -> None:
    cache = filled(codec, 300)
    held = cache.memory().total
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory().total < held / 50
    torch.manual_seed(3)
    for layer in range(2):
        forward(cache, *random_kv(3, 2, 150, 32), layer=layer)  # another batch size is fine again
    assert_same_contents(cache, filled(codec, 150, batch=3, seed=3))


def test_copies_are_forks_and_pickles_are_refused() -> None:
    cache = filled(kvpack.KIVI(), 200)
    for other in (copy.copy(cache), copy.deepcopy(cache)):
        forward(other, *random_kv(1, 2, 3, 32))
        assert (other.get_seq_length(), cache.get_seq_length()) == (203, 200)
    with pytest.raises(TypeError, match=r"pickled.*fork"):
        pickle.dumps(cache)
