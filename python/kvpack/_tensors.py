"""Tensors cross to Rust as (pointer, dtype, shape, strides).

Whoever calls `describe` must keep the tensor alive until the Rust call returns.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from transformers import Cache

from .errors import DeviceError, DtypeError, GradError, ShapeError

Description: TypeAlias = tuple[int, str, tuple[int, int, int, int], tuple[int, int, int, int]]

# Releases before past recording let assisted decoding crop without announcing it.
RECORDING_EXISTS = hasattr(Cache, "activate_past_recording")

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_NAMES = {**DTYPES, torch.bool: "bool"}


def describe(x: Tensor) -> Description:
    """Pointer, dtype, shape and strides of a 4-D tensor whose last stride is 1."""
    return x.data_ptr(), _NAMES[x.dtype], x.shape, x.stride()


def plain(what: str, x: Tensor) -> Tensor:
    """`x` itself, or a contiguous copy where Rust cannot read its layout.

    Raises:
        ShapeError: not 4-D.
        DtypeError: not float32, float16 or bfloat16.
        DeviceError: not in CPU memory, or without memory at all (sparse, fake, meta).
        GradError: grad mode is on and the tensor requires grad.
    """
    if type(x) is Tensor and x.dtype in DTYPES and x.is_cpu and not x.requires_grad and not x.is_neg():
        stride = x.stride()
        if len(stride) == 4 and stride[3] == 1:
            return x  # what models give; all else is looked at slowly
    if x.dtype not in DTYPES:
        raise DtypeError(f"{what} have dtype {x.dtype}, expected float32, float16 or bfloat16")
    if x.device.type != "cpu":
        raise DeviceError(f"{what} are on device {x.device}, expected cpu: kvpack computes in CPU memory")
    if x.dim() != 4:
        raise ShapeError(f"{what}: given shape {tuple(x.shape)}, expected [batch, heads, tokens, head_dim]")
    if x.requires_grad and torch.is_grad_enabled():
        raise GradError(
            f"{what} require grad, and a packed cache cannot pass gradients on: given grad mode on, "
            "expected torch.no_grad() or torch.inference_mode() around the model"
        )
    if type(x) not in (Tensor, torch.nn.Parameter):
        x = _unwrap(what, x)
    return readable(x)


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that torch's SDPA would see it in: under `torch.autocast` the one of its region."""
    if not torch.is_autocast_enabled("cpu") or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype("cpu"))


def readable(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy where its last stride is not 1 or its memory is marked as negated."""
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def _unwrap(what: str, x: Tensor) -> Tensor:
    if x.layout is not torch.strided or isinstance(x, torch._subclasses.FakeTensor):
        raise DeviceError(f"{what} are a {type(x).__name__} without plain memory, expected a strided CPU tensor")
    return x


def row_of(valid: Tensor | None) -> Tensor | None:
    """Flags `[B, n]` as Rust reads them, `[B, 1, 1, n]`."""
    return None if valid is None else valid[:, None, None, :].contiguous()


def four_dimensional(mask: Tensor | None) -> Tensor | None:
    """A mask as Rust reads it.

    Raises:
        ShapeError: it has not 4 dimensions.
    """
    if mask is None:
        return None
    if mask.dim() != 4:
        raise ShapeError(f"attention mask: given shape {tuple(mask.shape)}, expected 4 dimensions")
    if mask.dtype not in DTYPES and mask.dtype != torch.bool:
        mask = mask.float()
    return readable(mask)


def crop_of(n: int, seen: int) -> tuple[int, bool]:
    """How many tokens `crop(n)` removes, and whether without announcement packed ones may be among them.

    `-n`, or for the absolute length of older releases what lies beyond it; those crop in assisted decoding so.
    """
    return (-n, False) if n <= 0 else (max(seen - n, 0), not RECORDING_EXISTS)


def rows_at(indices: Tensor, batch: int) -> list[int]:
    """The rows of a batch at `indices`, numbers or booleans.

    Raises:
        ShapeError: there is no such row, or none is chosen.
    """
    chosen = torch.arange(batch)[indices.to("cpu")] if indices.dtype == torch.bool else indices
    rows: list[int] = chosen.reshape(-1).tolist()
    bad = [i for i in rows if not -batch <= i < batch]
    if bad or not rows:
        raise ShapeError(
            f"batch indices: given {bad or 'none'}, expected at least one, each below the batch size {batch}"
        )
    return [i % batch for i in rows]
