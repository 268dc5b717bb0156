"""The goals that were set for the speed of kvpack, each beside what was measured.

A goal has a cell for every head shape, context, number of threads and engine that it speaks of, and all of them are
reported: also the missed ones, and those that were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from .attention import PACKED, REFERENCE, TORCH
from .model import BASELINE, FEW, HF
from .options import LONGEST_CONTEXT, SHAPES, Shape
from .results import Results, Row, Rows

SMOLLM2, LLAMA3 = SHAPES[:2]
LONG = (8192, 32_768)
DTYPES = ("float32", "bfloat16")
# Two medians of the same thing differ by this much.
NOISE = 0.02

# Other engines as the goals were set, on another machine: how many times faster than torch SDPA float32 there.
# The best of their settings, and where torch's time was a range, what makes the goal harder.
FASTEST_KERNELS = {
    (SMOLLM2, 1): 334 / 134,
    (SMOLLM2, 2): 252 / 89,
    (LLAMA3, 1): 3500 / 731,
    (LLAMA3, 2): 2313 / 406,
}
LLAMA_CPP = {(SMOLLM2, 1): 334 / 256, (SMOLLM2, 2): 252 / 141, (LLAMA3, 2): 2313 / 727}


@dataclass(frozen=True)
class Cell:
    """One measurement that a goal speaks of; `value` is None where it was not made."""

    where: str
    value: float | None


@dataclass(frozen=True)
class Target:
    """A goal: `limit` is what each cell must reach (`least`), or must not exceed.

    `noise` is the share of the limit that makes no difference.
    """

    what: str
    limit: float
    cells: tuple[Cell, ...]
    least: bool = True
    unit: str = "x"
    noise: float = 0.0

    @property
    def wanted(self) -> str:
        """The goal in words."""
        return f"{'at least' if self.least else 'at most'} {_number(self.limit)}{self.unit}"

    def measured(self, cell: Cell) -> str:
        """A cell's value in words."""
        return "not measured" if cell.value is None else f"{_number(cell.value)}{self.unit}"

    def shortfall(self, cell: Cell) -> float | None:
        """By which share of the limit a cell misses it; not above 0: met. None: not measured."""
        if cell.value is None:
            return None
        distance = cell.value / self.limit
        return 1 - distance if self.least else distance - 1

    def verdict(self, cell: Cell) -> str:
        """Whether a cell meets the goal, in words."""
        short = self.shortfall(cell)
        if short is None:
            return "not measured"
        if short <= 0:
            return "met"
        return "met within noise" if short <= self.noise else f"missed by {_number(max(100 * short, 0.1))} %"

    def count(self) -> tuple[int, int]:
        """How many cells meet the goal, and how many were measured."""
        shortfalls = [short for short in map(self.shortfall, self.cells) if short is not None]
        return sum(short <= self.noise for short in shortfalls), len(shortfalls)

    def worst(self) -> Cell | None:
        """The measured cell that is farthest from meeting the goal, or meets it most narrowly."""
        measured = [cell for cell in self.cells if cell.value is not None]
        return max(measured, key=lambda cell: self.shortfall(cell) or 0.0, default=None)


def targets(results: Results) -> list[Target]:
    """Return every goal."""
    return [
        *_decode(Layers(results.rows("attention"))),
        *_threads(Layers(results.rows("attention"))),
        *_queries(Layers(results.rows("queries"))),
        *_model(results.rows("model")),
        *_peers(results.rows("peers")),
        *_prefill(results.rows("prefill")),
        *_stalls(results.rows("stalls")),
    ]


@dataclass(frozen=True)
class Layers:
    """The rows of a part that measures one layer."""

    rows: Rows

    def row(self, engine: str, shape: Shape, tokens: int, threads: int) -> Row | None:
        """Return the row of one measurement."""
        return self.rows.one(engine=engine, shape=list(shape), tokens=tokens, threads=threads)

    def ns(self, engine: str, shape: Shape, tokens: int, threads: int) -> float | None:
        """Return the median nanoseconds a call."""
        return _median(self.row(engine, shape, tokens, threads), "ns")

    def faster(self, engine: str, than: str, cells: Iterable[tuple[Shape, int, int]]) -> tuple[Cell, ...]:
        """Return how many times faster one engine is than another in each (shape, tokens, threads)."""
        return tuple(Cell(place(*cell), _ratio(self.ns(than, *cell), self.ns(engine, *cell))) for cell in cells)

    def share(self, engine: str, shape: Shape, tokens: int, threads: int) -> float | None:
        """Return the bandwidth that an engine reads its bytes at, in % of the measured one."""
        row = self.row(engine, shape, tokens, threads)
        return None if row is None else 100 * row["layer_bytes"] / row["ns"]["median"] / row["bandwidth"]["median"]


def _decode(layers: Layers) -> Iterator[Target]:
    one_thread = [(shape, tokens, 1) for shape in SHAPES for tokens in LONG]
    for shape, limit in ((SMOLLM2, 12), (LLAMA3, 15)):
        cells = [cell for cell in one_thread if cell[0] == shape]
        what = f"KIVI-4 against {REFERENCE}, {heads(shape)}"
        yield Target(what, limit, layers.faster("KIVI-4", REFERENCE, cells))
    yield Target("KIVI-2 against KIVI-4", 1, layers.faster("KIVI-2", "KIVI-4", one_thread), noise=NOISE)
    for engine, than, limit in (
        ("Exact bfloat16", REFERENCE, 5),
        ("Exact bfloat16", TORCH[1], 20),
        ("Exact float32", REFERENCE, 3),
    ):
        yield Target(f"{engine} against {than}", limit, layers.faster(engine, than, one_thread))
    for engine, limit in (("Exact bfloat16", 60), ("KIVI-8", 45), ("KIVI-4", 30)):
        place_ = (LLAMA3, 32_768, 1)
        cell = Cell(place(*place_), layers.share(engine, *place_))
        yield Target(f"{engine}, share of the read bandwidth", limit, (cell,), unit=" %")
    for name, theirs, factor in (("the fastest kernels known", FASTEST_KERNELS, 3), ("llama.cpp", LLAMA_CPP, 5)):
        for (shape, threads), ratio in theirs.items():
            what = f"KIVI-4 against {REFERENCE}, so that it is {factor}x {name}*, {heads(shape)}"
            yield Target(what, factor * ratio, layers.faster("KIVI-4", REFERENCE, [(shape, 8192, threads)]))


def _threads(layers: Layers) -> Iterator[Target]:
    def gain(engine: str, shape: Shape, tokens: int) -> Cell:
        value = _ratio(layers.ns(engine, shape, tokens, 1), layers.ns(engine, shape, tokens, 2))
        return Cell(f"{engine}, {heads(shape)}, {length(tokens)}", value)

    def growth(engine: str, shape: Shape, threads: int) -> Cell:
        value = _ratio(layers.ns(engine, shape, 131_072, threads), layers.ns(engine, shape, 8192, threads))
        return Cell(f"{engine}, {heads(shape)}, {_threads_of(threads)}", None if value is None else value / 16)

    lengths = sorted(layers.rows.distinct("tokens"))
    measured = [
        (engine, shape, tokens)
        for shape, tokens, engine in product(SHAPES, lengths, PACKED)
        if layers.row(engine, shape, tokens, 1)
    ]
    cells = tuple(gain(engine, shape, 32_768) for shape, engine in product(SHAPES, PACKED))
    yield Target("Two threads against one, 32k", 1.7, cells)
    yield Target("Two threads against one, every size", 1, tuple(gain(*cell) for cell in measured), noise=NOISE)
    cells = tuple(growth(engine, shape, threads) for shape, threads, engine in product(SHAPES, (1, 2), PACKED))
    yield Target("Time a token at 128k against 8k", 1.3, cells, least=False)


def _queries(layers: Layers) -> Iterator[Target]:
    new = next(iter(layers.rows.distinct("new")), 64)
    tokens = next(iter(layers.rows.distinct("tokens")), 8192 + new)
    cells: list[Cell] = []
    for shape, threads, engine in product(SHAPES, (1, 2), PACKED):
        than = TORCH[1] if engine.endswith("bfloat16") else REFERENCE
        (cell,) = layers.faster(engine, than, [(shape, tokens, threads)])
        cells.append(Cell(f"{engine}, {cell.where}", cell.value))
    what = f"{new} new tokens over a packed past of {length(tokens - new)} against torch SDPA of the same dtype"
    yield Target(what, 1, tuple(cells), noise=NOISE)


def _model(rows: Rows) -> Iterator[Target]:
    def faster(engine: str, than: str, dtype: str, context: int, threads: int = 2) -> Cell:
        about = {"dtype": dtype, "context": context, "threads": threads}
        value = _ratio(_median(rows.one(engine=than, **about), "ms"), _median(rows.one(engine=engine, **about), "ms"))
        return Cell(f"{engine}, {dtype}, {length(context)}, {_threads_of(threads)}", value)

    for dtype, engine, limit in (
        ("float32", "KIVI-4", 2.2),
        ("float32", "Exact", 1.8),
        ("bfloat16", "KIVI-4", 4),
        ("bfloat16", "Exact", 4),
    ):
        what = f"Whole model {dtype}, {engine} against {BASELINE}"
        yield Target(what, limit, (faster(engine, BASELINE, dtype, LONGEST_CONTEXT),))
    cells = tuple(
        faster(engine, BASELINE, dtype, 512, threads) for dtype, threads, engine in product(DTYPES, (1, 2), FEW[1:])
    )
    yield Target(f"Whole model at 512 tokens against {BASELINE}", 0.97, cells)
    for than in HF:
        cells = tuple(
            faster(engine, than, dtype, LONGEST_CONTEXT) for dtype, engine in product(DTYPES, ("KIVI-4", "KIVI-2"))
        )
        yield Target(f"Whole model against {than}", 3, cells)


def _peers(rows: Rows) -> Iterator[Target]:
    cells = []
    for threads, dtype, engine in product((1, 2), DTYPES, FEW[1:]):
        theirs = [context_cost(rows, name, threads) for name in rows.distinct("engine") if name.startswith("llama.cpp")]
        best = min((cost for cost in theirs if cost is not None), default=None)
        value = _ratio(best, context_cost(rows, f"{engine} {dtype}", threads))
        cells.append(Cell(f"{engine} {dtype}, {_threads_of(threads)}", value))
    yield Target("What context costs, against llama.cpp's best cache setting in the same run", 5, tuple(cells))


def _prefill(rows: Rows) -> Iterator[Target]:
    def against(engine: str, value: float | None, baseline: float | None) -> Cell:
        tokens = next(iter(rows.distinct("tokens")), 4096)
        return Cell(f"{engine}, {length(tokens)}", _ratio(value, baseline))

    packed = {engine: rows.one(engine=engine) for engine in ("KIVI-4", "Exact")}
    full = rows.one(engine=BASELINE)
    cells = tuple(against(engine, _median(row, "seconds"), _median(full, "seconds")) for engine, row in packed.items())
    yield Target(f"Time of prefill against {BASELINE}", 1.05, cells, least=False)
    peaks = {engine: row and row["peak_bytes"] for engine, row in (packed | {BASELINE: full}).items()}
    cells = tuple(against(engine, peaks[engine], peaks[BASELINE]) for engine in packed)
    yield Target(f"Peak memory of prefill, above the weights, against {BASELINE}", 1, cells, least=False)


def _stalls(rows: Rows) -> Iterator[Target]:
    def longest(engine: str) -> Cell:
        row = rows.one(engine=engine)
        steps = row["ms"]["samples"] if row else 2000
        return Cell(f"{engine}, {steps} steps", row and row["ms"]["max"] / row["ms"]["median"])

    yield Target("Longest step against the median step", 3, tuple(map(longest, ("KIVI-4", "Exact"))), least=False)


def context_cost(rows: Rows, engine: str, threads: int) -> float | None:
    """Return nanoseconds a cached token and layer: what a step takes longer at the longest context than at the first.

    None where one of the two was not measured.
    """
    found = rows.where(engine=engine, threads=threads).measured()
    contexts = sorted(rows.distinct("context"))
    ends = [found.one(context=context) for context in (contexts[:1] + contexts[-1:])]
    short, long = ends if len(ends) == 2 else (None, None)
    if short is None or long is None or short is long:
        return None
    tokens = long["context"] - short["context"]
    return 1e6 * (long["ms"]["median"] - short["ms"]["median"]) / tokens / long["layers"]


def place(shape: Shape, tokens: int, threads: int) -> str:
    """Return a cell's place in words."""
    return f"{heads(shape)}, {length(tokens)}, {_threads_of(threads)}"


def heads(shape: Iterable[int]) -> str:
    """Return a head shape as it is written: query heads, KV heads, head_dim."""
    return "/".join(map(str, shape))


def length(tokens: int) -> str:
    """Return a number of tokens, in k (1024) where that is near enough to call it so."""
    return f"{round(tokens / 1024)}k" if tokens >= 1024 else str(tokens)


def _threads_of(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _median(row: Row | None, name: str) -> float | None:
    return row[name]["median"] if row and name in row else None


def _ratio(above: float | None, below: float | None) -> float | None:
    """Return the quotient; what costs nothing, as far as could be measured, is infinitely better."""
    if above is None or below is None:
        return None
    return above / below if below > 0 else math.inf


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"
