"""The methods, one dataclass each with the paper's defaults, and a registry by name."""

from .calibrated import Calibrated
from .kvquant import KVQuant, KVQuantTables
from .presets import PRESETS
from .quantize import KIVI, Q4, Q8, Apart, Exact, Graded, Layers, Quantize, Rotated, Site
from .registry import QUANTIZE

__all__ = [
    "KIVI",
    "PRESETS",
    "Q4",
    "Q8",
    "QUANTIZE",
    "Apart",
    "Calibrated",
    "Exact",
    "Graded",
    "KVQuant",
    "KVQuantTables",
    "Layers",
    "Quantize",
    "Rotated",
    "Site",
]
