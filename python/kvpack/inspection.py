"""Looking at a layer and at a cache, at any time and from any thread: nothing here changes anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from . import _kvpack
from ._tensors import DTYPES, describe
from ._threads import threads
from .beside import tensor_bytes
from .companion import Companion
from .errors import ShapeError
from .handle import LazyKV
from .memory import Memory, compensation, measured, readable_bytes
from .methods import Evict, Methods, Prune, Quantize, Select

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def materialized(
    store: _kvpack.Cache, index: int, which: Literal["keys", "values"], version: int, *, compact: bool = False
) -> Tensor:
    """All keys or values `[B, Hkv, n, D]` of a layer, dequantised, in the model's dtype.

    Args:
        store: the cache in Rust.
        index: which of its layers.
        which: which of the two.
        version: of the layer; any other is an error.
        compact: as a model's own attention reads them: only tokens that are held, in their order. Else all that
            were seen, with zeros where a pad was or a token was let go.

    Raises:
        StaleHandleError: the layer was updated since it had that version.
        OptionError: tokens were let go, and the model's attention was not known to be its own when they were, or
            heads hold different numbers of tokens.
    """
    sizes, dtype = store.extent(index, version, which, compact)
    out = torch.zeros(sizes, dtype=_TORCH_DTYPES[dtype])
    store.write(index, version, which, compact, describe(out))
    return out


class LayerInspection:
    """What layer `index` of `store` holds of each KV head."""

    store: _kvpack.Cache
    index: int
    states: Any = None  # of linear attention beside it

    def with_states(self, states: Any) -> Self:
        """The same view beside other states of linear attention."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, states=states)
        return other

    @property
    def keys(self) -> Tensor | None:
        """All keys, materialised when something other than kvpack's attention reads them; None before the first."""
        return self._now("keys")

    @property
    def values(self) -> Tensor | None:
        """All values, likewise."""
        return self._now("values")

    def _now(self, which: Literal["keys", "values"]) -> Tensor | None:
        if not self.is_initialized:
            return None
        version = self.store.version(self.index)
        still = self.store.fork_layer(self.index)  # meanwhile another thread may go on
        sizes, dtype = still.extent(0, still.version(0), which, False)
        layer: Any = self
        return LazyKV(layer, which, tuple(sizes), _TORCH_DTYPES[dtype], version, still)

    def sizes(self) -> tuple[int, int, int, int]:
        """Batch, KV heads, key dim and value dim.

        Raises:
            ShapeError: there were no tokens yet.
        """
        shape = self.store.shape(self.index)
        if shape is None:
            raise ShapeError("cache: given an empty one, expected at least one token")
        return shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether there were tokens."""
        return self.store.shape(self.index) is not None

    @property
    def version(self) -> int:
        """Names the state of the layer."""
        return self.store.version(self.index)

    @property
    def record_past(self) -> bool:
        """Whether packing waits for `crop`."""
        return self.store.records()

    @property
    def batch_size(self) -> int:
        """Sequences; there is no such attribute before the first tokens."""
        if not self.is_initialized:
            raise AttributeError("batch_size")
        return self.sizes()[0]

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype; there is no such attribute before the first tokens."""
        shape = self.store.shape(self.index)
        if shape is None:
            raise AttributeError("dtype")
        return _TORCH_DTYPES[shape[1]]

    @property
    def device(self) -> torch.device:
        """CPU memory."""
        return torch.device("cpu")

    @property
    def kv_heads(self) -> int:
        """KV heads, once the first tokens came; 0 before."""
        shape = self.store.shape(self.index)
        return shape[0][1] if shape else 0

    @property
    def chooses_by_queries(self) -> bool:
        """Whether tokens are let go by what attends to them."""
        return self.store.chooses_by_queries(self.index)

    def memory(self) -> dict[str, int]:
        """Bytes allocated, by part, without those of tokens that wait to be stored."""
        return dict(zip(("codes", "scales", "exact", "index"), self.store.memory()[self.index] or (), strict=False))

    def positions(self, row: int = 0, head: int = 0) -> list[int]:
        """Logical positions of the tokens that a KV head of a sequence holds."""
        positions: list[int] = self.store.positions(self.index, row, head).tolist()
        return positions

    def packed(self, row: int, head: int) -> dict[str, Tensor | int]:
        """What one KV head of a sequence stores packed.

        Returns:
            `key_codes` `[n, Dk]` uint8, `key_scale` and `key_zero` float32 (`[n / group, Dk]` where a group of tokens
            shares them, `[n, groups]` where a group of channels does); `value_codes` and so on likewise; `key_start`
            and `value_start`: exact tokens before the packed ones. What is newer than the packed ones is held exactly.
        """
        out: dict[str, Tensor | int] = {}
        sides = self.store.packed(self.index, row, head)
        for name, (start, codes, scale, zero) in zip(("key", "value"), sides, strict=True):
            out[f"{name}_start"] = start
            out[f"{name}_codes"] = torch.from_numpy(codes)
            out[f"{name}_scale"] = torch.from_numpy(scale)
            out[f"{name}_zero"] = torch.from_numpy(zero)
        return out

    def outliers(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """What a KV head keeps beside the codes of its keys, and of its values.

        Returns:
            Two tensors `[n, 3]`: the packed token, the channel, and what the code there lacks (of keys before RoPE).
        """
        keys, values = (
            torch.from_numpy(np.stack(side, 1).astype(np.float32))
            for side in self.store.outliers(self.index, row, head)
        )
        return keys, values

    def compensation_gains(
        self, row: int = 0, head: int = 0
    ) -> tuple[tuple[float, bool] | None, tuple[float, bool] | None]:
        """What compensation could gain at most for keys, and for values, of a KV head, and whether it is used there.

        The gain is the arithmetic over the geometric mean of the eigenvalues of the damped metric: by so much the
        expected square of an error can fall. None where there is no compensation, or no query was seen.
        """
        return self.store.compensation_gains(self.index, row, head)

    def key_bits(self, row: int, head: int) -> Tensor:
        """Bits `[pages, Dk]` of the key channels in each page of a KV head whose method grades them."""
        return torch.from_numpy(self.store.key_bits(self.index, row, head))


def beside(layer: Any) -> Any:
    """What of a layer is transformers' own: all, its states of linear attention, or nothing (None)."""
    return layer.states if isinstance(layer, LayerInspection) else layer


class CacheInspection(Cache):
    """What the layers of a cache hold: those of `store`, and those beside it."""

    store: _kvpack.Cache
    methods: Methods
    companions: list[Companion]  # replaced, never changed: who looks may be in another thread
    config: Any

    @property
    def evict(self) -> Evict | None:
        """Which tokens stay; None: all."""
        return self.methods.evict

    @property
    def quantize(self) -> Quantize:
        """How tokens are stored."""
        return self.methods.quantize

    @property
    def prune(self) -> Prune | None:
        """What is held of each KV head; None: all."""
        return self.methods.prune

    @property
    def select(self) -> Select | None:
        """Which tokens a step of decoding reads; None: all."""
        return self.methods.select

    def _shown(self, i: int) -> Any:
        """Layer `i` as it was before the forward that is under way."""
        layer = self.layers[i]
        state = None if beside(layer) is None or i >= len(self.store) else self.store.kept(i)
        if state is None:
            return layer
        return layer.with_states(state.shown()) if isinstance(layer, LayerInspection) else state.shown()

    def _as_shown(self) -> Cache:
        """What answers for transformers' Cache, with layers as they were before the forward that is under way."""
        if not self.store.is_under_way() or all(beside(layer) is None for layer in self.layers):
            return self
        return Cache(layers=[self._shown(i) for i in range(len(self.layers))])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen, pads included."""
        return int(Cache.get_seq_length(self._as_shown(), layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Mask columns for `query_length` new tokens, and the position of the first column."""
        sizes: tuple[int, int] = Cache.get_mask_sizes(self._as_shown(), query_length, layer_idx)
        return sizes

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer of linear attention has seen tokens."""
        return bool(Cache.has_previous_state(self._as_shown(), layer_idx, *args, **kwargs))

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first tokens, and where no layer tells."""
        told = (getattr(layer, "batch_size", None) for layer in self.layers)
        return next((int(batch) for batch in told if batch is not None), -1)

    @property
    def is_initialized(self) -> bool:
        """Whether all layers that hold tokens have some."""
        return all(layer.is_initialized for layer in self.layers if hasattr(layer, "is_initialized"))

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Any]]:
        """Keys, values (materialised) and sliding window of each layer, as DynamicCache gives them."""
        for i in range(len(self.layers)):
            layer = self._shown(i)
            yield (
                getattr(layer, "keys", None),
                getattr(layer, "values", None),
                getattr(layer, "_sliding_window_tensor", None),
            )

    def memory(self) -> Memory:
        """Bytes held, measured from the allocations: by part, by layer, in total."""
        held = self.store.memory()
        pending, others = [], []
        for i, layer in enumerate(self.layers):
            packed = isinstance(layer, LayerInspection)
            pending.append([x for owner in self.store.owners(i) for x in owner] if packed else [])
            own = beside(self._shown(i))
            others.append(0 if own is None else tensor_bytes(own))
        return measured(held, pending, others, [companion.bytes() for companion in self.companions])

    def lossy_share(self, new: int = 0) -> float:
        """Share of the keys' and values' numbers in packed layers that are not exactly what the model made, or gone.

        Args:
            new: leave out so many of the newest tokens: after a forward of `new` tokens it is the share of the past
                that they read.
        """
        shares = [self.store.lossy_share(layer.index, new) for layer in self._packed]
        return sum(shares) / len(shares) if shares else 0.0

    def kept(self, layer: int, head: int, row: int = 0) -> list[int]:
        """Positions of the tokens that a KV head of a sequence holds, pads not among them.

        Raises:
            ShapeError: there is no such layer, head or sequence, or the layer is none of kvpack's.
        """
        positions: list[int] = self.store.positions(layer if layer >= 0 else len(self.layers), row, head).tolist()
        for companion in self.companions:
            positions = companion.positions(layer, row, positions)
        return positions

    @property
    def _packed(self) -> Iterator[LayerInspection]:
        return (layer for layer in self.layers if isinstance(layer, LayerInspection))

    def _tokens(self) -> int | None:
        """Positions seen; None where no layer counts them."""
        return self.get_seq_length() if any(isinstance(layer, CacheLayerMixin) for layer in self.layers) else None

    def info(self) -> dict[str, Any]:
        """What really runs: version, instruction set, threads, codec, layers, and attention calls by path."""
        gains = [layer.compensation_gains(0, head) for layer in self._packed for head in range(layer.kv_heads)]
        counts = [self.store.counts(layer.index) for layer in self._packed]
        return {
            "version": _kvpack.__version__,
            "isa": _kvpack.isa(),
            **threads(),
            "evict": repr(self.evict),
            "quantize": repr(self.quantize),
            "select": repr(self.select),
            "prune": repr(self.prune),
            "attention": self.config._attn_implementation,
            "layers": [type(layer).__name__ for layer in self.layers],
            "tokens": self._tokens(),
            **compensation(gains),
            **{path: sum(count[i] for count in counts) for i, path in enumerate(("prefill", "fused", "materialised"))},
        }

    def __repr__(self) -> str:
        kinds: dict[str, int] = {}
        for layer in self.layers:
            kinds[type(layer).__name__] = kinds.get(type(layer).__name__, 0) + 1
        layers = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        tokens = "" if (seen := self._tokens()) is None else f"{seen} tokens, "
        return f"PackedCache({self.methods.words()}, {tokens}{readable_bytes(self.memory().total)}, layers: {layers})"
