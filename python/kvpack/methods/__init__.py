"""The methods, one dataclass each with the paper's defaults, in one folder a family; and a registry by name.

base.py is what all of them have in common, registry.py where they are found by name, spec.py how they are written as
text, presets.py codecs by size; combination.py is the methods of one cache together.
"""

# ruff: noqa: F403  # a family says what it has, and all above follows
from typing import TYPE_CHECKING, Any

# The families first: presets are made of their methods.
# isort: off
from .base import Method as Method, Property as Property, Site as Site
from .registry import COMPANIONS as COMPANIONS, FAMILIES as FAMILIES, register as register
from .registry import EVICT as EVICT, QUANTIZE as QUANTIZE, SELECT as SELECT
from .quantize import *
from .quantize.kvquant import KVQuantTables as KVQuantTables
from .evict import *
from .select import *
from .compact import *
from .prune import *
from .share import *
from .presets import PRESETS as PRESETS
from .combination import Methods as Methods
from .renamed import renamed_class

# isort: on

if not TYPE_CHECKING:  # type checkers see the imports, and no old names
    from . import compact, evict, prune, quantize, select, share

    _families = (quantize, evict, select, compact, prune, share)
    _own = "COMPANIONS EVICT FAMILIES KVQuantTables Method Methods PRESETS Property QUANTIZE SELECT Site register"
    __all__ = sorted([*_own.split(), *(name for family in _families for name in family.__all__)])

    def __getattr__(name: str) -> Any:
        return renamed_class(globals(), name)
