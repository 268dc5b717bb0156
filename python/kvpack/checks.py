"""What a cache is made of: checked before there is one."""

from __future__ import annotations

from typing import Any

from .errors import OptionError
from .identity import attribute
from .methods import EVICT, SELECT, Evict, Exact, Quantize, Select
from .methods.spec import accepted_quantize


def checked_codec(quantize: Quantize | None) -> Quantize:
    """The codec."""
    quantize = Exact() if quantize is None else quantize
    if not isinstance(quantize, Quantize):
        raise OptionError(f"quantize={quantize!r} is not accepted; accepted: {accepted_quantize(quantize)}")
    return quantize


def checked_eviction(evict: Evict | None, quantize: Quantize, config: Any) -> Evict | None:
    """The eviction, if it goes with the codec and the model."""
    if evict is not None and not isinstance(evict, Evict):
        accepted = ", ".join(f"kvpack.{method.__name__}(...)" for method in EVICT.values())
        raise OptionError(f"evict={evict!r} is not accepted; accepted: {accepted}, or None to keep all tokens")
    if evict is not None and quantize.needs_neighbours:
        raise OptionError(
            f"evict={evict!r} is not accepted with {type(quantize).__name__}: its keys before RoPE are held in runs of "
            "consecutive positions; accepted: codecs that hold keys as they are attended to"
        )
    if evict is not None and quantize.centers() and evict.reads_keys:
        raise OptionError(
            f"evict={evict!r} is not accepted with {quantize!r}: it looks at keys, which are held less their mean; "
            "accepted: center=False, or evictions by attention or position"
        )
    attention = getattr(config, "attn_config", None)
    if evict is not None and (
        getattr(config, "model_type", None) == "bloom"
        or getattr(config, "alibi", False)
        or getattr(attention, "alibi", 0)
    ):
        raise OptionError(
            f"evict={evict!r} is not accepted for a model of type {config.model_type!r} with ALiBi: logits are biased "
            "by the number of tokens in between, of which some would be gone; accepted: None"
        )
    return evict


def checked_select(select: Select | None) -> Select | None:
    """The selection."""
    if select is not None and not isinstance(select, Select):
        accepted = ", ".join(f"kvpack.{method.__name__}(...)" for method in SELECT.values())
        raise OptionError(f"select={select!r} is not accepted; accepted: {accepted}, or None to read all tokens")
    return select


def head_dim(config: Any) -> int | None:
    """Numbers of a key and of a value, where the configuration tells, and it is the same in all layers."""
    dim = attribute(config, "head_dim")
    width, heads = attribute(config, "hidden_size"), attribute(config, "num_attention_heads")
    if dim is None and isinstance(width, int) and isinstance(heads, int) and heads:
        dim = width // heads  # GPT-2 and its like do not name it
    # Not where keys are latent (MLA), or layers have head dims of their own (Gemma 4): the first tokens tell.
    own = any(attribute(config, name) is not None for name in ("kv_lora_rank", "global_head_dim"))
    return dim if isinstance(dim, int) and not own else None
