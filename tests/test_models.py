"""Models of all kinds of attention: kvpack's stands in where it can, and nothing is ever wrong without a word."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import kvpack
import pytest
import torch
from kvpack import models
from model_kinds import BASE, IDS, logits, shaken
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel

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


# ---- attention that kvpack's cannot stand in for ------------------------------------------------------------------


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


# ---- Gemma 4: fewer queries than the layers before ----------------------------------------------------------------


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
