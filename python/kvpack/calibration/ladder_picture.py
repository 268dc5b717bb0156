"""A picture of a ladder of KV heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import OptionError
from ..methods.prune.ladder import RUNGS, Ladder, predicted
from .demoting import check_ladder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = dict(zip(RUNGS, ("#1f4e79", "#9ecae1", "#fdae6b", "#eeeeee"), strict=True))


def draw(losses: Mapping[str, Tensor], ladder: Ladder, *, by: str = "fisher") -> Figure:
    """Draw which KV heads are demoted, and what it is predicted to cost.

    On the left the ladder: layers by KV heads, a colour a rung. On the right, for each rung that was measured, the sum
    of losses over the share of the heads that are demoted to it, lowest loss first; a dot is the ladder.

    Args:
        losses: what `measure` returned.
        ladder: what `plan` returned.
        by: the ranking, `fisher` or `measured`.

    Returns:
        A figure of matplotlib's.

    Raises:
        OptionError: a rung is unknown or was not measured, or the ladder is of another shape.
    """
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    check_ladder(ladder)
    measured = {rung: losses[f"{by}.{rung}"] for rung in RUNGS[1:] if f"{by}.{rung}" in losses}
    if not measured:
        raise OptionError(f"losses: given {', '.join(sorted(losses)) or 'none'}, expected some of {by!r}")
    shape = next(iter(measured.values())).shape
    if (len(ladder), *{len(rungs) for rungs in ladder}) != tuple(shape):
        raise OptionError(f"ladder: given another shape than that of the losses, expected {tuple(shape)}")
    total = predicted(losses, ladder, by)
    figure: Figure = pyplot.figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    cells = torch.tensor([[RUNGS.index(rung) for rung in rungs] for rungs in ladder])
    colours = ListedColormap(list(_COLOURS.values()))
    left.imshow(cells.numpy(), aspect="auto", cmap=colours, vmin=0, vmax=len(RUNGS) - 1, interpolation="nearest")
    left.set(xlabel="KV head", ylabel="layer", xticks=range(shape[1]) if shape[1] <= 16 else [])
    shown = [rung for rung in RUNGS if any(rung in rungs for rungs in ladder)]
    left.legend(handles=[Patch(facecolor=_COLOURS[rung], label=rung, edgecolor="grey") for rung in shown], fontsize=8)
    for rung, values in measured.items():
        ordered = values[~values.isnan()].double().sort().values
        colour = "grey" if rung == "gone" else _COLOURS[rung]
        shares = torch.arange(1, len(ordered) + 1) / max(len(ordered), 1)
        right.plot(shares, ordered.cumsum(0), label=f"all {rung}", color=colour)
    known = int((~next(iter(measured.values())).isnan()).sum())
    down = sum(rung != "full" for rungs in ladder for rung in rungs)
    right.plot([down / max(known, 1)], [total], "o", color="black", label=f"this ladder: {down} of {known} heads")
    right.set(xlabel="share of the KV heads demoted", ylabel="sum of losses, nats a token", yscale="log")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    return figure
