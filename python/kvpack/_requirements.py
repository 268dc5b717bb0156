"""What kvpack needs beside itself, checked before anything else is imported."""

from __future__ import annotations

try:
    import torch
    import transformers
except ImportError as missing:
    raise ImportError(
        "kvpack needs torch and transformers 5.4 or newer: pip install 'kvpack[transformers]'"
    ) from missing

_OLDEST = (5, 4)
if tuple(int(x) for x in transformers.__version__.split(".")[:2]) < _OLDEST:
    raise ImportError(
        f"kvpack needs transformers 5.4 or newer, found {transformers.__version__}: pip install -U transformers"
    )

__all__ = ["torch", "transformers"]
