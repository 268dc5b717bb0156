"""Tiny random models of many architectures: PackedCache gives DynamicCache's logits."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
import transformers
from support import tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,  # peaked attention: a missing or misplaced token shows
}
MLA = {
    "head_dim": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 4,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
SHARED = {
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_hidden_layers": 6,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    "global_head_dim": 16,
}
# What differs from BASE, by architecture and by how its full-attention layers read the cache.
FUSED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "phi": {},
    "olmo2": {},
    "granite": {},
    "cohere2": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "llama4_text": {"attention_chunk_size": 8, "intermediate_size_mlp": 96, "num_local_experts": 2},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 1.0},  # low enough to matter
    "gemma3_text": {"sliding_window": 8, "num_hidden_layers": 6},
    "gemma4_text": SHARED,
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3_next": LINEAR,
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "smollm3": {},
    "starcoder2": {},
    "stablelm": {},
    "persimmon": {},
}
MATERIALISED: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {"n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 256},
}
# Releases differ: the newest caches the compressed latents, which are expanded before attention.
# Newer releases of transformers moved GPT-J to the attention interface.
EITHER: dict[str, dict[str, Any]] = {
    "deepseek_v3": MLA,
    "gptj": {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8, "n_positions": 256},
}
PATHS = {"fused": FUSED, "materialised": MATERIALISED, "either": EITHER}
# Their configurations do not validate there, or they need a cache of their own.
BROKEN_IN_5_4 = {"olmo2", "cohere2", "qwen3_next", "lfm2", "falcon_h1"}
ARCHITECTURES = [
    pytest.param(name, changes, path, id=name)
    for path, architectures in PATHS.items()
    for name, changes in architectures.items()
    if name in CONFIG_MAPPING and not (name in BROKEN_IN_5_4 and transformers.__version__.startswith("5.4."))
]
PACKED = [pytest.param(*row.values[:2], id=row.id) for row in ARCHITECTURES]
WITHOUT_POSITIONS = {"bloom", "mpt"}
SHORT_SIGHTED = {"mistral"}  # all its windows together do not reach back to the prompt
# Its logits are not scaled: eager attention and SDPA differ by as much.
TOLERANCE = {"gemma4_text": 3e-5}


def config_of(name: str, changes: dict[str, Any]) -> Any:
    options = {**BASE, **changes}
    return CONFIG_MAPPING[name](**{key: value for key, value in options.items() if value is not None})


def steps() -> list[torch.Tensor]:
    """A prompt of 20 tokens, 40 steps of one, a chunk of 4, and 3 more steps, for two rows."""
    return [torch.randint(3, 128, (2, tokens)) for tokens in (20, *[1] * 40, 4, 1, 1, 1)]


def run(model: Any, cache: Any, inputs: list[torch.Tensor], with_positions: bool) -> torch.Tensor:
    mask = torch.ones(2, 0, dtype=torch.long)
    outputs = []
    for ids in inputs:
        new = torch.ones_like(ids)
        if not outputs:
            new[0, :5] = 0  # the first row is left-padded
        mask = torch.cat([mask, new], dim=-1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        options = {"position_ids": positions} if with_positions else {}
        logits = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options).logits
        outputs.append(logits if outputs else logits[:, -1:])
    return torch.cat(outputs, dim=1)


def test_at_least_twenty_architectures_are_tested() -> None:
    assert len(ARCHITECTURES) >= 20


@pytest.mark.parametrize(("name", "changes", "path"), ARCHITECTURES)
def test_logits_equal_the_full_caches(name: str, changes: dict[str, Any], path: str, record_property: Any) -> None:
    config = config_of(name, changes)
    # sdpa knows no softcap, and older releases choose it for gemma2 all the same.
    reference = tiny_model(config, attention="eager" if name == "gemma2" else default_attention(config))
    packed = tiny_model(config, attention="kvpack")
    inputs = steps()
    cache = kvpack.PackedCache(packed)
    with_positions = name not in WITHOUT_POSITIONS
    expected = run(reference, DynamicCache(config=reference.config), inputs, with_positions)
    actual = run(packed, cache, inputs, with_positions)
    difference = (actual - expected).abs().max().item()
    record_property("max logit difference", difference)
    assert difference < TOLERANCE.get(name, 1e-5)
    assert cache.get_seq_length() == 67
    assert_path_taken(cache.info(), path)


def default_attention(config: Any) -> str:
    """What transformers chooses for this architecture by itself."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).config._attn_implementation


def assert_path_taken(info: dict[str, Any], path: str) -> None:
    taken = {name for name in ("fused", "materialised") if info[name]}
    assert taken == {path} or (path == "either" and len(taken) == 1)


@pytest.mark.parametrize(("name", "changes"), [row for row in PACKED if row.id not in SHORT_SIGHTED])
def test_the_logits_depend_on_every_token_of_the_past(name: str, changes: dict[str, Any]) -> None:
    """So the test above would see one token lost: its tolerance is far below what one token does."""
    model = tiny_model(config_of(name, changes), attention="kvpack")
    inputs = steps()
    changed = [inputs[0].clone(), *inputs[1:]]
    changed[0][:, 6] = changed[0][:, 6] % 125 + 3
    logits = [
        run(model, kvpack.PackedCache(model), ids, name not in WITHOUT_POSITIONS)[:, -1] for ids in (inputs, changed)
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


EIGHT_BITS = [
    kvpack.KIVI(bits=8, group=8, window=8),
    kvpack.Q8(),
    kvpack.Rotated(bits=8, window=8),
    kvpack.Graded(key_bits=8, value_bits=8, group=8, window=8),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), PACKED)
def test_eight_bits_hardly_change_the_logits(name: str, changes: dict[str, Any]) -> None:
    """Whatever the heads' sizes and the layers' kinds; and something was packed."""
    # Of the shortest windows nothing is packed.
    longer = {key: 32 for key in ("sliding_window", "attention_chunk_size") if key in changes}
    config = config_of(name, {**changes, **longer})
    reference = tiny_model(config, attention="eager" if name == "gemma2" else default_attention(config))
    packed = tiny_model(config, attention="kvpack")
    inputs, with_positions = steps(), name not in WITHOUT_POSITIONS
    expected = run(reference, DynamicCache(config=reference.config), inputs, with_positions)
    for codec in EIGHT_BITS:
        cache = kvpack.PackedCache(packed, quantize=codec)
        actual = run(packed, cache, inputs, with_positions)
        assert cache.lossy_share() > 0.3, codec
        # Of each token: where experts are chosen, another one at one token moves its logits by as much as they are.
        error = (actual - expected).square().mean(-1).sqrt().median()
        assert 0 < error < 0.04 * expected.std(), codec
