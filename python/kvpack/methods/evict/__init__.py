"""The `evict` family: fewer tokens."""

# In the order in which texts and errors name them.
# isort: off
from .base import Evict
from .snapkv import SnapKV, PyramidKV
from .attention import H2O, A2SF, TOVA
from .pattern import StreamingLLM, Longformer
from .expected import ExpectedAttention
from .keys import KeyDiff, L2Norm, Random
from .adakv import AdaKV
from .scored import Scored

# isort: on

__all__ = [
    "A2SF",
    "H2O",
    "TOVA",
    "AdaKV",
    "Evict",
    "ExpectedAttention",
    "KeyDiff",
    "L2Norm",
    "Longformer",
    "PyramidKV",
    "Random",
    "Scored",
    "SnapKV",
    "StreamingLLM",
]
