"""Where a token is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ..quantize import Site, check_whole
from .base import Amount, Evict


@dataclass(frozen=True)
class StreamingLLM(Evict):
    """The first and the newest tokens stay (Xiao et al. 2023, arXiv 2309.17453).

    Keys keep the positions at which they were cached. The paper counts positions within the cache instead, which lets a
    text go on beyond the length that a model was trained for; that is not done here.

    Attributes:
        budget: tokens that stay, sinks included, or a share of the prompt; or one for each layer.
    """

    name: ClassVar[str] = "streaming"
    standard: ClassVar[tuple[str, ...]] = ("streaming:budget=0.5", "streaming:budget=0.25", "streaming:budget=0.1")

    budget: Amount | Sequence[Amount] = 1024
    sinks: int = 4
    decode: bool = True

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return _kvpack.Eviction.newest(self._common(site, floor, self.budget, 0))


@dataclass(frozen=True)
class Longformer(Evict):
    """The shape of Longformer's pattern (Beltagy et al. 2020, arXiv 2004.05150) as a retention mask.

    What the pattern is worth in Longformer comes from its training, which a model here has not had.
    A window of the newest tokens, the first ones, global tokens (`protect`), and of all others every `dilation`-th: of
    KV head `h` those whose number plus `h` is a multiple. Everything else goes.

    Attributes:
        window: newest tokens that stay.
        dilation: distance of the older tokens that stay; 0: none does.
        budget: what stays at most, or a share of the prompt; or one for each layer. The oldest of the pattern go first.
    """

    name: ClassVar[str] = "longformer"
    standard: ClassVar[tuple[str, ...]] = ("longformer:window=256:dilation=4",)

    window: int = 512
    dilation: int = 0
    budget: Amount | Sequence[Amount] = 1.0
    sinks: int = 4
    decode: bool = True

    def _check(self) -> None:
        check_whole(self, window=1, dilation=0)

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return _kvpack.Eviction.dilated(self._common(site, floor, self.budget, self.window), self.dilation)
