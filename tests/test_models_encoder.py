"""Models with an encoder: the self-attention of their decoders is packed."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from model_kinds import BASE, GREEDY, shaken
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    EncoderDecoderConfig,
    EncoderDecoderModel,
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
    "num_layers": 2,  # transformers' own cache asks the encoder for the decoder's layers
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


def test_attach_refuses_models_that_generate_in_ways_of_their_own() -> None:
    model = with_encoder("whisper")
    with pytest.raises(kvpack.OptionError, match=r"generate is its own.*part of it"):
        kvpack.attach(model)
    assert "generate" not in vars(model)
