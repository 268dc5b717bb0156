"""`generate`: kvpack through transformers' own plug-in point for ways of generating."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.generation.utils import GENERATION_MODES_MAPPING

from . import models
from .cache import PackedCache
from .encoder_decoder import PackedEncoderDecoderCache
from .errors import OptionError
from .forward import CACHE_ARGUMENT
from .methods import Evict, Prune, Quantize, Select


def new_cache(model: Any, *, cross: Quantize | None = None, **methods: Any) -> tuple[Cache, PackedCache]:
    """An empty cache for a generation, and what of it holds the decoder's own tokens.

    Args:
        model: the model.
        cross: as in PackedEncoderDecoderCache.
        methods: as in PackedCache.

    Raises:
        OptionError: as PackedCache, or `cross` is given for a model without an encoder.
    """
    if models.has_encoder(model):
        both = PackedEncoderDecoderCache(model, cross=cross, **methods)
        return both, both.self_attention_cache
    if cross is not None:
        raise OptionError(f"cross={cross!r} is not accepted for a model without an encoder; accepted: quantize=")
    cache = PackedCache(model, **methods)
    return cache, cache


def generate(
    model: Any,
    input_ids: Tensor,
    *,
    evict: Evict | None = None,
    quantize: Quantize | None = None,
    select: Select | None = None,
    prune: Prune | None = None,
    cross: Quantize | None = None,
    inputs_tensor: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Generates with a packed cache: `model.generate(**inputs, custom_generate=kvpack.generate, quantize=...)`.

    transformers calls it with everything prepared; it puts a packed cache in the place of the empty one and goes on as
    the model would: greedily, by sampling, with beams or with prompt lookup. Nothing of the model is changed, its
    attention neither: load it with `attn_implementation="kvpack"` to have the cache read in place. transformers gives
    such functions neither streamers nor assistant models: use `kvpack.attach` for these.

    Args:
        model: the model.
        input_ids: tokens of the prompts.
        evict: as in PackedCache.
        quantize: as in PackedCache.
        select: as in PackedCache.
        prune: as in PackedCache.
        cross: as in PackedEncoderDecoderCache.
        inputs_tensor: the model's first inputs.
        kwargs: what transformers prepared.

    Raises:
        OptionError: as PackedCache, or transformers does not do by itself what was asked for.
    """
    cache, _ = new_cache(model, evict=evict, quantize=quantize, select=select, prune=prune, cross=cross)
    return run(model, input_ids, cache, inputs_tensor, kwargs)


def run(model: Any, input_ids: Tensor, cache: Cache, inputs_tensor: Tensor | None, kwargs: dict[str, Any]) -> Any:
    """Generates as the model would, with `cache` in the place of what transformers prepared."""
    mode = kwargs["generation_config"].get_generation_mode(kwargs.get("assistant_model"))
    method = getattr(type(model), GENERATION_MODES_MAPPING[mode], None)
    if method is None:
        raise OptionError(
            f"custom_generate: given kvpack.generate for {mode.value!r}, which transformers does not do by itself; "
            "expected greedy search, sampling, beams or prompt lookup"
        )
    if "inputs_tensor" in inspect.signature(method).parameters:
        kwargs["inputs_tensor"] = inputs_tensor
    if kwargs.get("use_cache", True):
        kwargs[CACHE_ARGUMENT] = cache
    return method(model, input_ids, **kwargs)
