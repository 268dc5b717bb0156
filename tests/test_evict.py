"""Evictions: what stays is what the papers say, what goes is freed, and what is left reads as it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evict_reference as slow
import kvpack
import pytest
import torch
import transformers
from kvpack.rotation import Rotation
from reference import attention
from support import (
    Tabled,
    causal_mask,
    forward,
    left_padding,
    random_kv,
    relative_error,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import DynamicCache

FREQUENCIES = 0.9 * 0.7 ** torch.arange(16)
ROTATION = Rotation(tuple((i, i + 16) for i in range(16)), tuple(FREQUENCIES.tolist()))


class Rotary:
    """Of a model whose rotary embedding is known: halves are pairs."""

    def _rotations(self, site: Any) -> list[Rotation]:
        return [ROTATION] * site.layers


class Turned(Rotary, kvpack.ExpectedAttention):
    """Expected attention of it."""


class Streaming(Rotary, kvpack.StreamingLLM):
    """Positions within the cache of it."""


EVICTIONS = [
    kvpack.SnapKV(budget=0.25, window=16),
    kvpack.SnapKV(budget=60, window=8, kernel=3, pooling="max", decode=True, block=32),
    kvpack.PyramidKV(budget=0.3, window=8),
    kvpack.H2O(budget=0.25, block=32),
    kvpack.A2SF(budget=48, alpha=0.9, recent=8, block=32),
    kvpack.TOVA(budget=0.25, block=32),
    kvpack.StreamingLLM(budget=64, block=32),
    Streaming(budget=64, block=32, rerotate=True),
    kvpack.Longformer(window=24, dilation=3, block=32),
    Turned(budget=0.25),
    kvpack.KeyDiff(budget=0.25),
    kvpack.L2Norm(budget=0.25, recent=4, decode=True, block=32),
    kvpack.Random(budget=0.25, seed=3),
    kvpack.AdaKV(kvpack.SnapKV(budget=0.25, window=16)),
    kvpack.AdaKV(Turned(budget=0.25)),
    kvpack.AdaKV(kvpack.H2O(budget=0.25, block=32), floor=0.5),
]
CODECS = [kvpack.Exact(), kvpack.KIVI(bits=8, window=32), kvpack.Q8(), kvpack.Rotated(bits=8, window=16)]


def name(method: Any) -> str:
    inner = getattr(method, "method", method)
    return f"{'adakv-' if inner is not method else ''}{inner.name}" if hasattr(inner, "name") else str(inner)


every_eviction = pytest.mark.parametrize("evict", EVICTIONS, ids=name)
every_codec = pytest.mark.parametrize("codec", CODECS, ids=name)


def prompt(
    tokens: int, batch: int = 1, heads: int = 2, groups: int = 2, dim: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and queries that look at some of the keys more than at others."""
    key, value = random_kv(batch, heads, tokens, dim)
    return key, value, torch.randn(batch, heads * groups, tokens, dim) / 2


def cache_after(
    evict: Any, key: Tensor, value: Tensor, query: Tensor, codec: Any = None, mask: Tensor | None = None
) -> kvpack.PackedCache:
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    config = tiny_config(layers=1, heads=heads * groups, kv_heads=heads, head_dim=key.shape[3])
    cache = kvpack.PackedCache(config, evict=evict, quantize=codec)
    forward(cache, key, value, query, mask)
    return cache


def kept(cache: kvpack.PackedCache, layer: int = 0, row: int = 0) -> list[list[int]]:
    heads = cache.layers[layer].kv_heads
    return [cache.kept(layer, head, row) for head in range(heads)]


# ---- what stays -----------------------------------------------------------------------------------------------------


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


# ---- rows, pads -----------------------------------------------------------------------------------------------------


@every_eviction
def test_rows_of_a_padded_batch_keep_what_single_rows_keep(evict: Any) -> None:
    lengths = [150, 97]
    valid = left_padding(lengths)
    key, value, query = prompt(150, batch=2)
    cache = cache_after(evict, key, value, query, mask=causal_mask(valid, 150))
    for row, length in enumerate(lengths):
        single = cache_after(evict, *(x[row : row + 1, :, -length:] for x in (key, value, query)))
        assert kept(cache, row=row) == [[t + 150 - length for t in tokens] for tokens in kept(single)]


# ---- reading what is left -------------------------------------------------------------------------------------------


@every_eviction
@every_codec
def test_attention_is_that_over_the_tokens_that_stayed(evict: Any, codec: Any) -> None:
    key, value, query = prompt(203)
    cache = cache_after(evict, key, value, query, codec)
    for step in range(90):
        new_key, new_value, new_query = prompt(1 if step % 9 else 5)
        out = forward(cache, new_key, new_value, new_query)
        key, value = torch.cat([key, new_key], 2), torch.cat([value, new_value], 2)
        if step % 10:
            continue
        tokens, new = key.shape[2], new_query.shape[2]
        layer = cache.layers[0]
        seen_keys, seen_values = layer.keys, layer.values
        for head, held in enumerate(kept(cache)):
            visible = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)[:, held]
            own = new_query[0, 2 * head : 2 * head + 2]
            expected = attention(
                own, seen_keys[0, head : head + 1, held], seen_values[0, head : head + 1, held], visible
            )
            assert relative_error(out[0].transpose(0, 1)[2 * head : 2 * head + 2], expected.transpose(0, 1)) < 1e-4
            # What stayed is what was given, but for the codec.
            given = as_read(evict, key[0, head, held], torch.tensor(held))
            assert relative_error(seen_keys[0, head, held], given) < (1e-6 if codec == CODECS[0] else 0.03)


def as_read(evict: Any, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys as an eviction lets them be read: moved behind what is missing after them, if it closes gaps."""
    if not getattr(evict, "rerotate", False):
        return keys
    missing = (positions[-1] - positions) - (len(positions) - 1 - torch.arange(len(positions)))
    return ROTATION.undo(keys, -missing)


# ---- while decoding -------------------------------------------------------------------------------------------------


class SlowDecoding:
    """Attention that a KV head's tokens received, with what is let go block by block; exact tokens only."""

    def __init__(self, alpha: float, budget: int, recent: int, block: int) -> None:
        self.alpha, self.budget, self.recent, self.block = alpha, budget, recent, block
        self.key = torch.empty(0, 32)
        self.scores = torch.empty(0, dtype=torch.float64)
        self.positions: list[int] = []
        self.seen = 0

    def begin(self, first: bool = False) -> None:
        """What is due goes: after a prompt, or beyond a block."""
        if first or len(self.positions) > self.budget + self.block:
            stay = slow.best(self.scores, self.budget, self.recent)
            self.key, self.scores = self.key[stay], self.scores[stay]
            self.positions = [self.positions[t] for t in stay]

    def step(self, key: Tensor, query: Tensor) -> None:
        """`key` `[q, D]`, `query` `[G, q, D]`."""
        self.key = torch.cat([self.key, key])
        self.positions += range(self.seen, self.seen + key.shape[0])
        self.seen += key.shape[0]
        self.scores = torch.cat([self.scores, torch.zeros(key.shape[0])])
        for row in slow.probabilities(query, self.key).sum(0):
            self.scores = self.alpha * self.scores + row


@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_decoding_holds_the_budget_by_the_attention_received(alpha: float) -> None:
    evict = kvpack.A2SF(budget=60, alpha=alpha, recent=10, block=20)
    key, value, query = prompt(100)
    cache = cache_after(evict, key, value, query)
    heads = [SlowDecoding(alpha, 60, 10, 20) for _ in range(2)]
    for head, own in enumerate(heads):
        own.step(key[0, head], query[0, 2 * head : 2 * head + 2])
        own.begin(first=True)
    for step in range(130):
        key, value, query = prompt(3 if step % 7 == 3 else 1)
        forward(cache, key, value, query)
        for head, own in enumerate(heads):
            own.begin()
            own.step(key[0, head], query[0, 2 * head : 2 * head + 2])
        assert kept(cache) == [own.positions for own in heads], step
    assert len(heads[0].positions) <= 60 + 20 + 3


def test_snapkv_votes_again_with_the_last_queries_of_decoding() -> None:
    key, value, query = prompt(120)
    cache = cache_after(kvpack.SnapKV(budget=50, window=9, pooling="avg", decode=True, block=30), key, value, query)
    held = kept(cache)
    for _ in range(31):
        new = prompt(1)
        forward(cache, *new)
        key, query = torch.cat([key, new[0]], 2), torch.cat([query, new[2]], 2)
    forward(cache, *prompt(1))  # what is due goes before the next token comes
    for head, before in enumerate(held):
        tokens = [*before, *range(120, 151)]
        scores = slow.snapkv(query[0, 2 * head : 2 * head + 2, -9:], key[0, head, tokens], 9)
        stay = slow.best(torch.cat([scores, torch.zeros(9)]), 50, 9)
        assert cache.kept(0, head) == [tokens[t] for t in stay] + [151]


HOLDING = [
    evict if evict.decode else dataclasses.replace(evict, decode=True, block=32)
    for evict in EVICTIONS
    if not isinstance(evict, kvpack.Longformer | kvpack.AdaKV | kvpack.PyramidKV)
]


@pytest.mark.parametrize("evict", [*HOLDING, EVICTIONS[-1]], ids=name)
@every_codec
def test_six_thousand_tokens_are_held_in_flat_memory(evict: Any, codec: Any) -> None:
    cache = cache_after(evict, *prompt(300), codec)
    budget, block = sum(map(len, kept(cache))), 2 * 33 * 2 * 32 * 4
    after = []
    key, value, query = prompt(6000)
    for step in range(6000 if codec == CODECS[0] else 1500):
        at = slice(step, step + 1)
        forward(cache, key[:, :, at], value[:, :, at], query[:, :, at])
        if step % 100 == 99 and step > 300:
            assert sum(map(len, kept(cache))) <= budget + 2 * (32 + 1)
            after.append(cache.memory().total)
    assert cache.get_seq_length() == 300 + step + 1
    assert max(after) <= 1.15 * (budget * 2 * 32 * 4 + 2 * block) + 10_000
    assert max(after[-8:]) <= max(after[:8]) + block


def test_bytes_fall_with_the_budget() -> None:
    key, value, query = prompt(4000, heads=3, groups=3, dim=64)
    for codec in (kvpack.Exact(), kvpack.KIVI(bits=4)):
        full = cache_after(None, key, value, query, codec).memory().total
        window = 32 * 2 * 3 * 64 * 4
        for evict in (
            kvpack.SnapKV(budget=0.25),
            kvpack.KeyDiff(budget=0.25),
            kvpack.AdaKV(kvpack.SnapKV(budget=0.25)),
        ):
            held = cache_after(evict, key, value, query, codec).memory().total
            exact = 0 if codec == kvpack.Exact() else 3 * 132 * 2 * 64 * 4 * 0.75  # its exact window is the same
            assert held <= 0.27 * full + window + exact, (codec, evict)


RSS = """
import gc, sys
import torch, kvpack
sys.path.insert(0, sys.argv[2])
from test_evict import cache_after, prompt
def rss():
    gc.collect()
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
torch.set_num_threads(1)
torch.manual_seed(0)
evict = eval(sys.argv[1])
key, value, query = (x.float() for x in prompt(60_000, heads=4, groups=1, dim=64))
cache_after(evict, key[:, :, :500], value[:, :, :500], query[:, :, :500])
before = rss()
cache = cache_after(evict, key, value, query)
print(rss() - before, cache.memory().total)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_goes_is_given_back_to_the_system(fresh: Any) -> None:
    done = fresh(RSS, "kvpack.SnapKV(budget=0.25)", Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    grown, held = map(int, done.stdout.split())
    assert held < 0.27 * 2 * 60_000 * 4 * 64 * 4
    assert grown < 1.15 * held + 8e6


# ---- lengths, forks, chunks -----------------------------------------------------------------------------------------


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
def test_speculation_waits_with_the_choice_and_takes_votes_back(evict: Any) -> None:
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


# ---- models ---------------------------------------------------------------------------------------------------------

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


def ids_of(batch: int, tokens: int) -> Tensor:
    return torch.randint(3, 128, (batch, tokens))


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
@pytest.mark.parametrize("mode", ["greedy", "beams", "lookup", "chunks", "turns", "padded"])
def test_every_way_of_generating(evict: Any, mode: str) -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model, evict=evict, quantize=kvpack.KIVI(bits=4, window=32))
    more: dict[str, Any] = {
        "beams": {"num_beams": 3},
        "lookup": {"prompt_lookup_num_tokens": 4},
        "chunks": {"prefill_chunk_size": 30},
    }.get(mode, {})
    batch = 2 if mode == "padded" else 1
    inputs = {"input_ids": ids_of(batch, 90), "attention_mask": left_padding([90, 70][:batch])}
    options = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False, **more}
    out = model.generate(**inputs, past_key_values=cache, **options)
    if mode == "turns":
        ids = torch.cat([out, ids_of(1, 40)], 1)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    assert out.shape[1] == (90 + 50 if mode != "turns" else 90 + 50 + 40 + 50)
    assert cache.get_seq_length() == out.shape[1] - 1
    assert cache.info()["materialised"] == 0
    assert len(cache.kept(1, 0)) < out.shape[1] - 1


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kvpack.SnapKV(budget=0), "budget=0 is not accepted; accepted: .*from 1"),
        (lambda: kvpack.SnapKV(budget=1.5), "budget=1.5 is not accepted"),
        (lambda: kvpack.SnapKV(budget="a"), "budget='a' is not accepted"),
        (lambda: kvpack.SnapKV(budget=()), "budget: given 0 numbers"),
        (lambda: kvpack.SnapKV(kernel=4), "kernel=4 is not accepted; accepted: odd"),
        (lambda: kvpack.SnapKV(pooling="min"), "pooling='min' is not accepted; accepted: 'avg', 'max'"),
        (lambda: kvpack.SnapKV(window=0), "window=0"),
        (lambda: kvpack.SnapKV(sinks=-1), "sinks=-1"),
        (lambda: kvpack.StreamingLLM(rerotate=1), "rerotate=1 is not accepted; accepted: True, False"),
        (lambda: kvpack.SnapKV(protect=((5, 2),)), r"protect: \(5, 2\) is not accepted"),
        (lambda: kvpack.SnapKV(protect=7), "protect=7 is not accepted"),
        (lambda: kvpack.H2O(decode="yes"), "decode='yes' is not accepted"),
        (lambda: kvpack.H2O(block=0), "block=0"),
        (lambda: kvpack.H2O(recent=-0.5), "recent=-0.5"),
        (lambda: kvpack.A2SF(alpha=2), "alpha=2 is not accepted; accepted: 0 to 1"),
        (lambda: kvpack.ExpectedAttention(future=0), "future=0"),
        (lambda: kvpack.ExpectedAttention(epsilon=-1), "epsilon=-1"),
        (lambda: kvpack.ExpectedAttention(values=1), "values=1 is not accepted; accepted: True, False"),
        (lambda: kvpack.AdaKV(kvpack.TOVA()), "all heads of a layer keep the same"),
        (lambda: kvpack.AdaKV(kvpack.SnapKV(), floor=3), "floor=3"),
        (lambda: kvpack.AdaKV(7), "method=7 is not accepted"),
        (
            lambda: kvpack.PackedCache(tiny_config(), evict="snapkv"),
            "evict='snapkv' is not accepted; accepted: kvpack.SnapKV",
        ),
    ],
)
def test_bad_options_are_named(make: Any, message: str) -> None:
    with pytest.raises(kvpack.OptionError, match=message):
        make()


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


def test_keys_before_rope_lose_no_token() -> None:
    """KVQuant's pages hold consecutive positions, alone, for keys only, or in one layer."""
    codec = Tabled(bits=3)
    for quantize in (codec, kvpack.KeyValue(codec, kvpack.Q8()), kvpack.PerLayer(kvpack.Q8(), {0: codec})):
        with pytest.raises(kvpack.OptionError, match=r"not accepted with .*consecutive positions"):
            kvpack.PackedCache(tiny_config(), evict=kvpack.KeyDiff(), quantize=quantize)
    kvpack.PackedCache(tiny_config(), evict=kvpack.KeyDiff(), quantize=kvpack.KeyValue(kvpack.Q8(), codec))


def test_methods_as_text() -> None:
    from kvpack.methods.spec import parse_spec

    options = parse_spec("adakv:floor=0.1(snapkv:budget=0.25:window=16)+kivi:bits=4").options
    assert options["evict"] == kvpack.AdaKV(kvpack.SnapKV(budget=0.25, window=16), floor=0.1)
    assert options["quantize"] == kvpack.KIVI(bits=4)
    assert parse_spec("h2o:budget=100").options == {"evict": kvpack.H2O(budget=100)}
    for text in ("adakv(kivi:bits=4)", "adakv(snapkv", "snapkv(h2o)", "adakv(adakv(snapkv))", "snapkv+h2o"):
        with pytest.raises(kvpack.OptionError):
            parse_spec(text)


def test_what_is_kept_is_told_layer_by_layer() -> None:
    cache = cache_after(kvpack.StreamingLLM(budget=10), *prompt(50))
    assert cache.kept(0, 1) == [0, 1, 2, 3, *range(44, 50)]
    with pytest.raises(kvpack.ShapeError, match="layer: given 1"):
        cache.kept(1, 0)
    with pytest.raises(kvpack.ShapeError, match="head"):
        cache.kept(0, 5)
    assert "StreamingLLM" in repr(cache)
    assert "StreamingLLM" in cache.info()["evict"]
