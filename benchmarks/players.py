"""Engines that decode with the whole model, by turns, wherever each of them runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from .measure import spread
from .options import Options
from .results import Row
from .worker import Worker, WorkerError


@dataclass(frozen=True)
class Player:
    """One engine.

    Attributes:
        name: of the engine.
        worker: where it runs; it has the methods `start(tokens)`, `steps(count)` and `stop()`.
        which: further arguments of each of them, where several engines share a worker.
    """

    name: str
    worker: Worker
    which: Row = field(default_factory=dict)

    def start(self, tokens: int) -> None:
        """Make a cache of `tokens`, and decode a few steps to warm up."""
        self.worker.call("start", tokens=tokens, **self.which)

    def steps(self, count: int) -> list[float]:
        """Decode `count` tokens; return the milliseconds of each."""
        milliseconds: list[float] = self.worker.call("steps", count=count, **self.which)
        return milliseconds

    def stop(self) -> None:
        """Free the cache."""
        self.worker.call("stop", **self.which)


def play(players: Sequence[Player], context: int, options: Options, advance: Callable[[], None]) -> list[Row]:
    """Let every player take its turns at one context.

    Returns:
        A row for each: its milliseconds a step, or what was `missing` where it failed. The others go on without it.
    """
    times: dict[str, list[float]] = {player.name: [] for player in players}
    missing: dict[str, str] = {}

    def attempt(player: Player, act: Callable[[], list[float] | None]) -> None:
        if player.name not in missing:
            try:
                times[player.name] += act() or []
            except WorkerError as error:
                missing[player.name] = reason(error)

    for player in players:
        attempt(player, lambda player=player: player.start(context))
    for _ in range(options.rounds):
        for player in players:
            attempt(player, lambda player=player: player.steps(options.turn_steps))
        advance()
    for player in players:
        with suppress(WorkerError):
            player.stop()
    return [
        {"engine": name, "context": context}
        | ({"missing": missing[name]} if name in missing else {"ms": spread(times[name])})
        for name in times
    ]


def reason(error: WorkerError) -> str:
    """Return an error's message without the folders in it: they are of no use elsewhere."""
    return re.sub(r"(?:/[\w.+-]+)+/", "", str(error))
