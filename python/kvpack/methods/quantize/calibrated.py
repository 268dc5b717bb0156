"""A calibration as a codec."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ModelMismatchError, OptionError
from ..base import Site
from ..file import Header, check_identity, digest, read
from ..registry import register
from ..spec import CALIBRATED, parse_spec
from .base import Quantize
from .compose import ByLayer
from .kvquant import KVQuant, KVQuantTables


@register
@dataclass(frozen=True, eq=False)
class Calibrated(ByLayer):
    """A codec from a file that `kvpack.calibrate` wrote: each layer has what was chosen, or measured, for it.

    It fits the model that it was made on alone. A cache that is made for a model compares the configuration and the
    weights, one that is made for a configuration only the configuration.

    Attributes:
        path: the file.
        sha256: a hash of what it held when it was read.
    """

    name: ClassVar[str] = CALIBRATED
    standard: ClassVar[tuple[str, ...]] = ()

    path: str
    sha256: str = field(init=False, repr=False)
    header: Header = field(init=False, repr=False)
    _layers: Mapping[int, Quantize] = field(init=False, repr=False)
    _known: weakref.ref[Any] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise OptionError(f"path={self.path!r} is not accepted; accepted: the path of a file")
        object.__setattr__(self, "path", os.fspath(self.path))
        header, tensors = read(self.path)
        object.__setattr__(self, "header", header)
        object.__setattr__(self, "sha256", digest(self.path))
        try:
            object.__setattr__(self, "_layers", _codecs(header, tensors))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OptionError(f"path: {self.path!r} is a damaged calibration: {error}") from None
        object.__setattr__(self, "_known", None)

    def codecs(self) -> Iterable[Quantize]:
        """Those of the file."""
        found: Mapping[int, Quantize] = self._layers
        return found.values()

    def codec(self, site: Site | None) -> Quantize:
        """The codec of a layer.

        Raises:
            OptionError: no layer is given.
            ModelMismatchError: it is of another model.
        """
        if site is None:
            raise OptionError(f"{self!r} has no codec without a model")
        object.__setattr__(self, "_known", check_identity(self.header["model"], site, self._known, repr(self)))
        found = self._layers.get(site.layer)
        if found is None:
            raise ModelMismatchError(f"{self!r} has nothing for layer {site.layer} of this model")
        return found

    def words(self) -> str:
        """What was found, for a terminal."""
        header: Header = self.header
        if header["method"] == "kvquant":
            return f"KVQuant's tables of {len(header['layers'])} layers, from {header['tokens']} tokens"
        found = header["report"]
        lines = [f"{layer:>5}  {codec}" for layer, codec in header["layers"].items()]
        lines.append(f"{found['bits']:.3f} bits a number; KL on the calibration text {found['kl']:.3e} nats a token")
        if "equal" in found:
            lines.append(f"the same bits in all layers ({found['equal']}): KL {found['equal_kl']:.3e}")
        return "\n".join(lines)


def _codecs(header: Header, tensors: Mapping[str, Tensor]) -> dict[int, Quantize]:
    """The codec of each layer: written as text, or of KVQuant's tables."""
    if header["method"] == "kvquant":
        tables = {int(layer): _tables(tensors, layer) for layer in header["layers"]}
        codec = KVQuant(**header["options"], tables=tables)
        return dict.fromkeys(tables, codec)
    return {int(layer): parse_spec(text).options["quantize"] for layer, text in header["layers"].items()}


def _tables(tensors: Mapping[str, Tensor], layer: str) -> KVQuantTables:
    def of(name: str) -> Any:
        return _tuples(tensors[f"{layer}.{name}"].tolist())

    return KVQuantTables(**{name: of(name) for name in KVQuantTables.__dataclass_fields__})


def table_tensors(tables: Mapping[int, KVQuantTables]) -> dict[str, Tensor]:
    """KVQuant's tables as the tensors of a file."""
    return {
        f"{layer}.{name}": torch.tensor(
            getattr(of_layer, name), dtype=torch.int32 if name == "pairs" else torch.float32
        )
        for layer, of_layer in tables.items()
        for name in KVQuantTables.__dataclass_fields__
    }


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x
