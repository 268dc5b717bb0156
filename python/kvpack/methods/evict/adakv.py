"""One budget for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ...errors import OptionError
from ..base import Property, Reasons, Site
from ..registry import register
from .attention import TOVA
from .base import Evict


@register
@dataclass(frozen=True, kw_only=True)
class AdaKV(Evict):
    """The heads of a layer share one budget (Feng et al. 2024, arXiv 2407.11550): `AdaKV(SnapKV(budget=0.25))`.

    The best tokens of all heads stay, as many as the heads' budgets have room for together; each head keeps at least
    its own best `floor * budget` ones. Heads then hold different numbers of tokens, and so many bytes. As text it is
    written with brackets: `adakv(snapkv:budget=0.25)`.

    Attributes:
        method: what scores the tokens; its own fields say what always stays, and whether the budget is held while
            decoding.
        floor: share of its own budget that a head keeps, 0 to 1.
    """

    name: ClassVar[str] = "adakv"
    standard: ClassVar[tuple[str, ...]] = ()

    method: Evict
    floor: float = 0.2

    def __init__(self, method: Evict, floor: float = 0.2) -> None:
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "floor", floor)
        if not isinstance(method, Evict) or isinstance(method, AdaKV):
            raise OptionError(
                f"method={method!r} is not accepted; accepted: methods such as kvpack.SnapKV(budget=0.25)"
            )
        if isinstance(method, TOVA):
            raise OptionError(f"method={method!r} is not accepted: all heads of a layer keep the same tokens with it")
        if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
            raise OptionError(f"floor={floor!r} is not accepted; accepted: 0 to 1")
        for name in ("sinks", "protect", "decode", "block"):
            object.__setattr__(self, name, getattr(method, name))
        self.make()

    def __repr__(self) -> str:
        return f"AdaKV({self.method!r}, floor={self.floor!r})"

    @property
    def needs(self) -> Reasons:
        """As what scores the tokens."""
        return self.method.needs

    @property
    def breaks(self) -> Reasons:
        """What any eviction does, and heads hold different numbers of tokens."""
        return {**self.method.breaks, Property.EQUAL_HEADS: "the heads of a layer share a budget"}

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return self.method.make(site, self.floor if floor is None else floor)
