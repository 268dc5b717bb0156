"""Small and fast KV caches for transformers models on CPUs.

model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kvpack")
cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=4))
model.generate(**inputs, past_key_values=cache)
cache.memory()
"""

# ruff: noqa: F403  # a family of methods says what it has, and all above follows
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _kvpack, _requirements, attention  # noqa: F401  # the requirements are checked first
from . import plot as plot
from ._threads import threads
from .attach import Attachment as Attachment
from .attach import attach as attach
from .cache import PackedCache as PackedCache
from .calibration import calibrate as calibrate
from .calibration import load_calibration as load_calibration
from .companions import *
from .encoder_decoder import PackedEncoderDecoderCache as PackedEncoderDecoderCache
from .errors import *
from .evaluation import Evaluation as Evaluation
from .evaluation import evaluate as evaluate
from .generation import generate as generate
from .memory import Memory as Memory
from .methods import PRESETS
from .methods.compact import *
from .methods.evict import *
from .methods.prune import *
from .methods.quantize import *
from .methods.renamed import renamed_class
from .methods.select import *
from .methods.share import *

if not TYPE_CHECKING:  # type checkers see the imports, and no old names
    from . import companions, errors
    from .methods import compact, evict, prune, quantize, select, share

    _parts = (companions, errors, quantize, evict, select, compact, prune, share)
    _classes = "Attachment Evaluation Memory PackedCache PackedEncoderDecoderCache"
    _functions = "attach calibrate evaluate generate info load_calibration"
    _own = f"{_classes} {_functions} plot presets".split()
    __all__ = sorted([*_own, *(name for part in _parts for name in part.__all__)])

    def __getattr__(name: str) -> Any:
        return renamed_class(globals(), name)


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
