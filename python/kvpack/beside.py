"""transformers' own layers beside packed ones: what they hold, and what they held before a forward."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor


class State:
    """What a layer held when this was made; calling it brings the layer back.

    Layers put new tensors in the place of old ones, but those in lists and dicts (states of linear attention), which
    they write over: these are copied.
    """

    def __init__(self, layer: Any) -> None:
        """Remembers what `layer` holds now."""
        self.layer = layer
        self.held = {name: _copied(x) for name, x in vars(layer).items()}

    def __call__(self) -> None:
        """Gives the layer back what it held; for once."""
        vars(self.layer).clear()
        vars(self.layer).update(self.held)

    def shown(self) -> Any:
        """A layer that holds it."""
        layer = copy.copy(self.layer)
        vars(layer).clear()
        vars(layer).update({name: _copied(x) for name, x in self.held.items()})
        return layer


def _copied(x: Any) -> Any:
    if isinstance(x, dict):
        return type(x)((key, _cloned(value)) for key, value in x.items())
    return [_cloned(value) for value in x] if isinstance(x, list) else x


def _cloned(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def tensor_bytes(holder: Any) -> int:
    """Bytes of the tensors that one of transformers' own layers holds."""
    storages = {}
    stack = list(vars(holder).values()) if hasattr(holder, "__dict__") else []
    while stack:
        x = stack.pop()
        if isinstance(x, Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict | list):
            stack.extend(x.values() if isinstance(x, dict) else x)
    return sum(storages.values())
