"""PackedCache: what users pass to `generate` as `past_key_values`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from . import models
from ._tensors import RECORDING_EXISTS, crop_of, rows_at
from .errors import ModelMismatchError, OptionError, ShapeError
from .hybrid import PackedHybridLayer
from .identity import head_dim
from .layer import PackedLayer
from .methods import Evict, Exact, Methods, Prune, Quantize, Select
from .methods.combination import model_party
from .sites import layers_in_forwards, pack, sites_of
from .transaction import TransactionalCache


class PackedCache(TransactionalCache):
    """A KV cache that holds keys and values packed, and is read as it is.

    A drop-in for transformers' DynamicCache: `model.generate(**inputs, past_key_values=cache)`. It is right with any
    attention implementation, and fast when the model runs with `attn_implementation="kvpack"`. Layers of
    full attention, of sliding windows and of chunks are packed; states of linear attention and other layers stay
    transformers' own (`repr(cache)` says which).

    A forward is a transaction: whatever fails between its first layer and its last one's attention, an interrupt too,
    leaves all layers as they were. What only looks (`memory`, `kept`, `fork`, `info` ...) changes nothing, and answers
    at any time, from any thread, with what was there before the forward that is under way.
    """

    _of_encoder = False  # whether it holds an encoder's tokens

    def __init__(
        self,
        model_or_config: Any,
        *,
        evict: Evict | None = None,
        quantize: Quantize | None = None,
        select: Select | None = None,
        prune: Prune | None = None,
    ) -> None:
        """An empty cache for one model.

        Args:
            model_or_config: the transformers model on the CPU, or its configuration.
            evict: which tokens stay; without it all.
            quantize: how tokens are stored; without it `Exact()`: nothing is lossy unless asked for.
            select: which tokens a step of decoding reads; without it all.
            prune: what is held of each KV head; without it all.

        Raises:
            OptionError: an option is not accepted, or does not fit the model.
            DeviceError: the model is on another device.
        """
        models.check(model_or_config)
        config = models.decoder_config(model_or_config)
        self.methods = Methods(Exact() if quantize is None else quantize, evict, select, prune=prune)
        self.methods.check_with(model_party(config))
        self.config = config
        # transformers decides the structure (sliding, linear, layers that share keys and values ...).
        layers: list[Any] = DynamicCache(config=config).layers
        if not layers:
            raise OptionError(
                f"model_or_config: given a configuration without decoder layers ({type(config).__name__}), "
                "expected a decoder model"
            )
        shared = bool(getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0))
        model = None if model_or_config is config or not hasattr(model_or_config, "config") else model_or_config
        sites = sites_of(layers, config, model, encoder=self._of_encoder)
        taking_part = layers_in_forwards(layers, config) or [0]
        self._first, last = taking_part[0], taking_part[-1]
        self._begun = None
        last_is_read = isinstance(layers[last], CacheLayerMixin)
        self.store = self.methods.make_cache(sites, shared, len(layers), last, last_is_read, head_dim(config))
        for i, site in sites.items():
            layers[i] = pack(layers[i], self.store, self.methods, site)
        super().__init__(layers=layers)
        self.companions = []
        self._has_encoder = models.has_encoder(model_or_config) and not self._of_encoder
        self._newest_layer = -1
        if not sites:
            warnings.warn(models.describe_unpacked(layers), stacklevel=2)
        elif (evict or select) and all(site.window is not None for site in sites.values()):
            warnings.warn(
                "evict= and select= do nothing here: all packed layers of this model have sliding windows, which "
                "let tokens go by themselves; quantize= packs them",
                stacklevel=2,
            )

    @property
    def _is_user_defined(self) -> bool:
        """Whether `generate` was given this cache: it sets this before anything else."""
        return bool(self.__dict__.get("_is_user_defined", False))

    @_is_user_defined.setter
    def _is_user_defined(self, given: bool) -> None:
        if self._has_encoder:
            raise models.given_alone()
        self.__dict__["_is_user_defined"] = given

    @classmethod
    def from_cache(
        cls,
        cache: Cache,
        model_or_config: Any,
        *,
        evict: Evict | None = None,
        quantize: Quantize | None = None,
        select: Select | None = None,
        prune: Prune | None = None,
        attention_mask: Tensor | None = None,
    ) -> PackedCache:
        """Packs what a DynamicCache holds; that one stays as it is.

        `Graded` sees no queries here, and judges by the keys alone; evictions that need them are refused.

        Args:
            cache: the cache of a forward of this model.
            model_or_config: the model, or its configuration.
            evict: as in the constructor; its first tokens are chosen here.
            quantize: as in the constructor.
            select: as in the constructor.
            prune: as in the constructor.
            attention_mask: `[B, tokens]`, 0 where a token is a pad; without it all tokens are real.

        Raises:
            OptionError: `cache` is not a DynamicCache.
            ModelMismatchError: its layers are not this model's.
            ShapeError: the mask's shape does not fit.
        """
        if not isinstance(cache, DynamicCache):
            raise OptionError(f"cache: given a {type(cache).__name__}, expected a transformers DynamicCache")
        packed = cls(model_or_config, evict=evict, quantize=quantize, select=select, prune=prune)
        given, expected = len(cache.layers), len(packed.layers)
        shares = getattr(packed.config, "kv_sharing_modes", None) or getattr(packed.config, "num_kv_shared_layers", 0)
        if given > expected or (given < expected and not shares):
            most = "at most the model's " if given > expected else ""
            raise ModelMismatchError(f"cache: given one of {given} layers, expected {most}{expected}")
        for i, layer in enumerate(cache.layers):
            own = packed.layers[i]
            if not isinstance(own, PackedLayer):
                packed.layers[i] = copy.deepcopy(layer)
                continue
            if layer.is_initialized and (seen := layer.get_seq_length()) > 0:
                own.load(layer.keys, layer.values, attention_mask, seen - layer.keys.shape[2])
            if isinstance(own, PackedHybridLayer):
                own.take_states(layer)
        return packed

    # ---- changing the batch and the length, all layers or none ----------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the `-tokens_to_remove` newest tokens; a positive number is the length to keep.

        Raises:
            CropError: tokens that are packed with loss would be cut and `activate_past_recording()` was not
                called before, or a companion of the cache does not go along; no layer has changed then.
        """
        for companion in self.companions:
            companion.check_crop()
        n = int(tokens_to_remove)  # some releases pass a tensor
        packed = next((layer for layer in self.layers if isinstance(layer, PackedLayer)), None)
        if packed is None:
            super().crop(n)
            return
        self._changing(self.store.settle_forward)
        seen = packed.get_seq_length()
        remove, lossy = crop_of(n, seen)
        self.store.check_crop(remove, lossy)
        self._change_all(
            "crop", (-remove if RECORDING_EXISTS else seen - remove,), lambda: self.store.crop(remove, lossy)
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row `i` what row `beam_idx[i]` was (beam search); pages are shared, not copied."""
        self._select("reorder_cache", beam_idx, lambda batch: rows_at(beam_idx, batch))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at `indices`; pages are shared, not copied."""
        self._select("batch_select_indices", indices, lambda batch: rows_at(indices, batch))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times; pages are shared, not copied."""
        if repeats < 1:
            raise ShapeError(f"repeats: given {repeats}, expected at least 1")
        self._select(
            "batch_repeat_interleave", repeats, lambda batch: [i for i in range(batch) for _ in range(repeats)]
        )

    def _select(self, method: str, argument: Any, rows_of: Callable[[int], list[int]]) -> None:
        """Calls `method` of what is held beside packed layers, whose batch becomes the rows that `rows_of` it names."""
        batch = self.batch_size  # below 1 where nothing is packed; other layers may have rows all the same
        rows = rows_of(batch) if batch > 0 else []
        companions = [companion.select(rows) for companion in self.companions] if rows else self.companions
        self._change_all(method, (argument,), lambda: self.store.select(rows) if rows else None)
        self.companions = companions

    def activate_past_recording(self) -> None:
        """From now on packing waits for `crop`, which then reaches any token; until nobody crops any more."""
        if RECORDING_EXISTS:
            super().activate_past_recording()
        self.store.record()

    def reset(self) -> None:
        """Forgets all tokens and frees their memory."""
        self._change_all("reset", (), self.store.reset)
        self.companions = [left for companion in self.companions if (left := companion.reset()) is not None]

    def fork(self) -> Self:
        """A copy that shares all pages with this one; each side copies only what it changes.

        Costs microseconds a layer: prefill a long prompt once, then fork it for every continuation.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, store=self.store.fork(), _begun=None)
        other.companions = [companion.fork() for companion in self.companions]
        other.layers = [
            layer.on(other.store, i) if isinstance(layer, PackedLayer) else copy.deepcopy(layer)
            for i, layer in enumerate(map(self._shown, range(len(self.layers))))
        ]
        return other

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCache:
        memo[id(self)] = other = self.fork()
        return other

    def __reduce__(self) -> Any:
        """Refuses: a packed cache cannot be pickled."""
        raise TypeError(
            "a PackedCache cannot be pickled or saved; fork() or copy.deepcopy() copies it within a process"
        )
