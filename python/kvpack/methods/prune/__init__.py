"""The `prune` family: less of some KV heads."""

from .base import Prune
from .heads import Heads

__all__ = [
    "Heads",
    "Prune",
]
