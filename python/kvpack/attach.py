"""`attach`: a model, and pipelines around it, generate with a packed cache without further words."""

from __future__ import annotations

import functools
import warnings
from types import TracebackType
from typing import Any

from torch import Tensor
from transformers import Cache

from . import models
from .cache import PackedCache
from .errors import OptionError
from .forward import CACHE_ARGUMENT
from .generation import new_cache, run
from .methods import Evict, Prune, Quantize, Select


class _Generate:
    """A model's `generate` that makes a packed cache for every call, as long as its attachment holds."""

    def __init__(self, attachment: Attachment, own: Any) -> None:
        """Around `own`, somebody else's wrapper, or the `generate` of the model's class if that is None."""
        if own is not None or hasattr(type(attachment.model), "generate"):
            functools.update_wrapper(self, own or _generate_of(attachment.model))
        self.attachment = attachment  # last: `own` may be a wrapper that took an earlier wrapper's attributes
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's `generate`."""
        attachment = self.attachment
        if attachment.attached and _wants_our_cache(attachment.model, args, kwargs):
            if models.generates_several(attachment.model):
                kwargs["custom_generate"] = attachment.generate_each
            else:
                kwargs[CACHE_ARGUMENT] = attachment.make_cache()
        generate = self.own or _generate_of(attachment.model)
        return generate(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Generate:
        """The wrapper of the model's copy: attached likewise, with caches of its own."""
        model = memo.get(id(self.attachment.model))
        return self if model is None else self.attachment.copy_for(model, self.own)


class Attachment:
    """What `attach` returns: a handle that undoes it, and a context manager that does so at its end.

    Attributes:
        cache: the newest cache that was made.
        model: the model.
        attached: whether `model.generate` still makes packed caches.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        """Attaches; see `attach`."""
        self.model = model
        self._options = options
        self.cache: PackedCache | None = new_cache(model, **options)[1]  # also checks them
        self._before = models.implementations(model)
        if models.why_not_in_place(model) is None:
            model.set_attn_implementation(models.NAME)
        self.attached = True
        self._wrapper = _Generate(self, model.__dict__.get("generate"))
        model.generate = self._wrapper

    def make_cache(self) -> Cache:
        """A fresh cache for a call of `generate`; `cache` is what of it is packed."""
        made, self.cache = new_cache(self.model, **self._options)
        return made

    def generate_each(
        self, model: Any, input_ids: Tensor, *, inputs_tensor: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """One of several generations that the model's own `generate` runs."""
        return run(model, input_ids, self.make_cache(), inputs_tensor, kwargs)

    def copy_for(self, model: Any, own: Any) -> _Generate:
        """The wrapper of a copy of the model, which may still be in the making."""
        other = object.__new__(Attachment)
        other.__dict__.update(self.__dict__)
        other.model, other.cache = model, None
        other._wrapper = _Generate(other, own)
        return other._wrapper

    def detach(self) -> None:
        """Gives the model its own `generate` and attention implementation back; a second call does nothing.

        If somebody has wrapped `model.generate` since, that wrapper stays, and ours inside it only passes calls on.
        """
        if not self.attached:
            return
        self.attached = False
        if self.model.__dict__.get("generate") is self._wrapper:
            del self.model.generate
            if self._wrapper.own is not None:
                self.model.generate = self._wrapper.own
        models.set_implementations(self.model, self._before)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()


def attach(
    model: Any,
    *,
    evict: Evict | None = None,
    quantize: Quantize | None = None,
    select: Select | None = None,
    prune: Prune | None = None,
    cross: Quantize | None = None,
) -> Attachment:
    """Makes `model.generate`, and pipelines around the model, use a fresh PackedCache at every call.

    A call that names its own cache, `cache_implementation` or `use_cache=False` is left alone. Where the model's own
    generation config does so, each such call warns. A model whose attention kvpack's cannot stand in for keeps its
    own. A `copy.deepcopy` of the model is attached likewise.

    Args:
        model: a transformers model on the CPU; of one with an encoder a PackedEncoderDecoderCache is made.
        evict: as in `PackedCache`.
        quantize: as in `PackedCache`.
        select: as in `PackedCache`.
        prune: as in `PackedCache`.
        cross: as in `PackedEncoderDecoderCache`, for a model with an encoder.

    Returns:
        A handle with `detach()` and `cache` (the last one made), also usable in a `with` statement.

    Raises:
        OptionError: as PackedCache, or the model is attached already, or its `generate` is its own and may run
            several generations.
    """
    if not hasattr(model, "generate") or not hasattr(model, "set_attn_implementation"):
        raise OptionError(f"model: given a {type(model).__name__}, expected a transformers model that generates")
    if _attached(model):
        raise OptionError("model: given one that kvpack is attached to already, expected detach() first")
    models.check_generate(model)
    methods = {"evict": evict, "quantize": quantize, "select": select, "prune": prune}
    return Attachment(model, {**methods, "cross": cross})


def _generate_of(model: Any) -> Any:
    """`model.generate` as its class has it, or as it passes it on from what it wraps."""
    generate = getattr(type(model), "generate", None)
    return model.__getattr__("generate") if generate is None else generate.__get__(model)


def _attached(model: Any) -> bool:
    """Whether the model's `generate`, or what it wraps, makes packed caches."""
    generate = model.__dict__.get("generate")
    while generate is not None:
        if isinstance(generate, _Generate) and generate.attachment.attached:
            return True
        generate = generate.own if isinstance(generate, _Generate) else getattr(generate, "__wrapped__", None)
    return False


def _wants_our_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate` is left to kvpack; warns where the model's own defaults say it is not."""
    if any(kwargs.get(name) is not None for name in ("past_key_values", "cache", "custom_generate")):
        return False
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")

    def setting(name: str) -> tuple[Any, bool]:
        """What `generate` will take, and whether the caller said it."""
        asked = kwargs[name] if name in kwargs else getattr(given, name, None)
        return (getattr(model.generation_config, name, None), False) if asked is None else (asked, True)

    for name, kept in (("use_cache", (None, True)), ("cache_implementation", (None, "hybrid"))):
        value, said = setting(name)
        if value in kept:  # generate itself takes "hybrid", which old checkpoints say, for nothing
            continue
        if not said:
            warnings.warn(
                f"this call of generate does not use kvpack: model.generation_config.{name} is {value!r}; set it to "
                f"{kept[-1] if name == 'use_cache' else None} to have packed caches",
                stacklevel=3,
            )
        return False
    return True
