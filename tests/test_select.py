"""Selection: a step of decoding reads the pages of the largest bounds, and the rest is there when it is wanted."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import kvpack
import pytest
import torch
from reference import attention
from support import causal_mask, forward, left_padding, random_kv, relative_error, tiny_config, tiny_model
from torch import Tensor

EXACT = 64
CODECS = [
    kvpack.Exact(),
    kvpack.KIVI(bits=8),
    kvpack.Q8(),
    kvpack.Rotated(bits=8),
    kvpack.Graded(key_bits=8.0, value_bits=8),
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def quest(**more: Any) -> kvpack.Quest:
    return kvpack.Quest(dense_layers=0, **more)


def filled(
    select: Any, codec: Any, tokens: int, batch: int = 1, mask: Tensor | None = None, **more: Any
) -> tuple[Any, Tensor, Tensor]:
    """A cache of one layer, with 2 KV heads for 4 query heads."""
    config = tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64)
    cache = kvpack.PackedCache(config, select=select, quantize=codec, **more)
    key, value = random_kv(batch, 2, tokens, 64)
    forward(cache, key, value, torch.randn(batch, 4, tokens, 64), mask)
    return cache, key, value


def step(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return *random_kv(batch, 2, 1, 64), torch.randn(batch, 4, 1, 64)


def slow_choice(query: Tensor, key: Tensor, starts: list[int], budget: int) -> list[int]:
    """What a KV head reads: `query` `[G, D]`, scaled; pages begin at `starts`; from its last on is what is newer."""
    spans = list(pairwise(starts))
    least = torch.stack([key[a:b].amin(0) for a, b in spans]).half().float()
    most = torch.stack([key[a:b].amax(0) for a, b in spans]).half().float()
    bounds = torch.maximum(query[:, None] * least, query[:, None] * most).sum(-1)
    scores = bounds.double().softmax(-1).sum(0)
    read = [*range(*spans[0]), *range(starts[-1], key.shape[0])]
    for page in scores[1:].argsort(descending=True).tolist():
        if len(read) < budget:
            read += range(*spans[page + 1])
    return sorted(read)


@pytest.mark.parametrize("page", [16, 48])
@pytest.mark.parametrize("budget", [0.25, 700, 1])
@pytest.mark.parametrize("tokens", [1500, 900])
def test_the_pages_of_the_largest_bounds_are_read(page: int, budget: float, tokens: int) -> None:
    cache, key, value = filled(quest(budget=budget, page=page), None, tokens)
    for _ in range(20):
        new_key, new_value, query = step()
        out = forward(cache, new_key, new_value, query)
        key, value = torch.cat([key, new_key], 2), torch.cat([value, new_value], 2)
        now = key.shape[2]
        whole = (now - 1) // EXACT * EXACT  # exact tokens lie in pages of so many, when the next ones come
        starts = [p for start in range(0, whole, EXACT) for p in range(start, start + EXACT, page)]
        for head in range(2):
            own = query[0, 2 * head : 2 * head + 2]
            wanted = int(budget * now) if isinstance(budget, float) else budget
            read = slow_choice(own[:, 0] / 8, key[0, head], [*starts, whole], wanted)
            keys, values = (x[0, head : head + 1, read] for x in (key, value))
            expected = attention(own, keys, values, torch.ones(1, len(read), dtype=torch.bool))
            assert relative_error(out[0, :, 2 * head : 2 * head + 2], expected) < 1e-4


def test_threads_divide_what_is_read(threads: Callable[[int], None]) -> None:
    outputs = []
    for n in (1, 4):
        threads(n)
        torch.manual_seed(3)
        cache, *_ = filled(quest(budget=0.25), None, 3000, batch=4)
        outputs.append(torch.cat([forward(cache, *step(4)) for _ in range(3)]))
    assert relative_error(*outputs) < 1e-5


@every_codec
def test_a_budget_for_all_changes_nothing(codec: Any) -> None:
    torch.manual_seed(1)
    cache, *_ = filled(quest(budget=1.0), codec, 1000)
    torch.manual_seed(1)
    full, *_ = filled(None, codec, 1000)
    for _ in range(3):
        new = step()
        assert torch.equal(forward(cache, *new), forward(full, *new))


@every_codec
def test_what_a_query_looks_for_is_found_wherever_it_is(codec: Any) -> None:
    """A needle in turn in many places: nothing was deleted."""
    cache, _, _ = filled(quest(budget=0.25), codec, 40)
    needles = {}
    for start in range(0, 2000, 100):
        key, value = random_kv(1, 2, 100, 64)
        at = int(torch.randint(100, ()))
        key[:, :, at] = 5 * torch.randn(64)
        needles[start + at] = key[0, 0, at].clone(), value[0, :, at].clone()
        forward(cache, key, value, torch.randn(1, 4, 100, 64))
    for needle, found in needles.values():
        key, value, _ = step()
        out = forward(cache, key, value, (needle / 5).expand(1, 4, 1, 64))
        assert relative_error(out[0, 0, ::2], found) < 0.05
        assert relative_error(out[0, 0, 1::2], found) < 0.05
    assert len(cache.kept(0, 0)) == 40 + 2000 + len(needles)


@every_codec
def test_rows_of_a_padded_batch_read_what_single_rows_read(codec: Any) -> None:
    lengths = [1100, 800]
    mask = left_padding(lengths)
    cache, key, value = filled(quest(budget=0.3), codec, 1100, batch=2, mask=causal_mask(mask, 1100))
    new_key, new_value, query = step(2)
    more = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    out = forward(cache, new_key, new_value, query, causal_mask(more, 1))
    for row, length in enumerate(lengths):
        config = tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64)
        single = kvpack.PackedCache(config, select=quest(budget=0.3), quantize=codec)
        own = slice(row, row + 1)
        forward(single, key[own, :, -length:], value[own, :, -length:], torch.randn(1, 4, length, 64))
        expected = forward(single, new_key[own], new_value[own], query[own])
        assert relative_error(out[own], expected) < 0.05  # Graded sees other queries


@every_codec
def test_crops_and_forks_know_their_own_pages(codec: Any) -> None:
    cache, *_ = filled(quest(budget=0.25), codec, 700)
    fork = cache.fork()
    cache.activate_past_recording()
    plain = [step() for _ in range(300)]
    for new in plain:
        forward(cache, *new)
    cache.crop(-260)
    for new in plain[:40]:
        forward(fork, *new)
    for _ in range(30):
        new = step()
        cache.crop(0)  # packs what waited
        a, b = forward(cache, *new), forward(fork, *new)
        assert torch.isfinite(a).all()
        if codec.name == "exact":
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("mode", ["greedy", "beams", "lookup", "chunks", "padded"])
def test_every_way_of_generating(mode: str) -> None:
    model = tiny_model()
    more: dict[str, Any] = {
        "beams": {"num_beams": 3},
        "lookup": {"prompt_lookup_num_tokens": 4},
        "chunks": {"prefill_chunk_size": 100},
    }.get(mode, {})
    batch = 2 if mode == "padded" else 1
    ids = torch.randint(3, 128, (batch, 600))
    inputs = {"input_ids": ids, "attention_mask": left_padding([600, 500][:batch])}
    for select in (kvpack.Quest(budget=1.0), kvpack.Quest(budget=0.2, dense_layers=1)):
        cache = kvpack.PackedCache(model, select=select, quantize=kvpack.KIVI(bits=4))
        out = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=30, min_new_tokens=30, do_sample=False, **more
        )
        assert out.shape == (batch, 630)
        assert cache.info()["materialised"] == 0
        if select.budget == 1.0 and mode != "lookup":
            full = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=4))
            dense = model.generate(
                **inputs, past_key_values=full, max_new_tokens=30, min_new_tokens=30, do_sample=False, **more
            )
            assert torch.equal(out, dense)


def test_it_goes_with_evictions() -> None:
    cache, *_ = filled(quest(budget=0.5), kvpack.Exact(), 2000, evict=kvpack.KeyDiff(budget=0.5))
    full, *_ = filled(None, kvpack.Exact(), 2000, evict=kvpack.KeyDiff(budget=0.5))
    for _ in range(3):
        assert torch.isfinite(forward(cache, *step())).all()
        forward(full, *step())
    assert len(cache.kept(0, 0)) == len(full.kept(0, 0))


def test_bounds_are_counted_and_few() -> None:
    cache, *_ = filled(quest(page=16), kvpack.Exact(), 8192)
    full, *_ = filled(None, kvpack.Exact(), 8192)
    held, without = cache.memory().parts["index"], full.memory().parts["index"]
    bounds = 2 * (8192 // 16) * 2 * 64 * 2  # KV heads, pages, ends, channels, bytes
    assert 0.8 * bounds < held - without < 1.3 * bounds + 20_000


@pytest.mark.slow
def test_time_falls_with_the_budget() -> None:
    times = {}
    for budget in (1.0, 0.1):
        cache, *_ = filled(quest(budget=budget, page=64), kvpack.Exact(), 32_768)
        new = step()
        forward(cache, *new)
        measured = []
        for _ in range(30):
            begin = time.perf_counter()
            forward(cache, *new)
            measured.append(time.perf_counter() - begin)
        times[budget] = sorted(measured)[10]
    assert times[0.1] < 0.7 * times[1.0], times


@pytest.mark.parametrize("attention_name", ["sdpa", "eager"])
def test_another_attention_is_refused(attention_name: str) -> None:
    model = tiny_model(attention=attention_name)
    cache = kvpack.PackedCache(model, select=kvpack.Quest())
    with pytest.raises(kvpack.OptionError, match="attn_implementation='kvpack'"):
        model.generate(input_ids=torch.randint(3, 128, (1, 40)), past_key_values=cache, max_new_tokens=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kvpack.Quest(budget=0), "budget=0 is not accepted; accepted: a whole number of tokens from 1"),
        (lambda: kvpack.Quest(budget=1.5), "budget=1.5"),
        (lambda: kvpack.Quest(budget=True), "budget=True"),
        (lambda: kvpack.Quest(page=0), "page=0"),
        (lambda: kvpack.Quest(page=1000), "page=1000 is not accepted; accepted: 1 to 256"),
        (lambda: kvpack.Quest(dense_layers=-1), "dense_layers=-1"),
        (
            lambda: kvpack.PackedCache(tiny_config(), select="quest"),
            "select='quest' is not accepted; accepted: kvpack.Q",
        ),
    ],
)
def test_bad_options_are_named(make: Any, message: str) -> None:
    with pytest.raises(kvpack.OptionError, match=message):
        make()


def test_as_text() -> None:
    from kvpack.methods.spec import parse_spec

    options = parse_spec("quest:budget=0.1:page=32+snapkv:budget=0.25+kivi:bits=4").options
    assert options["select"] == kvpack.Quest(budget=0.1, page=32)
    assert options["evict"] == kvpack.SnapKV(budget=0.25)
    assert "Quest(budget=0.1" in repr(kvpack.PackedCache(tiny_config(), select=options["select"]))
