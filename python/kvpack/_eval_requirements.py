"""What the `kvpack` command needs beside kvpack, checked before anything slow begins."""

from __future__ import annotations

try:
    import matplotlib
    import tqdm
    import typer
    import yaml
except ImportError as missing:
    raise ImportError("the kvpack command needs its extra: pip install 'kvpack[eval]'") from missing

__all__ = ["matplotlib", "tqdm", "typer", "yaml"]
