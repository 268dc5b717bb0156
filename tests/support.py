"""What several test files share: the methods, tiny models, and direct calls of a cache and its attention function."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kvpack
import pytest
import torch
from kvpack.attention import kvpack_attention
from kvpack.methods import QUANTIZE, KVQuantTables
from kvpack.methods.spec import parse_spec
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


class Tabled(kvpack.KVQuant):
    """KVQuant with made-up tables for any model: numbers of deviation 4 and more fit the ranges, with outliers."""

    def _of(self, site: Any) -> KVQuantTables:
        config = site.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        half = 2 ** (self.bits - 1)
        levels = tuple((i + 0.5 + 0.1 * math.sin(3 * i)) / half for i in range(-half, half))
        ends = torch.linspace(2, 9, dim)
        return KVQuantTables(
            low=tuple(tuple((-ends - h).tolist()) for h in range(heads)),
            high=tuple(tuple((ends + 1).tolist()) for _ in range(heads)),
            key_levels=levels,
            value_levels=levels,
            key_norm=(1.02, 0.01),
            value_norm=(0.99, 0.0),
            pairs=tuple((i, i + dim // 2) for i in range(dim // 2)),
            frequencies=tuple(10_000.0 ** (-2 * i / dim) for i in range(dim // 2)),
        )


def with_registered(rows: list[Any], methods: Mapping[str, Any]) -> list[Any]:
    """The rows, and the first standard setting of each registered method that none of them is of."""
    missing = [
        method for method in methods.values() if method.standard and not any(isinstance(row, method) for row in rows)
    ]
    return [*rows, *(parse_spec(method.standard[0]).options[method.family] for method in missing)]


# Every test of what all methods promise runs over this list: what is registered, and settings that matter.
CODECS = with_registered(
    [
        kvpack.Exact(),
        kvpack.KIVI(bits=2),
        kvpack.KIVI(bits=3),
        kvpack.KIVI(bits=4),
        kvpack.KIVI(bits=8),
        kvpack.Q8(),
        kvpack.Rotated(bits=3, group=16, window=32),
        kvpack.Rotated(bits=4, levels="lloyd-max"),
        kvpack.Rotated(bits=4, window=32, center=True),
        Tabled(bits=3, outliers=0.02, window=16),
        kvpack.Graded(key_bits=2.5, value_bits=2),
        kvpack.KeyValue(kvpack.KIVI(bits=4, group=64), kvpack.Rotated(bits=8)),
        kvpack.KIVI(bits=3, window=64, compensation=kvpack.GPTQ(threshold=0.0)),
        kvpack.KVarN(bits=3),
        kvpack.Rotated(bits=4, window=16, compensation=kvpack.GPTQ(threshold=0.0)),
        kvpack.Graded(key_bits=3, value_bits=2, compensation=kvpack.GPTQ(threshold=0.0)),
    ],
    # What decides nothing without queries has tests of its own (test_think.py).
    {name: codec for name, codec in QUANTIZE.items() if codec is not kvpack.ThinK},
)


def codec_id(codec: Any) -> str:
    """The codec's name and numbers: `kivi2`, `graded2.5-2`."""
    if isinstance(codec, kvpack.KeyValue):
        return f"{codec_id(codec.keys)}/{codec_id(codec.values)}"
    if getattr(codec, "compensation", None):
        return f"gptq-{codec_id(dataclasses.replace(codec, compensation=None))}"
    if getattr(codec, "center", False):
        return f"centred-{codec_id(dataclasses.replace(codec, center=False))}"
    if getattr(codec, "levels", "uniform") != "uniform":
        return f"{codec.levels}{codec.bits}"
    bits = [getattr(codec, name) for name in ("bits", "key_bits", "value_bits") if hasattr(codec, name)]
    return codec.name.rstrip("48") + "-".join(map(str, bits))


def stored_bits(codec: Any, head_dim: int) -> float:
    """Bits of a number that is packed, with its scales: the mean of keys and values."""
    if isinstance(codec, kvpack.Exact):
        return 32
    if isinstance(codec, kvpack.KeyValue):
        return (side_bits(codec.keys, head_dim) + side_bits(codec.values, head_dim)) / 2
    if isinstance(codec, kvpack.KVQuant):
        return codec.bits + 24 * max(round(codec.outliers * head_dim), 1) / head_dim + 16 / head_dim
    if isinstance(codec, kvpack.Graded):
        values = kvpack.Rotated(bits=codec.value_bits)
        return (codec.key_bits + 32 / codec.group + side_bits(values, head_dim)) / 2
    return side_bits(codec, head_dim)


def side_bits(codec: Any, head_dim: int) -> float:
    """The same of a codec that stores keys and values alike."""
    if isinstance(codec, kvpack.KIVI):
        return codec.bits + 32 / codec.group
    if isinstance(codec, kvpack.Rotated):
        return codec.bits + 16 / (codec.group or head_dim)
    if isinstance(codec, kvpack.KVarN):
        return codec.bits + (32 / 128 + 16 / head_dim + 32 / head_dim + 16 / 128) / 2
    if isinstance(codec, kvpack.Q8 | kvpack.Q4):
        return codec.bits + 16 / 32
    pytest.skip(f"{type(codec).__name__}: how many bits it has is not said here")


every_codec = pytest.mark.parametrize("codec", CODECS, ids=codec_id)
kivi_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def tiny_config(layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, **more: Any) -> LlamaConfig:
    """A Llama that is small enough to run thousands of steps of."""
    options: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 16 * heads,
        "intermediate_size": 96,
        "max_position_embeddings": 20_000,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    options.update(more)
    return LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        **options,
    )


def tiny_model(config: Any = None, attention: str = "kvpack", seed: int = 0) -> PreTrainedModel:
    """A random model; equal seeds give equal weights whatever the attention."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config or tiny_config())).eval().float()
    if attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    return model


def small_model(seed: int = 0, **more: Any) -> PreTrainedModel:
    """A random model with the test model's vocabulary, whose predictions are not all alike."""
    config = tiny_config(vocab_size=49_152, initializer_range=0.2, max_position_embeddings=4096, **more)
    return tiny_model(config, seed=seed)


def ids_of(batch: int, tokens: int) -> torch.Tensor:
    """Random tokens for a tiny model, none of them special."""
    return torch.randint(3, 128, (batch, tokens))


class FakeAttention(torch.nn.Module):
    """The attributes of a model's attention module that attention functions read."""

    is_causal = True

    def __init__(self, groups: int = 1, layer_idx: int = 0) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.layer_idx = layer_idx
        self.eval()


def random_kv(
    batch: int, heads: int, tokens: int, dim: int, value_dim: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with channels of very different scales and offsets, as real ones have, and values without."""
    key = torch.randn(batch, heads, tokens, dim)
    key = key * torch.logspace(-1, 0.6, dim) + torch.linspace(-2, 2, dim).flip(0)
    value = torch.randn(batch, heads, tokens, value_dim or dim)
    return key.to(dtype), value.to(dtype)


MODES = ("greedy", "beams", "lookup", "chunks", "turns", "padded")
every_mode = pytest.mark.parametrize("mode", MODES)


def generated(model: Any, cache: Any, mode: str, tokens: int, new: int) -> torch.Tensor:
    """What a model generates with a cache in one of the ways there are, `new` tokens behind so many of a prompt."""
    more: dict[str, Any] = {
        "beams": {"num_beams": 3},
        "lookup": {"prompt_lookup_num_tokens": 4},
        "chunks": {"prefill_chunk_size": 30},
    }.get(mode, {})
    batch = 2 if mode == "padded" else 1
    inputs = {"input_ids": ids_of(batch, tokens), "attention_mask": left_padding([tokens, tokens - 20][:batch])}
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **more}
    out = model.generate(**inputs, past_key_values=cache, **options)
    length = tokens + new
    if mode == "turns":
        ids = torch.cat([out, ids_of(1, 40)], 1)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        length += 40 + new
    assert out.shape[1] == length
    assert cache.get_seq_length() == length - 1
    assert cache.info()["materialised"] == 0
    return out


def forward(
    cache: kvpack.PackedCache,
    key: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    layer: int = 0,
    **options: Any,
) -> torch.Tensor:
    """What a model's attention module does: hand K and V to the cache, then attend. Returns [B, q, Hq, Dv]."""
    if query is None:
        query = torch.zeros_like(key)
    module = FakeAttention(query.shape[1] // key.shape[1], layer)
    handles = cache.update(key, value, layer)
    return kvpack_attention(module, query, *handles, mask, **options)[0]


def filled_layer(
    codec: Any, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor | None = None
) -> kvpack.PackedCache:
    """A cache of one layer after a prompt; without queries, random ones."""
    batch, heads, tokens, dim = key.shape
    config = tiny_config(layers=1, heads=2 * heads, kv_heads=heads, head_dim=dim)
    cache = kvpack.PackedCache(config, quantize=codec)
    forward(cache, key, value, torch.randn(batch, 2 * heads, tokens, dim) if query is None else query)
    return cache


def causal_mask(valid: torch.Tensor, queries: int) -> torch.Tensor:
    """The boolean mask [B, 1, q, kv] that transformers makes of `valid` [B, kv]: causal, and no pads."""
    tokens = valid.shape[1]
    causal = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    return causal & valid.bool()[:, None, None, :]


def left_padding(lengths: list[int]) -> torch.Tensor:
    """The 2-d attention mask of left-padded rows that hold `lengths` tokens."""
    width = max(lengths)
    return torch.tensor([[0] * (width - n) + [1] * n for n in lengths])


def contents(cache: kvpack.PackedCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of the materialised keys and values of every layer that holds any."""
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers if layer.get_seq_length()]


def assert_same_contents(left: kvpack.PackedCache, right: kvpack.PackedCache) -> None:
    assert left.get_seq_length() == right.get_seq_length()
    pairs = list(zip(contents(left), contents(right), strict=True))
    assert pairs or left.get_seq_length() == 0
    for (left_key, left_value), (right_key, right_value) in pairs:
        assert torch.equal(left_key, right_key)
        assert torch.equal(left_value, right_value)


def assert_same_packed(left: Any, right: Any, row: int, head: int, other_row: int | None = None) -> None:
    """The codes, scales and starts of one KV head are the same in two layers, bit for bit."""
    one, other = left.packed(row, head), right.packed(row if other_row is None else other_row, head)
    assert one.keys() == other.keys()
    for name, stored in one.items():
        same = torch.equal(stored, other[name]) if isinstance(stored, torch.Tensor) else stored == other[name]
        assert same, f"{name} differs"


def resident() -> int:
    """Bytes of this process in memory, without what the C library keeps of freed memory; Linux only."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()
