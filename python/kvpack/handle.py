"""Handles: the keys and values that `update` returns once a cache holds more than it was just given.

A handle is a tensor without memory. kvpack's attention function recognises it and reads the packed form; any other
operation materialises it first, so that a PackedCache is right with every model and attention implementation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .errors import StaleHandleError

if TYPE_CHECKING:
    from .layer import PackedLayer

_CPU = torch.device("cpu")


class LazyKV(Tensor):
    """All keys, or all values, that a layer holds: `[batch, KV heads, positions seen, head_dim]`."""

    _layer: PackedLayer
    _which: Literal["keys", "values"]
    _made_at: int
    _full: Tensor | None = None

    @staticmethod
    def __new__(
        cls, layer: PackedLayer, which: Literal["keys", "values"], shape: tuple[int, ...], dtype: torch.dtype
    ) -> LazyKV:
        """A handle on what `layer` holds now."""
        handle: LazyKV = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=_CPU)
        handle._layer, handle._which, handle._made_at = layer, which, layer.version
        return handle

    @property
    def packed_layer(self) -> PackedLayer:
        """The layer behind this handle.

        Raises:
            StaleHandleError: the layer has changed since the handle was made.
        """
        if self._made_at != self._layer.version:
            raise StaleHandleError(
                f"these {self._which} were returned by an earlier update (given version {self._made_at}, expected "
                f"{self._layer.version}): the cache has changed since, use what the last update returned"
            )
        return self._layer

    def materialize(self) -> Tensor:
        """The numbers, dequantised, in a tensor of their own.

        Raises:
            StaleHandleError: the layer has changed since the handle was made.
        """
        if self._full is None:
            self._full = self.packed_layer.for_model(self._which)
        return self._full

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"LazyKV({self._which}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any operation but kvpack's own attention works on the materialised numbers."""
        args, kwargs = tree_map(_materialized, (args, kwargs or {}))
        return func(*args, **kwargs)


def _materialized(x: Any) -> Any:
    return x.materialize() if isinstance(x, LazyKV) else x
