"""The `quantize` family: fewer bits a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from .. import _kvpack
from ..errors import OptionError


class Quantize(ABC):
    """A codec: how tokens that have left the exact tail are stored.

    Attributes:
        name: in the registry, and in methods written as text (`kivi:bits=2`).
        standard: settings, as text, at which it is measured beside others.
    """

    name: ClassVar[str]
    standard: ClassVar[tuple[str, ...]]

    @abstractmethod
    def make_store(self) -> _kvpack.Layer:
        """An empty store of one layer."""

    def check_head_dim(self, head_dim: int) -> None:  # noqa: B027  # most codecs fit every size
        """Raises OptionError when the parameters do not fit values of `head_dim` numbers."""


@dataclass(frozen=True)
class Exact(Quantize):
    """Lossless: keys and values stay in the model's dtype."""

    name: ClassVar[str] = "exact"
    standard: ClassVar[tuple[str, ...]] = ("exact",)

    def make_store(self) -> _kvpack.Layer:
        """An empty store of one layer."""
        return _kvpack.Layer.exact()


@dataclass(frozen=True)
class KIVI(Quantize):
    """Asymmetric quantisation, keys per channel and values per token (Liu et al. 2024, arXiv 2402.02750).

    A group shares a scale and a zero-point, both float16: `zero = min`, `scale = (max - min) / (2^bits - 1)`,
    `code = round((x - zero) / scale)`. That makes `bits + 32 / group` bits a number.

    Keys are packed in blocks of `window` tokens, values one by one as soon as `window` newer ones are held: what
    is newer stays exact. Keys are quantised as they are attended to, after RoPE.

    Attributes:
        bits: bits of a code: 2, 3, 4 or 8. The paper has 2 and 4; its authors advise 4 for models with
            grouped-query attention.
        group: numbers that share a scale: tokens of a key channel, channels of a value token. A multiple of 8, at
            most 256 and at most the head dim. The last group of a value may be shorter.
        window: the paper's residual length, in tokens; a multiple of `group`.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads. The paper has none (0).
    """

    name: ClassVar[str] = "kivi"
    standard: ClassVar[tuple[str, ...]] = ("kivi:bits=8", "kivi:bits=4", "kivi:bits=3", "kivi:bits=2")

    bits: int = 4
    group: int = 32
    window: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        for field, low in (("bits", 1), ("group", 1), ("window", 1), ("sinks", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
                raise OptionError(f"{field}={value!r} is not accepted; accepted: whole numbers from {low}")
        if self.bits > 8:
            raise OptionError(f"bits={self.bits} is not accepted; accepted: 2, 3, 4, 8")
        self.make_store()  # Rust knows the rest of the rules

    def make_store(self) -> _kvpack.Layer:
        """An empty store of one layer."""
        return _kvpack.Layer.kivi(self.bits, self.group, self.window, self.sinks)

    def check_head_dim(self, head_dim: int) -> None:
        """Raises OptionError when `group` is larger than `head_dim`."""
        if self.group > head_dim:
            raise OptionError(
                f"group={self.group} is not accepted; accepted: multiples of 8 up to this model's head_dim, {head_dim}"
            )


QUANTIZE: dict[str, type[Quantize]] = {method.name: method for method in (Exact, KIVI)}
