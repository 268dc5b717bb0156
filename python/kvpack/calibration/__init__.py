"""Calibration: what some codecs want to know of a model beforehand, and bits spent where they matter.

`calibrate` reads a text and writes one file; `load_calibration` makes a codec of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..methods import Calibrated, Heads, Slice
from .plan import prepare

__all__ = ["calibrate", "load_calibration"]


def calibrate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    method: str,
    out: str | os.PathLike[str],
    budget: float | str | None = None,
    gradients: bool = True,
    context: int | None = None,
    documents: int | None = None,
    progress: bool = True,
) -> Calibrated | Heads | Slice:
    """Measure on a text what a method wants to know of a model, and write it to a file.

    With `method="kvquant:bits=3"`: ranges of key channels and levels of all layers. With another codec and a `budget`:
    what each layer's keys, and values, lose at each width, measured as the KL divergence of the next-token distribution
    when they alone are packed; the budget is then spent where it saves most. The losses are taken to add up.

    With `method="heads"`: what is lost when each KV head holds only its first and its newest tokens, those and the mean
    of the others, or nothing (`Heads`). From the file `Heads(calibration=out, demote=0.5)` makes any ladder.

    With `method="slice"`: the coordinates in which keys and values lose least when some are left out (`Slice`).

    Args:
        model: the transformers model, on the CPU.
        tokenizer: its tokenizer.
        text: what is read: like what the model will read later.
        method: a codec as text: `kvquant:bits=3`, `graded`, `kivi`, `rotated`, `kivi/rotated`, without its bits where
            there is a budget; or `heads`, `heads:window=256`, `heads:rankings=all` (with the slow ones),
            or `slice`.
        out: the file.
        budget: mean bits a number of what is packed, scales included; not for KVQuant. For heads the share of the bytes
            that is held, "25%", or the loss that is allowed, "0.02nats"; or none. For slice the mean rank.
        gradients: for KVQuant, whether errors weigh by the squares of the loss' gradients; for heads, whether rankings
            that need a backward pass are measured.
        context: tokens of a document (default: what the model reads, up to 2048 for KVQuant and heads, else 1156).
        documents: how many are read (default: 6 for KVQuant, 4 for heads, else 2).
        progress: whether a bar is shown.

    Returns:
        The codec, as `load_calibration(out)` gives it; or a `Heads(calibration=out)`, or a `Slice`.

    Raises:
        OptionError: something is not accepted, or the text is too short, or the file cannot be written.
    """
    options = {"budget": budget, "gradients": gradients, "context": context, "documents": documents}
    return prepare(model.config, tokenizer, text, method, Path(out), options).run(model, progress)


def load_calibration(path: str | os.PathLike[str]) -> Calibrated:
    """Return the codec that `calibrate` wrote to a file: `PackedCache(model, quantize=kvpack.load_calibration(path))`.

    What was written for `method="heads"` is a ladder: `PackedCache(model, prune=kvpack.Heads(calibration=path))`.

    Raises:
        OptionError: the file is not there, is damaged, or was written in another format.
    """
    return Calibrated(os.fspath(path))
