"""What methods of all families have in common: a name, the layer they are made for, and checks of their fields."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeAlias

from ..errors import OptionError

Amount: TypeAlias = int | float
"""A whole number of tokens, or a share of them as a float."""


@dataclass(frozen=True)
class Site:
    """The attention layer of a model that a method is made for.

    Attributes:
        layer: its number.
        layers: how many layers the model has.
        config: the configuration of the model's decoder.
        model: the model, where the cache was made for one and not for a configuration.
        window: how many of the newest tokens a query sees, its own among them; None: all.
        encoder: whether it holds an encoder's tokens, for a decoder's attention to them.
    """

    layer: int
    layers: int
    config: Any
    model: Any = None
    window: int | None = None
    encoder: bool = False


class Property(Enum):
    """What a cache has without any method, and what methods may need of each other and of the model, or break."""

    RAW_KEYS = "keys as they are attended to"
    CONSECUTIVE_POSITIONS = "consecutive positions"
    ALL_TOKENS = "all tokens"
    EQUAL_HEADS = "as many tokens in each head"
    EQUAL_LAYERS = "as many tokens in each layer"
    QUERIES_SEEN = "queries that the cache sees"
    PLAIN_LOGITS = "plain logits (no cap, no sink logits)"


Reasons: TypeAlias = Mapping[Property, str]
"""Properties, and of each why it is needed, or broken: in words, for an error."""


class Method(ABC):
    """A method of any family: a frozen dataclass whose fields are the paper's parameters.

    Attributes:
        family: which of `FAMILIES` it is of; also the name of `PackedCache`'s argument.
        without: what None stands for, in place of a method of the family.
        name: in the registry, and in methods written as text (`kivi:bits=2`).
        standard: settings, as text, at which it is measured beside others.
        renamed: names that fields had in the version before, by which they are still accepted, with a warning.
    """

    family: ClassVar[str]
    without: ClassVar[str]
    name: ClassVar[str]
    standard: ClassVar[Sequence[str]]
    renamed: ClassVar[Mapping[str, str]] = {}

    @property
    def needs(self) -> Reasons:
        """What it needs of the methods that it is combined with, and of the model."""
        return {}

    @property
    def breaks(self) -> Reasons:
        """What other methods cannot count on beside it."""
        return {}


def check_whole(method: object, **least: int) -> None:
    """Raises OptionError for the first field that is no whole number from its least value on."""
    for name, low in least.items():
        value = getattr(method, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
            raise OptionError(f"{name}={value!r} is not accepted; accepted: whole numbers from {low}")


def check_bits(method: object, field: str, accepted: tuple[int, ...]) -> None:
    """Raises OptionError when a field is none of the accepted widths."""
    value = getattr(method, field)
    if isinstance(value, bool) or value not in accepted:
        raise OptionError(f"{field}={value!r} is not accepted; accepted: {', '.join(map(str, accepted))}")


def check_switch(method: object, *names: str) -> None:
    """Raises OptionError for the first field that is neither True nor False."""
    for name in names:
        value = getattr(method, name)
        if not isinstance(value, bool):
            raise OptionError(f"{name}={value!r} is not accepted; accepted: True, False")


def amount(name: str, value: Any, accepted: str) -> Amount:
    """The number of tokens, or the share, that an option was given; OptionError when it is neither."""
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    if not whole and not (isinstance(value, float) and 0 <= value <= 1):
        raise OptionError(f"{name}={value!r} is not accepted; accepted: {accepted}")
    checked: Amount = value
    return checked
