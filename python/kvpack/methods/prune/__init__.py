"""The `prune` family: less of some KV heads."""

from .base import Prune
from .heads import Heads
from .slice import Slice

__all__ = [
    "Heads",
    "Prune",
    "Slice",
]
