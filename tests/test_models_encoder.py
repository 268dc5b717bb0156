"""Models with an encoder: what their decoders hold of their own tokens and of the encoder's is packed."""

from __future__ import annotations

import copy
from typing import Any

import kvpack
import pytest
import torch
from model_kinds import BASE, GREEDY, shaken
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MusicgenForConditionalGeneration,
    WhisperForConditionalGeneration,
)

SEQ = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,  # fewer: transformers' own cache takes the encoder's number for theirs
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def with_encoder(kind: str, attention: str | None = None) -> Any:
    options = {} if attention is None else {"attn_implementation": attention}
    if kind == "bert2bert":
        small = {**BASE, "hidden_size": 32, "vocab_size": 100}
        decoder = {"is_decoder": True, "add_cross_attention": True}
        parts = (CONFIG_MAPPING["bert"](**small, **more) for more in ({}, decoder))
        config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        return shaken(EncoderDecoderModel(config), 2)
    if kind == "whisper":
        config = CONFIG_MAPPING[kind](**SEQ, num_mel_bins=8, max_source_positions=50, max_target_positions=64)
        return shaken(WhisperForConditionalGeneration._from_config(config, **options), 2)
    config = CONFIG_MAPPING[kind](**(T5 if "t5" in kind else SEQ))
    return shaken(AutoModelForSeq2SeqLM.from_config(config, **options), 2)


INPUTS = {"input_ids": torch.arange(3, 40)[None]}
ENCODERS = ["t5", "umt5", "longt5", "bart", "pegasus", "bert2bert"]


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_attach_to_models_with_an_encoder(kind: str, beams: int) -> None:
    model = with_encoder(kind)
    expected = model.generate(**INPUTS, **GREEDY, num_beams=beams)
    before = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    with kvpack.attach(model) as handle:
        assert torch.equal(model.generate(**INPUTS, **GREEDY, num_beams=beams), expected)
        assert handle.cache.get_seq_length() == 8
        info = handle.cache.info()
        assert info["fused"] + info["materialised"] > 0
    assert [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")] == before


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    """Two rows, the second padded."""
    if kind == "whisper":
        return {"input_features": torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))}
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[1, 30:] = 0
    return {"input_ids": torch.arange(3, 77).view(2, 37) * mask, "attention_mask": mask}


@pytest.mark.parametrize("kind", [*ENCODERS, "whisper"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.filterwarnings("ignore:.*instead of 'kvpack'")
def test_both_caches_packed(kind: str, beams: int) -> None:
    inputs, reference = inputs_of(kind), with_encoder(kind)
    expected = reference.generate(**inputs, **GREEDY, num_beams=beams)
    for attention in (None, "kvpack"):
        model = with_encoder(kind, attention)
        for cross in (None, kvpack.Q8()):
            cache = kvpack.PackedEncoderDecoderCache(model, cross=cross)
            assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=beams, past_key_values=cache), expected)
            crossed = cache.cross_attention_cache
            assert (crossed.lossy_share() > 0) == (cross is not None)
            assert crossed.memory().parts["pending"] == 0
            in_place = attention is not None and kind not in ("longt5", "bert2bert")
            assert (crossed.info()["fused"] > 0) == in_place


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_prompt_lookup_with_an_encoder(kind: str) -> None:
    inputs, model = {"input_ids": torch.arange(3, 40)[None]}, with_encoder(kind, "kvpack")
    options = {**GREEDY, "max_new_tokens": 20, "prompt_lookup_num_tokens": 3}
    expected = with_encoder(kind).generate(**inputs, **options)
    cache = kvpack.PackedEncoderDecoderCache(model)
    assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)
    with kvpack.attach(model):
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_a_calibrated_codec_is_refused_for_the_encoders_tokens() -> None:
    model = with_encoder("bart", "kvpack")
    calibrated = kvpack.KVQuant(bits=4)  # whose tables are of one model's own layers
    with pytest.raises(kvpack.OptionError, match=r"cross=KVQuant.*cross=kvpack\.Q8\(\)"):
        kvpack.PackedEncoderDecoderCache(model, cross=calibrated)
    with kvpack.attach(model, cross=kvpack.Q8()) as handle:
        model.generate(**INPUTS, **GREEDY)
        assert handle.cache.lossy_share() == 0
    with pytest.raises(kvpack.OptionError, match="without an encoder"):
        kvpack.attach(shaken(AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**BASE))), cross=kvpack.Q8())


def test_steps_of_a_copy_of_both_caches() -> None:
    model = with_encoder("bart", "kvpack")
    ids = torch.tensor([[1, 5, 9]])
    cache = kvpack.PackedEncoderDecoderCache(model)
    model(**INPUTS, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    copies = [cache.fork(), copy.deepcopy(cache)]
    assert cache.memory().total == sum(
        part.memory().total for part in (cache.self_attention_cache, cache.cross_attention_cache)
    )
    logits = [
        model(**INPUTS, decoder_input_ids=ids[:, :1], past_key_values=one, use_cache=True).logits
        for one in (cache, *copies)
    ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_a_forward_that_failed_between_the_two_caches_is_done_again() -> None:
    model = with_encoder("bart", "kvpack")
    expected = model(**INPUTS, decoder_input_ids=torch.tensor([[1, 5]])).logits
    cache = kvpack.PackedEncoderDecoderCache(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("now")

    hook = model.model.decoder.layers[1].encoder_attn.k_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="now"):
        model(**INPUTS, decoder_input_ids=torch.tensor([[1, 5]]), past_key_values=cache, use_cache=True)
    hook.remove()
    assert cache.get_seq_length() == 0
    again = model(**INPUTS, decoder_input_ids=torch.tensor([[1, 5]]), past_key_values=cache, use_cache=True).logits
    assert (again - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_bytes_of_an_encoders_tokens(kind: str) -> None:
    shape = {"num_heads": 4, "d_kv": 64, "d_model": 256} if kind == "t5" else {}
    config = CONFIG_MAPPING["t5"](**{**T5, **shape, "num_layers": 4}) if kind == "t5" else CONFIG_MAPPING["whisper"]()
    cache = kvpack.PackedEncoderDecoderCache(config, cross=kvpack.Q8())
    keys = torch.randn(1, 4, 1024, 64)
    for layer in range(len(cache)):
        cache.cross_attention_cache.update(keys, keys, layer)
    held = cache.cross_attention_cache.memory()
    assert held.parts["exact"] == 0
    assert held.total <= 0.54 * len(cache) * 2 * keys.numel() * 2  # of float16


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.filterwarnings("ignore:.*instead of 'kvpack'")
def test_a_packed_cache_within_an_encoder_decoder_cache(kind: str) -> None:
    expected = with_encoder(kind).generate(**INPUTS, **GREEDY)
    for attention in (None, "kvpack"):
        model = with_encoder(kind, attention)
        cache = EncoderDecoderCache(kvpack.PackedCache(model), DynamicCache())
        assert torch.equal(model.generate(**INPUTS, **GREEDY, past_key_values=cache), expected)


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_a_packed_cache_alone_is_refused_for_a_model_with_an_encoder(kind: str) -> None:
    model = with_encoder(kind)
    inputs = {"input_features": torch.randn(1, 8, 100)} if kind == "whisper" else INPUTS
    cache = kvpack.PackedCache(model)
    with pytest.raises(kvpack.OptionError, match="EncoderDecoderCache"):
        model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_forward_with_a_packed_cache_alone_is_refused_too(kind: str) -> None:
    model = with_encoder(kind)
    cache = kvpack.PackedCache(model)
    with pytest.raises(kvpack.OptionError, match="EncoderDecoderCache"):
        model(**INPUTS, decoder_input_ids=torch.tensor([[1, 5]]), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_attach_to_a_model_that_generates_several_times(beams: int) -> None:
    model, options = with_encoder("whisper"), {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    for frames in (100, 250):  # two and a half times what the encoder takes
        inputs = {"input_features": torch.randn(1, 8, frames, generator=torch.Generator().manual_seed(0))}
        if frames > 100:
            inputs["attention_mask"] = torch.ones(1, frames, dtype=torch.long)
            options["return_timestamps"] = True
            model.generation_config.no_timestamps_token_id = 90
        expected = model.generate(**inputs, **options)
        with kvpack.attach(model) as handle:
            assert torch.equal(model.generate(**inputs, **options), expected)
            assert handle.cache.info()["fused"] > 0


def test_attach_refuses_models_that_generate_in_ways_of_their_own() -> None:
    model = type("Model", (), {"generate": MusicgenForConditionalGeneration.generate, "set_attn_implementation": None})
    with pytest.raises(kvpack.OptionError, match=r"generate is its own.*part of it"):
        kvpack.attach(model())


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_through_transformers_own_plug_in_point(kind: str, beams: int) -> None:
    model = with_encoder(kind, "kvpack")
    expected = with_encoder(kind).generate(**INPUTS, **GREEDY, num_beams=beams)
    got = model.generate(**INPUTS, **GREEDY, num_beams=beams, custom_generate=kvpack.generate, quantize=kvpack.Exact())
    assert torch.equal(got, expected)
