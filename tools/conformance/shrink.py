"""How the default configuration of any model is made tiny: widths by name, layers by the kinds that there are."""

from __future__ import annotations

import math
import re
from typing import Any

from transformers import PreTrainedConfig

HIDDEN, HEADS, HEAD_DIM, VOCAB, WINDOW, EXPERTS, MOST_LAYERS = 64, 4, 16, 128, 16, 4, 10

# The first rule whose pattern is found in an attribute's whole name says what it becomes: a number, or None to keep it.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"vocab_size.*|.*_vocab|ngram_vocab_size_base|vocab_size_per_layer_input", VOCAB),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|forced_eos_token_id", 2),
    (r"hidden_size_per_layer_input|d_rel|time_step_rank|mamba_dt_rank|.*_rank_dim", 8),
    (r"kv_lora_rank|q_lora_rank|rel_extent", 32),
    (r"o_lora_rank", 16),
    (r".*rank", 8),
    (r"global_head_dim", 2 * HEAD_DIM),
    (r"(linear|mamba)_(num_value_|n_|num_)heads", 8),
    (r"linear_num_key_heads|index_n_heads|n_group|num_expert_group", 2),
    (r"topk_group|n_groups|mamba_n_groups|mamba_ngroups|.*num_shared_experts|n_shared_experts", 1),
    (r"(.*_)?(head_dim|headdim|head_size|d_head|dim_head)|d_kv|kv_channels|.*d_state|state_size", HEAD_DIM),
    (r"index_topk", 6),
    (r"index_block_size|index_kpool", 4),
    (r"index_topk_blocks", 2),
    (r"(.*_)?(num_attention_heads|attention_heads|num_heads|n_heads?|swa_num_attention_heads|n_heads)", HEADS),
    (r"(moe_)?(num|n)_(local_|routed_)?experts", EXPERTS),
    (r"sliding_window(_size)?|attention_window(_size)?|attention_chunk_size|local_attention", WINDOW),
    (r"(mamba_)?chunk_size|n_window", WINDOW),
    (r"max_(position_embeddings|seq_len|source_positions|target_positions)|n_positions|n_ctx|model_max_length", 512),
    (r".*(patch|merge|kernel|image|pooling|conv|stride|scale|block|crop|sampling|codebook|label|posemb).*", None),
    (r"num_channels|in_channels|audio_channels|feature_size|.*_mel_bins|.*patch_dim|chunk_size_.*|axial.*", None),
    (r"d_model|n_embd|n_inner|d_ff|dff|dim_ff|d_inner|mlp_dim|.*ffn_dim|hidden_dim|embed_dim|lru_width", HIDDEN),
    (r".*(hidden_size|intermediate_size|embedding_size|_dim|hidden_size_.*|_size_mlp|_in_dim|_out_dim)", HIDDEN),
    (r"expert_ffn_hidden_size|mamba_d_ssm|attention_hidden_size|embedding_dim|ffn_dim_.*", HIDDEN),
)
# What it becomes where the default says nothing.
UNSAID = {"head_dim": HEAD_DIM, "num_key_value_heads": 2, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2}
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "depth", "encoder_layers", "num_blocks")
OTHER_LAYERS = re.compile(r".*_layers|num_.*_layers|resampler_depth")
INDICES = re.compile(r".*(_layers|_idxs|_indexes|_indices|_layer_ids|layer_ids)")
FIRST = re.compile(r"first_k_dense_replace|num_dense_layers|loop_layer_index_(start|end)|moe_layer_(start|end)_index")
KV_HEADS = re.compile(r"(.*_)?(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|n_kv_heads)")
TOKEN = re.compile(
    r".*(token_id|token_index|token_ids|token_offset|vocab_offset|_start_id|_end_id|newline_id|patch_id)"
)
PER_TOKEN = re.compile(r"(moe_)?(num_experts_per_tok(en)?|top_?k|k)|moe_top_k")


def shrunk(config: PreTrainedConfig, tokens: dict[str, int] | None = None) -> dict[str, Any]:
    """A configuration, and those that are its parts, with all that makes a model large made small.

    Args:
        config: a default configuration.
        tokens: which special token got which id so far.

    Returns:
        What its class makes the small one of.
    """
    tokens = {} if tokens is None else tokens
    given: dict[str, Any] = config.to_dict()
    for dropped in ("transformers_version", "architectures", "id2label", "label2id", "dtype"):
        given.pop(dropped, None)
    chosen, n = _layers(given)
    small: dict[str, Any] = {}
    for name, value in given.items():
        part = config.__dict__.get(name)
        if isinstance(part, PreTrainedConfig):
            small[name] = shrunk(part, tokens)
        else:
            small[name] = _value(name, value, given, chosen, n, tokens)
    if isinstance(small.get("qk_head_dim"), int):
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    return small


def _value(name: str, value: Any, given: dict[str, Any], chosen: list[int], n: int, tokens: dict[str, int]) -> Any:
    """What attribute `name` of a configuration becomes, of whose `n` layers the chosen ones stay."""
    if name == "rope_parameters" or name == "rope_scaling":
        return _rope(value, given)
    if name == "partial_rotary_factor":
        return value and max(value, 0.5)
    if name == "per_layer_config" and value:
        return {str(chosen.index(int(i))): _like(own, given) for i, own in value.items() if int(i) in chosen}
    if name == "attn_logit_softcapping":
        return value and 1.0  # low enough to matter
    if isinstance(value, dict):
        return {key: _value(str(key), inner, value, chosen, n, tokens) for key, inner in value.items()}
    if value is None:
        return UNSAID.get(name)
    if name == "image_size" and isinstance(given.get("patch_size"), (int, list, tuple)):
        patch = given["patch_size"] if isinstance(given["patch_size"], int) else given["patch_size"][0]
        return min(value, 4 * patch) if isinstance(value, int) else [min(size, 4 * patch) for size in value]
    if isinstance(value, (list, tuple)):
        return _list(name, list(value), given, chosen, n, tokens)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if FIRST.fullmatch(name):
        return sum(i < value for i in chosen)
    if name == "num_kv_shared_layers":
        return sum(i >= n - value for i in chosen)
    if name in LAYERS or name == "max_window_layers":
        return len(chosen)
    if OTHER_LAYERS.fullmatch(name):
        return min(value, 2)
    if PER_TOKEN.fullmatch(name):
        return min(value, 2)
    if KV_HEADS.fullmatch(name):
        return _kv_heads(value, given)
    if TOKEN.fullmatch(name) and value >= VOCAB:
        return tokens.setdefault(re.sub("_(id|index)$", "", name), VOCAB - 1 - len(tokens))
    if name == "rotary_dim":
        return HEAD_DIM // 2
    return _by_name(name, value)


def _by_name(name: str, value: int) -> int:
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return value if small is None or value <= 0 else small
    return value


def _kv_heads(value: int, given: dict[str, Any]) -> int:
    """As many for a query head, roughly: one for all, one each, or two."""
    heads = [given[name] for name in given if re.fullmatch("(num_attention_heads|n_heads?|num_heads)", name)]
    return 1 if value == 1 else HEADS if value in heads or not heads else 2


def _like(own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Of one layer what differs from the others, in the same proportion."""
    out = {}
    for name, value in own.items():
        usual = given.get(name)
        small = _value(name, value if usual is None else usual, given, [], 0, {})
        ratio = value / usual if usual and isinstance(value, int) else 1
        out[name] = max(1, int(small * ratio)) if isinstance(small, int) and not isinstance(value, bool) else value
    return out


def _list(
    name: str, value: list[Any], given: dict[str, Any], chosen: list[int], n: int, tokens: dict[str, int]
) -> list[Any]:
    if name == "eos_token_id":
        return [2]
    if _indexes(name, value, n):
        return [new for new, old in enumerate(chosen) if old in value] or [0]
    if len(value) == n and n > 0:
        kept = [value[i] for i in chosen]
        if name == "num_attention_heads_per_layer":
            return [HEADS * v // min(value) for v in kept]
        return kept
    if TOKEN.fullmatch(name):
        return [_value(f"{name}{i}_token_id", v, given, chosen, n, tokens) for i, v in enumerate(value)]
    return value


def _indexes(name: str, value: Any, n: int) -> bool:
    """Whether a list names layers by their index."""
    if not isinstance(value, list) or not value or n == 0 or not INDICES.fullmatch(name):
        return False
    whole = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < n for i in value)
    return whole and len(set(value)) == len(value) and (len(value) < n or value == list(range(n)))


def _layers(given: dict[str, Any]) -> tuple[list[int], int]:
    """Which of a configuration's layers stay, so that each kind does; and how many there were."""
    n = next((given[name] for name in LAYERS if isinstance(given.get(name), int)), 0)
    if not n:
        return [], 0
    lists = [v for v in given.values() if isinstance(v, (list, tuple)) and len(v) == n]
    lists = [v for v in lists if not all(isinstance(i, (int, float)) for i in v) or len(set(v)) <= 4]
    indexed = [v for k, v in given.items() if _indexes(k, v, n)]
    first = [v for k, v in given.items() if FIRST.fullmatch(k) and isinstance(v, int)]
    first.append(n - (given.get("num_kv_shared_layers") or 0))
    own = {int(i): str(v) for i, v in (given.get("per_layer_config") or {}).items()}

    def kind(i: int) -> tuple[str, ...]:
        parts = (str([v[i] for v in lists]), str([i in v for v in indexed]), str([i < k for k in first]))
        return (*parts, own.get(i, ""))

    types = given.get("layer_types") or given.get("layers_block_type") or [""] * n
    chosen: list[int] = []
    for i in range(n):
        if kind(i) not in [kind(j) for j in chosen] and len(chosen) < MOST_LAYERS:
            chosen.append(i)
    last = {kind_: max(i for i in range(n) if types[i] == kind_) for kind_ in set(types)} if len(types) == n else {}
    chosen = sorted({*chosen, *(i for i in last.values())})
    for i in range(n):
        if len(chosen) < 2 and i not in chosen:
            chosen = sorted([*chosen, i])
    return chosen, n


def _rope(value: Any, given: dict[str, Any]) -> Any:
    """Rotary parameters for heads of `HEAD_DIM`: sections' sums and lists' lengths are half of what is rotated."""
    if not isinstance(value, dict):
        return value
    out = {key: _rope(inner, given) for key, inner in value.items()}
    partial = value.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1.0
    if out.get("partial_rotary_factor"):
        out["partial_rotary_factor"] = max(out["partial_rotary_factor"], 0.5)
    half = int(HEAD_DIM * (max(partial, 0.5) if partial < 1 else 1)) // 2
    if out.get("mrope_section"):
        sections = out["mrope_section"]
        small = [max(1, math.floor(half * s / sum(sections))) for s in sections]
        small[0] += half - sum(small)
        out["mrope_section"] = small
    for name in ("short_factor", "long_factor"):
        if isinstance(out.get(name), list):
            out[name] = out[name][:half]
    return out
