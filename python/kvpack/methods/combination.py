"""The methods of a cache together: at most one a family, if they go with each other and with the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import Any

from .. import _kvpack
from ..errors import OptionError
from ..identity import attribute
from .base import Method, Property, Reasons, Site
from .compact import Compact
from .evict import Evict
from .prune import Prune
from .quantize import Exact, Quantize
from .registry import FAMILIES
from .select import Select
from .share import Share
from .spec import accepted_quantize

_BASES: dict[str, type[Method]] = {base.family: base for base in (Quantize, Evict, Select, Compact, Prune, Share)}

# By model type: attention with a learned logit beside those of the tokens, which the configuration does not say.
_SINK_LOGITS = {"flint", "gpt_oss", "granite_swa", "granitemoe_swa"}


@dataclass(frozen=True)
class Party:
    """Who takes part in a combination.

    Attributes:
        name: in the middle of a sentence.
        given: how it was given.
        needs: as in `Method`.
        breaks: as in `Method`.
        family: of a method, whose place another one could take.
    """

    name: str
    given: str
    needs: Reasons
    breaks: Reasons
    family: str | None = None

    @classmethod
    def of(cls, method: Method, given: str | None = None, family: str | None = None) -> Party:
        """A method, or a companion."""
        name = type(method).__name__
        return cls(name, given or name, method.needs, method.breaks, family)


def model_party(config: Any) -> Party:
    """What a model needs and breaks, as far as the configuration of its decoder tells."""
    kind = attribute(config, "model_type")
    needs: dict[Property, str] = {}
    breaks: dict[Property, str] = {}
    alibi = getattr(attribute(config, "attn_config"), "alibi", 0) or attribute(config, "alibi")
    if alibi or kind == "bloom":
        needs[Property.ALL_TOKENS] = "with ALiBi logits are biased by the number of tokens in between"
    if attribute(config, "attn_logit_softcapping"):
        breaks[Property.PLAIN_LOGITS] = "it caps its logits"
    if kind in _SINK_LOGITS:
        breaks[Property.PLAIN_LOGITS] = "it has learned sink logits"
    return Party("the model", f"a model of type {kind!r}", needs, breaks)


def check_together(parties: Iterable[Party]) -> None:
    """Raises OptionError for the first two of which one needs what the other breaks."""
    for first, second in combinations(parties, 2):
        for needing, breaking in ((first, second), (second, first)):
            if what := next((what for what in needing.needs if what in breaking.breaks), None):
                raise OptionError(
                    f"{second.given} is not accepted with {first.given}: {needing.name} needs {what.value} "
                    f"({needing.needs[what]}), which {breaking.name} breaks ({breaking.breaks[what]}); "
                    f"accepted: {_instead(needing, breaking)}"
                )


def _instead(needing: Party, breaking: Party) -> str:
    """What would be accepted."""
    families = [family for party in (breaking, needing) if (family := party.family) not in (None, "quantize")]
    options = [f"{family}=None" for family in families]
    options += [f"another {breaking.family}= that does not break it"] if breaking.family else []
    options += [f"another {needing.family}= that does not need it"] if needing.family else []
    return ", or ".join(options)


@dataclass(frozen=True)
class Methods:
    """The methods of a cache, at most one a family.

    Attributes:
        quantize: how tokens are stored.
        evict: which tokens stay; None: all.
        select: which tokens a step of decoding reads; None: all.
        compact: what becomes of tokens that leave; None: nothing.
        prune: what is held of each head; None: all.
        share: which layers read what others hold; None: none.

    Raises:
        OptionError: one is no method of its family, or two do not go together.
    """

    quantize: Quantize = field(default_factory=Exact)
    evict: Evict | None = None
    select: Select | None = None
    compact: Compact | None = None
    prune: Prune | None = None
    share: Share | None = None

    def __post_init__(self) -> None:
        for family, base in _BASES.items():
            given = getattr(self, family)
            if not isinstance(given, base) and (given is not None or family == "quantize"):
                raise OptionError(f"{family}={given!r} is not accepted; accepted: {_accepted(family, given)}")
        check_together(self.parties())

    def given(self) -> Mapping[str, Method]:
        """The methods by family."""
        methods = {own.name: getattr(self, own.name) for own in fields(self)}
        return {family: method for family, method in methods.items() if method is not None}

    def parties(self) -> list[Party]:
        """Each method, for `check_together`."""
        return [Party.of(method, f"{family}={method!r}", family) for family, method in self.given().items()]

    def check_with(self, other: Party) -> None:
        """Raises OptionError when a method does not go with `other`: a model, or what runs beside the cache."""
        for party in self.parties():
            check_together((other, party))

    def words(self) -> str:
        """The methods as a cache's `repr` names them: what is held, what is read, and how it is stored."""
        order = ("evict", "select", "compact", "prune", "share", "quantize")
        return ", ".join(repr(method) for family in order if (method := getattr(self, family)) is not None)

    def make_layer(self, site: Site | None = None) -> _kvpack.Layer:
        """How a layer stores its tokens, which of them stay, and which a step of decoding reads.

        Of a layer with a sliding window the tokens stay that the model sees, and all of them are read.
        """
        window = None if site is None else site.window
        chosen = (self.evict, self.compact, self.select)
        evict, compact, select = chosen if window is None else (None, None, None)
        # What is calibrated for a layer is so for the tokens of its own model part.
        place = None if site is not None and site.encoder else site
        quantize = self.quantize.at(place)
        return _kvpack.Layer(
            quantize.keys_codec(place),
            quantize.values_codec(place),
            evict=None if evict is None else evict.make(site),
            compact=None if compact is None else compact.make(site),
            select=None if select is None else select.make(site),
            prune=None if self.prune is None else self.prune.make(site, quantize),
            selects=select is not None,
            center=quantize.centers(place),
            window=window,
        )

    def make_cache(
        self, sites: Mapping[int, Site], shared: bool, layers: int, last: int, last_is_read: bool, head_dim: int | None
    ) -> _kvpack.Cache:
        """An empty cache in Rust.

        Args:
            sites: the layers that are packed, by number.
            shared: whether layers may read the keys and values of other ones.
            layers: how many there are, packed or not.
            last: the last one that takes part in a forward.
            last_is_read: whether attention reads what that one holds.
            head_dim: numbers of a key and of a value, where that is known before there are some.

        Raises:
            OptionError: a method does not fit the model.
        """
        if self.prune is not None:
            self.prune.check_sites(layers, sites)
        stored = {i: self.make_layer(site) for i, site in sites.items()}
        if head_dim is not None:
            for layer in stored.values():
                layer.check_dims(head_dim, head_dim)
        return _kvpack.Cache(
            [stored.get(i) for i in range(layers)],
            [shared] * layers,
            last=last,
            last_is_read=last_is_read,
            share=None if self.share is None else self.share.make(),
        )


def _accepted(family: str, given: Any) -> str:
    """What to give for a family in place of something that is no method of it."""
    if family == "quantize":
        return accepted_quantize(given)
    methods = ", ".join(f"kvpack.{method.__name__}(...)" for method in FAMILIES[family].values())
    return f"{methods}, or {_BASES[family].without}" if methods else _BASES[family].without
