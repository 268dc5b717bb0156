"""Whatever cannot work is refused by name, before anything has changed."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from refusals import TOKENS, filled, refused
from support import every_codec, forward, random_kv, tiny_config, tiny_model

# ---- length and rows ----------------------------------------------------------------------------------------------


def test_crop_into_what_was_packed_away() -> None:
    cache = filled(kvpack.KIVI())
    with refused(cache, kvpack.CropError, 200, "activate_past_recording"):
        cache.crop(-200)
    with refused(cache, kvpack.CropError, TOKENS + 1 - 10, "activate_past_recording"):
        cache.crop(10)


def test_crop_in_one_layer_only_never_happens() -> None:
    """Layers may hold different rows exactly; a crop that one of them refuses leaves all as they are."""
    cache = kvpack.PackedCache(tiny_config(layers=2), quantize=kvpack.KIVI())
    forward(cache, *random_kv(1, 2, 300, 32), layer=0)
    forward(cache, *random_kv(1, 2, 100, 32), layer=1)
    forward(cache, *random_kv(1, 2, 200, 32), layer=1)
    for layer in range(2):
        forward(cache, *random_kv(1, 2, 1, 32), layer=layer)
    with refused(cache, kvpack.CropError, 150):
        cache.crop(-150)


@every_codec
@pytest.mark.parametrize("recording", [False, True])
def test_crop_beyond_the_sequence(codec: Any, recording: bool) -> None:
    cache = filled(codec)
    if recording:
        cache.activate_past_recording()
    with refused(cache, kvpack.CropError, TOKENS + 2, TOKENS + 1):
        cache.crop(-TOKENS - 2)


@pytest.mark.parametrize("rows", [[0, 2], [-3, 0], [0, 2**40], []], ids=str)
def test_rows_that_are_not_there(rows: list[int]) -> None:
    cache = filled(kvpack.KIVI())
    index = torch.tensor(rows, dtype=torch.long)
    for change in (cache.reorder_cache, cache.batch_select_indices):
        with refused(cache, kvpack.ShapeError, 2):
            change(index)


@pytest.mark.parametrize("repeats", [0, -1])
def test_repeats_that_cannot_be(repeats: int) -> None:
    cache = filled()
    with refused(cache, kvpack.ShapeError, repeats, 1):
        cache.batch_repeat_interleave(repeats)


@pytest.mark.parametrize(("row", "head"), [(2, 0), (0, 2), (-3, 0), (0, 2**40)])
def test_heads_that_are_not_there_cannot_be_inspected(row: int, head: int) -> None:
    cache = filled(kvpack.KIVI())
    for look in (cache.layers[0].packed, cache.layers[0].positions):
        with pytest.raises((kvpack.ShapeError, IndexError, OverflowError)):
            look(row, head)
    assert cache.get_seq_length() == TOKENS + 1


# ---- another model ------------------------------------------------------------------------------------------------


OTHER_MODELS = {
    "more layers": {"layers": 3},
    "fewer layers": {"layers": 1},
    "more KV heads": {"kv_heads": 4},
    "fewer KV heads": {"kv_heads": 1},
    "larger heads": {"head_dim": 64},
    "wider": {"hidden_size": 128},
}
# What keys and values alone tell, so that it is found whatever attention function the other model has.
SEEN_IN_KEYS = {"more KV heads", "fewer KV heads", "larger heads"}


@pytest.mark.parametrize("difference", OTHER_MODELS)
@pytest.mark.parametrize("used", [False, True], ids=["empty", "used"])
def test_a_cache_used_with_another_model(difference: str, used: bool) -> None:
    model, other = tiny_model(), tiny_model(tiny_config(**OTHER_MODELS[difference]))
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7]])
    if used:
        model(ids, past_key_values=cache)
    expected = model(ids, past_key_values=cache.fork()).logits
    # Heads and sizes that do not fit what is held are as wrong in shape as they are of another model.
    errors = kvpack.ModelMismatchError, kvpack.ShapeError
    with refused(cache, errors if used else errors[0], *OTHER_MODELS[difference].values()):
        other(ids, past_key_values=cache)
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("difference", sorted(SEEN_IN_KEYS))
def test_a_cache_used_with_another_model_that_has_another_attention(difference: str) -> None:
    model, other = tiny_model(), tiny_model(tiny_config(**OTHER_MODELS[difference]), attention="sdpa")
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, past_key_values=cache)
    expected = model(ids, past_key_values=cache.fork()).logits
    with refused(cache, (kvpack.ModelMismatchError, kvpack.ShapeError)):
        other(ids, past_key_values=cache)
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)


def test_more_layers_are_only_noticed_at_the_first_too_many() -> None:
    """By then the layers that exist hold the forward's tokens, and nothing tells them from any other's: it says so."""
    model, other = tiny_model(), tiny_model(tiny_config(layers=3), attention="sdpa")
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, past_key_values=cache)
    with pytest.raises(kvpack.ModelMismatchError, match=r"given 2, expected less than 2.*reset\(\)"):
        other(ids, past_key_values=cache)


@pytest.mark.parametrize("attention", ["kvpack", "sdpa"])
def test_a_cache_used_with_the_same_model_in_another_dtype(attention: str) -> None:
    model, other = tiny_model(), tiny_model(attention=attention).bfloat16()
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, past_key_values=cache)
    with refused(cache, kvpack.DtypeError, "bfloat16", "float32"):
        other(ids, past_key_values=cache)


def test_a_layer_that_the_model_does_not_have() -> None:
    cache = filled()
    with refused(cache, kvpack.ModelMismatchError, 1):
        cache.update(*random_kv(2, 2, 1, 32), 1)


def test_a_forward_that_fails_in_a_later_layer_leaves_no_layer_ahead() -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(group=16, window=32))
    ids = torch.randint(3, 128, (1, 50))
    model(ids, past_key_values=cache)
    expected = model(ids[:, :3], past_key_values=cache.fork()).logits
    weight = model.model.layers[1].self_attn.k_proj.weight
    healthy = weight.clone()
    weight[0, 0] = torch.nan
    with pytest.raises(kvpack.NonFiniteError):
        model(ids[:, :3], past_key_values=cache)
    weight.copy_(healthy)
    assert [layer.get_seq_length() for layer in cache.layers] == [50, 50]
    assert torch.equal(model(ids[:, :3], past_key_values=cache).logits, expected)
