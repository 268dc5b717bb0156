"""A forward is a transaction: a fault at any point of it leaves every layer as it was; who looks changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import kvpack
import pytest
import torch
from kvpack import _kvpack
from kvpack.layer import PackedLayer
from kvpack.methods import Property
from support import CODECS, codec_id, random_kv, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LENGTH = 301


def mixed_model(layers: int = 4, attention: str = "kvpack") -> Any:
    """Full layers first and last, sliding ones between them."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=layers // 2,
        pad_token_id=0,
    )
    config.layer_types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"][:layers]
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation(attention)
    return model


def state(cache: kvpack.PackedCache) -> tuple[Any, ...]:
    """All that anybody can see of a cache."""
    lengths = [cache.get_seq_length(i) for i in range(len(cache.layers))]
    packed = [i for i, layer in enumerate(cache.layers) if isinstance(layer, PackedLayer)]
    kept = [cache.kept(i, head, row) for i in packed for head in range(2) for row in range(max(cache.batch_size, 0))]
    return lengths, cache.memory(), kept, cache.lossy_share(), cache.info()


class FaultError(Exception):
    """What is injected."""


@contextmanager
def raising(at: int, error: type[BaseException]) -> Iterator[list[str]]:
    """Raises at the `at`-th of the points that a forward passes: around each call into the cache and attention."""
    passed: list[str] = []

    def point(name: str) -> None:
        passed.append(name)
        if len(passed) - 1 == at:
            raise error(name)

    def around(owner: Any, name: str) -> Callable[[], None]:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            point(f"before {name}")
            result = real(*args, **kwargs)
            point(f"after {name}")
            return result

        setattr(owner, name, wrapped)
        return lambda: setattr(owner, name, real)

    undo = [
        around(PackedLayer, "update"),
        around(PackedLayer, "attend"),
        around(PackedLayer, "commit"),
        around(DynamicSlidingWindowLayer, "update"),
    ]
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(*args: Any, **kwargs: Any) -> Any:
        point("before sdpa")
        result = sdpa(*args, **kwargs)
        point("after sdpa")
        return result

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield passed
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa
        for restore in undo:
            restore()


CASES = {
    "exact": {},
    "kivi": {"quantize": kvpack.KIVI(bits=4)},
    "q8": {"quantize": kvpack.Q8(window=16)},
    "rotated": {"quantize": kvpack.Rotated(bits=4, window=32, center=True)},
    "graded": {"quantize": kvpack.Graded(key_bits=3, value_bits=2)},
    "kvarn": {"quantize": kvpack.KVarN(bits=4)},
    "h2o": {"evict": kvpack.H2O(budget=100, block=8)},
    "snapkv": {"evict": kvpack.SnapKV(budget=64), "quantize": kvpack.KIVI(bits=8)},
    "streaming": {"evict": kvpack.StreamingLLM(budget=64, block=2)},
    "quest": {"select": kvpack.Quest(budget=0.5, page=32, dense_layers=0)},
}


@pytest.mark.parametrize("new", [1, 5, 200], ids=["step", "few", "chunk"])
@pytest.mark.parametrize("case", CASES)
def test_a_fault_at_any_point_leaves_no_trace(case: str, new: int) -> None:
    model = mixed_model()
    ids = torch.randint(3, 128, (2, LENGTH + 3 + new))
    past = kvpack.PackedCache(model, **CASES[case])
    model(ids[:, :LENGTH], past_key_values=past)
    for t in range(3):  # so that something is due, and something was evicted
        model(ids[:, LENGTH + t : LENGTH + t + 1], past_key_values=past)
    before = state(past)
    forward = ids[:, LENGTH + 3 :]
    expected = model(forward, past_key_values=past.fork()).logits
    with raising(10**9, FaultError) as points:
        model(forward, past_key_values=past.fork())
    assert len(points) >= 8
    errors = [FaultError, KeyboardInterrupt, MemoryError]
    for at in range(len(points)):
        cache = past.fork()
        with pytest.raises(errors[at % 3]), raising(at, errors[at % 3]):
            model(forward, past_key_values=cache)
        # After the last layer's attention the forward is over, and what comes then is none of the cache's business.
        if at < len(points) - 1:
            assert state(cache)[0] == before[0], points[at]
            assert state(cache)[2:4] == before[2:4], points[at]
            assert torch.equal(model(forward, past_key_values=cache).logits, expected), points[at]
    assert state(past) == before


@contextmanager
def refusing(at: int) -> Iterator[Callable[[], int]]:
    """Refuses the `at`-th request for memory, in whichever thread it is; gives what says how many there were."""
    _kvpack.refuse_memory(at)
    try:
        yield lambda: at - _kvpack.refuse_memory(0)
    finally:
        _kvpack.refuse_memory(0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [0, LENGTH + 3], ids=["prompt", "chunk"])
def test_refused_memory_at_any_point_leaves_no_trace(case: str, length: int) -> None:
    """In appending, packing, evicting, attention: any request for memory may be the one that the system refuses."""
    model = mixed_model()
    ids = torch.randint(3, 128, (2, length + 40))
    past = kvpack.PackedCache(model, **CASES[case])
    if length:
        model(ids[:, :LENGTH], past_key_values=past)
        for t in range(LENGTH, length):
            model(ids[:, t : t + 1], past_key_values=past)
    before = state(past)
    forward = ids[:, length:]
    with refusing(10**9) as requests:
        expected = model(forward, past_key_values=past.fork()).logits
        n = requests()
    assert n >= 20
    refused = 0
    for at in sorted({*range(1, min(n, 30)), *torch.linspace(1, n, 60).int().tolist()}):
        cache = past.fork()
        try:
            with refusing(at):
                model(forward, past_key_values=cache)
        except kvpack.OutOfMemoryError:
            refused += 1
            assert state(cache) == before, at
            assert torch.equal(model(forward, past_key_values=cache).logits, expected), at
    assert refused >= min(n, 60) * 0.8  # threads share the work as it comes, so that the last points may be missed


@pytest.mark.parametrize("case", CASES)
def test_a_first_forward_that_fails_leaves_an_empty_cache(case: str) -> None:
    model = mixed_model()
    ids = torch.randint(3, 128, (1, LENGTH))
    fresh = kvpack.PackedCache(model, **CASES[case])
    empty = state(fresh)
    expected = model(ids, past_key_values=fresh).logits
    with raising(10**9, FaultError) as points:
        model(ids, past_key_values=kvpack.PackedCache(model, **CASES[case]))
    for at in range(len(points) - 1):
        cache = kvpack.PackedCache(model, **CASES[case])
        with pytest.raises(FaultError), raising(at, FaultError):
            model(ids, past_key_values=cache)
        assert state(cache) == empty, points[at]
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("codec", CODECS, ids=codec_id)
def test_memory_is_that_of_before(codec: Any) -> None:
    """Rolled back at the last layer, when all others have packed and appended: not a byte differs."""
    model = tiny_model(tiny_config(layers=3))
    ids = torch.randint(3, 128, (1, 500))
    cache = kvpack.PackedCache(model, quantize=codec)
    model(ids[:, :LENGTH], past_key_values=cache)
    for t in range(LENGTH, 440):
        before = state(cache)
        bad = torch.ones(1, 1, 1, 7, dtype=torch.bool)
        with pytest.raises(kvpack.ShapeError), replaced_mask(model, bad):
            model(ids[:, t : t + 1], past_key_values=cache)
        after = state(cache)
        if (
            Property.CONSECUTIVE_POSITIONS not in codec.needs
        ):  # the table of angles is shared by all caches, and grows for good
            assert after[1] == before[1]
        assert (after[0], *after[2:]) == (before[0], *before[2:])
        model(ids[:, t : t + 1], past_key_values=cache)


@contextmanager
def replaced_mask(model: Any, mask: torch.Tensor) -> Iterator[None]:
    """The last layer gets a mask that does not fit."""

    def swap(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["attention_mask"] = mask
        return args, kwargs

    hook = model.model.layers[-1].self_attn.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("attention", ["kvpack", "sdpa"])
@pytest.mark.parametrize("layer", range(4))
def test_an_interrupt_between_layers(layer: int, attention: str, caplog: pytest.LogCaptureFixture) -> None:
    model = mixed_model(attention=attention)
    ids = torch.randint(3, 128, (1, LENGTH + 1))
    cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=4))
    model(ids[:, :LENGTH], past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    lengths, kept = state(cache)[0], state(cache)[2]
    expected = model(ids[:, LENGTH:], past_key_values=cache.fork()).logits

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[layer].self_attn.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, LENGTH:], past_key_values=cache)
    hook.remove()
    assert state(cache)[0] == lengths
    assert state(cache)[2] == kept
    assert torch.equal(model(ids[:, LENGTH:], past_key_values=cache).logits, expected)
    assert ("was rolled back" in caplog.text) == (layer > 0)  # before layer 0 nothing had begun


def test_recording_ends_when_nobody_crops_any_more() -> None:
    model = tiny_model(tiny_config(head_dim=64))
    ids = torch.randint(3, 128, (1, 400))
    cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=2))
    arguments = {"do_sample": False, "pad_token_id": 0, "past_key_values": cache}
    out = model.generate(ids, max_new_tokens=5, min_new_tokens=5, prompt_lookup_num_tokens=3, **arguments)
    plain = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=2))
    again = model.generate(ids, max_new_tokens=5, min_new_tokens=5, **{**arguments, "past_key_values": plain})
    assert torch.equal(out, again)
    for held in (cache, plain):
        model.generate(out, max_new_tokens=150, min_new_tokens=150, **{**arguments, "past_key_values": held})
    assert not cache.layers[0].record_past
    assert cache.memory().parts["codes"] == plain.memory().parts["codes"]


def test_layers_are_copied_alone_and_taken_in() -> None:
    """Models that run their layers several times add copies of them to the list."""
    cache = kvpack.PackedCache(tiny_config(layers=2), quantize=kvpack.KIVI(bits=4))
    cache.layers += [copy.deepcopy(layer) for layer in cache.layers]
    tokens = [random_kv(1, 2, 200, 32) for _ in range(4)]
    for i, (key, value) in enumerate(tokens):
        cache.update(key, value, i)
    for i, (key, value) in enumerate(tokens):
        cache.update(key[:, :, :1], value[:, :, :1], i)
    assert [layer.get_seq_length() for layer in cache.layers] == [201] * 4
    assert len(cache.memory().layers) == 4
    cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [200] * 4
    alone = copy.deepcopy(cache.layers[1])
    alone.crop(-10)
    assert (alone.get_seq_length(), cache.layers[1].get_seq_length()) == (190, 200)
    with pytest.raises(kvpack.OptionError, match="the method of the cache"):
        cache.layers[1].crop(-10)


def test_crop_is_for_all_layers_or_none() -> None:
    model = mixed_model()
    ids = torch.randint(3, 128, (1, 30))
    for n in (-1, 20):
        cache = kvpack.PackedCache(model)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        before = state(cache)
        try:
            cache.crop(n)
        except RuntimeError:
            assert state(cache) == before
        else:
            assert len(set(state(cache)[0])) == 1
