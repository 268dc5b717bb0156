"""The report's pictures: one layer beside its roofline, and the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .attention import PACKED, REFERENCE
from .results import Part, Results, Rows
from .targets import heads, length

# Okabe and Ito's palette: told apart under every common form of colour blindness. kvpack has the colours, all others
# are grey or black; the markers tell them apart once more.
BLACK, GREY, LIGHT = "#000000", "#777777", "#a8a8a8"
BLUE, SKY, GREEN, VERMILION, PINK, ORANGE = "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00"
# The title and the legend need so many inches.
LEAST_WIDTH = 13
SMALL_PRINT = FontProperties(size=8.5)
RC = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Style:
    """How an engine is drawn."""

    colour: str
    marker: str
    line: str = "-"

    def line_of(self, label: str) -> dict[str, object]:
        """Return what `plot` takes."""
        strong = self.colour not in (BLACK, GREY, LIGHT)
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.line,
            "linewidth": 1.8 if strong else 1.3,
            "markersize": 5.5 if strong else 4.5,
            "zorder": 3 if strong else 2,
            "label": label,
        }


LAYER_STYLES = {
    REFERENCE: Style(BLACK, "o"),
    "torch SDPA bfloat16": Style(GREY, "o"),
    "DynamicCache float32": Style(BLACK, "x", "--"),
    "DynamicCache bfloat16": Style(GREY, "x", "--"),
    "Exact float32": Style(BLUE, "s"),
    "Exact bfloat16": Style(SKY, "s"),
    "KIVI-8": Style(GREEN, "D"),
    "KIVI-4": Style(VERMILION, "D"),
    "KIVI-3": Style(PINK, "^"),
    "KIVI-2": Style(ORANGE, "v"),
}
MODEL_STYLES = {
    "DynamicCache": Style(BLACK, "o"),
    "HF hqq-4": Style(GREY, "P", "--"),
    "HF quanto-4": Style(LIGHT, "X", "--"),
    "Exact": Style(BLUE, "s"),
    "KIVI-4": Style(VERMILION, "D"),
    "KIVI-2": Style(ORANGE, "v"),
}
PEER_STYLES = {
    "DynamicCache float32": Style(BLACK, "o"),
    "Exact float32": Style(BLUE, "s"),
    "KIVI-4 float32": Style(VERMILION, "D"),
    "DynamicCache bfloat16": Style(BLACK, "o", "--"),
    "Exact bfloat16": Style(BLUE, "s", "--"),
    "KIVI-4 bfloat16": Style(VERMILION, "D", "--"),
    "llama.cpp f16, no flash": Style(GREEN, "^"),
    "llama.cpp f16, flash": Style(GREEN, "v", "--"),
    "llama.cpp q8_0, flash": Style(GREEN, "<", ":"),
    "llama.cpp q4_0, flash": Style(GREEN, ">", "-."),
    "OpenVINO f16": Style(PINK, "P"),
    "OpenVINO u8": Style(PINK, "X", "--"),
    "OpenVINO u4": Style(PINK, "*", ":"),
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what was measured into `folder`; return the pictures' paths."""
    written = []
    with plt.rc_context(RC):
        if "attention" in results.parts:
            written.append(_save(_attention(results.parts["attention"]), folder / "attention.png"))
        if results.rows("model") or results.rows("peers"):
            written.append(_save(_model(results), folder / "model.png"))
    return written


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _attention(part: Part) -> Figure:
    rows = part.rows
    shapes, threads = rows.distinct("shape"), sorted(rows.distinct("threads"))
    figure, grid = plt.subplots(
        len(threads),
        len(shapes),
        figsize=(max(3.7 * len(shapes) + 1, LEAST_WIDTH), 4.2 * len(threads) + 1.6),
        sharex=True,
        sharey="col",
        squeeze=False,
        layout="constrained",
    )
    for (row, count), (column, shape) in product(enumerate(threads), enumerate(shapes)):
        axes = grid[row, column]
        _layer_panel(axes, rows.where(shape=shape, threads=count))
        axes.set_title(f"{heads(shape)}, {_threads(count)}")
        if row == len(threads) - 1:
            axes.set_xlabel("tokens cached")
        if column == 0:
            axes.set_ylabel("ns per cached token, one layer")
    roofline = Line2D([], [], color="0.25", linestyle=":", linewidth=1.4, label="roofline: bytes / read bandwidth")
    drawn = [Line2D([], [], **LAYER_STYLES[name].line_of(name)) for name in LAYER_STYLES if rows.one(engine=name)]
    title = "Decode attention of one layer, by query heads / KV heads / head_dim (lower is better)"
    figure.suptitle(title, fontsize=14, fontweight="bold")
    figure.legend(
        handles=[*drawn, roofline],
        loc="outside lower center",
        ncols=6,
        frameon=False,
        handlelength=3.2,
        title=_surroundings(part),
        title_fontproperties=SMALL_PRINT,
    )
    return figure


def _layer_panel(axes: Axes, cells: Rows) -> None:
    for engine, style in LAYER_STYLES.items():
        of_engine = sorted(cells.where(engine=engine), key=lambda row: row["tokens"])
        # The smaller contexts are those that only some engines were measured at.
        of_engine = [row for row in of_engine if cells.one(engine=REFERENCE, tokens=row["tokens"])]
        tokens = [row["tokens"] for row in of_engine]
        axes.plot(tokens, [row["ns"]["median"] / row["tokens"] for row in of_engine], **style.line_of(engine))
        if engine in PACKED:
            floor = [row["layer_bytes"] / row["bandwidth"]["median"] / row["tokens"] for row in of_engine]
            axes.plot(tokens, floor, color=style.colour, linestyle=":", linewidth=1.4, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _contexts(axes, cells.where(engine=REFERENCE).distinct("tokens"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _model(results: Results) -> Figure:
    model, peers = results.rows("model"), results.rows("peers")
    threads = sorted({*model.distinct("threads"), *peers.distinct("threads")})
    columns = [(f"{dtype} model", model.where(dtype=dtype), MODEL_STYLES) for dtype in model.distinct("dtype")]
    if peers:
        columns.append(("beside other runtimes", peers, PEER_STYLES))
    figure, grid = plt.subplots(
        len(threads),
        len(columns),
        figsize=(max(5.0 * len(columns) + 0.6, 8), 3.7 * len(threads) + 2.2),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (row, count), (column, (title, rows, styles)) in product(enumerate(threads), enumerate(columns)):
        axes = grid[row, column]
        _model_panel(axes, rows.where(threads=count).measured(), styles)
        axes.set_title(f"{title}, {_threads(count)}")
        if row == len(threads) - 1:
            axes.set_xlabel("tokens cached")
            axes.legend(
                frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(-0.03, -0.15), ncols=2, handlelength=3.2
            )
        if column == 0:
            axes.set_ylabel("ms per token, whole model")
    part = results.parts.get("model") or results.parts["peers"]
    figure.suptitle("SmolLM2-135M, time per decoded token (lower is better)", fontsize=14, fontweight="bold")
    figure.supxlabel(_surroundings(part), fontproperties=SMALL_PRINT)
    return figure


def _model_panel(axes: Axes, cells: Rows, styles: dict[str, Style]) -> None:
    for engine, style in styles.items():
        of_engine = sorted(cells.where(engine=engine), key=lambda row: row["context"])
        if of_engine:
            milliseconds = [row["ms"]["median"] for row in of_engine]
            axes.plot([row["context"] for row in of_engine], milliseconds, **style.line_of(engine))
    _contexts(axes, cells.distinct("context"))
    axes.set_ylim(bottom=0)


def _contexts(axes: Axes, tokens: Iterable[int]) -> None:
    places: Sequence[int] = sorted(tokens)
    axes.set_xticks(places, [length(place) for place in places])
    axes.xaxis.set_minor_locator(NullLocator())


def _surroundings(part: Part) -> str:
    where = part.environment
    return (
        f"{where['cpu']}, {where['kvpack']['isa']}; kvpack {where['kvpack']['version']}, torch {where['torch']}, "
        f"transformers {where['transformers']}" + ("; QUICK RUN" if where["quick"] else "")
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
