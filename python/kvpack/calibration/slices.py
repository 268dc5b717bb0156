"""In which coordinates keys and values lose least when some are left out: PCA in the metric of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .attending import Rows, Span, attending, full_layers, shape
from .head_losses import Make, attended, sampled

DAMPING = 1e-3
"""What is added to a metric, as a share of its largest eigenvalue: directions of which little is known weigh a bit."""


class Moments:
    """Second moments of a KV head's keys, of its far sums of values, and of the gradients that meet them.

    Keys: `C = E[k k^T]` of all tokens and `M = E[g g^T]`, g the gradient of log p(y) by a key, of all that read it.
    Values: `C = E[f f^T]`, f what a query gets of the tokens beyond sinks and window, and `M = E[g g^T]`, g the
    gradient by what it gets, summed over the group's query heads: errors of similar tokens add up, so that what counts
    is their sum. y is drawn from the model's own distribution, as for heads.
    """

    looks_at_keys = True

    def __init__(self, model: Any, span: Span) -> None:
        self.model, self.span = model, span
        self.sums: dict[tuple[int, str], Tensor] = {}
        self.rows: dict[tuple[int, str], int] = {}
        self.tokens = 0
        self._anchor = torch.zeros((), requires_grad=True)
        self._generator = torch.Generator().manual_seed(0)

    def read(self, ids: Tensor) -> None:
        """Add a document `[1, n]`."""
        with torch.inference_mode(False), torch.enable_grad(), attending(self.model, self):
            sampled(self.model, ids, self._anchor, self._generator)
        self.tokens += ids.shape[1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, make: Make) -> Tensor | None:
        """The layer's output, at whose gradient `look` and `look_back` are called."""
        return attended(self._anchor, query, key, value, make, self, layer)

    def look(self, layer: int, rows: slice, attention: Rows, out: Tensor, slope: Tensor) -> None:
        """Add some positions: outputs and their gradients, `[H, G, c, E]`."""
        far = attention.shown(rows) & ~attention.near(rows, self.span)
        weights = attention.weights(attention.masked(attention.capped(rows), rows)) * far
        sums = attention.sums(weights, attention.v[:, : attention.end(rows)])
        self._add(layer, "C.values", sums.flatten(1, 2))
        self._add(layer, "M.values", slope.flatten(1, 2))

    def look_back(self, layer: int, attention: Rows, dk: Tensor) -> None:
        """Add all positions: keys and their gradients, `[H, n, D]`."""
        self._add(layer, "C.keys", attention.k)
        self._add(layer, "M.keys", dk)

    def _add(self, layer: int, name: str, rows: Tensor) -> None:
        moment = (rows.mT @ rows).double()
        self.sums[layer, name] = self.sums.get((layer, name), torch.zeros(())) + moment
        self.rows[layer, name] = self.rows.get((layer, name), 0) + rows.shape[1]

    def means(self, layer: int, side: str) -> tuple[Tensor, Tensor]:
        """C, the mean of a row, and M, the sum over the rows of a token, `[KV heads, D, D]`."""
        spread, metric = (layer, f"C.{side}"), (layer, f"M.{side}")
        return self.sums[spread] / self.rows[spread], self.sums[metric] / self.tokens


def measure_slices(
    model: Any,
    documents: Sequence[Tensor],
    *,
    sinks: int = 4,
    window: int = 128,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Tensor]:
    """Find the coordinates, and what each is worth.

    With `M = S^2` (damped), `S C S = U diag(e) U^T`: `y = U^T S x` has the numbers in the order of what they are worth,
    `x = S^-1 U y`, and leaving the last ones out costs half the sum of their e, KL in nats a token, as far as errors of
    different tokens, heads and sides are independent. Kept are the leading r of both: the optimum of `E[(x - x')^T M
    (x - x')]` at rank r (KQ-SVD, arXiv 2512.05916, with the gradient in the place of the query).

    Args:
        model: the transformers model, on the CPU; it is as it was afterwards.
        documents: tokens `[1, n]` each.
        sinks: tokens at the beginning that stay whole.
        window: newest tokens that stay whole.
        progress: called with the tokens of each document that was read.

    Returns:
        `keys.down`, `keys.up`, `values.down`, `values.up` `[layers, KV heads, D, D]` and `keys.energy`, `values.energy`
        `[layers, KV heads, D]`, float32; NaN where a layer has no full attention.

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
                parts = coordinates(*moments.means(layer, side))
            else:
                like = next(x for (_, name), x in moments.sums.items() if name == f"C.{side}")
                parts = (torch.full_like(like, torch.nan),) * 2 + (torch.full_like(like[..., 0], torch.nan),)
            for name, part in zip(("down", "up", "energy"), parts, strict=True):
                found.setdefault(f"{side}.{name}", []).append(part.float())
    return {name: torch.stack(parts) for name, parts in found.items()}


def coordinates(spread: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `U^T S`, `S^-1 U` and e, largest first, of moments C and M `[..., D, D]`."""
    weights, vectors = torch.linalg.eigh(metric)
    weights = weights.clamp(min=0) + DAMPING * weights[..., -1:].clamp(min=1e-30)
    root = (vectors * weights.sqrt()[..., None, :]) @ vectors.mT
    inverse = (vectors / weights.sqrt()[..., None, :]) @ vectors.mT
    energy, basis = torch.linalg.eigh(root @ spread @ root)
    energy, basis = energy.flip(-1).clamp(min=0), basis.flip(-1)
    return basis.mT @ root, inverse @ basis, energy
