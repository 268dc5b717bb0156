"""A model's forward through a contender's cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import attention
from ..forward import CACHE_ARGUMENT
from .contenders import Contender


class Reader:
    """A model that reads through one contender's cache."""

    def __init__(self, model: Any, contender: Contender) -> None:
        self.model, self.contender = model, contender
        # Some models have no sdpa; kvpack's function does on plain tensors what the model's own would.
        plain = Contender.attention if getattr(model, "_supports_sdpa", True) else attention.NAME
        self.attention = plain if contender.attention == Contender.attention else contender.attention
        self.cache = contender.new_cache(model)

    def prepare(self) -> None:
        """Set the model's attention implementation, unless it has this one: that takes a walk through its modules."""
        if self.model.config._attn_implementation != self.attention:
            self.model.set_attn_implementation(self.attention)

    def __call__(self, ids: Tensor, keep: int = 0) -> Tensor:
        """Feed `ids` `[n]`; return the logits `[n, vocabulary]`, or those of the last `keep` tokens."""
        self.prepare()
        arguments = {CACHE_ARGUMENT: self.cache, "use_cache": True, "logits_to_keep": keep}
        logits: Tensor = self.model(input_ids=ids[None], **arguments).logits[0]
        return logits

    def greedy(self, ids: Tensor, count: int) -> Iterator[int]:
        """Feed `ids`, then generate up to `count` tokens, always the likeliest, until the text ends."""
        ends = _end_tokens(self.model)
        for _ in range(count):
            token = int(self(ids, keep=1)[-1].argmax())
            yield token
            if token in ends:
                return
            ids = torch.tensor([token])


def _end_tokens(model: Any) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {ends}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Nothing is learned meanwhile, and the model is as it was afterwards."""
    before, training = model.config._attn_implementation, model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)
