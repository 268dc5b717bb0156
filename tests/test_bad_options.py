"""Options, models and caches that cannot work are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvpack
import pytest
import torch
from refusals import refused
from support import random_kv, tiny_config, tiny_model
from transformers import DynamicCache

# ---- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 0}, ["bits", "0"]),
        ({"bits": 5}, ["bits", "5", "2, 3, 4", "8"]),
        ({"bits": 16}, ["bits", "16", "2, 3, 4", "8"]),
        ({"bits": "4"}, ["bits", "'4'"]),
        ({"bits": 4.0}, ["bits", "4.0"]),
        ({"bits": True}, ["bits", "True"]),
        ({"bits": None}, ["bits", "None"]),
        ({"group": 0}, ["group", "0"]),
        ({"group": -8}, ["group", "-8"]),
        ({"group": 12}, ["group", "12", "8"]),
        ({"group": 264, "window": 264}, ["group", "264", "256"]),
        ({"window": 0}, ["window", "0"]),
        ({"window": -128}, ["window", "-128"]),
        ({"window": 100}, ["window", "100", "32"]),
        ({"group": 64, "window": 96}, ["window", "96", "64"]),
        ({"sinks": -1}, ["sinks", "-1", "0"]),
        ({"sinks": 2.5}, ["sinks", "2.5"]),
        ({"window": 2**40}, ["window", str(2**40)]),
    ],
    ids=str,
)
def test_kivi_options_that_cannot_be(options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(kvpack.OptionError) as caught:
        kvpack.KIVI(**options)
    assert all(word in str(caught.value) for word in named)


@pytest.mark.parametrize("make", [kvpack.KIVI, kvpack.Exact], ids=lambda make: make.__name__)
def test_options_that_do_not_exist(make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="residual"):
        make(residual=64)


def test_codecs_cannot_be_changed_behind_the_caches_back() -> None:
    with pytest.raises(AttributeError):
        kvpack.KIVI().bits = 2  # type: ignore[misc]


@pytest.mark.parametrize("quantize", ["kivi", 4, kvpack.KIVI, {"bits": 4}], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda quantize: kvpack.PackedCache(tiny_config(), quantize=quantize),
        lambda quantize: kvpack.PackedCache.from_cache(DynamicCache(), tiny_config(), quantize=quantize),
        lambda quantize: kvpack.attach(tiny_model(attention="sdpa"), quantize=quantize),
    ],
    ids=["PackedCache", "from_cache", "attach"],
)
def test_a_codec_that_is_none(make: Callable[[Any], Any], quantize: Any) -> None:
    with pytest.raises(kvpack.OptionError) as caught:
        make(quantize)
    assert repr(quantize) in str(caught.value)
    assert "KIVI" in str(caught.value)
    if quantize != "kivi":  # a method's name is answered with that method
        assert "Exact" in str(caught.value)


def test_options_of_the_cache_that_do_not_exist() -> None:
    with pytest.raises(TypeError, match="share"):
        kvpack.PackedCache(tiny_config(), share=3)
    with pytest.raises(kvpack.OptionError, match="evict=3 is not accepted"):
        kvpack.PackedCache(tiny_config(), evict=3)


def test_a_group_larger_than_the_head_is_refused_when_the_cache_is_made() -> None:
    with pytest.raises(kvpack.OptionError, match=r"group=64.*32"):
        kvpack.PackedCache(tiny_config(head_dim=32), quantize=kvpack.KIVI(group=64))


def test_a_group_larger_than_the_head_is_refused_when_keys_tell() -> None:
    from test_architectures import MLA, config_of

    model = tiny_model(config_of("deepseek_v3", MLA))
    cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(group=16, window=32))  # its values have 8 numbers
    with refused(cache, kvpack.OptionError, "16", "8"):
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache)


@pytest.mark.parametrize("model", [None, "SmolLM2", {"num_hidden_layers": 2}, 7], ids=str)
def test_something_that_is_no_model(model: Any) -> None:
    with pytest.raises(kvpack.OptionError, match=rf"{type(model).__name__}.*(model|config)"):
        kvpack.PackedCache(model)
    with pytest.raises(kvpack.OptionError, match=rf"{type(model).__name__}.*model"):
        kvpack.attach(model)


def test_a_model_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(attention="sdpa")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    for use in (kvpack.PackedCache, kvpack.attach):
        with pytest.raises(kvpack.DeviceError, match=r"cuda.*cpu"):
            use(model)
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


# ---- from_cache ---------------------------------------------------------------------------------------------------


def dynamic_cache(layers: int = 2, tokens: int = 50) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(*random_kv(2, 2, tokens, 32), layer)
    return cache


@pytest.mark.parametrize("layers", [1, 3])
def test_from_the_cache_of_another_model(layers: int) -> None:
    with pytest.raises(kvpack.ModelMismatchError, match=rf"{layers}.*2"):
        kvpack.PackedCache.from_cache(dynamic_cache(layers), tiny_config(layers=2))


@pytest.mark.parametrize("shape", [(2, 49), (2, 51), (1, 50), (50,), (2, 1, 50, 50)], ids=str)
def test_from_a_cache_with_a_mask_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(kvpack.ShapeError, match="50"):
        kvpack.PackedCache.from_cache(dynamic_cache(), tiny_config(), attention_mask=torch.ones(shape))


def test_from_something_that_is_no_cache() -> None:
    with pytest.raises(kvpack.OptionError, match=r"list.*DynamicCache"):
        kvpack.PackedCache.from_cache([random_kv(2, 2, 50, 32)], tiny_config())


def test_from_a_cache_with_nan() -> None:
    cache = dynamic_cache()
    cache.layers[1].values[0, 0, 7, 3] = torch.nan
    with pytest.raises(kvpack.NonFiniteError, match="values"):
        kvpack.PackedCache.from_cache(cache, tiny_config())
