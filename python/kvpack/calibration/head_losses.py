"""What a model loses when KV heads are demoted, or seems to: one class a ranking."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .attending import CHUNK, Rows, Span, attending
from .demoting import demoted

COPIES = 4
"""How often RazorAttention's random tokens are repeated (the paper's 4)."""

Make = Callable[..., Rows]


class Sums:
    """Sums over positions, `[layers, KV heads]` a name; NaN where nothing was added.

    Attributes:
        tokens: how many positions were added, by name.
    """

    def __init__(self, layers: int, heads: int) -> None:
        self.shape = layers, heads
        self._sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, layer: int, values: Tensor) -> None:
        """Add a layer's values `[KV heads]`."""
        if name not in self._sums:
            self._sums[name] = torch.full(self.shape, torch.nan, dtype=torch.float64)
        row = self._sums[name][layer, : len(values)]
        row.copy_(row.nan_to_num() + values.double())

    def count(self, name: str, tokens: int) -> None:
        """Positions of a document that was read."""
        self.tokens[name] = self.tokens.get(name, 0) + tokens

    def means(self, name: str) -> Tensor:
        """Means over the positions."""
        found = self._sums.get(name)
        return torch.full(self.shape, torch.nan) if found is None else found / self.tokens[name]


# ---- with gradients: Fisher and Michel -------------------------------------------------------------------------------


class Gradients:
    """Losses from the gradient g of what a head puts out, o, one backward pass a document and a kind.

    Fisher: g of log p(y), y drawn from the model's own distribution at each position: for a rung with output o',
    `F = 1/2 mean_i (sum over the group's query heads of g_i . (o'_i - o_i))^2`, to second order the expected KL in nats
    a token. All positions' logarithms are summed, and go back at once: a position's g has the losses of later ones too,
    whose layers read it; what different labels add is of mean zero and nearly independent.

    Michel et al. 2019 (arXiv 1905.10650): g of the text's own next token loss; `mean_i |g_i . o_i|`, the gradient of a
    gate on the head, summed over the group's query heads. As in their code each layer is divided by its L2 norm.
    """

    def __init__(self, model: Any, span: Span, rungs: tuple[str, ...], michel: bool, sums: Sums) -> None:
        self.model, self.span, self.rungs, self.michel, self.sums = model, span, rungs, michel, sums
        self._kind = ""
        self._anchor = torch.zeros((), requires_grad=True)
        self._generator = torch.Generator().manual_seed(0)

    def read(self, ids: Tensor) -> None:
        """Add a document `[1, n]`."""
        tokens = ids.shape[1]
        # Out of inference mode first: what a graph holds cannot be made in it.
        with torch.inference_mode(False), torch.enable_grad(), attending(self.model, self), _checkpointed(self.model):
            logits = self.model(input_ids=ids.clone(), use_cache=False).logits
            if self.rungs:
                self._kind = "fisher"
                labels = _draw(logits[0].detach(), self._generator)
                slopes = torch.empty_like(logits)
                _write_slopes(slopes[0], logits[0].detach(), labels)
                torch.autograd.grad(logits, self._anchor, slopes, retain_graph=self.michel)
                del slopes
            if self.michel:
                self._kind = "michel"
                slopes = torch.zeros_like(logits)
                _write_slopes(slopes[0, :-1], logits[0, :-1].detach(), ids[0, 1:])
                torch.autograd.grad(logits, self._anchor, slopes)
        for name in (*(f"fisher.{rung}" for rung in self.rungs), *(["michel"] if self.michel else [])):
            self.sums.count(name, tokens)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, make: Make) -> Tensor | None:
        """The layer's output, at whose gradient `look` is called."""
        return attended(self._anchor, query, key, value, make, self, layer)

    def look(self, layer: int, rows: slice, attention: Rows, out: Tensor, slope: Tensor) -> None:
        """Add some positions: outputs and their gradients, `[H, G, c, E]`."""
        if self._kind == "michel":
            self.sums.add("michel", layer, (out * slope).sum(-1).abs().sum((1, 2)))
            return
        for rung in self.rungs:
            change = attention.demoted(rung, rows, self.span) - out
            self.sums.add(f"fisher.{rung}", layer, (slope * change).sum((1, 3)).square().sum(1) / 2)


class LooksBack(ABC):
    """Who wants to see the gradients of logits and keys too."""

    @abstractmethod
    def look_at_logits(self, layer: int, rows: slice, attention: Rows, slopes: Tensor) -> None:
        """Some positions: gradients by `q . k`, `[H, G, c, m]`, to be left as they are."""

    @abstractmethod
    def look_at_keys(self, layer: int, attention: Rows, slopes: Tensor) -> None:
        """All positions: gradients by keys, `[H, n, D]`."""


class _Attention(torch.autograd.Function):
    """Attention whose weights are computed again, some rows at a time, when its gradient comes."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        _, query, key, value, make, looker, layer = given
        rows = make(query, key, value)
        out = rows.output()
        ctx.save_for_backward(query, key, value, out)
        # Not the rows: checkpoints are to let go of the keys meanwhile.
        ctx.make, ctx.looker, ctx.layer = make, looker, layer
        result: Tensor = out.flatten(0, 1).transpose(0, 1)[None].to(query.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Any, ...]:
        query, key, value, out = ctx.saved_tensors
        attention: Rows = ctx.make(query, key, value)
        slope = slopes[0][0].to(out.dtype).transpose(0, 1).reshape(out.shape)
        looks_back = isinstance(ctx.looker, LooksBack)
        wanted = any(ctx.needs_input_grad[1:4]) or looks_back
        dq, dk, dv = (torch.zeros_like(x) for x in (attention.q, attention.k, attention.v))
        for rows in attention.chunks():
            o, g = out[:, :, rows], slope[:, :, rows]
            ctx.looker.look(ctx.layer, rows, attention, o, g)
            if not wanted:
                continue
            end = attention.end(rows)
            capped = attention.capped(rows)
            p = attention.weights(attention.masked(capped, rows))
            dv[:, :end] += p.flatten(1, 2).mT @ g.flatten(1, 2)
            # d logit = p (g . v - g . o), and down through the soft cap.
            ds = attention.sums(g, attention.v[:, :end].mT).sub_((g * o).sum(-1, keepdim=True)).mul_(p)
            if attention.softcap is not None:
                ds *= 1 - (capped / attention.softcap).square()
            ds = ds.mul_(attention.scaling)
            if looks_back:
                ctx.looker.look_at_logits(ctx.layer, rows, attention, ds)
            ds = ds.flatten(1, 2)
            dq[:, :, rows] = (ds @ attention.k[:, :end]).view(*o.shape[:3], -1)
            dk[:, :end] += ds.mT @ attention.q[:, :, rows].flatten(1, 2)
        if looks_back:
            ctx.looker.look_at_keys(ctx.layer, attention, dk)
        grads = (dq.flatten(0, 1), dk, dv) if wanted else (None, None, None)
        found = [x if x is None else x[None].to(query.dtype) for x in grads]
        return torch.zeros(()), *found, None, None, None


def attended(anchor: Tensor, query: Tensor, key: Tensor, value: Tensor, make: Make, looker: Any, layer: int) -> Tensor:
    """A layer's output; when its gradient comes, `looker.look` is called with some positions at a time."""
    out: Tensor = _Attention.apply(anchor, query, key, value, make, looker, layer)
    return out


def sampled(model: Any, ids: Tensor, anchor: Tensor, generator: torch.Generator) -> None:
    """One backward pass of `sum_i log p(y_i)` over a document `[1, n]`, each y drawn from the model's distribution."""
    with _checkpointed(model):
        logits = model(input_ids=ids.clone(), use_cache=False).logits
        slopes = torch.empty_like(logits)
        _write_slopes(slopes[0], logits[0].detach(), _draw(logits[0].detach(), generator))
        torch.autograd.grad(logits, anchor, slopes)


@contextmanager
def _checkpointed(model: Any) -> Iterator[None]:
    """Layers that support it keep their input alone, and compute the rest again when their gradient comes.

    They do so in evaluation mode too, which transformers' own switch does not.
    """
    wrapped = []
    try:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                own = layer.__dict__.get("forward")
                wrapped.append((layer, own))
                layer.forward = _again(layer.forward)
        yield
    finally:
        for layer, own in wrapped:
            with suppress(AttributeError):
                del layer.forward
            if own is not None:
                layer.forward = own


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token from each distribution `[n]`."""
    return torch.cat(
        [torch.multinomial(x.float().softmax(-1), 1, generator=generator)[:, 0] for x in logits.split(CHUNK)]
    )


def _write_slopes(out: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Write the gradient of `sum_i log p(label_i)` by the logits `[n, vocabulary]`."""
    for to, x, label in zip(out.split(CHUNK), logits.split(CHUNK), labels.split(CHUNK), strict=True):
        to.copy_(-x.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1))
        to.scatter_add_(1, label[:, None], torch.ones_like(to[:, :1]))


# ---- without gradients -----------------------------------------------------------------------------------------------


class Distance:
    """Mean weight of attention beyond sinks and window, of the group's query heads, as DuoAttention looks at it."""

    def __init__(self, model: Any, span: Span, sums: Sums) -> None:
        self.model, self.span, self.sums = model, span, sums

    def read(self, ids: Tensor) -> None:
        """Add a document `[1, n]`."""
        _run(self.model, self, ids)
        self.sums.count("distance", ids.shape[1])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, make: Make) -> Tensor | None:
        """Look at all queries."""
        rows = make(query, key, value)
        for chunk in rows.chunks():
            weights = rows.weights(rows.masked(rows.capped(chunk), chunk)).mean(1)
            far = rows.shown(chunk) & ~rows.near(chunk, self.span)
            self.sums.add("distance", layer, (weights * far).sum((1, 2)))
        return None


class Echo:
    """RazorAttention's retrieval heads (arXiv 2407.15891): no text is needed.

    Random tokens are read several times over. A head's echo is its mean weight of attention to the same token in
    earlier copies, its induction that to the one after it. A query head counts by their sum, a KV head as that of its
    group that has most, since it must serve all of them.
    """

    def __init__(self, model: Any, tokens: int, sums: Sums) -> None:
        self.model, self.sums = model, sums
        self.block = max(tokens // COPIES, 1)
        self.tokens = self.block * COPIES

    def read(self) -> None:
        """Read random tokens, drawn from a fixed seed."""
        words = self.model.get_input_embeddings().weight.shape[0]
        once = torch.randint(0, words, (1, self.block), generator=torch.Generator().manual_seed(0))
        _run(self.model, self, once.repeat(1, COPIES))
        self.sums.count("echo", self.block * (COPIES - 1))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, make: Make) -> Tensor | None:
        """Look at the queries that have an earlier copy."""
        rows = make(query, key, value)
        seen = rows.q.new_zeros(rows.q.shape[:2])
        for chunk in rows.chunks():
            weights = rows.weights(rows.masked(rows.capped(chunk), chunk))
            at = torch.arange(chunk.start, chunk.stop)[:, None]
            column = torch.arange(weights.shape[-1])
            same = (at - column) % self.block == 0
            # What follows the token of an earlier copy; the first column follows nothing.
            after = ((at - column + 1) % self.block == 0) & (column > 0)
            wanted = (same | after) & (column < at) & (at >= self.block)
            seen += (weights * wanted).sum((2, 3))
        self.sums.add("echo", layer, seen.amax(1))
        return None


class Measured:
    """KL to the full model, nats a token, when one KV head alone is demoted: a forward a head."""

    def __init__(self, model: Any, span: Span, rungs: tuple[str, ...], sums: Sums) -> None:
        self.model, self.span, self.rungs, self.sums = model, span, rungs, sums
        self.heads: dict[int, int] = {}

    def read(self, ids: Tensor) -> None:
        """Add a document `[1, n]`."""
        layers, heads = self.sums.shape
        if not self.heads:
            _run(self.model, self, ids[:, :1])
        with torch.inference_mode():
            full = self._predict([["full"] * heads] * layers, ids)
            for rung in self.rungs:
                for layer, count in self.heads.items():
                    found = []
                    for head in range(count):
                        ladder = [["full"] * heads for _ in range(layers)]
                        ladder[layer][head] = rung
                        found.append(kl(full, self._predict(ladder, ids)))
                    self.sums.add(f"measured.{rung}", layer, torch.tensor(found, dtype=torch.float64))
                self.sums.count(f"measured.{rung}", ids.shape[1])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, make: Make) -> Tensor | None:
        """Learn how many KV heads the layer has."""
        self.heads[layer] = key.shape[1]
        return None

    def _predict(self, ladder: list[list[str]], ids: Tensor) -> Tensor:
        with demoted(self.model, ladder, sinks=self.span.sinks, window=self.span.window, step=self.span.step):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return logits


def kl(full: Tensor, other: Tensor) -> float:
    """Sum over positions of the divergence from the full model's distribution, nats, of logits `[n, vocabulary]`."""
    total = 0.0
    for one, two in zip(full.split(CHUNK), other.split(CHUNK), strict=True):
        wide = torch.promote_types(one.dtype, torch.float32)
        logs = [x.to(wide).log_softmax(-1) for x in (two, one)]
        total += float(functional.kl_div(logs[0], logs[1], reduction="sum", log_target=True))
    return total


def _run(model: Any, looker: Any, ids: Tensor) -> None:
    with torch.inference_mode(), attending(model, looker):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
