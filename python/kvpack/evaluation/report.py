"""Tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..memory import readable_bytes
from .contenders import FULL
from .intervals import LEAST
from .summary import Row

Format = Callable[[Row], str]
TOO_FEW = "too few"


def _number(name: str, form: str) -> Format:
    return lambda row: form.format(row[name]) if row.get(name) is not None else ""


def _ranged(name: str, form: str, bounds: str | None = None) -> Format:
    """A number with its interval, or why it has none."""

    def show(row: Row) -> str:
        if name not in row:
            return ""
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        if low is None or high is None:
            return f"{form.format(row[name])} ({TOO_FEW})"
        return f"{form.format(row[name])} ({(bounds or form).format(low)} to {(bounds or form).format(high)})"

    return show


_kl_of_others = _ranged("kl", "{:.2e}", "{:.1e}")


def _kl(row: Row) -> str:
    return "0" if row["method"] == FULL and "perplexity" in row else _kl_of_others(row)


def _bytes(row: Row) -> str:
    return f"{row['bytes_per_token']:,.0f}" if "bytes_per_token" in row else ""


def _peak(row: Row) -> str:
    return readable_bytes(row["peak_bytes"]) if row.get("peak_bytes") is not None else ""


COLUMNS: dict[str, Format] = {
    "method": lambda row: str(row["method"]),
    "bytes a token": _bytes,
    "of fp16": _number("of_fp16", "{:.1%}"),
    "perplexity": _number("perplexity", "{:.4f}"),
    "worse by (95 %)": _ranged("perplexity_change", "{:+.2%}"),
    "KL, nats (95 %)": _kl,
    "KL, 95th percentile": _number("kl_p95", "{:.2e}"),
    "top-1 agreement (95 %)": _ranged("agreement", "{:.2%}"),
    "compressed past": _number("lossy", "{:.1%}"),
    "greedy tokens equal": lambda row: f"{row['greedy']:.1f} of {row['greedy_of']:.0f}" if "greedy" in row else "",
    "ms a token (p10-p90)": lambda row: (
        f"{row['ms']:.1f} ({row['ms_p10']:.1f}-{row['ms_p90']:.1f})" if "ms" in row else ""
    ),
    "x faster": _number("speedup", "{:.2f}"),
    "prefill, ms": _number("prefill_ms", "{:,.0f}"),
    "packing, ms": _number("pack_ms", "{:,.0f}"),
    "peak of prefill": _peak,
}


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heads of the columns that have something in them, and the cells."""
    columns = dict(COLUMNS)
    for low in dict.fromkeys(
        name for row in rows for name in row if name.startswith("task_") and name.endswith("_low")
    ):
        task = low.removesuffix("_low")
        columns[f"{task.removeprefix('task_').replace('_', ' ')} (95 %)"] = _ranged(task, "{:.2f}")
    cells = {head: [form(row) for row in rows] for head, form in columns.items()}
    used = [head for head, column in cells.items() if any(column)]
    return used, [[cells[head][i] for head in used] for i in range(len(rows))]


def markdown(rows: Sequence[Row], identity: dict[str, Any]) -> str:
    """Return the table in Markdown, and under it what it rests on."""
    heads, cells = table(rows)
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(lines) + "\n\n" + notes(rows, identity)


def notes(rows: Sequence[Row], identity: dict[str, Any]) -> str:
    """Return what the numbers rest on."""
    full = rows[0] if rows else {}
    lines = [
        f"- {identity.get('model')}, {identity.get('dtype')}; text {identity.get('text')}, "
        f"seed {identity.get('seed')}; "
        + ", ".join(f"{name} {identity.get(name)}" for name in ("kvpack", "isa", "torch", "transformers"))
        + "."
    ]
    if "tokens" in full:
        lines.append(
            f"- Text: {full['documents']} documents of {identity.get('context')} tokens, {full['tokens']:,} of them "
            f"predicted, fed {identity.get('chunk')} at a time, so that each token is predicted from a past that is "
            "compressed already (*compressed past*: its share, on average). KL, agreement: next-token distribution "
            "against the full cache's on the same tokens. Intervals: Student's over documents, each paired with the "
            "full cache's; of KL by factors, of the others longer on the side to which documents are skewed."
        )
        if full["documents"] < LEAST:
            lines.append(
                f"- No intervals: {full['documents']} documents are too few, expected at least {LEAST}; "
                "read more tokens, or shorter documents."
            )
    if "task_samples" in full:
        lines.append(
            f"- Tasks: {full['task_samples']} samples a method; the share of the expected answers that were given, and "
            "its Wilson interval. "
            + (
                "The question is the end of the prompt."
                if identity.get("ask") == "with"
                else "The text is packed before the question is read."
            )
        )
    failed = {row["method"]: row["task_failed"] for row in rows if row.get("task_failed")}
    if failed:
        counts = ", ".join(f"{method}: {count}" for method, count in failed.items())
        lines.append(f"- Samples on which a cache failed with an error, and which are in no mean: {counts}.")
    if "cost_context" in full:
        lines.append(
            f"- Cost: one document of {full['cost_context']} tokens, {full['threads']} threads; all caches decode in "
            "turn in one run, medians are shown; prefill and packing are measured once. Packing: of a full cache; none "
            "where tokens are chosen by the prompt's queries, which such a cache does not hold: it is part of their "
            "prefill. Bytes: measured after the prompt. Peak: above what the process held before."
        )
    return "\n".join(lines) + "\n"


def text(rows: Sequence[Row]) -> str:
    """Return the table for a terminal, on its side: a line a column of the Markdown one, as those do not fit."""
    heads, cells = table(rows)
    lines = list(zip(heads, *cells, strict=True))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = (
        (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in shown)


def html(rows: Sequence[Row]) -> str:
    """Return the table in HTML, for notebooks."""
    heads, cells = table(rows)
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:right'>{cell}</td>" for cell in row) + "</tr>" for row in cells
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
