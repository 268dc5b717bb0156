"""GPTQ's feedback: codes are those of the algorithm, and errors cost less in its metric."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import kvpack
import pytest
import torch
from reference import quantise
from support import filled_layer, forward, random_kv, tiny_config, tiny_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

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
    """GPTQ as published, by the Cholesky factor of the inverse; `quantise_column(channel, column)` rounds a column."""
    x = x.double()[:, order]
    factor = torch.linalg.cholesky(torch.linalg.inv(metric[order][:, order]), upper=True)
    for i, channel in enumerate(order.tolist()):
        error = (x[:, i] - quantise_column(channel, x[:, i].clone())) / factor[i, i]
        x[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]


@pytest.mark.parametrize(("bits", "dim"), [(2, 32), (3, 80), (4, 64)])
def test_kivi_keys_are_gptqs_codes(bits: int, dim: int) -> None:
    key, value, query = prompt(132, dim)
    cache = filled_layer(kvpack.KIVI(bits=bits, group=32, feedback=KEYS), key, value, query)
    same: list[float] = []
    for head in range(2):
        metric = metric_of(query[0, 2 * head : 2 * head + 2])
        order = metric.diag().argsort(descending=True, stable=True)
        packed = cache.layers[0].packed(0, head)
        for group in range(4):
            codes: dict[int, Tensor] = {}

            def rounded(channel: int, column: Tensor, codes: dict[int, Tensor] = codes) -> Tensor:
                codes[channel], scale, zero = quantise(column, bits, 0)
                return (codes[channel] * scale + zero).double()

            gptq(key[0, head, 4 + 32 * group : 36 + 32 * group], metric, order, rounded)
            expected = torch.stack([codes[c] for c in range(dim)], 1).to(torch.uint8)
            same.append((packed["key_codes"][32 * group : 32 * group + 32] == expected).double().mean().item())
    # A scale that is nearly undecided between two float16 may fall otherwise, and then what follows it in its group
    # does.
    assert statistics.median(same) > 0.999
    assert min(same) > 0.8


def projection(model: Any, layer: int) -> Tensor:
    weight = model.model.layers[layer].self_attn.o_proj.weight.double()
    return weight.reshape(weight.shape[0], model.config.num_attention_heads, -1)


@pytest.mark.parametrize("codec", [kvpack.KIVI(bits=3, feedback=ALWAYS), kvpack.Q4(feedback=ALWAYS)], ids=str)
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
        # A rounding that is nearly undecided may fall otherwise, and with it the rest of its token: few tokens have
        # one.
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
    lambda feedback: kvpack.KIVI(bits=2, feedback=feedback),
    lambda feedback: kvpack.KIVI(bits=4, feedback=feedback),
    lambda feedback: kvpack.Q4(feedback=feedback),
    lambda feedback: kvpack.Rotated(bits=3, window=0, feedback=feedback),
    lambda feedback: kvpack.Rotated(bits=2, levels="lloyd-max", window=0, feedback=feedback),
    lambda feedback: kvpack.Rotated(bits=4, group=16, window=0, feedback=feedback),
]


@pytest.mark.parametrize("make", CODECS)
@pytest.mark.parametrize("dim", [64, 80])
def test_logits_err_less(make: Any, dim: int) -> None:
    if dim == 80 and isinstance(make(None), kvpack.Q4):
        pytest.skip("a block of 16 channels has little to pass on")
    key, value, query = prompt(260, dim)
    cost = []
    for feedback in (None, KEYS):
        cache = filled_layer(make(feedback), key, value, query)
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
    gain, used = never.layers[0].feedback_gains(0, 0)[0]
    assert 1.5 < gain < 1e5
    assert not used
    unseen = kvpack.PackedCache(tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64), quantize=make(KEYS))
    unseen.update(key, value, 0)
    unseen.layers[0].absorb()  # no attention function saw the queries
    assert torch.equal(plain.layers[0].keys, unseen.layers[0].keys)
    assert unseen.layers[0].feedback_gains(0, 0) == (None, None)


def test_gains_are_reported() -> None:
    key, value, query = prompt(300, 64)
    cache = filled_layer(kvpack.KIVI(bits=3, feedback=KEYS), key, value, query)
    metric = metric_of(query[0, 2:])
    eigenvalues = torch.linalg.eigvalsh(metric)
    gain, used = cache.layers[0].feedback_gains(0, 1)[0]
    assert gain == pytest.approx((eigenvalues.mean() / eigenvalues.log().mean().exp()).item(), rel=1e-3)
    assert used
    assert cache.info()["feedback of keys"].startswith("2 of 2 heads, gains ")
    assert "feedback of values" not in cache.info()


def test_what_feedback_needs_is_counted_as_memory() -> None:
    key, value, query = prompt(300, 64)
    plain = filled_layer(kvpack.KIVI(bits=3), key, value, query).memory()
    fed = filled_layer(kvpack.KIVI(bits=3, feedback=KEYS), key, value, query).memory()
    assert fed.parts["codes"] == plain.parts["codes"]
    assert fed.parts["scales"] == plain.parts["scales"]
    matrices = 2 * (64 * 64 + 64 * 63 // 2) * 4
    assert matrices <= fed.parts["index"] - plain.parts["index"] <= matrices + 1000


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "qwen2", "phi3"])
def test_the_output_projection_is_found(family: str) -> None:
    options = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
        "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    }.get(family, {})
    base = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
    if family in ("qwen2", "phi3"):
        heads["num_key_value_heads"] = 1
    config = CONFIG_MAPPING[family](**{**base, **heads, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="kvpack").eval()
    cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=4, group=16, feedback=ALWAYS))
    model.generate(input_ids=torch.randint(3, 128, (1, 300)), past_key_values=cache, max_new_tokens=2)
    layer = next(layer for layer in cache.layers if layer.get_seq_length())
    keys, values = layer.feedback_gains(0, 0)
    assert keys[0] > 1
    assert values[0] > 1


def test_bad_options_are_named() -> None:
    for make, message in [
        (lambda: kvpack.GPTQ(damping=0), "damping=0 is not accepted"),
        (lambda: kvpack.GPTQ(threshold=-1), "threshold=-1"),
        (lambda: kvpack.GPTQ(keys=1), "keys=1 is not accepted; accepted: True, False"),
        (lambda: kvpack.KIVI(feedback=3), r"feedback=3 is not accepted; accepted: None, kvpack.GPTQ"),
        (lambda: kvpack.PackedCache(tiny_config(), quantize=kvpack.Q4(feedback=ALWAYS)), "from a configuration"),
    ]:
        with pytest.raises(kvpack.OptionError, match=message):
            make()
    assert kvpack.KIVI(bits=2, feedback="gptq") == kvpack.KIVI(bits=2, feedback=kvpack.GPTQ())
