"""Key channels with the bits that each is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ...errors import OptionError
from ..base import Site, check_bits, check_switch, check_whole
from ..registry import register
from .base import Compensated, Quantize
from .gptq import GPTQ, checked


@register
@dataclass(frozen=True)
class Graded(Quantize):
    """Keys per channel, each with the bits that it is worth; values rotated. kvpack's own combination, no calibration.

    A key channel has 8, 4, 3, 2 or 0 bits, such that `sum_c E[q_c^2] E[e_c^2]`, the expected square of a logit's error,
    is least while the mean is at most `key_bits`: a rate allocation on KIVI's grids, with the query metric that SQuat,
    ThinK and Block-GTQ use too. The queries are those that the cache sees while the text is read; only
    with `attn_implementation="kvpack"` are they seen, otherwise all channels' errors weigh the same. Bits are chosen
    again when the tokens have doubled. Values are stored as `Rotated` stores them.

    Bits a number, without the exact window: `key_bits + 32 / group` for keys, `value_bits + 16 / head_dim` for values.

    Attributes:
        key_bits: mean bits of a key's code, 1 to 8, in fractions too.
        value_bits: bits of a value's code: 2, 3, 4 or 8.
        group: tokens of a key channel that share a scale: a multiple of 8, at most 256.
        window: newest values that stay exact, a multiple of `group`. Keys are packed in blocks of it as soon as one is
            full: fewer of the newest stay exact, at times none.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        seed: of the values' random signs.
        compensation: `GPTQ(...)`, if roundings are to make up for each other (as text `compensation=gptq`); None: not.
        full_window: whether a block of keys waits until `window` newer ones are held, too: `window` to `2 window - 1`
            of the newest stay exact.
    """

    name: ClassVar[str] = "graded"
    standard: ClassVar[tuple[str, ...]] = (
        "graded:key_bits=8:value_bits=8",
        "graded:key_bits=4.5:value_bits=4",
        "graded:key_bits=3.5:value_bits=4",
        "graded:key_bits=3:value_bits=3",
        "graded:key_bits=3:value_bits=2",
        "graded:key_bits=2.5:value_bits=2",
        "graded:key_bits=2:value_bits=2",
    )

    renamed: ClassVar[Mapping[str, str]] = Compensated.renamed

    key_bits: float = 3.0
    value_bits: int = 3
    group: int = 128
    window: int = 128
    sinks: int = 4
    seed: int = 0
    compensation: GPTQ | None = None
    full_window: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "compensation", checked(self.compensation))
        check_switch(self, "full_window")
        if not isinstance(self.key_bits, int | float) or isinstance(self.key_bits, bool):
            raise OptionError(f"key_bits={self.key_bits!r} is not accepted; accepted: 1 to 8")
        if not 1 <= self.key_bits <= 8:
            raise OptionError(f"key_bits={self.key_bits!r} is not accepted; accepted: 1 to 8")
        check_whole(self, value_bits=1, group=1, window=1, sinks=0, seed=0)
        check_bits(self, "value_bits", (2, 3, 4, 8))
        _kvpack.Layer(self.keys_codec(), self.values_codec())  # Rust knows the rest of the rules

    def keys_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """Per channel, with graded bits."""
        return _kvpack.Codec(
            "graded",
            bits=self.key_bits,
            group=self.group,
            window=self.window,
            sinks=self.sinks,
            full_window=self.full_window,
            compensation=None if self.compensation is None else self.compensation.for_keys(site),
        )

    def values_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """Rotated."""
        return _kvpack.Codec(
            "rotated",
            bits=self.value_bits,
            levels="uniform",
            group=0,
            window=self.window,
            sinks=self.sinks,
            seed=self.seed,
            compensation=None if self.compensation is None else self.compensation.for_values(site),
        )
