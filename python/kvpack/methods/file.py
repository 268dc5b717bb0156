"""The file that a calibration is kept in, and whose model it is of."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelMismatchError, OptionError
from ..identity import fingerprint
from .base import Site

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


def read_of(method: str, path: str) -> tuple[Header, dict[str, Tensor]]:
    """The same of a calibration for one method.

    Raises:
        OptionError: as `read`, or it was made for another method.
    """
    header, tensors = read(path)
    if header.get("method") != method:
        raise OptionError(
            f"calibration={path!r} is not accepted: it was made for {header.get('method')!r}; accepted: what "
            f"kvpack.calibrate(..., method={method!r}) wrote"
        )
    return header, tensors


def digest(path: str | os.PathLike[str]) -> str:
    """A hash of what a file holds."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


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


def check_identity(expected: Header, site: Site, known: weakref.ref[Any] | None, told: str) -> weakref.ref[Any]:
    """Compare the model of a site with what a calibration remembers of its own; each model is looked at once.

    Args:
        expected: what `identity` gave.
        site: in the model that is to use it.
        known: what this returned before.
        told: the calibration, for errors.

    Raises:
        ModelMismatchError: it is another model.
    """
    holder = site.config if site.model is None else site.model
    if known is not None and known() is holder:
        return known
    given = fingerprint(site.config)
    different = [name for name, value in expected["config"].items() if given.get(name) != value]
    if different:
        raise ModelMismatchError(
            f"{told} was made on another model: given "
            + ", ".join(f"{name}={given.get(name)}" for name in different)
            + "; expected "
            + ", ".join(f"{name}={expected['config'][name]}" for name in different)
        )
    if site.model is not None and weights_hash(site.model) != expected["weights"]:
        raise ModelMismatchError(f"{told} was made on a model with other weights")
    return weakref.ref(holder)
