"""What stays as the model made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ..base import Site
from ..registry import register
from .base import Quantize


@register
@dataclass(frozen=True)
class Exact(Quantize):
    """Lossless: keys and values stay in the model's dtype."""

    name: ClassVar[str] = "exact"
    standard: ClassVar[tuple[str, ...]] = ("exact",)

    def keys_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """As the model made them."""
        return _kvpack.Codec("exact")

    values_codec = keys_codec
