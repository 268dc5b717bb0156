"""A model with the caches that it is run with, and the forwards and generations that all modes are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import kvpack
import torch
from kvpack.forward import CACHE_ARGUMENT
from kvpack.models import has_encoder
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin

from .inputs import Inputs, picture_of

FIRST_ID, LAST_ID = 4, 96  # above are images and the like
PROMPT = 24  # more than a window of 16


def tokens(rows: int, n: int, seed: int = 0) -> Tensor:
    """Ids `[rows, n]` of ordinary tokens."""
    return torch.randint(FIRST_ID, LAST_ID, (rows, n), generator=torch.Generator().manual_seed(seed))


@dataclass
class Subject:
    """A model, and how a cache for it is made.

    Attributes:
        model: a tiny one.
        make: an empty cache, with kvpack's options where it is one of kvpack's.
        attachment: what `kvpack.attach` returned, where that is how it is used.
        inputs: what each of its forwards needs beside tokens, for one row.
        picture: a prompt with an image in it, and the image.
    """

    model: Any
    make: Callable[..., Cache]
    attachment: Any = None
    inputs: Inputs = field(default_factory=dict)
    picture: tuple[Tensor, Inputs] | None = None

    @property
    def has_encoder(self) -> bool:
        """Whether tokens go to a decoder, and something else to an encoder."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def extra(self, rows: int) -> dict[str, Any]:
        """What a forward of so many rows needs beside tokens."""
        dtype = next(self.model.parameters()).dtype
        extra = {}
        for name, value in self.inputs.items():
            value = value.repeat(rows, *[1] * (value.dim() - 1))
            extra[name] = value.to(dtype) if value.is_floating_point() else value
        if self.has_encoder and not extra:
            extra["input_ids"] = tokens(rows, 9, seed=7)
        return extra

    def forward(self, cache: Cache, ids: Tensor | None, mask: Tensor | None = None, **more: Any) -> Tensor:
        """Logits of a forward of these tokens; `mask` is of all tokens so far, these included."""
        rows = len(more["inputs_embeds"]) if ids is None else len(ids)
        side = "decoder_" if self.has_encoder else ""
        given = {f"{side}input_ids": ids, f"{side}attention_mask": mask, **self.extra(rows)}
        given.update({side + name if name in ("inputs_embeds", "position_ids") else name: more[name] for name in more})
        given = {name: value for name, value in given.items() if value is not None}
        logits: Tensor = self.model(**given, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
        return logits.float()

    def generate(self, ids: Tensor, cache: Cache | None = None, **options: Any) -> Any:
        """What `generate` says after these tokens: with this cache, or an attached model's own."""
        if cache is None and self.attachment is None:
            cache = self.make()
        given = {"decoder_input_ids" if self.has_encoder else "input_ids": ids, **self.extra(len(ids)), **options}
        if cache is not None:
            given[CACHE_ARGUMENT] = cache
        return self.model.generate(
            **{"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8, **given}
        )


def subject_of(model: Any, make: Callable[..., Cache], inputs: Inputs, attachment: Any = None) -> Subject:
    """A model with what it needs, and an image where it sees."""
    picture = picture_of(model, tokens(1, PROMPT))
    forget(model)
    return Subject(model, make, attachment, inputs, picture)


def _pair(model: Any, cache: Cache) -> Cache:
    """With the cache of the attention to the encoder, where there is one."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return cache
    return EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))


def _packed(model: Any, **options: Any) -> Cache:
    kind = kvpack.PackedEncoderDecoderCache if has_encoder(model) else kvpack.PackedCache
    return kind(model, **options)


def reference(model: Any, inputs: Inputs) -> Subject:
    """The model as transformers runs it."""
    return subject_of(model, lambda: _pair(model, DynamicCache(config=model.config)), inputs)


def loaded(model: Any, inputs: Inputs) -> Subject:
    """A model that was loaded by the name of kvpack's attention, with caches made by hand."""
    return subject_of(model, lambda **options: _packed(model, **options), inputs)


@contextmanager
def attached(model: Any, inputs: Inputs) -> Iterator[Subject]:
    """A copy of the model that kvpack is attached to."""
    model = copy.deepcopy(model)
    with kvpack.attach(model) as attachment:

        def make(**options: Any) -> Cache:
            return _packed(model, **options) if options else attachment.make_cache()

        yield subject_of(model, make, inputs, attachment)


def perturbed(model: Any, inputs: Inputs, relative: float, seed: int) -> Subject:
    """As transformers runs it, with keys and values that differ by so much of their deviation when they are stored."""
    generator = torch.Generator().manual_seed(seed)

    def moved(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator).to(x.dtype)
        return x + relative * noise * x.std() if x.numel() > 1 else x

    def perturbing(layer: Any) -> Any:
        base = type(layer)
        if not isinstance(layer, CacheLayerMixin):
            return layer

        def update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return base.update(self, moved(key_states), moved(value_states), *args, **kwargs)

        layer.__class__ = type(base.__name__, (base,), {"update": update, "_layer_type": None})
        return layer

    def make() -> Cache:
        cache = DynamicCache(config=model.config)
        cache.layers = [perturbing(layer) for layer in cache.layers]
        return _pair(model, cache)

    return subject_of(model, make, inputs)


def forget(model: Any) -> None:
    """Lets a model forget what it remembers of the prompt before: some keep offsets of positions of their own."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def self_attention(cache: Cache) -> Any:
    """What of a cache holds the decoder's own tokens."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
