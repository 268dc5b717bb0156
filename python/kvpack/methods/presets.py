"""Presets: a codec for each size, chosen on one text and reported on another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..errors import UnknownPresetError
from .quantize.base import Quantize
from .quantize.exact import Exact
from .quantize.graded import Graded
from .quantize.kvarn import KVarN


class Presets(Mapping[str, Quantize]):
    """Codecs by name; a name that is none of them is an error that says which there are."""

    def __init__(self, codecs: Mapping[str, Quantize]) -> None:
        self._codecs = dict(codecs)

    def __getitem__(self, name: str) -> Quantize:
        try:
            return self._codecs[name]
        except (KeyError, TypeError):
            raise UnknownPresetError(
                f"presets: {name!r} is unknown; accepted: {', '.join(map(repr, self._codecs))}; "
                "or make a codec of your own, such as kvpack.KIVI(bits=4)"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._codecs)

    def __len__(self) -> int:
        return len(self._codecs)

    def __repr__(self) -> str:
        return f"Presets({self._codecs!r})"


PRESETS = Presets(
    {
        "lossless": Exact(),
        "near-lossless": KVarN(bits=8),
        "balanced": Graded(key_bits=4.5, value_bits=4),
        "small": Graded(key_bits=3.5, value_bits=4),
        "tiny": Graded(key_bits=2.5, value_bits=2),
    }
)
"""Codecs by name, largest first: the model's dtype, then 8.6, 4.5, 4.0 and 2.5 bits a number with head dim 64.

They were chosen on wikitext2-valid with SmolLM2-135M; the README has what they lose on wikitext2-test.
"""
