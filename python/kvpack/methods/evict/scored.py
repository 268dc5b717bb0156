"""Scores that are computed by a function of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import _kvpack
from ...errors import OptionError, ShapeError
from ..base import Amount, Property, Reasons, Site, amount, check_whole
from ..registry import register
from .base import Evict


@register
@dataclass(frozen=True, repr=False)
class Scored(Evict):
    """What a function of yours scores highest stays: `Scored(fn, budget=0.25)`.

    `fn(keys, values, queries, positions)` is called when tokens are chosen, once for each layer and each sequence of
    the batch, and returns a score a token `[H, n]`, for the `H` KV heads of the layer:

    - `keys` `[H, n, Dk]` and `values` `[H, n, Dv]`: float32, as they are attended to, after RoPE; of packed tokens what
      the codes stand for; no pads;
    - `queries` `[queries, Hq, Dk]`: those of the newest tokens, oldest first, scaled; KV head `h` is read by query
      heads `h G` to `(h + 1) G - 1`. None where `queries=0`;
    - `positions` `[H, n]`: int64, pads counted.

    A function with a parameter `layer` is given the layer's number by that name. Where heads hold different numbers of
    tokens (after `AdaKV`), it is called for one head at a time, `H = 1`. What it raises comes through as it is, and the
    cache is what it was before the forward. It must not use the cache that calls it.

    Attributes:
        function: see above.
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        recent: the newest tokens, which stay: so many, or a share of the budget.
        queries: newest tokens whose queries are wanted; they are only seen with `attn_implementation="kvpack"`.
    """

    name: ClassVar[str] = "scored"
    standard: ClassVar[tuple[str, ...]] = ()

    function: Callable[..., Tensor]
    budget: Amount | Sequence[Amount] = 0.5
    recent: Amount = 0
    queries: int = 0

    def _check(self) -> None:
        if not callable(self.function):
            raise OptionError(
                f"function={self.function!r} is not accepted; accepted: fn(keys, values, queries, positions)"
            )
        amount("recent", self.recent, "a whole number of tokens, or a share of the budget from 0 to 1.0")
        check_whole(self, queries=0)

    def __repr__(self) -> str:
        given = ((own.name, getattr(self, own.name), own.default) for own in fields(self) if own.name != "function")
        options = (f", {name}={value!r}" for name, value, default in given if name == "budget" or value != default)
        return f"Scored({getattr(self.function, '__name__', 'function')}{''.join(options)})"

    @property
    def needs(self) -> Reasons:
        """The function looks at keys, and perhaps at queries."""
        needs = {Property.RAW_KEYS: "it looks at keys"}
        return {**needs, Property.QUERIES_SEEN: "it looks at queries"} if self.queries else needs

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        common = self._common(site, floor, self.budget, self.recent)
        call = _Call(self.function, None if site is None else site.layer)
        return _kvpack.Eviction.scored(call, queries=self.queries, **common)


class _Call:
    """The function as Rust calls it: arrays of NumPy, which it shares, in place of tensors."""

    def __init__(self, function: Callable[..., Tensor], layer: int | None) -> None:
        self.function = function
        self.options = {"layer": layer} if _takes_layer(function) else {}

    def __call__(
        self,
        keys: NDArray[np.float32],
        values: NDArray[np.float32],
        queries: NDArray[np.float32] | None,
        positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        with torch.no_grad():
            scores = self.function(
                torch.from_numpy(keys),
                torch.from_numpy(values),
                None if queries is None else torch.from_numpy(queries),
                torch.from_numpy(positions),
                **self.options,
            )
        expected = positions.shape
        if not isinstance(scores, Tensor) or tuple(scores.shape) != expected:
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ShapeError(f"scores: the function returned {given}, expected a tensor {tuple(expected)}")
        if bool(scores.isnan().any()):
            raise OptionError("scores: the function returned NaN, accepted: numbers, the highest stay")
        found: NDArray[np.float32] = scores.detach().to("cpu", torch.float32).numpy()
        return found


def _takes_layer(function: Callable[..., Any]) -> bool:
    try:
        return "layer" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C
        return False
