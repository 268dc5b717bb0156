"""What all ways of sharing have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from ... import _kvpack
from ..base import Method


class Share(Method):
    """A method by which layers read what another layer holds. No method of this family is registered yet."""

    family: ClassVar[str] = "share"
    without: ClassVar[str] = "None to have each layer hold its own"

    @abstractmethod
    def make(self) -> _kvpack.Share:
        """The method as the store of a cache knows it."""
