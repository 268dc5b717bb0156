"""(b) Attention of one layer: decode over the whole grid, and many queries over a packed past."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from .options import Options, Shape
from .progress import Bars
from .results import Rows
from .worker import Worker

TARGET = "benchmarks.layer_bench:LayerBench"
REFERENCE = "torch SDPA float32"
TORCH = (REFERENCE, "torch SDPA bfloat16")
DYNAMIC = ("DynamicCache float32", "DynamicCache bfloat16")
PACKED = ("Exact float32", "Exact bfloat16", "KIVI-8", "KIVI-4", "KIVI-3", "KIVI-2")
# One of each kind: here one number of threads is compared with another, not one engine.
SMALL = ("Exact float32", "KIVI-4")


@dataclass(frozen=True)
class Cell:
    """What is measured at once."""

    shape: Shape
    tokens: int
    engines: tuple[str, ...]
    new: int = 1

    def __str__(self) -> str:
        return f"{'/'.join(map(str, self.shape))}, {self.tokens} tokens"


def run_decode(options: Options, bars: Bars) -> Rows:
    """Measure one new token over every context and head shape."""
    every = (*TORCH, *DYNAMIC, *PACKED)
    cells = [Cell(shape, tokens, SMALL) for shape in options.shapes for tokens in options.small_contexts]
    cells += [Cell(shape, tokens, every) for shape in options.shapes for tokens in options.contexts]
    return measure("attention", cells, options, bars)


def run_queries(options: Options, bars: Bars) -> Rows:
    """Measure many new tokens at once over one long past, as in the next turn of a chat."""
    tokens = options.past + options.new
    cells = [Cell(shape, tokens, (*TORCH, *PACKED), options.new) for shape in options.shapes]
    return measure("queries", cells, options, bars)


def measure(title: str, cells: Sequence[Cell], options: Options, bars: Bars) -> Rows:
    """Measure every cell with every number of threads, one right after the other."""
    bar = bars.add(title, total=len(cells) * len(options.threads))
    rows = Rows()
    with ExitStack() as stack:
        workers = {threads: stack.enter_context(Worker(TARGET, threads)) for threads in options.threads}
        for cell in cells:
            for threads, worker in workers.items():
                bar.say(f"{cell}, threads: {threads}")
                rows += worker.call(
                    "measure",
                    shape=cell.shape,
                    tokens=cell.tokens,
                    engines=cell.engines,
                    seconds=options.cell_seconds,
                    new=cell.new,
                )
                bar.advance()
    bar.end()
    return rows
