"""Companions: what stands in `cache.companions` goes along with all that a cache does, whoever it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import kvpack
import pytest
import torch
from kvpack.companion import Companion
from kvpack.methods import COMPANIONS, FAMILIES
from support import assert_same_contents, forward, random_kv, tiny_config


@dataclass(frozen=True)
class Noting(Companion):
    """Knows a number for each row, and refuses what it is told to refuse."""

    rows: tuple[int, ...] = (10, 11)
    forks: int = 0
    refuses: str = ""
    stays: bool = False

    def check_forward(self) -> None:
        if self.refuses == "forward":
            raise kvpack.OptionError("no forward beside Noting")

    def check_crop(self) -> None:
        if self.refuses == "crop":
            raise kvpack.CropError("no crop beside Noting")

    def select(self, rows: Sequence[int]) -> Noting:
        if self.refuses == "select":
            raise kvpack.ShapeError("no rows beside Noting")
        return replace(self, rows=tuple(self.rows[row] for row in rows))

    def fork(self) -> Noting:
        return replace(self, forks=self.forks + 1)

    def reset(self) -> Noting | None:
        return replace(self, rows=()) if self.stays else None

    def bytes(self) -> dict[str, int]:
        return {"auxiliary": 5, "notes": 8 * len(self.rows)}

    def positions(self, layer: int, row: int, slots: Sequence[int]) -> list[int]:
        return [slot + 100 * self.rows[row] for slot in slots]


def cache_with(*companions: Companion) -> kvpack.PackedCache:
    cache = kvpack.PackedCache(tiny_config(layers=1))
    forward(cache, *random_kv(2, 2, 20, 32))
    forward(cache, *random_kv(2, 2, 1, 32))
    cache.companions = list(companions)
    return cache


def test_rows_go_along() -> None:
    cache = cache_with(Noting(), Noting(rows=(7, 8)))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert [companion.rows for companion in cache.companions] == [(11, 10), (8, 7)]
    cache.batch_repeat_interleave(2)
    assert cache.companions[0].rows == (11, 11, 10, 10)
    cache.batch_select_indices(torch.tensor([3]))
    assert [companion.rows for companion in cache.companions] == [(10,), (7,)]


def test_forks_have_companions_of_their_own() -> None:
    cache = cache_with(Noting())
    fork = cache.fork()
    assert fork.companions == [Noting(forks=1)]
    fork.reorder_cache(torch.tensor([1, 0]))
    assert cache.companions == [Noting()]


def test_bytes_and_positions_are_asked_for() -> None:
    plain, cache = cache_with(), cache_with(Noting(), Noting(rows=(1, 2)))
    assert cache.memory().parts == {**plain.memory().parts, "auxiliary": 10, "notes": 32}
    assert cache.memory().total == plain.memory().total + 42
    assert cache.kept(0, 0, 1) == [position + 1100 + 200 for position in plain.kept(0, 0, 1)]


@pytest.mark.parametrize(
    ("refuses", "change", "error"),
    [
        ("forward", lambda cache: cache.update(*random_kv(2, 2, 1, 32), 0), kvpack.OptionError),
        ("crop", lambda cache: cache.crop(-1), kvpack.CropError),
        ("select", lambda cache: cache.reorder_cache(torch.tensor([1, 0])), kvpack.ShapeError),
        ("select", lambda cache: cache.batch_repeat_interleave(2), kvpack.ShapeError),
    ],
    ids=["forward", "crop", "reorder", "repeat"],
)
def test_what_a_companion_refuses_changes_nothing(refuses: str, change: Any, error: type[Exception]) -> None:
    companions = Noting(), Noting(refuses=refuses)
    cache = cache_with(*companions)
    before = cache.fork()
    with pytest.raises(error, match="beside Noting"):
        change(cache)
    assert_same_contents(cache, before)
    assert cache.companions == list(companions)


def test_reset_leaves_what_a_companion_says() -> None:
    cache = cache_with(Noting(), Noting(stays=True))
    cache.reset()
    assert cache.companions == [Noting(rows=(), stays=True)]


def test_companions_are_registered() -> None:
    assert {"lazyllm": kvpack.LazyLLM} == COMPANIONS
    assert not any("lazyllm" in methods for methods in FAMILIES.values())
    assert kvpack.PackedCache(tiny_config()).companions == []
