"""What is not packed is said; models on other devices and on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpack
import pytest
import torch
from kvpack import models
from model_kinds import BASE, GREEDY, IDS, shaken
from support import tiny_config, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

SSM = {"state_size": 8}
UNPACKED: dict[str, dict[str, Any]] = {
    "mamba": SSM,
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1},
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kvpack.PackedCache(mixed)


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
