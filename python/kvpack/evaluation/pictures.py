"""Pictures: what a method loses against what it takes, and where in a text it finds what it is asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import OptionError
from .contenders import FULL
from .store import Record
from .summary import Row

# A KL below is rounding, and would stretch the axis for nothing.
LEAST_KL = 1e-7
AXES = {
    "bytes": ("bytes_per_token", "bytes a token, all layers"),
    "ms": ("ms", "ms a decoded token: median, 10th to 90th percentile"),
}


def draw_all(rows: Sequence[Row], records: Sequence[Record], identity: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what there is something to draw of; return the files."""
    from matplotlib import pyplot

    figures: dict[str, Any] = {}
    for against in AXES:
        if _points(rows, against):
            figures[f"kl-{against}"] = pareto(rows, identity, against)
    for task in dict.fromkeys(record["task"] for record in records if record["kind"] == "task"):
        figures[f"task-{task}"] = heat_map(records, task, identity)
    if any(record["kind"] == "layers" for record in records):
        figures["layers"] = layer_errors(records, identity)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
        paths.append(path)
    return paths


def pareto(rows: Sequence[Row], identity: dict[str, Any], against: str) -> Any:
    """Draw KL to the full cache against bytes or milliseconds a token.

    Bytes are counted: the Pareto front is drawn through the best. Times are measured: their spread is drawn, and no
    front, which would run through whatever was disturbed least.
    """
    if against not in AXES:
        raise OptionError(f"against={against!r} is not accepted; accepted: {', '.join(AXES)}")
    points = _points(rows, against)
    if not points:
        raise OptionError(f"against={against!r}: KL and {AXES[against][1]} were not both measured")
    figure, axes = _figure(identity)
    for point in points:
        bars = {"xerr": point.across, "yerr": point.along, "capsize": 3, "elinewidth": 1}
        axes.errorbar(point.x, point.y, fmt="o", color="tab:blue", **bars)
        axes.annotate(point.label, (point.x, point.y), xytext=(6, 5), textcoords="offset points", fontsize=8)
    if against == "bytes":
        front = zip(*pareto_front([(point.x, point.y) for point in points]), strict=True)
        axes.step(*front, where="post", color="tab:orange", linewidth=1, label="Pareto front", zorder=0)
    full = next((row for row in rows if row["method"] == FULL), {})
    name, title = AXES[against]
    if name in full:
        axes.axvline(full[name], color="grey", linestyle=":", label="full cache")
    axes.set(xlabel=title, ylabel="KL to the full cache, nats a token", yscale="log")
    if against == "bytes":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both coordinates, smaller being better, by the first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def heat_map(records: Sequence[Record], task: str, identity: dict[str, Any]) -> Any:
    """Draw a task's scores for each method: context across, depth down."""
    found: dict[str, dict[tuple[int, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["kind"] == "task" and record["task"] == task and "score" in record:
            found[record["method"]][record["context"], record["depth"] or 0.0].append(record["score"])
    labels = sorted(found, key=lambda label: label != FULL)
    contexts = sorted({context for cells in found.values() for context, _ in cells})
    depths = sorted({depth for cells in found.values() for _, depth in cells})
    figure, all_axes = _figure(identity, columns=len(labels), width=1.2 + 1.9 * len(labels), height=3.4)
    image = None
    for axes, label in zip(all_axes, labels, strict=True):
        cells = found[label]
        grid = [[fmean(cells[c, d]) if (c, d) in cells else float("nan") for c in contexts] for d in depths]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{label}\n{fmean(x for cell in cells.values() for x in cell):.2f}", fontsize=9)
        axes.set_xticks(range(len(contexts)), [f"{c:,}" for c in contexts], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths] if len(depths) > 1 else [""], fontsize=8)
    all_axes[0].set_ylabel("depth")
    all_axes[len(labels) // 2].set_xlabel("context, tokens")
    figure.colorbar(image, ax=list(all_axes), label=f"{task.replace('_', ' ')}: score")
    return figure


def layer_errors(records: Sequence[Record], identity: dict[str, Any]) -> Any:
    """Draw each layer's own error of attention, for all methods."""
    figure, axes = _figure(identity)
    for record in records:
        if record["kind"] == "layers":
            layers = [i for i, error in enumerate(record["errors"]) if error is not None]
            errors = [max(record["errors"][i], LEAST_KL) for i in layers]
            axes.plot(layers, errors, marker=".", linewidth=1, label=record["method"])
    axes.set(xlabel="layer", ylabel="error of the attention output, relative", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


@dataclass(frozen=True)
class _Point:
    """A method in a picture, and how far its bars reach below and above: `[[below], [above]]`, or None."""

    label: str
    x: float
    y: float
    across: list[list[float]] | None
    along: list[list[float]] | None


def _points(rows: Sequence[Row], against: str) -> list[_Point]:
    name, _ = AXES[against]
    points = []
    for row in rows:
        if "kl" in row and name in row:
            x, y = row[name], max(row["kl"], LEAST_KL)
            across = [[x - row["ms_p10"]], [row["ms_p90"] - x]] if name == "ms" else None
            along = None
            if "kl_low" in row:
                along = [[y - max(row["kl_low"], LEAST_KL)], [max(row["kl_high"], LEAST_KL) - y]]
            points.append(_Point(row["method"], x, y, across, along))
    return points


def _figure(identity: dict[str, Any], columns: int = 0, width: float = 7.0, height: float = 4.6) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns or 1, figsize=(width, height), layout="constrained", squeeze=False, sharey=True
    )
    figure.suptitle(f"{identity.get('model', '')}, {identity.get('context')} tokens", fontsize=10)
    return figure, axes[0] if columns else axes[0][0]
