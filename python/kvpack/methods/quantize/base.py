"""What all codecs have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from ... import _kvpack
from ..base import Method, Site
from .gptq import GPTQ, Options


class Quantize(Method):
    """A codec: how tokens that have left the exact tail are stored, in fewer bits a number."""

    family: ClassVar[str] = "quantize"
    without: ClassVar[str] = "None for Exact()"

    @abstractmethod
    def keys_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """How keys are stored in a layer; without a site what is the same in all layers."""

    @abstractmethod
    def values_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """How values are stored in a layer; without a site what is the same in all layers."""

    def centers(self, site: Site | None = None) -> bool:
        """Whether a layer's keys are held less their mean."""
        return False

    def at(self, site: Site | None) -> Quantize:
        """The codec of a layer. Where queries see the newest tokens only, at most an eighth of these stay exact.

        Published windows are small beside the contexts that they are meant for; of a sliding window of 512 tokens 128
        exact ones would be most of what is held. An exact window is whole groups, at least one.
        """
        if site is None or site.window is None:
            return self
        own, group = getattr(self, "window", 0), getattr(self, "group", 1) or 1
        most = max(site.window // 8 // group, 1) * group
        codec: Any = self
        return self if own <= most else replace(codec, window=most)


class Compensated(Quantize):
    """A codec whose keys and values are stored alike, with compensation or without."""

    renamed: ClassVar[Mapping[str, str]] = {"feedback": "compensation"}

    compensation: GPTQ | None

    @abstractmethod
    def _codec(self, compensation: Options | None = None) -> _kvpack.Codec:
        """How both are stored, with what makes up for roundings."""

    def keys_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """How keys are stored, with the compensation of their queries."""
        return self._codec(None if self.compensation is None else self.compensation.for_keys(site))

    def values_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """How values are stored, with the compensation of the layer's output projection."""
        return self._codec(None if self.compensation is None else self.compensation.for_values(site))
