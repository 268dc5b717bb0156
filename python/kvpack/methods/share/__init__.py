"""The `share` family: fewer layers."""

from .base import Share

__all__ = [
    "Share",
]
