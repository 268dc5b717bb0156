"""One packed attention layer: transformers' layer contract around the store in Rust."""

from __future__ import annotations

import weakref
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ._tensors import DTYPES, New, describe, plain, readable
from .errors import CropError, KvpackError, OptionError, ShapeError, StaleHandleError
from .handle import LazyKV
from .methods import AdaKV, Evict, Longformer, PyramidKV, Quantize, Select, Site

Readers: TypeAlias = tuple[Tensor, float, float | None, list[float] | None]
"""Queries, and scaling, cap and learned sinks of their logits."""

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
# Releases before past recording let assisted decoding crop without announcing it.
_RECORDING_EXISTS = hasattr(Cache, "activate_past_recording")


class PackedLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer.

    A forward's keys and values wait in `_pending` until the attention function has seen its mask (pads are not
    stored) and, when the cache was empty, until the exact prefill attention is done.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        quantize: Quantize,
        site: Site | None = None,
        *,
        evict: Evict | None = None,
        select: Select | None = None,
        shared: bool = False,
    ) -> None:
        """An empty layer.

        Args:
            quantize: the codec.
            site: where in which model it is.
            evict: what chooses the tokens that stay.
            select: what chooses those that a step of decoding reads.
            shared: whether other layers of the model read this layer's keys and values, so that packing waits
                until the forward is over.
        """
        self.quantize = quantize
        self.evict = evict
        self.select = select
        self.config = None if site is None else site.config
        self.shared = shared
        self.record_past = False
        self.is_initialized = False
        self.version = 0
        self.counts = {"prefill": 0, "fused": 0, "materialised": 0}
        self._store = quantize.make_store(
            site, None if evict is None else evict.make(site), None if select is None else select.make(site)
        )
        # Chunks up to this length wait for the next forward to be packed, so that they can be cropped.
        self._patience = self._store.window()
        self._wants_queries = self._store.wants_queries()
        self._seen = 0
        # Whether the model's own attention reads this layer, which then sees what is held and not what was seen.
        self._outside = False
        self._pending: tuple[Tensor, Tensor] | None = None
        # What keys are held less of, `[B, Hkv, 1, Dk]`, if their codec wants that; and what the store was handed last.
        self._centers = quantize.centers(site)
        self._mean: Tensor | None = None
        self._centred: Tensor | None = None
        # Whether what the newest query attends to is wanted, and what that was.
        self.watched = False
        self._attention: Tensor | None = None

    def check_dims(self, head_dim: int | None) -> None:
        """Raises OptionError when the codec does not fit keys and values of `head_dim` numbers, if that is known."""
        if head_dim is not None:
            self._store.check_dims(head_dim, head_dim)

    def __repr__(self) -> str:
        methods = ", ".join(repr(method) for method in (self.evict, self.select, self.quantize) if method is not None)
        return f"PackedLayer({methods}, {self.get_seq_length()} tokens)"

    # ---- writing -------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype, device and batch size of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes a forward's keys `[B, Hkv, q, Dk]` and values `[B, Hkv, q, Dv]`, after RoPE.

        Returns:
            The same tensors when the cache was empty, else handles on all that is held.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError, GradError, OptionError: the tensors do not fit;
                the cache is unchanged.
        """
        keys, values = plain("keys", key_states), plain("values", value_states)
        if self._pending is not None:
            self.absorb()
        gone = self._gone()
        self._store.check(describe(keys), describe(values))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.version += 1
        self._pending = keys, values
        if self._seen == 0:
            key_states._kvpack_prefill = (weakref.ref(self), self.version)
            return key_states, value_states
        batch, heads, new, key_dim = keys.shape
        length, dtype = self._seen + new - gone, keys.dtype
        return (
            LazyKV(self, "keys", (batch, heads, length, key_dim), dtype),
            LazyKV(self, "values", (batch, heads, length, values.shape[3]), dtype),
        )

    def absorb(self, valid: Tensor | None = None, readers: Readers | None = None, *, loaded: bool = False) -> None:
        """Stores what is pending.

        Args:
            valid: `[B, q]`, which tokens are not pads.
            readers: what attended to them.
            loaded: whether they are another cache's, and nothing has attended to them here.
        """
        valid = self._valid(valid)
        new = self._new(valid)
        if new is None:
            return
        if not self._seen and readers is None and not loaded:
            self._outside = True  # kvpack's attention would have taken them by now
            self._check_outside()
        described = None
        if readers is not None and self._wants_queries:
            query, scaling, softcap, sinks = readers
            query = plain("queries", query)  # held until it was read
            described = describe(query), scaling, softcap, sinks
        self._store.append(new, described, torch.get_num_threads())
        self._absorbed()

    def _check_outside(self) -> None:
        """Raises OptionError when tokens of this prompt cannot be chosen, as not kvpack's attention reads them."""
        if self.select is not None:
            raise OptionError(
                f"select={self.select!r} is not accepted: this layer's attention does not run in kvpack, and reads "
                "everything; accepted: None, or a model that was loaded with attn_implementation='kvpack'"
            )
        if self.evict is None or self._pending is None:
            return
        keys = self._pending[0]
        if isinstance(self.evict, AdaKV | Longformer | PyramidKV):
            raise OptionError(
                f"evict={self.evict!r} is not accepted: its heads or layers hold different numbers of tokens, "
                "which only kvpack's own attention can read; accepted here: KeyDiff, L2Norm, StreamingLLM, Random, or "
                "a model that was loaded with attn_implementation='kvpack'"
            )
        if not all(torch.equal(keys[0], row) for row in keys[1:]):
            raise OptionError(
                f"evict={self.evict!r} is not accepted for a batch of {keys.shape[0]} different sequences: this "
                "layer's attention does not run in kvpack, and which tokens are pads is not known; accepted here: one "
                "sequence at a time, or a model that was loaded with attn_implementation='kvpack'"
            )

    def _valid(self, valid: Tensor | None) -> Tensor | None:
        """`valid` as Rust reads it."""
        if valid is None or self._pending is None:
            return None
        keys = self._pending[0]
        return valid[:, None, None, :].expand(keys.shape[0], 1, 1, keys.shape[2]).contiguous()

    def _new(self, valid: Tensor | None) -> New | None:
        """What is pending, as Rust takes it.

        A forward's tokens are packed when the next forward's arrive, so that until then they can be cropped; only a
        first prompt is packed at once.
        """
        if self._pending is None:
            return None
        keys, values = self._pending
        if self._centers:
            keys = self._center(keys, valid)
        pack = not self.record_past
        return (
            describe(keys),
            describe(values),
            None if valid is None else describe(valid),
            pack,
            pack and not self._seen,
        )

    def _center(self, keys: Tensor, valid: Tensor | None) -> Tensor:
        """The keys less the mean of the first ones; `valid` `[B, 1, 1, q]`."""
        if self._mean is None or not self._seen:
            weights = torch.ones(1, 1, keys.shape[2], 1) if valid is None else valid.transpose(2, 3).float()
            self._mean = (keys.float() * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True).clamp(min=1)
        self._centred = (keys.float() - self._mean).to(keys.dtype)
        return self._centred

    def _check_center(self, softcap: float | None, sinks: Any) -> None:
        """Raises OptionError when attention would change if all keys moved."""
        if self._centers and (softcap is not None or sinks is not None):
            raise OptionError(
                "center=True is not accepted for a model with learned sinks or capped logits, which do not move with "
                "the keys; accepted: center=False"
            )

    def _absorbed(self) -> None:
        """Counts what was pending, now that it is stored."""
        self._centred = None
        if self._pending is not None:
            self._seen += self._pending[0].shape[2]
            self._pending = None

    def discard(self) -> None:
        """Forgets the pending tokens, as if they had not been given."""
        if self._pending is not None:
            self._pending = None
            self.version += 1
            if self._seen == 0:
                self._clear()

    def take_back(self, length: int) -> bool:
        """Forgets the newest tokens of a forward that failed, down to `length`; says whether that was possible."""
        remove = self.get_seq_length() - length
        if remove <= 0:
            return True
        if length == 0:
            self._clear()
        elif self._pending is not None:
            self.discard()
        else:
            try:
                self._store.crop(remove, False)
            except CropError:
                return False
            self._seen -= remove
            self.version += 1
        return True

    @property
    def kv_heads(self) -> int:
        """KV heads, once the first tokens came; 0 before."""
        shape = self._store.shape()
        return shape[1] if shape else 0

    def load(self, keys: Tensor, values: Tensor, attention_mask: Tensor | None) -> None:
        """Stores another cache's keys and values in this empty layer; the mask `[B, tokens]` is 0 for pads."""
        valid = None
        if attention_mask is not None:
            expected = (keys.shape[0], keys.shape[2])
            if tuple(attention_mask.shape) != expected:
                raise ShapeError(f"attention mask: given {tuple(attention_mask.shape)}, expected {expected}")
            valid = attention_mask != 0
        self.update(keys.detach(), values.detach())
        self.absorb(valid, loaded=True)

    def commit(self, version: int, valid: Tensor | None, readers: Readers) -> None:
        """Ends a prefill on an empty cache, after the attention of `readers`.

        Raises:
            StaleHandleError: the layer was updated again since `version`.
        """
        if version != self.version:
            raise StaleHandleError(
                f"the keys of this prefill (given version {version}, expected {self.version}) are not the last that "
                "the cache was given: is another thread using it?"
            )
        try:
            self._check_center(*readers[2:])
        except OptionError:
            self.discard()
            raise
        self.counts["prefill"] += 1
        self._outside = False
        self.absorb(valid, readers)
        if self.watched:
            query, scaling, softcap, sinks = readers
            self._watch(query, scaling, softcap, sinks)

    # ---- reading -------------------------------------------------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of the newest positions' queries over all that is held.

        Args:
            query: `[B, Hq, q, Dk]`, rotated.
            mask: `[B or 1, Hq or 1, q, seen]`, boolean (True: attend) or additive; None is causal.
            valid: `[B, q]`, which of the newest tokens are not pads.
            scaling: factor of the logits.
            softcap: `c` of `c tanh(logit / c)`.
            sinks: learned logits, one a query head, that take weight and add nothing.

        Returns:
            `[B, q, Hq, Dv]`, contiguous, in the query's dtype.
        """
        self._check_center(softcap, sinks)
        query = plain("queries", query)
        if mask is not None:
            mask = _four_dimensional(mask)
        valid = self._valid(valid)
        batch, heads, new, _ = query.shape
        out = torch.empty(batch, new, heads, self._value_dim(), dtype=query.dtype)
        before = self._seen
        try:
            self._store.attend(
                describe(query),
                describe(out),
                self._new(valid),
                None if mask is None else describe(mask),
                scaling,
                softcap,
                None if sinks is None else sinks.detach().float().tolist(),
                torch.get_num_threads(),
            )
        except KvpackError:
            if self._store.seen() > before:  # the new tokens were stored, their attention failed
                self._absorbed()
                self.take_back(before)
            raise
        self._absorbed()
        self.counts["fused"] += 1
        if new > self._patience and not (self.record_past or self.shared):
            self._store.settle()  # a long chunk would otherwise be held exactly in all layers at once
        if self.watched:
            self._watch(query, scaling, softcap, None if sinks is None else sinks.detach().float().tolist())
        return out

    def _watch(self, query: Tensor, scaling: float, softcap: float | None, sinks: list[float] | None) -> None:
        """Remembers what the newest of some queries `[B, Hq, q, Dk]` attends to."""
        out = torch.zeros(query.shape[0], 1, 1, self._seen)
        newest = plain("queries", query[:, :, -1:])
        self._store.write_received(describe(newest), describe(out), scaling, softcap, sinks, torch.get_num_threads())
        self._attention = out[:, 0, 0]

    def take_attention(self) -> Tensor:
        """What the newest query attended to, `[B, seen]`, the mean over its heads; of a layer that is `watched`."""
        attention, self._attention = self._attention, None
        if attention is None:
            raise ShapeError("attention of the newest query: given none, expected a forward through kvpack's attention")
        return attention

    def _value_dim(self) -> int:
        if self._pending is not None:
            return int(self._pending[1].shape[3])
        shape = self._store.shape()
        assert shape is not None  # there is a handle, so there are tokens
        return shape[3]

    def materialize(self, which: Literal["keys", "values"]) -> Tensor:
        """All keys or values `[B, Hkv, seen, D]`, dequantised, in the model's dtype; zeros where a pad was."""
        self.absorb()
        shape = self._store.shape()
        if shape is None:
            raise ShapeError(f"{which}: given an empty cache, expected at least one token")
        batch, heads, key_dim, value_dim, dtype = shape
        dim = key_dim if which == "keys" else value_dim
        out = torch.zeros((batch, heads, self._seen, dim), dtype=_TORCH_DTYPES[dtype])
        write = self._store.write_keys if which == "keys" else self._store.write_values
        mean = self._mean.to(out.dtype) if which == "keys" and self._mean is not None else None
        if mean is not None:
            out -= mean  # what is not written stays 0
        write(describe(out))
        if mean is not None:
            out += mean
        self.counts["materialised"] += which == "keys"
        return out

    def for_model(self, which: Literal["keys", "values"]) -> Tensor:
        """All keys or values as a model's own attention reads them: only tokens that are held, in their order.

        Raises:
            OptionError: tokens were let go, and the model's attention was not known to be its own when they were, or
                its heads hold different numbers of tokens.
        """
        full = self.materialize(which)
        if self.evict is None:
            return full
        batch, heads, seen, dim = full.shape
        held = [self._store.positions(row, head).tolist() for row in range(batch) for head in range(heads)]
        counts = {len(positions) for positions in held}
        if counts == {seen}:
            return full
        if not self._outside or len(counts) > 1:
            raise OptionError(
                f"evict={self.evict!r}: this layer is read by another attention than kvpack's, after tokens of which "
                "it cannot know were let go; accepted: attn_implementation='kvpack' from the first token on"
            )
        places = torch.tensor(held).reshape(batch, heads, -1, 1).expand(-1, -1, -1, dim)
        return full.gather(2, places)

    @property
    def keys(self) -> Tensor | None:
        """All keys, materialised; None before the first."""
        return self.materialize("keys") if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """All values, materialised; None before the first."""
        return self.materialize("values") if self.is_initialized else None

    @property
    def chooses_by_queries(self) -> bool:
        """Whether tokens are let go by what attends to them."""
        return self.evict is not None and self._store.wants_queries()

    def positions(self, row: int = 0, head: int = 0) -> list[int]:
        """Logical positions of the tokens that a KV head of a sequence holds."""
        self.absorb()
        positions: list[int] = self._store.positions(row, head).tolist()
        return positions

    def packed(self, row: int, head: int) -> dict[str, Tensor | int]:
        """What one KV head of a sequence stores packed.

        Returns:
            `key_codes` `[n, Dk]` uint8, `key_scale` and `key_zero` float32 (`[n / group, Dk]` where a group of tokens
            shares them, `[n, groups]` where a group of channels does); `value_codes` and so on likewise; `key_start`
            and `value_start`: exact tokens before the packed ones. What is newer than the packed ones is held exactly.
        """
        self.absorb()
        out: dict[str, Tensor | int] = {}
        for name, (start, codes, scale, zero) in zip(("key", "value"), self._store.packed(row, head), strict=True):
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
        self.absorb()
        keys, values = (
            torch.from_numpy(np.stack(side, 1).astype(np.float32)) for side in self._store.outliers(row, head)
        )
        return keys, values

    def feedback_gains(
        self, row: int = 0, head: int = 0
    ) -> tuple[tuple[float, bool] | None, tuple[float, bool] | None]:
        """What GPTQ's feedback could gain at most for keys, and for values, of a KV head, and whether it is used there.

        The gain is the arithmetic over the geometric mean of the eigenvalues of the damped metric: by so much the
        expected square of an error can fall. None where there is no feedback, or no query was seen.
        """
        self.absorb()
        return self._store.feedback_gains(row, head)

    def key_bits(self, row: int, head: int) -> Tensor:
        """Bits `[pages, Dk]` of the key channels in each page of a KV head whose method grades them."""
        self.absorb()
        return torch.from_numpy(self._store.key_bits(row, head))

    # ---- lengths -------------------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Positions seen, pads included."""
        return self._seen + (self._pending[0].shape[2] if self._pending is not None else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask columns for `query_length` new tokens, and the position of the first column."""
        length = self.get_seq_length()
        gone = self._gone()
        return length - gone + query_length, gone

    def _gone(self) -> int:
        """Tokens that were let go, where the model's own attention counts those that are held."""
        if self.evict is None or (not self._seen and self._pending is None):
            return 0
        # What is due goes now: this is asked before the forward's own tokens come.
        if self._outside or not self._seen:
            self.absorb()
        if not self._outside:
            return 0
        if not self.record_past:
            self._store.settle()
        return self._seen - len(self._store.positions(0, 0))

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    # ---- changing the batch and the length -----------------------------------------------------------------------

    def tokens_to_remove(self, n: int) -> int:
        """How many tokens `crop(n)` means: `-n`, or for the absolute length of older releases what lies beyond it."""
        n = int(n)  # some releases pass a tensor
        return -n if n <= 0 else max(self.get_seq_length() - n, 0)

    def _may_cut_packed(self, n: int) -> bool:
        return self.record_past or (int(n) > 0 and not _RECORDING_EXISTS)

    def check_crop(self, n: int) -> None:
        """Raises what `crop(n)` would raise."""
        self.absorb()
        self._store.check_crop(self.tokens_to_remove(n), self._may_cut_packed(n))

    def crop(self, n: int) -> None:
        """Removes the `-n` newest tokens; a positive `n` is the length to keep, as in older releases.

        With past recording on, it also packs what waited for it (`crop(0)` only does that).

        Raises:
            CropError: tokens that would remain, or go, are packed with loss and recording is off, or there are
                fewer tokens; the cache is unchanged.
        """
        self.check_crop(n)
        remove = self.tokens_to_remove(n)
        if remove:
            self._store.crop(remove, self._may_cut_packed(n))
            self._seen -= remove
            self.version += 1
        if self.record_past:
            self._store.settle()

    def activate_past_recording(self) -> None:
        """From now on packing waits for `crop`, which then reaches any token."""
        self.record_past = True

    def check_select(self, indices: Tensor) -> list[int]:
        """The indices as a list, checked against the batch size."""
        chosen = torch.arange(self._batch)[indices.to("cpu")] if indices.dtype == torch.bool else indices
        chosen_list: list[int] = chosen.reshape(-1).tolist()
        bad = [i for i in chosen_list if not -self._batch <= i < self._batch]
        if bad or not chosen_list:
            raise ShapeError(
                f"batch indices: given {bad or 'none'}, expected at least one, each below the batch size {self._batch}"
            )
        return [i % self._batch for i in chosen_list]

    @property
    def _batch(self) -> int:
        return self.batch_size if self.is_initialized else 0

    def _select(self, indices: list[int]) -> None:
        self.absorb()
        self._store.select(indices)
        if self._mean is not None:
            self._mean = self._mean[indices]
        self.batch_size = len(indices)
        self.version += 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row `i` what row `beam_idx[i]` was; pages are shared, not copied."""
        if self.is_initialized:
            self._select(self.check_select(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at `indices`, in their order."""
        if self.is_initialized:
            self._select(self.check_select(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times; pages are shared, not copied."""
        if repeats < 1:
            raise ShapeError(f"repeats: given {repeats}, expected at least 1")
        if self.is_initialized:
            self._select([i for i in range(self._batch) for _ in range(repeats)])

    def reset(self) -> None:
        """Forgets all tokens, frees their memory and ends past recording."""
        self._clear()
        self.record_past = False

    def _clear(self) -> None:
        self._pending = self._mean = self._attention = None
        self.watched = False
        self._store.reset()
        self._seen = 0
        self.version += 1
        self._outside = False
        if self.is_initialized:
            self.is_initialized = False
            del self.batch_size

    def fork(self) -> PackedLayer:
        """A copy that shares all pages; each side copies what it changes."""
        self.absorb()
        other = object.__new__(PackedLayer)
        other.__dict__.update(self.__dict__)
        other.counts = dict(self.counts)
        other._store = self._store.fork()
        return other

    def memory(self) -> dict[str, int]:
        """Bytes allocated, by part."""
        self.absorb()
        held = dict(zip(("codes", "scales", "exact", "index"), self._store.memory(), strict=True))
        if self._seen:  # what was calibrated is the codec's, and counted with the tokens that are held by it
            held["scales"] += self._store.tables()[0]
            held["scales"] += 0 if self._mean is None else self._mean.untyped_storage().nbytes()
        return held

    def angles(self) -> tuple[int, int] | None:
        """A number of the table of angles that layers share whose keys are held un-rotated, and its bytes."""
        return self._store.tables()[1] if self._seen else None

    def lossy_share(self, new: int = 0) -> float:
        """Share of the tokens' numbers that are not what the model made, or gone; those of the `new` newest aside."""
        self.absorb()
        return self._store.lossy_share(new)

    def offload(self) -> None:
        """Nothing to do: the cache lives in CPU memory."""

    def prefetch(self) -> None:
        """Nothing to do: the cache lives in CPU memory."""


def _four_dimensional(mask: Tensor) -> Tensor:
    """The mask as Rust reads it."""
    if mask.dim() != 4:
        raise ShapeError(f"attention mask: given shape {tuple(mask.shape)}, expected 4 dimensions")
    if mask.dtype not in DTYPES and mask.dtype != torch.bool:
        mask = mask.float()
    return readable(mask)
