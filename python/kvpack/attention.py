"""kvpack's attention function for transformers, registered as "kvpack" beside "sdpa" and "eager"."""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import models
from ._tensors import autocast
from .errors import DtypeError, OptionError, ShapeError, StaleHandleError
from .handle import LazyKV, Reading
from .identity import check_model
from .layer import PackedLayer
from .models import HARMLESS
from .models import NAME as NAME

# An additive mask at or below this hides a token: models use the dtype's minimum, -inf, -1e9 or -1e4.
_HIDDEN = -1e4


@torch.compiler.disable
def kvpack_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a PackedCache on its packed form; over anything else what the model would do without kvpack.

    Args:
        module: the model's attention module.
        query: `[B, Hq, q, D]`, rotated.
        key: `[B, Hkv, n, D]`: a handle of a PackedCache, or a real tensor (prefill, layers that are not packed).
        value: as `key`.
        attention_mask: boolean or additive `[B, 1, q, n]`; with None the queries are the newest `q` of the `n` tokens,
            and each sees itself and what is older, or all where attention is not causal.
        scaling: factor of the logits; None is `D ** -0.5`.
        dropout: probability of dropping a weight; only for real tensors.
        softcap: `c` of `c tanh(logit / c)` (Gemma 2).
        s_aux: learned sink logits, one a query head (gpt-oss).
        is_causal: whether None as a mask is causal; None is what the module says, or yes.
        position_bias: added to the scaled logits `[B or 1, Hq, q, n]` (T5).
        **kwargs: what models pass besides. What would change the result goes, with real keys and values, to the
            model's own eager attention, if that takes it.

    Returns:
        `[B, q, Hq, D]`, and None for the weights, which are never formed.

    Raises:
        DtypeError: the mask is neither boolean nor of a floating dtype.
        ShapeError: the mask of a PackedCache's tokens does not have 4 dimensions.
        OptionError: an argument would change the result, and neither kvpack nor the model's eager attention takes it.
    """
    reading = getattr(key, "_kvpack_reading", None) if type(key) is Tensor else None
    # The PackedLayer of these keys, or the PackedCache of a layer that is not packed.
    holder = key.layer if isinstance(key, LazyKV) else None if reading is None else reading.holder()
    try:
        more = {} if HARMLESS.issuperset(kwargs) else _more(module, kwargs)
        if attention_mask is not None:
            attention_mask = _checked_mask(attention_mask, query, isinstance(holder, PackedLayer))
        if isinstance(holder, PackedLayer):
            check_model(holder, module)
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        new = query.shape[2]
        if is_causal is None and attention_mask is None and new > 1:
            is_causal = getattr(module, "is_causal", True)
        shown = attention_mask
        if position_bias is not None:
            attention_mask, is_causal = _with_bias(attention_mask, position_bias, causal=bool(is_causal)), False
        if isinstance(key, LazyKV) and isinstance(value, LazyKV) and not dropout and not more:
            if attention_mask is None and new > 1 and not is_causal:
                attention_mask = torch.ones((1, 1, new, key.shape[2]), dtype=torch.bool)
            if query.dtype is not key.dtype:
                query = autocast(query)  # as `update` did with the keys
            valid = _PADS.valid(shown, new)
            out = key.layer.attend(query, attention_mask, valid, scaling, softcap, s_aux, value)
        else:
            more.update((name, x) for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None)
            options = {"scaling": scaling, "dropout": dropout, **kwargs, **more}
            own = bool(more)
            out = _exact_attention(module, query, key, value, attention_mask, is_causal, own=own, options=options)
            if isinstance(holder, PackedLayer):
                out = holder.without_gone(out, key.shape[1])
            if isinstance(key, LazyKV):
                key.layer.store.attended(key.layer.index)  # beside values that are no handle any more
            elif holder is not None and reading is not None:
                _tell(holder, reading, _PADS.valid(shown, new), (autocast(query), scaling, softcap, s_aux))
    except StaleHandleError:
        raise  # these are no keys of the forward under way
    except BaseException:
        if holder is not None:
            holder.store.roll_back()  # whatever happened: no layer keeps anything of this forward
        raise
    if holder is not None:
        holder.store.finish()
    return out, None


def _tell(holder: Any, reading: Reading, valid: Tensor | None, asked: tuple[Any, ...]) -> None:
    """Tells the cache that attention has read keys which are no handle."""
    if isinstance(holder, PackedLayer):
        query, scaling, softcap, sink_logits = asked
        holder.commit(reading.version, query, valid, scaling, softcap, sink_logits)
    else:
        holder.store.attended(reading.version)


def _more(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that would change the result, all of which the model's eager attention takes."""
    kind: Any = type(module)
    more = {
        name: x for name, x in kwargs.items() if x is not None and name not in HARMLESS and models.passes(kind, name)
    }
    eager = _eager(module) if more else None
    taken = {} if eager is None else inspect.signature(eager).parameters
    unknown = sorted(more.keys() - taken)
    if unknown:
        raise OptionError(
            f"{type(module).__name__} gives its attention function {', '.join(unknown)}, which kvpack's does not know; "
            "expected a model that is loaded with attn_implementation='sdpa' or 'eager' (a PackedCache is right there)"
        )
    return more


def _checked_mask(mask: Tensor, query: Tensor, packed: bool) -> Tensor:
    """The mask with a row a query, if its dtype and, for a PackedCache's tokens, its dimensions are right."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise DtypeError(f"attention mask: given {mask.dtype}, expected bool (True: attend) or an additive float mask")
    if packed and mask.dim() != 4:
        raise ShapeError(f"attention mask: given shape {tuple(mask.shape)}, expected 4 dimensions")
    if mask.dim() == 4 and mask.shape[2] == 1 < query.shape[2]:
        return mask.expand(-1, -1, query.shape[2], -1)
    return mask


def _causal(q: int, n: int) -> Tensor:
    """`[q, n]`: what each of the `q` newest of `n` tokens sees: itself and what is older."""
    return torch.ones((q, n), dtype=torch.bool).tril(n - q)


def _with_bias(mask: Tensor | None, bias: Tensor, *, causal: bool) -> Tensor:
    """An additive mask that has what is added to the logits too."""
    if mask is None:
        if not causal:
            return bias
        mask = _causal(*bias.shape[-2:])
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    *,
    own: bool,
    options: dict[str, Any],
) -> Tensor:
    """Attention over real tensors: torch's SDPA, or the model's `own` function for what SDPA does not know."""
    q, n = query.shape[2], key.shape[2]
    if mask is None and is_causal and q > 1 and (q < n or own):
        # SDPA would let the first query see the first token alone, eager attention lets all see all.
        mask = _causal(q, n)[None, None].to(query.device)
    if not own:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out: Tensor = sdpa(module, query, key, value, mask, is_causal=is_causal, **options)[0]
        return out
    if mask is not None and mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, torch.finfo(query.dtype).min)
    eager = _eager(module)
    if eager is None:
        raise OptionError(f"{type(module).__name__}: given softcap or s_aux, expected a model with eager attention")
    eager_out: Tensor = eager(module, query, key, value, mask, **options)[0]
    return eager_out


def _eager(module: nn.Module) -> Any:
    """The eager attention of the model that `module`, or what its class inherits from, belongs to; None without."""
    for base in type(module).__mro__:
        eager = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    return None


class _Pads:
    """Finds the pads among a forward's tokens; remembers the answer for the forward's other layers."""

    def __init__(self) -> None:
        # One tuple, replaced whole: several threads may ask at once.
        self._last: tuple[weakref.ref[Tensor], int, Tensor | None] | None = None

    def valid(self, mask: Tensor | None, new: int) -> Tensor | None:
        """`[B, new]`: which of the newest tokens are not pads; None when all are real.

        A pad is a token that no query sees, not even its own.
        """
        if mask is None or mask.dim() != 4 or mask.shape[3] < new or mask.shape[2] != new:
            return None
        version = 0 if mask.is_inference() else mask._version
        last = self._last
        if last is not None and last[0]() is mask and last[1] == version:
            return last[2]
        valid = _seen_by_some(mask, new)
        self._last = weakref.ref(mask), version, valid
        return valid


def _seen_by_some(mask: Tensor, new: int) -> Tensor | None:
    """`[B, new]`: which of the newest columns some query of some head sees; None when all."""
    shown = _shown(mask.diagonal(mask.shape[3] - new, dim1=-2, dim2=-1)).any(1)
    if bool(shown.all()):
        return None
    hidden = (~shown).any(0).nonzero()[:, 0]  # only these columns need a look at all rows
    shown[:, hidden] = _shown(mask[..., mask.shape[3] - new + hidden]).any(2).any(1)
    return None if bool(shown.all()) else shown


def _shown(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > _HIDDEN


_PADS = _Pads()


def kvpack_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Tensor | None:
    """SDPA's boolean mask, left out only where attention without one aligns right at both ends.

    SDPA's would be left out for a prompt in a static cache too, whose queries are not the newest positions.
    """
    skip = allow_is_causal_skip and (q_length == 1 or q_length == kv_length)
    return sdpa_mask(batch_size, q_length, kv_length, *args, allow_is_causal_skip=skip, **kwargs)


def register() -> None:
    """Makes `attn_implementation="kvpack"` known to transformers."""
    AttentionInterface.register(NAME, kvpack_attention)
    # Without a mask function of the same name the attention function would never get a mask.
    AttentionMaskInterface.register(NAME, kvpack_mask)
    models.choose_by_model()
