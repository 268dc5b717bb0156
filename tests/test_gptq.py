"""GPTQ's compensation: codes are those of the algorithm, and errors cost less in its metric."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import kvpack
import pytest
import torch
from reference import quantise
from support import assert_same_packed, filled_layer, forward, left_padding, random_kv, tiny_config, tiny_model
from test_formats import hadamard
from torch import Tensor

ALWAYS = kvpack.GPTQ(threshold=0.0, values=True)
KEYS = kvpack.GPTQ(threshold=0.0, values=False)


def prompt(tokens: int, dim: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values, and queries with few strong directions."""
    key, value = random_kv(1, heads, tokens, dim)
    strong = torch.randn(4, dim) * 3
    query = torch.randn(1, 2 * heads, tokens, 4) @ strong + 0.3 * torch.randn(1, 2 * heads, tokens, dim)
    return key, value, query


def metric_of(query: Tensor, damping: float = 0.1) -> Tensor:
    """`sum q q^T` of queries `[.., dim]`, damped, in float64."""
    q = query.reshape(-1, query.shape[-1]).double()
    metric = q.T @ q
    return metric + damping * metric.diag().mean() * torch.eye(len(metric), dtype=torch.float64)


def gptq(x: Tensor, metric: Tensor, order: Tensor, quantise_column: Any) -> None:
    """GPTQ as published, by the inverse's Cholesky factor: `quantise_column(channel, column)` is what is read of it."""
    x = x.double()[:, order]
    factor = torch.linalg.cholesky(torch.linalg.inv(metric[order][:, order]), upper=True)
    for i, channel in enumerate(order.tolist()):
        error = (x[:, i] - quantise_column(channel, x[:, i].clone())) / factor[i, i]
        x[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]


@pytest.mark.parametrize(("bits", "dim"), [(2, 32), (3, 80), (4, 64)])
def test_kivi_keys_are_gptqs_codes(bits: int, dim: int) -> None:
    key, value, query = prompt(132, dim)
    cache = filled_layer(kvpack.KIVI(bits=bits, group=32, compensation=KEYS), key, value, query)
    same: list[float] = []
    for head in range(2):
        metric = metric_of(query[0, 2 * head : 2 * head + 2])
        order = metric.diag().argsort(descending=True, stable=True)
        packed = cache.layers[0].packed(0, head)
        for group in range(4):
            codes: dict[int, Tensor] = {}
            scales: dict[int, Tensor] = {}

            def rounded(
                channel: int, column: Tensor, codes: dict[int, Tensor] = codes, scales: dict[int, Tensor] = scales
            ) -> Tensor:
                codes[channel], scales[channel], zero = quantise(column, bits, 0)
                return (codes[channel] * scales[channel] + zero).double()

            gptq(key[0, head, 4 + 32 * group : 36 + 32 * group], metric, order, rounded)
            expected = torch.stack([codes[c] for c in range(dim)], 1).to(torch.uint8)
            same.append((packed["key_codes"][32 * group : 32 * group + 32] == expected).double().mean().item())
            if same[-1] == 1:
                scale = torch.cat([scales[c] for c in range(dim)])
                torch.testing.assert_close(packed["key_scale"][group], scale, rtol=1e-3, atol=0)
    # A scale that is nearly undecided between two float16 may fall otherwise, and then what follows in its group does.
    assert statistics.median(same) > 0.999
    assert min(same) > 0.8


@pytest.mark.parametrize(("key_bits", "dim"), [(2.5, 64), (4.0, 80)])
def test_graded_keys_are_gptqs_codes_at_their_widths(key_bits: float, dim: int) -> None:
    key, value, query = prompt(132, dim)
    key = key * torch.logspace(-1.5, 1, dim)
    cache = filled_layer(kvpack.Graded(key_bits=key_bits, group=64, compensation=KEYS), key, value, query)
    plain = filled_layer(kvpack.Graded(key_bits=key_bits, group=64), key, value, query)
    same: list[float] = []
    for head in range(2):
        bits = cache.layers[0].key_bits(0, head)[0]
        assert torch.equal(bits, plain.layers[0].key_bits(0, head)[0])
        metric = metric_of(query[0, 2 * head : 2 * head + 2])
        order = metric.diag().argsort(descending=True, stable=True)
        packed = cache.layers[0].packed(0, head)
        for group in range(2):
            expected = torch.zeros(64, dim)

            def rounded(channel: int, column: Tensor, bits: Tensor = bits, expected: Tensor = expected) -> Tensor:
                if bits[channel] == 0:
                    return column.mean().half().double().expand(len(column))
                expected[:, channel], scale, zero = quantise(column, int(bits[channel]), 0)
                return (expected[:, channel] * scale + zero).double()

            gptq(key[0, head, 4 + 64 * group : 68 + 64 * group], metric, order, rounded)
            codes = packed["key_codes"][64 * group : 64 * group + 64]
            same.append((codes == expected.to(torch.uint8)).double().mean().item())
    assert statistics.median(same) > 0.999
    assert min(same) > 0.8


@pytest.mark.parametrize(("bits", "dim", "group"), [(2, 64, 0), (3, 80, 16), (4, 128, 32), (3, 96, 0)])
def test_rotated_keys_are_gptqs_codes(bits: int, dim: int, group: int) -> None:
    key, value, query = prompt(200, dim)
    codec = kvpack.Rotated(bits=bits, group=group, window=32, seed=3, compensation=KEYS)
    cache = filled_layer(codec, key, value, query)
    turn, middle = hadamard(dim, seed=3), (2**bits - 1) / 2
    best = {2: 0.9957, 3: 0.5860, 4: 0.3352}[bits]
    for head in range(2):
        metric = turn @ metric_of(query[0, 2 * head : 2 * head + 2]) @ turn.T
        factor = torch.linalg.cholesky(torch.linalg.inv(metric), upper=True)
        exact = key[0, head, 4:-32].double() @ turn.T
        state, codes, scales = exact.clone(), torch.zeros_like(exact), []
        for first in range(0, dim, group or dim):
            own = slice(first, first + (group or dim))
            step = best_step(state[:, own], best, middle)
            for i in range(first, first + (group or dim)):
                codes[:, i] = (state[:, i] / step + middle).round().clamp(0, 2**bits - 1)
                error = (state[:, i] - step * (codes[:, i] - middle)) / factor[i, i]
                state[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
            scales.append(exact[:, own].square().sum(1) / (exact[:, own] * (codes[:, own] - middle)).sum(1))
        packed = cache.layers[0].packed(0, head)
        same = (packed["key_codes"] == codes.to(torch.uint8)).all(1)
        assert same.double().mean() > 0.9  # a rounding that is nearly undecided changes the rest of its token
        stored = torch.stack(scales, 1).float()[same]
        torch.testing.assert_close(packed["key_scale"][same], stored, rtol=2e-3, atol=0)


def best_step(y: Tensor, best: float, middle: float) -> Tensor:
    """The step of each row: the best for normal numbers, or the one that reaches the largest, whichever errs less."""
    steps = torch.stack([best * y.square().mean(1).sqrt(), y.abs().amax(1) / middle])
    codes = (y / steps[:, :, None] + middle).clamp(0, 2 * middle).round()
    errors = (y - steps[:, :, None] * (codes - middle)).square().sum(2)
    return torch.where(errors[1] < errors[0], steps[1], steps[0])


def projection(model: Any, layer: int) -> Tensor:
    weight = model.model.layers[layer].self_attn.o_proj.weight.double()
    return weight.reshape(weight.shape[0], model.config.num_attention_heads, -1)


@pytest.mark.parametrize("codec", [kvpack.KIVI(bits=3, compensation=ALWAYS), kvpack.Q4(compensation=ALWAYS)], ids=str)
def test_values_are_gptqs_codes_in_the_metric_of_the_projection(codec: Any) -> None:
    model = tiny_model(tiny_config(layers=2, heads=4, kv_heads=2, head_dim=64))
    cache = kvpack.PackedCache(model, quantize=codec)
    key, value, query = prompt(200, 64)
    for layer in range(2):
        forward(cache, key, value, query, layer=layer)
    for head in range(2):
        per_head = projection(model, 1)[:, 2 * head : 2 * head + 2]
        metric = metric_of(per_head.permute(0, 1, 2))
        packed = cache.layers[1].packed(0, head)
        start, rows = packed["value_start"], packed["value_codes"].shape[0]
        x = value[0, head, start : start + rows]
        codes = torch.zeros(rows, 64)
        grids: dict[int, Any] = {}
        state = x.double().clone()
        factor = torch.linalg.cholesky(torch.linalg.inv(metric), upper=True)
        for i in range(64):
            if i % 32 == 0:
                grids = grid_of(codec, state[:, i : i + 32])
            codes[:, i], rounded = coded(codec, grids, state[:, i])
            error = (state[:, i] - rounded) / factor[i, i]
            state[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
        # A rounding that is nearly undecided may fall otherwise, and with it the rest of its token: few have one.
        same = (packed["value_codes"] == codes.to(torch.uint8)).all(1).double().mean()
        assert same > 0.95


def grid_of(codec: Any, x: Tensor) -> Any:
    if isinstance(codec, kvpack.KIVI):
        _, scale, zero = quantise(x, codec.bits, 1)
        return SimpleNamespace(scale=scale[:, 0].double(), zero=zero[:, 0].double())
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    return SimpleNamespace(scale=largest / -8)


def coded(codec: Any, grid: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(codec, kvpack.KIVI):
        codes = ((x - grid.zero) / grid.scale).round().clamp(0, 2**codec.bits - 1)
        return codes, codes * grid.scale + grid.zero
    codes = (x / grid.scale + 8.5).floor().clamp(0, 15)
    return codes, (codes - 8) * grid.scale.half().double()


CODECS = [
    lambda compensation: kvpack.KIVI(bits=2, compensation=compensation),
    lambda compensation: kvpack.KIVI(bits=4, compensation=compensation),
    lambda compensation: kvpack.Q4(compensation=compensation),
    lambda compensation: kvpack.Rotated(bits=3, window=0, compensation=compensation),
    lambda compensation: kvpack.Rotated(bits=2, levels="lloyd-max", window=0, compensation=compensation),
    lambda compensation: kvpack.Rotated(bits=4, group=16, window=0, compensation=compensation),
    lambda compensation: kvpack.Graded(key_bits=3, value_bits=3, compensation=compensation),
]


@pytest.mark.parametrize("make", CODECS)
@pytest.mark.parametrize("dim", [64, 80])
def test_logits_err_less(make: Any, dim: int) -> None:
    if dim == 80 and isinstance(make(None), kvpack.Q4):
        pytest.skip("a block of 16 channels has little to pass on")
    key, value, query = prompt(260, dim)
    cost = []
    for compensation in (None, KEYS):
        cache = filled_layer(make(compensation), key, value, query)
        held = cache.layers[0].keys
        logits = [query[0, h] @ (held - key)[0, h // 2].T for h in range(4)]
        cost.append(torch.stack(logits).square().mean().item())
    assert cost[1] < 0.8 * cost[0], cost


@pytest.mark.parametrize("make", CODECS)
def test_without_queries_or_gain_nothing_changes(make: Any) -> None:
    key, value, query = prompt(260, 64)
    plain = filled_layer(make(None), key, value, query)
    never = filled_layer(make(kvpack.GPTQ(threshold=1e5, values=False)), key, value, query)
    assert torch.equal(plain.layers[0].keys, never.layers[0].keys)
    gain, used = never.layers[0].compensation_gains(0, 0)[0]
    assert 1.5 < gain < 1e5
    assert not used
    config = tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64)
    unseen, expected = (kvpack.PackedCache(config, quantize=make(compensation)) for compensation in (KEYS, None))
    for cache in (unseen, expected):
        cache.update(key, value, 0)  # no attention function sees the queries
    assert torch.equal(expected.layers[0].keys, unseen.layers[0].keys)
    assert unseen.layers[0].compensation_gains(0, 0) == (None, None)


def test_gains_are_reported() -> None:
    key, value, query = prompt(300, 64)
    cache = filled_layer(kvpack.KIVI(bits=3, compensation=KEYS), key, value, query)
    metric = metric_of(query[0, 2:])
    eigenvalues = torch.linalg.eigvalsh(metric)
    gain, used = cache.layers[0].compensation_gains(0, 1)[0]
    assert gain == pytest.approx((eigenvalues.mean() / eigenvalues.log().mean().exp()).item(), rel=1e-3)
    assert used
    assert cache.info()["compensation of keys"].startswith("2 of 2 heads, gains ")
    assert "compensation of values" not in cache.info()


@pytest.mark.parametrize("make", CODECS)
def test_metrics_can_be_given(make: Any) -> None:
    """The queries' own give the same codes whoever brings them; a diagonal one gives those without compensation."""
    key, value, query = prompt(260, 64)
    seen = filled_layer(make(KEYS), key, value, query)
    q = query[0].reshape(2, 2 * 260, 64)
    config = tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64)

    def given(metrics: Any) -> kvpack.PackedCache:
        codec = make(kvpack.GPTQ(threshold=0.0, key_metrics=metrics))
        cache = kvpack.PackedCache(config, quantize=codec)
        forward(cache, key, value, query)
        return cache

    told, plain = given([q.mT @ q]), filled_layer(make(None), key, value, query)
    for head in range(2):
        codes = [cache.layers[0].packed(0, head)["key_codes"] for cache in (seen, told)]
        assert (codes[0] == codes[1]).double().mean() > 0.99  # sums in another order
        if not isinstance(make(None), kvpack.Rotated):  # in whose coordinates it is not diagonal
            diagonal = given(torch.diag_embed(torch.rand(1, 2, 64) + 0.1))
            assert_same_packed(diagonal.layers[0], plain.layers[0], 0, head)
        identity = given(torch.eye(64).expand(1, 2, 64, 64))
        codes = [cache.layers[0].packed(0, head)["key_codes"] for cache in (identity, plain)]
        assert (codes[0] == codes[1]).double().mean() > 0.999  # a rotation turns it into itself, nearly
    blind = kvpack.PackedCache(config, quantize=make(kvpack.GPTQ(threshold=0.0, key_metrics=[q.mT @ q])))
    blind.update(key, value, 0)
    blind.update(key[:, :, :1], value[:, :, :1], 0)  # stores the first ones
    if not isinstance(make(None), kvpack.Graded):  # whose widths follow the queries
        assert_same_packed(blind.layers[0], told.layers[0], 0, 0)
    assert told.layers[0].compensation_gains(0, 0)[0] == pytest.approx(
        seen.layers[0].compensation_gains(0, 0)[0], rel=1e-3
    )
    assert told.memory().parts["scales"] == plain.memory().parts["scales"] + 2 * 64 * 64 * 4


@pytest.mark.parametrize("make", CODECS)
def test_rows_of_a_batch_are_single_rows(make: Any) -> None:
    """Pads are neither keys nor queries."""
    lengths = [300, 180]
    valid = left_padding(lengths)
    key, value = random_kv(2, 2, 300, 64)
    query = torch.randn(2, 4, 300, 8) @ torch.randn(8, 64)
    config = tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64)
    batch = kvpack.PackedCache(config, quantize=make(KEYS))
    visible = valid.bool()[:, None, None, :] & torch.ones(300, 300, dtype=torch.bool).tril()
    forward(batch, key, value, query, visible)
    for row, length in enumerate(lengths):
        single = kvpack.PackedCache(config, quantize=make(KEYS))
        forward(single, *(x[row : row + 1, :, -length:] for x in (key, value, query)))
        for head in range(2):
            assert_same_packed(batch.layers[0], single.layers[0], row, head, 0)
            assert batch.layers[0].compensation_gains(row, head) == single.layers[0].compensation_gains(0, head)


@pytest.mark.parametrize("make", CODECS)
def test_tokens_that_are_taken_back_leave_nothing(make: Any) -> None:
    key, value, query = prompt(400, 64)
    one, other = (filled_layer(make(KEYS), *(x[:, :, :140] for x in (key, value, query))) for _ in range(2))
    for cache in (one, other):
        cache.activate_past_recording()
    forward(other, *(100 * x[:, :, 140:152] for x in (key, value, query)))
    other.crop(-12)
    for cache in (one, other):
        forward(cache, *(x[:, :, 140:] for x in (key, value, query)))
        cache.crop(0)
    for head in range(2):
        assert one.layers[0].compensation_gains(0, head) == other.layers[0].compensation_gains(0, head)
        assert_same_packed(one.layers[0], other.layers[0], 0, head)


def test_compensation_is_decided_again_when_the_queries_have_doubled() -> None:
    cache = kvpack.PackedCache(
        tiny_config(layers=1, heads=2, kv_heads=1, head_dim=64), quantize=kvpack.KIVI(compensation=KEYS)
    )
    gains = []
    for _ in range(9):
        key, value, query = prompt(136, 64, heads=1)
        forward(cache, key, value, query)
        gains.append(cache.layers[0].compensation_gains(0, 0)[0][0])
    changes = [chunk + 1 for chunk in range(1, 9) if gains[chunk] != gains[chunk - 1]]
    assert changes == [2, 4, 8]


def test_what_compensation_needs_is_counted_as_memory() -> None:
    key, value, query = prompt(300, 64)
    plain = filled_layer(kvpack.KIVI(bits=3), key, value, query).memory()
    fed = filled_layer(kvpack.KIVI(bits=3, compensation=KEYS), key, value, query).memory()
    assert fed.parts["codes"] == plain.parts["codes"]
    assert fed.parts["scales"] == plain.parts["scales"]
    matrices = 2 * (64 * 64 + 64 * 63 // 2) * 4
    assert matrices <= fed.parts["index"] - plain.parts["index"] <= matrices + 1000
