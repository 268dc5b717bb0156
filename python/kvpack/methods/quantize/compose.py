"""Codecs of codecs: one for keys and another for values, or one a layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ... import _kvpack
from ...errors import OptionError
from ..base import Reasons, Site
from .base import Quantize


@dataclass(frozen=True)
class KeyValue(Quantize):
    """Keys by one method, values by another: `KeyValue(KIVI(bits=4), Rotated(bits=2))`.

    As text it is written with a slash: `kivi:bits=4/rotated:bits=2`.

    Attributes:
        keys: the codec as which keys are stored.
        values: the codec as whose values values are stored.
    """

    name: ClassVar[str] = "key_value"
    standard: ClassVar[tuple[str, ...]] = ()

    keys: Quantize
    values: Quantize

    def __post_init__(self) -> None:
        for side in ("keys", "values"):
            given = getattr(self, side)
            if not isinstance(given, Quantize):
                raise OptionError(f"{side}={given!r} is not accepted; accepted: methods such as kvpack.KIVI(bits=4)")

    @property
    def needs(self) -> Reasons:
        """As the codec of keys: all that is needed so far is of keys."""
        return self.keys.needs

    @property
    def breaks(self) -> Reasons:
        """As the codec of keys."""
        return self.keys.breaks

    def centers(self, site: Site | None = None) -> bool:
        """As the codec of keys."""
        return self.keys.centers(site)

    def at(self, site: Site | None) -> Quantize:
        """Those of both."""
        return replace(self, keys=self.keys.at(site), values=self.values.at(site))

    def keys_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """That of `keys`."""
        return self.keys.keys_codec(site)

    def values_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """That of `values`."""
        return self.values.values_codec(site)


class ByLayer(Quantize):
    """A codec that is another codec in each layer."""

    @abstractmethod
    def codecs(self) -> Iterable[Quantize]:
        """All codecs of all layers."""

    @abstractmethod
    def codec(self, site: Site | None) -> Quantize:
        """The codec of a layer; OptionError when there is none."""

    @property
    def needs(self) -> Reasons:
        """What any of the codecs needs."""
        return {of: why for codec in self.codecs() for of, why in codec.needs.items()}

    @property
    def breaks(self) -> Reasons:
        """What any of the codecs breaks."""
        return {of: why for codec in self.codecs() for of, why in codec.breaks.items()}

    def centers(self, site: Site | None = None) -> bool:
        """As the layer's codec; without a site as any."""
        codecs = self.codecs() if site is None else (self.codec(site),)
        return any(codec.centers(site) for codec in codecs)

    def at(self, site: Site | None) -> Quantize:
        """That of the layer."""
        return self.codec(site).at(site)

    def keys_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """That of the layer."""
        return self.codec(site).keys_codec(site)

    def values_codec(self, site: Site | None = None) -> _kvpack.Codec:
        """That of the layer."""
        return self.codec(site).values_codec(site)


@dataclass(frozen=True)
class PerLayer(ByLayer):
    """Some layers by another codec than the rest: `PerLayer(KIVI(bits=2), {0: Q8(), -1: Q8()})`.

    The first and the last layers of many models need more bits than the others. As text it is written with `@`:
    `kivi:bits=2@0=q8@-1=q8`.

    Attributes:
        default: the codec of all layers that are not named.
        others: codecs by the number of the layer; negative numbers count from the last one.
    """

    name: ClassVar[str] = "per_layer"
    standard: ClassVar[tuple[str, ...]] = ()

    default: Quantize
    others: Mapping[int, Quantize] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.others, Mapping):
            raise OptionError(f"others={self.others!r} is not accepted; accepted: codecs by the number of the layer")
        for layer, codec in ((None, self.default), *self.others.items()):
            if not isinstance(codec, Quantize):
                where = "default" if layer is None else f"layer {layer}"
                raise OptionError(f"{where}: {codec!r} is not accepted; accepted: methods such as kvpack.KIVI(bits=4)")
            if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool)):
                raise OptionError(f"others: {layer!r} is not accepted; accepted: whole numbers of layers")

    def codecs(self) -> Iterable[Quantize]:
        """That of most layers, then the others."""
        return (self.default, *self.others.values())

    def codec(self, site: Site | None) -> Quantize:
        """The codec of a layer.

        Raises:
            OptionError: a number is none of the model's, or two numbers are the same layer.
        """
        if site is None:
            return self.default
        if beyond := [layer for layer in self.others if not -site.layers <= layer < site.layers]:
            raise OptionError(
                f"others: layers {beyond} are not accepted; accepted: -{site.layers} to {site.layers - 1}"
            )
        by_number = {layer % site.layers: codec for layer, codec in self.others.items()}
        if len(by_number) < len(self.others):
            raise OptionError(f"others: {list(self.others)} name a layer twice in a model of {site.layers} layers")
        return by_number.get(site.layer, self.default)
