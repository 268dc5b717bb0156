"""A cache whose forwards are transactions, over layers that are packed and layers that are not."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from . import models
from ._forwards import Begun, begun, is_under_way
from .beside import State
from .errors import ConcurrencyError, ModelMismatchError
from .handle import Reading
from .inspection import CacheInspection, beside
from .layer import PackedLayer

_R = TypeVar("_R")


class TransactionalCache(CacheInspection):
    """What all layers of a cache do together, or none: take a forward's tokens, change their batch and length.

    The state before a forward is kept in Rust; for transformers' own layers it keeps what brings them back.
    """

    _first: int  # the first layer that takes part in a forward
    _begun: Begun | None  # where the last forward began
    _has_encoder: bool
    _newest_layer: int

    # ---- a forward -------------------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a forward's keys and values of one layer; see `PackedLayer.update`.

        Raises:
            ModelMismatchError: there is no such layer: the cache was made for a model of fewer layers.
            ConcurrencyError: another thread is in the middle of a forward with this cache.
            OptionError: a companion of the cache does not go along.
        """

        def change(layer: Any, of_module: bool) -> Any:
            if isinstance(layer, PackedLayer):
                return layer.update(key_states, value_states, of_module=of_module)
            keys, values = layer.update(key_states, value_states, *args, **kwargs)
            keys._kvpack_reading = Reading(weakref.ref(self), layer_idx)
            return keys, values

        given: tuple[Tensor, Tensor] = self._in_forward(layer_idx, 0, change)
        return given

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Any:
        """As transformers' Cache does."""
        base = super().update_conv_state
        return self._in_forward(
            layer_idx, 1 + 3 * state_idx, lambda *_: base(conv_states, layer_idx, state_idx=state_idx, **kwargs)
        )

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Any:
        """As transformers' Cache does."""
        base = super().update_recurrent_state
        return self._in_forward(
            layer_idx, 2 + 3 * state_idx, lambda *_: base(recurrent_states, layer_idx, state_idx=state_idx, **kwargs)
        )

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int, **kwargs: Any) -> Any:
        """As transformers' Cache does."""
        base = super().update_indexer
        return self._in_forward(layer_idx, 3, lambda *_: base(indexer_key_states, layer_idx, **kwargs))

    def _in_forward(self, layer_idx: int, kind: int, change: Callable[[Any, bool], Any]) -> Any:
        """Gives a layer tokens (0) or states (another kind) in a forward, which is rolled back if that fails."""
        try:
            layer = self._taking_part(layer_idx)
            if self._has_encoder and layer_idx == self._newest_layer and self.store.is_under_way():
                raise models.given_alone()  # these are the encoder's
            beginning = begun() if layer_idx == self._first else None
            of_module = beginning is not None and beginning.in_module
            if isinstance(layer, PackedLayer) and kind == 0:
                given = self._changing(lambda: change(layer, of_module))
            else:
                if self._changing(lambda: self.store.enter(layer_idx, kind, of_module)):
                    self.store.keep(layer_idx, State(beside(layer)))
                given = change(layer, of_module)
            self._newest_layer = layer_idx
            if beginning is not None:
                self._begun = beginning
        except ConcurrencyError:
            raise  # the forward is another thread's
        except BaseException:
            self.store.roll_back()
            raise
        return given

    def _taking_part(self, layer_idx: int) -> Any:
        """The layer, in a forward."""
        for companion in self.companions:
            companion.check_forward()
        if len(self.layers) > len(self.store):
            self._adopt()
        if not 0 <= layer_idx < len(self.layers):
            raise ModelMismatchError(
                f"layer_idx: given {layer_idx}, expected less than {len(self.layers)}, the layers of the model that "
                "this cache was made for; if a forward of another model came this far, reset() the cache"
            )
        return self.layers[layer_idx]

    def _adopt(self) -> None:
        """Takes in layers that were added to the list, as models that run theirs several times do."""
        for i in range(len(self.store), len(self.layers)):
            layer = self.layers[i]
            packed = isinstance(layer, PackedLayer)
            self.store.adopt(layer.store.fork_layer(layer.index) if packed else None)
            if packed:
                self.layers[i] = layer.on(self.store, i)

    def _changing(self, change: Callable[[], _R]) -> _R:
        """Does what another thread's forward forbids; one that was left by an exception is undone first."""
        try:
            return change()
        except ConcurrencyError:
            if is_under_way(self._begun, self):
                raise
            self.store.abandon()
            return change()

    def _change_all(self, method: str, argument: Any, packed: Callable[[], None]) -> None:
        """Calls `method` of all that is held beside packed layers, and `packed`; if one fails, nothing has changed."""
        self._changing(self.store.settle_forward)
        states = [State(held) for layer in self.layers if (held := beside(layer)) is not None]
        changes = self.store.changes()
        try:
            for state in states:
                getattr(state.layer, method)(*argument)
            packed()
        except BaseException:
            if self.store.changes() == changes:  # else an interrupt came when all was done
                for state in states:
                    state()
            raise
