"""Names of the version before: they are accepted for one version more, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import OptionError

CLASSES = {"Apart": "KeyValue", "Layers": "PerLayer"}
"""Names of classes, and what they are called now."""


def renamed_class(module: Mapping[str, Any], name: str) -> Any:
    """What a module's `__getattr__` returns: the class that had this name, with a DeprecationWarning.

    Args:
        module: the globals of the module.
        name: what was asked for, which the module does not have.

    Raises:
        AttributeError: nothing had this name.
    """
    if name not in CLASSES:
        raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
    new = CLASSES[name]
    warnings.warn(f"kvpack.{name} is called kvpack.{new} now; the old name goes", DeprecationWarning, stacklevel=3)
    return module[new]


def renamed_options(method: type, options: Mapping[str, Any], stacklevel: int = 3) -> dict[str, Any]:
    """The options of a method by the names that they have now.

    Args:
        method: whose `renamed` says what they were called before.
        options: by any of their names.
        stacklevel: of the warning.

    Raises:
        OptionError: one is given by both of its names.
    """
    names: Mapping[str, str] = getattr(method, "renamed", {})
    found = {name: value for name, value in options.items() if name not in names}
    for old in options.keys() & names.keys():
        new = names[old]
        if new in found:
            raise OptionError(f"{old}={options[old]!r} is not accepted beside {new}=, which is its name now")
        message = f"{method.__name__}: {old}= is called {new}= now; the old name goes"
        warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
        found[new] = options[old]
    return found


def accept_old_names(method: Any) -> None:
    """Make the constructor of a method accept `renamed` names."""
    init = method.__init__

    @functools.wraps(init)
    def accepting(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **renamed_options(method, options))

    method.__init__ = accepting
