"""Fewer numbers a key and a value: the leading coordinates of a calibrated basis."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ... import _kvpack
from ...errors import OptionError
from ..base import Reasons, Site, check_whole
from ..file import Header, check_identity, digest, read_of
from ..hulls import Way, spend
from ..quantize import Quantize
from ..registry import register
from .base import Prune
from .heads import Heads

SIDES = ("keys", "values")


@register
@dataclass(frozen=True)
class Slice(Prune):
    """Keys and values in fewer numbers: PCA slicing of the head space, in the metric of what the model notices.

    It is SliceGPT's idea (arXiv 2401.15024) in the space that a cache holds, and not SliceGPT, which leaves the cache
    as it is. Each KV head's keys, and values, have a basis of their own in which the coordinates are ordered by what
    leaving them out would cost; the first ones are kept as exact numbers. Queries go in once a step and sums of values
    come back once: a step gets shorter as the ranks do. Ranks are spent where they lose least, over all layers, heads
    and sides, `rank` in the mean; with `uniform` all have `rank`. What is not sliced is stored as `quantize=` says.

    Attributes:
        calibration: the file that `kvpack.calibrate(..., method="slice")` wrote.
        rank: numbers that are kept of a key and of a value, in the mean over `sides`.
        sides: "keys", "values", or "both".
        uniform: whether all heads have the same rank.
        heads: a ladder, whose heads are held as it says and not sliced.
        sinks: first tokens of a sequence that stay whole.
        window: newest tokens that stay whole.
        ranks: how many numbers are kept, `[layers, KV heads]` of each side; 0 where nothing is sliced.
        sha256: a hash of what the calibration held when it was read.
    """

    name: ClassVar[str] = "slice"
    standard: ClassVar[tuple[str, ...]] = ()

    calibration: str
    rank: float
    sides: str = "both"
    uniform: bool = False
    heads: Heads | None = None
    sinks: int = 4
    window: int = 128
    ranks: Mapping[str, Tensor] = field(init=False, repr=False, compare=False)
    _tables: Mapping[str, Tensor] = field(init=False, repr=False, compare=False)
    sha256: str = field(init=False, repr=False, compare=False)
    _header: Header = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_whole(self, sinks=0, window=0)
        if self.sides not in (*SIDES, "both"):
            raise OptionError(f"sides={self.sides!r} is not accepted; accepted: 'keys', 'values', 'both'")
        if self.heads is not None and not isinstance(self.heads, Heads):
            raise OptionError(f"heads={self.heads!r} is not accepted; accepted: kvpack.Heads(...), or None")
        object.__setattr__(self, "calibration", os.fspath(self.calibration))
        header, tables = read_of(self.name, self.calibration)
        object.__setattr__(self, "_header", header)
        object.__setattr__(self, "sha256", digest(self.calibration))
        object.__setattr__(self, "_tables", tables)
        object.__setattr__(self, "ranks", self._ranks())

    def _ranks(self) -> dict[str, Tensor]:
        """How many numbers are kept, `[layers, KV heads]` of each side; 0 where nothing is sliced."""
        sides = SIDES if self.sides == "both" else (self.sides,)
        losses = {side: self._tables[f"{side}.loss"] for side in sides}
        dim = max(loss.shape[-1] for loss in losses.values())
        rank = self.rank
        if not isinstance(rank, int | float) or isinstance(rank, bool) or not 1 <= rank <= dim:
            raise OptionError(f"rank={rank!r} is not accepted; accepted: 1 to {dim}")
        ranks = {side: torch.zeros(loss.shape[:2], dtype=torch.long) for side, loss in losses.items()}
        places = [(side, i, h) for side, loss in losses.items() for i, h in (~loss[..., 0].isnan()).nonzero().tolist()]
        if self.uniform:
            if rank != int(rank):
                raise OptionError(f"rank={rank!r} is not accepted with uniform=True; accepted: whole numbers")
            chosen = dict.fromkeys(places, int(rank))
        else:
            ways = {}
            for side, i, h in places:
                rest = [*losses[side][i, h].tolist(), 0.0]
                ways[side, i, h] = [Way(r, r, rest[r]) for r in range(1, len(rest))]
            chosen = {place: way.what for place, way in spend(ways, rank * len(places)).items()}
        for (side, i, h), own in chosen.items():
            ranks[side][i, h] = own
        return ranks

    def words(self) -> str:
        """What was chosen, for a terminal."""
        rows = [("", "mean", "least", "most")]
        for side, ranks in self.ranks.items():
            own = ranks[ranks > 0].double()
            rows.append((side, f"{own.mean():.1f}", f"{own.min():.0f}", f"{own.max():.0f}"))
        return "\n".join(f"{name:>8}  {mean:>6}  {least:>6}  {most:>6}" for name, mean, least, most in rows)

    @property
    def needs(self) -> Reasons:
        """What its ladder needs."""
        return {} if self.heads is None else self.heads.needs

    @property
    def breaks(self) -> Reasons:
        """What its ladder breaks."""
        return {} if self.heads is None else self.heads.breaks

    def check_sites(self, layers: int, sites: Mapping[int, Site]) -> None:
        """Refuse another model than the calibration's."""
        if sites:
            check_identity(self._header["model"], next(iter(sites.values())), None, repr(self))
        if self.heads is not None:
            self.heads.check_sites(layers, sites)

    def gone(self, layer: int) -> tuple[int, ...]:
        """Those of its ladder."""
        return () if self.heads is None else self.heads.gone(layer)

    def rungs_of(self, site: Site | None, quantize: Quantize) -> dict[int, _kvpack.Rung]:
        """The heads of a layer that are sliced, and those of the ladder."""
        layer = 0 if site is None else site.layer
        found = {}
        for head in range(next(iter(self.ranks.values())).shape[1]):
            keys = self._codec("keys", layer, head) or quantize.keys_codec(site)
            values = self._codec("values", layer, head) or quantize.values_codec(site)
            if any(self.ranks[side][layer, head] for side in self.ranks):
                found[head] = _kvpack.Rung(keys=keys, values=values)
        return found if self.heads is None else {**found, **self.heads.rungs_of(site, quantize)}

    def _codec(self, side: str, layer: int, head: int) -> _kvpack.Codec | None:
        """How a head's keys or values are sliced; None where they are not."""
        rank = int(self.ranks[side][layer, head]) if side in self.ranks else 0
        if rank == 0:
            return None
        down, up = (self._tables[f"{side}.{name}"][layer, head] for name in ("down", "up"))
        options = {"down": down[:rank].tolist(), "up": up[:, :rank].tolist()}
        return _kvpack.Codec("sliced", **options, window=self.window, sinks=self.sinks)
