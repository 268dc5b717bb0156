"""Crops: what they reach, what they refuse, and past recording."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import kvpack
import pytest
import torch
from reference import Kivi
from sharing import LOSSY, assert_attends_to_what_it_holds, filled, grow
from support import (
    assert_same_contents,
    assert_same_packed,
    causal_mask,
    every_codec,
    forward,
    left_padding,
    random_kv,
    relative_error,
    tiny_config,
)


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
