"""kvpack's attention function for transformers, registered as "kvpack" beside "sdpa" and "eager"."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import StaleHandleError
from .handle import LazyKV
from .identity import check_model
from .layer import PackedLayer

NAME = "kvpack"
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a PackedCache on its packed form; over anything else what the model would do without kvpack.

    Args:
        module: the model's attention module.
        query: `[B, Hq, q, D]`, rotated.
        key: `[B, Hkv, n, D]`: a handle of a PackedCache, or a real tensor (prefill, layers that are not packed).
        value: as `key`.
        attention_mask: boolean or additive `[B, 1, q, n]`; None is causal.
        scaling: factor of the logits; None is `D ** -0.5`.
        dropout: probability of dropping a weight; only for real tensors.
        softcap: `c` of `c tanh(logit / c)` (Gemma 2).
        s_aux: learned sink logits, one a query head (gpt-oss).
        **kwargs: passed on to torch's SDPA or the model's own eager attention.

    Returns:
        `[B, q, Hq, D]`, and None for the weights, which are never formed.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    new = query.shape[2]
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[2] == 1 < new:
        attention_mask = attention_mask.expand(-1, -1, new, -1)
    reading = getattr(key, "_kvpack_reading", None)
    # The PackedLayer of these keys, or the PackedCache of a layer that is not packed.
    holder = key.layer if isinstance(key, LazyKV) else None if reading is None else reading.holder()
    try:
        if isinstance(holder, PackedLayer):
            check_model(holder, module)
        if isinstance(key, LazyKV) and isinstance(value, LazyKV) and not dropout:
            if attention_mask is None and new > 1 and not getattr(module, "is_causal", True):
                attention_mask = torch.ones((1, 1, new, key.shape[2]), dtype=torch.bool)
            valid = _PADS.valid(attention_mask, new)
            out = key.layer.attend(query, attention_mask, valid, scaling, softcap, s_aux, value)
        else:
            out = _exact_attention(
                module,
                query,
                key,
                value,
                attention_mask,
                scaling=scaling,
                dropout=dropout,
                softcap=softcap,
                s_aux=s_aux,
                **kwargs,
            )
            if isinstance(holder, PackedLayer) and reading is not None:
                valid = _PADS.valid(attention_mask, new)
                holder.commit(reading.version, query, valid, scaling, softcap, s_aux)
            elif holder is not None and reading is not None:
                holder.store.attended(reading.version)
    except StaleHandleError:
        raise  # these are no keys of the forward under way
    except BaseException:
        if holder is not None:
            holder.store.roll_back()  # whatever happened: no layer keeps anything of this forward
        raise
    if holder is not None:
        holder.store.finish()
    return out, None


def _exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softcap: float | None,
    s_aux: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """Attention over real tensors: torch's SDPA, or the model's own function for what SDPA does not know."""
    if softcap is None and s_aux is None:
        out: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)[0]
        return out
    extra = {name: x for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None}
    eager = sys.modules[type(module).__module__].eager_attention_forward
    mask = _additive(mask, query, key)
    eager_out: Tensor = eager(module, query, key, value, mask, **extra, **kwargs)[0]
    return eager_out


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as eager attention wants it: added to the logits, and causality spelled out."""
    q, n = query.shape[2], key.shape[2]
    if mask is None:
        if q == 1:
            return None
        mask = torch.ones((q, n), dtype=torch.bool).tril(n - q)[None, None]
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


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


def register() -> None:
    """Makes `attn_implementation="kvpack"` known to transformers."""
    AttentionInterface.register(NAME, kvpack_attention)
    # Without a mask function of the same name the attention function would never get a mask.
    AttentionMaskInterface.register(NAME, sdpa_mask)
