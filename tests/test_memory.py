"""What `memory()` says is what the process really holds, and it is as little as promised."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import kvpack
import pytest
import torch
from support import CODECS, codec_id, every_codec, forward, random_kv, stored_bits, tiny_config, tiny_model

TOKENS = 16_384
SHAPES = [(3, 64), (8, 128)]

# Run in a process of its own: argv = number of the codec, layers, this folder. Prints what memory() says and what the
# process grew by.
RSS = """
import sys
sys.path.insert(0, sys.argv[3])
import torch
from support import CODECS, resident
import kvpack
from transformers import LlamaConfig

def fill(layers, tokens):
    config = LlamaConfig(num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, head_dim=128,
                         hidden_size=1024, vocab_size=16, intermediate_size=16)
    cache = kvpack.PackedCache(config, quantize=CODECS[int(sys.argv[1])])
    for layer in range(layers):
        for first in range(0, tokens, 1024):
            part = torch.randn(2, 1, 8, 1024, 128).bfloat16()
            cache.update(part[0], part[1], layer)
        cache.update(part[0][:, :, :1], part[1][:, :, :1], layer)
    return cache

with torch.no_grad():
    fill(1, 4096)  # threads, buffers and code are there before the first measurement
    before = resident()
    cache = fill(int(sys.argv[2]), 16384)
    print(cache.memory().total, resident() - before)
"""


@pytest.mark.slow
@every_codec
def test_the_process_grows_by_what_memory_says(fresh: Any, codec: Any, record_property: Any) -> None:
    layer = 2 * TOKENS * 8 * 128 * min(stored_bits(codec, 128), 16) / 8  # Exact keeps the 16 bits that it is given
    layers = round(80e6 / layer) + 1
    done = fresh(RSS, CODECS.index(codec), layers, Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    told, grown = map(int, done.stdout.split())
    record_property("growth of the process over memory().total", grown / told)
    assert told > 80e6  # far above the noise of a process
    assert abs(grown / told - 1) < 0.1


# Run as RSS, argv = this folder: caches of many methods, lengths and evictions come and go, several alive at a time.
# Prints what memory() says and what the process grew by, now and then, at last with no cache alive.
SERVER = """
import random, sys
sys.path.insert(0, sys.argv[1])
import torch
from support import CODECS, forward, resident, tiny_config
import kvpack

HEADS = 16
EVICTIONS = [None, None, kvpack.StreamingLLM(budget=300), kvpack.H2O(budget=0.4), kvpack.SnapKV(budget=200)]
random.seed(0)
torch.manual_seed(0)
numbers = torch.randn(3, 1, HEADS, 1600, 64)

def serve(tokens, steps, codec, eviction):
    eviction = None if isinstance(codec, kvpack.KVQuant) else eviction  # its keys are held in whole runs
    config = tiny_config(layers=1, heads=HEADS, kv_heads=HEADS, head_dim=64)
    cache = kvpack.PackedCache(config, quantize=codec, evict=eviction)
    q, k, v = (x[:, :, :tokens].contiguous() for x in numbers)
    forward(cache, k, v, q)
    for t in range(steps):
        forward(cache, k[:, :, t : t + 1], v[:, :, t : t + 1], q[:, :, t : t + 1])
    return cache

def told(caches):
    return sum(cache.memory().total for cache in caches)

with torch.no_grad():
    for codec in CODECS:
        serve(300, 2, codec, kvpack.H2O(budget=100))
    before = resident()
    alive = []
    for i in range(96):
        codec, eviction = random.choice(CODECS), random.choice(EVICTIONS)
        cache = serve(random.randrange(200, 1600), random.randrange(1, 40), codec, eviction)
        alive.append(cache)
        while len(alive) > 12 or (alive and random.random() < 0.3):
            del alive[random.randrange(len(alive))]
        cache = None
        if i % 12 == 11:
            print(told(alive), resident() - before)
    alive.clear()
    print(0, resident() - before)
"""


@pytest.mark.slow
def test_caches_that_come_and_go_leave_nothing_behind(record_property: Any) -> None:
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    record_property("memory() and growth of the process", pairs)
    assert len(pairs) == 9
    for told, grown in pairs:
        assert grown <= 1.1 * told + 16e6, pairs


# Run as RSS, argv = this folder: forwards with less and less room for the process. Prints how each ended.
NO_MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from support import CODECS, forward, tiny_config
import kvpack

def room(size):
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + size, resource.RLIM_INFINITY))

def fill(cache):
    for first in range(0, 2048, 512):
        part = numbers[..., first : first + 512, :]
        forward(cache, part[0], part[1], part[2])
    for t in range(3):
        forward(cache, *numbers[..., t : t + 1, :])
    cache.fork().crop(-1)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    return keys.shape == values.shape

numbers = torch.randn(3, 1, 8, 2048, 128)
evictions = [None, kvpack.H2O(budget=700), kvpack.SnapKV(budget=600), kvpack.KeyDiff(budget=600)]
config = tiny_config(layers=1, heads=8, kv_heads=8, head_dim=128)
with torch.no_grad():
    for i, codec in enumerate(CODECS):
        def new():
            eviction = None if isinstance(codec, kvpack.KVQuant) else evictions[i % 4]  # keys in whole runs
            return kvpack.PackedCache(config, quantize=codec, evict=eviction)
        fill(new())
        for size in [*range(0, 1 << 22, 1 << 19), *range(1 << 22, 64 << 20, 7 << 20)]:
            cache = new()
            room(size)
            try:
                fill(cache)
                end = "done"
            except kvpack.OutOfMemoryError as error:
                end = "OutOfMemoryError"
                assert isinstance(error, MemoryError) and "bytes" in str(error)
            except MemoryError:
                end = "MemoryError"
            except RuntimeError as error:
                if "can't allocate memory" not in str(error):
                    raise
                end = "torch's RuntimeError"
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            print(end)
            del cache
        assert fill(new())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_no_memory_is_a_memory_error(record_property: Any) -> None:
    command = [sys.executable, "-c", NO_MEMORY, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ends = Counter(done.stdout.splitlines())
    record_property("how it ended", dict(ends))
    assert ends["OutOfMemoryError"] > len(CODECS)
    assert ends["done"] > len(CODECS)


def filled(codec: Any, heads: int, dim: int, dtype: torch.dtype, tokens: int = TOKENS) -> kvpack.PackedCache:
    """One layer as it is after a prompt of that length."""
    cache = kvpack.PackedCache(tiny_config(layers=1, heads=heads, kv_heads=heads, head_dim=dim), quantize=codec)
    for first in range(0, tokens, 2048):
        new = min(2048, tokens - first)
        cache.update(*random_kv(1, heads, new, dim, dtype=dtype), 0)
    cache.update(*random_kv(1, heads, 1, dim, dtype=dtype), 0)
    return cache


@pytest.mark.parametrize(("bits", "share"), [(8, 0.6), (4, 0.36), (3, 0.3), (2, 0.24)])
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kivi_is_as_small_as_promised_at_16k(
    bits: int, share: float, heads: int, dim: int, dtype: torch.dtype, record_property: Any
) -> None:
    cache = filled(kvpack.KIVI(bits=bits), heads, dim, dtype)
    bfloat16 = cache.get_seq_length() * heads * dim * 2 * 2
    record_property("share of bfloat16's bytes", cache.memory().total / bfloat16)
    assert cache.memory().total <= share * bfloat16
    numbers = 2 * TOKENS * heads * dim
    assert cache.memory().total > numbers * bits / 8  # what was promised includes every code


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1024, 4096, TOKENS])
def test_exact_holds_hardly_more_than_the_numbers(heads: int, dim: int, dtype: torch.dtype, tokens: int) -> None:
    total = filled(kvpack.Exact(), heads, dim, dtype, tokens).memory().total
    numbers = 2 * (tokens + 1) * heads * dim * dtype.itemsize
    assert numbers <= total <= 1.1 * numbers


@every_codec
def test_parts_and_layers_sum_to_the_total(codec: Any) -> None:
    cache = kvpack.PackedCache(tiny_config(layers=3), quantize=codec)
    for layer in range(3):
        forward(cache, *random_kv(2, 2, 400, 32), layer=layer)
    memory = cache.memory()
    assert isinstance(memory.total, int)
    assert memory.total == sum(memory.parts.values()) == sum(memory.layers) > 0
    assert len(memory.layers) == 3
    assert {"codes", "scales", "exact", "index", "other layers"} <= memory.parts.keys()
    assert all(isinstance(size, int) and size >= 0 for size in [*memory.parts.values(), *memory.layers])
    assert (memory.parts["codes"] > 0) == (not isinstance(codec, kvpack.Exact))
    if getattr(codec, "window", 1) > 0:
        assert memory.parts["exact"] > 0


def test_the_parts_are_what_they_are_called() -> None:
    memory = filled(kvpack.KIVI(bits=4), 8, 128, torch.bfloat16).memory()
    numbers = 2 * TOKENS * 8 * 128
    assert memory.parts["codes"] == pytest.approx(numbers / 2, rel=0.03)
    assert memory.parts["scales"] == pytest.approx(numbers / 32 * 4, rel=0.03)
    assert memory.parts["exact"] < 8 * 2 * 128 * 2 * (2 * 128 + 2048)  # sinks, window, and the last chunk
    assert memory.parts["index"] < 0.02 * memory.total


def test_what_transformers_holds_is_counted_too() -> None:
    from test_architectures import FUSED, config_of

    model = tiny_model(config_of("qwen3_next", FUSED["qwen3_next"]))
    cache = kvpack.PackedCache(model)
    model(torch.arange(3, 40)[None], past_key_values=cache)
    states = [
        state
        for layer in cache.layers
        if hasattr(layer, "conv_states")
        for held in (layer.conv_states, layer.recurrent_states)
        for state in held.values()
    ]
    assert states
    expected = sum(state.untyped_storage().nbytes() for state in states)
    assert cache.memory().parts["other layers"] == pytest.approx(expected, rel=0.02)


@every_codec
def test_long_decode_grows_evenly(codec: Any) -> None:
    cache = kvpack.PackedCache(tiny_config(layers=1, heads=2, head_dim=64), quantize=codec)
    key, value = random_kv(1, 2, 4000, 64)
    totals, exact = [], []
    for token in range(4000):
        forward(cache, key[:, :, token : token + 1], value[:, :, token : token + 1])
        if token % 512 == 511:
            totals.append(cache.memory().total)
            exact.append(cache.memory().parts["exact"])
    per_token = (totals[-1] - totals[1]) / (512 * (len(totals) - 2))
    assert per_token == pytest.approx(2 * 2 * 64 * stored_bits(codec, 64) / 8, rel=0.15)
    if not isinstance(codec, kvpack.Exact):
        assert max(exact) <= 2 * (4 + 2 * 128 + 64) * 2 * 64 * 4


def test_memory_reads_well() -> None:
    memory = filled(kvpack.KIVI(), 3, 64, torch.bfloat16, tokens=2048).memory()
    assert "codes" in repr(memory)
    assert "MB" in repr(memory) or "KB" in repr(memory)
    html = memory._repr_html_()
    assert html.startswith("<table>")
    assert all(part in html for part in memory.parts)


def test_an_empty_cache_holds_nothing() -> None:
    assert kvpack.PackedCache(tiny_config()).memory().total == 0
    assert codec_id(kvpack.PackedCache(tiny_config()).quantize) == "exact"
