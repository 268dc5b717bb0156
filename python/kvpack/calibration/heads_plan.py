"""A calibration of KV heads that was asked for, checked before the model is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import OptionError
from ..methods import Heads
from ..methods.spec import split_parameters
from .heads import RANKINGS, measure, save

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
        return Heads(calibration=str(self.out), sinks=self.sinks, window=self.window)


def budget_of(given: Any) -> dict[str, float]:
    """Return what a budget of heads is: a share of the bytes (`"25%"`), or a loss (`"0.02nats"`).

    Raises:
        OptionError: it is neither.
    """
    if given is None:
        return {}
    found = _BUDGET.fullmatch(given) if isinstance(given, str) else None
    if found is None:
        raise OptionError(
            f"budget={given!r} is not accepted for KV heads; accepted: a share of the bytes such as '25%', a loss such "
            "as '0.02nats', or none: Heads(calibration=, demote=) chooses later"
        )
    number = float(found[1])
    return {"share": number / 100} if found[2] == "%" else {"nats": number}


def options_of(method: str, gradients: bool) -> dict[str, Any]:
    """Return what `heads:window=64:rankings=all` says.

    Raises:
        OptionError: a parameter is unknown or not accepted.
    """
    _, parameters = split_parameters(method)
    unknown = sorted(set(parameters) - {"sinks", "window", "rankings"})
    if unknown:
        raise OptionError(f"method {method!r}: parameter {unknown[0]!r} is unknown; accepted: sinks, window, rankings")
    rankings = parameters.get("rankings", "usual")
    if rankings not in ("usual", "all"):
        raise OptionError(f"method {method!r}: rankings={rankings!r} is not accepted; accepted: usual, all")
    slow = ("measured",) if rankings == "usual" else ()
    skipped = slow if gradients else (*slow, "fisher", "michel")
    chosen = tuple(name for name in RANKINGS if name.split(".")[0] not in skipped)
    heads = Heads(sinks=parameters.get("sinks", 4), window=parameters.get("window", 128))
    return {"rankings": chosen, "sinks": heads.sinks, "window": heads.window}
