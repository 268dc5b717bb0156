"""`attach`: a model, and pipelines around it, generate with a packed cache without further words."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

from . import attention
from .cache import PackedCache
from .errors import OptionError
from .forward import CACHE_ARGUMENT
from .methods import Evict, Quantize, Select


class Attachment:
    """What `attach` returns: a handle that undoes it, and a context manager that does so at its end."""

    def __init__(self, model: Any, evict: Evict | None, quantize: Quantize | None, select: Select | None) -> None:
        """Attaches; see `attach`."""
        options: dict[str, Any] = {"evict": evict, "quantize": quantize, "select": select}
        self.cache: PackedCache | None = PackedCache(model, **options)  # also checks them
        self._model = model
        self._before = model.config._attn_implementation
        model.set_attn_implementation(attention.NAME)
        self._own_generate = model.__dict__.get("generate")  # somebody else's wrapper, if any
        generate = model.generate

        @functools.wraps(generate)
        def with_packed_cache(*args: Any, **kwargs: Any) -> Any:
            if _wants_our_cache(model, args, kwargs):
                kwargs[CACHE_ARGUMENT] = self.cache = PackedCache(model, **options)
            return generate(*args, **kwargs)

        with_packed_cache._kvpack = self  # type: ignore[attr-defined]
        model.generate = with_packed_cache

    def detach(self) -> None:
        """Gives the model its own `generate` and attention implementation back; a second call does nothing."""
        if getattr(self._model.__dict__.get("generate"), "_kvpack", None) is self:
            del self._model.generate
            if self._own_generate is not None:
                self._model.generate = self._own_generate
            self._model.set_attn_implementation(self._before)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()


def attach(
    model: Any, *, evict: Evict | None = None, quantize: Quantize | None = None, select: Select | None = None
) -> Attachment:
    """Makes `model.generate`, and pipelines around the model, use a fresh PackedCache at every call.

    A call that names its own cache, `cache_implementation` or `use_cache=False` is left alone.

    Args:
        model: a transformers model on the CPU.
        evict: as in `PackedCache`.
        quantize: as in `PackedCache`.
        select: as in `PackedCache`.

    Returns:
        A handle with `detach()` and `cache` (the last one made), also usable in a `with` statement.

    Raises:
        OptionError: as PackedCache, or the model is attached already.
    """
    if not hasattr(model, "generate") or not hasattr(model, "set_attn_implementation"):
        raise OptionError(f"model: given a {type(model).__name__}, expected a transformers model that generates")
    if hasattr(model.__dict__.get("generate"), "_kvpack"):
        raise OptionError("model: given one that kvpack is attached to already, expected detach() first")
    return Attachment(model, evict, quantize, select)


def _wants_our_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    config = given or model.generation_config

    def setting(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    return (
        all(kwargs.get(name) is None for name in ("past_key_values", "cache"))
        and setting("use_cache") is not False
        and setting("cache_implementation") is None
    )
