"""Layers that have attention beside linear attention: the first packed, the states of the second transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import kvpack
import pytest
import torch
from model_kinds import BASE, GREEDY, shaken
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

FALCON = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
}
IDS = torch.randint(4, 120, (2, 60), generator=torch.Generator().manual_seed(0))


def falcon(attention: str | None = None) -> Any:
    given = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(0)
    return shaken(AutoModelForCausalLM.from_config(CONFIG_MAPPING["falcon_h1"](**{**BASE, **FALCON}), **given))


@pytest.mark.parametrize("attention", ["kvpack", None])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(attention: str | None, beams: int) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    reference, model = falcon(), falcon(attention)
    expected = reference.generate(IDS, attention_mask=mask, num_beams=beams, **GREEDY)
    cache = kvpack.PackedCache(model)
    assert torch.equal(
        model.generate(IDS, attention_mask=mask, num_beams=beams, past_key_values=cache, **GREEDY), expected
    )
    assert "2 PackedHybridLayer" in repr(cache)
    assert cache.memory().parts["other layers"] > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_states_and_tokens_of_a_forward_that_fails_are_undone_together(error: type[BaseException]) -> None:
    model = falcon("kvpack")
    cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=8, group=8, window=8))
    model(IDS[:, :40], past_key_values=cache)
    memory = cache.memory()
    expected = model(IDS[:, 40:44], past_key_values=cache.fork()).logits

    def fail(*_: Any) -> None:
        raise error

    for part in (model.model.layers[0].self_attn.o_proj, model.model.layers[1].self_attn.v_proj):
        hook = part.register_forward_hook(fail)
        with pytest.raises(error):
            model(IDS[:, 40:44], past_key_values=cache)
        hook.remove()
        cache.get_seq_length()
        assert torch.equal(model(IDS[:, 40:44], past_key_values=cache.fork()).logits, expected)
    assert cache.get_seq_length() == 40
    assert cache.memory().parts["codes"] == memory.parts["codes"]


def test_copies_go_on_apart() -> None:
    model = falcon("kvpack")
    cache = kvpack.PackedCache(model)
    model(IDS[:, :40], past_key_values=cache)
    copies = [cache.fork(), copy.deepcopy(cache)]
    logits = [model(IDS[:, 40:41], past_key_values=one).logits for one in (cache, *copies)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_from_transformers_own_cache() -> None:
    model = falcon("kvpack")
    full = DynamicCache(config=model.config)
    model(IDS[:, :40], past_key_values=full)
    packed = kvpack.PackedCache.from_cache(full, model)
    for t in (40, 41):
        logits = [model(IDS[:, t : t + 1], past_key_values=cache).logits for cache in (full, packed)]
        assert (logits[0] - logits[1]).abs().max() < 1e-5
