"""What all prunings have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from ... import _kvpack
from ..base import Method, Site
from ..quantize import Quantize


class Prune(Method):
    """A method that holds less of some KV heads: fewer tokens, or nothing."""

    family: ClassVar[str] = "prune"
    without: ClassVar[str] = "None to hold all of each head"

    def check_sites(self, layers: int, sites: Mapping[int, Site]) -> None:
        """Raises OptionError, or ModelMismatchError, when it does not fit a model.

        Args:
            layers: how many there are.
            sites: those that are packed, by number.
        """

    def gone(self, layer: int) -> tuple[int, ...]:
        """The KV heads of a layer whose output is 0."""
        return ()

    @abstractmethod
    def rungs_of(self, site: Site | None, quantize: Quantize) -> dict[int, _kvpack.Rung]:
        """What is held of the KV heads of a layer that are not held whole as `quantize` stores them."""

    def make(self, site: Site | None, quantize: Quantize) -> _kvpack.Prune:
        """The method as the store of a layer knows it."""
        return _kvpack.Prune(self.rungs_of(site, quantize))
