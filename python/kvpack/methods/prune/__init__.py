"""The `prune` family: fewer channels."""

from .base import Prune

__all__ = [
    "Prune",
]
