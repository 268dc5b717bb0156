"""What LazyLLM knows of a cache: which tokens its layers hold, and what was left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..companion import Companion
from ..errors import CropError, OptionError


@dataclass
class Lazy(Companion):
    """What is known of a cache that is filled lazily, whose layers hold different tokens.

    Attributes:
        held: by layer, `[B, slots]`: the position of each token in the order in which the layer got them.
        ids: `[B, seen]`, the position ids of all tokens.
        valid: `[B, seen]`, which tokens are not pads; None when all are real.
        aux: by layer, positions `[B, n]` and hidden states `[B, n, D]` of tokens that were not computed from there on.
        running: whether a forward is under way.
        before: what was known before it; None where nothing was.
    """

    held: list[Tensor]
    ids: Tensor
    valid: Tensor | None = None
    aux: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    running: bool = False
    before: Lazy | None = None

    def check_forward(self) -> None:
        """Raises OptionError for a forward outside of LazyLLM."""
        if not self.running:
            raise OptionError(
                "this cache was filled within kvpack.LazyLLM: given a forward outside, expected one in it"
            )

    def check_crop(self) -> None:
        """Raises CropError: layers end with different tokens."""
        raise CropError("crop: given a cache that LazyLLM filled, whose layers hold different tokens; expected another")

    def reset(self) -> None:
        """Nothing is left."""

    def positions(self, layer: int, row: int, slots: Sequence[int]) -> list[int]:
        """Positions of the tokens at `slots`, which are in the order in which the layer got them."""
        return sorted(self.held[layer][row, list(slots)].tolist())

    def bytes(self) -> dict[str, int]:
        """Bytes of the auxiliary store and of the positions."""
        tensors = [*self.held, self.ids, *(t for pair in self.aux.values() for t in pair)]
        tensors += [] if self.valid is None else [self.valid]
        return {"auxiliary": sum(t.untyped_storage().nbytes() for t in tensors)}

    def select(self, rows: Sequence[int]) -> Lazy:
        """The same for these rows of the batch."""
        rows = list(rows)
        return Lazy(
            [held[rows] for held in self.held],
            self.ids[rows],
            None if self.valid is None else self.valid[rows],
            {layer: (positions[rows], hidden[rows]) for layer, (positions, hidden) in self.aux.items()},
        )

    def fork(self) -> Lazy:
        """A copy that shares the tensors, none of which is ever changed; of a forward under way, as before it."""
        if self.running and self.before is not None:
            return self.before.fork()
        return Lazy(list(self.held), self.ids, self.valid, dict(self.aux))

    def begun(self) -> Lazy:
        """A copy for a forward to change."""
        return Lazy(list(self.held), self.ids, self.valid, dict(self.aux), True, self)

    def ended(self) -> Lazy:
        """What is known when the forward is over."""
        return Lazy(self.held, self.ids, self.valid, self.aux)


def scores(lazy: Lazy, slots: Tensor, attention: Tensor) -> Tensor:
    """`[B, seen]`: what each token received, by position; -inf where it is a pad or is not held."""
    worth = torch.full(lazy.ids.shape, -math.inf).scatter(1, slots, attention)
    first = torch.zeros(len(worth), 1, dtype=torch.long)
    if lazy.valid is not None:
        worth = worth.masked_fill(~lazy.valid, -math.inf)
        first = lazy.valid.int().argmax(1, keepdim=True)
    worth.scatter_(1, first, math.inf)
    worth[:, -1] = math.inf
    return worth


def wanted(lazy: Lazy, worth: Tensor, share: float) -> Tensor:
    """`[B, seen]`: the tokens with the highest scores, a share of the context's."""
    context = worth.shape[1] if lazy.valid is None else int(lazy.valid.sum(1).max())
    best = worth.topk(max(math.ceil(share * context), 1), 1).indices
    return torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True) & (worth > -math.inf)


def split(worth: Tensor, want: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the tokens at `positions` are wanted, and which are not, by index.

    Rows take equally many: a row that wants fewer takes its next best.
    """
    most = int(want.gather(1, positions).sum(1).max())
    order = worth.gather(1, positions).argsort(dim=1, descending=True, stable=True)
    return order[:, :most], order[:, most:]


def at(positions: Tensor, hidden: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and hidden states of the tokens at `index`."""
    return positions.gather(1, index), hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def mask(lazy: Lazy, slots: Tensor, rows: Tensor) -> Tensor | None:
    """`[B, 1, rows, slots + rows]`: no token sees a later one, or a pad; None where the order of the slots says so."""
    if lazy.valid is None and (rows.shape[1] == 1 or not slots.shape[1]):
        return None
    columns = torch.cat([slots, rows], 1)
    seen = columns[:, None, :] <= rows[:, :, None]
    if lazy.valid is not None:
        seen = seen & lazy.valid.gather(1, columns)[:, None, :]
    return seen[:, None]
