"""Pictures of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import PackedCache
from .errors import OptionError, ShapeError
from .layer import PackedLayer
from .methods import Heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 110  # characters of a line of text
_LINES = 60


def kept(
    cache: PackedCache,
    tokenizer: Any,
    ids: Tensor | Sequence[int],
    *,
    row: int = 0,
    span: tuple[int, int] | None = None,
) -> Figure:
    """Draws what each layer kept of a text.

    Above, a line for each packed layer shows which tokens its KV heads hold, darker where more of them do. Below, the
    text itself: the darker a token's ground, the more heads of all layers hold it.

    Args:
        cache: after the text was read.
        tokenizer: what made the ids.
        ids: `[tokens]` or `[batch, tokens]`, the text's ids from position 0 on, pads included: those of the prompt, or
            what `generate` returned. As many positions are drawn as there are ids that the cache has seen.
        row: the sequence of the batch.
        span: positions `(first, end)` whose text is written out; without it as many of the newest as there is room for.

    Returns:
        A figure of matplotlib's; a notebook shows it, `figure.savefig("kept.png")` writes it.

    Raises:
        ShapeError: there are no ids, or no such sequence.
        OptionError: no layer is packed, or the span is not within the text.
    """
    from matplotlib import pyplot  # only pictures need it; with it a notebook shows them

    own = torch.as_tensor(ids)
    own = own if own.dim() == 1 else own[row]
    shares = kept_shares(cache, row)
    seen = min(shares.shape[1], len(own))
    if not seen:
        raise ShapeError(f"ids: given none, expected up to {shares.shape[1]}, the positions that the cache has seen")
    shares = shares[:, :seen]
    first, end = span or (0, seen)
    if not 0 <= first < end <= seen:
        raise OptionError(f"span={span!r} is not accepted; accepted: (first, end) with 0 <= first < end <= {seen}")
    pieces = [tokenizer.decode([i]).replace("\n", "⏎") for i in own[:seen].tolist()]
    lines = _lines(pieces, first, end)[-_LINES:]
    figure: Figure = pyplot.figure(figsize=(13, 3.2 + 0.2 * len(lines)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, max(0.2 * len(lines), 0.5)])
    above.imshow(shares.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    above.set(xlabel="position", ylabel="packed layer", title=_title(cache, shares))
    _write(below, lines, pieces, shares.mean(0))
    return figure


def heads(method: Heads) -> Figure:
    """Draws which KV heads a ladder demotes, and what that is predicted to cost.

    On the left layers by KV heads, a colour a rung. On the right, for each rung that was measured, the sum of losses
    over the share of the heads that are demoted to it, lowest loss first; a dot is the ladder.

    Args:
        method: a ladder that was made from a calibration.

    Returns:
        A figure of matplotlib's; a notebook shows it, `figure.savefig("heads.png")` writes it.

    Raises:
        OptionError: it has no calibration.
    """
    from .calibration.ladder_picture import draw

    losses, ladder = method.table()
    return draw(losses, ladder, by=method.by if method.by == "measured" else "fisher")


def kept_shares(cache: PackedCache, row: int = 0) -> Tensor:
    """Share of a layer's KV heads that hold each position `[packed layers, positions seen]`.

    Raises:
        OptionError: no layer is packed, or none has seen a token.
        ShapeError: there is no such sequence.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer) and layer.get_seq_length()]
    if not layers:
        raise OptionError("cache: given one that holds no packed tokens, expected one that has read a text")
    shares = torch.zeros(len(layers), layers[0].get_seq_length())
    for share, layer in zip(shares, layers, strict=True):
        for head in range(layer.kv_heads or 1):
            share[layer.positions(row, head)] += 1 / layer.kv_heads
    return shares


def _title(cache: PackedCache, shares: Tensor) -> str:
    return f"{cache.evict or 'all tokens'}: {shares.mean():.0%} of {shares.shape[1]} tokens are held"


def _lines(pieces: list[str], first: int, end: int) -> list[range]:
    """Positions, line by line."""
    lines, start, width = [], first, 0
    for position in range(first, end):
        if width + len(pieces[position]) > _COLUMNS and position > start:
            lines.append(range(start, position))
            start, width = position, 0
        width += len(pieces[position])
    return [*lines, range(start, end)]


def _write(axes: Any, lines: list[range], pieces: list[str], shares: Tensor) -> None:
    """The text, each token on a ground as dark as its share; in a box per token, so that every letter has its place."""
    axes.set(xlim=(0, _COLUMNS), ylim=(len(lines), 0))
    axes.axis("off")
    for y, line in enumerate(lines):
        x = 0
        for position in line:
            share, piece = float(shares[position]), pieces[position]
            ground = (1 - 0.8 * share, 1 - 0.55 * share, 1 - 0.25 * share)
            axes.add_patch(_box(x, y, len(piece), ground))
            for i, letter in enumerate(piece):
                axes.text(x + i + 0.5, y + 0.5, letter, ha="center", va="center", family="monospace", fontsize=7)
            x += len(piece)


def _box(x: int, y: int, width: int, colour: tuple[float, float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, 1, facecolor=colour, linewidth=0)
