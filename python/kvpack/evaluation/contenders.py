"""What is compared: packed caches, and caches of transformers to hold them against."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .. import attention
from ..cache import PackedCache
from ..errors import OptionError
from ..methods import Calibrated, Heads, Method, Slice
from ..methods.spec import Spec, make, names, parse_spec, spell, split, split_parameters

FULL = "full"


class Contender(ABC):
    """One way to keep the past while a model reads a text.

    Attributes:
        attention: the attention implementation that the model runs with.
    """

    attention: ClassVar[str] = "sdpa"

    @property
    @abstractmethod
    def label(self) -> str:
        """Its name in tables."""

    @property
    def files(self) -> str:
        """A hash of the files that it was made from, whose content its label does not say; empty for most."""
        return ""

    @abstractmethod
    def new_cache(self, model: Any) -> Any:
        """Return an empty cache for `model`, or for its configuration."""

    def lossy_share(self, cache: Any, new: int, full_bytes: int) -> float:
        """Return the share of the past that `cache` does not hold as the model made it.

        Args:
            cache: after a forward of `new` tokens; they are not part of their own past.
            new: how many they were.
            full_bytes: bytes of the full cache then.
        """
        return max(0.0, 1 - held_bytes(cache) / full_bytes)


def held_bytes(cache: Any) -> int:
    """Return the bytes that `cache` holds, measured: `PackedCache.memory().total`, or the bytes of its tensors."""
    if isinstance(cache, PackedCache):
        return cache.memory().total
    return sum(_layer_bytes(layer) for layer in cache.layers)


def _layer_bytes(layer: Any) -> int:
    """All tensors of a layer, however deep in tuples and dictionaries (hqq keeps its codes beside their scales)."""
    seen: set[int] = set()

    def size(value: Any) -> int:
        if hasattr(type(value), "__tensor_flatten__"):  # a tensor that is made of others (quanto)
            return sum(size(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if value.device.type == "meta" or storage.data_ptr() in seen:
                return 0
            seen.add(storage.data_ptr())
            return int(storage.nbytes())
        if isinstance(value, Mapping):
            return sum(size(item) for item in value.values())
        if isinstance(value, (tuple, list)):
            return sum(size(item) for item in value)
        return 0

    return size(vars(layer))


@dataclass(frozen=True)
class Packed(Contender):
    """A PackedCache."""

    attention: ClassVar[str] = attention.NAME
    spec: Spec

    @property
    def label(self) -> str:
        """As it was written."""
        return self.spec.label

    @property
    def files(self) -> str:
        """Of its calibrations."""
        return "".join(sorted(set(_calibrations(self.spec.options))))

    def new_cache(self, model: Any) -> Any:
        """Return an empty PackedCache."""
        return PackedCache(model, **self.spec.options)

    def lossy_share(self, cache: Any, new: int, full_bytes: int) -> float:
        """Return what the cache says."""
        return float(cache.lossy_share(new))


def _calibrations(part: Any) -> Iterator[str]:
    """The hashes of all calibrations among methods, and within them."""
    if isinstance(part, Calibrated | Heads | Slice) and part.sha256 is not None:
        yield part.sha256
    if isinstance(part, Calibrated):
        return
    if isinstance(part, Mapping):
        yield from chain.from_iterable(map(_calibrations, part.values()))
    elif is_dataclass(part):
        yield from chain.from_iterable(_calibrations(getattr(part, field.name)) for field in fields(part))


class Full(Contender):
    """transformers' DynamicCache, which every other is measured against."""

    @property
    def label(self) -> str:
        """Always the same."""
        return FULL

    def new_cache(self, model: Any) -> Any:
        """Return an empty DynamicCache."""
        return DynamicCache(config=_config(model))


class _Forgetful(DynamicSlidingWindowLayer):
    """A layer that forgets, in the place of one that does not: its masks must not be taken for a sliding layer's."""

    is_sliding = False


@dataclass(frozen=True)
class Window(Contender):
    """The control: only the newest tokens are kept, nothing else.

    Attributes:
        tokens: how many.
    """

    name: ClassVar[str] = "window"
    tokens: int

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 1:
            raise OptionError(f"tokens={self.tokens!r} is not accepted; accepted: whole numbers from 1")

    @property
    def label(self) -> str:
        """With its size."""
        return f"{self.name}:tokens={self.tokens}"

    def new_cache(self, model: Any) -> Any:
        """Return a DynamicCache whose full-attention layers forget."""
        cache = DynamicCache(config=_config(model))
        # That layer counts the token that is being read as one of its window.
        cache.layers = [_Forgetful(self.tokens + 1) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def lossy_share(self, cache: Any, new: int, full_bytes: int) -> float:
        """Return the share of the past that was forgotten."""
        past = int(cache.get_seq_length()) - new
        return max(0.0, 1 - self.tokens / past) if past else 0.0


@dataclass(frozen=True)
class Quantized(Contender):
    """transformers' QuantizedCache.

    Attributes:
        bits: bits of a code.
        group: numbers that share a scale.
        window: newest tokens that stay exact.
    """

    backend: ClassVar[str]
    module: ClassVar[str]
    package: ClassVar[str]
    axis: ClassVar[int]
    bits: int = 4
    group: int = 32
    window: int = 128

    def __post_init__(self) -> None:
        if not self.installed():
            raise OptionError(f"{self.backend} is not installed; install it with: pip install '{self.package}'")
        if self.bits not in (2, 4):
            raise OptionError(f"bits={self.bits!r} is not accepted; accepted: 2, 4")

    @property
    def label(self) -> str:
        """With the bits, and what else is not the default."""
        given = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        changed = (field.name for field in fields(self)[1:] if given[field.name] != field.default)
        return f"{self.backend}:bits={self.bits}" + "".join(f":{name}={given[name]}" for name in changed)

    @classmethod
    def installed(cls) -> bool:
        """Say whether the backend can be imported."""
        parent = cls.module.partition(".")[0]
        return bool(importlib.util.find_spec(parent) and importlib.util.find_spec(cls.module))

    def new_cache(self, model: Any) -> Any:
        """Return an empty QuantizedCache, with the axis that its backend works best with."""
        return QuantizedCache(
            self.backend,
            _config(model),
            nbits=self.bits,
            q_group_size=self.group,
            residual_length=self.window,
            axis_key=self.axis,
            axis_value=self.axis,
        )

    def lossy_share(self, cache: Any, new: int, full_bytes: int) -> float:
        """Return the share of all tokens that is quantised: the newest ones are held beside them until they are too."""
        exact = int(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized))
        return max(0.0, 1 - exact / full_bytes)


class Hqq(Quantized):
    """QuantizedCache with the backend hqq."""

    backend, module, package, axis = "hqq", "hqq", "hqq", 1


class Quanto(Quantized):
    """QuantizedCache with the backend quanto."""

    backend, module, package, axis = "quanto", "optimum.quanto", "optimum-quanto", 0

    def new_cache(self, model: Any) -> Any:
        """Return an empty QuantizedCache; quanto compiles its kernels at first use, with the ninja beside Python."""
        beside = str(Path(sys.executable).parent)
        path = os.environ.get("PATH", "")
        if beside not in path.split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join([beside, path])
        return super().new_cache(model)


REFERENCES: dict[str, type[Contender]] = {"window": Window, "hqq": Hqq, "quanto": Quanto}
"""What is not kvpack's, by the name under which `--methods` takes it."""


def parse(text: str) -> Contender:
    """Return the contender that `text` names: a registered method (`kivi:bits=2`), or one of `REFERENCES`.

    Raises:
        OptionError: it is unknown, or a parameter is not accepted.
    """
    first = re.match(r"[\w-]*", text.strip())
    name = first.group() if first else ""
    if name in REFERENCES:
        name, parameters = split_parameters(text)
        contender: Contender = make(REFERENCES[name], name, parameters)
        return contender
    if name not in names():
        raise OptionError(f"method {name!r} is unknown; accepted: {', '.join([*names(), *REFERENCES])}")
    return Packed(parse_spec(text))


def _label(method: Method) -> str:
    """The text that stands for a method, or how it is shown where there is none."""
    try:
        return spell(method)
    except OptionError:
        return repr(method)


def _contender(method: Any) -> Any:
    """What stands for one of a list."""
    if isinstance(method, Method):
        return Packed(Spec(_label(method), {method.family: method}))
    return parse(method.strip()) if isinstance(method, str) else method


def parse_all(methods: str | Path | Iterable[str | Method | Contender]) -> list[Contender]:
    """Return the contenders of a list, of names with commas between, or of a YAML file.

    Args:
        methods: `"exact,kivi:bits=2"`; the path of a YAML file that holds a list of such names; or a list, of methods
            such as `kvpack.KIVI(bits=2)` too.

    Raises:
        OptionError: one is not accepted, two are the same, there is none, or the file is no such list.
    """
    if isinstance(methods, Path) or (isinstance(methods, str) and methods.endswith((".yaml", ".yml"))):
        methods = _read_yaml(Path(methods))
    if isinstance(methods, str):
        methods = split(methods, ",", REFERENCES)
    contenders = [_contender(method) for method in methods]
    for contender in contenders:
        if not isinstance(contender, Contender):
            raise OptionError(
                f"methods: given {contender!r}, expected a name such as 'kivi:bits=2', a method, or a Contender"
            )
    if not contenders:
        raise OptionError(f"methods: given none, expected at least one of {', '.join([*names(), *REFERENCES])}")
    labels = [contender.label for contender in contenders]
    for label in labels:
        if labels.count(label) > 1:
            raise OptionError(f"methods: given {label!r} twice")
        if label == FULL:
            raise OptionError(f"methods: {FULL!r} is the name of the full cache, which is always there")
    return contenders


def _read_yaml(path: Path) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"methods: {path} cannot be read: {error}") from None
    if not isinstance(content, list) or not all(isinstance(item, str) for item in content):
        raise OptionError(f"methods: {path} holds no list of names such as '- kivi:bits=2'")
    return content


def _config(model: Any) -> Any:
    return getattr(model, "config", model)
