"""Evictions in models: which attention shows its queries, and every way of generating."""

from __future__ import annotations

import dataclasses
from typing import Any

import kvpack
import pytest
import torch
import transformers
from evictions import every_eviction, name
from support import every_mode, generated, ids_of, tiny_model
from transformers import DynamicCache

QUERY_BASED = [
    kvpack.SnapKV(budget=0.5),
    kvpack.H2O(budget=0.5),
    kvpack.A2SF(budget=20),
    kvpack.TOVA(budget=0.5),
    kvpack.ExpectedAttention(budget=0.5),
]
KEY_BASED = [
    kvpack.KeyDiff(budget=0.5),
    kvpack.L2Norm(budget=0.5),
    kvpack.StreamingLLM(budget=20),
    kvpack.Random(budget=0.5),
]


@pytest.mark.parametrize("evict", QUERY_BASED, ids=name)
@pytest.mark.parametrize("attention_name", ["sdpa", "eager"])
def test_a_model_whose_queries_are_not_seen_is_refused(evict: Any, attention_name: str) -> None:
    model = tiny_model(attention=attention_name)
    cache = kvpack.PackedCache(model, evict=evict)
    with pytest.raises(kvpack.OptionError, match="attn_implementation='kvpack'"):
        model.generate(input_ids=ids_of(1, 40), past_key_values=cache, max_new_tokens=3)
    full = DynamicCache(config=model.config)
    model(ids_of(1, 40), past_key_values=full)
    with pytest.raises(kvpack.OptionError, match="attn_implementation='kvpack'"):
        kvpack.PackedCache.from_cache(full, model, evict=evict)


@pytest.mark.parametrize("evict", KEY_BASED, ids=name)
@pytest.mark.parametrize("attention_name", ["sdpa", "eager"])
def test_keys_and_positions_are_enough_with_other_attention_functions(evict: Any, attention_name: str) -> None:
    evict = dataclasses.replace(evict, decode=True, block=16)
    fused, outside = tiny_model(), tiny_model(attention=attention_name)
    ids, options = ids_of(1, 40), {"max_new_tokens": 60, "do_sample": False}
    caches = [kvpack.PackedCache(model, evict=evict) for model in (fused, outside)]
    tokens = [
        m.generate(input_ids=ids, past_key_values=c, **options) for m, c in zip((fused, outside), caches, strict=True)
    ]
    assert torch.equal(*tokens)
    assert caches[1].info()["materialised"] > 0
    assert len(caches[1].kept(0, 0)) < 60
    assert caches[0].kept(1, 1) == caches[1].kept(1, 1)


def test_latent_attention_shows_no_queries() -> None:
    """MLA attends outside: keys and positions are enough, queries are not seen."""
    from test_architectures import BASE, MLA

    config = transformers.DeepseekV3Config(**{**BASE, **MLA})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    for evict in KEY_BASED:
        cache = kvpack.PackedCache(model, evict=evict)
        out = model.generate(input_ids=ids_of(1, 40), past_key_values=cache, max_new_tokens=10, min_new_tokens=10)
        assert out.shape[1] == 50
        assert len(cache.kept(0, 0)) < 40
    for evict in QUERY_BASED:
        with pytest.raises(kvpack.OptionError, match="scores tokens by the queries"):
            model.generate(
                input_ids=ids_of(1, 40), past_key_values=kvpack.PackedCache(model, evict=evict), max_new_tokens=2
            )


def test_models_with_alibi_are_refused() -> None:
    falcon = transformers.FalconConfig(num_hidden_layers=2, alibi=True)
    for config in (transformers.BloomConfig(n_layer=2), transformers.MptConfig(n_layers=2), falcon):
        with pytest.raises(kvpack.OptionError, match="with ALiBi"):
            kvpack.PackedCache(config, evict=kvpack.KeyDiff())
    kvpack.PackedCache(transformers.FalconConfig(num_hidden_layers=2), evict=kvpack.KeyDiff())


def test_what_another_attention_could_not_read_is_refused() -> None:
    model = tiny_model(attention="sdpa")
    for evict in (kvpack.Longformer(window=8), kvpack.AdaKV(kvpack.KeyDiff(budget=0.5))):
        with pytest.raises(kvpack.OptionError, match="different numbers of tokens"):
            model.generate(
                input_ids=ids_of(1, 40), past_key_values=kvpack.PackedCache(model, evict=evict), max_new_tokens=2
            )
    cache = kvpack.PackedCache(model, evict=kvpack.KeyDiff(budget=0.5))
    with pytest.raises(kvpack.OptionError, match="batch of 2 different sequences"):
        model.generate(input_ids=ids_of(2, 40), past_key_values=cache, max_new_tokens=2)


@every_eviction
@every_mode
def test_every_way_of_generating(evict: Any, mode: str) -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model, evict=evict, quantize=kvpack.KIVI(bits=4, window=32))
    out = generated(model, cache, mode, 90, 50)
    assert len(cache.kept(1, 0)) < out.shape[1] - 1
