"""The `select` family: which of the tokens that are held a step of decoding reads."""

from .base import Select
from .quest import Quest

__all__ = [
    "Quest",
    "Select",
]
