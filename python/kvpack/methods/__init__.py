"""The methods, one dataclass each with the paper's defaults, and a registry by name."""

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
from .feedback import GPTQ
from .kvquant import KVQuant, KVQuantTables
from .presets import PRESETS
from .quantize import KIVI, Q4, Q8, Apart, Exact, Graded, KVarN, Layers, Quantize, Rotated, Site
from .registry import EVICT, QUANTIZE, SELECT
from .select import Quest, Select

__all__ = [
    "A2SF",
    "EVICT",
    "GPTQ",
    "H2O",
    "KIVI",
    "PRESETS",
    "Q4",
    "Q8",
    "QUANTIZE",
    "SELECT",
    "TOVA",
    "AdaKV",
    "Apart",
    "Calibrated",
    "Evict",
    "Exact",
    "ExpectedAttention",
    "Graded",
    "KVQuant",
    "KVQuantTables",
    "KVarN",
    "KeyDiff",
    "L2Norm",
    "Layers",
    "Longformer",
    "PyramidKV",
    "Quantize",
    "Quest",
    "Random",
    "Rotated",
    "Select",
    "Site",
    "SnapKV",
    "StreamingLLM",
]
