"""Tensors that cannot work are refused by name, before anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import kvpack
import pytest
import torch
from kvpack.attention import kvpack_attention
from refusals import TOKENS, filled, refused
from support import FakeAttention, causal_mask, every_codec, random_kv, tiny_config, tiny_model

# ---- tensors ------------------------------------------------------------------------------------------------------


@every_codec
def test_nan_and_infinity(codec: Any) -> None:
    cache = filled(codec)
    empty = kvpack.PackedCache(tiny_config(layers=1), quantize=codec)
    for which, number, tokens in product([0, 1], [torch.nan, torch.inf, -torch.inf], [1, 200]):
        tensors = list(random_kv(2, 2, tokens, 32))
        tensors[which][1, 1, -1, 31] = number
        with refused(cache, kvpack.NonFiniteError, ["keys", "values"][which], "finite"):
            cache.update(*tensors, 0)
        with refused(empty, kvpack.NonFiniteError, ["keys", "values"][which]):
            empty.update(*tensors, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_nan_in_half_precision(dtype: torch.dtype) -> None:
    cache = filled(kvpack.KIVI(), dtype=dtype)
    key, value = random_kv(2, 2, 3, 32, dtype=dtype)
    key[0, 0, 0, 0] = torch.nan
    with refused(cache, kvpack.NonFiniteError, "keys"):
        cache.update(key, value, 0)


def test_numbers_beyond_float16_would_become_infinite_scales() -> None:
    key, value = random_kv(2, 2, 3, 32)
    key[0, 1, 2, 3] = -7e4
    cache = filled(kvpack.KIVI())
    with refused(cache, kvpack.NonFiniteError, "keys", "float16"):
        cache.update(key, value, 0)
    exact = filled()
    exact.update(key, value, 0)
    assert exact.layers[0].keys[0, 1, -1, 3] == -7e4


@every_codec
def test_zero_length_input(codec: Any) -> None:
    key, value = random_kv(2, 2, 1, 32)
    for cache in (filled(codec), kvpack.PackedCache(tiny_config(layers=1), quantize=codec)):
        with refused(cache, kvpack.ShapeError, "0"):
            cache.update(key[:, :, :0], value[:, :, :0], 0)
        with refused(cache, kvpack.ShapeError, "0"):
            cache.update(key[:0], value[:0], 0)


@every_codec
@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_size_that_changes(codec: Any, batch: int) -> None:
    cache = filled(codec, batch=2)
    with refused(cache, kvpack.ShapeError, batch, 2):
        cache.update(*random_kv(batch, 2, 1, 32), 0)


@pytest.mark.parametrize(
    ("heads", "key_dim", "value_dim", "named"),
    [(3, 32, 32, [3, 2]), (1, 32, 32, [1, 2]), (2, 40, 32, [40, 32]), (2, 32, 64, [64, 32])],
    ids=str,
)
def test_heads_and_sizes_that_change(heads: int, key_dim: int, value_dim: int, named: list[int]) -> None:
    cache = filled(kvpack.KIVI())
    with refused(cache, kvpack.ShapeError, *named):
        cache.update(*random_kv(2, heads, 1, key_dim, value_dim), 0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda key, value: (key[:, :, :2], value),
        lambda key, value: (key[:1], value),
        lambda key, value: (key[:, :1], value),
        lambda key, value: (key[0], value[0]),
        lambda key, value: (key[None], value[None]),
        lambda key, value: (key[..., :0], value),
    ],
    ids=["fewer keys", "fewer rows", "fewer heads", "3-d", "5-d", "no channels"],
)
def test_keys_and_values_that_do_not_belong_together(spoil: Callable[..., Any]) -> None:
    for cache in (filled(), kvpack.PackedCache(tiny_config(layers=1))):
        with refused(cache, kvpack.ShapeError):
            cache.update(*spoil(*random_kv(2, 2, 3, 32)), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_a_dtype_that_is_not_supported(dtype: torch.dtype) -> None:
    key, value = (x.to(dtype) for x in random_kv(2, 2, 1, 32))
    for cache in (filled(), kvpack.PackedCache(tiny_config(layers=1))):
        with refused(cache, kvpack.DtypeError, str(dtype).removeprefix("torch."), "float32", "float16", "bfloat16"):
            cache.update(key, value, 0)


def test_a_dtype_that_changes() -> None:
    key, value = random_kv(2, 2, 1, 32)
    cache = filled()
    with refused(cache, kvpack.DtypeError, "bfloat16", "float32"):
        cache.update(key.bfloat16(), value.bfloat16(), 0)
    for tensors in ((key, value.half()), (key.half(), value)):
        with refused(cache, kvpack.DtypeError, "float16", "float32"):
            cache.update(*tensors, 0)


def test_tensors_on_another_device() -> None:
    key, value = random_kv(2, 2, 1, 32)
    for cache in (filled(), kvpack.PackedCache(tiny_config(layers=1))):
        with refused(cache, kvpack.DeviceError, "meta", "cpu"):
            cache.update(key.to("meta"), value.to("meta"), 0)
        with refused(cache, kvpack.DeviceError, "meta", "cpu"):
            cache.update(key, value.to("meta"), 0)


def test_grad_mode_with_keys_that_require_grad() -> None:
    key, value = random_kv(2, 2, 1, 32)
    cache = filled()
    for tensors in ((key.clone().requires_grad_(), value), (key, value.clone().requires_grad_())):
        with refused(cache, kvpack.GradError, "grad", "no_grad"), torch.enable_grad():
            cache.update(*tensors, 0)
    cache.update(key.requires_grad_(), value, 0)  # without grad mode it does not matter
    assert cache.get_seq_length() == TOKENS + 2


def test_training_through_the_cache() -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7]])
    with refused(cache, kvpack.GradError, "no_grad"), torch.enable_grad():
        model(ids, past_key_values=cache)
    assert model(ids, past_key_values=cache).logits.isfinite().all()


# ---- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "mask", "named"),
    [
        ((2, 4, 3, 40), None, [40, 32]),
        ((2, 3, 3, 32), None, [3, 2]),
        ((1, 4, 3, 32), None, [1, 2]),
        ((2, 4, 400, 32), None, [400]),
        ((2, 4, 3, 32), (2, 1, 3, TOKENS), [TOKENS, TOKENS + 4]),
        ((2, 4, 3, 32), (2, 1, 2, TOKENS + 4), [2, 3]),
        ((2, 4, 3, 32), (3, 1, 3, TOKENS + 4), [3, 2]),
        ((2, 4, 3, 32), (2, 3, 3, TOKENS + 4), [3, 4]),
    ],
    ids=["dim", "heads", "batch", "tokens", "narrow mask", "short mask", "mask rows", "mask heads"],
)
def test_queries_and_masks_that_do_not_fit(
    query: tuple[int, ...], mask: tuple[int, ...] | None, named: list[int]
) -> None:
    cache = filled(kvpack.KIVI())
    before = cache.get_seq_length()
    key, value = random_kv(2, 2, 3, 32)
    handles = cache.update(key, value, 0)
    spoilt = None if mask is None else torch.ones(mask).bool()
    with pytest.raises(kvpack.ShapeError) as caught:
        kvpack_attention(FakeAttention(2), torch.randn(query), *handles, spoilt)
    assert caught.type is kvpack.ShapeError
    assert all(str(number) in str(caught.value) for number in named)
    assert cache.get_seq_length() == before  # the forward that failed is rolled back
    handles = cache.update(key, value, 0)
    good = torch.randn(2, 4, 3, 32)
    out = kvpack_attention(FakeAttention(2), good, *handles, None)[0]
    visible = causal_mask(torch.ones(2, TOKENS + 4), 3)
    assert torch.equal(out, kvpack_attention(FakeAttention(2), good, *handles, visible)[0])


@pytest.mark.parametrize(
    ("change", "empties"),
    [
        (lambda cache: cache.update(*random_kv(2, 2, 1, 32), 0), False),
        (lambda cache: cache.crop(-1), False),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), False),
        (lambda cache: cache.batch_select_indices(torch.tensor([0])), False),
        (lambda cache: cache.batch_repeat_interleave(2), False),
        (lambda cache: cache.reset(), True),
    ],
    ids=["update", "crop", "reorder", "select", "repeat", "reset"],
)
def test_handles_of_a_cache_that_has_changed(change: Callable[[kvpack.PackedCache], Any], empties: bool) -> None:
    cache = filled(kvpack.KIVI())
    key, value = cache.update(*random_kv(2, 2, 1, 32), 0)
    change(cache)
    assert (cache.get_seq_length() == 0) == empties
    with refused(cache, kvpack.StaleHandleError):
        kvpack_attention(FakeAttention(2), torch.randn(2, 4, 1, 32), key, value, None)
    with refused(cache, kvpack.StaleHandleError):
        key + 0
    with refused(cache, kvpack.StaleHandleError):
        value.clone()
