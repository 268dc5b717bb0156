"""The methods, one dataclass each with the paper's defaults, and a registry by name."""

from .quantize import KIVI, QUANTIZE, Exact, Quantize

__all__ = ["KIVI", "QUANTIZE", "Exact", "Quantize"]
