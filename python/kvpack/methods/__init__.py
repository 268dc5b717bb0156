"""The methods, one dataclass each with the paper's defaults, and a registry by name."""

from .kvquant import KVQuant, KVQuantTables
from .presets import PRESETS
from .quantize import KIVI, Q4, Q8, QUANTIZE, Apart, Exact, Graded, Quantize, Rotated, Site

__all__ = [
    "KIVI",
    "PRESETS",
    "Q4",
    "Q8",
    "QUANTIZE",
    "Apart",
    "Exact",
    "Graded",
    "KVQuant",
    "KVQuantTables",
    "Quantize",
    "Rotated",
    "Site",
]
