"""What all compactions have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from ... import _kvpack
from ..base import Method, Site


class Compact(Method):
    """A method that keeps something of tokens that leave: a few weighted slots, or a state of constant size.

    It sees what an eviction lets go, and what it makes of that still takes weight in attention. No method of this
    family is registered yet.
    """

    family: ClassVar[str] = "compact"
    without: ClassVar[str] = "None to keep nothing of tokens that leave"

    @abstractmethod
    def make(self, site: Site | None = None) -> _kvpack.Compactor:
        """The method as the store of a layer knows it."""
