"""Layers that have attention and linear attention side by side."""

from __future__ import annotations

import copy
from typing import Any, Self

from transformers import cache_utils

from . import _kvpack
from .layer import PackedLayer
from .methods import Methods, Site


class PackedHybridLayer(PackedLayer):
    """A layer whose keys and values are packed, beside `states` of linear attention, which are transformers' own."""

    def __init__(self, store: _kvpack.Cache, index: int, methods: Methods, site: Site, *, states: int) -> None:
        """A view of layer `index` of `store`.

        Args:
            store: the cache in Rust.
            index: which of its layers.
            methods: those of the cache.
            site: where in which model the layer is.
            states: how many convolutions and recurrences the layer has.
        """
        super().__init__(store, index, methods, site)
        self.states = cache_utils.LinearAttentionLayer(number_of_states=states)

    def __getattr__(self, name: str) -> Any:
        """What transformers asks of linear attention."""
        if name == "states":  # in the making
            raise AttributeError(name)
        return getattr(self.states, name)

    @property
    def is_croppable(self) -> bool:
        """Whether the states can be what they were."""
        return bool(getattr(self.states, "is_croppable", False))

    def activate_past_recording(self) -> None:
        """As PackedLayer, and the states remember what they were likewise, where they can."""
        super().activate_past_recording()
        if hasattr(self.states, "activate_past_recording"):
            self.states.activate_past_recording()

    def take_states(self, layer: Any) -> None:
        """Copies the states of one of transformers' layers."""
        vars(self.states).update({name: copy.deepcopy(vars(layer)[name]) for name in vars(self.states)})

    def on(self, store: _kvpack.Cache, index: int) -> Self:
        """The view of the same layer in another store, with states of its own."""
        return super().on(store, index).with_states(copy.deepcopy(self.states))


if hasattr(cache_utils, "LinearAttentionCacheLayerMixin"):
    cache_utils.LinearAttentionCacheLayerMixin.register(PackedHybridLayer)
