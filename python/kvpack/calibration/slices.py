"""In which coordinates keys and values lose least when some are left out: PCA in the metric of gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .attending import Rows, Span, attending, full_layers, shape
from .head_losses import LooksBack, Make, attended, sampled

DAMPING = 1e-3
"""What is added to a metric, as a share of its largest eigenvalue: directions of which little is known weigh a bit."""


class _Reader(LooksBack):
    """One backward pass a document, of labels that are drawn from the model."""

    def __init__(self, model: Any, span: Span) -> None:
        self.model, self.span = model, span
        self.tokens = 0
        self._anchor = torch.zeros((), requires_grad=True)
        self._generator = torch.Generator().manual_seed(0)

    def read(self, ids: Tensor) -> None:
        """Add a document `[1, n]`."""
        with torch.inference_mode(False), torch.enable_grad(), attending(self.model, self):
            sampled(self.model, ids, self._anchor, self._generator)
        self.tokens += ids.shape[1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, make: Make) -> Tensor | None:
        """The layer's output, at whose gradient the others are called."""
        return attended(self._anchor, query, key, value, make, self, layer)

    def far(self, attention: Rows, rows: slice) -> Tensor:
        """What a query sees beyond sinks and window `[c, m]`."""
        return attention.shown(rows) & ~attention.near(rows, self.span)

    def far_sums(self, attention: Rows, rows: slice) -> Tensor:
        """What it gets of that `[H, G, c, E]`."""
        weights = attention.weights(attention.masked(attention.capped(rows), rows)) * self.far(attention, rows)
        return attention.sums(weights, attention.v[:, : attention.end(rows)])


class Moments(_Reader):
    """Second moments of a KV head's keys, of its far sums of values, and of the gradients that meet them.

    Keys: `C = E[k k^T]` of all tokens and `M = E[g g^T]`, g the gradient of log p(y) by a key, of all that read it.
    Values: `C = E[f f^T]`, f what a query gets of the tokens beyond sinks and window, and `M = E[g g^T]`, g the
    gradient by what it gets, summed over the group's query heads: errors of similar tokens add up, so that what counts
    is their sum. y is drawn from the model's own distribution, as for heads.
    """

    def __init__(self, model: Any, span: Span) -> None:
        super().__init__(model, span)
        self.sums: dict[tuple[int, str], Tensor] = {}
        self.rows: dict[tuple[int, str], int] = {}

    def look(self, layer: int, rows: slice, attention: Rows, out: Tensor, slope: Tensor) -> None:
        """Add some positions: outputs and their gradients, `[H, G, c, E]`."""
        self._add(layer, "C.values", self.far_sums(attention, rows).flatten(1, 2))
        self._add(layer, "M.values", slope.flatten(1, 2))

    def look_at_logits(self, layer: int, rows: slice, attention: Rows, slopes: Tensor) -> None:
        """Nothing is wanted of them."""

    def look_at_keys(self, layer: int, attention: Rows, slopes: Tensor) -> None:
        """Add keys and their gradients."""
        self._add(layer, "C.keys", attention.k)
        self._add(layer, "M.keys", slopes)

    def _add(self, layer: int, name: str, rows: Tensor) -> None:
        moment = (rows.mT @ rows).double()
        self.sums[layer, name] = self.sums.get((layer, name), torch.zeros(())) + moment
        self.rows[layer, name] = self.rows.get((layer, name), 0) + rows.shape[1]

    def means(self, layer: int, side: str) -> tuple[Tensor, Tensor]:
        """C, the mean of a row, and M, the sum over the rows of a token, `[KV heads, D, D]`."""
        spread, metric = (layer, f"C.{side}"), (layer, f"M.{side}")
        return self.sums[spread] / self.rows[spread], self.sums[metric] / self.tokens


class Losses(_Reader):
    """What is lost when the coordinates from r on are left out, for every r: `[KV heads, D]` by layer and side.

    `1/2 mean_i (sum of what the coordinates c >= r add to the change of log p at position i)^2`, the sum over the
    group's query heads too: the same number as for demoted heads, so that what similar tokens, coordinates and query
    heads lose together counts as such.
    """

    def __init__(self, model: Any, span: Span, tables: Mapping[str, Tensor]) -> None:
        super().__init__(model, span)
        self.tables = tables
        self.sums: dict[tuple[int, str], Tensor] = {}

    def look(self, layer: int, rows: slice, attention: Rows, out: Tensor, slope: Tensor) -> None:
        """Add values: what a query gets of far tokens, and its gradient."""
        down, up = (self.tables[f"values.{name}"][layer].to(slope.dtype) for name in ("down", "up"))
        sums = self.far_sums(attention, rows)
        self._add(layer, "values", (slope @ up[:, None]) * (sums @ down.mT[:, None]))

    def look_at_logits(self, layer: int, rows: slice, attention: Rows, slopes: Tensor) -> None:
        """Add keys: what far logits would move by."""
        down, up = (self.tables[f"keys.{name}"][layer].to(slopes.dtype) for name in ("down", "up"))
        far = slopes * self.far(attention, rows)
        stored = attention.k[:, : attention.end(rows)] @ down.mT
        self._add(layer, "keys", (attention.q[:, :, rows] @ up[:, None]) * attention.sums(far, stored))

    def look_at_keys(self, layer: int, attention: Rows, slopes: Tensor) -> None:
        """Nothing is wanted of them."""

    def _add(self, layer: int, side: str, changes: Tensor) -> None:
        """Changes of log p that each coordinate stands for, `[H, G, c, D]`."""
        rest = changes.sum(1).double().flip(-1).cumsum(-1).flip(-1)
        self.sums[layer, side] = self.sums.get((layer, side), torch.zeros(())) + rest.square().sum(1) / 2


def measure_slices(
    model: Any,
    documents: Sequence[Tensor],
    *,
    sinks: int = 4,
    window: int = 128,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Tensor]:
    """Find the coordinates, and what is lost when some are left out; two backward passes a document.

    With `M = S^2` (damped), `S C S = U diag(e) U^T`: `y = U^T S x` has the numbers in the order of what they are worth,
    `x = S^-1 U y`. The leading r of both are the optimum of `E[(x - x')^T M (x - x')]` at rank r (KQ-SVD,
    arXiv 2512.05916, with the gradient in the place of the query). See `Moments` and `Losses`.

    Args:
        model: the transformers model, on the CPU; it is as it was afterwards.
        documents: tokens `[1, n]` each.
        sinks: tokens at the beginning that stay whole.
        window: newest tokens that stay whole.
        progress: called with the tokens of each document that was read, twice.

    Returns:
        `keys.down`, `keys.up`, `values.down`, `values.up` `[layers, KV heads, D, D]`, and `keys.loss`, `values.loss`
        `[layers, KV heads, D]`: what is lost, in nats a token, when the coordinates from r on are left out. float32;
        NaN where a layer has no full attention.

    Raises:
        OptionError: the model's attention cannot be looked at.
    """
    layers = full_layers(model)
    moments = Moments(model, Span(sinks, window))
    for ids in documents:
        moments.read(ids)
        progress(ids.shape[1])
    found: dict[str, list[Tensor]] = {}
    for side in ("keys", "values"):
        for layer in range(shape(model)[0]):
            if layer in layers:
                parts = coordinates(*moments.means(layer, side))[:2]
            else:
                like = next(x for (_, name), x in moments.sums.items() if name == f"C.{side}")
                parts = (torch.full_like(like, torch.nan),) * 2
            for name, part in zip(("down", "up"), parts, strict=True):
                found.setdefault(f"{side}.{name}", []).append(part.float())
    tables = {name: torch.stack(parts) for name, parts in found.items()}
    losses = Losses(model, Span(sinks, window), tables)
    for ids in documents:
        losses.read(ids)
        progress(ids.shape[1])
    for side in ("keys", "values"):
        nothing = torch.full(tables[f"{side}.down"].shape[1:3], torch.nan)
        rows = [losses.sums.get((i, side), nothing) / losses.tokens for i in range(len(tables[f"{side}.down"]))]
        tables[f"{side}.loss"] = torch.stack([row.float() for row in rows])
    return tables


def coordinates(spread: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `U^T S`, `S^-1 U` and e, largest first, of moments C and M `[..., D, D]`."""
    weights, vectors = torch.linalg.eigh(metric)
    weights = weights.clamp(min=0) + DAMPING * weights[..., -1:].clamp(min=1e-30)
    root = (vectors * weights.sqrt()[..., None, :]) @ vectors.mT
    inverse = (vectors / weights.sqrt()[..., None, :]) @ vectors.mT
    energy, basis = torch.linalg.eigh(root @ spread @ root)
    energy, basis = energy.flip(-1).clamp(min=0), basis.flip(-1)
    return basis.mT @ root, inverse @ basis, energy
