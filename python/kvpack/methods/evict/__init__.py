"""The `evict` family: fewer tokens."""

from .adakv import AdaKV
from .attention import A2SF, H2O, TOVA
from .base import Amount, Evict
from .expected import ExpectedAttention
from .keys import KeyDiff, L2Norm, Random
from .pattern import Longformer, StreamingLLM
from .snapkv import PyramidKV, SnapKV

__all__ = [
    "A2SF",
    "H2O",
    "TOVA",
    "AdaKV",
    "Amount",
    "Evict",
    "ExpectedAttention",
    "KeyDiff",
    "L2Norm",
    "Longformer",
    "PyramidKV",
    "Random",
    "SnapKV",
    "StreamingLLM",
]
