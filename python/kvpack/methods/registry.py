"""The registry: the methods of each family by name."""

from __future__ import annotations

from .calibrated import Calibrated
from .evict import (
    A2SF,
    H2O,
    TOVA,
    AdaKV,
    Evict,
    ExpectedAttention,
    KeyDiff,
    L2Norm,
    Longformer,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
)
from .kvquant import KVQuant
from .quantize import KIVI, Q4, Q8, Exact, Graded, KVarN, Quantize, Rotated
from .select import Quest, Select

# Apart and Layers have no names of their own in texts: they are written as several methods.
QUANTIZE: dict[str, type[Quantize]] = {
    method.name: method for method in (Exact, KIVI, Q8, Q4, Rotated, KVarN, Graded, KVQuant, Calibrated)
}

EVICT: dict[str, type[Evict]] = {
    method.name: method
    for method in (
        SnapKV,
        PyramidKV,
        H2O,
        A2SF,
        TOVA,
        StreamingLLM,
        Longformer,
        ExpectedAttention,
        KeyDiff,
        L2Norm,
        Random,
        AdaKV,
    )
}

SELECT: dict[str, type[Select]] = {method.name: method for method in (Quest,)}
