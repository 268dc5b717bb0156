"""What all selections have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from ... import _kvpack
from ..base import Method, Site


class Select(Method):
    """A method that reads less: it deletes nothing, and saves time and no memory."""

    family: ClassVar[str] = "select"
    without: ClassVar[str] = "None to read all tokens"

    @abstractmethod
    def make(self, site: Site | None = None) -> _kvpack.Selector | None:
        """The method as the store of a layer knows it; None where the layer is read whole."""
