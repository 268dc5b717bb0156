"""Blocks whose rows and columns are brought to the same deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import _kvpack
from ..base import Site, check_bits, check_switch, check_whole
from ..registry import register
from .base import Quantize


@register
@dataclass(frozen=True)
class KVarN(Quantize):
    """Variance-normalised blocks (Muller et al. 2026, arXiv 2606.03458); no calibration.

    Blocks of 128 tokens are rotated as in `Rotated`; then rows (tokens) and columns (channels) are divided in turn by
    their standard deviations until all are the same. What is left is rounded on asymmetric grids: of keys one a
    channel, of values one a token, with float16 scale and zero-point. A factor a token for keys, a factor a channel for
    values (float16) are stored beside; the other factors are in the grids. `bits + 32 / 128 + 16 / head_dim` bits a
    number of keys,
    `bits + 32 / head_dim + 16 / 128` of values. A block is packed as soon as it is full: fewer than 128 of the newest
    tokens stay exact, at times none.

    Attributes:
        bits: bits of a code: 2, 3, 4 or 8. The paper has 2; its implementation 4 for keys, `kvarn:bits=4/kvarn:bits=2`.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        seed: of the random signs.
        full_window: whether a block waits until 128 newer tokens are held, too: 128 to 255 of the newest stay exact.
            The paper's rule is False.
    """

    name: ClassVar[str] = "kvarn"
    standard: ClassVar[tuple[str, ...]] = (
        "kvarn:bits=8",
        "kvarn:bits=4",
        "kvarn:bits=3",
        "kvarn:bits=4/kvarn:bits=2",
        "kvarn:bits=2",
    )

    bits: int = 2
    sinks: int = 4
    seed: int = 0
    full_window: bool = False

    def __post_init__(self) -> None:
        check_whole(self, bits=1, sinks=0, seed=0)
        check_switch(self, "full_window")
        check_bits(self, "bits", (2, 3, 4, 8))
        self.keys_codec()

    def keys_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """Per channel, with a factor a token."""
        return _kvpack.Codec("kvarn", bits=self.bits, sinks=self.sinks, seed=self.seed, full_window=self.full_window)

    values_codec = keys_codec  # per token, with a factor a channel
