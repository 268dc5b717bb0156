"""Models of all kinds of attention: kvpack's stands in where it can, and nothing is ever wrong without a word."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpack
import pytest
import torch
from kvpack import models
from kvpack.attention import kvpack_attention
from support import FakeAttention, filled_layer, forward, random_kv, tiny_config, tiny_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
    WhisperForConditionalGeneration,
)

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
INDEXED = {
    **EXPERTS,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 6,
    "layer_types": ["indexed_attention"] * 2,
    "mlp_layer_types": ["dense", "sparse"],
    "head_dim": 16,
}
BLOCKS = {
    "dense_intermediate_size": 64,
    "shared_intermediate_size": 32,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "num_local_experts": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "index_local_blocks": 1,
    "layer_types": ["full_attention", "minimax_m3_sparse"],
}
SINKS = {
    **EXPERTS,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 16,
    "d_rel": 8,
    "rel_extent": 32,
    "unpadded_vocab_size": 128,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "mlp_layer_types": ["dense", "sparse"],
}
COMPRESSED = {
    **EXPERTS,
    "head_dim": 16,
    "q_lora_rank": 24,
    "o_lora_rank": 16,
    "o_groups": 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 6,
    "sliding_window": 16,
    "qk_rope_head_dim": 16,
    "num_key_value_heads": 1,
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
    "mlp_layer_types": ["hash_moe", "moe"],
}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "d_model": 64, "is_decoder": True}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
# Attention that kvpack's cannot stand in for, by why.
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "code of its own": {
        "bloom": {"n_layer": 2, "n_head": 4},
        "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
        "gpt_neox_japanese": {"intermediate_multiple_size": 1},
        "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
        "trocr": DECODER,
        "big_bird": {"is_decoder": True, "attention_type": "original_full"},
        "rembert": {"is_decoder": True, "input_embedding_size": 64, "output_embedding_size": 64},
        "megatron-bert": {"is_decoder": True},
        "roformer": {"is_decoder": True, "embedding_size": 64},
    },
    "chosen by name": {
        "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "gpt_neo": {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
        },
        "git": {"vision_config": VISION},
    },
    "eager alone": {
        "bigbird_pegasus": {
            **DECODER,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
        },
    },
    "sparse": {"deepseek_v32": INDEXED, "minimax_m3_vl_text": BLOCKS},
    "more arguments": {"inkling2_text": SINKS},
    "another mask": {"deepseek_v4": COMPRESSED},
}
KINDS = [
    pytest.param(name, changes, id=name)
    for architectures in OWN.values()
    for name, changes in architectures.items()
    if name in CONFIG_MAPPING
]
IDS = torch.randint(4, 120, (2, 24), generator=torch.Generator().manual_seed(0))


def shaken(model: Any, seed: int = 1) -> Any:
    """The model with weights that make attention peaked, so that a misplaced token shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15, generator=generator)
    return model.eval().float()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saves a tiny model of an architecture, once, and says where."""

    @functools.cache
    def save(name: str) -> Path:
        where = tmp_path_factory.mktemp(name)
        changes = next(param.values[1] for param in KINDS if param.values[0] == name)
        with torch.no_grad():
            shaken(AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**BASE, **changes}))).save_pretrained(where)
        return where

    return save


def load(where: Path, attention: str | None = None) -> Any:
    options = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_pretrained(where, **options).eval()


def logits(model: Any, cache: Any) -> torch.Tensor:
    """Of two rows, the first left-padded: a prompt's last, a step's, a chunk's and a step's."""
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    outputs = []
    for new in (24, 1, 4, 1):
        outputs.append(model(IDS[:, :new], attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        mask = torch.cat([mask, torch.ones(2, 4 if new == 1 else 1, dtype=torch.long)], 1)
    return torch.cat([outputs[0][:, -1:], *outputs[1:]], 1)


# ---- attention that kvpack's cannot stand in for -----------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes"), KINDS)
@pytest.mark.filterwarnings("ignore:nothing is packed")
def test_attention_of_their_own_is_kept(name: str, changes: Any, saved: Any) -> None:
    """Loaded as the README says, and attached: with transformers' cache and with a packed one."""
    reference = load(saved(name))
    kept = reference.config._attn_implementation
    expected = logits(reference, DynamicCache(config=reference.config))
    with pytest.warns(UserWarning, match=f"{kept!r} instead of 'kvpack'"):
        model = load(saved(name), "kvpack")
    assert model.config._attn_implementation == kept
    assert torch.equal(logits(model, DynamicCache(config=model.config)), expected)
    assert torch.equal(logits(model, kvpack.PackedCache(model)), expected)
    with kvpack.attach(reference):
        assert reference.config._attn_implementation == kept
        assert torch.equal(logits(reference, kvpack.PackedCache(reference)), expected)
    assert models.why_not_in_place(reference) is not None


@pytest.mark.parametrize("name", ["bloom", "git"])
def test_attention_that_was_chosen_is_kept_when_it_is_set_later(name: str, saved: Any) -> None:
    model = load(saved(name), "eager")
    if type(model)._can_set_attn_implementation():
        with pytest.warns(UserWarning, match="instead of 'kvpack'"):
            model.set_attn_implementation("kvpack")
    else:
        model.set_attn_implementation("kvpack")
    assert model.config._attn_implementation == "eager"


def test_attention_that_kvpack_stands_in_for() -> None:
    for name in ("llama", "gpt_oss", "gemma2", "deepseek_v3", "qwen3_next", "bart", "gpt2"):
        model_class = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[name]]
        assert models.own_attention(model_class) is None, name


def test_classes_without_a_source_keep_their_own() -> None:
    model_class: Any = type("Unknown", (PreTrainedModel,), {"__module__": "nowhere"})
    assert models.own_attention(model_class) == "is made of code whose source is not to be had"


class OwnLlama(LlamaForCausalLM):
    """A user's model, in a module that has no attention."""


class OwnOss(AutoModelForCausalLM._model_mapping[CONFIG_MAPPING["gpt_oss"]]):  # type: ignore[misc]
    """The same of a model whose learned sinks SDPA does not know."""


@pytest.mark.parametrize("model_class", [OwnLlama, OwnOss])
def test_subclasses_of_the_users_own(model_class: Any) -> None:
    few = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16, "num_key_value_heads": 2}
    config = model_class.config_class(**BASE, **few)
    reference = shaken(model_class._from_config(config, attn_implementation="eager"))
    model = copy.deepcopy(reference)
    model.set_attn_implementation("kvpack")
    for module in model.modules():  # attention classes, too, may be of the user's own
        if type(module).__name__.endswith("Attention"):
            module.__class__ = type("OwnAttention", (type(module),), {"__module__": __name__})
    assert model.config._attn_implementation == "kvpack"
    cache = kvpack.PackedCache(model)
    difference = logits(model, cache) - logits(reference, DynamicCache(config=config))
    assert difference.abs().max() < 1e-5
    assert cache.info()["fused"] > 0


# ---- Gemma 4: fewer queries than the layers before ---------------------------------------------------------------


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this transformers has no Gemma 4")
@pytest.mark.parametrize("window", [8, 64])
@pytest.mark.parametrize("keep", [1, 3, 7])
def test_layers_that_get_the_newest_queries_alone(keep: int, window: int) -> None:
    config = CONFIG_MAPPING["gemma4_text"](
        **{**BASE, "num_hidden_layers": 6},
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        num_kv_shared_layers=2,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 3,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128,
    )
    outputs = []
    for attention in ("sdpa", "kvpack"):
        model = shaken(AutoModelForCausalLM.from_config(config, attn_implementation=attention))
        for cache in (DynamicCache(config=config), kvpack.PackedCache(model)):
            steps = [model(IDS[:, :n], past_key_values=cache, logits_to_keep=keep) for n in (24, 9, 1)]
            outputs.append(torch.cat([step.logits[:, -keep:] for step in steps], 1))
    for output in outputs[1:]:
        assert (output - outputs[0]).abs().max() < 1e-4


# ---- models with an encoder --------------------------------------------------------------------------------------

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
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
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


# ---- arguments of the attention function -------------------------------------------------------------------------

KEY, VALUE = random_kv(1, 2, 50, 32)
NEW_KEY, NEW_VALUE = random_kv(1, 2, 3, 32)
QUERY = torch.randn(1, 4, 3, 32, generator=torch.Generator().manual_seed(3))


def attend(module: Any, cache: Any = None, mask: Any = None, **options: Any) -> torch.Tensor:
    """Attention of three new tokens after fifty, which a PackedCache holds or which are plain tensors."""
    if cache is None:
        keys, values = torch.cat([KEY, NEW_KEY], 2), torch.cat([VALUE, NEW_VALUE], 2)
    else:
        keys, values = cache.update(NEW_KEY, NEW_VALUE, 0)
    return kvpack_attention(module, QUERY, keys, values, mask, **options)[0]


@pytest.mark.parametrize("argument", ["indices", "block_indices", "position_bias", "sinks", "head_mask", "anything"])
@pytest.mark.parametrize("packed", [False, True])
def test_arguments_that_nobody_knows_are_refused(argument: str, packed: bool) -> None:
    cache = filled_layer(kvpack.Exact(), KEY, VALUE) if packed else None
    with pytest.raises(kvpack.OptionError, match=rf"{argument}.*'sdpa' or 'eager'"):
        attend(FakeAttention(2), cache, **{argument: torch.zeros(1)})
    attend(FakeAttention(2), None, **{argument: None})


@pytest.mark.parametrize("argument", sorted(models.HARMLESS))
def test_arguments_that_change_nothing(argument: str) -> None:
    for cache in (None, filled_layer(kvpack.Exact(), KEY, VALUE)):
        fork = None if cache is None else cache.fork()
        expected = attend(FakeAttention(2), cache)
        assert torch.equal(attend(FakeAttention(2), fork, **{argument: 7}), expected)


def test_what_a_caller_passes_through_a_model_is_left_alone() -> None:
    """None of transformers' attention functions reads what a model does not pass on purpose."""
    config = tiny_config()
    reference, model = (tiny_model(config, attention) for attention in ("sdpa", "kvpack"))
    expected = reference(IDS, anything=torch.ones(1)).logits
    actual = model(IDS, anything=torch.ones(1), past_key_values=kvpack.PackedCache(model)).logits
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask_the_queries_are_the_newest(causal: bool) -> None:
    """As is_causal of the module, or of the call, says; packed and with plain tensors."""
    mask = torch.ones(1, 1, 3, 53, dtype=torch.bool)
    expected = attend(FakeAttention(2), mask=mask.tril(50) if causal else mask)
    module = FakeAttention(2)
    module.is_causal = causal  # type: ignore[misc]
    other = FakeAttention(2)
    other.is_causal = not causal  # type: ignore[misc]
    for own, options in ((module, {}), (other, {"is_causal": causal})):
        for cache in (None, filled_layer(kvpack.Exact(), KEY, VALUE)):
            assert (attend(own, cache, **options) - expected).abs().max() < 1e-5


def test_a_static_cache_under_kvpacks_attention() -> None:
    """Its prompt's queries are not the newest positions."""
    outputs = []
    for attention in ("sdpa", "kvpack"):
        model = tiny_model(attention=attention)
        cache = StaticCache(config=model.config, max_cache_len=64)
        outputs.append(torch.cat([model(IDS[:, :n], past_key_values=cache).logits for n in (24, 1, 4)], 1))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


# ---- masks and dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("past", [False, True])
def test_integer_masks_are_refused_as_sdpa_does(dtype: torch.dtype, past: bool) -> None:
    reference, model = (tiny_model(attention=attention) for attention in ("sdpa", "kvpack"))
    cache = kvpack.PackedCache(model)
    held = 0
    if past:
        held = 24
        model(IDS, past_key_values=cache)
    mask = torch.ones(2, 1, 24, held + 24, dtype=dtype)
    with pytest.raises(RuntimeError):
        reference(IDS, attention_mask=mask[..., -24:])
    with pytest.raises(kvpack.DtypeError, match="bool"):
        model(IDS, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("past", [False, True])
def test_masks_of_three_dimensions_are_refused(past: bool) -> None:
    cache = filled_layer(kvpack.Exact(), KEY, VALUE) if past else kvpack.PackedCache(tiny_config(layers=1))
    mask = torch.ones(1, 3, 53 if past else 3, dtype=torch.bool)
    with pytest.raises(kvpack.ShapeError, match="4 dimensions"):
        forward(cache, NEW_KEY, NEW_VALUE, QUERY, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_followed(dtype: torch.dtype) -> None:
    """Keys come in float32 there, values in the region's dtype: SDPA sees all in that one, and so does the cache."""
    outputs = []
    for attention, packed in (("sdpa", False), ("sdpa", True), ("kvpack", False), ("kvpack", True)):
        model = tiny_model(attention=attention)
        cache = kvpack.PackedCache(model) if packed else DynamicCache(config=model.config)
        with torch.autocast("cpu", dtype):
            outputs.append(logits(model, cache))
        if packed:
            assert cache.layers[0].keys.dtype == dtype
    assert torch.equal(outputs[1], outputs[0])
    for output in outputs[2:]:
        assert output.dtype == dtype
        assert (output - outputs[0]).abs().max() < 0.03 * outputs[0].std()


# ---- what is not packed, and devices -----------------------------------------------------------------------------

SSM = {"state_size": 8}
UNPACKED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8, "num_key_value_heads": 2},
    "starcoder2": {"sliding_window": 8, "num_key_value_heads": 2},
    "mamba": SSM,
}


@pytest.mark.parametrize("name", UNPACKED)
def test_where_nothing_is_packed_it_is_said(name: str) -> None:
    model = shaken(AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**BASE, **UNPACKED[name]})))
    with pytest.warns(UserWarning, match="nothing is packed.*2 (Dynamic|Linear)"):
        kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=4, group=16))
    with pytest.warns(UserWarning, match="nothing is packed"):
        kvpack.attach(model)


def test_where_something_is_packed_nothing_is_said() -> None:
    mixed = CONFIG_MAPPING["gemma3_text"](**{**BASE, "num_hidden_layers": 6}, sliding_window=8, head_dim=16)
    assert models.describe_unpacked(kvpack.PackedCache(mixed).layers) is None


@pytest.mark.parametrize("name", ["minimax", "openai-gpt", "reformer", "rwkv", "xlnet", "xlstm"])
def test_models_that_take_no_cache_are_refused(name: str) -> None:
    with pytest.raises(kvpack.OptionError, match=f"'{name}', which .*; expected a model that hands its keys"):
        kvpack.PackedCache(CONFIG_MAPPING[name]())


def test_devices() -> None:
    config = tiny_config()
    for device in ("cpu", "meta"):  # accelerate keeps offloaded weights on meta between two forwards
        models.check(SimpleNamespace(config=config, device=torch.device(device)))
    for device in ("cuda", "mps", "xpu"):
        with pytest.raises(kvpack.DeviceError, match=f"{device}.*cpu"):
            models.check(SimpleNamespace(config=config, device=torch.device(device)))


def test_weights_that_are_offloaded_to_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    reference = tiny_model(attention="sdpa")
    reference.save_pretrained(tmp_path / "model")
    expected = reference.generate(IDS, **GREEDY)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        attn_implementation="kvpack",
        device_map={"": "disk"},
        offload_folder=tmp_path / "offloaded",
    )
    assert model.device.type == "meta"
    cache = kvpack.PackedCache(model)
    assert torch.equal(model.generate(IDS, **GREEDY, past_key_values=cache), expected)
    assert cache.info()["fused"] > 0


def test_layers_with_head_dims_of_their_own() -> None:
    """Gemma 4: asking its configuration for one of them is an error of its own."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128,
        pad_token_id=0,
    )
    full, packed = tiny_model(config, attention="sdpa"), tiny_model(config)
    ids = torch.randint(3, 128, (1, 40))
    caches = DynamicCache(config=full.config), kvpack.PackedCache(packed)
    for part in (ids[:, :30], ids[:, 30:31], ids[:, 31:]):
        logits = [m(part, past_key_values=cache).logits for m, cache in zip((full, packed), caches, strict=True)]
        assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()
