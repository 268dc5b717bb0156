"""The cache of a model with an encoder: its decoder's own tokens, and what the decoder reads of the encoder's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache

from .cache import PackedCache
from .errors import OptionError
from .memory import Memory
from .methods import Evict, Prune, Quantize, Select


class EncoderCache(PackedCache):
    """Keys and values of an encoder's tokens, for the decoder's attention to them: written once, read at each step.

    Which of them are pads is not known: a mask may hide from some queries what others see.
    """

    _of_encoder = True

    def __init__(
        self,
        model_or_config: Any = None,
        *,
        quantize: Quantize | None = None,
        config: Any = None,
        offloading: bool = False,
    ) -> None:
        """An empty cache for one model.

        Args:
            model_or_config: the transformers model, or its configuration.
            quantize: how the tokens are stored; without it `Exact()`.
            config: the same for models that make one by the arguments of transformers' own cache (T5Gemma).
            offloading: whether they want it elsewhere than on the accelerator: it is in CPU memory.
        """
        super().__init__(config if model_or_config is None else model_or_config, quantize=quantize)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes all keys `[B, Hkv, n, Dk]` and values `[B, Hkv, n, Dv]` of a layer, and packs them at once.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError, GradError, OptionError: the tensors do not fit.
        """
        given = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.store.store(layer_idx, torch.get_num_threads())
        given[0].__dict__.pop("_kvpack_reading", None)  # nobody need tell of having read them
        return given


class _Updated(dict[int, bool]):
    """Which layers hold the encoder's tokens: what the cache of those says."""

    def __init__(self, cache: PackedCache) -> None:
        super().__init__(dict.fromkeys(range(len(cache)), False))
        self.cache = cache

    def __getitem__(self, layer: int) -> bool:
        layers = self.cache.layers
        return bool(layers[layer].get_seq_length() > 0)

    def get(self, layer: int, default: Any = None) -> Any:
        """Whether that layer holds them."""
        try:
            return self[layer]
        except IndexError:
            return default


class PackedEncoderDecoderCache(EncoderDecoderCache):
    """A packed cache for a model with an encoder (T5, BART, Whisper ...): `model.generate(..., past_key_values=cache)`.

    A transformers EncoderDecoderCache of two packed caches.

    Attributes:
        self_attention_cache: the PackedCache of the decoder's own tokens.
        cross_attention_cache: the PackedCache of the encoder's.
    """

    self_attention_cache: PackedCache
    _cross: EncoderCache

    def __init__(
        self,
        model_or_config: Any,
        *,
        evict: Evict | None = None,
        quantize: Quantize | None = None,
        select: Select | None = None,
        prune: Prune | None = None,
        cross: Quantize | None = None,
    ) -> None:
        """An empty cache for one model.

        Args:
            model_or_config: the transformers model on the CPU, or its configuration.
            evict: which of the decoder's tokens stay; without it all.
            quantize: how they are stored; without it `Exact()`.
            select: which of them a step of decoding reads; without it all.
            prune: what is held of each KV head of the decoder's own attention; without it all.
            cross: how the encoder's tokens are stored; without it as `quantize` says.

        Raises:
            OptionError: an option is not accepted, does not fit the model, or is calibrated for the decoder's own
                tokens and would store the encoder's.
            DeviceError: the model is on another device.
        """
        own = PackedCache(model_or_config, evict=evict, quantize=quantize, select=select, prune=prune)
        try:
            encoders = EncoderCache(model_or_config, quantize=quantize if cross is None else cross)
        except OptionError as error:
            where = f"cross={cross!r}" if cross is not None else f"cross=None (as quantize={quantize!r})"
            raise OptionError(
                f"{where} is not accepted for the encoder's tokens: {error}; accepted: a codec that is not calibrated, "
                "such as cross=kvpack.Q8(), or cross=kvpack.Exact()"
            ) from error
        super().__init__(own, encoders)
        self.is_updated = _Updated(self._cross)

    @property
    def cross_attention_cache(self) -> EncoderCache:
        """The cache of the encoder's tokens."""
        return self._cross

    @cross_attention_cache.setter
    def cross_attention_cache(self, cache: EncoderCache) -> None:
        # Some models put an empty one without sliding windows in its place (T5Gemma): this one has none, and its codec.
        if "_cross" not in self.__dict__:
            self._cross = cache

    def fork(self) -> PackedEncoderDecoderCache:
        """A copy that shares all pages with this one; each side copies only what it changes."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.self_attention_cache = self.self_attention_cache.fork()
        other._cross = self._cross.fork()
        other.is_updated = _Updated(other._cross)
        return other

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedEncoderDecoderCache:
        memo[id(self)] = other = self.fork()
        return other

    def memory(self) -> Memory:
        """Bytes held, measured from the allocations: by part, by layer of the decoder, in total."""
        both = [self.self_attention_cache.memory(), self._cross.memory()]
        parts = {name: sum(memory.parts[name] for memory in both) for name in both[0].parts}
        return Memory(parts, [sum(layers) for layers in zip(*(memory.layers for memory in both), strict=True)])

    def check_dynamic_cache(self, method: str) -> None:
        """Nothing to do: packed caches have all methods."""
