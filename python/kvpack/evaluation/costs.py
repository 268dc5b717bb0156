"""What each contender takes: bytes, time of the prompt, of packing and of a token, and the peak of memory."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache import PackedCache
from .contenders import Contender, Full, Packed, held_bytes
from .forward import Reader
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
        a full cache; None where nothing is packed), `ms` of each decoded token, and `full_ms`, the full cache's median.
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
    for contender, record in zip(every, records, strict=True):
        if isinstance(contender, Packed):
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
    _return_free_memory()  # or what is taken from it would not count
    resettable, before = _reset_peak(), _status_bytes("VmRSS")
    reader.prepare()
    start = time.perf_counter()
    reader(ids, keep=1)
    seconds = _ms(start)
    return {
        "kind": "cost",
        "method": reader.contender.label,
        "context": len(ids),
        "prefill_ms": seconds,
        "peak_bytes": _status_bytes("VmHWM") - before if resettable else None,
        "pack_ms": None,
        "threads": torch.get_num_threads(),
        "ms": [],
    }


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


def _return_free_memory() -> None:
    """Give the system the memory back that the process has freed and its allocator has kept."""
    with suppress(OSError, AttributeError):  # glibc alone can
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Make the system forget the process's peak memory; say whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    return 0
