"""A text read through several caches at once: how well each predicts it, and how far it moves from the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .contenders import FULL, Contender, Full, held_bytes
from .forward import Reader
from .store import Record

QUANTILES = 256
"""Numbers that are kept of a document's distribution of KL: results stay small, and its percentiles right."""


class _Score:
    """What one contender scored so far."""

    def __init__(self, model: Any, contender: Contender) -> None:
        self.reader = Reader(model, contender)
        self.nll: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.agree = 0
        self.lossy = 0.0


@dataclass(frozen=True)
class Expected:
    """What the full cache expects next: `p` `[n, vocabulary]`, the sum of `p log p`, and the likeliest token."""

    p: Tensor
    negative_entropy: Tensor
    likeliest: Tensor

    @classmethod
    def of(cls, logits: Tensor, total: Tensor) -> Expected:
        """Logits in float64, and the logarithm of the sum of their exponentials."""
        p = (logits - total[:, None]).exp_()
        return cls(p, _weighted(p, logits) - total, logits.argmax(-1))

    def kl(self, logits: Tensor, total: Tensor) -> Tensor:
        """`sum p log(p / q)` for other logits, in nats."""
        return self.negative_entropy - _weighted(self.p, logits) + total


def _weighted(p: Tensor, logits: Tensor) -> Tensor:
    """`sum p x`, in which a token that cannot come counts nothing."""
    return (p * logits).masked_fill_(p == 0, 0).sum(-1)


def read_document(
    model: Any, contenders: Sequence[Contender], ids: Tensor, chunk: int, tick: Callable[[], None]
) -> list[Record]:
    """Feed a document `[n]` through the full cache and all contenders, a chunk through each in turn.

    Every token but the first is predicted. KL is `sum p log(p / q)` in nats, with p of the full cache and q of the
    contender, both on the same tokens; sums are in float64.

    Returns:
        For the full cache and each contender: `nll` (sum, nats), `tokens` predicted, `kl` (of each token, by size; of a
        long document `QUANTILES` of them, evenly spread), `kl_sum`, `agree` (tokens whose likeliest next one is the
        full cache's), and `lossy` (the share of the past that was compressed when a token was predicted, on average;
        too high where a method packs a chunk at once that is longer than its window).
    """
    scores = [_Score(model, contender) for contender in (Full(), *contenders)]
    full = scores[0]
    predicted = len(ids) - 1
    for first in range(0, predicted, chunk):
        new = ids[first : min(first + chunk, predicted)]
        targets = ids[first + 1 : first + 1 + len(new)]
        expected: Expected | None = None
        for score in scores:
            logits = score.reader(new)
            if first:
                share = score.reader.contender.lossy_share(score.reader.cache, len(new), held_bytes(full.reader.cache))
                score.lossy += share * len(new)
            found = logits.double()
            total = found.logsumexp(-1)
            score.nll.append(total - found.gather(-1, targets[:, None])[:, 0])
            if expected is None:
                expected = Expected.of(found, total)
            else:
                score.kl.append(expected.kl(found, total))
                score.agree += int((expected.likeliest == found.argmax(-1)).sum())
            tick()
    return [_record(score, predicted) for score in scores]


def _record(score: _Score, tokens: int) -> Record:
    record: Record = {
        "kind": "text",
        "method": score.reader.contender.label,
        "tokens": tokens,
        "nll": float(torch.cat(score.nll).sum()),
        "lossy": round(score.lossy / tokens, 6),
    }
    if record["method"] != FULL:
        kl = torch.cat(score.kl)
        record["kl"] = [float(f"{x:.2e}") for x in _spread(kl).tolist()]
        record["kl_sum"] = float(kl.sum())
        record["agree"] = score.agree
    return record


def _spread(x: Tensor) -> Tensor:
    """Return `x` in order of size, or of many numbers `QUANTILES` in the middle of as many equal parts."""
    if len(x) <= QUANTILES:
        return x.sort().values
    return x.quantile((torch.arange(QUANTILES, dtype=x.dtype) + 0.5) / QUANTILES)
