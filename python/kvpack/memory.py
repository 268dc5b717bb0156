"""What a cache holds, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Bytes that a cache holds, measured from its allocations; what its sequences share is counted once.

    Attributes:
        parts: bytes by part: `codes`, `scales` (with zero-points), `exact` (sinks, recent window and exact pages,
            in the model's dtype), `index` (positions, lists of pages, headers), `pending` (the model's own tensors of
            the newest forward, until they are stored), `auxiliary` (what companions keep: hidden states of tokens that
            were left out, and where they belong), and `other layers` (what transformers' own layer objects hold).
        layers: bytes by layer of the model.
    """

    parts: dict[str, int]
    layers: list[int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.parts.values())

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {readable_bytes(n)}" for name, n in self.parts.items() if n)
        return f"Memory({readable_bytes(self.total)}: {parts or 'empty'}; {len(self.layers)} layers)"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td style='text-align:right'>{readable_bytes(n)}</td>"
            f"<td style='text-align:right'>{n / max(self.total, 1):.1%}</td></tr>"
            for name, n in self.parts.items()
        )
        return (
            f"<table><thead><tr><th>KV cache, {len(self.layers)} layers</th><th>{readable_bytes(self.total)}</th>"
            f"<th>share</th></tr></thead><tbody>{rows}</tbody></table>"
        )


def measured(
    packed: Sequence[Sequence[int] | None],
    pending: Sequence[Sequence[Any]],
    others: Sequence[int],
    beside: Iterable[Mapping[str, int]],
) -> Memory:
    """The memory of a cache.

    Args:
        packed: of each packed layer the bytes of codes, scales, exact numbers and index.
        pending: of each layer the tensors that wait to be stored; they keep all of their storages, each counted once.
        others: bytes of layers that are not packed.
        beside: bytes of the cache's companions, which belong to no layer, by part.
    """
    parts = dict.fromkeys(("codes", "scales", "exact", "index", "pending", "auxiliary", "other layers"), 0)
    for held_beside in beside:
        for name, n in held_beside.items():
            parts[name] = parts.get(name, 0) + n
    layers = []
    known: set[int] = set()
    for held, waiting, other in zip(packed, pending, others, strict=True):
        for name, n in zip(parts, held or (), strict=False):
            parts[name] += n
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in waiting}
        kept = sum(n for storage, n in storages.items() if storage not in known)
        known |= storages.keys()
        parts["pending"] += kept
        parts["other layers"] += other
        layers.append(sum(held or ()) + kept + other)
    return Memory(parts, layers)


def compensation(heads: Sequence[Sequence[tuple[float, bool] | None]]) -> dict[str, str]:
    """Where compensation is used, for `info`: heads that have it, of all with a metric, and what it could gain."""
    told = {}
    for side, name in enumerate(("compensation of keys", "compensation of values")):
        gains = [gain for head in heads if (gain := head[side]) is not None]
        if gains:
            ratios = sorted(ratio for ratio, _ in gains)
            told[name] = (
                f"{sum(used for _, used in gains)} of {len(gains)} heads, gains {ratios[0]:.2f} to {ratios[-1]:.2f}, "
                f"median {ratios[len(ratios) // 2]:.2f}"
            )
    return told


def readable_bytes(n: int) -> str:
    """`n` bytes in a unit that leaves one to four digits before the point."""
    size = float(n)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
