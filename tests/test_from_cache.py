"""Packing an existing DynamicCache is the same as packing during the prefill; other layers stay transformers'."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from support import (
    assert_same_contents,
    assert_same_packed,
    every_codec,
    left_padding,
    relative_error,
    tiny_config,
    tiny_model,
)
from test_architectures import FUSED, config_of
from transformers import DynamicCache


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def looks_at_queries(codec: Any) -> bool:
    """Whether a codec decides by queries, of which a cache that is packed afterwards knows none."""
    return isinstance(codec, kvpack.Graded) or getattr(codec, "compensation", None) is not None


@every_codec
@pytest.mark.parametrize("lengths", [[300, 300], [300, 171]], ids=["full", "left-padded"])
def test_from_cache_equals_packing_during_prefill(codec: Any, lengths: list[int]) -> None:
    if looks_at_queries(codec):
        lengths = [300, 300]  # attention that shows no queries shows no pads either
    model = tiny_model(attention="sdpa" if looks_at_queries(codec) else "kvpack")
    ids = torch.randint(3, 128, (2, 300))
    mask = left_padding(lengths)
    full, packed = DynamicCache(config=model.config), kvpack.PackedCache(model, quantize=codec)
    for cache in (full, packed):
        model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache)
    held = [(layer.keys.clone(), layer.values.clone()) for layer in full.layers]
    made = kvpack.PackedCache.from_cache(full, model, quantize=codec, attention_mask=mask)
    if looks_at_queries(codec):  # what other attention has read is stored with the next tokens
        last = torch.tensor([[7], [8]])
        mask = torch.cat([mask, torch.ones_like(last)], dim=1)
        for cache in (made, packed):
            model(last, attention_mask=mask, position_ids=positions(mask)[:, -1:], past_key_values=cache)
    assert_same_contents(made, packed)
    for one, other in zip(made.layers, packed.layers, strict=True):
        for row in range(2):
            assert one.positions(row, 1) == list(range(300 - lengths[row], made.get_seq_length()))
            assert_same_packed(one, other, row, 1)
    assert made.memory().total == packed.memory().total
    for layer, (key, value) in zip(full.layers, held, strict=True):
        assert torch.equal(layer.keys, key)
        assert torch.equal(layer.values, value)
    step = torch.tensor([[9], [10]])
    after = torch.cat([mask, torch.ones_like(step)], dim=1)
    logits = [
        model(step, attention_mask=after, position_ids=positions(after)[:, -1:], past_key_values=cache).logits
        for cache in (made, packed)
    ]
    assert torch.equal(*logits)


def test_the_two_caches_do_not_share_memory() -> None:
    model = tiny_model()
    full = DynamicCache(config=model.config)
    model(torch.randint(3, 128, (1, 50)), past_key_values=full)
    packed = kvpack.PackedCache.from_cache(full, model)
    expected = packed.layers[0].keys.clone()
    full.layers[0].keys.zero_()
    assert torch.equal(packed.layers[0].keys, expected)
    assert expected.any()


def test_from_an_empty_cache() -> None:
    packed = kvpack.PackedCache.from_cache(DynamicCache(config=tiny_config()), tiny_config())
    assert packed.get_seq_length() == 0
    assert len(packed.layers) == 2


@pytest.mark.parametrize("name", ["gemma3_text", "gemma2", "gpt_oss", "qwen3_next"])
def test_hybrid_models_keep_transformers_own_layers(name: str) -> None:
    config = config_of(name, FUSED[name])
    model = tiny_model(config)
    full = DynamicCache(config=model.config)
    ids = torch.randint(3, 128, (2, 40))
    model(ids, past_key_values=full)
    made = kvpack.PackedCache.from_cache(full, model)
    prefilled = kvpack.PackedCache(model)
    model(ids, past_key_values=prefilled)
    packed = [type(layer).__name__ == "PackedLayer" for layer in made.layers]
    assert any(packed)
    assert all(packed) == (name != "qwen3_next")
    for is_packed, layer, own, original in zip(packed, made.layers, prefilled.layers, full.layers, strict=True):
        assert type(layer) is type(own)
        if not is_packed:
            assert type(layer) is type(original)
            assert layer is not original
    steps = [torch.randint(3, 128, (2, 1)) for _ in range(12)]
    for step in steps:
        logits = [model(step, past_key_values=cache).logits for cache in (full, made, prefilled)]
        assert relative_error(logits[1], logits[0]) < 1e-5
        assert relative_error(logits[2], logits[0]) < 1e-5


def test_repr_says_which_layers_are_packed() -> None:
    config = config_of("gemma3_text", FUSED["gemma3_text"])
    cache = kvpack.PackedCache(config, quantize=kvpack.KIVI(bits=4, group=16))
    assert [layer.is_sliding for layer in cache.layers] == [True] * 5 + [False]
    assert "6 PackedLayer" in repr(cache)
    states = kvpack.PackedCache(config_of("qwen3_next", FUSED["qwen3_next"]))
    assert "LinearAttentionLayer" in repr(states)
    assert "1 PackedLayer" in repr(states)
    assert "KIVI(bits=4" in repr(cache)
