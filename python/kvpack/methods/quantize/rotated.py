"""A rotation first: then all channels are alike, and one scale does for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ...errors import OptionError
from ..base import Property, Reasons, Site, check_bits, check_switch, check_whole
from ..registry import register
from .base import Compensated
from .gptq import GPTQ, Options, checked


@register
@dataclass(frozen=True)
class Rotated(Compensated):
    """A randomised Hadamard transform, then one scale a token and a uniform grid.

    The rotation and the scale a token are TurboQuant-MSE's (Zandieh et al. 2025, arXiv 2504.19874). The paper has Lloyd
    and Max's levels, `levels="lloyd-max"`; a uniform grid, the default, is faster. The paper's second stage (QJL) is
    left out. The stored scale is such that `x' . x = x . x`: attention averages errors away, but not what all tokens
    lack. `bits + 16 / group` bits a number.

    Queries are rotated once a step and outputs once, tokens never.

    Attributes:
        bits: bits of a code: 2, 3, 4 or 8.
        levels: "uniform", or "lloyd-max" (2, 3 or 4 bits): the levels of least square error for normal numbers.
        group: numbers that share a scale, after the rotation: a multiple of 16 up to 256, or 0 for the whole head dim.
        window: newest tokens that stay exact.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        seed: of the random signs.
        compensation: `GPTQ(...)`, if roundings are to make up for each other (as text `compensation=gptq`); None: not.
        center: whether keys are held less the mean key of the first prompt, one a KV head. Attention does not change
            when all keys move by the same vector, and what is left is smaller, and rounded better. Not for models with
            learned sinks or capped logits, nor with evictions that look at keys.
    """

    name: ClassVar[str] = "rotated"
    standard: ClassVar[tuple[str, ...]] = (
        "rotated:bits=4",
        "rotated:bits=4:compensation=gptq",
        "rotated:bits=4:center=True",
        "rotated:bits=3",
        "rotated:bits=3:levels=lloyd-max",
        "kivi:bits=4:group=128/rotated:bits=2",
    )

    bits: int = 4
    levels: str = "uniform"
    group: int = 0
    window: int = 128
    sinks: int = 4
    seed: int = 0
    compensation: GPTQ | None = None
    center: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "compensation", checked(self.compensation))
        check_switch(self, "center")
        check_whole(self, bits=1, group=0, window=0, sinks=0, seed=0)
        check_bits(self, "bits", (2, 3, 4, 8))
        if self.levels not in ("uniform", "lloyd-max"):
            raise OptionError(f"levels={self.levels!r} is not accepted; accepted: 'uniform', 'lloyd-max'")
        self._codec()

    @property
    def needs(self) -> Reasons:
        """With `center` that all logits of a query may move by the same number."""
        if not self.center:
            return {}
        return {Property.PLAIN_LOGITS: "with center=True all logits of a query are moved by the same number"}

    @property
    def breaks(self) -> Reasons:
        """With `center` keys are not what they were."""
        return {Property.RAW_KEYS: "with center=True keys are held less their mean"} if self.center else {}

    def centers(self, site: Site | None = None) -> bool:
        """Whether a layer's keys are held less their mean."""
        return self.center

    def _codec(self, compensation: Options | None = None) -> _kvpack.Codec:
        return _kvpack.Codec(
            "rotated",
            bits=self.bits,
            levels=self.levels,
            group=self.group,
            window=self.window,
            sinks=self.sinks,
            seed=self.seed,
            compensation=compensation,
        )
