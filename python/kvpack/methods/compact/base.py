"""What all compactions have in common."""

from __future__ import annotations

from typing import ClassVar

from ..base import Method


class Compact(Method):
    """A method that merges tokens: some of those that are held take the place of several.

    An eviction leaves tokens out; a compaction changes those that stay, so that they stand for what is gone, too. No
    method of this family is registered yet.
    """

    family: ClassVar[str] = "compact"
    without: ClassVar[str] = "None to keep tokens as they are"
