"""KVQuant: pre-RoPE keys on calibrated grids, levels that are not evenly spaced, and outliers apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ... import _kvpack
from ...errors import OptionError
from ..base import Property, Reasons, Site, check_bits, check_switch, check_whole
from ..registry import register
from .base import Quantize


@dataclass(frozen=True)
class KVQuantTables:
    """What a calibration found for one layer.

    Attributes:
        low: lower end of the range of each key channel, pre-RoPE, of each KV head.
        high: upper end.
        key_levels: `2^bits` levels of normalised keys, ascending.
        value_levels: those of values.
        key_norm: factor and offset of Q-Norm for keys.
        value_norm: those for values.
        pairs: channels that the model's rotary embedding turns together.
        frequencies: by what angle from one position to the next, in radians.
    """

    low: tuple[tuple[float, ...], ...]
    high: tuple[tuple[float, ...], ...]
    key_levels: tuple[float, ...]
    value_levels: tuple[float, ...]
    key_norm: tuple[float, float]
    value_norm: tuple[float, float]
    pairs: tuple[tuple[int, int], ...]
    frequencies: tuple[float, ...]


@register
@dataclass(frozen=True)
class KVQuant(Quantize):
    """Quantisation of keys before RoPE, with calibrated grids and levels (Hooper et al. 2024, arXiv 2401.18079).

    Keys: a static range a channel; values: the range of each token. Numbers are normalised to their range and get the
    code of the nearest of the layer's `2^bits` levels, from a k-means weighted with the squares of the loss' gradients.
    Outliers are kept beside the codes, in float16: of each key the numbers furthest outside their ranges, of each value
    those without which its range is smallest. Keys are turned to their positions when they are read.

    The vector whose outliers are counted is that of a KV head, where the paper takes all heads' together, and their
    number is bounded as in its capped variant. Levels are held with 8 bits.

    Bits a number: `bits + 24 outliers` for keys, `bits + 24 outliers + 32 / head_dim` for values, where the outliers of
    a vector are at least one.

    It needs a calibration: `kvpack.calibrate(model, tokenizer, text, method="kvquant:bits=3")`.

    Attributes:
        bits: bits of a code: 2, 3 or 4.
        outliers: share of a vector's numbers that are kept apart, 0 to 0.25; 0 keeps none.
        norm: whether levels are shifted and scaled so that they keep the mean and the deviation of what they stand for
            (the paper's Q-Norm, which it has for 2 bits).
        window: newest tokens that stay exact. The paper has none.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        tables: what was calibrated, by layer.
    """

    name: ClassVar[str] = "kvquant"
    standard: ClassVar[tuple[str, ...]] = ()

    bits: int = 3
    outliers: float = 0.01
    norm: bool = False
    window: int = 0
    sinks: int = 4
    tables: Mapping[int, KVQuantTables] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        check_whole(self, bits=1, window=0, sinks=0)
        check_bits(self, "bits", (2, 3, 4))
        number = isinstance(self.outliers, int | float) and not isinstance(self.outliers, bool)
        if not number or not 0 <= self.outliers <= 0.25:
            raise OptionError(f"outliers={self.outliers!r} is not accepted; accepted: shares from 0 to 0.25")
        check_switch(self, "norm")

    @property
    def needs(self) -> Reasons:
        """Pages of keys have one position and count from it."""
        return {
            Property.CONSECUTIVE_POSITIONS: "its keys before RoPE are held in runs, and turned from the first one on"
        }

    @property
    def breaks(self) -> Reasons:
        """Keys are turned when they are read."""
        return {Property.RAW_KEYS: "it holds keys before RoPE"}

    def _of(self, site: Site | None) -> KVQuantTables:
        if site is None or site.layer not in self.tables:
            where = "no model" if site is None else f"layer {site.layer}"
            raise OptionError(
                f"{self!r} has no calibration for {where}; "
                "kvpack.calibrate(model, tokenizer, text, method='kvquant:bits=...') makes one, "
                "kvpack.load_calibration(path) loads one"
            )
        return self.tables[site.layer]

    def keys_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """Before RoPE, on the layer's static grids."""
        tables = self._of(site)
        rotation = {"pairs": tables.pairs, "frequencies": tables.frequencies}
        return self._codec(tables.key_levels, tables.key_norm, low=tables.low, high=tables.high, rotation=rotation)

    def values_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """Per token."""
        tables = self._of(site)
        return self._codec(tables.value_levels, tables.value_norm)

    def _codec(self, levels: tuple[float, ...], norm: tuple[float, float], **of_keys: Any) -> _kvpack.Codec:
        factor, offset = norm if self.norm else (1.0, 0.0)
        return _kvpack.Codec(
            "kvquant",
            bits=self.bits,
            levels=levels,
            factor=factor,
            offset=offset,
            outliers=self.outliers,
            window=self.window,
            sinks=self.sinks,
            **of_keys,
        )
