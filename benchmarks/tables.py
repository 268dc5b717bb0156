"""The tables of the report, in Markdown, each made from the rows of one part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from .attention import PACKED, REFERENCE
from .model import BASELINE
from .results import Row, Rows
from .targets import Layers, Target, context_cost, heads, length

NOTHING = ""


def table(header: Sequence[str], body: Iterable[Sequence[str]], figures: bool = True) -> list[str]:
    """Return a Markdown table: the first column to the left, and the others to the right if they are figures."""
    lines = [header, ["---", *["---:" if figures else "---"] * (len(header) - 1)], *body]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def folded(title: str, lines: Iterable[str]) -> list[str]:
    """Return lines that are shown only when their title is clicked."""
    return ["", f"<details><summary>{title}</summary>", "", *lines, "", "</details>", ""]


def goals(targets: Sequence[Target]) -> list[str]:
    """One row a goal: how many of its cells meet it, and the worst of them."""
    body = []
    for target in targets:
        met, measured = target.count()
        worst = target.worst()
        outcome = f"**{met} of {measured}**" if 0 < met == measured else f"{met} of {measured}"
        where = NOTHING if worst is None else f"{worst.where}: {target.measured(worst)}, {target.verdict(worst)}"
        body.append([target.what, target.wanted, outcome if measured else "not measured", where])
    return table(("goal", "wanted", "cells that meet it", "the worst of them"), body, figures=False)


def goal_cells(targets: Iterable[Target]) -> list[str]:
    """One row a cell of a goal."""
    body = [
        [target.what, cell.where, target.wanted, target.measured(cell), target.verdict(cell)]
        for target in targets
        for cell in target.cells
    ]
    return table(("goal", "where", "wanted", "measured", "verdict"), body, figures=False)


def decode(rows: Rows) -> list[str]:
    """For each head shape and number of threads: nanoseconds a cached token, engines by contexts."""
    lines: list[str] = []
    for shape, threads in product(rows.distinct("shape"), rows.distinct("threads")):
        cells = rows.where(shape=shape, threads=threads)
        # The smaller contexts are those that only some engines were measured at: they have a table of their own.
        contexts = sorted(cells.where(engine=REFERENCE).distinct("tokens"))
        cells = Rows(cell for cell in cells if cell["tokens"] in contexts)
        title = f"{heads(shape)}, threads: {threads}"
        first = (shape, threads) == (rows[0]["shape"], rows[0]["threads"])
        content = _engines_by_contexts(cells, contexts)
        lines += [f"**{title}**", *content] if first else folded(title, content)
    return lines


def _engines_by_contexts(cells: Rows, contexts: Sequence[int]) -> list[str]:
    body = []
    for engine in cells.distinct("engine"):
        of_engine = cells.where(engine=engine)
        largest = of_engine.one(tokens=contexts[-1]) if contexts else None
        size = f"{largest['layer_bytes'] / largest['tokens']:.0f}" if largest else NOTHING
        body.append([engine, size])
        for tokens in contexts:
            row, reference = of_engine.one(tokens=tokens), cells.one(tokens=tokens, engine=REFERENCE)
            body[-1].append(_compared(row, reference, 1 / tokens) if row else NOTHING)
    return table(("engine", "bytes a token", *map(length, contexts)), body)


def _compared(row: Row, reference: Row | None, scale: float, what: str = "ns") -> str:
    """Return a figure with its spread, and how many times faster it is than the reference, if there is one."""
    if reference is None or what not in reference:
        return spread(row[what], scale)
    return f"{spread(row[what], scale)} **{number(reference[what]['median'] / row[what]['median'])}x**"


def roofline(rows: Rows) -> list[str]:
    """The bandwidth that each packed engine reads at, as share of what the probe reached beside it."""
    layers = Layers(rows)
    tokens = max(rows.distinct("tokens"), key=lambda tokens: (tokens <= 32_768, tokens))
    columns = list(product(rows.distinct("shape"), rows.distinct("threads")))
    body = []
    for engine in PACKED:
        shares = [layers.share(engine, shape, tokens, threads) for shape, threads in columns]
        body.append([engine, *(NOTHING if share is None else f"{share:.0f} %" for share in shares)])
    probes = [rows.one(shape=shape, threads=threads, tokens=tokens) for shape, threads in columns]
    speeds = [f"{probe['bandwidth']['median']:.1f} GB/s" if probe else NOTHING for probe in probes]
    header = [f"{heads(shape)}, threads: {threads}" for shape, threads in columns]
    return table((f"at {length(tokens)}", *header), [*body, ["the read bandwidth", *speeds]])


def small(rows: Rows) -> list[str]:
    """Few cached tokens: microseconds a call with each number of threads."""
    columns = [tokens for tokens in sorted(rows.distinct("tokens")) if not rows.one(tokens=tokens, engine=REFERENCE)]
    body = []
    for shape, engine, threads in product(rows.distinct("shape"), PACKED, rows.distinct("threads")):
        of_engine = rows.where(shape=shape, engine=engine, threads=threads)
        if columns and of_engine.one(tokens=columns[0]):
            found = [of_engine.one(tokens=tokens) for tokens in columns]
            times_ = [spread(row["ns"], 1e-3) if row else NOTHING for row in found]
            body.append([engine, heads(shape), str(threads), *times_])
    return table(("engine", "heads", "threads", *map(str, columns)), body) if body else []


def queries(rows: Rows) -> list[str]:
    """Many new tokens: for each number of threads microseconds a new token, engines by head shapes."""
    shapes, lines = rows.distinct("shape"), []
    for threads in rows.distinct("threads"):
        cells, body = rows.where(threads=threads), []
        for engine in cells.distinct("engine"):
            body.append([engine])
            for shape in shapes:
                row, reference = cells.one(engine=engine, shape=shape), cells.one(engine=REFERENCE, shape=shape)
                body[-1].append(_compared(row, reference, 1e-3 / row["new"]) if row else NOTHING)
        lines += [f"**threads: {threads}**", *table(("engine", *map(heads, shapes)), body)]
    return lines


def model(rows: Rows) -> list[str]:
    """For each dtype and number of threads: milliseconds a token, engines by contexts."""
    lines: list[str] = []
    for dtype, threads in product(rows.distinct("dtype"), rows.distinct("threads")):
        cells = rows.where(dtype=dtype, threads=threads)
        lines += [f"**{dtype}, threads: {threads}**", *_milliseconds(cells, BASELINE)]
    return lines


def peers(rows: Rows) -> list[str]:
    """For each number of threads: milliseconds a token and what context costs, engines by contexts."""
    lines: list[str] = []
    for threads in rows.distinct("threads"):
        cells = rows.where(threads=threads)
        lines += [f"**threads: {threads}**", *_milliseconds(cells, None)]
    return lines


def _milliseconds(cells: Rows, reference: str | None) -> list[str]:
    contexts = sorted(cells.distinct("context"))
    body = []
    for engine in cells.distinct("engine"):
        line = [engine]
        for context in contexts:
            row = cells.one(engine=engine, context=context)
            if row and "ms" in row:
                line.append(_compared(row, cells.one(engine=reference, context=context), 1, "ms"))
            else:
                why = row["missing"] if row else NOTHING
                line.append(NOTHING if why in line else why)
        cost = context_cost(cells, engine, cells[0]["threads"])
        body.append([*line, NOTHING if cost is None else number(cost)])
    return table(("engine", *(f"{context} tokens" for context in contexts), "context costs"), body)


def prefill(rows: Rows) -> list[str]:
    """Seconds and peak memory."""
    body = []
    for row in rows:
        peak = row["peak_bytes"]
        size = "unknown" if peak is None else f"{peak / 1e6:.0f} MB"
        body.append([row["engine"], spread(row["seconds"]), size])
    return table(("engine", "seconds (p10-p90)", "peak memory above the weights"), body)


def stalls(rows: Rows) -> list[str]:
    """The median step and the longest ones."""
    body = []
    for row in rows:
        longest = ", ".join(f"{number(step['ms'])} (step {step['step']})" for step in row["longest"])
        ratio = row["ms"]["max"] / row["ms"]["median"]
        body.append([row["engine"], spread(row["ms"]), longest, f"{ratio:.2f}"])
    return table(("engine", "ms a step (p10-p90)", "the longest, ms", "longest / median"), body)


def kernels(rows: Rows) -> list[str]:
    """Criterion's medians: the last part of a benchmark's name is its column."""
    split = [(*row["benchmark"].rpartition("/")[::2], row) for row in rows]
    columns = sorted({column for _, column, _ in split}, key=lambda column: (len(column), column))
    cells = {(name, column): row for name, column, row in split}
    body = [
        [name, *(_per_element(cells[name, column]) if (name, column) in cells else NOTHING for column in columns)]
        for name in dict.fromkeys(name for name, _, _ in split)
    ]
    return table(("benchmark", *columns), body)


def _per_element(row: Row) -> str:
    scale = 1 / (row["elements"] or 1)
    ns = row["ns"]
    return f"{number(scale * ns['median'])} ({number(scale * ns['low'])}-{number(scale * ns['high'])})"


def spread(figures: Row, scale: float = 1.0) -> str:
    """Return a median with its 10th and 90th percentile."""
    median, low, high = (number(scale * figures[name]) for name in ("median", "p10", "p90"))
    return f"{median} ({low}-{high})"


def number(value: float) -> str:
    """Return a figure with about three digits."""
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
