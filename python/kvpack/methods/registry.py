"""The registry: the methods of each family by name.

A method is entered where it is defined, by `@register` above its dataclass. Texts, the words of errors and the
leaderboard follow from what is entered.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, TypeVar, cast

from ..errors import OptionError
from .base import Method
from .renamed import accept_old_names

if TYPE_CHECKING:
    from .evict import Evict
    from .quantize import Quantize
    from .select import Select

_M = TypeVar("_M", bound=type[Method])

FAMILIES: dict[str, dict[str, type[Method]]] = {
    family: {} for family in ("quantize", "evict", "select", "compact", "prune", "share")
}
"""The methods of each family by name. A family is also the name of PackedCache's argument."""

QUANTIZE = cast("dict[str, type[Quantize]]", FAMILIES["quantize"])
EVICT = cast("dict[str, type[Evict]]", FAMILIES["evict"])
SELECT = cast("dict[str, type[Select]]", FAMILIES["select"])

COMPANIONS: dict[str, type[Method]] = {}
"""What runs beside a cache, by name; the family of these is "companion"."""


def register(method: _M) -> _M:
    """Enter a method into the registry of its family, by its name.

    Raises:
        OptionError: another method has that name, or there is no such family.
    """
    families = {**FAMILIES, "companion": COMPANIONS}
    if method.family not in families:
        raise OptionError(f"family: {method.family!r} is unknown; accepted: {', '.join(families)}")
    if method.name in chain.from_iterable(families.values()):
        raise OptionError(f"name: {method.name!r} is not accepted for {method.__name__}: another method has it")
    if method.renamed:
        accept_old_names(method)
    families[method.family][method.name] = method
    return method
