"""The demo's picture: four panels, one row a cache in each."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from demo_measure import FULL, Spread
from demo_report import Report, megabytes
from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart under every common form of colour blindness.
GREY, BLUE, ORANGE, GREEN, SKY, PINK, YELLOW = (
    "#7f7f7f",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#56B4E9",
    "#CC79A7",
    "#F0E442",
)
PARTS = {
    "codes": (BLUE, "codes"),
    "scales": (SKY, "scales and zero-points"),
    "exact": (GREEN, "exact tokens (sinks, window)"),
    "pending": (PINK, "pending"),
    "index": (YELLOW, "index"),
    "other layers": (ORANGE, "other layers"),
}
# Below this, a KL of float32 logits is rounding noise.
KL_FLOOR = 1e-10


def draw(report: Report, path: Path) -> None:
    """Draw bytes held, time a token, KL divergence and the parts of the memory; write a PNG to `path`."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
    with plt.rc_context(style | {"axes.titleweight": "bold", "axes.titlelocation": "left"}):
        figure, axes = plt.subplots(2, 2, figsize=(12.5, 7.2), layout="constrained")
        _bytes_held(axes[0, 0], report)
        _time_per_token(axes[0, 1], report)
        _divergence(axes[1, 0], report)
        _parts(axes[1, 1], report)
        where = report.surroundings
        figure.suptitle(
            f"{report.model}: {report.forced.prompt_tokens} tokens of prompt, {report.forced.steps} decoded",
            fontsize=14,
            fontweight="bold",
        )
        figure.supxlabel(
            f"{where['cpu']}, {where['threads']} threads, {where['kvpack']['isa']}, float32; kvpack "
            f"{where['kvpack']['version']}, torch {where['torch']}, transformers {where['transformers']}",
            fontsize=8.5,
            color="0.35",
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _rows(axes: Axes, names: list[str]) -> range:
    """Set up one row a cache, the first on top, and return the rows' places."""
    axes.set_yticks(range(len(names)), [name.removeprefix("kvpack ") for name in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    return range(len(names))


def _colours(names: list[str]) -> list[str]:
    return [GREY if name == FULL else BLUE for name in names]


def _compared(ratio: float, better: str, worse: str) -> str:
    """Return how a packed cache compares with DynamicCache, in words."""
    if abs(ratio - 1) < 0.005:
        return "the same"
    return f"{ratio:.2f}x {better}" if ratio >= 1 else f"{1 / ratio:.2f}x {worse}"


def _label(axes: Axes, x: float, row: int, text: str) -> None:
    """Write `text` right of `x`, readable where it meets the reference line."""
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.annotate(text, (x, row), xytext=(5, 0), textcoords="offset points", va="center", bbox=white)


def _reference(axes: Axes, x: float, text: str) -> None:
    """Draw a vertical line at `x`, named in the strip below the bars."""
    axes.axvline(x, color=ORANGE, linestyle="--", linewidth=1.3, zorder=2)
    axes.annotate(text, (x, 4.85), xytext=(5, 0), textcoords="offset points", va="center", color=ORANGE)
    axes.set_ylim(5.2, -0.6)


def _bytes_held(axes: Axes, report: Report) -> None:
    results = report.results
    names = [result.name for result in results]
    sizes = [result.bytes_held / 1e6 for result in results]
    rows = _rows(axes, names)
    axes.barh(rows, sizes, color=_colours(names), height=0.65)
    for row, result, size in zip(rows, results, sizes, strict=True):
        label = megabytes(result.bytes_held)
        if result.name != FULL:
            ratio = report.forced.results[FULL].bytes_held / result.bytes_held
            label += f"  ({_compared(ratio, 'smaller', 'larger')})"
        _label(axes, size, row, label)
    _reference(axes, report.fp16_bytes / 1e6, f"as float16: {megabytes(report.fp16_bytes)}")
    axes.set(xlim=(0, 1.5 * max(sizes)), xlabel="MB", title="Bytes held (lower is better)")


def _time_per_token(axes: Axes, report: Report) -> None:
    names = [result.name for result in report.results]
    spreads = [Spread.of(result.step_ms) for result in report.results]
    rows = _rows(axes, names)
    medians = [spread.median for spread in spreads]
    reach = [[s.median - s.p10 for s in spreads], [s.p90 - s.median for s in spreads]]
    axes.barh(rows, medians, color=_colours(names), height=0.65)
    axes.errorbar(medians, list(rows), xerr=reach, fmt="none", ecolor="0.15", capsize=3, linewidth=1.2)
    farthest = max(spread.p90 for spread in spreads)
    for row, result, spread in zip(rows, report.results, spreads, strict=True):
        label = f"{spread.median:.1f} ms"
        if result.name != FULL:
            label += f"  ({_compared(report.speedup(result).median, 'faster', 'slower')})"
        _label(axes, spread.p90, row, label)
    empty = Spread.of(report.forced.empty_ms).median
    _reference(axes, empty, f"empty DynamicCache: {empty:.1f} ms")
    axes.set(xlim=(0, 1.5 * farthest), title="Time per decoded token (lower is better)")
    axes.set_xlabel("ms: median, with 10th and 90th percentile")
    if report.disturbed:
        axes.set_title("Time per decoded token: NOT FAIR, machine was busy", color=ORANGE)


def _divergence(axes: Axes, report: Report) -> None:
    results = [result for result in report.results if result.name != FULL]
    rows = _rows(axes, [result.name for result in results])
    for row, result in zip(rows, results, strict=True):
        mean = fmean(result.kl)
        steps = [max(kl, KL_FLOOR) for kl in result.kl]
        axes.scatter(steps, [row] * len(steps), s=14, color=SKY, alpha=0.55, linewidths=0, zorder=2)
        axes.scatter([max(mean, KL_FLOOR)], [row], s=70, color=BLUE, marker="D", zorder=3)
        label = f"mean {mean:.1e}" if mean >= KL_FLOOR else "equal up to rounding"
        place = {"xytext": (0, 9), "ha": "center"} if mean >= KL_FLOOR else {"xytext": (9, 0), "va": "center"}
        axes.annotate(label, (max(mean, KL_FLOOR), row), textcoords="offset points", **place)
    axes.set_xscale("log")
    highest = max([kl for result in results for kl in result.kl] + [1e-2])
    axes.set(xlim=(KL_FLOOR / 8, 8 * highest), ylim=(len(results) - 0.5, -0.7))
    axes.set_xlabel(f"nats; a dot a step ({report.forced.steps}), the diamond is their mean")
    axes.set_title("Next-token KL to the full cache (lower is better)")


def _parts(axes: Axes, report: Report) -> None:
    results = [result for result in report.results if result.name != FULL]
    rows = _rows(axes, [result.name for result in results])
    left = [0.0] * len(results)
    for part, (colour, label) in PARTS.items():
        shares = [100 * result.parts.get(part, 0) / sum(result.parts.values()) for result in results]
        if max(shares) < 0.5:  # too thin to be seen
            continue
        axes.barh(rows, shares, left=left, color=colour, height=0.65, label=label, edgecolor="white", linewidth=0.6)
        for row, share, start in zip(rows, shares, left, strict=True):
            if share >= 6:
                dark = colour in (BLUE, ORANGE, GREEN)
                middle = start + share / 2
                axes.text(middle, row, f"{share:.0f}%", ha="center", va="center", color="white" if dark else "black")
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set(xlim=(0, 100), xlabel="% of the bytes held", title="What the packed bytes are")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9)
