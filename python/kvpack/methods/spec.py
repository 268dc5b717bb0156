"""Methods written as text, for command lines and files: `kivi:bits=2`, `kivi:bits=4:group=64`.

A method is its registered name and, after colons, parameters of its dataclass; or the name of a preset. Keys by one
codec and values by another are written with a slash (`kivi:bits=4/rotated:bits=2`), layers with a codec of their own
after `@` (`kivi:bits=2@0=q8@-1=q8`), what AdaKV shares out in brackets (`adakv(snapkv:budget=0.25)`), methods of
several families are joined with `+` (`snapkv:budget=0.25+kivi:bits=4`).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import OptionError
from .calibrated import Calibrated
from .evict import AdaKV
from .presets import PRESETS
from .quantize import Apart, Layers
from .registry import EVICT, QUANTIZE, SELECT

FAMILIES: dict[str, Mapping[str, Any]] = {"quantize": QUANTIZE, "evict": EVICT, "select": SELECT}
"""The registry: the methods of each family by name. A family is also the name of PackedCache's argument."""
_PATH = f"{Calibrated.name}:path="


@dataclass(frozen=True)
class Spec:
    """One way to hold a cache.

    Attributes:
        label: what it was called, with its parameters in the order in which they were given.
        options: the keyword arguments of `PackedCache`: at most one method a family.
    """

    label: str
    options: Mapping[str, Any]


def parse_spec(text: str) -> Spec:
    """Return what `text` stands for.

    Raises:
        OptionError: a method or a parameter is unknown, a value is not accepted, or a family is named twice.
    """
    options: dict[str, Any] = {}
    for part in text.split("+"):
        family, method = _parse_part(part)
        if family in options:
            raise OptionError(f"method {text!r} is not accepted: it names two methods of the family {family!r}")
        options[family] = method
    return Spec("+".join(part.strip() for part in text.split("+")), options)


def _parse_part(text: str) -> tuple[str, Any]:
    """Return the family and the method that one part of a text stands for."""
    if text.strip().startswith(_PATH):  # it may have any of the signs that mean something elsewhere
        return "quantize", Calibrated(text.strip().removeprefix(_PATH))
    if "(" in text:
        return "evict", _parse_adakv(text)
    if "@" in text:
        return "quantize", _parse_layers(text)
    if "/" in text:
        sides = [_parse_part(side) for side in text.split("/")]
        if len(sides) != 2 or any(family != "quantize" for family, _ in sides):
            raise OptionError(
                f"method {text!r} is not accepted; a slash stands between a codec of keys and one of values"
            )
        (_, keys), (_, values) = sides
        return "quantize", Apart(keys, values)
    name, parameters = split_parameters(text)
    if name in PRESETS and not parameters:
        return "quantize", PRESETS[name]
    family = next((family for family, methods in FAMILIES.items() if name in methods), None)
    if family is None:
        raise OptionError(f"method {name!r} is unknown; accepted: {', '.join(names())}")
    return family, make(FAMILIES[family][name], name, parameters)


def _parse_adakv(text: str) -> AdaKV:
    """Return what `adakv(method)` or `adakv:floor=0.1(method)` stands for."""
    head, _, inner = text.strip().partition("(")
    name, parameters = split_parameters(head)
    if name != AdaKV.name or not inner.endswith(")"):
        raise OptionError(f"method {text!r} is not accepted; brackets stand around the method of adakv(...)")
    family, method = _parse_part(inner[:-1])
    if family != "evict" or "method" in parameters:
        raise OptionError(
            f"method {text!r} is not accepted; in the brackets of adakv stands a method that scores tokens"
        )
    adakv: AdaKV = make(AdaKV, name, {"method": method, **parameters})
    return adakv


def _parse_layers(text: str) -> Layers:
    """Return what `default@layer=codec@...` stands for."""
    default, *others = text.split("@")
    codecs: dict[int, Any] = {}
    for other in others:
        layer, equals, codec = other.partition("=")
        try:
            number = int(layer)
        except ValueError:
            equals = ""
        if not equals or number in codecs:
            raise OptionError(
                f"method {text!r} is not accepted; after each @ stands the number of a layer, = and a codec"
            )
        codecs[number] = _codec(codec)
    return Layers(_codec(default), codecs)


def _codec(text: str) -> Any:
    family, method = _parse_part(text)
    if family != "quantize":
        raise OptionError(f"method {text!r} is not accepted: it is no codec")
    return method


def names() -> list[str]:
    """Return the names of all registered methods, and of the presets."""
    return [*(name for methods in FAMILIES.values() for name in methods), *PRESETS]


def split_parameters(text: str) -> tuple[str, dict[str, Any]]:
    """Split `name:parameter=value:...` into the name and the parameters; values are Python literals, true and false, or strings.

    Raises:
        OptionError: something after a colon is no `parameter=value`, or a parameter is there twice.
    """
    name, *settings = (part.strip() for part in text.split(":"))
    parameters: dict[str, Any] = {}
    for setting in settings:
        parameter, equals, value = (piece.strip() for piece in setting.partition("="))
        if not equals or not parameter or not value:
            raise OptionError(f"method {text!r}: given {setting!r} after a colon, expected parameter=value")
        if parameter in parameters:
            raise OptionError(f"method {text!r}: parameter {parameter!r} is there twice")
        parameters[parameter] = _literal(value)
    return name, parameters


def make(method: type, name: str, parameters: Mapping[str, Any]) -> Any:
    """Return the dataclass `method` with these parameters.

    Raises:
        OptionError: it has no such parameter, or does not accept a value.
    """
    accepted = [field.name for field in fields(method)]
    for parameter in parameters:
        if parameter not in accepted:
            what = ", ".join(accepted) if accepted else "none, it has no parameters"
            raise OptionError(f"method {name!r}: parameter {parameter!r} is unknown; accepted: {what}")
    try:
        return method(**parameters)
    except OptionError as error:
        raise OptionError(f"method {name!r}: {error}") from None
    except TypeError as error:
        raise OptionError(f"method {name!r}: a parameter is missing ({error}); it has: {', '.join(accepted)}") from None


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
