"""Random sequences of everything that can be done to a cache, beside a mirror that does it the simple way."""

from __future__ import annotations

import random
from dataclasses import dataclass

import kvpack
import pytest
import torch
from reference import Kivi, attention
from support import causal_mask, forward, left_padding, random_kv, relative_error, tiny_config
from torch import Tensor

HEADS, DIM = 2, 32
# What may be done, and how often; "one" is an append of one token.
OPERATIONS = {"append": 6, "one": 6, "crop": 4, "reorder": 2, "select": 1, "repeat": 1, "fork": 2}


class ExactRows:
    """A cache as two tensors; pads are zeros."""

    def __init__(self) -> None:
        self.key = self.value = torch.empty(0)

    def start(self, key: Tensor, value: Tensor, valid: Tensor) -> None:
        shown = valid[:, None, :, None]
        self.key, self.value = key * shown, value * shown

    def append(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)

    def read(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value

    attended = read

    def end(self, new: int) -> None:
        pass

    def croppable(self) -> int:
        return self.key.shape[2]

    def crop(self, tokens: int) -> None:
        left = self.key.shape[2] - tokens
        self.key, self.value = self.key[:, :, :left], self.value[:, :, :left]

    def select(self, rows: list[int]) -> None:
        self.key, self.value = self.key[rows], self.value[rows]

    def fork(self) -> ExactRows:
        other = ExactRows()
        other.key, other.value = self.key, self.value
        return other


class KiviRows:
    """A cache as one reference a row and head."""

    def __init__(self, codec: kvpack.KIVI) -> None:
        self.codec = codec
        self.rows: list[list[Kivi]] = []
        self.pads: list[int] = []

    def _new(self) -> Kivi:
        return Kivi(self.codec.bits, self.codec.group, self.codec.window, self.codec.sinks)

    def start(self, key: Tensor, value: Tensor, valid: Tensor) -> None:
        self.rows = [[self._new() for _ in range(HEADS)] for _ in range(key.shape[0])]
        self.pads = [int((row == 0).sum()) for row in valid]
        for row, (heads, pads) in enumerate(zip(self.rows, self.pads, strict=True)):
            for head, reference in enumerate(heads):
                reference.forward(key[row, head, pads:], value[row, head, pads:], first=True)

    def append(self, key: Tensor, value: Tensor) -> None:
        for row, heads in enumerate(self.rows):
            for head, reference in enumerate(heads):
                reference.begin()
                reference.append(key[row, head], value[row, head])

    def end(self, new: int) -> None:
        for heads in self.rows:
            for reference in heads:
                reference.end(first=False, tokens=new)

    def read(self) -> tuple[Tensor, Tensor]:
        def padded(row: int, name: str) -> Tensor:
            heads = torch.stack([getattr(reference, name) for reference in self.rows[row]])
            return torch.nn.functional.pad(heads, (0, 0, self.pads[row], 0))

        batch = range(len(self.rows))
        return torch.stack([padded(row, "key") for row in batch]), torch.stack([padded(row, "value") for row in batch])

    attended = read

    def croppable(self) -> int:
        return min(reference.croppable for heads in self.rows for reference in heads)

    def crop(self, tokens: int) -> None:
        for heads in self.rows:
            for reference in heads:
                reference.crop(tokens)

    def select(self, rows: list[int]) -> None:
        self.rows = [self._copies(self.rows[row]) for row in rows]
        self.pads = [self.pads[row] for row in rows]

    @staticmethod
    def _copies(heads: list[Kivi]) -> list[Kivi]:
        copies = []
        for reference in heads:
            other = Kivi(reference.bits, reference.group, reference.window, reference.sinks)
            other.__dict__.update(reference.__dict__)
            copies.append(other)
        return copies

    def fork(self) -> KiviRows:
        other = KiviRows(self.codec)
        other.rows, other.pads = [self._copies(heads) for heads in self.rows], list(self.pads)
        return other


@dataclass
class Pair:
    """A cache, its mirror, and which of its tokens are no pads."""

    cache: kvpack.PackedCache
    mirror: ExactRows | KiviRows
    valid: Tensor

    def append(self, new: int) -> None:
        batch = self.valid.shape[0]
        key, value = random_kv(batch, HEADS, new, DIM)
        query = torch.randn(batch, 2 * HEADS, new, DIM)
        self.valid = torch.cat([self.valid, torch.ones(batch, new, dtype=torch.long)], dim=1)
        visible = causal_mask(self.valid, new)
        out = forward(self.cache, key, value, query, None if self.valid.all() else visible)
        self.mirror.append(key, value)
        keys, values = self.mirror.attended()
        expected = torch.stack([attention(query[row], keys[row], values[row], visible[row, 0]) for row in range(batch)])
        assert relative_error(out, expected) < 1e-4
        self.mirror.end(new)

    def crop(self, tokens: int) -> None:
        self.cache.crop(-tokens)
        self.mirror.crop(tokens)
        self.valid = self.valid[:, : self.valid.shape[1] - tokens]

    def refuse_crop(self, tokens: int) -> None:
        with pytest.raises(kvpack.CropError):
            self.cache.crop(-tokens)

    def select(self, rows: list[int], how: str) -> None:
        getattr(self.cache, how)(torch.tensor(rows))
        self.mirror.select(rows)
        self.valid = self.valid[rows]

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        rows = [row for row in range(self.valid.shape[0]) for _ in range(times)]
        self.mirror.select(rows)
        self.valid = self.valid[rows]

    def fork(self) -> Pair:
        return Pair(self.cache.fork(), self.mirror.fork(), self.valid)

    def check(self) -> None:
        assert self.cache.get_seq_length() == self.valid.shape[1]
        layer = self.cache.layers[0]
        lossless = isinstance(self.mirror, ExactRows)
        for stored, expected in zip((layer.keys, layer.values), self.mirror.read(), strict=True):
            torch.testing.assert_close(stored, expected, rtol=0 if lossless else 1e-6, atol=0 if lossless else 1e-6)


def walk(codec: kvpack.Exact | kvpack.KIVI, seed: int, steps: int = 40) -> dict[str, int]:
    """`steps` random operations on up to four forks of one cache; how often each was done."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    lengths = [choose.randint(1, 200) for _ in range(choose.randint(1, 3))]
    valid = left_padding(lengths)
    first = Pair(
        kvpack.PackedCache(tiny_config(layers=1), quantize=codec),
        ExactRows() if isinstance(codec, kvpack.Exact) else KiviRows(codec),
        valid,
    )
    key, value = random_kv(len(lengths), HEADS, max(lengths), DIM)
    forward(first.cache, key, value, mask=None if valid.all() else causal_mask(valid, max(lengths)))
    first.mirror.start(key, value, valid)
    pairs, done = [first], dict.fromkeys(("append", "crop", "refused", "reorder", "select", "repeat", "fork"), 0)
    for _ in range(steps):
        pair = choose.choice(pairs)
        batch, tokens = pair.valid.shape
        step = choose.choices(list(OPERATIONS), list(OPERATIONS.values()))[0]
        shortest = int(pair.valid.sum(dim=1).min())
        within = min(pair.mirror.croppable(), shortest - 1)
        if step in ("append", "one") and tokens < 1500:
            pair.append(1 if step == "one" else choose.randint(1, 200))
            step = "append"
        elif step == "crop" and within > 0:
            pair.crop(choose.randint(1, min(within, choose.choice([5, 400]))))
        elif step == "crop" and pair.mirror.croppable() < shortest - 1:
            pair.refuse_crop(choose.randint(pair.mirror.croppable() + 1, shortest - 1))
            step = "refused"
        elif step == "reorder":
            pair.select([choose.randrange(batch) for _ in range(batch)], "reorder_cache")
        elif step == "select" and batch > 1:
            pair.select(choose.sample(range(batch), choose.randint(1, batch)), "batch_select_indices")
        elif step == "repeat" and batch <= 2:
            pair.repeat(2)
        elif step == "fork" and len(pairs) < 4:
            pairs.append(pair.fork())
        else:
            continue
        done[step] += 1
        for each in pairs:
            each.check()
    return done


@pytest.mark.parametrize("seed", range(12))
def test_exact(seed: int) -> None:
    done = walk(kvpack.Exact(), seed)
    assert sum(done.values()) > 20


@pytest.mark.parametrize("seed", range(12))
def test_kivi(seed: int) -> None:
    bits = [2, 3, 4, 8][seed % 4]
    codec = [kvpack.KIVI(bits=bits), kvpack.KIVI(bits=bits, group=16, window=32, sinks=seed % 3)][seed // 4 % 2]
    done = walk(codec, seed)
    assert sum(done.values()) > 20


def test_the_walks_do_everything() -> None:
    totals: dict[str, int] = {}
    for seed in range(100, 103):
        for name, times in walk(kvpack.KIVI(bits=2, group=16, window=32), seed, steps=60).items():
            totals[name] = totals.get(name, 0) + times
    assert all(totals.values()), totals
