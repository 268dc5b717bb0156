"""What all prunings have in common."""

from __future__ import annotations

from typing import ClassVar

from ..base import Method


class Prune(Method):
    """A method that holds fewer channels of keys or values than the model's head_dim.

    Channels are left out, or projected to fewer. No method of this family is registered yet.
    """

    family: ClassVar[str] = "prune"
    without: ClassVar[str] = "None to keep all channels"
