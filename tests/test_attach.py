"""`attach`: generate and pipelines use a packed cache without being told."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import weakref
from typing import Any

import kvpack
import pytest
import torch
from support import tiny_model
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, TextStreamer, pipeline

IDS = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model(attention="sdpa")


def test_as_a_context_manager(model: PreTrainedModel) -> None:
    expected = model.generate(**IDS, **GREEDY)
    with kvpack.attach(model) as handle:
        assert model.config._attn_implementation == "kvpack"
        assert torch.equal(model.generate(**IDS, **GREEDY), expected)
        assert isinstance(handle.cache, kvpack.PackedCache)
        assert handle.cache.info()["fused"] > 0
        assert handle.cache.get_seq_length() == 9
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(**IDS, **GREEDY), expected)
    assert handle.cache.get_seq_length() == 9


def test_as_a_handle(model: PreTrainedModel) -> None:
    handle = kvpack.attach(model, quantize=kvpack.KIVI(bits=8))
    model.generate(**IDS, **GREEDY)
    assert handle.cache.quantize == kvpack.KIVI(bits=8)
    handle.detach()
    handle.detach()
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


def test_an_error_inside_detaches_as_well(model: PreTrainedModel) -> None:
    with pytest.raises(ZeroDivisionError), kvpack.attach(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


@pytest.mark.parametrize("before", ["sdpa", "eager", "kvpack"])
def test_detach_restores_what_was_there(before: str) -> None:
    model = tiny_model(attention=before)
    with kvpack.attach(model):
        assert model.config._attn_implementation == "kvpack"
    assert model.config._attn_implementation == before


def test_each_call_gets_a_fresh_cache(model: PreTrainedModel) -> None:
    with kvpack.attach(model) as handle:
        first = model.generate(**IDS, **GREEDY)
        cache = handle.cache
        assert torch.equal(model.generate(**IDS, **GREEDY), first)
        assert handle.cache is not cache
        assert cache.get_seq_length() == handle.cache.get_seq_length() == 9


def test_the_users_own_cache_wins(model: PreTrainedModel) -> None:
    with kvpack.attach(model) as handle:
        before = handle.cache
        own = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=2))
        model.generate(**IDS, **GREEDY, past_key_values=own)
        assert own.get_seq_length() == 9
        full = DynamicCache(config=model.config)
        model.generate(**IDS, **GREEDY, past_key_values=full)
        assert full.get_seq_length() == 9
        assert handle.cache is before


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "dynamic"}], ids=str)
def test_calls_that_say_otherwise_are_left_alone(model: PreTrainedModel, options: dict[str, Any]) -> None:
    expected = model.generate(**IDS, **GREEDY)
    with kvpack.attach(model) as handle:
        before = handle.cache
        assert torch.equal(model.generate(**IDS, **GREEDY, **options), expected)
        assert handle.cache is before


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("use_cache", False, True),
        ("cache_implementation", "static", None),
        ("cache_implementation", "dynamic", None),
    ],
)
def test_a_default_of_the_model_that_turns_kvpack_off_is_said(
    model: PreTrainedModel, name: str, value: Any, other: Any
) -> None:
    expected = model.generate(**IDS, **GREEDY)
    setattr(model.generation_config, name, value)
    with kvpack.attach(model) as handle:
        before = handle.cache
        for given in ({}, {"generation_config": GenerationConfig(max_new_tokens=6)}):
            with pytest.warns(UserWarning, match=f"does not use kvpack.*{name} is {value!r}; set it to {other}"):
                assert torch.equal(model.generate(**IDS, **(given or GREEDY)), expected)
        assert handle.cache is before
        setattr(model.generation_config, name, other)
        assert torch.equal(model.generate(**IDS, **GREEDY), expected)
        assert handle.cache is not before


def test_the_caller_overrides_the_models_default(model: PreTrainedModel) -> None:
    model.generation_config.use_cache = False
    with kvpack.attach(model) as handle:
        before = handle.cache
        model.generate(**IDS, **GREEDY, use_cache=True)
        assert handle.cache is not before


@pytest.mark.parametrize("said", ["by the model", "by a generation config", "by the call"])
def test_hybrid_means_nothing_as_generate_takes_it(model: PreTrainedModel, said: str) -> None:
    """Old checkpoints of Gemma say so; `generate` itself unsets it."""
    expected = model.generate(**IDS, **GREEDY)
    options: dict[str, Any] = dict(GREEDY)
    if said == "by the model":
        model.generation_config.cache_implementation = "hybrid"
    elif said == "by the call":
        options["cache_implementation"] = "hybrid"
    else:
        options = {"generation_config": GenerationConfig(**GREEDY, cache_implementation="hybrid")}
    with kvpack.attach(model) as handle:
        before = handle.cache
        assert torch.equal(model.generate(**IDS, **options), expected)
        assert handle.cache is not before
        assert handle.cache.info()["fused"] > 0


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_other_modes_of_generation(model: PreTrainedModel, mode: dict[str, Any]) -> None:
    ids = {"input_ids": torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]]), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    expected = model.generate(**ids, **GREEDY, **mode)
    with kvpack.attach(model) as handle:
        assert torch.equal(model.generate(**ids, **GREEDY, **mode), expected)
        assert handle.cache.info()["fused"] > 0


def test_pipelines_and_streamers(float32_models: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = float32_models.reference
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["The capital of France is", "Water boils at"]
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = generator(prompts, batch_size=2, **options)
    with kvpack.attach(model) as handle:
        assert generator(prompts, batch_size=2, **options) == expected
        assert handle.cache.info()["fused"] > 0
        inputs = tokenizer(prompts[0], return_tensors="pt")
        capsys.readouterr()
        tokens = model.generate(**inputs, streamer=TextStreamer(tokenizer), **options)
    assert capsys.readouterr().out.strip() == tokenizer.decode(tokens[0]).strip()


def test_attaching_twice_is_refused(model: PreTrainedModel) -> None:
    with kvpack.attach(model):
        with pytest.raises(kvpack.OptionError, match="detach"):
            kvpack.attach(model)
        assert model.config._attn_implementation == "kvpack"
    assert model.config._attn_implementation == "sdpa"


def test_a_refused_option_leaves_the_model_alone(model: PreTrainedModel) -> None:
    with pytest.raises(kvpack.OptionError):
        kvpack.attach(model, quantize=kvpack.KIVI(group=64))  # its heads have 32 numbers
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


# ---- copies, and other wrappers ----------------------------------------------------------------------------------


def test_a_copy_of_an_attached_model_is_its_own(model: PreTrainedModel) -> None:
    expected = model.generate(**IDS, **GREEDY)
    handle = kvpack.attach(model, quantize=kvpack.KIVI(bits=8))
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.copy_(parameter.roll(1, 0))
    detached = copy.deepcopy(twin)
    detached.set_attn_implementation("sdpa")
    del detached.generate
    own = detached.generate(**IDS, **GREEDY)
    assert not torch.equal(own, expected)
    before = handle.cache
    assert torch.equal(twin.generate(**IDS, **GREEDY), own)
    other = twin.generate.attachment
    assert handle.cache is before
    assert other.cache.quantize == kvpack.KIVI(bits=8)
    assert other.cache.info()["fused"] > 0
    handle.detach()
    assert torch.equal(model.generate(**IDS, **GREEDY), expected)
    assert twin.config._attn_implementation == "kvpack"
    last = other.cache
    assert torch.equal(twin.generate(**IDS, **GREEDY), own)
    assert other.cache is not last
    other.detach()
    assert "generate" not in vars(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(twin.generate(**IDS, **GREEDY), own)


def test_a_copy_does_not_keep_the_original() -> None:
    model = tiny_model(attention="sdpa")
    original, handle = weakref.ref(model), kvpack.attach(model)
    twin = copy.deepcopy(model)
    del model, handle
    gc.collect()
    assert original() is None
    assert twin.generate(**IDS, **GREEDY).shape == (1, 10)


def wrapped(generate: Any, calls: list[int], alike: bool) -> Any:
    """Somebody else's wrapper around `generate`, which may look like what it wraps."""

    def outer(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return generate(*args, **kwargs)

    return functools.wraps(generate)(outer) if alike else outer


@pytest.mark.parametrize("alike", [False, True])
def test_a_wrapper_around_ours_stays(model: PreTrainedModel, alike: bool) -> None:
    expected = model.generate(**IDS, **GREEDY)
    handle = kvpack.attach(model)
    calls: list[int] = []
    outer = model.generate = wrapped(model.generate, calls, alike)
    assert torch.equal(model.generate(**IDS, **GREEDY), expected)
    cache = handle.cache
    assert cache.info()["fused"] > 0
    handle.detach()
    assert model.generate is outer
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(**IDS, **GREEDY), expected)
    assert calls == [1, 1]
    assert handle.cache is cache  # ours only passes on
    with kvpack.attach(model) as again:
        before = again.cache
        assert torch.equal(model.generate(**IDS, **GREEDY), expected)
        assert again.cache is not before
    assert model.generate is outer


@pytest.mark.parametrize("alike", [False, True])
def test_a_wrapper_within_ours_stays(model: PreTrainedModel, alike: bool) -> None:
    expected = model.generate(**IDS, **GREEDY)
    calls: list[int] = []
    inner = model.generate = wrapped(model.generate, calls, alike)
    with kvpack.attach(model) as handle:
        assert torch.equal(model.generate(**IDS, **GREEDY), expected)
        assert handle.cache.info()["fused"] > 0
    assert model.generate is inner
    assert calls == [1]


def test_attaching_under_a_wrapper_that_looks_like_ours_is_refused(model: PreTrainedModel) -> None:
    with kvpack.attach(model):
        model.generate = wrapped(model.generate, [], alike=True)
        with pytest.raises(kvpack.OptionError, match="detach"):
            kvpack.attach(model)


def test_the_wrapper_has_generates_signature(model: PreTrainedModel) -> None:
    before = inspect.signature(model.generate)
    with kvpack.attach(model):
        assert inspect.signature(model.generate) == before
        assert model.generate.__doc__ == type(model).generate.__doc__
