"""Greedy continuations: how far a contender's agrees with the full cache's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .contenders import FULL, Contender
from .forward import Reader
from .store import Record


def continue_document(
    model: Any, contender: Contender, ids: Tensor, count: int, expected: Sequence[int] | None
) -> Record:
    """Read a document at once and generate `count` tokens.

    Returns:
        `generated`; and `equal`, how many tokens agree with `expected` before the first that does not, for all but
        the full cache.
    """
    generated = list(Reader(model, contender).greedy(ids, count))
    record: Record = {"kind": "greedy", "method": contender.label, "generated": generated}
    if contender.label != FULL and expected is not None:
        record["equal"] = equal_prefix(generated, expected)
        record["of"] = len(expected)
    return record


def equal_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many items agree before the first that does not."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
