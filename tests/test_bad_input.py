"""Whatever cannot work is refused by name, before anything has changed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import kvpack
import pytest
import torch
from kvpack.attention import kvpack_attention
from kvpack.layer import PackedLayer
from support import (
    FakeAttention,
    assert_same_contents,
    causal_mask,
    every_codec,
    forward,
    random_kv,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import DynamicCache

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


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 0}, ["bits", "0"]),
        ({"bits": 5}, ["bits", "5", "2, 3, 4", "8"]),
        ({"bits": 16}, ["bits", "16", "2, 3, 4", "8"]),
        ({"bits": "4"}, ["bits", "'4'"]),
        ({"bits": 4.0}, ["bits", "4.0"]),
        ({"bits": True}, ["bits", "True"]),
        ({"bits": None}, ["bits", "None"]),
        ({"group": 0}, ["group", "0"]),
        ({"group": -8}, ["group", "-8"]),
        ({"group": 12}, ["group", "12", "8"]),
        ({"group": 264, "window": 264}, ["group", "264", "256"]),
        ({"window": 0}, ["window", "0"]),
        ({"window": -128}, ["window", "-128"]),
        ({"window": 100}, ["window", "100", "32"]),
        ({"group": 64, "window": 96}, ["window", "96", "64"]),
        ({"sinks": -1}, ["sinks", "-1", "0"]),
        ({"sinks": 2.5}, ["sinks", "2.5"]),
        ({"window": 2**40}, ["window", str(2**40)]),
    ],
    ids=str,
)
def test_kivi_options_that_cannot_be(options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(kvpack.OptionError) as caught:
        kvpack.KIVI(**options)
    assert all(word in str(caught.value) for word in named)


@pytest.mark.parametrize("make", [kvpack.KIVI, kvpack.Exact], ids=lambda make: make.__name__)
def test_options_that_do_not_exist(make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="residual"):
        make(residual=64)


def test_codecs_cannot_be_changed_behind_the_caches_back() -> None:
    with pytest.raises(AttributeError):
        kvpack.KIVI().bits = 2  # type: ignore[misc]


@pytest.mark.parametrize("quantize", ["kivi", 4, kvpack.KIVI, {"bits": 4}], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda quantize: kvpack.PackedCache(tiny_config(), quantize=quantize),
        lambda quantize: kvpack.PackedCache.from_cache(DynamicCache(), tiny_config(), quantize=quantize),
        lambda quantize: kvpack.attach(tiny_model(attention="sdpa"), quantize=quantize),
    ],
    ids=["PackedCache", "from_cache", "attach"],
)
def test_a_codec_that_is_none(make: Callable[[Any], Any], quantize: Any) -> None:
    with pytest.raises(kvpack.OptionError) as caught:
        make(quantize)
    assert repr(quantize) in str(caught.value)
    assert "KIVI" in str(caught.value)
    if quantize != "kivi":  # a method's name is answered with that method
        assert "Exact" in str(caught.value)


def test_options_of_the_cache_that_do_not_exist() -> None:
    with pytest.raises(TypeError, match="share"):
        kvpack.PackedCache(tiny_config(), share=3)
    with pytest.raises(kvpack.OptionError, match="evict=3 is not accepted"):
        kvpack.PackedCache(tiny_config(), evict=3)


def test_a_group_larger_than_the_head_is_refused_when_the_cache_is_made() -> None:
    with pytest.raises(kvpack.OptionError, match=r"group=64.*32"):
        kvpack.PackedCache(tiny_config(head_dim=32), quantize=kvpack.KIVI(group=64))


def test_a_group_larger_than_the_head_is_refused_when_keys_tell() -> None:
    from test_architectures import MLA, config_of

    model = tiny_model(config_of("deepseek_v3", MLA))
    cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(group=16, window=32))  # its values have 8 numbers
    with refused(cache, kvpack.OptionError, "16", "8"):
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache)


@pytest.mark.parametrize("model", [None, "SmolLM2", {"num_hidden_layers": 2}, 7], ids=str)
def test_something_that_is_no_model(model: Any) -> None:
    with pytest.raises(kvpack.OptionError, match=rf"{type(model).__name__}.*(model|config)"):
        kvpack.PackedCache(model)
    with pytest.raises(kvpack.OptionError, match=rf"{type(model).__name__}.*model"):
        kvpack.attach(model)


def test_a_model_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(attention="sdpa")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    for use in (kvpack.PackedCache, kvpack.attach):
        with pytest.raises(kvpack.DeviceError, match=r"cuda.*cpu"):
            use(model)
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


# ---- tensors -----------------------------------------------------------------------------------------------------


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


# ---- attention ---------------------------------------------------------------------------------------------------


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
    assert cache.get_seq_length() == before  # the forward that failed is taken back
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


# ---- length and rows ---------------------------------------------------------------------------------------------


def test_crop_into_what_was_packed_away() -> None:
    cache = filled(kvpack.KIVI())
    with refused(cache, kvpack.CropError, 200, "activate_past_recording"):
        cache.crop(-200)
    with refused(cache, kvpack.CropError, TOKENS + 1 - 10, "activate_past_recording"):
        cache.crop(10)


def test_crop_in_one_layer_only_never_happens() -> None:
    """Layers may hold different rows exactly; a crop that one of them refuses leaves all as they are."""
    cache = kvpack.PackedCache(tiny_config(layers=2), quantize=kvpack.KIVI())
    forward(cache, *random_kv(1, 2, 300, 32), layer=0)
    forward(cache, *random_kv(1, 2, 100, 32), layer=1)
    forward(cache, *random_kv(1, 2, 200, 32), layer=1)
    for layer in range(2):
        forward(cache, *random_kv(1, 2, 1, 32), layer=layer)
    with refused(cache, kvpack.CropError, 150):
        cache.crop(-150)


@every_codec
@pytest.mark.parametrize("recording", [False, True])
def test_crop_beyond_the_sequence(codec: Any, recording: bool) -> None:
    cache = filled(codec)
    if recording:
        cache.activate_past_recording()
    with refused(cache, kvpack.CropError, TOKENS + 2, TOKENS + 1):
        cache.crop(-TOKENS - 2)


@pytest.mark.parametrize("rows", [[0, 2], [-3, 0], [0, 2**40], []], ids=str)
def test_rows_that_are_not_there(rows: list[int]) -> None:
    cache = filled(kvpack.KIVI())
    index = torch.tensor(rows, dtype=torch.long)
    for change in (cache.reorder_cache, cache.batch_select_indices):
        with refused(cache, kvpack.ShapeError, 2):
            change(index)


@pytest.mark.parametrize("repeats", [0, -1])
def test_repeats_that_cannot_be(repeats: int) -> None:
    cache = filled()
    with refused(cache, kvpack.ShapeError, repeats, 1):
        cache.batch_repeat_interleave(repeats)


@pytest.mark.parametrize(("row", "head"), [(2, 0), (0, 2), (-3, 0), (0, 2**40)])
def test_heads_that_are_not_there_cannot_be_inspected(row: int, head: int) -> None:
    cache = filled(kvpack.KIVI())
    for look in (cache.layers[0].packed, cache.layers[0].positions):
        with pytest.raises((kvpack.ShapeError, IndexError, OverflowError)):
            look(row, head)
    assert cache.get_seq_length() == TOKENS + 1


# ---- another model -----------------------------------------------------------------------------------------------

OTHER_MODELS = {
    "more layers": {"layers": 3},
    "fewer layers": {"layers": 1},
    "more KV heads": {"kv_heads": 4},
    "fewer KV heads": {"kv_heads": 1},
    "larger heads": {"head_dim": 64},
    "wider": {"hidden_size": 128},
}
# What keys and values alone tell, so that it is found whatever attention function the other model has.
SEEN_IN_KEYS = {"more KV heads", "fewer KV heads", "larger heads"}


@pytest.mark.parametrize("difference", OTHER_MODELS)
@pytest.mark.parametrize("used", [False, True], ids=["empty", "used"])
def test_a_cache_used_with_another_model(difference: str, used: bool) -> None:
    model, other = tiny_model(), tiny_model(tiny_config(**OTHER_MODELS[difference]))
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7]])
    if used:
        model(ids, past_key_values=cache)
    expected = model(ids, past_key_values=cache.fork()).logits
    # Heads and sizes that do not fit what is held are as wrong in shape as they are of another model.
    errors = kvpack.ModelMismatchError, kvpack.ShapeError
    with refused(cache, errors if used else errors[0], *OTHER_MODELS[difference].values()):
        other(ids, past_key_values=cache)
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("difference", sorted(SEEN_IN_KEYS))
def test_a_cache_used_with_another_model_that_has_another_attention(difference: str) -> None:
    model, other = tiny_model(), tiny_model(tiny_config(**OTHER_MODELS[difference]), attention="sdpa")
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, past_key_values=cache)
    expected = model(ids, past_key_values=cache.fork()).logits
    with refused(cache, (kvpack.ModelMismatchError, kvpack.ShapeError)):
        other(ids, past_key_values=cache)
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)


def test_more_layers_are_only_noticed_at_the_first_too_many() -> None:
    """By then the layers that exist hold the forward's tokens, and nothing tells them from any other's: it says so."""
    model, other = tiny_model(), tiny_model(tiny_config(layers=3), attention="sdpa")
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, past_key_values=cache)
    with pytest.raises(kvpack.ModelMismatchError, match=r"given 2, expected less than 2.*reset\(\)"):
        other(ids, past_key_values=cache)


@pytest.mark.parametrize("attention", ["kvpack", "sdpa"])
def test_a_cache_used_with_the_same_model_in_another_dtype(attention: str) -> None:
    model, other = tiny_model(), tiny_model(attention=attention).bfloat16()
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, past_key_values=cache)
    with refused(cache, kvpack.DtypeError, "bfloat16", "float32"):
        other(ids, past_key_values=cache)


def test_a_layer_that_the_model_does_not_have() -> None:
    cache = filled()
    with refused(cache, kvpack.ModelMismatchError, 1):
        cache.update(*random_kv(2, 2, 1, 32), 1)


def test_a_forward_that_fails_in_a_later_layer_leaves_no_layer_ahead() -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(group=16, window=32))
    ids = torch.randint(3, 128, (1, 50))
    model(ids, past_key_values=cache)
    expected = model(ids[:, :3], past_key_values=cache.fork()).logits
    weight = model.model.layers[1].self_attn.k_proj.weight
    healthy = weight.clone()
    weight[0, 0] = torch.nan
    with pytest.raises(kvpack.NonFiniteError):
        model(ids[:, :3], past_key_values=cache)
    weight.copy_(healthy)
    assert [layer.get_seq_length() for layer in cache.layers] == [50, 50]
    assert torch.equal(model(ids[:, :3], past_key_values=cache).logits, expected)


# ---- from_cache --------------------------------------------------------------------------------------------------


def dynamic_cache(layers: int = 2, tokens: int = 50) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(*random_kv(2, 2, tokens, 32), layer)
    return cache


@pytest.mark.parametrize("layers", [1, 3])
def test_from_the_cache_of_another_model(layers: int) -> None:
    with pytest.raises(kvpack.ModelMismatchError, match=rf"{layers}.*2"):
        kvpack.PackedCache.from_cache(dynamic_cache(layers), tiny_config(layers=2))


@pytest.mark.parametrize("shape", [(2, 49), (2, 51), (1, 50), (50,), (2, 1, 50, 50)], ids=str)
def test_from_a_cache_with_a_mask_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(kvpack.ShapeError, match="50"):
        kvpack.PackedCache.from_cache(dynamic_cache(), tiny_config(), attention_mask=torch.ones(shape))


def test_from_something_that_is_no_cache() -> None:
    with pytest.raises(kvpack.OptionError, match=r"list.*DynamicCache"):
        kvpack.PackedCache.from_cache([random_kv(2, 2, 50, 32)], tiny_config())


def test_from_a_cache_with_nan() -> None:
    cache = dynamic_cache()
    cache.layers[1].values[0, 0, 7, 3] = torch.nan
    with pytest.raises(kvpack.NonFiniteError, match="values"):
        kvpack.PackedCache.from_cache(cache, tiny_config())


# ---- threads -----------------------------------------------------------------------------------------------------


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
