"""PackedCache: what users pass to `generate` as `past_key_values`."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from . import _kvpack, models
from ._lazy import Lazy
from ._threads import threads
from .errors import ConcurrencyError, CropError, KvpackError, ModelMismatchError, OptionError, ShapeError
from .layer import PackedLayer
from .memory import Memory, readable_bytes
from .methods import EVICT, QUANTIZE, SELECT, Evict, Exact, Quantize, Select, Site

_PARTS = ("codes", "scales", "exact", "index", "auxiliary", "other layers")


class PackedCache(Cache):
    """A KV cache that holds keys and values packed, and is read as it is.

    A drop-in for transformers' DynamicCache: `model.generate(**inputs, past_key_values=cache)`. It is right with any
    attention implementation, and fast when the model runs with `attn_implementation="kvpack"`. Full-attention layers
    are packed; sliding, linear and other layers keep transformers' own objects (`repr(cache)` says which).
    """

    def __init__(
        self,
        model_or_config: Any,
        *,
        evict: Evict | None = None,
        quantize: Quantize | None = None,
        select: Select | None = None,
    ) -> None:
        """An empty cache for one model.

        Args:
            model_or_config: the transformers model on the CPU, or its configuration.
            evict: which tokens stay; without it all.
            quantize: how tokens are stored; without it `Exact()`: nothing is lossy unless asked for.
            select: which tokens a step of decoding reads; without it all.

        Raises:
            OptionError: an option is not accepted, or does not fit the model.
            DeviceError: the model is on another device.
        """
        models.check(model_or_config)
        config = models.decoder_config(model_or_config)
        self.quantize = _checked(quantize)
        self.evict = _checked_eviction(evict, self.quantize, config)
        self.select = _checked_select(select)
        self.config = config
        self._has_encoder = bool(getattr(getattr(model_or_config, "config", model_or_config), "is_encoder_decoder", 0))
        self._newest_layer = -1
        # transformers decides the structure (sliding, linear, layers that share keys and values ...);
        # exactly the plain full-attention layers are replaced.
        shared = bool(getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0))
        model = None if model_or_config is config or not hasattr(model_or_config, "config") else model_or_config
        layers: list[Any] = DynamicCache(config=config).layers
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                site = Site(i, len(layers), config, model)
                layers[i] = PackedLayer(self.quantize, site, evict=evict, select=select, shared=shared)
                layers[i].check_dims(_head_dim(config))
        if not any(isinstance(layer, PackedLayer) for layer in layers):
            kinds = sorted({type(layer).__name__ for layer in layers})
            if not kinds:
                raise OptionError(
                    f"model_or_config: given a configuration without decoder layers ({type(config).__name__}), "
                    "expected a decoder model"
                )
        super().__init__(layers=layers)
        self._last_layer = max((i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)), default=-1)
        # The thread whose forward is between its first and its last layer.
        self._forward_of: int | None = None
        # What LazyLLM left out, where it filled this cache.
        self.lazy: Lazy | None = None
        unpacked = models.describe_unpacked(layers)
        if unpacked is not None:
            warnings.warn(unpacked, stacklevel=2)

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
            attention_mask: `[B, tokens]`, 0 where a token is a pad; without it all tokens are real.

        Raises:
            OptionError: `cache` is not a DynamicCache.
            ModelMismatchError: its layers are not this model's.
            ShapeError: the mask's shape does not fit.
        """
        if not isinstance(cache, DynamicCache):
            raise OptionError(f"cache: given a {type(cache).__name__}, expected a transformers DynamicCache")
        packed = cls(model_or_config, evict=evict, quantize=quantize, select=select)
        if len(cache.layers) > len(packed.layers):
            raise ModelMismatchError(
                f"cache: given one of {len(cache.layers)} layers, expected at most the model's {len(packed.layers)}"
            )
        shared = any(layer.shared for layer in packed._packed)
        if len(cache.layers) < len(packed.layers) and not shared:
            raise ModelMismatchError(f"cache: given one of {len(cache.layers)} layers, expected {len(packed.layers)}")
        for i, layer in enumerate(cache.layers):
            own = packed.layers[i]
            if not isinstance(own, PackedLayer):
                packed.layers[i] = copy.deepcopy(layer)
            elif layer.is_initialized and layer.get_seq_length() > 0:
                own.load(layer.keys, layer.values, attention_mask)
        return packed

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a forward's keys and values of one layer; see `PackedLayer.update`.

        Raises:
            ModelMismatchError: there is no such layer: the cache was made for a model of fewer layers.
            ConcurrencyError: another thread is in the middle of a forward with this cache.
            OptionError: LazyLLM filled the cache, and this forward is outside of it.
        """
        if self.lazy is not None and not self.lazy.running:
            raise OptionError(
                "this cache was filled within kvpack.LazyLLM: given a forward outside, expected one in it"
            )
        if not 0 <= layer_idx < len(self.layers):
            raise ModelMismatchError(
                f"layer_idx: given {layer_idx}, expected less than {len(self.layers)}, the layers of the model that "
                "this cache was made for; if a forward of another model came this far, reset() the cache"
            )
        thread = threading.get_ident()
        if self._forward_of not in (None, thread):
            raise ConcurrencyError(
                f"this cache is in the middle of a forward of another thread (given thread {thread}, expected "
                f"{self._forward_of}); give each thread its own cache: cache.fork() shares the pages"
            )
        if self._has_encoder and self._forward_of == thread and layer_idx == self._newest_layer:
            self._forward_of = None
            error = models.given_alone()  # these are the encoder's
            self._take_back(layer_idx, error)
            raise error
        self._forward_of = None if layer_idx >= self._last_layer else thread
        self._newest_layer = layer_idx
        try:
            keys, values = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        except KvpackError as error:
            self._forward_of = None
            self._take_back(layer_idx, error)
            raise
        return keys, values

    def _take_back(self, failed: int, error: KvpackError) -> None:
        """Undoes a forward that failed with `error` in layer `failed`, in the layers before it."""
        if self.lazy is not None:
            error.add_note("LazyLLM's forwards cannot be undone: reset() the cache before using it again.")
            return
        length = self.layers[failed].get_seq_length()
        ahead = [i for i in range(failed) if self._length(i) > length]
        kept = [i for i in ahead if not (isinstance(self.layers[i], PackedLayer) and self.layers[i].take_back(length))]
        if kept:
            error.add_note(
                f"Layers {kept} hold this forward's tokens already: reset() the cache before using it again."
            )

    def _length(self, i: int) -> int:
        return self.layers[i].get_seq_length() if hasattr(self.layers[i], "get_seq_length") else 0

    # ---- changing the batch and the length, all layers or none ----------------------------------------------------

    @property
    def _packed(self) -> Iterator[PackedLayer]:
        return (layer for layer in self.layers if isinstance(layer, PackedLayer))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the `-tokens_to_remove` newest tokens; a positive number is the length to keep.

        Raises:
            CropError: tokens that are packed with loss would be cut and `activate_past_recording()` was not
                called before, or LazyLLM filled the cache; no layer has changed then.
        """
        if self.lazy is not None:
            raise CropError(
                "crop: given a cache that LazyLLM filled, whose layers hold different tokens; expected another"
            )
        for layer in self._packed:
            layer.check_crop(tokens_to_remove)
        super().crop(int(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row `i` what row `beam_idx[i]` was (beam search); pages are shared, not copied."""
        self._check_select(beam_idx)
        super().reorder_cache(beam_idx)
        self._select_lazy(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at `indices`; pages are shared, not copied."""
        self._check_select(indices)
        super().batch_select_indices(indices)
        self._select_lazy(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times; pages are shared, not copied."""
        super().batch_repeat_interleave(repeats)
        if self.lazy is not None:
            self._select_lazy(torch.arange(len(self.lazy.ids)).repeat_interleave(repeats))

    def _select_lazy(self, indices: Tensor) -> None:
        if self.lazy is not None:
            self.lazy = self.lazy.select(indices)

    def _check_select(self, indices: Tensor) -> None:
        for layer in self._packed:
            if layer.is_initialized:
                layer.check_select(indices)

    def reset(self) -> None:
        """Forgets all tokens and frees their memory."""
        self._forward_of = None
        self.lazy = None
        super().reset()

    def fork(self) -> PackedCache:
        """A copy that shares all pages with this one; each side copies only what it changes.

        Costs microseconds a layer: prefill a long prompt once, then fork it for every continuation.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._forward_of = None
        other.lazy = None if self.lazy is None else self.lazy.fork()
        other.layers = [
            layer.fork() if isinstance(layer, PackedLayer) else copy.deepcopy(layer) for layer in self.layers
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

    # ---- looking at it ---------------------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """Bytes held, measured from the allocations: by part, by layer, in total."""
        parts = dict.fromkeys(_PARTS, 0)
        layers = []
        angles: set[int] = set()  # layers share them: they are counted with the first that has them
        for layer in self.layers:
            packed = isinstance(layer, PackedLayer)
            held = layer.memory() if packed else {"other layers": _tensor_bytes(layer)}
            table = layer.angles() if packed else None
            if table and table[0] not in angles:
                angles.add(table[0])
                held["index"] += table[1]
            for part, n in held.items():
                parts[part] += n
            layers.append(sum(held.values()))
        parts["auxiliary"] += 0 if self.lazy is None else self.lazy.bytes()
        return Memory(parts, layers)

    def lossy_share(self, new: int = 0) -> float:
        """Share of the keys' and values' numbers in packed layers that are not exactly what the model made, or gone.

        Args:
            new: leave out so many of the newest tokens: after a forward of `new` tokens it is the share of the past
                that they read.
        """
        shares = [layer.lossy_share(new) for layer in self._packed]
        return sum(shares) / len(shares) if shares else 0.0

    def kept(self, layer: int, head: int, row: int = 0) -> list[int]:
        """Positions of the tokens that a KV head of a sequence holds, pads not among them.

        Raises:
            ShapeError: there is no such layer, head or sequence, or the layer is none of kvpack's.
        """
        if not 0 <= layer < len(self.layers) or not isinstance(self.layers[layer], PackedLayer):
            packed = [i for i, own in enumerate(self.layers) if isinstance(own, PackedLayer)]
            raise ShapeError(f"layer: given {layer}, expected one of the packed layers {packed}")
        positions: list[int] = self.layers[layer].positions(row, head)
        if self.lazy is not None:
            positions = sorted(self.lazy.held[layer][row, positions].tolist())
        return positions

    def info(self) -> dict[str, Any]:
        """What really runs: version, instruction set, threads, codec, layers, and attention calls by path."""
        packed = list(self._packed)
        return {
            "version": _kvpack.__version__,
            "isa": _kvpack.isa(),
            **threads(),
            "evict": repr(self.evict),
            "quantize": repr(self.quantize),
            "select": repr(self.select),
            "attention": self.config._attn_implementation,
            "layers": [type(layer).__name__ for layer in self.layers],
            "tokens": self.get_seq_length(),
            **_feedback(packed),
            **{path: sum(layer.counts[path] for layer in packed) for path in ("prefill", "fused", "materialised")},
        }

    def __repr__(self) -> str:
        kinds: dict[str, int] = {}
        for layer in self.layers:
            kinds[type(layer).__name__] = kinds.get(type(layer).__name__, 0) + 1
        layers = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        methods = ", ".join(repr(method) for method in (self.evict, self.select, self.quantize) if method is not None)
        return (
            f"PackedCache({methods}, {self.get_seq_length()} tokens, "
            f"{readable_bytes(self.memory().total)}, layers: {layers})"
        )


def _feedback(layers: list[PackedLayer]) -> dict[str, Any]:
    """Where feedback is used: heads that have it, of all with a metric, and what it could gain."""
    heads = [layer.feedback_gains(0, head) for layer in layers for head in range(layer.kv_heads if layer._seen else 0)]
    told = {}
    for side, name in enumerate(("feedback of keys", "feedback of values")):
        gains = [gain for head in heads if (gain := head[side]) is not None]
        if gains:
            ratios = sorted(ratio for ratio, _ in gains)
            told[name] = (
                f"{sum(used for _, used in gains)} of {len(gains)} heads, gains {ratios[0]:.2f} to {ratios[-1]:.2f}, "
                f"median {ratios[len(ratios) // 2]:.2f}"
            )
    return told


def _checked(quantize: Quantize | None) -> Quantize:
    """The codec."""
    quantize = Exact() if quantize is None else quantize
    if not isinstance(quantize, Quantize):
        accepted = ", ".join(f"kvpack.{method.__name__}(...)" for method in QUANTIZE.values())
        raise OptionError(f"quantize={quantize!r} is not accepted; accepted: {accepted}, or None for Exact()")
    return quantize


def _checked_eviction(evict: Evict | None, quantize: Quantize, config: Any) -> Evict | None:
    """The eviction, if it goes with the codec and the model."""
    if evict is not None and not isinstance(evict, Evict):
        accepted = ", ".join(f"kvpack.{method.__name__}(...)" for method in EVICT.values())
        raise OptionError(f"evict={evict!r} is not accepted; accepted: {accepted}, or None to keep all tokens")
    if evict is not None and quantize.needs_neighbours:
        raise OptionError(
            f"evict={evict!r} is not accepted with {type(quantize).__name__}: its keys before RoPE are held in runs of "
            "consecutive positions; accepted: codecs that hold keys as they are attended to"
        )
    if evict is not None and quantize.centers() and evict.reads_keys:
        raise OptionError(
            f"evict={evict!r} is not accepted with {quantize!r}: it looks at keys, which are held less their mean; "
            "accepted: center=False, or evictions by attention or position"
        )
    attention = getattr(config, "attn_config", None)
    if evict is not None and (
        getattr(config, "model_type", None) == "bloom"
        or getattr(config, "alibi", False)
        or getattr(attention, "alibi", 0)
    ):
        raise OptionError(
            f"evict={evict!r} is not accepted for a model of type {config.model_type!r} with ALiBi: logits are biased "
            "by the number of tokens in between, of which some would be gone; accepted: None"
        )
    return evict


def _checked_select(select: Select | None) -> Select | None:
    """The selection."""
    if select is not None and not isinstance(select, Select):
        accepted = ", ".join(f"kvpack.{method.__name__}(...)" for method in SELECT.values())
        raise OptionError(f"select={select!r} is not accepted; accepted: {accepted}, or None to read all tokens")
    return select


def _head_dim(config: Any) -> int | None:
    """Numbers of a key and of a value, where the configuration tells."""
    head_dim = getattr(config, "head_dim", None)
    width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if head_dim is None and isinstance(width, int) and isinstance(heads, int) and heads:
        head_dim = width // heads  # GPT-2 and its like do not name it
    return head_dim if isinstance(head_dim, int) and getattr(config, "kv_lora_rank", None) is None else None


def _tensor_bytes(holder: Any) -> int:
    """Bytes of the tensors that one of transformers' own layers holds."""
    storages = {}
    stack = [vars(holder)] if hasattr(holder, "__dict__") else []
    while stack:
        for x in stack.pop().values():
            if isinstance(x, Tensor):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            elif isinstance(x, dict):
                stack.append(x)
    return sum(storages.values())
