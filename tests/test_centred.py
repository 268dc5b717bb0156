"""Keys that are held less their mean."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import kvpack
import pytest
import torch
from kvpack.methods.file import identity, write
from support import (
    assert_same_contents,
    causal_mask,
    forward,
    left_padding,
    random_kv,
    relative_error,
    tiny_config,
    tiny_model,
)


def test_centred_keys_are_packed_less_the_mean_of_the_first_prompt() -> None:
    codec = kvpack.Rotated(bits=4, window=16, center=True)
    config = tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64)
    centred, plain = (kvpack.PackedCache(config, quantize=c) for c in (codec, dataclasses.replace(codec, center=False)))
    valid = left_padding([200, 150])
    key, value = random_kv(2, 2, 200, 64)
    query = torch.randn(2, 4, 200, 64)
    weights = valid[:, None, :, None].float()
    mean = (key * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True)
    mask = causal_mask(valid, 200)
    forward(centred, key, value, query, mask)
    forward(plain, key - mean, value, query, mask)
    for _ in range(40):
        valid = torch.cat([valid, torch.ones(2, 1, dtype=valid.dtype)], 1)
        (key, value), query = random_kv(2, 2, 1, 64), torch.randn(2, 4, 1, 64)
        mask = causal_mask(valid, 1)
        out = forward(centred, key, value, query, mask)
        assert relative_error(out, forward(plain, key - mean, value, query, mask)) < 1e-5
    for row in range(2):
        for head in range(2):
            ours, theirs = (cache.layers[0].packed(row, head) for cache in (centred, plain))
            assert (ours["key_codes"] != theirs["key_codes"]).float().mean() < 1e-3  # the mean's last bit
    real = valid[:, None, :, None].bool().expand_as(centred.layers[0].keys)
    assert torch.allclose(centred.layers[0].keys[real], (plain.layers[0].keys + mean)[real], atol=1e-2)
    assert (centred.layers[0].keys[~real] == 0).all()
    assert centred.memory().total > plain.memory().total
    forked = centred.fork()
    forked.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(forked.layers[0].keys[0], centred.layers[0].keys[1])


@pytest.mark.parametrize("options", [{"softcap": 20.0}, {"s_aux": torch.zeros(4)}], ids=["softcap", "sinks"])
def test_keys_are_not_centred_where_attention_would_change(options: dict[str, Any]) -> None:
    config = tiny_config(layers=1, heads=4, kv_heads=2, head_dim=64)
    cache = kvpack.PackedCache(config, quantize=kvpack.Rotated(center=True))
    key, value = random_kv(1, 2, 30, 64)
    layer, sinks = cache.layers[0], torch.zeros(4) if "s_aux" in options else None
    layer.update(key, value)
    with pytest.raises(kvpack.OptionError, match="center=True, for a model with learned sinks"):
        layer.commit(layer.version, torch.randn(1, 4, 30, 64), None, 0.1, options.get("softcap"), sinks)
    assert cache.get_seq_length() == 0
    forward(cache, key, value, torch.randn(1, 4, 30, 64))
    with pytest.raises(kvpack.OptionError, match="center=True"):
        forward(cache, *random_kv(1, 2, 1, 64), torch.randn(1, 4, 1, 64), **options)


def test_evictions_that_look_at_keys_do_not_see_centred_ones() -> None:
    codec = kvpack.KeyValue(kvpack.Rotated(center=True), kvpack.Q4())
    for evict in (kvpack.KeyDiff(), kvpack.L2Norm(), kvpack.AdaKV(kvpack.KeyDiff())):
        with pytest.raises(kvpack.OptionError, match="held less their mean"):
            kvpack.PackedCache(tiny_config(), evict=evict, quantize=codec)
    kvpack.PackedCache(tiny_config(), evict=kvpack.SnapKV(), quantize=codec)
    layers = kvpack.PerLayer(kvpack.Q8(), {0: kvpack.Rotated(center=True)})
    assert [layers.centers(kvpack.methods.Site(i, 2, None)) for i in range(2)] == [True, False]
    with pytest.raises(kvpack.OptionError, match="center=1 is not accepted"):
        kvpack.Rotated(center=1)


def test_calibrated_layers_are_centred_as_their_codecs_say(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(head_dim=64))
    layers = {"0": "q8", "1": "rotated:bits=4:window=16:center=True"}
    header = {"method": "kivi/rotated", "layers": layers, "model": identity(model)}
    write(tmp_path / "bits.safetensors", header, {"losses": torch.zeros(1)})
    codec = kvpack.load_calibration(tmp_path / "bits.safetensors")
    assert [codec.centers(kvpack.methods.Site(i, 2, model.config, model)) for i in range(2)] == [False, True]
    by_hand = kvpack.PerLayer(kvpack.Q8(), {1: kvpack.Rotated(bits=4, window=16, center=True)})
    caches = [kvpack.PackedCache(model, quantize=quantize) for quantize in (codec, by_hand)]
    for cache in caches:
        model(torch.arange(3, 90)[None], past_key_values=cache)
    assert_same_contents(*caches)
    with pytest.raises(kvpack.OptionError, match="held less their mean"):
        kvpack.PackedCache(model, quantize=codec, evict=kvpack.KeyDiff())
