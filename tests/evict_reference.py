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
    scores = probabilities(query[:, -window:], key).sum(1).mean(0)[: key.shape[0] - window]
    pool = torch.nn.functional.avg_pool1d if pooling == "avg" else torch.nn.functional.max_pool1d
    return pool(scores[None, None], kernel, stride=1, padding=kernel // 2)[0, 0]


def accumulated(query: Tensor, key: Tensor, alpha: float) -> Tensor:
    """`A <- alpha A + S`, query by query, summed over the query heads."""
    scores = torch.zeros(key.shape[0], dtype=torch.float64)
    for row in probabilities(query, key).sum(0):
        scores = alpha * scores + row
    return scores


def turned(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Vectors `[n, D]` rotated to positions `[n]`: channel `i` and `i + D / 2` are a pair."""
    angles = positions[:, None].double() * frequencies
    z = torch.polar(torch.ones_like(angles), angles) * torch.complex(*x.double().chunk(2, dim=-1))
    return torch.cat([z.real, z.imag], -1)


def expected(
    query: Tensor, key: Tensor, value: Tensor, frequencies: Tensor, future: int, sinks: int, covariance: bool
) -> Tensor:
    """Scores by the moments of the queries, which are rotated to each of the next positions and averaged there."""
    tokens, dim = key.shape
    after, attention = torch.arange(tokens, tokens + future), torch.zeros(tokens, dtype=torch.float64)
    for own in query:
        q = turned(own, -torch.arange(tokens), frequencies)[sinks:] / dim**0.5
        mean, spread = q.mean(0), torch.cov(q.T, correction=0)
        # A rotation of all positions, as matrices: its columns are the rotated unit vectors.
        rotations = torch.stack([turned(torch.eye(dim), p.expand(dim), frequencies).T for p in after])
        logits = key.double() @ (rotations @ mean).mean(0)
        if covariance:
            ahead = (rotations @ spread @ rotations.transpose(1, 2)).mean(0)
            logits += torch.einsum("ti,ij,tj->t", key.double(), ahead, key.double()) / 2
        attention[sinks:] += logits[sinks:].softmax(0) / query.shape[0]
    return attention * value.double().norm(dim=-1)


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
