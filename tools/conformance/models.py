"""Which models there are, and how each is made: tiny, random, and with weights that show a misplaced token."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from .shrink import shrunk

# The mapping of each kind of head, which says the class by model type.
KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
# Of these kinds no others: they need sounds of their own.
ALONE = {"speech": ("whisper",)}

ROPE = "rope_parameters.mrope_section"
# What the general rules do not find, by model type of the configuration or of one of its parts.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config.codebook_size": 16,
        "audio_config.codebook_size": 8,
        "image_token_offset": 97,
        "audio_token_offset": 113,
    },
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 120, **{f"IMGIMG{c}Z": 100 + i for i, c in enumerate("ABCDEFGH")}}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        }
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"audio_config.adapter_input_size": 64},
    "dots3_note_text": {
        "head_dim": 40,
        "rope_parameters.indexed_attention.partial_rotary_factor": 0.4,
        "rope_parameters.sliding_attention.partial_rotary_factor": 0.4,
    },
    "emu3": {"vocabulary_map": {"<image>": 120, **{f"<|visual token {i:06}|>": 100 + i for i in range(8)}}},
    "ernie4_5_vl_moe_text": {ROPE: [3, 3, 2]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm4v_moe_text": {ROPE: [1, 1, 2]},
    "glm4v_text": {ROPE: [2, 3, 3]},
    "glm5_next_text": {"index_topk": 8},
    "glm_ocr_text": {ROPE: [2, 3, 3]},
    "granite4_vision": {"downsample_rate": "4/8", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_vl_text": {ROPE: [2, 2, 2, 2]},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mistral4": {"head_dim": 32},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "paddleocr_vl_text": {ROPE: [2, 3, 3]},
    "qwen2_5_omni_text": {ROPE: [2, 3, 3]},
    "qwen2_5_vl_text": {ROPE: [2, 3, 3]},
    "qwen2_vl_text": {ROPE: [2, 3, 3]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [32, 32]},
    "step3p5": {"sliding_window": 16},
    "wavtokenizer_encoder": {"codebook_dim": 64},
    "whisper": {"max_source_positions": 30, "num_mel_bins": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
}


def all_models(kinds: tuple[str, ...] = tuple(KINDS)) -> list[tuple[str, str]]:
    """Model types and kinds that this transformers has; a class that stands in two mappings is named once."""
    seen = set()
    found = []
    for kind in kinds:
        for model_type in ALONE.get(kind, getattr(modeling_auto, KINDS[kind])):
            if (model_type, class_name(model_type, kind)) not in seen and model_type in CONFIG_MAPPING:
                seen.add((model_type, class_name(model_type, kind)))
                found.append((model_type, kind))
    return found


def class_name(model_type: str, kind: str) -> str:
    """The class that transformers uses for a model type."""
    name = getattr(modeling_auto, KINDS[kind])[model_type]
    return name if isinstance(name, str) else name[0]


def build(model_type: str, kind: str, attention: str | None = None) -> Any:
    """A tiny model with random weights, the same at each call.

    Args:
        model_type: as transformers names it.
        kind: of its head.
        attention: the implementation by name; without it the one that the model chooses.
    """
    model_class = getattr(transformers, class_name(model_type, kind))
    config = config_of(model_type, kind)
    text = config.get_text_config(decoder=True)
    if not isinstance(config, model_class.config_class) and isinstance(text, model_class.config_class):
        config = text
    torch.manual_seed(0)
    model = model_class._from_config(config, **({} if attention is None else {"attn_implementation": attention}))
    if attention is None and getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # earlier releases choose SDPA, which knows no such cap
    for said in filter(None, (getattr(model, "generation_config", None), model.config, text)):
        said.use_cache = True
    if getattr(getattr(model, "generation_config", None), "decoder_start_token_id", 0) is None:
        model.generation_config.decoder_start_token_id = 1
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    return model.eval().float()


def config_of(model_type: str, kind: str) -> Any:
    """The tiny configuration of a model."""
    config_class = CONFIG_MAPPING[model_type]
    small = shrunk(config_class())
    if kind == "causal" and "is_decoder" in small:
        small["is_decoder"] = True
    _override(small)
    return config_class.from_dict(small)


def _override(small: dict[str, Any]) -> None:
    for path, value in OVERRIDES.get(str(small.get("model_type")), {}).items():
        at = small
        *parts, last = path.split(".")
        for part in parts:
            at = at[part]
        at[last] = value
    for part in small.values():
        if isinstance(part, dict):
            _override(part)
