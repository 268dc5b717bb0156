"""What each eviction keeps, as the papers write it: plain torch, one KV head, no word of what is checked."""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Attention `[G, q, n]` of the newest `q` tokens' queries `[G, q, D]` over keys `[n, D]`, causal."""
    new, tokens = query.shape[1], key.shape[0]
    logits = query.double() @ key.double().T / key.shape[1] ** 0.5
    visible = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1)


def snapkv(query: Tensor, key: Tensor, window: int, kernel: int = 5, pooling: str = "avg") -> Tensor:
    """Scores of the tokens before the window; the window's own are not scored."""
    votes = probabilities(query[:, -window:], key).sum(1).mean(0)[: key.shape[0] - window]
    pool = torch.nn.functional.avg_pool1d if pooling == "avg" else torch.nn.functional.max_pool1d
    return pool(votes[None, None], kernel, stride=1, padding=kernel // 2)[0, 0]


def accumulated(query: Tensor, key: Tensor, alpha: float) -> Tensor:
    """`A <- alpha A + S`, query by query, summed over the query heads."""
    scores = torch.zeros(key.shape[0], dtype=torch.float64)
    for row in probabilities(query, key).sum(0):
        scores = alpha * scores + row
    return scores


def keydiff(key: Tensor) -> Tensor:
    """Minus the cosine with the mean direction."""
    directions = torch.nn.functional.normalize(key.double(), dim=-1)
    return -torch.nn.functional.cosine_similarity(key.double(), directions.mean(0, keepdim=True), dim=-1)


def best(scores: Tensor, budget: int, recent: int = 0, always: list[int] | None = None) -> list[int]:
    """The tokens that stay: the first `always`, then the newest `recent`, then the best."""
    tokens = len(scores)
    order = [
        *(always or []),
        *range(tokens - 1, tokens - 1 - recent, -1),
        *scores.argsort(descending=True, stable=True).tolist(),
    ]
    kept: list[int] = []
    for token in order:
        if token not in kept and len(kept) < budget:
            kept.append(token)
    return sorted(kept)
