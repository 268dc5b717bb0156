"""Evictions: what stays is what the papers say, what goes is freed, and what is left reads as it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import evict_reference as slow
import kvpack
import pytest
import torch
import transformers
from evictions import FREQUENCIES, Turned, cache_after, every_eviction, kept, prompt
from support import causal_mask, forward, ids_of, left_padding, relative_error, tiny_config, tiny_model
from torch import Tensor

# ---- what stays ---------------------------------------------------------------------------------------------------


def slow_choice(evict: Any, key: Tensor, query: Tensor, head: int) -> list[int]:
    """What one KV head keeps of a prompt: `key` `[n, D]`, `query` `[G, n, D]`."""
    tokens = key.shape[0]
    budget = int(evict.budget * tokens) if isinstance(evict.budget, float) else evict.budget
    if isinstance(evict, kvpack.SnapKV):
        window = min(evict.window, tokens)
        scores = slow.snapkv(query, key, window, evict.kernel, evict.pooling)
        return slow.best(torch.cat([scores, torch.zeros(window)]), budget, window)
    if isinstance(evict, kvpack.H2O):
        return slow.best(slow.accumulated(query, key, 1.0), budget, int(evict.recent * budget))
    if isinstance(evict, kvpack.A2SF):
        return slow.best(slow.accumulated(query, key, evict.alpha), budget, evict.recent)
    if isinstance(evict, kvpack.StreamingLLM):
        return slow.best(torch.arange(tokens).double(), budget, 0, list(range(4)))
    if isinstance(evict, kvpack.Longformer):
        shape = {*range(4), *range(tokens - evict.window, tokens)}
        return sorted(shape | {t for t in range(tokens) if evict.dilation and (t + head) % evict.dilation == 0})
    if isinstance(evict, kvpack.L2Norm):
        return slow.best(-key.double().norm(dim=-1), budget, evict.recent)
    return slow.best(slow.keydiff(key), budget)


SCORED = [
    kvpack.SnapKV(budget=0.25),
    kvpack.SnapKV(budget=100, window=17, kernel=7, pooling="max"),
    kvpack.SnapKV(budget=20, window=32),
    kvpack.H2O(budget=0.2),
    kvpack.A2SF(budget=77, alpha=0.95),
    kvpack.A2SF(budget=0.1, alpha=0.5, recent=1),
    kvpack.StreamingLLM(budget=61),
    kvpack.Longformer(window=50, dilation=7),
    kvpack.Longformer(window=50),
    kvpack.KeyDiff(budget=0.3),
    kvpack.L2Norm(budget=0.3, recent=5),
]


@pytest.mark.parametrize("evict", SCORED, ids=str)
@pytest.mark.parametrize("tokens", [301, 64])
def test_a_prompts_tokens_are_those_of_the_papers_equations(evict: Any, tokens: int) -> None:
    key, value, query = prompt(tokens, heads=3, groups=3, dim=64)
    cache = cache_after(evict, key, value, query)
    for head, held in enumerate(kept(cache)):
        own = query[0, 3 * head : 3 * head + 3]
        assert held == slow_choice(evict, key[0, head], own, head)


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("tokens", [150, 37])
def test_expected_attention_is_that_of_rotated_moments(tokens: int, covariance: bool) -> None:
    key, value, query = prompt(tokens, heads=2, groups=3)
    query += torch.randn(6, 1, 32)  # queries that have a mean
    evict = Turned(budget=0.3, future=20, covariance=covariance)
    cache = cache_after(evict, key, value, query)
    for head, held in enumerate(kept(cache)):
        own = query[0, 3 * head : 3 * head + 3]
        scores = slow.expected(own, key[0, head], value[0, head], FREQUENCIES, 20, 4, covariance)
        assert held == slow.best(scores, int(0.3 * tokens), 0, list(range(4)))


def test_expected_attention_finds_the_rotation_of_a_model() -> None:
    model = tiny_model()
    ids = ids_of(1, 60)
    cache = kvpack.PackedCache(model, evict=kvpack.ExpectedAttention(budget=0.5))
    model(ids, past_key_values=cache)
    assert [len(tokens) for tokens in kept(cache, 1)] == [30, 30]
    with pytest.raises(kvpack.OptionError, match="made from a configuration"):
        kvpack.PackedCache(model.config, evict=kvpack.ExpectedAttention())


def test_streaming_counts_positions_within_the_cache() -> None:
    """With one layer keys are a token's and its position's alone, so a text of the tokens that stayed says the same."""
    model = tiny_model(tiny_config(layers=1, heads=4, kv_heads=2, head_dim=32))
    ids = torch.randint(0, model.config.vocab_size, (1, 400))
    errors: dict[bool, list[float]] = {True: [], False: []}
    for rerotate, found in errors.items():
        evict = kvpack.StreamingLLM(budget=60, block=16, rerotate=rerotate)
        cache = kvpack.PackedCache(model, evict=evict)
        model(ids[:, :200], past_key_values=cache)
        for t in range(200, 400):
            logits = model(ids[:, t : t + 1], past_key_values=cache).logits[0, -1]
            if t % 40 == 0:
                stayed = torch.tensor(kept(cache)[0])
                assert stayed[3] == 3
                assert stayed[4] > 100
                found.append(relative_error(logits, model(ids[:, stayed]).logits[0, -1]))
    assert max(errors[True]) < 1e-5 < min(errors[False]) / 10


def test_positions_within_the_cache_need_a_rotary_embedding() -> None:
    evict = kvpack.StreamingLLM(rerotate=True)
    model = tiny_model(tiny_config(layers=1, heads=4, kv_heads=2, head_dim=32))
    with pytest.raises(kvpack.OptionError, match="made from a configuration"):
        kvpack.PackedCache(model.config, evict=evict)
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=99))
    with pytest.raises(kvpack.OptionError, match="no rotary embedding"):
        kvpack.PackedCache(plain, evict=evict)
    with pytest.raises(kvpack.OptionError, match="it looks at keys"):
        kvpack.PackedCache(model, evict=evict, quantize=kvpack.Rotated(center=True))


def test_threads_divide_the_attention_that_is_received(threads: Callable[[int], None]) -> None:
    held = []
    for n in (1, 4):
        threads(n)
        torch.manual_seed(3)
        cache = cache_after(kvpack.H2O(budget=2000, block=4), *prompt(2000, batch=4, dim=64))
        for _ in range(12):
            forward(cache, *prompt(1, batch=4, dim=64))
        held.append([set(tokens) for row in range(4) for tokens in kept(cache, row=row)])
    for one, other in zip(*held, strict=True):
        assert max(one) == 2011
        assert len(one) < 2012
        assert len(one ^ other) <= 2  # near ties


def test_tova_decides_once_for_all_heads() -> None:
    key, value, query = prompt(200, heads=3, groups=2)
    cache = cache_after(kvpack.TOVA(budget=0.25), key, value, query)
    scores = [slow.accumulated(query[0, 2 * h : 2 * h + 2], key[0, h], 0.0) for h in range(3)]
    assert kept(cache) == [slow.best(torch.stack(scores).mean(0), 50, 1)] * 3


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.9])
def test_adakv_shares_out_a_layers_budget(floor: float) -> None:
    key, value, query = prompt(300, heads=3, groups=2)
    key[:, 0] *= 3  # a head that looks at few tokens
    cache = cache_after(
        kvpack.AdaKV(kvpack.SnapKV(budget=0.25, window=16, pooling="avg"), floor=floor), key, value, query
    )
    budget, held = 75, kept(cache)
    scores = torch.stack([slow.snapkv(query[0, 2 * h : 2 * h + 2], key[0, h], 16) for h in range(3)])
    scores = torch.cat([scores, torch.full((3, 16), torch.inf)], 1)
    own = [set(slow.best(scores[h], max(int(floor * budget), 16))) for h in range(3)]
    rest = [(scores[h, t].item(), h, t) for h in range(3) for t in range(300) if t not in own[h]]
    for _, h, t in sorted(rest, reverse=True)[: 3 * budget - sum(map(len, own))]:
        own[h].add(t)
    assert held == [sorted(tokens) for tokens in own]
    assert len({len(tokens) for tokens in held}) > 1


def test_pyramid_budgets_fall_from_layer_to_layer() -> None:
    config = tiny_config(layers=5, heads=4, kv_heads=2, head_dim=32)
    cache = kvpack.PackedCache(config, evict=kvpack.PyramidKV(budget=108, window=8))
    key, value, query = prompt(600)
    for layer in range(5):
        forward(cache, key, value, query, layer=layer)
    assert [len(cache.kept(layer, 1)) for layer in range(5)] == [203, 156, 108, 61, 13]


def test_budgets_layer_by_layer() -> None:
    config = tiny_config(layers=3, heads=4, kv_heads=2, head_dim=32)
    cache = kvpack.PackedCache(config, evict=kvpack.L2Norm(budget=(1.0, 50, 0.5)))
    key, value, query = prompt(200)
    for layer in range(3):
        forward(cache, key, value, query, layer=layer)
    assert [len(cache.kept(layer, 0)) for layer in range(3)] == [200, 50, 100]
    with pytest.raises(kvpack.OptionError, match=r"given 2 numbers; accepted: 3"):
        kvpack.PackedCache(config, evict=kvpack.L2Norm(budget=(1.0, 50)))


def test_random_keeps_other_tokens_in_every_head_and_layer() -> None:
    config = tiny_config(layers=2, heads=4, kv_heads=2, head_dim=32)
    cache = kvpack.PackedCache(config, evict=kvpack.Random(budget=0.5))
    for layer in range(2):
        forward(cache, *prompt(400), layer=layer)
    held = [tuple(cache.kept(layer, head)) for layer in range(2) for head in range(2)]
    assert len(set(held)) == 4
    assert all(len(tokens) == 200 for tokens in held)
    assert all(60 < sum(t < 200 for t in tokens) < 140 for tokens in held)


@every_eviction
def test_protected_tokens_stay(evict: Any) -> None:
    inner = getattr(evict, "method", evict)
    protecting = dataclasses.replace(inner, protect=((5, 9), (40, 41)))
    cache = cache_after(kvpack.AdaKV(protecting) if evict is not inner else protecting, *prompt(200))
    for tokens in kept(cache):
        assert {5, 6, 7, 8, 40} <= set(tokens)


@every_eviction
def test_a_budget_with_room_for_all_changes_nothing(evict: Any) -> None:
    inner = getattr(evict, "method", evict)
    if isinstance(inner, kvpack.Longformer):
        pytest.skip("its pattern is no budget")
    roomy = dataclasses.replace(inner, budget=400)
    key, value, query = prompt(300)
    cache = cache_after(kvpack.AdaKV(roomy) if evict is not inner else roomy, key, value, query)
    full = cache_after(None, key, value, query)
    for _ in range(3):
        new = prompt(1)
        assert torch.equal(forward(cache, *new), forward(full, *new))


# ---- rows, pads ---------------------------------------------------------------------------------------------------


@every_eviction
def test_rows_of_a_padded_batch_keep_what_single_rows_keep(evict: Any) -> None:
    lengths = [150, 97]
    valid = left_padding(lengths)
    key, value, query = prompt(150, batch=2)
    cache = cache_after(evict, key, value, query, mask=causal_mask(valid, 150))
    for row, length in enumerate(lengths):
        single = cache_after(evict, *(x[row : row + 1, :, -length:] for x in (key, value, query)))
        assert kept(cache, row=row) == [[t + 150 - length for t in tokens] for tokens in kept(single)]
