"""Evictions with crops, speculation, forks, beams and chunks."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from evictions import cache_after, every_eviction, kept, name, prompt
from support import causal_mask, forward, ids_of, left_padding, tiny_config, tiny_model
from transformers import DynamicCache


@every_eviction
def test_a_crop_reaches_what_can_be_undone_and_no_further(evict: Any) -> None:
    cache = cache_after(evict, *prompt(100))
    for _ in range(5):
        forward(cache, *prompt(1))
    before = kept(cache)
    with pytest.raises(kvpack.CropError, match="6"):
        cache.crop(-6)
    assert kept(cache) == before
    cache.crop(-5)
    assert cache.get_seq_length() == 100
    assert all(max(tokens) < 100 for tokens in kept(cache))


def test_a_sequence_that_was_cropped_away_begins_anew() -> None:
    key, value, query = prompt(20)
    valid = left_padding([15, 20])[:1]
    cache = cache_after(kvpack.StreamingLLM(budget=30), key, value, query, mask=causal_mask(valid, 20))
    cache.crop(-20)
    forward(cache, *prompt(60))
    forward(cache, *prompt(1))
    assert cache.kept(0, 0) == [0, 1, 2, 3, *range(34, 61)]


@every_eviction
def test_speculation_waits_with_the_choice_and_takes_scores_back(evict: Any) -> None:
    """Tokens that were offered and refused leave no trace."""
    key, value, query = prompt(90)
    new = [prompt(1) for _ in range(60)]
    plain, offering = (cache_after(evict, key, value, query) for _ in range(2))
    offering.activate_past_recording()
    for step in new:
        forward(plain, *step)
        wrong = prompt(3)
        forward(offering, *(torch.cat(pair, 2) for pair in zip(step, wrong, strict=True)))
        offering.crop(-3)
    if not getattr(evict, "decode", False):
        assert kept(offering) == kept(plain)
    assert offering.get_seq_length() == plain.get_seq_length()
    assert [len(tokens) for tokens in kept(offering)] == pytest.approx([len(tokens) for tokens in kept(plain)], abs=33)


@every_eviction
def test_forks_and_beams_go_their_own_ways(evict: Any) -> None:
    cache = cache_after(evict, *prompt(120))
    fork = cache.fork()
    fork.batch_repeat_interleave(2)
    held = kept(cache)
    for _ in range(80):
        key, value, query = prompt(1, batch=2)
        forward(fork, key, value, query)
    fork.reorder_cache(torch.tensor([1, 1]))
    assert kept(fork, row=0) == kept(fork, row=1)
    assert kept(cache) == held
    assert torch.isfinite(forward(cache, *prompt(1))).all()


@every_eviction
def test_a_prompt_in_chunks_is_held_in_the_budget(evict: Any) -> None:
    key, value, query = prompt(400)
    config = tiny_config(layers=1, heads=4, kv_heads=2, head_dim=32)
    cache = kvpack.PackedCache(config, evict=evict)
    for start in range(0, 400, 100):
        at = slice(start, start + 100)
        forward(cache, key[:, :, at], value[:, :, at], query[:, :, at])
    whole = cache_after(evict, key, value, query)
    forward(cache, *prompt(1))
    forward(whole, *prompt(1))
    assert sum(map(len, kept(cache))) <= sum(map(len, kept(whole))) + 2


@pytest.mark.parametrize("evict", [kvpack.KeyDiff(budget=0.5), kvpack.AdaKV(kvpack.L2Norm(budget=0.5))], ids=name)
def test_another_caches_tokens_are_chosen_when_it_is_packed(evict: Any) -> None:
    model, mask = tiny_model(), left_padding([60, 41])
    ids = ids_of(2, 60)
    full = DynamicCache(config=model.config)
    model(ids, past_key_values=full, attention_mask=mask)
    loaded = kvpack.PackedCache.from_cache(full, model, evict=evict, attention_mask=mask)
    read = kvpack.PackedCache(model, evict=evict)
    model(ids, past_key_values=read, attention_mask=mask)
    assert [kept(loaded, 1, row) for row in range(2)] == [kept(read, 1, row) for row in range(2)]
    more = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    step = ids_of(2, 1)
    logits = [model(step, past_key_values=cache, attention_mask=more).logits for cache in (loaded, read)]
    assert torch.equal(*logits)


def test_asking_for_memory_in_between_changes_nothing() -> None:
    model = tiny_model(attention="sdpa")
    ids, step = ids_of(1, 60), ids_of(1, 1)
    logits = []
    for asks in (False, True):
        cache = kvpack.PackedCache(model, evict=kvpack.KeyDiff(budget=0.5))
        model(ids, past_key_values=cache)
        if asks:
            cache.memory()
        logits.append(model(step, past_key_values=cache).logits)
        assert len(cache.kept(0, 0)) == 31
    assert torch.equal(*logits)
