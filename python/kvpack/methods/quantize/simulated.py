"""A codec that is a function of the user's: what it would lose, before it has kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import _kvpack
from ...errors import NonFiniteError, OptionError, ShapeError
from ..base import Site, check_whole
from ..registry import register
from .base import Quantize


@register
@dataclass(frozen=True, repr=False)
class Simulated(Quantize):
    """Keys and values as functions of yours would give them back: `Simulated(keys=fn, values=fn)`.

    A function gets `group` consecutive tokens of one KV head, float32 `[group, D]`, keys after RoPE, and returns what
    would be read in their place, of the same shape. That is held in the model's dtype: it shows what a codec would
    lose, and saves no memory. What a function raises comes through as it is, and the cache is what it was before the
    forward. It must not use the cache that calls it.

    Attributes:
        keys: what keys become; None: they stay exact.
        values: what values become; None: they stay exact.
        group: tokens that a function gets at once.
        window: newest tokens that stay exact.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
    """

    name: ClassVar[str] = "simulated"
    standard: ClassVar[tuple[str, ...]] = ()

    keys: Callable[[Tensor], Tensor] | None = None
    values: Callable[[Tensor], Tensor] | None = None
    group: int = 32
    window: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        check_whole(self, group=1, window=0, sinks=0)
        for side in ("keys", "values"):
            given = getattr(self, side)
            if given is not None and not callable(given):
                raise OptionError(f"{side}={given!r} is not accepted; accepted: None, a function of tokens [group, D]")

    def __repr__(self) -> str:
        names = {side: getattr(getattr(self, side), "__name__", "function") for side in ("keys", "values")}
        given = [f"{side}={name}" for side, name in names.items() if getattr(self, side) is not None]
        return f"Simulated({', '.join([*given, f'group={self.group}', f'window={self.window}'])})"

    def keys_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """What the function of keys gives."""
        return self._codec(self.keys)

    def values_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """What the function of values gives."""
        return self._codec(self.values)

    def _codec(self, function: Callable[[Tensor], Tensor] | None) -> _kvpack.Codec:
        if function is None:
            return _kvpack.Codec("exact")
        return _kvpack.Codec.simulated(_Call(function), group=self.group, window=self.window, sinks=self.sinks)


class _Call:
    """The function as Rust calls it: arrays of NumPy, which it shares, in place of tensors."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self.function = function

    def __call__(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        given = tuple(tokens.shape)
        with torch.no_grad():
            read = self.function(torch.from_numpy(tokens))
        if not isinstance(read, Tensor) or tuple(read.shape) != given:
            what = tuple(read.shape) if isinstance(read, Tensor) else type(read).__name__
            raise ShapeError(f"tokens: the function returned {what}, expected a tensor {given}")
        if not bool(read.isfinite().all()):
            raise NonFiniteError("tokens: the function returned NaN or infinity, only finite numbers are accepted")
        found: NDArray[np.float32] = read.detach().to("cpu", torch.float32).numpy()
        return found
