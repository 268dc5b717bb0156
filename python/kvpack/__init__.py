"""Small and fast KV caches for transformers models on CPUs.

model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kvpack")
cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=4))
model.generate(**inputs, past_key_values=cache)
cache.memory()
"""

from __future__ import annotations

from typing import Any

from . import _kvpack, _requirements, attention, plot  # noqa: F401  # the requirements are checked first
from ._threads import threads
from .attach import Attachment, attach
from .cache import PackedCache
from .calibration import calibrate, load_calibration
from .errors import (
    ConcurrencyError,
    CropError,
    DeviceError,
    DtypeError,
    GradError,
    InternalError,
    KvpackError,
    ModelMismatchError,
    ModelNeededError,
    NonFiniteError,
    OptionError,
    OutOfMemoryError,
    ShapeError,
    StaleHandleError,
    UnknownPresetError,
)
from .evaluation import Evaluation, evaluate
from .lazy import LazyLLM
from .memory import Memory
from .methods import (
    A2SF,
    GPTQ,
    H2O,
    KIVI,
    PRESETS,
    Q4,
    Q8,
    TOVA,
    AdaKV,
    Apart,
    Exact,
    ExpectedAttention,
    Graded,
    KeyDiff,
    KVarN,
    KVQuant,
    L2Norm,
    Layers,
    Longformer,
    PyramidKV,
    Quest,
    Random,
    Rotated,
    SnapKV,
    StreamingLLM,
)

__all__ = [
    "A2SF",
    "GPTQ",
    "H2O",
    "KIVI",
    "Q4",
    "Q8",
    "TOVA",
    "AdaKV",
    "Apart",
    "Attachment",
    "ConcurrencyError",
    "CropError",
    "DeviceError",
    "DtypeError",
    "Evaluation",
    "Exact",
    "ExpectedAttention",
    "GradError",
    "Graded",
    "InternalError",
    "KVQuant",
    "KVarN",
    "KeyDiff",
    "KvpackError",
    "L2Norm",
    "Layers",
    "LazyLLM",
    "Longformer",
    "Memory",
    "ModelMismatchError",
    "ModelNeededError",
    "NonFiniteError",
    "OptionError",
    "OutOfMemoryError",
    "PackedCache",
    "PyramidKV",
    "Quest",
    "Random",
    "Rotated",
    "ShapeError",
    "SnapKV",
    "StaleHandleError",
    "StreamingLLM",
    "UnknownPresetError",
    "attach",
    "calibrate",
    "evaluate",
    "info",
    "load_calibration",
    "plot",
    "presets",
]
__version__ = _kvpack.__version__
presets = PRESETS


def info() -> dict[str, Any]:
    """Version, instruction set in use and available (`KVPACK_ISA` chooses), threads and whose they are."""
    return {
        "version": __version__,
        "isa": _kvpack.isa(),
        "isa_available": _kvpack.isa_available(),
        **threads(),
    }


# A bad KVPACK_ISA or KVPACK_NUM_THREADS is an error here and now, not in the middle of a generation.
_kvpack.use_openmp()
info()
attention.register()
