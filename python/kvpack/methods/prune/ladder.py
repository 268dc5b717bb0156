"""A plan of which KV heads hold what: a budget spent over the ladder's rungs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import OptionError
from ..hulls import Way, spend

RUNGS = ("full", "streaming", "compensated", "gone")
"""What a KV head can hold: all tokens; the first and the newest; the same, and the mean of the others; nothing."""

Ladder = tuple[tuple[str, ...], ...]
"""The rung of each KV head, layer by layer."""

_Place = tuple[int, int]


def plan(
    losses: Mapping[str, Tensor],
    *,
    by: str = "fisher",
    rungs: Sequence[str] = ("streaming",),
    demote: float | None = None,
    share: float | None = None,
    nats: float | None = None,
    context: int | None = None,
    sinks: int = 4,
    window: int = 128,
    keep: Tensor | None = None,
) -> Ladder:
    """Choose a rung for each KV head: one of `demote`, `share` and `nats` says how much is to be lost or saved.

    Losses are taken to add up. With several rungs each step is along the lower convex hull of a head's, the one that
    saves the most loss for its bytes first. A head without a loss (NaN: its layer has no full attention) stays full,
    and is not counted in any share.

    Args:
        losses: what `measure` returned, `[layers, KV heads]` by name.
        by: the ranking: `fisher` or `measured`, of which there is a tensor for each rung; with `demote` also the name
            of a single tensor, such as `distance` (smaller: demoted first).
        rungs: what a head may be demoted to; with `demote` each takes the one that loses least.
        demote: share of the heads that are demoted, lowest loss first: exactly `round(demote * heads)`.
        share: share of the bytes that all heads would hold at `context` tokens (0 to 1).
        nats: sum of the losses that is allowed; the fewest bytes are looked for. With `fisher` nats a token.
        context: tokens, for `share` and `nats` (default 2048): a streaming head holds at most `sinks + window` of them,
            a compensated one a slot more, one that is gone none.
        sinks: as measured.
        window: as measured.
        keep: boolean `[layers, KV heads]`: heads that stay full, such as `retrieval_heads(losses["echo"], 0.15)`.

    Returns:
        For each layer the rungs of its heads: "full", "streaming", "compensated" or "gone".

    Raises:
        OptionError: something is not accepted, was not measured, or the budget cannot be met.
    """
    given = [name for name, x in (("demote", demote), ("share", share), ("nats", nats)) if x is not None]
    if len(given) != 1:
        raise OptionError(f"demote=, share=, nats=: given {', '.join(given) or 'none'}, expected one of them")
    rungs = _checked_rungs(rungs)
    found = {rung: _of(losses, by, rung, single=demote is not None) for rung in rungs}
    first = next(iter(found.values()))
    if any(values.shape != first.shape for values in found.values()):
        raise OptionError(f"losses: given {[tuple(x.shape) for x in found.values()]}, expected the same shape for all")
    known = ~torch.stack(list(found.values())).isnan().any(0)
    free = known & ~_checked_keep(keep, first)
    if demote is not None:
        chosen = _lowest(found, rungs, demote, known, free)
    else:
        held = _held(2048 if context is None else context, sinks, window)
        chosen = _spent(found, held, share, nats, known, free)
    layers, heads = first.shape
    return tuple(tuple(chosen.get((i, j), "full") for j in range(heads)) for i in range(layers))


def retrieval_heads(echo: Tensor, share: float) -> Tensor:
    """Return which KV heads are among those with most echo, boolean `[layers, KV heads]`.

    Args:
        echo: what `measure` has under that name.
        share: of the heads that have one, 0 to 1.

    Raises:
        OptionError: the share is out of range.
    """
    _check_share("share", share)
    known = ~echo.isnan()
    order = echo.nan_to_num(nan=-torch.inf).flatten().argsort(descending=True, stable=True)
    top = torch.zeros(echo.numel(), dtype=torch.bool)
    top[order[: round(share * int(known.sum()))]] = True
    return top.view(echo.shape)


def predicted(losses: Mapping[str, Tensor], ladder: Ladder, by: str = "fisher") -> float:
    """Return the sum of a ladder's losses, with `fisher` and `measured` in nats a token.

    Raises:
        OptionError: a rung was not measured.
    """
    down = [(i, j, rung) for i, rungs in enumerate(ladder) for j, rung in enumerate(rungs) if rung != "full"]
    tables = {rung: _of(losses, by, rung, single=True) for _, _, rung in down}
    return sum(float(tables[rung][i, j]) for i, j, rung in down)


def _lowest(
    found: Mapping[str, Tensor], rungs: Sequence[str], demote: float, known: Tensor, free: Tensor
) -> dict[_Place, str]:
    _check_share("demote", demote)
    count, most = round(demote * int(known.sum())), int(free.sum())
    if count > most:
        raise OptionError(f"demote={demote!r} is not accepted: {count} heads, of which keep= leaves {most}")
    # Each head takes the rung that loses least, the earlier one of equals.
    values, best = torch.stack([found[rung].double() for rung in rungs]).min(0)
    lowest = values.masked_fill(~free, torch.inf).flatten().argsort(stable=True)[:count].tolist()
    return {(place := divmod(i, values.shape[1])): rungs[int(best[place])] for i in lowest}


def _spent(
    found: Mapping[str, Tensor],
    held: Mapping[str, int],
    share: float | None,
    nats: float | None,
    known: Tensor,
    free: Tensor,
) -> dict[_Place, str]:
    places: dict[_Place, list[Way[str]]] = {}
    for i, j in known.nonzero().tolist():
        places[i, j] = [Way("full", held["full"], 0.0)]
        if free[i, j]:
            places[i, j] += [Way(rung, held[rung], float(values[i, j])) for rung, values in found.items()]
    if share is not None:
        _check_share("share", share)
        budget = share * held["full"] * len(places)
        least = sum(min(way.cost for way in ways) for ways in places.values())
        if least > budget * (1 + 1e-9):
            low = least / max(held["full"] * len(places), 1)
            raise OptionError(f"share={share!r} is not accepted; accepted: {low:.4f} to 1, which these rungs can meet")
        chosen = spend(places, budget)
    else:
        if nats is None or not nats >= 0:
            raise OptionError(f"nats={nats!r} is not accepted; accepted: numbers from 0")
        # The same with both turned: losses are spent, and bytes are to be few.
        turned = {place: [Way(way.what, way.loss, way.cost) for way in ways] for place, ways in places.items()}
        chosen = spend(turned, float(nats))
    return {place: way.what for place, way in chosen.items()}


def _held(context: int, sinks: int, window: int) -> dict[str, int]:
    """Tokens that a head holds on each rung."""
    for name, value, least in (("context", context, 1), ("sinks", sinks, 0), ("window", window, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(f"{name}={value!r} is not accepted; accepted: whole numbers from {least}")
    streaming = min(context, sinks + window)
    return {"full": context, "streaming": streaming, "compensated": min(context, streaming + 1), "gone": 0}


def _of(losses: Mapping[str, Tensor], by: str, rung: str, *, single: bool) -> Tensor:
    name = f"{by}.{rung}"
    if name not in losses and not (single and by in losses):
        raise OptionError(f"losses: given {', '.join(sorted(losses)) or 'none'}, expected {name!r} for rung {rung!r}")
    values = losses[name] if name in losses else losses[by]
    if values.dim() != 2 or bool((values.isinf() | (values < 0)).any()):
        raise OptionError(f"losses: {name!r} is not accepted; accepted: [layers, KV heads] of numbers from 0, or NaN")
    return values


def _checked_rungs(rungs: Sequence[str]) -> tuple[str, ...]:
    if isinstance(rungs, str) or not rungs or not set(rungs) <= set(RUNGS[1:]):
        raise OptionError(f"rungs={rungs!r} is not accepted; accepted: some of {', '.join(RUNGS[1:])}, in a tuple")
    return tuple(dict.fromkeys(rungs))


def _checked_keep(keep: Tensor | None, like: Tensor) -> Tensor:
    if keep is None:
        return torch.zeros(like.shape, dtype=torch.bool)
    if keep.dtype != torch.bool or keep.shape != like.shape:
        raise OptionError(f"keep: given {keep.dtype} {tuple(keep.shape)}, expected bool {tuple(like.shape)}")
    return keep


def _check_share(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise OptionError(f"{name}={value!r} is not accepted; accepted: numbers from 0 to 1")
