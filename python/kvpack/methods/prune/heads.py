"""A ladder for KV heads: most of them need few of their tokens."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from ... import _kvpack
from ...errors import OptionError
from ..base import Property, Reasons, Site, check_whole
from ..file import Header, check_identity, digest, read_of
from ..presets import PRESETS
from ..quantize import Quantize
from ..registry import QUANTIZE, register
from ..spec import parse_spec
from .base import Prune
from .ladder import RUNGS, Ladder, plan, predicted, retrieval_heads

Rung: TypeAlias = str | Quantize
"""What is held of a KV head: one of `RUNGS`, or a codec of its own."""

_ACCEPTED = f"{', '.join(map(repr, RUNGS))}, or a codec such as kvpack.KIVI(bits=2), or 'kivi:bits=2'"
_FEW = 4  # rungs that are shown one by one
_PLACES = "rungs by (layer, KV head), or a list a layer of one rung a KV head"


@register
@dataclass(frozen=True, repr=False)
class Heads(Prune):
    """Of some KV heads less is held than of others: each has a rung of a ladder.

    - `"full"`: all tokens, as `quantize=` stores them.
    - a codec: all tokens, as this codec stores them: fewer bits, or more.
    - `"streaming"`: the first `sinks` tokens and the newest `window`; the others are let go, a few at a time (the
      streaming heads of DuoAttention, arXiv 2410.10819, whose heads are found by training).
    - `"compensated"`: the same, and one token in place of those that were let go: their mean key and mean value, with
      their number as weight (RazorAttention, arXiv 2407.15891).
    - `"gone"`: nothing. The head's output is exactly 0 (Michel et al. 2019, arXiv 1905.10650).

    A first prompt is attended to whole; what a head does not hold is let go after it. Sliding-window layers take
    `"full"`, `"gone"` and codecs alone. Which heads can do with less is a matter of the model:
    `kvpack.calibrate(..., method="heads")` measures it, once, and writes a file; `Heads(calibration=file, demote=0.5)`
    is a ladder of it.

    Attributes:
        ladder: rungs by `(layer, KV head)`, those that are not named are full; or a list for each layer of one rung a
            KV head.
        sinks: first tokens of a sequence that streaming heads hold.
        window: newest tokens that they hold at least.
        calibration: a file, in place of a ladder, and one of:
        demote: the share of the KV heads that are demoted, each to the rung of `rungs` that loses least;
        share: the share of the bytes that is held at `context` tokens;
        nats: the sum of the losses that is allowed, KL a token as far as they add up.
        context: for `share`, and for `nats`, of which the most bytes are to be saved there.
        by: the ranking: "fisher", or "measured"; with `demote` also "michel", "distance" or "echo".
        rungs: what heads may be demoted to.
        keep: the share of the heads that stay full because they retrieve: those with the most echo (RazorAttention).
        chosen: the rungs of heads that are not full, by `(layer, KV head)`.
        sha256: a hash of what the calibration held when it was read.
    """

    name: ClassVar[str] = "heads"
    standard: ClassVar[Sequence[str]] = ()

    ladder: Mapping[tuple[int, int], Rung] = field(default_factory=dict, hash=False)
    sinks: int = 4
    window: int = 128
    calibration: str | None = None
    demote: float | None = None
    share: float | None = None
    nats: float | None = None
    context: int | None = None
    by: str = "fisher"
    rungs: Sequence[str] = ("streaming",)
    keep: float = 0.0
    chosen: Mapping[tuple[int, int], Rung] = field(init=False, repr=False, compare=False)
    sha256: str | None = field(init=False, repr=False, compare=False)
    _header: Header | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_whole(self, sinks=0, window=1)
        object.__setattr__(self, "rungs", (self.rungs,) if isinstance(self.rungs, str) else tuple(self.rungs))
        places = dict(_places(self.ladder))
        ladder = {place: rung for place in sorted(places) if (rung := _rung(place, places[place])) != "full"}
        object.__setattr__(self, "ladder", ladder)
        object.__setattr__(self, "_header", None)
        object.__setattr__(self, "sha256", None)
        if self.calibration is not None:
            object.__setattr__(self, "calibration", os.fspath(self.calibration))
            ladder = self._planned()
        elif given := [name for name in ("demote", "share", "nats", "context") if getattr(self, name) is not None]:
            raise OptionError(f"{given[0]}={getattr(self, given[0])!r} is not accepted without calibration=")
        object.__setattr__(self, "chosen", ladder)

    def _planned(self) -> dict[tuple[int, int], Rung]:
        """The ladder of the calibration."""
        if self.ladder:
            raise OptionError("ladder= is not accepted together with calibration=; accepted: one of them")
        header, losses = self._read()
        for name in ("sinks", "window"):
            if header[name] != getattr(self, name):
                raise OptionError(
                    f"{name}={getattr(self, name)!r} is not accepted with {self.calibration!r}; accepted: "
                    f"{header[name]}, with which it was measured"
                )
        own = {name: getattr(self, name) for name in ("demote", "share", "nats")}
        if all(value is None for value in own.values()):
            own = {name: header.get(name) for name in own}
        if self.keep and "echo" not in losses:
            raise OptionError(f"keep={self.keep!r} is not accepted with {self.calibration!r}, which has no echo")
        keep = retrieval_heads(losses["echo"], self.keep) if self.keep else None
        options: dict[str, Any] = {"context": self.context, "sinks": self.sinks, "window": self.window, "keep": keep}
        found = plan(losses, by=self.by, rungs=self.rungs, **own, **options)
        object.__setattr__(self, "_header", header)
        object.__setattr__(self, "sha256", digest(self.calibration or ""))
        return {(i, h): rung for i, row in enumerate(found) for h, rung in enumerate(row) if rung != "full"}

    def _read(self) -> tuple[Header, dict[str, Tensor]]:
        return read_of(self.name, self.calibration or "")

    def __repr__(self) -> str:
        ladder = repr(self.chosen)
        if len(self.chosen) > _FEW or self.calibration:
            counts = Counter(rung if isinstance(rung, str) else repr(rung) for rung in self.chosen.values())
            ladder = f"<{', '.join(f'{n} {rung}' for rung, n in counts.items()) or 'all full'}>"
        return f"Heads({ladder}, sinks={self.sinks}, window={self.window})"

    def table(self) -> tuple[dict[str, Tensor], Ladder]:
        """The losses of the calibration, `[layers, KV heads]` by name, and the rung of each head.

        Raises:
            OptionError: there is no calibration, or it cannot be read any more.
        """
        _, losses = self._read()
        shape = next(iter(losses.values())).shape
        rungs = tuple(tuple(str(self.chosen.get((i, h), "full")) for h in range(shape[1])) for i in range(shape[0]))
        return losses, rungs

    def words(self) -> str:
        """What was chosen, for a terminal."""
        if self.calibration is None:
            return repr(self)
        losses, ladder = self.table()
        counts = Counter(chain.from_iterable(ladder))
        lines = [f"{rung:>12}  {counts[rung]:>4} heads" for rung in RUNGS]
        if self.by in ("fisher", "measured"):
            lines.append(f"predicted KL {predicted(losses, ladder, self.by):.4f} nats a token")
        return "\n".join(lines)

    @classmethod
    def masked(cls, mask: Any) -> Heads:
        """Heads that are held whole, and heads that are gone: a mask as Sheared LLaMA learns one (arXiv 2310.06694).

        Args:
            mask: `[layers, KV heads]`, False or 0 where a head is gone: a tensor, an array or lists.

        Raises:
            OptionError: it is no such mask.
        """
        rows = mask.tolist() if hasattr(mask, "tolist") else mask
        try:
            values = {(i, h): held for i, row in enumerate(rows) for h, held in enumerate(row)}
        except TypeError:
            values = {(0, 0): None}
        if not values or any(held not in (0, 1) for held in values.values()):
            raise OptionError(f"mask={mask!r} is not accepted; accepted: [layers, KV heads] of True and False")
        return cls({place: "gone" for place, held in values.items() if not held})

    def codecs(self) -> Iterable[Quantize]:
        """The codecs that some heads have of their own."""
        return (rung for rung in self.chosen.values() if isinstance(rung, Quantize))

    @property
    def needs(self) -> Reasons:
        """What any of its codecs needs."""
        return {of: why for codec in self.codecs() for of, why in codec.needs.items()}

    @property
    def breaks(self) -> Reasons:
        """Some heads hold fewer tokens; and what any of its codecs breaks."""
        reasons = {of: why for codec in self.codecs() for of, why in codec.breaks.items()}
        if {"streaming", "compensated"} & set(map(str, self.chosen.values())):
            reasons[Property.ALL_TOKENS] = "its streaming heads let tokens go"
            reasons[Property.CONSECUTIVE_POSITIONS] = "its streaming heads let tokens go from in between"
            reasons[Property.EQUAL_HEADS] = "its streaming heads hold fewer tokens"
        elif "gone" in self.chosen.values():
            reasons[Property.ALL_TOKENS] = "some of its heads hold nothing"
            reasons[Property.EQUAL_HEADS] = "some of its heads hold nothing"
        return reasons

    def check_sites(self, layers: int, sites: Mapping[int, Site]) -> None:
        """Refuse another model than the calibration's, and layers that it does not have or that are not packed."""
        known = set(sites)
        if self._header is not None and sites:
            check_identity(self._header["model"], next(iter(sites.values())), None, repr(self))
        for layer in sorted({layer for layer, _ in self.chosen}):
            if layer not in known:
                why = f"the model has {layers} layers" if layer >= layers else "its state is transformers' own"
                raise OptionError(
                    f"ladder: layer {layer} is not accepted: {why}; accepted: layers {_ranges(sorted(known))}"
                )

    def gone(self, layer: int) -> tuple[int, ...]:
        """The KV heads of a layer that hold nothing."""
        return tuple(h for (i, h), rung in self.chosen.items() if i == layer and rung == "gone")

    def rungs_of(self, site: Site | None, quantize: Quantize) -> dict[int, _kvpack.Rung]:
        """Those of a layer that are not full; without a site of the first one."""
        layer = 0 if site is None else site.layer
        return {h: self._rung(rung, site) for (i, h), rung in self.chosen.items() if i == layer}

    def _rung(self, rung: Rung, site: Site | None) -> _kvpack.Rung:
        if isinstance(rung, Quantize):
            codec = rung.at(site)
            return _kvpack.Rung(keys=codec.keys_codec(site), values=codec.values_codec(site))
        if rung == "gone":
            return _kvpack.Rung(gone=True)
        if site is not None and site.window is not None:
            raise OptionError(
                f"ladder: {rung!r} is not accepted in layer {site.layer}, which has a sliding window of {site.window} "
                "tokens and lets others go by itself; accepted: 'full', 'gone', or a codec"
            )
        compact = _kvpack.Compactor("mean") if rung == "compensated" else None
        return _kvpack.Rung(sinks=self.sinks, window=self.window, compact=compact)


def _places(ladder: Any) -> Iterable[tuple[tuple[int, int], Any]]:
    """The rungs of a ladder, however it was given."""
    if isinstance(ladder, Mapping):
        for place, rung in ladder.items():
            pair = isinstance(place, tuple) and len(place) == 2
            if not pair or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in place):
                raise OptionError(f"ladder: {place!r} is not accepted; accepted: {_PLACES}")
            yield (place[0], place[1]), rung
        return
    if not isinstance(ladder, Sequence) or isinstance(ladder, str):
        raise OptionError(f"ladder={ladder!r} is not accepted; accepted: {_PLACES}")
    for i, row in enumerate(ladder):
        if not isinstance(row, Sequence) or isinstance(row, str):
            raise OptionError(f"ladder: {row!r} for layer {i} is not accepted; accepted: {_PLACES}")
        yield from (((i, h), rung) for h, rung in enumerate(row))


def _rung(place: tuple[int, int], rung: Any) -> Rung:
    if isinstance(rung, Quantize) or (isinstance(rung, str) and rung in RUNGS):
        return rung
    if isinstance(rung, str):
        known = re.split(r"[:/@]", rung)[0].strip() in {*QUANTIZE, *PRESETS}
        codec = parse_spec(rung).options if known else {}
        if set(codec) == {"quantize"}:
            found: Quantize = codec["quantize"]
            return found
    raise OptionError(f"ladder: {rung!r} for {place} is not accepted; accepted: {_ACCEPTED}")


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as text, runs of them shortened."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in parts)
