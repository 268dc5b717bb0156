"""Handles: the keys and values that `update` returns once a cache holds more than it was just given.

A handle is a tensor without memory. kvpack's attention function recognises it and reads the packed form; any other
operation materialises it first, so that a PackedCache is right with every model and attention implementation.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from . import _kvpack
    from .layer import PackedLayer

_CPU = torch.device("cpu")


class Reading(NamedTuple):
    """What keys that are no handle, but the model's own, tell attention: the cache that waits to be told of it.

    Attributes:
        holder: a reference to the PackedLayer, or to the PackedCache of a layer that is not packed. A weak one: the
            cache may hold these keys.
        version: of the PackedLayer; of another one its index.
    """

    holder: weakref.ref[Any]
    version: int


class LazyKV(Tensor):
    """All keys, or all values, that a layer holds: `[batch, KV heads, positions seen, head_dim]`."""

    layer: PackedLayer
    which: Literal["keys", "values"]
    version: int
    _full: Tensor | None = None
    _still: _kvpack.Cache | None = None

    @staticmethod
    def __new__(
        cls,
        layer: PackedLayer,
        which: Literal["keys", "values"],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        version: int,
        still: _kvpack.Cache | None = None,
    ) -> LazyKV:
        """A handle on what `layer` holds while it has that version, or for ever where `still` is a copy of it."""
        handle: LazyKV = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=_CPU)
        handle.layer, handle.which, handle.version = layer, which, version
        handle._still = still
        return handle

    def materialize(self) -> Tensor:
        """The numbers, dequantised, in a tensor of their own.

        Raises:
            StaleHandleError: the layer has changed since the handle was made.
        """
        if self._full is None:
            self._full = self.layer.for_model(self.which, self.version, self._still)
        return self._full

    def numpy(self, *, force: bool = False) -> Any:
        """The numbers as a NumPy array."""
        return self.materialize().numpy(force=force)

    def tolist(self) -> Any:
        """The numbers as nested lists."""
        return self.materialize().tolist()

    def __array__(self, dtype: Any = None) -> Any:
        return self.materialize().__array__(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"LazyKV({self.which}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any operation but kvpack's own attention works on the materialised numbers."""
        args, kwargs = tree_map(_materialized, (args, kwargs or {}))
        return func(*args, **kwargs)


def _materialized(x: Any) -> Any:
    return x.materialize() if isinstance(x, LazyKV) else x
