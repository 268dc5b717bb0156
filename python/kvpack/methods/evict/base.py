"""What all evictions have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ... import _kvpack
from ...errors import ModelNeededError, OptionError
from ...rotation import Rotation, rotations_of
from ..base import Amount, Method, Property, Reasons, Site, amount, check_switch, check_whole

_BUDGET = "a whole number of tokens from 1, a share of the prompt above 0 up to 1.0, or one of such for each layer"


@dataclass(frozen=True, kw_only=True)
class Evict(Method):
    """A method that chooses which tokens of a KV head stay; what goes is freed.

    Tokens are chosen when a prompt was read, before anything is packed: a forward of more than 16 tokens, or the first
    one. With `decode` the budget is held while tokens are generated too: when it is exceeded by `block` tokens, as many
    go. What was packed by then goes in the groups in which its codec packed it, by the mean of the tokens' scores.
    Scores are of all KV heads apart, positions stay what they were, and a budget that has room for all changes nothing.

    Attributes:
        sinks: tokens at the beginning of each sequence that always stay, not counting pads.
        protect: spans `(first, end)` of tokens that always stay, counted from the first token that is no pad: a system
            prompt, for example.
        decode: whether the budget is held while decoding too.
        block: tokens by which it may be exceeded there.
    """

    family: ClassVar[str] = "evict"
    without: ClassVar[str] = "None to keep all tokens"

    sinks: int = 0
    protect: tuple[tuple[int, int], ...] = ()
    decode: bool = False
    block: int = 128

    def __post_init__(self) -> None:
        check_whole(self, sinks=0, block=1)
        check_switch(self, "decode")
        object.__setattr__(self, "protect", _spans(self.protect))
        self._check()
        self.make()  # Rust knows the rest of the rules

    def _check(self) -> None:  # not every method has fields of its own
        """Raises OptionError for the first field of a method's own that is not accepted."""

    @property
    def breaks(self) -> Reasons:
        """Tokens go, from in between."""
        return {
            Property.ALL_TOKENS: "it lets tokens go",
            Property.CONSECUTIVE_POSITIONS: "it lets tokens go from in between",
        }

    @abstractmethod
    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """The method as the store of a layer knows it; with AdaKV's `floor` the layer's heads share one budget."""

    def _common(
        self, site: Site | None, floor: float | None, budget: Amount | Sequence[Amount], recent: Amount
    ) -> dict[str, Any]:
        """The options that all evictions have."""
        return {
            "budget": _of_layer(budget, site),
            "sinks": self.sinks,
            "recent": recent,
            "block": self.block if self.decode else None,
            "floor": floor,
            "protect": list(self.protect),
        }

    def _rotations(self, site: Site) -> list[Rotation]:
        """The rotary embedding of each layer's keys; ModelNeededError when the cache is made from a configuration."""
        if site.model is None:
            raise ModelNeededError(
                f"evict={self!r} is not accepted for a cache made from a configuration; accepted: PackedCache(model, "
                "...), as the model's rotary embedding has to be known"
            )
        return rotations_of(site.model)


def _of_layer(budget: Amount | Sequence[Amount], site: Site | None) -> Amount:
    """The budget of a layer; without a site that of the first, after all were checked."""
    if not isinstance(budget, Sequence) or isinstance(budget, str):
        return amount("budget", budget, _BUDGET)
    amounts = [amount("budget", one, _BUDGET) for one in budget]
    if not amounts or (site is not None and len(amounts) != site.layers):
        layers = "at least one" if site is None else f"{site.layers}, as many as the model has layers"
        raise OptionError(f"budget: given {len(amounts)} numbers; accepted: {layers}")
    return amounts[0 if site is None else site.layer]


def _spans(spans: Any) -> tuple[tuple[int, int], ...]:
    accepted = "spans (first, end) of whole numbers with first < end"
    try:
        pairs = tuple((first, end) for first, end in spans)
    except (TypeError, ValueError):
        raise OptionError(f"protect={spans!r} is not accepted; accepted: {accepted}") from None
    for first, end in pairs:
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (first, end))
        if not whole or not 0 <= first < end < 2**31:
            raise OptionError(f"protect: ({first!r}, {end!r}) is not accepted; accepted: {accepted}")
    return pairs
