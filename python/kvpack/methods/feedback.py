"""GPTQ's error feedback for cached keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _kvpack
from ..errors import OptionError

_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo", "c_proj", "out_lin", "attention_output")


@dataclass(frozen=True)
class GPTQ:
    """Error feedback as GPTQ's (Frantar et al. 2022, arXiv 2210.17323) on a codec: `KIVI(bits=3, feedback=GPTQ())`.

    A vector is rounded number by number, and those still to come make up for what each rounding did, in a metric `H`.
    Keys have the metric of the queries that read them, `H = E[q q^T]` over the query heads of their KV head, seen while
    the first prompt is read (only with `attn_implementation="kvpack"`; without queries there is no feedback for keys).
    This is what SQuat (arXiv 2503.24358) does in blocks. Values have the metric of the output projection, `H = sum
    W_o^T W_o`, which needs no data. Nothing is stored for it and reading costs nothing; only packing takes longer.

    Attributes:
        damping: what is added to the diagonal of `H`, as a share of its mean.
        threshold: a head has feedback where the arithmetic mean of the eigenvalues of `H` is at least so many times the
            geometric one: the most that the expected square of an error can fall by.
        act_order: whether channels that weigh more are rounded first (keys of KIVI; all else has groups in an order).
        keys: whether keys have feedback.
        values: whether values have feedback: it gained nothing where it was measured (`docs/gptq-feedback.md`).
    """

    damping: float = 0.1
    threshold: float = 1.2
    act_order: bool = True
    keys: bool = True
    values: bool = False

    def __post_init__(self) -> None:
        for name, above in (("damping", True), ("threshold", False)):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, int | float) or not 0 <= x < 1e6 or (above and x == 0):
                raise OptionError(
                    f"{name}={x!r} is not accepted; accepted: numbers from 0{' on, not 0' if above else ''}"
                )
        for name in ("act_order", "keys", "values"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} is not accepted; accepted: True, False")

    def for_keys(self, method: _kvpack.Method) -> _kvpack.Method:
        """A method of keys, with feedback in the metric of the prompt's queries."""
        return method.with_feedback(self.damping, self.threshold, self.act_order, None) if self.keys else method

    def for_values(self, method: _kvpack.Method, site: Any) -> _kvpack.Method:
        """A method of values, with feedback in the metric of the layer's output projection.

        Raises:
            OptionError: the cache was made without the model, or the projection is not found.
        """
        if not self.values or site is None:
            return method
        metrics = [metric.flatten().tolist() for metric in output_metrics(site)]
        return method.with_feedback(self.damping, self.threshold, self.act_order, metrics)


def checked(feedback: Any) -> GPTQ | None:
    """The feedback that a codec was given; as text it is `gptq`.

    Raises:
        OptionError: it is neither None nor a GPTQ.
    """
    if feedback == "gptq":
        return GPTQ()
    if feedback is not None and not isinstance(feedback, GPTQ):
        raise OptionError(f"feedback={feedback!r} is not accepted; accepted: None, kvpack.GPTQ(...)")
    return feedback


def output_metrics(site: Any) -> Tensor:
    """`sum_h W_o,h^T W_o,h` `[KV heads, Dv, Dv]` over the query heads of each KV head of a layer, float32.

    Raises:
        OptionError: there is no model, or its output projection is not found.
    """
    if site.model is None:
        raise OptionError(
            "feedback=GPTQ(values=True) is not accepted for a cache that was made from a configuration; accepted: "
            "PackedCache(model, ...), or GPTQ(values=False)"
        )
    heads = site.config.num_attention_heads
    groups = heads // (getattr(site.config, "num_key_value_heads", None) or heads)
    for weight in _output_weights(site.model, site.layer):
        if weight.shape[1] % heads == 0:
            per_head = weight.detach().float().reshape(weight.shape[0], heads // groups, groups, -1)
            return torch.einsum("okgd,okge->kde", per_head, per_head)
    raise OptionError(
        f"feedback=GPTQ(values=True) is not accepted: layer {site.layer} of {type(site.model).__name__} has no output "
        f"projection by the name of {', '.join(_PROJECTIONS)}; accepted: GPTQ(values=False)"
    )


def _output_weights(model: nn.Module, layer: int) -> Iterator[Tensor]:
    """Weights `[out, in]` of what may be the output projection of a layer's attention."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) != layer:
            continue
        for name in _PROJECTIONS:
            projection = getattr(module, name, None)
            if isinstance(projection, nn.Linear):
                yield projection.weight
            elif projection is not None and type(projection).__name__ == "Conv1D":  # GPT-2's, whose weight is [in, out]
                yield projection.weight.T
