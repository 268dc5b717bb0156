"""kvpack's attention function: its arguments, masks and dtypes."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from kvpack import models
from kvpack.attention import kvpack_attention
from model_kinds import IDS, logits
from support import FakeAttention, filled_layer, forward, random_kv, tiny_config, tiny_model
from transformers import DynamicCache, StaticCache

# ---- arguments of the attention function --------------------------------------------------------------------------


KEY, VALUE = random_kv(1, 2, 50, 32)
NEW_KEY, NEW_VALUE = random_kv(1, 2, 3, 32)
QUERY = torch.randn(1, 4, 3, 32, generator=torch.Generator().manual_seed(3))


def attend(module: Any, cache: Any = None, mask: Any = None, **options: Any) -> torch.Tensor:
    """Attention of three new tokens after fifty, which a PackedCache holds or which are plain tensors."""
    if cache is None:
        keys, values = torch.cat([KEY, NEW_KEY], 2), torch.cat([VALUE, NEW_VALUE], 2)
    else:
        keys, values = cache.update(NEW_KEY, NEW_VALUE, 0)
    return kvpack_attention(module, QUERY, keys, values, mask, **options)[0]


@pytest.mark.parametrize("argument", ["indices", "block_indices", "sinks", "head_mask", "anything"])
@pytest.mark.parametrize("packed", [False, True])
def test_arguments_that_nobody_knows_are_refused(argument: str, packed: bool) -> None:
    cache = filled_layer(kvpack.Exact(), KEY, VALUE) if packed else None
    with pytest.raises(kvpack.OptionError, match=rf"{argument}.*'sdpa' or 'eager'"):
        attend(FakeAttention(2), cache, **{argument: torch.zeros(1)})
    attend(FakeAttention(2), None, **{argument: None})


@pytest.mark.parametrize("argument", sorted(models.HARMLESS))
def test_arguments_that_change_nothing(argument: str) -> None:
    for cache in (None, filled_layer(kvpack.Exact(), KEY, VALUE)):
        fork = None if cache is None else cache.fork()
        expected = attend(FakeAttention(2), cache)
        assert torch.equal(attend(FakeAttention(2), fork, **{argument: 7}), expected)


@pytest.mark.parametrize("masked", ["none", "boolean", "additive"])
def test_a_position_bias_is_added_to_the_logits(masked: str) -> None:
    heads, new, tokens = QUERY.shape[1], QUERY.shape[2], KEY.shape[2] + QUERY.shape[2]
    bias = torch.randn(1, heads, new, tokens)
    visible = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
    visible[:, 7] = masked == "none"
    mask = {"none": None, "boolean": visible[None, None]}.get(masked, torch.zeros(1, 1, new, tokens))
    if masked == "additive":
        mask = mask.masked_fill(~visible, torch.finfo(torch.float32).min)
    logits = QUERY @ torch.cat([KEY, NEW_KEY], 2).repeat_interleave(2, 1).transpose(2, 3) * QUERY.shape[3] ** -0.5
    weights = (logits + bias).masked_fill(~visible, float("-inf")).softmax(-1)
    expected = (weights @ torch.cat([VALUE, NEW_VALUE], 2).repeat_interleave(2, 1)).transpose(1, 2)
    for cache in (None, filled_layer(kvpack.Exact(), KEY, VALUE)):
        actual = attend(FakeAttention(2), cache, mask, position_bias=bias)
        assert (actual - expected).abs().max() < 1e-5


def test_what_a_caller_passes_through_a_model_is_left_alone() -> None:
    """None of transformers' attention functions reads what a model does not pass on purpose."""
    config = tiny_config()
    reference, model = (tiny_model(config, attention) for attention in ("sdpa", "kvpack"))
    expected = reference(IDS, anything=torch.ones(1)).logits
    actual = model(IDS, anything=torch.ones(1), past_key_values=kvpack.PackedCache(model)).logits
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask_the_queries_are_the_newest(causal: bool) -> None:
    """As is_causal of the module, or of the call, says; packed and with plain tensors."""
    mask = torch.ones(1, 1, 3, 53, dtype=torch.bool)
    expected = attend(FakeAttention(2), mask=mask.tril(50) if causal else mask)
    module = FakeAttention(2)
    module.is_causal = causal  # type: ignore[misc]
    other = FakeAttention(2)
    other.is_causal = not causal  # type: ignore[misc]
    for own, options in ((module, {}), (other, {"is_causal": causal})):
        for cache in (None, filled_layer(kvpack.Exact(), KEY, VALUE)):
            assert (attend(own, cache, **options) - expected).abs().max() < 1e-5


def test_a_static_cache_under_kvpacks_attention() -> None:
    """Its prompt's queries are not the newest positions."""
    outputs = []
    for attention in ("sdpa", "kvpack"):
        model = tiny_model(attention=attention)
        cache = StaticCache(config=model.config, max_cache_len=64)
        outputs.append(torch.cat([model(IDS[:, :n], past_key_values=cache).logits for n in (24, 1, 4)], 1))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


# ---- masks and dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("past", [False, True])
def test_integer_masks_are_refused_as_sdpa_does(dtype: torch.dtype, past: bool) -> None:
    reference, model = (tiny_model(attention=attention) for attention in ("sdpa", "kvpack"))
    cache = kvpack.PackedCache(model)
    held = 0
    if past:
        held = 24
        model(IDS, past_key_values=cache)
    mask = torch.ones(2, 1, 24, held + 24, dtype=dtype)
    with pytest.raises(RuntimeError):
        reference(IDS, attention_mask=mask[..., -24:])
    with pytest.raises(kvpack.DtypeError, match="bool"):
        model(IDS, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("past", [False, True])
def test_masks_of_three_dimensions_are_refused(past: bool) -> None:
    cache = filled_layer(kvpack.Exact(), KEY, VALUE) if past else kvpack.PackedCache(tiny_config(layers=1))
    mask = torch.ones(1, 3, 53 if past else 3, dtype=torch.bool)
    with pytest.raises(kvpack.ShapeError, match="4 dimensions"):
        forward(cache, NEW_KEY, NEW_VALUE, QUERY, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_followed(dtype: torch.dtype) -> None:
    """Keys come in float32 there, values in the region's dtype: SDPA sees all in that one, and so does the cache."""
    outputs = []
    for attention, packed in (("sdpa", False), ("sdpa", True), ("kvpack", False), ("kvpack", True)):
        model = tiny_model(attention=attention)
        cache = kvpack.PackedCache(model) if packed else DynamicCache(config=model.config)
        with torch.autocast("cpu", dtype):
            outputs.append(logits(model, cache))
        if packed:
            assert cache.layers[0].keys.dtype == dtype
    assert torch.equal(outputs[1], outputs[0])
    for output in outputs[2:]:
        assert output.dtype == dtype
        assert (output - outputs[0]).abs().max() < 0.03 * outputs[0].std()
