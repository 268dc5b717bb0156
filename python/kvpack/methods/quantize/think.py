"""Keys without the channels that queries hardly look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ...errors import OptionError
from ..base import Property, Reasons, Site, check_whole
from ..registry import register
from .base import Quantize
from .exact import Exact


@register
@dataclass(frozen=True)
class ThinK(Quantize):
    """Of each KV head's keys some channels are left out (Xu et al. 2024, arXiv 2407.18021); the others stay exact.

    A channel is worth `mean(q_c^2) * mean(k_c^2)`, with the last queries of the prompt and all of its keys; the
    `int(ratio * head_dim)` least ones of a head go. The newest tokens keep all channels. Tokens that leave the window
    while decoding lose channels too, which keeps the cache small; the paper prunes the prompt alone. When the tokens
    have doubled channels are chosen anew, for tokens to come: a text that comes in parts is judged by more than its
    first one. Values are exact: `KeyValue(ThinK(), KIVI(bits=4))`, as text `think/kivi:bits=4`, stores them smaller.

    Attributes:
        ratio: share of the channels that are left out, 0 to below 1. The paper has 0.4 to 0.6.
        window: newest tokens that keep all channels.
        queries: queries at the end of a prompt that decide.
    """

    name: ClassVar[str] = "think"
    standard: ClassVar[tuple[str, ...]] = ("think:ratio=0.4", "think:ratio=0.5", "think:ratio=0.6")

    ratio: float = 0.4
    window: int = 128
    queries: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, int | float) or isinstance(self.ratio, bool):
            raise OptionError(f"ratio={self.ratio!r} is not accepted; accepted: 0 to below 1")
        check_whole(self, window=0, queries=1)
        self.keys_codec()  # Rust knows the rest of the rules

    @property
    def needs(self) -> Reasons:
        """Queries."""
        return {Property.QUERIES_SEEN: "channels are chosen by the queries that look at them"}

    def keys_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """Fewer channels, exact."""
        return _kvpack.Codec("think", ratio=self.ratio, window=self.window, queries=self.queries)

    def values_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """Exact."""
        return Exact().values_codec(site)
