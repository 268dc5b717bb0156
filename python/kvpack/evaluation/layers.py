"""Where the error comes from: each layer's attention output, from the full cache's own queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..layer import PackedLayer
from .contenders import Contender, Full
from .forward import Reader
from .store import Record

PROBE = "kvpack_probe"


@dataclass(frozen=True)
class Attention:
    """What one layer's attention was asked.

    Attributes:
        query: `[1, Hq, n, D]` of the newest tokens.
        key: `[1, Hkv, tokens, D]`.
        value: as `key`.
        scaling: factor of the logits.
        softcap: their cap, if any.
        sink_logits: learned logits, one a query head, if any.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None
    sink_logits: Tensor | None


def attention_errors(model: Any, contenders: Sequence[Contender], ids: Tensor, queries: int = 32) -> list[Record]:
    """Compare attention of the newest `queries` tokens of a document `[n]`, layer by layer.

    Every layer gets what the full cache's forward gave it, so that errors of layers before do not count.

    Returns:
        For each packed contender `errors`: per layer `||o' - o|| / ||o||`, with o' the output on the packed keys and
        values and o on the real ones, both in float32; None for layers that are not packed. Contenders that choose
        tokens by their queries have no record: only the newest queries are known here.
    """
    seen = record_attention(model, ids, min(queries, len(ids) // 2))
    records = []
    for contender in contenders:
        errors: list[float | None] = []
        for i, layer in enumerate(contender.new_cache(model).layers):
            packed = isinstance(layer, PackedLayer) and i in seen and not layer.chooses_by_queries
            errors.append(round(_error(layer, seen[i]), 7) if packed else None)
        if any(error is not None for error in errors):
            records.append({"kind": "layers", "method": contender.label, "tokens": len(ids), "errors": errors})
    return records


def record_attention(model: Any, ids: Tensor, queries: int) -> dict[int, Attention]:
    """Return what every layer's attention is asked for the newest `queries` tokens of `ids`, with the full cache."""
    reader = Reader(model, Full())
    seen: dict[int, Attention] = {}
    plain = ALL_ATTENTION_FUNCTIONS[reader.attention]

    def probe(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        scaling = float(options.get("scaling") or query.shape[-1] ** -0.5)
        asked = (query.float(), key.float(), value.float(), scaling, options.get("softcap"), options.get("s_aux"))
        seen[module.layer_idx] = Attention(*asked)
        return plain(module, query, key, value, mask, **options)

    reader(ids[:-queries], keep=1)
    AttentionMaskInterface.register(PROBE, ALL_MASK_ATTENTION_FUNCTIONS[reader.attention])
    AttentionInterface.register(PROBE, probe)
    before, reader.attention = reader.attention, PROBE
    try:
        reader(ids[-queries:], keep=1)
    finally:
        model.set_attn_implementation(before)
        AttentionInterface.register(PROBE, plain)  # or the closure would hold on to all that it saw
    return seen


def _error(layer: PackedLayer, asked: Attention) -> float:
    layer.load(asked.key, asked.value, None)
    found = layer.attend(asked.query, None, None, asked.scaling, asked.softcap, asked.sink_logits).transpose(1, 2)
    expected = _exact(asked)
    return float((found - expected).norm() / expected.norm())


def _exact(asked: Attention) -> Tensor:
    groups = asked.query.shape[1] // asked.key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (asked.key, asked.value))
    logits = asked.query @ key.transpose(-1, -2) * asked.scaling
    if asked.softcap is not None:
        logits = asked.softcap * torch.tanh(logits / asked.softcap)
    new, tokens = logits.shape[-2:]
    logits = logits.masked_fill(~torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new), float("-inf"))
    if asked.sink_logits is not None:
        sink_logits = asked.sink_logits.float().reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sink_logits], -1).softmax(-1)[..., :-1] @ value
    return logits.softmax(-1) @ value
