"""What each contender takes: bytes, time of the prompt, of packing and of a token, and the peak of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache import PackedCache
from ..layer import PackedLayer
from .contenders import Contender, Full, Packed, held_bytes
from .forward import Reader
from .peak import PeakMemory
from .store import Record

STEPS = 24
# Tokens that each contender decodes before it is the next one's turn: what disturbs the machine meets all alike.
TURN = 4


def measure(model: Any, contenders: Sequence[Contender], ids: Tensor, tick: Callable[[], None]) -> list[Record]:
    """Read the document `[n]` at once with each contender, then decode by turns.

    Returns:
        For the full cache and each contender: `bytes` held after the prompt and `TURN` tokens, `bytes_per_token`,
        `fp16_bytes` (of the full cache's keys and values as plain float16), `prefill_ms`, `peak_bytes` (the most memory
        that the prompt took above what the process had before; None where the system does not say), `pack_ms` (packing
        a full cache; None where nothing is packed, and where tokens are chosen by the prompt's queries, which a full
        cache does not hold: their packing is a part of `prefill_ms`), `ms` of each decoded token, and `full_ms`, the
        full cache's median.
    """
    every: list[Contender] = [Full(), *contenders]
    readers = [Reader(model, contender) for contender in every]
    readers[0](ids[:64], keep=1)  # so that threads and buffers are there
    readers[0] = Reader(model, every[0])
    records = []
    for reader in readers:
        records.append(_read(reader, ids))
        tick()
    full = readers[0].cache
    for contender, reader, record in zip(every, readers, records, strict=True):
        if isinstance(contender, Packed) and not _chooses_by_queries(reader.cache):
            start = time.perf_counter()
            PackedCache.from_cache(full, model, **contender.spec.options)
            record["pack_ms"] = _ms(start)
    token = ids[-1:]
    for turn in range(STEPS // TURN + 1):
        for reader, record in zip(readers, records, strict=True):
            reader.prepare()
            times = [_step(reader, token) for _ in range(TURN)]
            if turn:  # the first turn warms up
                record["ms"] += times
            else:  # some layers hold on to a whole prompt until the next step
                record["bytes"] = held_bytes(reader.cache)
                record["bytes_per_token"] = round(record["bytes"] / (len(ids) + TURN), 2)
        if not turn:
            fp16_bytes = 2 * sum(_numbers(layer) for layer in full.layers)
        tick()
    for record in records:
        record["ms"] = [round(ms, 3) for ms in record["ms"]]
        record["median_ms"] = round(statistics.median(record["ms"]), 3)
        record["fp16_bytes"], record["full_ms"] = fp16_bytes, records[0]["median_ms"]
    return records


def ticks(contenders: int) -> int:
    """Return how often `measure` ticks."""
    return 1 + contenders + STEPS // TURN + 1


def _read(reader: Reader, ids: Tensor) -> Record:
    reader.prepare()
    with PeakMemory() as peak:
        start = time.perf_counter()
        reader(ids, keep=1)
        ms = _ms(start)
    return {
        "kind": "cost",
        "method": reader.contender.label,
        "context": len(ids),
        "prefill_ms": ms,
        "peak_bytes": peak.bytes,
        "pack_ms": None,
        "threads": torch.get_num_threads(),
        "ms": [],
    }


def _chooses_by_queries(cache: PackedCache) -> bool:
    return any(isinstance(layer, PackedLayer) and layer.chooses_by_queries for layer in cache.layers)


def _step(reader: Reader, token: Tensor) -> float:
    start = time.perf_counter()
    reader(token, keep=1)
    return (time.perf_counter() - start) * 1e3


def _numbers(layer: Any) -> int:
    """Keys and values of a layer that holds any."""
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(x.numel() for x in held if x is not None)


def _ms(start: float) -> float:
    return round((time.perf_counter() - start) * 1e3, 3)
