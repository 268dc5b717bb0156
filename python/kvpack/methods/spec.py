"""Methods written as text, for command lines and files: `kivi:bits=2`, `kivi:bits=4:group=64`.

A method is its registered name and, after colons, parameters of its dataclass; or the name of a preset. Keys by one
codec and values by another are written with a slash (`kivi:bits=4/rotated:bits=2`), layers with a codec of their own
after `@` (`kivi:bits=2@0=q8@-1=q8`), what AdaKV shares out in brackets (`adakv(snapkv:budget=0.25)`), methods of
several families are joined with `+` (`snapkv:budget=0.25+kivi:bits=4`).

Values are Python literals, or words. In quotes any sign is a letter: `calibrated:path='/a+b.safetensors'`. The path of
a calibration may stand without them: it ends where the text does, or where `+`, or in a list a comma, and the name of
a method follow.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from ..errors import KvpackError, OptionError
from .base import Method
from .evict.adakv import AdaKV
from .presets import PRESETS
from .quantize.compose import KeyValue, PerLayer
from .quantize.gptq import GPTQ
from .registry import FAMILIES, QUANTIZE
from .renamed import renamed_options

CALIBRATED = "calibrated"
"""The name of the codec from a file, whose path may stand without quotes."""
_PATH = re.compile(rf"\b{CALIBRATED}\s*:\s*path\s*=\s*(?![\s'\"])")
_BEFORE_BRACKETS = re.compile(r"[^('\"]*[\w.]\s*\(")
_WORD = re.compile(r"[A-Za-z_][\w.~/-]*")


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
    parts = split(text, "+")
    for part in parts:
        family, method = _parse_part(part)
        if family in options:
            raise OptionError(f"method {text!r} is not accepted: it names two methods of the family {family!r}")
        options[family] = method
    return Spec("+".join(part.strip() for part in parts), options)


def spell(method: Any) -> str:
    """Return the text that `parse_spec` reads as this method: its bits, and what else is not the default.

    Raises:
        OptionError: there is no text for it.
    """
    if isinstance(method, KeyValue):
        return f"{spell(method.keys)}/{spell(method.values)}"
    if isinstance(method, PerLayer):
        return "@".join([spell(method.default), *(f"{layer}={spell(codec)}" for layer, codec in method.others.items())])
    own = [field for field in fields(method) if field.init]
    if isinstance(method, AdaKV):
        return f"{method.name}:floor={method.floor!r}({spell(method.method)})"
    changed = [f for f in own if f.name.endswith("bits") or getattr(method, f.name) != _default(f)]
    return str(method.name) + "".join(f":{f.name}={_spell_value(method, getattr(method, f.name))}" for f in changed)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _spell_value(method: Any, value: Any) -> str:
    if value == GPTQ():
        return GPTQ.name
    if isinstance(value, Mapping):
        value = {key: spell(one) if isinstance(one, Method) else one for key, one in value.items()}
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) and value not in ("None", "True", "False") else repr(value)
    text = repr(value)
    if _literal(text) != value:
        raise OptionError(f"{method!r} cannot be written as text: {text} is no literal")
    return text


def accepted_quantize(value: Any) -> str:
    """Return what to give as `quantize=` in place of `value`, for the words of an error."""
    if isinstance(value, str):
        if value in PRESETS:
            return f"kvpack.presets[{value!r}]"
        try:
            options = parse_spec(value).options
        except KvpackError:
            options = {}
        if set(options) == {"quantize"}:
            return _constructor(options["quantize"])
        if options:
            return ", ".join(f"{family}={_constructor(method)}" for family, method in options.items())
    methods = ", ".join(f"kvpack.{method.__name__}(...)" for method in QUANTIZE.values())
    presets = ", ".join(map(repr, PRESETS))
    return f"{methods}, kvpack.presets[name] with a name of {presets}, or None for Exact()"


def _constructor(method: Any) -> str:
    """The call that makes a method, as it is written after `import kvpack`."""
    if method.name == CALIBRATED:
        return f"kvpack.load_calibration({method.path!r})"
    return re.sub(r"\b([A-Z]\w*)\(", r"kvpack.\1(", repr(method))


def _parse_part(text: str) -> tuple[str, Any]:
    """Return the family and the method that one part of a text stands for."""
    if path := _PATH.match(text.strip()):
        return "quantize", make(QUANTIZE[CALIBRATED], CALIBRATED, {"path": text.strip()[path.end() :]})
    if len(split(text, "@")) > 1:
        return "quantize", _parse_layers(text)
    if len(split(text, "/")) > 1:
        sides = [_parse_part(side) for side in split(text, "/")]
        if len(sides) != 2 or any(family != "quantize" for family, _ in sides):
            raise OptionError(
                f"method {text!r} is not accepted; a slash stands between a codec of keys and one of values"
            )
        (_, keys), (_, values) = sides
        return "quantize", KeyValue(keys, values)
    if _BEFORE_BRACKETS.match(text):
        return "evict", _parse_adakv(text)
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


def _parse_layers(text: str) -> PerLayer:
    """Return what `default@layer=codec@...` stands for."""
    default, *others = split(text, "@")
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
    return PerLayer(_codec(default), codecs)


def _codec(text: str) -> Any:
    family, method = _parse_part(text)
    if family != "quantize":
        raise OptionError(f"method {text!r} is not accepted: it is no codec")
    return method


def names() -> list[str]:
    """Return the names of all registered methods, and of the presets."""
    return [*(name for methods in FAMILIES.values() for name in methods), *PRESETS]


def split(text: str, sign: str, known: Iterable[str] = ()) -> list[str]:
    """Split a text at each `sign` that is not in quotes, in brackets, or in the path of a calibration.

    Args:
        text: of methods.
        sign: one of `,+@/:`.
        known: names, besides those of the registry, that end a path.
    """
    method = "|".join(map(re.escape, sorted([*names(), *known], key=len, reverse=True)))
    # Within one method there is no telling where a path ends.
    end_of_path = re.compile(rf"\{sign}\s*(?:{method})\s*(?:$|[:+,@/(])" if sign in ",+" else r"\Z")
    parts, start, depth, quote, at = [], 0, 0, "", 0
    while at < len(text):
        letter = text[at]
        if quote:
            at += letter == "\\"
            quote = "" if letter == quote else quote
        elif path := _PATH.match(text, at):
            end = end_of_path.search(text, path.end())
            at = end.start() if end else len(text)
            continue
        elif letter in "'\"":
            quote = letter
        elif letter in "()[]{}":
            depth += 1 if letter in "([{" else -1
        elif letter == sign and not depth:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    return [*parts, text[start:]]


def split_parameters(text: str) -> tuple[str, dict[str, Any]]:
    """Split `name:parameter=value:...` into name and parameters; values are Python literals, true, false, or strings.

    Raises:
        OptionError: something after a colon is no `parameter=value`, or a parameter is there twice.
    """
    name, *settings = (part.strip() for part in split(text, ":"))
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
    accepted = [field.name for field in fields(method) if field.init]
    parameters = renamed_options(method, parameters)
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
