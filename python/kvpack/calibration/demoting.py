"""A model some of whose KV heads are demoted, in plain torch: what a ladder does, before anything is stored so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..methods.prune.ladder import RUNGS
from .attending import Rows, Span, attending, full_layers, shape


def check_ladder(ladder: Sequence[Sequence[str]]) -> None:
    """Raises OptionError: a rung is unknown."""
    wrong = next((rung for rungs in ladder for rung in rungs if rung not in RUNGS), None)
    if wrong is not None:
        raise OptionError(f"ladder: rung {wrong!r} is not accepted; accepted: {', '.join(RUNGS)}")


class _Demoting:
    def __init__(self, ladder: Sequence[Sequence[str]], span: Span) -> None:
        self.ladder, self.span = ladder, span

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, make: Callable[..., Rows]) -> Tensor | None:
        rungs = self.ladder[layer]
        kinds = sorted(set(rungs[: key.shape[1]]))
        if kinds == ["full"]:
            return None
        whole = make(query, key, value)
        out = whole.q.new_empty((*whole.q.shape[:3], whole.v.shape[-1]))
        for rung in kinds:
            heads = torch.tensor([i for i, of_head in enumerate(rungs) if of_head == rung])
            rows = whole.only(heads)
            if rung == "full":
                out[heads] = rows.output()
            else:
                out[heads] = torch.cat([rows.demoted(rung, chunk, self.span) for chunk in rows.chunks()], 2)
        return out.flatten(0, 1).transpose(0, 1)[None]


@contextmanager
def demoted(
    model: Any, ladder: Sequence[Sequence[str]], *, sinks: int = 4, window: int = 128, step: int = 1
) -> Iterator[None]:
    """The model reads whole texts, without a cache and of one row, as if its KV heads were on these rungs.

    For quality only: every token's keys and values are there, and what a rung lets go is masked. Of a compensated head
    the slot's logit is `q . mean key` scaled, plus log N, its value the mean of what left.

    Args:
        model: the transformers model, called meanwhile with `use_cache=False`.
        ladder: a rung for each KV head, layer by layer.
        sinks: tokens at the beginning that demoted heads hold.
        window: newest tokens that they hold, before those that are fed.
        step: tokens that are fed together, and see each other.

    Raises:
        OptionError: a rung is unknown, the ladder does not fit, or the model's attention cannot be looked at.
    """
    check_ladder(ladder)
    layers, heads = shape(model)
    sizes = {len(rungs) for rungs in ladder}
    if len(ladder) != layers or sizes != {heads}:
        given = f"{len(ladder)} layers with {', '.join(map(str, sorted(sizes)))} heads"
        raise OptionError(f"ladder: given {given}, expected {layers} layers with {heads} KV heads")
    full = full_layers(model)
    wrong = next((i for i, rungs in enumerate(ladder) if i not in full and set(rungs) != {"full"}), None)
    if wrong is not None:
        raise OptionError(f"ladder: layer {wrong} has no full attention: its heads stay full")
    with attending(model, _Demoting(ladder, Span(sinks, window, step))):
        yield
