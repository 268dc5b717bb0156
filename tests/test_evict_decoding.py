"""Evictions while decoding: attention over what stayed, the budget held, memory given back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import evict_reference as slow
import kvpack
import pytest
import torch
from evictions import CODECS, EVICTIONS, ROTATION, cache_after, every_codec, every_eviction, kept, name, prompt
from reference import attention
from support import forward, relative_error
from torch import Tensor

# ---- reading what is left -----------------------------------------------------------------------------------------


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


# ---- while decoding -----------------------------------------------------------------------------------------------


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


def test_snapkv_scores_again_with_the_last_queries_of_decoding() -> None:
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


SHARING = next(evict for evict in EVICTIONS if isinstance(evict, kvpack.AdaKV) and evict.decode)


@pytest.mark.parametrize("evict", [*HOLDING, SHARING], ids=name)
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
from evictions import cache_after, prompt
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
