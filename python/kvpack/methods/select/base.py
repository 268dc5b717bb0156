"""What all selections have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from ..base import Amount, Method, Site


class Select(Method):
    """A method that reads less: it deletes nothing, and saves time and no memory."""

    family: ClassVar[str] = "select"
    without: ClassVar[str] = "None to read all tokens"

    @abstractmethod
    def make(self, site: Site | None = None) -> tuple[Amount, int] | None:
        """How much the layer reads: tokens, or a share of them, and tokens of a page; None for all."""
