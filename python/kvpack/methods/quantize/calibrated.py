"""A calibration as a codec, and the file that it is kept in."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import ModelMismatchError, OptionError
from ...identity import fingerprint
from ..base import Site
from ..registry import register
from ..spec import CALIBRATED, parse_spec
from .base import Quantize
from .compose import ByLayer
from .kvquant import KVQuant, KVQuantTables

FORMAT = 1
"""The version of the file's format."""
_HEADER = "kvpack"
Header = dict[str, Any]


def write(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write a calibration: tensors, and in the file's metadata the header as JSON; the whole file, or none.

    Raises:
        OptionError: it cannot be written.
    """
    scratch = path.with_name(path.name + ".new")
    try:
        save_file(dict(tensors), scratch, metadata={_HEADER: json.dumps({"format": FORMAT, **header})})
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"out: {path} cannot be written: {error}") from None


def read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    """Return the header and the tensors of a calibration.

    Raises:
        OptionError: the file is not there, is none of ours, is damaged, or has a format of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise OptionError(f"path: {os.fspath(path)!r} cannot be read as a calibration: {error}") from None
    if not isinstance(header, dict):
        raise OptionError(f"path: {os.fspath(path)!r} is no calibration of kvpack")
    if header.get("format") != FORMAT:
        raise OptionError(
            f"path: {os.fspath(path)!r} has format {header.get('format')!r}, expected {FORMAT}; "
            f"it was written by kvpack {header.get('kvpack')}"
        )
    return header, tensors


def weights_hash(model: Any) -> str:
    """A hash of two numbers of each of the model's parameters, in bfloat16: whatever dtype it was loaded in."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        few = flat[[0, len(flat) // 2]] if len(flat) else flat
        digest.update(name.encode() + few.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(model: Any) -> Header:
    """What a calibration remembers of its model."""
    return {"config": fingerprint(model.config.get_text_config(decoder=True)), "weights": weights_hash(model)}


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
        object.__setattr__(self, "sha256", hashlib.sha256(Path(self.path).read_bytes()).hexdigest()[:16])
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
        self._check(site)
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

    def _check(self, site: Site) -> None:
        """Raises ModelMismatchError when the site is in another model; each model is looked at once."""
        known = self._known and self._known()
        holder = site.config if site.model is None else site.model
        if known is holder:
            return
        expected = self.header["model"]
        given = fingerprint(site.config)
        different = [name for name, value in expected["config"].items() if given.get(name) != value]
        if different:
            raise ModelMismatchError(
                f"{self!r} was made on another model: given "
                + ", ".join(f"{name}={given.get(name)}" for name in different)
                + "; expected "
                + ", ".join(f"{name}={expected['config'][name]}" for name in different)
            )
        if site.model is not None and weights_hash(site.model) != expected["weights"]:
            raise ModelMismatchError(f"{self!r} was made on a model with other weights")
        object.__setattr__(self, "_known", weakref.ref(holder))


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
