"""Calibrations of KV heads and of their dims that were asked for, checked before the model is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import _kvpack
from ..errors import OptionError
from ..methods import Heads, Slice
from ..methods.file import identity, write
from ..methods.spec import split_parameters
from .heads import RANKINGS, measure, save
from .slices import measure_slices

_BUDGET = re.compile(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(%|nats)\s*")


@dataclass(frozen=True)
class HeadsPlan:
    """A calibration of KV heads that can begin.

    Attributes:
        documents: `[n, context]` token ids.
        out: the file.
        text: a hash of what is read.
        rankings: what is measured.
        sinks: tokens at the beginning that streaming heads hold.
        window: newest tokens that they hold.
        budget: what the file's own ladder may take: `share` or `nats`; none: `demote` 0.
    """

    documents: Tensor
    out: Path
    text: str
    rankings: tuple[str, ...]
    sinks: int
    window: int
    budget: Mapping[str, float]

    def run(self, model: Any, progress: bool) -> Heads:
        """Measure, choose and write."""
        from tqdm.auto import tqdm

        kinds = {"fisher" if name == "michel" else name.split(".")[0] for name in self.rankings}  # of one pass
        work = len(kinds - {"echo"}) * self.documents.numel() + ("echo" in kinds) * self.documents.shape[1]
        with tqdm(total=work, unit="token", unit_scale=True, disable=not progress) as bar:
            losses = measure(
                model,
                [document[None] for document in self.documents],
                rankings=self.rankings,
                sinks=self.sinks,
                window=self.window,
                progress=bar.update,
            )
        about = {"text": self.text, "tokens": self.documents.numel(), **(self.budget or {"demote": 0.0})}
        save(self.out, model, losses, sinks=self.sinks, window=self.window, **about)
        by = "fisher" if "fisher" in kinds else "distance"
        return Heads(calibration=str(self.out), by=by, sinks=self.sinks, window=self.window)


@dataclass(frozen=True)
class SlicePlan:
    """A calibration of slices that can begin.

    Attributes:
        documents: `[n, context]` token ids.
        out: the file.
        text: a hash of what is read.
        sinks: first tokens that stay whole.
        window: newest tokens that stay whole.
        rank: of the method that is returned.
    """

    documents: Tensor
    out: Path
    text: str
    sinks: int
    window: int
    rank: float

    def run(self, model: Any, progress: bool) -> Slice:
        """Measure and write."""
        from tqdm.auto import tqdm

        documents = [document[None] for document in self.documents]
        with tqdm(total=2 * self.documents.numel(), unit="token", unit_scale=True, disable=not progress) as bar:
            tables = measure_slices(model, documents, sinks=self.sinks, window=self.window, progress=bar.update)
        about = {"kvpack": _kvpack.__version__, "model": identity(model), "method": Slice.name}
        about |= {"text": self.text, "tokens": self.documents.numel()}
        write(self.out, about, {name: table.contiguous() for name, table in tables.items()})
        return Slice(calibration=str(self.out), rank=self.rank, sinks=self.sinks, window=self.window)


def plan_of(method: str, budget: Any, gradients: bool) -> Callable[[Tensor, Path, str], HeadsPlan | SlicePlan] | None:
    """Return what makes the calibration of `heads:window=64:rankings=all` or `slice`; None for another method.

    Raises:
        OptionError: a parameter is unknown or not accepted.
    """
    name, parameters = split_parameters(method)
    if name not in (Heads.name, Slice.name):
        return None
    accepted = ("sinks", "window", "rankings")[: 3 if name == Heads.name else 2]
    if unknown := sorted(set(parameters) - set(accepted)):
        raise OptionError(f"method {method!r}: parameter {unknown[0]!r} is unknown; accepted: {', '.join(accepted)}")
    held = Heads(sinks=parameters.get("sinks", 4), window=parameters.get("window", 128))
    common: dict[str, Any] = {"sinks": held.sinks, "window": held.window}
    if name == Heads.name:
        if budget is not None and not gradients:
            raise OptionError(f"budget={budget!r} is not accepted with gradients=False: losses are found by gradients")
        return partial(HeadsPlan, rankings=_rankings(method, parameters, gradients), budget=_budget(budget), **common)
    if not gradients:
        raise OptionError("gradients=False is not accepted for slice, whose metric is that of the gradients")
    if not isinstance(budget, int | float) or isinstance(budget, bool) or budget < 1:
        raise OptionError(f"budget={budget!r} is not accepted for slice; accepted: the mean rank, such as 48")
    return partial(SlicePlan, rank=budget, **common)


def _rankings(method: str, parameters: Mapping[str, Any], gradients: bool) -> tuple[str, ...]:
    """What is measured of heads."""
    rankings = parameters.get("rankings", "usual")
    if rankings not in ("usual", "all"):
        raise OptionError(f"method {method!r}: rankings={rankings!r} is not accepted; accepted: usual, all")
    skipped = {*(() if rankings == "all" else ("measured",)), *(() if gradients else ("fisher", "michel"))}
    return tuple(name for name in RANKINGS if name.split(".")[0] not in skipped)


def _budget(given: Any) -> dict[str, float]:
    """What a budget of heads is: a share of the bytes (`"25%"`), or a loss (`"0.02nats"`)."""
    if given is None:
        return {}
    found = _BUDGET.fullmatch(given) if isinstance(given, str) else None
    if found is None:
        raise OptionError(
            f"budget={given!r} is not accepted for heads; accepted: a share of the bytes such as '25%', a loss such as "
            "'0.02nats', or none: Heads(calibration=, demote=) chooses later"
        )
    number = float(found[1])
    return {"share": number / 100} if found[2] == "%" else {"nats": number}
