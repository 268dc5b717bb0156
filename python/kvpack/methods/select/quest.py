"""Quest: the pages of the largest bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ...errors import OptionError
from ..base import Amount, Site, check_whole
from ..registry import register
from .base import Select


@register
@dataclass(frozen=True)
class Quest(Select):
    """A step of decoding reads the pages that may matter to it (Tang et al. 2024, arXiv 2406.10774).

    Of each page the largest and the least number of every key channel are known, and so a bound on the logits that a
    query finds there. Each KV head reads the pages of the largest bounds, of all its query heads together, and always
    the first page and the newest tokens. Prompts, and chunks of more than one token, are read whole. It is the lazy
    selection of tokens at each step and layer of LazyLLM's decoding (arXiv 2407.14057), by pages, over a cache that
    keeps everything: what is not read now can be read later.

    Attributes:
        budget: tokens that a step reads of each KV head, or a share of those that are held.
        page: tokens of a page. The paper has 16, which loses half as much, and takes longer, as twice as many pages are
            looked at. Codecs that pack more tokens together have pages of so many.
        dense_layers: layers at the beginning that read everything.
    """

    name: ClassVar[str] = "quest"
    standard: ClassVar[tuple[str, ...]] = ("quest:budget=0.5", "quest:budget=0.25", "quest:budget=0.1")

    budget: Amount = 0.25
    page: int = 32
    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_whole(self, page=1, dense_layers=0)
        whole = isinstance(self.budget, int) and not isinstance(self.budget, bool) and 1 <= self.budget < 2**31
        if not whole and not (isinstance(self.budget, float) and 0 < self.budget <= 1):
            raise OptionError(
                f"budget={self.budget!r} is not accepted; accepted: a whole number of tokens from 1, or a share above "
                "0 up to 1.0"
            )
        if self.page > 256:
            raise OptionError(f"page={self.page} is not accepted; accepted: 1 to 256")

    def make(self, site: Site | None = None) -> _kvpack.Selector | None:
        """As the store knows it."""
        if site is not None and site.layer < self.dense_layers:
            return None
        return _kvpack.Selector("quest", budget=self.budget, page=self.page)
