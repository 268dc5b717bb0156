"""A budget that is spent where it saves most."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

What = TypeVar("What")
Place = TypeVar("Place", bound=Hashable)


@dataclass(frozen=True)
class Way(Generic[What]):
    """One of the ways that there are at a place.

    Attributes:
        what: which.
        cost: what it takes of the budget.
        loss: what is to be small.
    """

    what: What
    cost: float
    loss: float


def spend(places: Mapping[Place, Sequence[Way[What]]], budget: float) -> dict[Place, Way[What]]:
    """Choose a way at each place, so that costs sum up to at most `budget` and losses to little.

    From the cheapest ways on, the step that saves the most loss for its cost is taken as long as it fits; steps are
    along the lower convex hull of a place's ways, so that this is the least sum of losses for what is spent, but for
    what is left over at the end. Where not even the cheapest ways fit, these are returned.
    """
    hulls = {place: _hull(ways) for place, ways in places.items()}
    at = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].cost for hull in hulls.values())
    slack = 1e-9 * max(1.0, abs(budget))
    while True:
        steps = [
            (-_slope(hull[i], hull[i + 1]), number, place)
            for number, (place, hull) in enumerate(hulls.items())
            if (i := at[place]) + 1 < len(hull) and hull[i + 1].cost - hull[i].cost <= left + slack
        ]
        if not steps:
            return {place: hull[at[place]] for place, hull in hulls.items()}
        _, _, place = max(steps, key=lambda step: step[:2])
        left -= hulls[place][at[place] + 1].cost - hulls[place][at[place]].cost
        at[place] += 1


def _hull(ways: Sequence[Way[What]]) -> list[Way[What]]:
    """The ways on the lower convex hull of loss over cost."""
    hull: list[Way[What]] = []
    for way in sorted(ways, key=lambda way: (way.cost, way.loss)):
        if hull and way.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) > _slope(hull[-1], way):
            hull.pop()
        hull.append(way)
    return hull


def _slope(a: Way[What], b: Way[What]) -> float:
    return (b.loss - a.loss) / (b.cost - a.cost)
