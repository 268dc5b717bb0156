"""`attach`: generate and pipelines use a packed cache without being told."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from support import tiny_model
from transformers import DynamicCache, PreTrainedModel, TextStreamer, pipeline

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


def test_the_models_generation_config_counts(model: PreTrainedModel) -> None:
    model.generation_config.use_cache = False
    with kvpack.attach(model) as handle:
        before = handle.cache
        model.generate(**IDS, **GREEDY)
        assert handle.cache is before
        model.generate(**IDS, **GREEDY, use_cache=True)
        assert handle.cache is not before


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
