"""What all prunings have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from ... import _kvpack
from ..base import Method, Site


class Prune(Method):
    """A method that holds nothing of some KV heads, or fewer numbers of their keys and values than the head dim.

    No method of this family is registered yet.
    """

    family: ClassVar[str] = "prune"
    without: ClassVar[str] = "None to hold all of each head"

    @abstractmethod
    def make(self, site: Site | None = None) -> _kvpack.Prune:
        """The method as the store of a layer knows it."""
