"""A model's forward over a document, with the keys and values that it made."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# What `generate` calls its cache: transformers 5.24 renamed it, and warns of the old name.
CACHE_ARGUMENT = (
    "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)


def forward(model: Any, ids: Tensor, *, first: int = 0, gradients: bool = False) -> tuple[Cache, Tensor]:
    """Read tokens on an empty cache.

    Args:
        model: the transformers model.
        ids: tokens `[1, n]`.
        first: the position of the first one.
        gradients: whether what is returned is part of a graph.

    Returns:
        The cache, whose layers have all keys and values `[1, H, n, D]`, and the mean loss of the next token.
    """
    cache = DynamicCache(config=model.config)
    # All tokens are wanted, those too that a sliding window passes: masks say what is seen.
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    arguments: dict[str, Any] = {CACHE_ARGUMENT: cache, "use_cache": True}
    if first and "position_ids" in signature(model.forward).parameters:
        arguments["position_ids"] = torch.arange(first, first + ids.shape[1])[None]
    with torch.set_grad_enabled(gradients):
        if gradients and not any(parameter.requires_grad for parameter in model.parameters()):
            arguments["inputs_embeds"] = model.get_input_embeddings()(ids).detach().requires_grad_()
        else:
            arguments["input_ids"] = ids
        logits = model(**arguments).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:])
    return cache, loss
