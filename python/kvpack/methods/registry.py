"""The registry: the methods of each family by name."""

from __future__ import annotations

from .calibrated import Calibrated
from .kvquant import KVQuant
from .quantize import KIVI, Q4, Q8, Exact, Graded, Quantize, Rotated

# Apart and Layers have no names of their own in texts: they are written as several methods.
QUANTIZE: dict[str, type[Quantize]] = {
    method.name: method for method in (Exact, KIVI, Q8, Q4, Rotated, Graded, KVQuant, Calibrated)
}
