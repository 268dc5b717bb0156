"""Presets: a codec for each size, chosen on one text and reported on another."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .quantize import Exact, Graded, KVarN, Quantize

PRESETS: Mapping[str, Quantize] = MappingProxyType(
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
