"""ThinK: which channels of keys are left out, what is read then, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import kvpack
import pytest
import torch
from kvpack.methods.spec import parse_spec
from reference import attention
from support import (
    every_mode,
    forward,
    generated,
    ids_of,
    left_padding,
    random_kv,
    relative_error,
    tiny_config,
    tiny_model,
)
from torch import Tensor

GREEDY: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
THINK = kvpack.ThinK(ratio=0.4, window=32)


def kept_channels(query: Tensor, key: Tensor, ratio: float, queries: int) -> list[int]:
    """The paper's rule for one KV head, of queries `[G, n, D]` and keys `[n, D]`."""
    importance = query[:, -queries:].double().pow(2).mean((0, 1)) * key.double().pow(2).mean(0)
    kept = key.shape[1] - int(ratio * key.shape[1])
    return sorted(importance.argsort(descending=True)[:kept].tolist())


def cache_of(codec: Any, **more: Any) -> kvpack.PackedCache:
    return kvpack.PackedCache(tiny_config(layers=1, heads=4, kv_heads=2), quantize=codec, **more)


@pytest.mark.parametrize(("ratio", "queries"), [(0.4, 32), (0.5, 8), (0.6, 100), (0.0, 32), (0.99, 1)])
@pytest.mark.parametrize("tokens", [300, 97])
def test_the_channels_are_those_of_the_papers_equation(ratio: float, queries: int, tokens: int) -> None:
    cache = cache_of(kvpack.ThinK(ratio=ratio, window=32, queries=queries))
    key, value = random_kv(1, 2, tokens, 32)
    query = torch.randn(1, 4, tokens, 32) * torch.rand(4, 1, 32)
    forward(cache, key, value, query)
    new_key, new_value = random_kv(1, 2, 1, 32)
    new_query = torch.randn(1, 4, 1, 32)
    out = forward(cache, new_key, new_value, new_query)
    key, value = torch.cat([key, new_key], 2), torch.cat([value, new_value], 2)
    layer, packed = cache.layers[0], (tokens - 32) // 64 * 64
    for head in range(2):
        kept = kept_channels(query[0, 2 * head : 2 * head + 2], key[0, head, :tokens], ratio, queries)
        want = key[0, head].clone()
        want[:packed] = 0
        want[:packed, kept] = key[0, head, :packed, kept]
        assert torch.equal(layer.keys[0, head], want)
        assert torch.equal(layer.values[0, head], value[0, head])
        expected = attention(
            new_query[0, 2 * head : 2 * head + 2], want[None], value[0, head : head + 1], torch.ones(1, tokens + 1) > 0
        )
        assert relative_error(out[0].transpose(0, 1)[2 * head : 2 * head + 2], expected.transpose(0, 1)) < 1e-5


def test_the_channels_are_chosen_anew_when_tokens_have_doubled() -> None:
    cache = cache_of(THINK)
    key, value = random_kv(1, 2, 200, 32)
    forward(cache, key, value, torch.randn(1, 4, 200, 32))
    zero = cache.layers[0].keys[0] == 0
    for n in (*[1] * 100, 40, 300):
        forward(cache, *random_kv(1, 2, n, 32), torch.randn(1, 4, n, 32) * torch.logspace(1, -1, 32))
    now = cache.layers[0].keys[0] == 0
    assert torch.equal(now[:, :128], zero[:, :128])  # what is packed stays
    packed = (cache.get_seq_length() - 32) // 64 * 64
    assert (now[:, :packed].sum(-1) == int(0.4 * 32)).all()
    changes = [t for t in range(1, packed) if not torch.equal(now[:, t], now[:, t - 1])]
    assert changes
    assert set(changes) <= {128, 256, 512}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_fall_by_the_channels_that_are_left_out(dtype: torch.dtype) -> None:
    key, value = (x.to(dtype) for x in random_kv(1, 2, 64 * 64, 64))
    query = torch.randn(1, 4, 64 * 64, 64, dtype=dtype)
    held = []
    for codec in (THINK, kvpack.Exact()):
        cache = kvpack.PackedCache(tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64), quantize=codec)
        forward(cache, key, value, query)
        held.append(cache.memory().total)
    kept = (64 - int(0.4 * 64)) / 64
    assert held[0] / held[1] == pytest.approx((1 + kept) / 2, rel=0.01)


@every_mode
def test_every_way_of_generating(mode: str) -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model, quantize=kvpack.KeyValue(THINK, kvpack.KIVI(bits=4, window=32)))
    generated(model, cache, mode, 120, 40)
    assert cache.lossy_share() > 0


def test_rows_of_a_padded_batch_are_single_rows_and_forks_go_on_alike() -> None:
    model = tiny_model()
    ids, more = ids_of(2, 160), ids_of(2, 30)
    batch = kvpack.PackedCache(model, quantize=THINK)
    mask = torch.cat([left_padding([160, 130]), torch.ones(2, 30, dtype=torch.long)], 1)
    at = (mask.cumsum(1) - 1).clamp_min(0)  # which channels weigh most depends on how far keys are rotated
    model(input_ids=ids, attention_mask=mask[:, :160], position_ids=at[:, :160], past_key_values=batch)
    both = model(more, attention_mask=mask, position_ids=at[:, 160:], past_key_values=batch).logits
    for row, pads in ((0, 0), (1, 30)):
        cache = kvpack.PackedCache(model, quantize=THINK)
        model(input_ids=ids[row : row + 1, pads:], past_key_values=cache)
        twins = (cache.fork(), copy.deepcopy(cache))
        single = model(more[row : row + 1], past_key_values=cache).logits
        assert (single - both[row]).abs().max() < 1e-4
        for twin in twins:
            assert torch.equal(model(more[row : row + 1], past_key_values=twin).logits, single)


def test_what_cannot_be_decided_is_refused() -> None:
    model = tiny_model(attention="sdpa")
    with pytest.raises(kvpack.OptionError, match="chooses channels by the queries"):
        model.generate(input_ids=ids_of(1, 200), past_key_values=kvpack.PackedCache(model, quantize=THINK), **GREEDY)
    for options in ({"ratio": 1.0}, {"ratio": -0.1}, {"ratio": True}, {"window": -1}, {"queries": 0}):
        with pytest.raises(kvpack.OptionError, match="is not accepted"):
            kvpack.ThinK(**options)


def test_as_text() -> None:
    found = parse_spec("think:ratio=0.5/kivi:bits=4").options["quantize"]
    assert found == kvpack.KeyValue(kvpack.ThinK(ratio=0.5), kvpack.KIVI(bits=4))
