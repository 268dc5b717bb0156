"""GPTQ's error compensation for cached keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import ModelNeededError, OptionError
from ..base import Site, check_switch

_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo", "c_proj", "out_lin", "attention_output")


LEAST_DAMPING = 1e-4
"""Below this rounding in float32 would decide."""


Options: TypeAlias = dict[str, Any]
"""Options of a codec, by name."""


@dataclass(frozen=True, repr=False, eq=False)
class GPTQ:
    """GPTQ's error compensation (Frantar et al. 2022, arXiv 2210.17323) on a codec: `KIVI(compensation=GPTQ())`.

    A vector is rounded number by number, and those still to come make up for what each rounding did, in a metric `H`.
    Codes and layout are the codec's: nothing is stored for it and reading costs nothing, only packing takes longer.

    Keys have the metric of the queries that read them, `H = E[q q^T]` over the query heads of their KV head (SQuat,
    arXiv 2503.24358, does this in blocks). The cache sees the queries of prompts, and only with
    `attn_implementation="kvpack"`: with another one, or in `PackedCache.from_cache`, keys have no compensation unless
    `key_metrics` are given. Values have the metric of the output projection, `H = sum W_o^T W_o`, which needs the model
    and no data. `cache.info()` says how many heads have compensation.

    Attributes:
        damping: what is added to the diagonal of `H`, as a share of its mean; from 0.0001.
        threshold: a head has compensation where the arithmetic mean of the eigenvalues of the damped `H` is at least so
            many times the geometric one: the most that the expected square of an error can fall by.
        act_order: whether channels that weigh more are rounded first. In keys of KIVI and Graded; where a token has
            grids of its own, the order is that of its groups.
        keys: whether keys have compensation.
        values: whether values have compensation: it gained nothing where it was measured (`docs/gptq-compensation.md`).
        key_metrics: instead of what a prompt's queries give, `H` of keys as they are cached (after RoPE): a tensor
            `[layers, KV heads, D, D]`, or one `[KV heads, D, D]` a layer; positive semi-definite, in any unit.
    """

    name: ClassVar[str] = "gptq"

    damping: float = 0.1
    threshold: float = 1.2
    act_order: bool = True
    keys: bool = True
    values: bool = False
    key_metrics: Tensor | Sequence[Tensor] | None = field(default=None)

    def __post_init__(self) -> None:
        for name, low in (("damping", LEAST_DAMPING), ("threshold", 0)):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, int | float) or not low <= x < 1e6:
                raise OptionError(f"{name}={x!r} is not accepted; accepted: numbers from {low}, below 1e6")
        check_switch(self, "act_order", "keys", "values")
        if self.key_metrics is not None:
            object.__setattr__(self, "key_metrics", tuple(map(_checked_metric, _layers_of(self.key_metrics))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GPTQ):
            return NotImplemented
        mine, others = self.key_metrics or (), other.key_metrics or ()
        return self._options() == other._options() and len(mine) == len(others) and all(map(torch.equal, mine, others))

    def __hash__(self) -> int:
        return hash(self._options())

    def __repr__(self) -> str:
        given = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name != "key_metrics" and getattr(self, f.name) != f.default
        ]
        if self.key_metrics is not None:
            given.append(f"key_metrics=<{len(self.key_metrics)} layers>")
        return f"GPTQ({', '.join(given)})"

    def _options(self) -> tuple[Any, ...]:
        return (self.damping, self.threshold, self.act_order, self.keys, self.values, self.key_metrics is None)

    def for_keys(self, site: Site | None) -> Options | None:
        """The options of a codec of keys: in the metric of the prompt's queries, or in that which was given.

        Raises:
            OptionError: there are not as many metrics as the model has layers.
        """
        if not self.keys or (site is None and self.key_metrics is not None):
            return None
        if site is None or self.key_metrics is None:
            return self._in(None)
        if len(self.key_metrics) != site.layers:
            raise OptionError(
                f"key_metrics of {len(self.key_metrics)} layers are not accepted; accepted: "
                f"of the model's {site.layers}"
            )
        return self._in(self.key_metrics[site.layer])

    def for_values(self, site: Site | None) -> Options | None:
        """The options of a codec of values: in the metric of the layer's output projection.

        Raises:
            OptionError: the cache was made without the model, or the projection is not found.
        """
        return None if not self.values or site is None else self._in(output_metrics(site))

    def _in(self, metrics: Tensor | None) -> Options:
        rows = None if metrics is None else metrics.flatten(1).tolist()
        return {
            "damping": self.damping,
            "threshold": self.threshold,
            "act_order": self.act_order,
            "metrics": rows,
        }


def _layers_of(metrics: Any) -> list[Any]:
    """The metrics, layer by layer."""
    if isinstance(metrics, Tensor | Sequence) and not isinstance(metrics, str) and len(metrics):
        return list(metrics)
    raise OptionError(
        f"key_metrics={metrics!r} are not accepted; accepted: a tensor [layers, KV heads, D, D], "
        "or one [KV heads, D, D] a layer"
    )


def _checked_metric(metric: Any) -> Tensor:
    """The metrics of a layer's KV heads, float32, each with a mean of 1 on its diagonal; one that is 0 stays 0."""
    if not isinstance(metric, Tensor) or metric.dim() != 3 or metric.shape[1] != metric.shape[2] or 0 in metric.shape:
        given = tuple(metric.shape) if isinstance(metric, Tensor) else type(metric).__name__
        raise OptionError(f"key_metrics: a layer with {given} is not accepted; accepted: a tensor [KV heads, D, D]")
    metric = metric.detach().to("cpu", torch.float64)
    if not metric.isfinite().all():
        raise OptionError("key_metrics: numbers that are not finite are not accepted; accepted: finite ones")
    mean = metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    metric = torch.where(mean > 0, metric / mean, metric)
    eigenvalues, vectors = torch.linalg.eigh((metric + metric.mT) / 2)
    if (metric - metric.mT).abs().max() > _ROUNDING or eigenvalues.min() < -_ROUNDING:
        raise OptionError(
            "key_metrics: a matrix that is not symmetric and positive semi-definite is not accepted; accepted: "
            "second moments of queries"
        )
    if eigenvalues.min() < 0:
        metric = vectors * eigenvalues.clamp(min=0)[:, None] @ vectors.mT
    return metric.float()


_ROUNDING = 1e-2
"""What a metric of float16 queries may miss, as a share of the mean of its diagonal."""


def checked(compensation: Any) -> GPTQ | None:
    """The compensation that a codec was given; as text it is `gptq`.

    Raises:
        OptionError: it is neither None nor a GPTQ.
    """
    if compensation == GPTQ.name:
        return GPTQ()
    if compensation is not None and not isinstance(compensation, GPTQ):
        raise OptionError(f"compensation={compensation!r} is not accepted; accepted: None, kvpack.GPTQ(...)")
    return compensation


def output_metrics(site: Site) -> Tensor:
    """`sum_h W_o,h^T W_o,h` `[KV heads, Dv, Dv]` over the query heads of each KV head of a layer, float32.

    Raises:
        OptionError: there is no model, or its output projection is not found.
    """
    if site.model is None:
        raise ModelNeededError(
            "compensation=GPTQ(values=True) is not accepted for a cache that was made from a configuration; accepted: "
            "PackedCache(model, ...), or GPTQ(values=False)"
        )
    heads = site.config.num_attention_heads
    groups = heads // (getattr(site.config, "num_key_value_heads", None) or heads)
    for weight in _output_weights(site.model, site.layer):
        if weight.shape[1] % heads == 0:
            per_head = weight.detach().float().reshape(weight.shape[0], heads // groups, groups, -1)
            return torch.einsum("okgd,okge->kde", per_head, per_head)
    raise OptionError(
        f"compensation=GPTQ(values=True) is not accepted: layer {site.layer} of {type(site.model).__name__} has no "
        f"output projection by the name of {', '.join(_PROJECTIONS)}; accepted: GPTQ(values=False)"
    )


def _output_weights(model: nn.Module, layer: int) -> Iterator[Tensor]:
    """Weights `[out, in]` of what may be the output projection of a layer's attention."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # images have layers of these numbers too
    for module in decoder.modules():
        if getattr(module, "layer_idx", None) != layer:
            continue
        for name in _PROJECTIONS:
            projection = getattr(module, name, None)
            if isinstance(projection, nn.Linear):
                yield projection.weight
            elif isinstance(projection, Conv1D):  # GPT-2's, whose weight is [in, out]
                yield projection.weight.T
