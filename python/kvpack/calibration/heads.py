"""Which KV heads need their past: what is lost when each is demoted, and the file that it is kept in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _kvpack
from ..errors import OptionError
from ..methods import Heads
from ..methods.file import identity, write
from .attending import Span, full_layers, shape
from .demoting import demoted as demoted
from .head_losses import Distance, Echo, Gradients, Measured, Sums

RANKINGS = (
    "fisher.streaming",
    "fisher.compensated",
    "fisher.gone",
    "michel",
    "distance",
    "echo",
    "measured.streaming",
    "measured.gone",
)
"""What can be measured, by name."""


def measure(
    model: Any,
    documents: Sequence[Tensor],
    *,
    rankings: Sequence[str] = RANKINGS[:3],
    sinks: int = 4,
    window: int = 128,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Tensor]:
    """Measure what a model loses, or seems to lose, when a KV head is demoted.

    A demoted head streams (holds the first `sinks` tokens and the newest `window`), is compensated (streams, and has
    what left as one slot: its mean key and value, logit bias log N), or is gone (holds nothing, and puts out 0).

    - `fisher.streaming`, `fisher.compensated`, `fisher.gone`: expected KL to second order, nats a token, from one
      backward pass a document over labels drawn from the model itself (from a fixed seed).
    - `michel`: mean of |output . its gradient| of the text's loss, of all query heads of a group, divided by the L2
      norm of the layer (Michel et al. 2019, arXiv 1905.10650). It ranks what a head does, not what its past does.
    - `distance`: mean weight of attention beyond sinks and window (0 to 1), as DuoAttention (arXiv 2410.10819) sees it,
      whose gates are trained; no gradients.
    - `echo`: RazorAttention (arXiv 2407.15891): weight of attention to the same random token in earlier copies and to
      the one after it; no gradients, and of the documents their length alone.
    - `measured.streaming`, `measured.gone`: KL, nats a token, when that head alone is demoted; a forward a head.

    Attention is computed some rows at a time, in float32 at least, and layers are checkpointed where they can be: next
    to the model there are the logits of one document twice, and of a layer what its backward pass needs.

    Args:
        model: the transformers model, on the CPU; it is as it was afterwards, whatever happens.
        documents: tokens `[1, n]` each, read one at a time; for what is beyond the window, much longer than that.
        rankings: names from above.
        sinks: tokens at the beginning that a streaming head holds.
        window: newest tokens that it holds, beside the one that is read.
        progress: called with the tokens of each document that was read, once a kind of ranking.

    Returns:
        By name, float32 `[layers, KV heads]`: NaN for layers that have no full attention, whose heads stay full.

    Raises:
        OptionError: something is not accepted, or the model's attention cannot be looked at.
    """
    _check(documents, rankings, sinks, window)
    full_layers(model)
    sums, span = Sums(*shape(model)), Span(sinks, window)

    def of(kind: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.split(".")[1] for name in rankings if name.startswith(kind + ".")))

    readers: list[Gradients | Distance | Measured] = []
    if of("fisher") or "michel" in rankings:
        readers.append(Gradients(model, span, of("fisher"), "michel" in rankings, sums))
    if "distance" in rankings:
        readers.append(Distance(model, span, sums))
    if of("measured"):
        readers.append(Measured(model, span, of("measured"), sums))
    for reader in readers:
        for ids in documents:
            reader.read(ids)
            progress(ids.shape[1])
    if "echo" in rankings:
        echo = Echo(model, max(ids.shape[1] for ids in documents), sums)
        echo.read()
        progress(echo.tokens)
    found = {name: sums.means(name) for name in rankings}
    if "michel" in found:
        norms = found["michel"].nan_to_num().norm(dim=1, keepdim=True)
        found["michel"] = found["michel"] / norms.clamp(min=torch.finfo(torch.float64).tiny)
    return {name: values.float() for name, values in found.items()}


def save(
    path: str | os.PathLike[str],
    model: Any,
    losses: Mapping[str, Tensor],
    *,
    sinks: int = 4,
    window: int = 128,
    **about: Any,
) -> None:
    """Write what `measure` returned, and of which model it is, to a file; `about` is kept with it.

    Raises:
        OptionError: it cannot be written.
    """
    about = {"kvpack": _kvpack.__version__, "model": identity(model), **about}
    about["method"] = Heads.name
    tensors = {name: values.contiguous() for name, values in losses.items()}
    write(Path(path), {**about, "sinks": sinks, "window": window}, tensors)


def _check(documents: Sequence[Tensor], rankings: Sequence[str], sinks: int, window: int) -> None:
    unknown = sorted(set(rankings) - set(RANKINGS))
    if isinstance(rankings, str) or unknown or not rankings:
        raise OptionError(f"rankings={rankings!r} is not accepted; accepted: names of {', '.join(RANKINGS)}")
    for name, value, least in (("sinks", sinks, 0), ("window", window, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(f"{name}={value!r} is not accepted; accepted: whole numbers from {least}")
    if not documents:
        raise OptionError("documents: given none, expected tensors of tokens [1, n]")
    for ids in documents:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
            given = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise OptionError(f"documents: given {given}, expected tensors of tokens [1, n], n from 2")
