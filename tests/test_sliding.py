"""Layers of which queries see the newest tokens only: in every mode what transformers' own layers give, and bounded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import kvpack
import numpy as np
import pytest
import torch
from kvpack.attention import kvpack_attention
from model_kinds import BASE, shaken
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

SIZES = {**BASE, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024}
GEMMA4 = {
    "num_hidden_layers": 6,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    "num_kv_shared_layers": 2,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "windows": ("mistral", {"sliding_window": 16}),
    "long windows": ("mistral", {"sliding_window": 100}),
    "windows and full": ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 40}),
    "sink logits": ("gpt_oss", {"sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "chunks": ("llama4_text", {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 64}),
    "shared": ("gemma4_text", {**GEMMA4, "sliding_window": 16}),
}
SHORT = {kind: row for kind, row in KINDS.items() if kind in ("windows", "windows and full", "shared")}
IDS = torch.randint(4, 120, (3, 150), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}
ATTENTION = ["kvpack", None]


def model_of(kind: str, attention: str | None = None) -> Any:
    name, options = KINDS[kind]
    given = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(0)
    return shaken(AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**SIZES, **options}), **given))


def greedy(model: Any, new: Callable[[], Any]) -> Any:
    return model.generate(IDS[:1], **GREEDY, past_key_values=new())


def padded_batch(model: Any, new: Callable[[], Any]) -> Any:
    mask = torch.ones_like(IDS)
    mask[0, :60], mask[1, :7] = 0, 0
    return model.generate(IDS, attention_mask=mask, **GREEDY, past_key_values=new())


def beams(model: Any, new: Callable[[], Any]) -> Any:
    return model.generate(IDS[:1, :50], num_beams=3, **GREEDY, past_key_values=new())


def prompt_lookup(model: Any, new: Callable[[], Any]) -> Any:
    ids = torch.cat([IDS[:1, :40]] * 3, 1)
    return model.generate(ids, prompt_lookup_num_tokens=4, **GREEDY, past_key_values=new())


def several_turns(model: Any, new: Callable[[], Any]) -> Any:
    cache, ids = new(), IDS[:1, :40]
    for _ in range(3):
        ids = model.generate(ids, **{**GREEDY, "max_new_tokens": 20}, past_key_values=cache)
        ids = torch.cat([ids, IDS[:1, 100:130]], 1)
    return ids


def by_hand(model: Any, new: Callable[[], Any]) -> Any:
    cache, logits = new(), []
    for n in (60, 1, 30, 1, 1, 120, 1):
        ids = (torch.arange(n)[None] * 7 + cache.get_seq_length()) % 110 + 4
        logits.append(model(ids, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def rolled_back(model: Any, new: Callable[[], Any]) -> Any:
    cache = new()
    cache.activate_past_recording()
    model(IDS[:1, :90], past_key_values=cache)
    cache.crop(-10)
    model(IDS[:1, :5], past_key_values=cache)
    cache.crop(0)
    first = model(IDS[:1, 20:60], past_key_values=cache).logits
    cache.crop(-38)
    return torch.cat([first, model(IDS[:1, 20:60], past_key_values=cache).logits], 1)


def last_logits(model: Any, new: Callable[[], Any]) -> Any:
    cache = new()
    parts = [(IDS[:1], 3), (IDS[:1, :30], 3), (IDS[:1, :1], 1)]
    return torch.cat([model(ids, past_key_values=cache, logits_to_keep=keep).logits for ids, keep in parts], 1)


def copied(model: Any, new: Callable[[], Any]) -> Any:
    cache = new()
    model(IDS[:1], past_key_values=cache)
    if isinstance(cache, kvpack.PackedCache):
        cache = cache.fork()
    return torch.cat([model(IDS[:1, :n], past_key_values=cache).logits for n in (1, 50, 1)], 1)


MODES = [greedy, padded_batch, beams, prompt_lookup, several_turns, by_hand, rolled_back, last_logits, copied]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_is_that_of_transformers_own_layers(kind: str, mode: Any) -> None:
    reference = model_of(kind)
    expected = mode(reference, lambda: DynamicCache(config=reference.config))
    for attention in ATTENTION:
        model = model_of(kind, attention)
        cache = kvpack.PackedCache(model)
        assert all(type(layer).__name__ in ("PackedLayer", "DummyLayer") for layer in cache.layers)
        actual = mode(model, lambda cache=cache: cache)
        if expected.is_floating_point():
            # Gemma 4 does not scale its logits: its own eager attention and SDPA differ by 2e-4.
            assert (actual - expected).abs().max() < (1e-3 if kind == "shared" else 5e-5)
        else:
            assert torch.equal(actual, expected)
        if mode is not copied:
            assert (cache.info()["materialised"] == 0) == (attention == "kvpack")


CODECS = [
    kvpack.KIVI(bits=8, group=8, window=8),
    kvpack.Rotated(bits=8, window=8),
    kvpack.KVarN(bits=8),
    kvpack.Q8(),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_memory_is_the_windows_and_a_block(codec: Any) -> None:
    model = model_of("long windows", "kvpack")
    cache = kvpack.PackedCache(model, quantize=codec)
    held = []
    for n in [150, *[1] * 300, 250, *[1] * 50]:
        model(IDS[:1, :1].expand(1, n), past_key_values=cache)
        held.append(len(cache.kept(0, 0)))
    assert held[0] == 99  # a first prompt's older tokens are never stored
    assert max(held) <= 100 + 128 + 32  # the largest granule of a codec, and what waits to leave together
    assert min(held) >= 99
    assert cache.lossy_share() > 0 or isinstance(codec, kvpack.KVarN)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize("kind", ["windows", "long windows"])
def test_eight_bits_hardly_change_the_logits(kind: str, codec: Any) -> None:
    reference, model = model_of(kind), model_of(kind, "kvpack")
    expected = by_hand(reference, lambda: DynamicCache(config=reference.config))
    actual = by_hand(model, lambda: kvpack.PackedCache(model, quantize=codec))
    assert (actual - expected).square().mean().sqrt() < 0.03 * expected.std()


def test_what_the_window_has_passed_cannot_come_back() -> None:
    model = model_of("windows", "kvpack")
    cache = kvpack.PackedCache(model)
    model(IDS[:1, :9], past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 6
    model(IDS[:1], past_key_values=cache)
    model(IDS[:1], past_key_values=cache)
    before = cache.kept(0, 0)
    with pytest.raises(kvpack.CropError):
        cache.crop(-200)
    assert cache.kept(0, 0) == before


def test_keys_that_a_long_chunk_pushed_out_cannot_be_read_again() -> None:
    model = model_of("windows", "kvpack")
    cache = kvpack.PackedCache(model)
    model(IDS[:1, :20], past_key_values=cache)
    keys, values = (torch.randn(1, 2, 60, 16) for _ in range(2))
    query = torch.randn(1, 4, 60, 16)
    handles = cache.update(keys, values, 0)
    module = model.model.layers[0].self_attn
    kvpack_attention(module, query, *handles, None)
    with pytest.raises(kvpack.StaleHandleError):
        kvpack_attention(module, query, *handles, None)


def test_keys_and_values_are_tensors_to_whoever_looks() -> None:
    model = model_of("windows", "kvpack")
    cache = kvpack.PackedCache(model)
    model(IDS[:1, :20], past_key_values=cache)
    layer, full = cache.layers[0], DynamicCache(config=model.config)
    model(IDS[:1, :20], past_key_values=full)
    expected = full.layers[0].keys
    assert layer.keys.shape == expected.shape
    assert torch.equal(layer.keys, expected)
    assert np.array_equal(layer.keys.numpy(), expected.numpy())
    assert np.array_equal(np.asarray(layer.keys), expected.numpy())
    assert layer.keys.tolist() == expected.tolist()
    for copied_keys in (copy.deepcopy(layer.keys), pickle.loads(pickle.dumps(layer.keys)), layer.keys.clone()):
        assert type(copied_keys) is torch.Tensor
        assert torch.equal(copied_keys, expected)
    before = layer.keys
    model(IDS[:1, :30], past_key_values=cache)
    assert torch.equal(before, expected)  # what was looked at stays what it was


def test_evictions_leave_windows_alone() -> None:
    model = model_of("windows and full", "kvpack")
    cache = kvpack.PackedCache(model, evict=kvpack.SnapKV(budget=32, window=8))
    model(IDS[:1], past_key_values=cache)
    model(IDS[:1, :1], past_key_values=cache)
    assert [len(cache.kept(i, 0)) for i in range(6)] == [40] * 5 + [33]


def test_where_an_eviction_does_nothing_it_is_said() -> None:
    with pytest.warns(UserWarning, match="evict= and select= do nothing here"):
        kvpack.PackedCache(model_of("windows").config, evict=kvpack.KeyDiff(budget=16))


def test_a_window_as_long_as_the_model_is_full_attention() -> None:
    config = CONFIG_MAPPING["mistral"](**{**SIZES, "sliding_window": 2048})
    cache = kvpack.PackedCache(config, evict=kvpack.KeyDiff(budget=16))
    assert not any(cache.is_sliding)


@pytest.mark.parametrize("kind", SHORT)
def test_from_a_cache_whose_windows_are_full(kind: str) -> None:
    model = model_of(kind, "kvpack")
    full = DynamicCache(config=model.config)
    model(IDS[:1], past_key_values=full)
    packed = kvpack.PackedCache.from_cache(full, model)
    assert packed.get_seq_length() == 150
    for n in (1, 30, 1):
        logits = [model(IDS[:1, :n], past_key_values=cache).logits for cache in (full, packed)]
        assert (logits[0] - logits[1]).abs().max() < 1e-4
