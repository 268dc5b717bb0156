"""The `quantize` family: fewer bits a number."""

# In the order in which texts and errors name them.
# isort: off
from .base import Quantize
from .exact import Exact
from .kivi import KIVI
from .block import Q8, Q4
from .rotated import Rotated
from .kvarn import KVarN
from .graded import Graded
from .kvquant import KVQuant
from .think import ThinK
from .calibrated import Calibrated
from .simulated import Simulated
from .compose import KeyValue, PerLayer
from .gptq import GPTQ

# isort: on

__all__ = [
    "GPTQ",
    "KIVI",
    "Q4",
    "Q8",
    "Calibrated",
    "Exact",
    "Graded",
    "KVQuant",
    "KVarN",
    "KeyValue",
    "PerLayer",
    "Quantize",
    "Rotated",
    "Simulated",
    "ThinK",
]
