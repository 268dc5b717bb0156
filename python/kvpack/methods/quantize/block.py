"""Blocks of 32 channels with one scale, as llama.cpp stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ..base import check_whole
from ..registry import register
from .base import Compensated
from .gptq import GPTQ, Options, checked


@dataclass(frozen=True)
class _Block(Compensated):
    bits: ClassVar[int]

    window: int = 0
    sinks: int = 0
    compensation: GPTQ | None = None

    def __post_init__(self) -> None:
        check_whole(self, window=0, sinks=0)
        object.__setattr__(self, "compensation", checked(self.compensation))

    def _codec(self, compensation: Options | None = None) -> _kvpack.Codec:
        return _kvpack.Codec("block", bits=self.bits, window=self.window, sinks=self.sinks, compensation=compensation)


@register
@dataclass(frozen=True)
class Q8(_Block):
    """Blocks of 32 channels with a float16 scale, 8.5 bits a number, as llama.cpp's `q8_0`.

    `scale = max |x| / 127`, `code = round(x / scale)`. Per token, so nothing has to wait: near-lossless anywhere.

    Attributes:
        window: newest tokens that stay exact.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        compensation: `GPTQ(...)`, if roundings are to make up for each other (as text `compensation=gptq`); None: not.
    """

    name: ClassVar[str] = "q8"
    standard: ClassVar[tuple[str, ...]] = ("q8",)
    bits: ClassVar[int] = 8


@register
@dataclass(frozen=True)
class Q4(_Block):
    """Blocks of 32 channels with a float16 scale, 4.5 bits a number, as llama.cpp's `q4_0`.

    `scale = x / -8` for the `x` of the largest magnitude, `code = min(15, floor(x / scale + 8.5))`.

    Attributes:
        window: newest tokens that stay exact.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        compensation: `GPTQ(...)`, if roundings are to make up for each other (as text `compensation=gptq`); None: not.
    """

    name: ClassVar[str] = "q4"
    standard: ClassVar[tuple[str, ...]] = ("q4",)
    bits: ClassVar[int] = 4
