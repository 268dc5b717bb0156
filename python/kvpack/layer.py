"""One packed attention layer: transformers' layer contract, as a view of the cache in Rust."""

from __future__ import annotations

import weakref
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from . import _kvpack
from ._tensors import autocast, crop_of, describe, four_dimensional, plain, row_of, rows_at
from .errors import OptionError, ShapeError
from .handle import LazyKV, Reading
from .inspection import LayerInspection, materialized
from .methods import Methods, Site


class PackedLayer(LayerInspection, CacheLayerMixin):
    """Keys and values of one attention layer: layer `index` of `store`, which knows all that there is to know."""

    is_compileable = False
    supports_early_init = False

    def __init__(self, store: _kvpack.Cache, index: int, methods: Methods, site: Site | None = None) -> None:
        """A view of layer `index` of `store`, whose methods are these.

        Args:
            store: the cache in Rust.
            index: which of its layers.
            methods: those of the cache.
            site: where in which model the layer is.
        """
        self.store, self.index, self.methods = store, index, methods
        self.config = None if site is None else site.config
        self.sliding_window = None if site is None else site.window
        self.gone = () if methods.prune is None else methods.prune.gone(index)

    def __repr__(self) -> str:
        return f"PackedLayer({self.methods.words()}, {self.get_seq_length()} tokens)"

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return True

    @property
    def is_sliding(self) -> bool:
        """Whether queries see the newest tokens only."""
        return self.sliding_window is not None

    def without_gone(self, out: Tensor, kv_heads: int) -> Tensor:
        """The output `[B, q, Hq, D]` of attention over real tensors, 0 for query heads whose KV head is gone."""
        if not self.gone:
            return out
        group = out.shape[2] // kv_heads
        heads = torch.arange(out.shape[2], device=out.device) // group
        gone = torch.isin(heads, torch.tensor(self.gone, device=out.device))
        return out.masked_fill(gone[:, None], 0)

    # ---- a forward -------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first tokens say what the layer is like."""

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, of_module: bool = False, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a forward's keys `[B, Hkv, q, Dk]` and values `[B, Hkv, q, Dv]`, after RoPE.

        `of_module`: should a forward begin here, whether it is a torch module's, which goes on to the last layer.

        Returns:
            The same tensors when the layer was empty, else handles on all that is held.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError, GradError, OptionError: the tensors do not fit;
                the cache is what it was before the forward.
            ConcurrencyError: another thread is in the middle of a forward.
        """
        keys, values = plain("keys", autocast(key_states)), plain("values", autocast(value_states))
        version, first, tokens = self.store.update(
            self.index,
            describe(keys),
            describe(values),
            owner=(keys, values),
            of_module=of_module,
            threads=torch.get_num_threads(),
        )
        if first:
            key_states._kvpack_reading = Reading(weakref.ref(self), version)
            return key_states, value_states
        batch, heads, _, key_dim = keys.shape
        return (
            LazyKV(self, "keys", (batch, heads, tokens, key_dim), keys.dtype, version),
            LazyKV(self, "values", (batch, heads, tokens, values.shape[3]), keys.dtype, version),
        )

    def commit(
        self, version: int, query: Tensor, valid: Tensor | None, scaling: float, softcap: float | None, sink_logits: Any
    ) -> None:
        """Ends a prefill on an empty layer, after the attention of `query` over the model's own tensors.

        Raises:
            StaleHandleError: the layer was updated again since `version`.
        """
        query = plain("queries", query)
        valid = row_of(valid)
        self.store.commit(
            self.index,
            version,
            describe(query),
            valid=None if valid is None else describe(valid),
            scaling=scaling,
            softcap=softcap,
            sink_logits=None if sink_logits is None else sink_logits.detach().float().tolist(),
            threads=torch.get_num_threads(),
        )

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
        sink_logits: Tensor | None,
        values: LazyKV | None = None,
    ) -> Tensor:
        """Attention of the newest positions' queries over all that is held.

        Args:
            query: `[B, Hq, q, Dk]`, rotated.
            mask: `[B or 1, Hq or 1, q, seen]`, boolean (True: attend) or additive; None is causal.
            valid: `[B, q]`, which of the newest tokens are not pads.
            scaling: factor of the logits.
            softcap: `c` of `c tanh(logit / c)`.
            sink_logits: learned logits, one a query head, that take weight and add nothing.
            values: the handle that `update` returned; without it what is held now.

        Returns:
            `[B, q, Hq, Dv]`, contiguous, in the query's dtype.
        """
        query = plain("queries", query)
        mask, valid = four_dimensional(mask), row_of(valid)
        batch, heads, new, _ = query.shape
        out = torch.empty(batch, new, heads, self.sizes()[3] if values is None else values.shape[3], dtype=query.dtype)
        self.store.attend(
            self.index,
            self.version if values is None else values.version,
            describe(query),
            describe(out),
            mask=None if mask is None else describe(mask),
            valid=None if valid is None else describe(valid),
            scaling=scaling,
            softcap=softcap,
            sink_logits=None if sink_logits is None else sink_logits.detach().float().tolist(),
            threads=torch.get_num_threads(),
        )
        return out

    def load(self, keys: Tensor, values: Tensor, attention_mask: Tensor | None, missing: int = 0) -> None:
        """Stores another cache's keys and values in this empty layer.

        Args:
            keys: `[B, Hkv, n, Dk]`.
            values: `[B, Hkv, n, Dv]`.
            attention_mask: `[B, missing + n]`, 0 for pads.
            missing: positions before them, which the layer's window has passed.
        """
        keys, values = plain("keys", keys.detach()), plain("values", values.detach())
        expected = (keys.shape[0], missing + keys.shape[2])
        if attention_mask is not None and tuple(attention_mask.shape) != expected:
            raise ShapeError(f"attention mask: given {tuple(attention_mask.shape)}, expected {expected}")
        valid = None if attention_mask is None else row_of(attention_mask[:, missing:] != 0)
        described = None if valid is None else describe(valid)
        self.store.load(self.index, describe(keys), describe(values), described, missing, torch.get_num_threads())

    def for_model(self, which: Literal["keys", "values"], version: int, still: _kvpack.Cache | None = None) -> Tensor:
        """`materialized` for attention that is not kvpack's, which is counted; of a copy made for looking, not."""
        if still is not None:
            return materialized(still, 0, which, still.version(0))
        out = materialized(self.store, self.index, which, version, compact=True)
        if which == "keys":
            self.store.materialised(self.index)
        return out

    # ---- lengths, batch: what changes them changes all layers of a cache ---------------------------------------------

    def get_seq_length(self) -> int:
        """Positions seen, pads included."""
        return self.store.seen(self.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask columns for `query_length` new tokens, and the position of the first column."""
        gone = 0 if self.methods.evict is None and not self.is_sliding else self.store.gone(self.index)
        return self.get_seq_length() - gone + query_length, gone

    def get_max_length(self) -> int:
        """The sliding window; -1: no maximum."""
        return -1 if self.sliding_window is None else self.sliding_window

    get_max_cache_shape = get_max_length

    def _alone(self) -> _kvpack.Cache:
        """The store, where it is this layer's alone."""
        if len(self.store) > 1:
            raise OptionError(
                "a layer's tokens: given one layer of several to change, expected all: use the method of the cache"
            )
        return self.store

    def crop(self, n: int) -> None:
        """Removes the `-n` newest tokens, as `PackedCache.crop` does for all layers."""
        self._alone().crop(*crop_of(int(n), self.get_seq_length()))

    def activate_past_recording(self) -> None:
        """From now on packing waits for `crop`, which then reaches any token; until nobody crops any more."""
        self.store.record()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row `i` what row `beam_idx[i]` was."""
        if self.is_initialized:
            self._alone().select(rows_at(beam_idx, self.batch_size))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        if self.is_initialized:
            self._alone().select([i for i in range(self.batch_size) for _ in range(repeats)])

    def reset(self) -> None:
        """Forgets all tokens."""
        self._alone().reset()

    def on(self, store: _kvpack.Cache, index: int) -> Self:
        """The view of the same layer in another store."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, store=store, index=index)
        return other

    def fork(self) -> Self:
        """A layer of its own that shares all pages with this one; each side copies what it changes."""
        return self.on(self.store.fork_layer(self.index), 0)

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        memo[id(self)] = other = self.fork()
        return other

    def offload(self) -> None:
        """Nothing to do: the cache lives in CPU memory."""

    prefetch = offload
