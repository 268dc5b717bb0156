"""Any codec of keys beside any codec of values, while tokens go, are rolled back and come: what stays does not change.

Keys and values are cut into pages in different places, and some pages can only be cut in whole groups of tokens.
"""

from __future__ import annotations

import random
from typing import Any

import kvpack
import pytest
import torch
from support import codec_id, forward, random_kv, tiny_config
from torch import Tensor

HEADS, DIM = 2, 32
VALUES = [
    kvpack.Exact(),
    kvpack.KIVI(bits=8, group=16, window=32),
    kvpack.Q8(window=5),
    kvpack.Rotated(bits=8, window=16),
    kvpack.KVarN(bits=8),
    kvpack.KVarN(bits=2, sinks=0, full_window=True),
]
KEYS = [*VALUES, kvpack.Graded(key_bits=3, group=16, window=32)]
EVICTIONS = [
    kvpack.StreamingLLM(budget=180, block=16),
    kvpack.StreamingLLM(budget=300, block=4),
    kvpack.KeyDiff(budget=0.5, decode=True, block=8),
    kvpack.SnapKV(budget=140, window=8, decode=True, block=16),
    kvpack.L2Norm(budget=150, decode=True, block=8),
]


class Held:
    """A cache, what it was given, and what it held when it was last looked at."""

    def __init__(self, codec: Any, eviction: Any) -> None:
        config = tiny_config(layers=1, heads=HEADS, kv_heads=HEADS, head_dim=DIM)
        self.cache = kvpack.PackedCache(config, quantize=codec, evict=eviction)
        self.given: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.seen: list[dict[int, Tensor]] = [{} for _ in range(2 * HEADS)]

    def append(self, tokens: int) -> None:
        new = random_kv(1, HEADS, tokens, DIM)
        for column, x in zip(self.given, new, strict=True):
            column.extend(x[0].unbind(1))
        assert forward(self.cache, *new, torch.randn(1, HEADS, tokens, DIM)).isfinite().all()

    def crop(self, tokens: int) -> bool:
        """Whether that many could be rolled back; nothing changes where they could not."""
        length = len(self.given[0])
        try:
            self.cache.crop(-tokens)
        except kvpack.CropError:
            assert self.cache.get_seq_length() == length
            return False
        for column in self.given:
            del column[length - tokens :]
        self.seen = [{p: x for p, x in seen.items() if p < length - tokens} for seen in self.seen]
        return True

    def check(self) -> None:
        """Every number is what was given or, once it was packed, what it was then."""
        assert self.cache.get_seq_length() == len(self.given[0])
        layer = self.cache.layers[0]
        for side, (stored, given) in enumerate(zip((layer.keys, layer.values), self.given, strict=True)):
            for head in range(HEADS):
                seen, now = self.seen[side * HEADS + head], {}
                for position in self.cache.kept(0, head):
                    now[position] = stored[0, head, position].clone()
                    exact = given[position][head]
                    before = seen.get(position, exact)
                    if not torch.equal(before, exact):
                        torch.testing.assert_close(now[position], before, rtol=1e-5, atol=1e-6)
                self.seen[side * HEADS + head] = now


@pytest.mark.parametrize("values", VALUES, ids=codec_id)
@pytest.mark.parametrize("keys", KEYS, ids=codec_id)
def test_what_stays_does_not_change(keys: Any, values: Any) -> None:
    choose = random.Random(f"{keys} {values}")
    for eviction in choose.sample(EVICTIONS, 2):
        torch.manual_seed(choose.randrange(1000))
        held = Held(kvpack.KeyValue(keys, values), eviction)
        held.append(choose.choice([150, 300, 420]))
        for _ in range(10):
            step = choose.choice(["one", "few", "chunk", "many", "crop", "crop", "record"])
            if step == "many":
                for _ in range(choose.randrange(5, 60)):
                    held.append(1)
            elif step == "crop":
                held.crop(choose.choice([1, 5, 30, 150]))
            elif step == "record":
                held.cache.activate_past_recording()
            else:
                held.append({"one": 1, "few": choose.randrange(2, 9), "chunk": choose.randrange(17, 300)}[step])
            held.check()
