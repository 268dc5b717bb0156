"""What all ways of sharing have in common."""

from __future__ import annotations

from typing import ClassVar

from ..base import Method


class Share(Method):
    """A method by which layers, or heads, hold keys and values together.

    What a layer does not hold it reads from another one. No method of this family is registered yet.
    """

    family: ClassVar[str] = "share"
    without: ClassVar[str] = "None to have each layer hold its own"
