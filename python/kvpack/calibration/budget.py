"""Bits as a budget: at which widths keys and values can be packed, and how a budget is spent on layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import OptionError
from ..methods import KIVI, Graded, Quantize, Rotated
from ..methods.hulls import Way, spend
from ..methods.spec import parse_spec, spell, split

CHUNK = 128
"""Tokens of each document that are predicted from a packed past."""

_WIDTHS = (2, 3, 4, 8)
_KEY_WIDTHS = (2.0, 2.5, 3.0, 4.0, 5.0)


@dataclass(frozen=True)
class Side:
    """Keys, or values: a codec, and the widths that it is tried at.

    Attributes:
        codec: with any bits.
        field: the name of its bits.
        widths: what is tried, ascending.
    """

    codec: Quantize
    field: str
    widths: tuple[float, ...]

    def at(self, width: float) -> Quantize:
        """The codec with that width."""
        bits = width if self.field == "key_bits" else int(width)
        return dataclasses.replace(self.codec, **{self.field: bits})  # type: ignore[type-var]

    def text(self, width: float) -> str:
        """The same as text."""
        return spell(self.at(width))


def sides(method: str) -> tuple[Side, Side]:
    """Return keys and values of a method.

    Raises:
        OptionError: it is unknown, or has no bits to choose.
    """
    texts = split(method, "/")
    codecs = [parse_spec(text).options.get("quantize") for text in texts]
    if len(codecs) > 2:
        raise OptionError(
            f"method {method!r} is not accepted; a slash stands between a codec of keys and one of values"
        )
    keys, values = codecs[0], codecs[-1]
    if isinstance(values, Graded):
        if len(codecs) == 2:
            raise OptionError(f"method {method!r} is not accepted: graded is a codec of keys, whose values are rotated")
        values = Rotated(window=values.window, sinks=values.sinks, seed=values.seed)
    return _side(method, keys), _side(method, values)


def _side(method: str, codec: Quantize | None) -> Side:
    if isinstance(codec, Graded):
        return Side(codec, "key_bits", _KEY_WIDTHS)
    if isinstance(codec, Rotated) and codec.levels != "uniform":
        return Side(codec, "bits", _WIDTHS[:-1])
    if isinstance(codec, KIVI | Rotated):
        return Side(codec, "bits", _WIDTHS)
    raise OptionError(f"method {method!r} has no bits to choose; accepted: graded, kivi, rotated, or two with a slash")


@dataclass(frozen=True)
class Option:
    """One width of one layer's keys or values.

    Attributes:
        width: bits of a code.
        bits: bits a number that are held, scales included.
        loss: what it costs.
    """

    width: float
    bits: float
    loss: float


Choices = Mapping[tuple[int, int], Sequence[Option]]
"""By layer and side (0: keys, 1: values), narrowest first."""


def allocate(choices: Choices, budget: float) -> dict[tuple[int, int], Option]:
    """Spend `budget` bits a number, on average, where each bit saves most.

    `spend` says how. This is the least sum of losses for the bits that are spent, but for what is left over at the end.

    Raises:
        OptionError: not even the narrowest widths fit.
    """
    least = sum(min(option.bits for option in options) for options in choices.values()) / len(choices)
    if least > budget + 1e-9:
        raise OptionError(
            f"budget={budget!r} is not accepted; accepted: from {least:.3f}, which the narrowest widths take"
        )
    ways = {place: [Way(option, option.bits, option.loss) for option in options] for place, options in choices.items()}
    return {place: way.what for place, way in spend(ways, budget * len(choices)).items()}
