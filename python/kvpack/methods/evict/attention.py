"""Attention that tokens received."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ...errors import OptionError
from ..base import Amount, Property, Reasons, Site, amount
from ..registry import register
from .base import Evict


@dataclass(frozen=True)
class _Attention(Evict):
    shared: ClassVar[bool] = False

    budget: Amount | Sequence[Amount] = 0.2
    recent: Amount = 0.5
    decode: bool = True

    def _check(self) -> None:
        amount("recent", self.recent, "a whole number of tokens, or a share of the budget from 0 to 1.0")

    @property
    def needs(self) -> Reasons:
        """The attention of all queries so far."""
        needs = {Property.QUERIES_SEEN: "tokens are scored by the attention that they get"}
        return {**needs, Property.EQUAL_HEADS: "all heads keep the same tokens"} if self.shared else needs

    def _alpha(self) -> float:
        return 1.0

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        common = self._common(site, floor, self.budget, self.recent)
        return _kvpack.Eviction("attention", alpha=self._alpha(), shared=self.shared, **common)


@register
@dataclass(frozen=True)
class H2O(_Attention):
    """Heavy hitters: what received the most attention of all queries so far (Zhang et al. 2023, arXiv 2306.14048).

    Attention is summed over the query heads of a KV head. It costs as much again as a prompt's own attention.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer. The paper has 0.2.
        recent: the newest tokens, which stay: so many, or a share of the budget.
    """

    name: ClassVar[str] = "h2o"
    standard: ClassVar[tuple[str, ...]] = ("h2o:budget=0.5", "h2o:budget=0.25", "h2o:budget=0.1")


@register
@dataclass(frozen=True)
class A2SF(_Attention):
    """Accumulated attention that is forgotten again (Jo and Shin 2024, arXiv 2407.20485).

    `A <- alpha A + S` with the attention `S` of each query, summed over the query heads of a KV head: first
    tokens gain nothing from having been seen by more queries. Of a prompt only queries whose weight is above 1e-6 are
    looked at.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        alpha: the forgetting factor, 0 to 1.
        recent: the newest tokens, which stay: so many, or a share of the budget.
    """

    name: ClassVar[str] = "a2sf"
    standard: ClassVar[tuple[str, ...]] = ("a2sf:budget=0.5", "a2sf:budget=0.25", "a2sf:budget=0.1")

    budget: Amount | Sequence[Amount] = 256
    recent: Amount = 16
    alpha: float = 0.95

    def _check(self) -> None:
        super()._check()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha={self.alpha!r} is not accepted; accepted: 0 to 1")

    def _alpha(self) -> float:
        return float(self.alpha)


@register
@dataclass(frozen=True)
class TOVA(_Attention):
    """What the last query does not look at goes (Oren et al. 2024, arXiv 2401.06104).

    All heads of a layer keep the same tokens, by the mean of their attention.

    Attributes:
        budget: tokens that stay, or a share of the prompt; or one for each layer.
        recent: the newest tokens, which stay.
    """

    name: ClassVar[str] = "tova"
    standard: ClassVar[tuple[str, ...]] = ("tova:budget=0.5", "tova:budget=0.25", "tova:budget=0.1")
    shared: ClassVar[bool] = True

    budget: Amount | Sequence[Amount] = 0.25
    recent: Amount = 1

    def _alpha(self) -> float:
        return 0.0
