"""Threads: as many as torch uses, and the same ones where its OpenMP runtime can be found."""

from __future__ import annotations

from typing import Any

import torch

from . import _kvpack


def threads() -> dict[str, Any]:
    """How many threads run now, and the team that they belong to: `openmp` with its library's file name, or `own`."""
    library = _kvpack.openmp_library()
    return {
        "threads": _kvpack.set_threads(torch.get_num_threads()),
        "team": "own" if library is None else f"openmp ({library})",
    }
