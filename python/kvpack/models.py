"""What kvpack can do for a model: read its cache in place, leave its attention to itself, or refuse it.

kvpack's attention function takes the place of torch's SDPA. It may do so where a model's attention is a function that
is looked up by name, that gets nothing which kvpack does not know, and that does not depend on the name. This module
finds that out from the model's source. Any other model keeps its own attention, whatever name it was asked for: that
is right with a PackedCache too, whose keys and values are then dequantised at each step.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from .errors import DeviceError, OptionError
from .source import bases_of, parts_of, sources_of

NAME = "kvpack"

# Arguments that kvpack's attention function takes and heeds.
HEEDED = frozenset({"attention_mask", "scaling", "dropout", "softcap", "s_aux", "is_causal", "position_bias"})
# Arguments that change nothing where kvpack's attention function runs.
HARMLESS = frozenset(
    {
        # Keys and queries are rotated already.
        "position_ids",
        "cache_position",
        # The mask says it: transformers makes one wherever the window hides a token.
        "sliding_window",
        # What the model returns beside hidden states; as with SDPA, weights of attention are never formed.
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
        "logits_to_keep",
        # Of the loss.
        "num_items_in_batch",
        # Of flash attention and of state spaces: where packed sequences begin. For attention the mask says it.
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "deterministic",
    }
)

# What the source does not tell, by model type.
_OWN = {"deepseek_v4": "adds its compressor's bias to the mask that it is given, which has to be additive"}

# By model type: models that do not hand keys and values to a cache that they are given, and what they do instead.
_REFUSED = {
    "minimax": "works with a cache class of its own alone",
    "openai-gpt": "computes everything anew for each token",
    "reformer": "keeps hashed buckets of its own",
    "rwkv": "keeps the states of a recurrence of its own",
    "xlnet": "keeps memories of its own",
    "xlstm": "keeps the states of a recurrence of its own",
}

# transformers' classes whose own `generate` calls the general one for each part of the input, with what else it got.
_SEVERAL = frozenset({"whisper"})

# Decoders of models that do not say so and yet read another part's tokens through an EncoderDecoderCache.
_READS_AN_ENCODER = frozenset({"blip_text_model"})

# transformers' classes whose own `generate` calls one decoder's, once, with the arguments that are left.
_DELEGATES = frozenset(
    {
        "blip",
        "blip_2",
        "granite_speech",
        "granite_speech_plus",
        "instructblip",
        "instructblipvideo",
        "kosmos2",
        "kyutai_speech_to_text",
    }
)


@functools.cache
def own_attention(model_class: type[PreTrainedModel]) -> str | None:
    """Why kvpack's attention function cannot stand in for a model's own; None where it can."""
    config_class = getattr(model_class, "config_class", None)
    model_type = getattr(config_class, "model_type", None)
    if model_type in _OWN:
        return _OWN[model_type]
    composed = bool(getattr(config_class, "sub_configs", None))  # then the parts that attend are asked themselves
    parts = list(parts_of(model_class))
    attention = [(name, source) for name, source in parts if "Attention" in name]
    for name, source in attention:
        if source.updates and not source.uses_interface:
            return f"has attention code of its own ({name})"
    if attention and not composed and not any(source.uses_interface for _, source in attention):
        return f"has attention code of its own ({attention[0][0]})"
    if any(base.__name__ not in sources_of(base.__module__) for base in bases_of(model_class)) and not attention:
        return "is made of code whose source is not to be had"
    for name, source in parts:
        if source.picks or (source.compares and "Attention" in name):
            return f"does something else by the name of its attention ({name})"
    reading = [(name, source) for name, source in attention if source.updates]
    for name, source in reading:
        unknown = sorted(source.passed - HEEDED - HARMLESS)
        if unknown:
            return f"hands its attention {', '.join(unknown)}, of which kvpack's knows nothing ({name})"
    capped = any(source.passed & {"softcap", "s_aux"} for _, source in reading)
    if reading and not capped and not getattr(model_class, "_supports_sdpa", False):
        return f"supports eager attention alone, with an additive mask ({reading[0][0]})"
    return None


def _why_own(model: PreTrainedModel) -> str | None:
    model_class: Any = type(model)
    return own_attention(model_class)


@functools.cache
def passes(module_class: Any, argument: str) -> bool:
    """Whether an attention module of this class hands this argument to its attention function on purpose.

    What it only lets through from the model's caller is read by none of transformers' attention functions. Where the
    source is not to be had the answer is yes.
    """
    sources = [sources_of(base.__module__).get(base.__name__) for base in bases_of(module_class)]
    known = [source for source in sources if source is not None and source.passed]
    return not known or any(argument in source.passed for source in known)


# ---- what is served ----------------------------------------------------------------------------------------------


def choose_by_model() -> None:
    """Makes `attn_implementation="kvpack"` mean a model's own attention where kvpack's cannot stand in for it.

    transformers asks `get_correct_attn_implementation` of each model, and part of one, when it is made and when its
    attention is set: the place where it falls back from SDPA to eager attention. A registered name passes there
    unseen, and models that do not know it then fail (`KeyError`), get masks that they cannot read, or drop what they
    would tell SDPA.
    """
    method = PreTrainedModel.get_correct_attn_implementation
    if hasattr(method, "_kvpack"):
        return

    @functools.wraps(method)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        reason = _why_own(self) if requested_attention == NAME else None
        if reason is not None:
            before = self.config._attn_implementation
            requested_attention = None if before == NAME else before
        chosen: str = method(self, requested_attention, *args, **kwargs)
        if reason is not None:
            warnings.warn(
                f"{type(self).__name__} {reason}: it runs with attention {chosen!r} instead of {NAME!r}. A PackedCache "
                "is right with it, and dequantises its keys and values at each step.",
                stacklevel=2,
            )
        return chosen

    get_correct_attn_implementation._kvpack = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation


def implementations(model: Any) -> list[str | None]:
    """The names of the attention that a model and its parts run with, for `set_implementations`."""
    return [config._attn_implementation for config in _configs(model)]


def set_implementations(model: Any, names: Sequence[str | None]) -> None:
    """Give a model, or a copy of it, back what `implementations` said.

    transformers' own `set_attn_implementation` would refuse a name that some part does not know.
    """
    for config, name in zip(_configs(model), names, strict=True):
        config._attn_implementation = name


def _configs(model: Any) -> list[Any]:
    """The configurations of a model and of its parts, each before those within it."""

    def within(config: Any) -> list[Any]:
        parts = (getattr(config, name, None) for name in config.sub_configs)
        return [config, *chain.from_iterable(within(part) for part in parts if part is not None)]

    modules = (module.config for module in model.modules() if isinstance(module, PreTrainedModel))
    return list({id(config): config for config in chain.from_iterable(map(within, modules))}.values())


def decoder_config(model_or_config: Any) -> Any:
    """The configuration of the part that generates text."""
    config = getattr(model_or_config, "config", model_or_config).get_text_config(decoder=True)
    layers = getattr(config, "num_decoder_layers", None)
    if layers is not None and layers != config.num_hidden_layers:
        # T5 and its like: what they call layers are the encoder's, in the model's configuration, not in the decoder's.
        config = copy.deepcopy(config)
        config.num_hidden_layers = layers
    return config


def why_not_in_place(model: PreTrainedModel) -> str | None:
    """Why kvpack's attention cannot read the cache of this model's decoder; None where it can."""
    configs = (model.config, decoder_config(model))
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and any(part.config is config for config in configs):
            reason = _why_own(part)
            if reason is not None:
                return f"{type(part).__name__} {reason}"
    return None


def check(model_or_config: Any) -> None:
    """Refuses what a PackedCache is not right for.

    Args:
        model_or_config: a transformers model or its configuration.

    Raises:
        OptionError: it is neither, or a model that does not hand keys and values to its cache.
        DeviceError: the model computes on an accelerator.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "get_text_config"):
        raise OptionError(
            f"model_or_config: given a {type(model_or_config).__name__}, "
            "expected a transformers model or its configuration"
        )
    device = getattr(model_or_config, "device", None)
    # Weights that accelerate keeps on disk are on "meta" between two forwards, and computed with on the CPU.
    if isinstance(device, torch.device) and device.type not in ("cpu", "meta"):
        raise DeviceError(f"model: given one on device {device}, expected cpu: kvpack computes in CPU memory")
    model_type = getattr(decoder_config(config), "model_type", None)
    if model_type in _REFUSED:
        raise OptionError(
            f"model_or_config: given a model of type {model_type!r}, which {_REFUSED[model_type]}; expected a model "
            "that hands its keys and values to a cache (this one generates without a PackedCache)"
        )


def has_encoder(model_or_config: Any) -> bool:
    """Whether the decoder reads another part's tokens too, which an EncoderDecoderCache holds apart."""
    config = getattr(model_or_config, "config", model_or_config)
    kind = getattr(decoder_config(config), "model_type", None)
    return bool(getattr(config, "is_encoder_decoder", False)) or kind in _READS_AN_ENCODER


def given_alone() -> OptionError:
    """What to raise where a model with an encoder uses a PackedCache for attention to the encoder too."""
    return OptionError(
        "cache: given a PackedCache alone to a model with an encoder, expected "
        "kvpack.PackedEncoderDecoderCache(model): attention to the encoder has a cache of its own"
    )


def generates_several(model: Any) -> bool:
    """Whether the model's own `generate` runs transformers' several times, and passes `custom_generate` on to it."""
    return _family(model) in _SEVERAL


def _family(model: Any) -> str | None:
    """Which of transformers' models the model's own `generate` is of; None where it is transformers' general one."""
    generate = getattr(type(model), "generate", None)
    module = getattr(generate, "__module__", "")
    own = generate is not GenerationMixin.generate and module.startswith("transformers.models.")
    return module.split(".")[2] if own else None


def check_generate(model: Any) -> None:
    """Refuses to attach to a model whose `generate` is its own and may use one cache for several generations.

    Raises:
        OptionError: it is such a model.
    """
    family = _family(model)
    if family is not None and family not in _DELEGATES | _SEVERAL:
        raise OptionError(
            f"model: given a {type(model).__name__}, whose generate is its own and may run several generations, which "
            "one cache cannot serve; expected the part of it that generates text (or give generate a cache, where a "
            "call of it is one generation)"
        )


_KINDS = (
    ("Indexed", "sparse attention with an index of its own"),
    ("LinearAttention", "states of a recurrence, no attention"),
    ("Dummy", "another layer's keys and values, or no attention"),
)


def describe_unpacked(layers: Sequence[Any]) -> str:
    """A sentence that says why none of a cache's layers is packed."""
    kinds: dict[str, int] = {}
    for layer in layers:
        name = type(layer).__name__
        kinds[name] = kinds.get(name, 0) + 1
    told = []
    for name, count in kinds.items():
        why = next((why for part, why in _KINDS if part in name), "a kind of its own")
        told.append(f"{count} {name} ({why})")
    return (
        "nothing is packed: kvpack packs layers of full attention, of sliding windows and of chunks; this model has "
        f"{' and '.join(told) or 'none'}. "
        "They stay transformers' own, and quantize=, evict= and select= do nothing."
    )
