"""KIVI: a grid a key channel, a grid a value token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ..base import check_bits, check_switch, check_whole
from ..registry import register
from .base import Compensated
from .gptq import GPTQ, Options, checked


@register
@dataclass(frozen=True)
class KIVI(Compensated):
    """Asymmetric quantisation, keys per channel and values per token (Liu et al. 2024, arXiv 2402.02750).

    A group shares a scale and a zero-point, both float16: `zero = min`, `scale = (max - min) / (2^bits - 1)`,
    `code = round((x - zero) / scale)`. That makes `bits + 32 / group` bits a number.

    Keys are packed in blocks of `window` tokens as soon as one is full, so that fewer than `window` of the newest stay
    exact, at times none; values one by one as soon as `window` newer ones are held. Keys are quantised as they are
    attended to, after RoPE.

    Attributes:
        bits: bits of a code: 2, 3, 4 or 8. The paper has 2 and 4; its authors advise 4 for models with
            grouped-query attention.
        group: numbers that share a scale: tokens of a key channel, channels of a value token. A multiple of 8, at
            most 256 and at most the head dim. The last group of a value may be shorter.
        window: the paper's residual length, in tokens; a multiple of `group`.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads. The paper has none (0).
        compensation: `GPTQ(...)`, if roundings are to make up for each other (as text `compensation=gptq`); None: not.
        full_window: whether a block of keys waits until `window` newer ones are held, too: `window` to `2 window - 1`
            of the newest stay exact. The paper's rule is False.
    """

    name: ClassVar[str] = "kivi"
    standard: ClassVar[tuple[str, ...]] = (
        "kivi:bits=8",
        "kivi:bits=8:group=64",
        "kivi:bits=8:group=64:compensation=gptq",
        "kivi:bits=4",
        "kivi:bits=3",
        "kivi:bits=3:compensation=gptq",
        "kivi:bits=2",
    )

    bits: int = 4
    group: int = 32
    window: int = 128
    sinks: int = 4
    compensation: GPTQ | None = None
    full_window: bool = False

    def __post_init__(self) -> None:
        check_whole(self, bits=1, group=1, window=1, sinks=0)
        check_bits(self, "bits", (2, 3, 4, 8))
        check_switch(self, "full_window")
        object.__setattr__(self, "compensation", checked(self.compensation))
        self._codec()  # Rust knows the rest of the rules

    def _codec(self, compensation: Options | None = None) -> _kvpack.Codec:
        return _kvpack.Codec(
            "kivi",
            bits=self.bits,
            group=self.group,
            window=self.window,
            sinks=self.sinks,
            full_window=self.full_window,
            compensation=compensation,
        )
