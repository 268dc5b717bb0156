"""A model whose attention is looked at: what each query sees, and what it would see of demoted heads, in torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from ..attention import kvpack_attention, kvpack_mask
from ..errors import OptionError
from ..models import check, decoder_config, has_encoder, implementations, set_implementations, why_not_in_place
from ..sites import sites_of

CHUNK = 128
"""Queries whose attention is computed together."""

_NAME = "kvpack-heads"
# An additive mask at or below this hides a token.
_HIDDEN = -1e4


@dataclass(frozen=True)
class Span:
    """What a streaming KV head holds.

    Attributes:
        sinks: the first tokens of the text.
        window: the newest tokens, before those that are fed.
        step: tokens that are fed together: they see each other whatever the window.
    """

    sinks: int = 4
    window: int = 128
    step: int = 1


class Rows:
    """The attention of one text in one layer, some queries (rows) at a time; nothing `[n, n]` is ever held.

    H are KV heads, G the query heads of each, c the queries of a chunk, m the tokens that they can see.

    Attributes:
        q: queries `[H, G, n, D]`, rotated.
        k: keys `[H, n, D]`.
        v: values `[H, n, E]`.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        s_aux: Tensor | None,
    ) -> None:
        wide = torch.promote_types(query.dtype, torch.float32)
        self.k, self.v = key[0].to(wide), value[0].to(wide)
        heads, n = self.k.shape[:2]
        self.q = query[0].to(wide).unflatten(0, (heads, -1))
        self.n, self.scaling, self.softcap = n, scaling, softcap
        if mask is not None and mask.dtype == torch.bool and mask.shape[1] > 1:
            mask = torch.zeros(mask.shape, dtype=wide).masked_fill_(~mask, -torch.inf)
        self.mask = None if mask is None else mask[0].expand(-1, n, n)
        self.sink_logits = None if s_aux is None else s_aux.detach().to(wide).reshape(heads, -1, 1)

    def only(self, heads: Tensor) -> Rows:
        """The same for some KV heads."""
        part = copy.copy(self)
        part.q, part.k, part.v = self.q[heads], self.k[heads], self.v[heads]
        if self.sink_logits is not None:
            part.sink_logits = self.sink_logits[heads]
        if self.mask is not None and len(self.mask) > 1:
            part.mask = self.mask.unflatten(0, self.q.shape[:2])[heads].flatten(0, 1)
        return part

    def chunks(self) -> Iterator[slice]:
        """All queries, some at a time."""
        return (slice(i, min(i + CHUNK, self.n)) for i in range(0, self.n, CHUNK))

    def end(self, rows: slice) -> int:
        """How many tokens these queries can see."""
        return int(rows.stop) if self.mask is None else self.n

    def shown(self, rows: slice) -> Tensor:
        """Which tokens each query sees `[c, m]`."""
        if self.mask is None:
            at = torch.arange(rows.start, rows.stop)[:, None]
            return torch.arange(rows.stop) <= at
        mask = self.mask[:, rows]
        return (mask if mask.dtype == torch.bool else mask > _HIDDEN).any(0)

    def near(self, rows: slice, span: Span) -> Tensor:
        """Which of those a streaming head holds `[c, m]`: sinks, the window, and what is fed together."""
        first = torch.arange(rows.start, rows.stop) // span.step * span.step - span.window
        at = torch.arange(self.end(rows))
        return self.shown(rows) & ((at < span.sinks) | (at >= first[:, None]))

    def near_columns(self, rows: slice, span: Span) -> Tensor:
        """Tokens that some query of the chunk sees of a streaming head."""
        first = max(rows.start // span.step * span.step - span.window, 0)
        return torch.cat([torch.arange(min(span.sinks, first)), torch.arange(first, self.end(rows))])

    def capped(self, rows: slice, columns: Tensor | None = None) -> Tensor:
        """Logits before the mask `[H, G, c, m]`."""
        q = self.q[:, :, rows]
        k = self.k[:, : self.end(rows)] if columns is None else self.k[:, columns]
        return self.cap((q.flatten(1, 2) @ k.mT).view(*q.shape[:3], -1) * self.scaling)

    def cap(self, logits: Tensor) -> Tensor:
        """Soft-capped, where the model does so (Gemma 2)."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def masked(self, capped: Tensor, rows: slice, columns: Tensor | None = None) -> Tensor:
        """Logits with the mask `[H, G, c, m]`."""
        if self.mask is not None and self.mask.dtype != torch.bool:
            mask = self.mask[:, rows] if columns is None else self.mask[:, rows][..., columns]
            return capped + (mask[:, None] if len(mask) == 1 else mask.unflatten(0, capped.shape[:2]))
        shown = self.shown(rows)
        return capped.masked_fill(~(shown if columns is None else shown[:, columns]), -torch.inf)

    def total(self, logits: Tensor) -> Tensor:
        """Logarithm of what weights are divided by `[H, G, c]`, sink logits included."""
        total = logits.logsumexp(-1)
        return total if self.sink_logits is None else torch.logaddexp(total, self.sink_logits)

    def weights(self, logits: Tensor) -> Tensor:
        """Weights of attention, `logits`' shape."""
        return (logits - self.total(logits)[..., None]).exp_()

    def sums(self, weights: Tensor, values: Tensor) -> Tensor:
        """Weighted sums of values `[H, G, c, E]`."""
        return (weights.flatten(1, 2) @ values).view(*weights.shape[:3], -1)

    def output(self) -> Tensor:
        """Attention over all that is seen, `[H, G, n, E]`."""
        out = [
            self.sums(self.weights(self.masked(self.capped(rows), rows)), self.v[:, : self.end(rows)])
            for rows in self.chunks()
        ]
        return torch.cat(out, 2)

    def streaming(self, rows: slice, span: Span) -> tuple[Tensor, Tensor]:
        """What these queries get of streaming heads `[H, G, c, E]`, and `total` of it `[H, G, c]`."""
        columns = self.near_columns(rows, span)
        logits = self.masked(self.capped(rows, columns), rows, columns)
        logits = logits.masked_fill(~self.near(rows, span)[:, columns], -torch.inf)
        total = self.total(logits)
        return self.sums((logits - total[..., None]).exp_(), self.v[:, columns]), total

    def compensated(self, rows: slice, span: Span) -> Tensor:
        """What these queries get of compensated heads `[H, G, c, E]`: of what left, the mean, as N tokens."""
        out, total = self.streaming(rows, span)
        far = (self.shown(rows) & ~self.near(rows, span)).to(self.k.dtype)
        count = far.sum(-1)
        share = far / count.clamp(min=1)[:, None]
        key, value = (share @ x[:, : far.shape[1]] for x in (self.k, self.v))
        slot = self.cap((self.q[:, :, rows] * key[:, None]).sum(-1) * self.scaling) + count.log()
        weight = (slot - torch.logaddexp(slot, total)).exp()[..., None]
        return out * (1 - weight) + weight * value[:, None]

    def demoted(self, rung: str, rows: slice, span: Span) -> Tensor:
        """What these queries get of heads on a rung `[H, G, c, E]`."""
        if rung == "streaming":
            return self.streaming(rows, span)[0]
        if rung == "compensated":
            return self.compensated(rows, span)
        return self.q.new_zeros((*self.q.shape[:2], rows.stop - rows.start, self.v.shape[-1]))


class Looker(Protocol):
    """Who is asked for a layer's attention."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, make: Callable[..., Rows]) -> Tensor | None:
        """Return the output `[1, n, Hq, E]`; None for that of the model itself.

        Args:
            layer: its number.
            query: `[1, Hq, n, D]`.
            key: `[1, H, n, D]`.
            value: `[1, H, n, E]`.
            make: makes Rows of the three.
        """


@dataclass(frozen=True)
class _Active:
    looker: Looker
    layers: frozenset[int]


_ACTIVE: ContextVar[_Active] = ContextVar("kvpack-heads")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    active, layer = _ACTIVE.get(), getattr(module, "layer_idx", None)
    if layer in active.layers:
        mask, bias = attention_mask, options.get("position_bias")
        if bias is not None:
            if mask is None:
                mask = torch.ones((query.shape[2],) * 2, dtype=torch.bool).tril()[None, None]
            mask = torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else mask + bias
        scaling = options.get("scaling")
        make = partial(
            Rows,
            mask=mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=options.get("softcap"),
            s_aux=options.get("s_aux"),
        )
        out = active.looker.attend(layer, query, key, value, make)
        if out is not None:
            return out.to(query.dtype), None
    own: tuple[Tensor, None] = kvpack_attention(module, query, key, value, attention_mask, **options)
    return own


def shape(model: Any) -> tuple[int, int]:
    """Return how many layers, and KV heads in each, a model's decoder has."""
    config = decoder_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(config.num_hidden_layers), max(heads) if isinstance(heads, list | tuple) else int(heads)


def full_layers(model: Any) -> frozenset[int]:
    """The layers whose queries see the whole past, by number.

    Raises:
        OptionError: the model's attention cannot be looked at.
    """
    check(model)
    if not isinstance(model, PreTrainedModel):
        raise OptionError(f"model: given a {type(model).__name__}, expected a transformers model with its weights")
    config = decoder_config(model)
    reason = why_not_in_place(model)
    if reason is None and has_encoder(model):
        reason = "reads an encoder's tokens too"
    if reason is None and getattr(config, "num_kv_shared_layers", None):
        reason = "has layers that read the keys and values of others"
    if reason is not None:
        raise OptionError(
            f"model: {type(model).__name__} {reason}, so that its KV heads cannot be measured; expected a decoder "
            "whose attention is looked up by name, such as Llama's (any other takes quantize= and evict=, which need "
            "no losses of heads)"
        )
    sites = sites_of(DynamicCache(config=config).layers, config, model, encoder=False)
    layers = frozenset(i for i, site in sites.items() if site.window is None)
    if not layers:
        raise OptionError(
            f"model: {type(model).__name__} has no layer of full attention, expected one whose KV heads hold all tokens"
        )
    return layers


@contextmanager
def attending(model: Any, looker: Looker) -> Iterator[None]:
    """The model's layers of full attention ask `looker` meanwhile; it is as it was afterwards, whatever happens.

    It is in evaluation mode, and its parameters take no gradients.

    Raises:
        OptionError: the model's attention cannot be looked at.
    """
    layers = full_layers(model)
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, kvpack_mask)
    before = implementations(model)
    training = {module: module.training for module in model.modules()}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    token = _ACTIVE.set(_Active(looker, layers))
    try:
        model.eval()
        for parameter in learned:
            parameter.requires_grad_(False)
        model.set_attn_implementation(_NAME)
        yield
    finally:
        _ACTIVE.reset(token)
        set_implementations(model, before)
        for module, mode in training.items():
            module.training = mode
        for parameter in learned:
            parameter.requires_grad_(True)
