"""Attention scores of the prompt's last queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ... import _kvpack
from ...errors import OptionError
from ..base import Amount, Property, Reasons, Site, check_whole
from ..registry import register
from .base import Evict


@register
@dataclass(frozen=True)
class SnapKV(Evict):
    """What the last queries of the prompt look at stays (Li et al. 2024, arXiv 2404.14469).

    Tokens are scored by the attention of the last `window` queries to what stands before them; scores are averaged over
    the query heads of a KV head, and pooled over neighbouring tokens. The best tokens stay, and the window itself.

    The question has to stand at the end of the prompt, and the window should be no longer than it: what stands before
    it counts too. Published settings have windows of 8 to 64, kernels of 5 and 7, and both kinds of pooling; with these
    defaults the least was lost of short questions. The paper chooses once, after the first prompt; here tokens are
    chosen again after every later prompt, and with `decode` from the last queries of the text generated so far.

    Attributes:
        budget: tokens that stay a KV head, the window included, or a share of the prompt; or one for each layer.
        window: queries whose attention counts.
        kernel: scores that are pooled, an odd number.
        pooling: "max" or "avg".
    """

    name: ClassVar[str] = "snapkv"
    standard: ClassVar[tuple[str, ...]] = ("snapkv:budget=0.5", "snapkv:budget=0.25", "snapkv:budget=0.1")

    budget: Amount | Sequence[Amount] = 2048
    window: int = 16
    kernel: int = 5
    pooling: str = "max"

    @property
    def needs(self) -> Reasons:
        """The attention of the last queries."""
        return {Property.QUERIES_SEEN: "tokens are scored by the attention that they get"}

    def _check(self) -> None:
        check_whole(self, window=1, kernel=1)
        if self.pooling not in ("avg", "max"):
            raise OptionError(f"pooling={self.pooling!r} is not accepted; accepted: 'avg', 'max'")

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return self._make(**self._common(site, floor, self.budget, self.window))

    def _make(self, **common: Any) -> _kvpack.Eviction:
        return _kvpack.Eviction("snapkv", window=self.window, kernel=self.kernel, pooling=self.pooling, **common)


@register
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall from the first layer to the last (Cai et al. 2024, arXiv 2406.02069).

    With the mean budget `C` and window `w` the last layer has `w + (C - w) / beta` tokens, the first as much more than
    `C`, the others lie on the line between; no layer has more than the prompt.

    Attributes:
        beta: how steep it is.
    """

    name: ClassVar[str] = "pyramidkv"
    standard: ClassVar[tuple[str, ...]] = ("pyramidkv:budget=0.25", "pyramidkv:budget=0.1")

    beta: int = 20

    @property
    def breaks(self) -> Reasons:
        """What any eviction does, and layers hold different numbers of tokens."""
        return {**super().breaks, Property.EQUAL_LAYERS: "budgets fall from layer to layer"}

    def _check(self) -> None:
        super()._check()
        check_whole(self, beta=1)

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        layer, layers = (0, 1) if site is None else (site.layer, site.layers)
        pyramid = {"beta": self.beta, "layer": layer, "layers": layers, "window": self.window}
        return self._make(pyramid=pyramid, **self._common(site, floor, self.budget, self.window))
