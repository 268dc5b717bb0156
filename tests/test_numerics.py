"""What reading adds to what quantisation loses: sums are of integers, to which queries and weights are rounded."""

from __future__ import annotations

from collections.abc import Callable

import kvpack
import pytest
import torch
from reference import attention
from support import forward, kivi_bits, tiny_config
from torch import Tensor

TOKENS, HEADS, DIM = 2000, 3, 64


def errors(bits: int, logits: float) -> tuple[float, float]:
    """The errors (Frobenius norms) that reading and that quantisation make in one decode step over 2000 tokens.

    Args:
        bits: of KIVI's codes.
        logits: about how large the logits are (standard deviation).
    """
    key, value = torch.randn(1, 1, TOKENS, DIM), torch.randn(1, 1, TOKENS, DIM)
    cache = kvpack.PackedCache(
        tiny_config(layers=1, heads=HEADS, kv_heads=1, head_dim=DIM), quantize=kvpack.KIVI(bits=bits)
    )
    forward(cache, key[:, :, :-1], value[:, :, :-1], torch.zeros(1, HEADS, TOKENS - 1, DIM))
    query = logits * torch.randn(1, HEADS, 1, DIM)
    read = forward(cache, key[:, :, -1:], value[:, :, -1:], query)
    shown = torch.ones(1, TOKENS, dtype=torch.bool)

    def exact(keys: Tensor, values: Tensor) -> Tensor:
        return attention(query[0], keys[0].double(), values[0].double(), shown)

    layer = cache.layers[0]
    dequantised = exact(layer.keys, layer.values)
    return float((read[0] - dequantised).norm()), float((dequantised - exact(key, value)).norm())


@kivi_bits
@pytest.mark.parametrize("logits", [1.0, 4.0])
def test_reading_adds_less_than_a_tenth_of_what_quantisation_loses(
    bits: int, logits: float, record_property: Callable[[str, float], None]
) -> None:
    several = torch.tensor([errors(bits, logits) for _ in range(5)]).sum(0)
    ratio = float(several[0] / several[1])
    record_property("error of reading / error of quantisation", ratio)
    assert ratio < (0.05 if bits == 8 else 0.01)
