"""The `compact` family: fewer tokens, made of those that were there."""

from .base import Compact

__all__ = [
    "Compact",
]
