"""What keys alone tell, and lots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ..base import Amount, Property, Reasons, Site, amount, check_whole
from ..registry import register
from .base import Evict


@register
@dataclass(frozen=True)
class KeyDiff(Evict):
    """Keys that are unlike the others stay (Park et al. 2025, arXiv 2504.15364); no query is looked at.

    A token's score is `-cos(k, m)`, where `m` is the mean of all keys' directions.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        recent: the newest tokens, which stay: so many, or a share of the budget.
    """

    name: ClassVar[str] = "keydiff"
    standard: ClassVar[tuple[str, ...]] = ("keydiff:budget=0.5", "keydiff:budget=0.25", "keydiff:budget=0.1")

    budget: Amount | Sequence[Amount] = 0.5
    recent: Amount = 0

    @property
    def needs(self) -> Reasons:
        """Keys are compared with each other."""
        return {Property.RAW_KEYS: "it looks at keys"}

    def _check(self) -> None:
        amount("recent", self.recent, "a whole number of tokens, or a share of the budget from 0 to 1.0")

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return _kvpack.Eviction("keydiff", **self._common(site, floor, self.budget, self.recent))


@register
@dataclass(frozen=True)
class L2Norm(KeyDiff):
    """Small keys stay: a token's score is `-|k|` (Devoto et al. 2024, arXiv 2406.11430); no query is looked at.

    The paper leaves the first two layers alone: `budget=(1.0, 1.0, 0.5, ...)`.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        recent: the newest tokens, which stay: so many, or a share of the budget.
    """

    name: ClassVar[str] = "l2norm"
    standard: ClassVar[tuple[str, ...]] = ("l2norm:budget=0.5", "l2norm:budget=0.25", "l2norm:budget=0.1")

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return _kvpack.Eviction("norm", **self._common(site, floor, self.budget, self.recent))


@register
@dataclass(frozen=True)
class Random(KeyDiff):
    """Lots decide: the control that every method has to beat.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        recent: the newest tokens, which stay: so many, or a share of the budget.
        seed: of the lots.
    """

    name: ClassVar[str] = "random"
    standard: ClassVar[tuple[str, ...]] = ("random:budget=0.5", "random:budget=0.25", "random:budget=0.1")

    seed: int = 0

    @property
    def needs(self) -> Reasons:
        """Lots need nothing."""
        return {}

    def _check(self) -> None:
        super()._check()
        check_whole(self, seed=0)

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        seed = self.seed + (0 if site is None else site.layer << 32)  # each layer has lots of its own
        return _kvpack.Eviction("random", seed=seed, **self._common(site, floor, self.budget, self.recent))
