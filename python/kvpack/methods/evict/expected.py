"""What queries to come would look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ...errors import OptionError
from ...rotation import Rotation
from ..base import Amount, Property, Reasons, Site, check_switch, check_whole
from ..registry import register
from .base import Evict


@register
@dataclass(frozen=True)
class ExpectedAttention(Evict):
    """What queries to come would attend to stays (Devoto et al. 2025, arXiv 2510.00636).

    Queries before RoPE are taken to be normally distributed, with mean and covariance of the prompts' queries after the
    sinks. A token's score is the attention that such a query would give it on average over the next positions, times
    the length of its value. The covariance is averaged over rotations exactly, where the authors' code rotates it by
    their average. While decoding, tokens are chosen by what is known from the prompts.

    The model's rotary embedding is found by a few short forwards, once for each model: `PackedCache(model, ...)`.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        future: positions over which is averaged.
        covariance: whether the covariance counts, or the mean alone.
        values: whether scores are multiplied with the lengths of the values.
        epsilon: what is added to the attention before.
    """

    name: ClassVar[str] = "expected"
    standard: ClassVar[tuple[str, ...]] = ("expected:budget=0.5", "expected:budget=0.25", "expected:budget=0.1")

    budget: Amount | Sequence[Amount] = 0.5
    sinks: int = 4
    future: int = 512
    covariance: bool = True
    values: bool = True
    epsilon: float = 0.0

    def _check(self) -> None:
        check_whole(self, future=1)
        check_switch(self, "covariance", "values")
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float):
            raise OptionError(f"epsilon={self.epsilon!r} is not accepted; accepted: 0 and positive numbers")

    @property
    def needs(self) -> Reasons:
        """Keys are scored by queries that are drawn from those of prompts."""
        return {
            Property.RAW_KEYS: "it looks at keys",
            Property.QUERIES_SEEN: "tokens are scored by the queries of prompts",
        }

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        rotation = Rotation((), ()) if site is None else self._rotations(site)[site.layer]
        return _kvpack.Eviction(
            "expected",
            future=self.future,
            covariance=self.covariance,
            values=self.values,
            epsilon=self.epsilon,
            rotation=rotation.options(),
            **self._common(site, floor, self.budget, 0),
        )
