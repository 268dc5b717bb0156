"""GPTQ's options: what is found in a model, what is given, and what is refused."""

from __future__ import annotations

import copy

import kvpack
import pytest
import torch
from support import forward, random_kv, tiny_config
from test_gptq import ALWAYS
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "qwen2", "phi3"])
def test_the_output_projection_is_found(family: str) -> None:
    options = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
        "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    }.get(family, {})
    base = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
    if family in ("qwen2", "phi3"):
        heads["num_key_value_heads"] = 1
    config = CONFIG_MAPPING[family](**{**base, **heads, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="kvpack").eval()
    cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=4, group=16, compensation=ALWAYS))
    model.generate(input_ids=torch.randint(3, 128, (1, 300)), past_key_values=cache, max_new_tokens=2)
    layer = next(layer for layer in cache.layers if layer.get_seq_length())
    keys, values = layer.compensation_gains(0, 0)
    assert keys[0] > 1
    assert values[0] > 1


def given(layers: int, heads: int, dim: int) -> kvpack.KIVI:
    """A codec with metrics of that shape."""
    return kvpack.KIVI(compensation=kvpack.GPTQ(key_metrics=torch.eye(dim).expand(layers, heads, dim, dim)))


def test_metrics_of_another_number_of_heads_are_refused_and_change_nothing() -> None:
    cache = kvpack.PackedCache(tiny_config(layers=1, kv_heads=2), quantize=given(1, 3, 32))
    key, value = random_kv(1, 2, 200, 32)
    with pytest.raises(kvpack.OptionError, match=r"3 of 1024 numbers.* each of the layer's 2 heads"):
        forward(cache, key, value)
    assert cache.get_seq_length() == 0


def test_words_and_equality() -> None:
    metrics = torch.eye(4).expand(2, 1, 4, 4)
    assert repr(kvpack.GPTQ()) == "GPTQ()"
    assert repr(kvpack.GPTQ(damping=0.2, values=True)) == "GPTQ(damping=0.2, values=True)"
    assert repr(kvpack.GPTQ(key_metrics=metrics)) == "GPTQ(key_metrics=<2 layers>)"
    assert kvpack.GPTQ(key_metrics=metrics) == kvpack.GPTQ(key_metrics=list(2 * metrics))  # in any unit
    assert kvpack.GPTQ(key_metrics=metrics) != kvpack.GPTQ(key_metrics=metrics[:1])
    assert kvpack.GPTQ() != kvpack.GPTQ(key_metrics=metrics)
    assert hash(kvpack.GPTQ()) == hash(kvpack.GPTQ(damping=0.1)) != hash(kvpack.GPTQ(damping=0.2))
    assert copy.deepcopy(kvpack.KIVI(compensation=kvpack.GPTQ(key_metrics=metrics))) == kvpack.KIVI(
        compensation=kvpack.GPTQ(key_metrics=metrics)
    )


def test_bad_options_are_named() -> None:
    for make, message in [
        (lambda: kvpack.GPTQ(damping=0), "damping=0 is not accepted"),
        (lambda: kvpack.GPTQ(damping=1e-5), r"damping=1e-05 is not accepted; accepted: numbers from 0.0001"),
        (lambda: kvpack.GPTQ(threshold=-1), "threshold=-1"),
        (lambda: kvpack.GPTQ(keys=1), "keys=1 is not accepted; accepted: True, False"),
        (lambda: kvpack.GPTQ(key_metrics=3), r"key_metrics=3 are not accepted; accepted: a tensor \[layers"),
        (lambda: kvpack.GPTQ(key_metrics=torch.ones(2, 3, 3)), r"a layer with \(3, 3\) is not accepted"),
        (lambda: kvpack.GPTQ(key_metrics=[torch.full((1, 2, 2), torch.nan)]), "not finite"),
        (lambda: kvpack.GPTQ(key_metrics=[torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])]), "positive semi-definite"),
        (lambda: kvpack.GPTQ(key_metrics=[torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])]), "symmetric"),
        (lambda: kvpack.PackedCache(tiny_config(layers=2), quantize=given(1, 2, 32)), "of 1 layers are not accepted"),
        (lambda: kvpack.PackedCache(tiny_config(layers=2), quantize=given(2, 2, 16)), "one of 32 x 32 for each"),
        (lambda: kvpack.KIVI(compensation=3), r"compensation=3 is not accepted; accepted: None, kvpack.GPTQ"),
        (lambda: kvpack.PackedCache(tiny_config(), quantize=kvpack.Q4(compensation=ALWAYS)), "from a configuration"),
    ]:
        with pytest.raises(kvpack.OptionError, match=message):
            make()
    assert kvpack.KIVI(bits=2, compensation="gptq") == kvpack.KIVI(bits=2, compensation=kvpack.GPTQ())
