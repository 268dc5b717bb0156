"""Methods together: what one needs and another breaks is refused, with both of their names and reasons."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
import transformers
from evictions import keydiff
from kvpack.methods import EVICT, FAMILIES, Methods, Property, Site
from kvpack.methods.combination import Party, check_together
from support import CODECS, Tabled, codec_id, tiny_config, tiny_model

PRE_ROPE = (
    Tabled(bits=3),
    kvpack.KeyValue(Tabled(bits=3), kvpack.Q8()),
    kvpack.PerLayer(kvpack.Q8(), {0: Tabled(bits=3)}),
)
CENTRED = (
    kvpack.Rotated(center=True),
    kvpack.KeyValue(kvpack.Rotated(center=True), kvpack.Q4()),
    kvpack.PerLayer(kvpack.Q8(), {-1: kvpack.Rotated(center=True)}),
)
OTHERS = (
    kvpack.Exact(),
    kvpack.KIVI(),
    kvpack.Graded(),
    kvpack.KeyValue(kvpack.Q8(), Tabled(bits=3)),
    kvpack.presets["tiny"],
)
LOOKS_AT_KEYS = (
    kvpack.KeyDiff(),
    kvpack.L2Norm(),
    kvpack.ExpectedAttention(),
    kvpack.StreamingLLM(rerotate=True),
    kvpack.AdaKV(kvpack.KeyDiff()),
    kvpack.Scored(keydiff),
)
EVICTIONS = (
    *LOOKS_AT_KEYS,
    *(method() for name, method in EVICT.items() if name not in ("keydiff", "l2norm", "expected", "adakv", "scored")),
    kvpack.AdaKV(kvpack.SnapKV()),
)


def refused(*words: str, **methods: Any) -> None:
    with pytest.raises(kvpack.OptionError) as caught:
        Methods(**methods)
    for word in (*words, "is not accepted with", "accepted: evict=None", "or another evict=", "or another quantize="):
        assert word in str(caught.value)
    for family, method in methods.items():
        assert f"{family}={method!r}" in str(caught.value)


@pytest.mark.parametrize("evict", EVICTIONS, ids=str)
def test_codecs_that_do_not_go_with_an_eviction(evict: Any) -> None:
    for quantize in PRE_ROPE:
        reasons = "keys before RoPE are held in runs", "lets tokens go from in between"
        names = f"{type(quantize).__name__} needs consecutive positions", f"which {type(evict).__name__} breaks"
        refused(*names, *reasons, quantize=quantize, evict=evict)
    for quantize in CENTRED:
        if evict not in LOOKS_AT_KEYS:
            Methods(quantize=quantize, evict=evict)
            continue
        reasons = "it looks at keys", "with center=True keys are held less their mean"
        names = f"{type(evict).__name__} needs keys as they are", f"which {type(quantize).__name__} breaks"
        refused(*names, *reasons, quantize=quantize, evict=evict)
    for quantize in OTHERS:
        Methods(quantize=quantize, evict=evict)


@pytest.mark.parametrize("evict", EVICTIONS, ids=str)
def test_evictions_that_do_not_go_with_a_model(evict: Any) -> None:
    with pytest.raises(
        kvpack.OptionError, match=r"with a model of type 'bloom': the model needs all tokens .*ALiBi"
    ) as caught:
        kvpack.PackedCache(transformers.BloomConfig(n_layer=2), evict=evict)
    for word in (
        f"evict={evict!r}",
        f"which {type(evict).__name__} breaks (it lets tokens go)",
        "accepted: evict=None",
    ):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [(transformers.Gemma2Config(), "caps its logits"), (transformers.GptOssConfig(), "learned sink logits")],
    ids=["gemma2", "gpt_oss"],
)
@pytest.mark.parametrize("quantize", CENTRED, ids=lambda codec: type(codec).__name__)
def test_centred_keys_need_plain_logits(config: Any, reason: str, quantize: Any) -> None:
    with pytest.raises(kvpack.OptionError) as caught:
        kvpack.PackedCache(config, quantize=quantize)
    for word in (
        f"quantize={quantize!r} is not accepted with a model of type {config.model_type!r}",
        f"{type(quantize).__name__} needs plain logits (no cap, no sink logits) (with center=True",
        f"which the model breaks (it {reason.replace('learned', 'has learned')})",
        "accepted: another quantize= that does not need it",
    ):
        assert word in str(caught.value)
    kvpack.PackedCache(config, quantize=kvpack.KIVI())
    kvpack.PackedCache(transformers.Gemma2Config(attn_logit_softcapping=None), quantize=quantize)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"evict": kvpack.KeyDiff()}, ["LazyLLM needs all tokens", "which KeyDiff breaks", "evict=None"]),
        ({"evict": kvpack.H2O()}, ["LazyLLM needs all tokens", "which H2O breaks"]),
        ({"quantize": Tabled()}, ["Tabled needs consecutive positions", "which LazyLLM breaks", "another quantize="]),
    ],
    ids=["keydiff", "h2o", "kvquant"],
)
def test_what_does_not_go_with_lazyllm(methods: dict[str, Any], words: list[str]) -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model, **methods)
    with kvpack.LazyLLM(model), pytest.raises(kvpack.OptionError) as caught:
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    for word in (*words, repr(next(iter(methods.values()))), "is not accepted with LazyLLM"):
        assert word in str(caught.value)


def test_who_comes_first_does_not_matter() -> None:
    needing = Party("A", "a=A()", {Property.EQUAL_LAYERS: "it reads across"}, {}, "share")
    breaking = Party("B", "b=B()", {}, {Property.EQUAL_LAYERS: "it cuts"}, "evict")
    message = r"A needs as many tokens in each layer \(it reads across\), which B breaks \(it cuts\)"
    for pair in ([needing, breaking], [breaking, needing]):
        with pytest.raises(kvpack.OptionError, match=message):
            check_together(pair)
    for pair in ([needing, needing], [breaking, breaking]):
        check_together(pair)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_method_of_a_family(family: str) -> None:
    other = kvpack.KIVI() if family != "quantize" else kvpack.SnapKV()
    for given in (3, "nothing", other, type(other)):
        with pytest.raises(kvpack.OptionError) as caught:
            Methods(**{family: given})
        assert str(caught.value).startswith(f"{family}={given!r} is not accepted; accepted: ")
        assert "None" in str(caught.value)
        for method in FAMILIES[family].values():
            assert f"kvpack.{method.__name__}(...)" in str(caught.value)


@pytest.mark.parametrize(
    "evict", [method for method in EVICTIONS if method != kvpack.StreamingLLM(rerotate=True)], ids=str
)
def test_evictions_that_need_queries_say_so(evict: Any) -> None:
    cache = kvpack.PackedCache(tiny_model(), evict=evict)
    assert (Property.QUERIES_SEEN in evict.needs) == cache.layers[0].chooses_by_queries


@pytest.mark.parametrize("quantize", [*CODECS, *CENTRED], ids=codec_id)
def test_what_is_centred_says_so(quantize: Any) -> None:
    centred = any(quantize.centers(Site(i, 2, tiny_config())) for i in range(2))
    assert (Property.PLAIN_LOGITS in quantize.needs) == centred
    assert centred <= (Property.RAW_KEYS in quantize.breaks)


def test_a_cache_shows_its_methods() -> None:
    given = {"evict": kvpack.SnapKV(), "select": kvpack.Quest(), "quantize": kvpack.KIVI()}
    cache = kvpack.PackedCache(tiny_config(), **given)
    assert cache.methods == Methods(**given)
    assert {family: getattr(cache, family) for family in given} == given
    assert all(layer.methods is cache.methods for layer in cache.layers)
    assert repr(cache).startswith("PackedCache(SnapKV(")
    assert Methods() == Methods(kvpack.Exact()) == kvpack.PackedCache(tiny_config()).methods
    with pytest.raises(AttributeError):
        cache.evict = None
