"""What tests of evaluations share."""

from __future__ import annotations

from typing import Any

import torch
from kvpack.evaluation import Evaluation
from kvpack.evaluation.contenders import Quantized
from transformers import DynamicCache

WORDS = "The harbour was quiet. A boat came in, and nobody spoke of it! " * 200
METHODS = "exact,kivi:bits=8,kivi:bits=4,kivi:bits=2"
SMALL: dict[str, Any] = {"context": 300, "tokens": 1200, "chunk": 64, "greedy": 6, "greedy_prompts": 2}


def rows(result: Evaluation) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in result.rows}


class Fragile(Quantized):
    """transformers' cache with a backend that cannot read some prompts."""

    backend, module, package, axis = "fragile", "torch", "torch", 0

    def new_cache(self, model: Any) -> Any:
        cache = DynamicCache(config=getattr(model, "config", model))
        update = cache.update

        def failing(keys: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if keys.shape[2] > 128:
                raise RuntimeError("an odd number\nof tokens")
            return update(keys, *args, **kwargs)

        cache.update = failing  # type: ignore[method-assign]
        return cache
