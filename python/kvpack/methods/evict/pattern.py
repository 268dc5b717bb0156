"""Where a token is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ...errors import OptionError
from ..base import Amount, Property, Reasons, Site, check_switch, check_whole
from ..registry import register
from .base import Evict


@register
@dataclass(frozen=True)
class StreamingLLM(Evict):
    """The first and the newest tokens stay (Xiao et al. 2023, arXiv 2309.17453).

    Without `rerotate` keys keep the positions at which they were cached. With it positions are counted within the
    cache, as in the paper, so that a text may go on beyond the length that a model was trained for: what stayed before
    a gap is read as if the gap were closed. No key is changed for that; queries are turned, by the model's rotary
    embedding, which is found by a few short forwards.

    Attributes:
        budget: tokens that stay, sinks included, or a share of the prompt; or one for each layer.
        rerotate: whether positions are counted within the cache.
    """

    name: ClassVar[str] = "streaming"
    standard: ClassVar[tuple[str, ...]] = ("streaming:budget=0.5", "streaming:budget=0.25", "streaming:budget=0.1")

    budget: Amount | Sequence[Amount] = 1024
    sinks: int = 4
    decode: bool = True
    rerotate: bool = False

    def _check(self) -> None:
        check_switch(self, "rerotate")

    @property
    def needs(self) -> Reasons:
        """Keys that can be turned, with `rerotate`."""
        return {Property.RAW_KEYS: "with rerotate=True it looks at keys as they were turned"} if self.rerotate else {}

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        closing = None
        if self.rerotate and site is not None:
            rotations = self._rotations(site)
            if not any(found.pairs for found in rotations):
                raise OptionError(f"evict={self!r} is not accepted: the model has no rotary embedding")
            own = rotations[site.layer]
            closing = own.options()
        return _kvpack.Eviction("newest", closing=closing, **self._common(site, floor, self.budget, 0))


@register
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
        common = self._common(site, floor, self.budget, self.window)
        return _kvpack.Eviction("dilated", dilation=self.dilation, **common)
