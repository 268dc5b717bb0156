"""Which model a cache, or a calibration, was made for."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import models
from .errors import ModelMismatchError

_FINGERPRINT = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def attribute(config: Any, name: str) -> Any:
    """An attribute of a configuration; None without, or where each layer has its own, which is an error there."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def fingerprint(config: Any) -> dict[str, Any]:
    """What tells one model's cache from another's."""
    return {name: attribute(config, name) for name in _FINGERPRINT}


def head_dim(config: Any) -> int | None:
    """Numbers of a key and of a value, where the configuration tells, and it is the same in all layers."""
    dim = attribute(config, "head_dim")
    width, heads = attribute(config, "hidden_size"), attribute(config, "num_attention_heads")
    if dim is None and isinstance(width, int) and isinstance(heads, int) and heads:
        dim = width // heads  # GPT-2 and its like do not name it
    # Not where keys are latent (MLA), or layers have head dims of their own (Gemma 4): the first tokens tell.
    own = any(attribute(config, name) is not None for name in ("kv_lora_rank", "global_head_dim"))
    return dim if isinstance(dim, int) and not own else None


def check_model(layer: Any, module: nn.Module) -> None:
    """Raises ModelMismatchError when `module` belongs to another model than the one its cache was made for."""
    config = getattr(module, "config", None)
    if config is None or config is layer.config or layer.config is None:
        return
    given, expected = fingerprint(models.decoder_config(config)), fingerprint(layer.config)
    different = [name for name in _FINGERPRINT if given[name] != expected[name]]
    if different:
        raise ModelMismatchError(
            "this cache was made for another model: given "
            + ", ".join(f"{name}={given[name]}" for name in different)
            + "; expected "
            + ", ".join(f"{name}={expected[name]}" for name in different)
        )
    layer.config = config  # the same model by another name: no need to compare again
