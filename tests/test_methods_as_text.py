"""Methods written as text: what is accepted, and what the errors say."""

from __future__ import annotations

import kvpack
import pytest
from kvpack.evaluation.contenders import parse_all
from kvpack.methods import QUANTIZE, Calibrated
from kvpack.methods.spec import FAMILIES, accepted_quantize, names, parse_spec, spell


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("exact", kvpack.Exact()),
        ("kivi", kvpack.KIVI()),
        ("kivi:bits=2", kvpack.KIVI(bits=2)),
        (" kivi : bits = 8 : group = 16 ", kvpack.KIVI(bits=8, group=16)),
        ("q8", kvpack.Q8()),
        ("lossless", kvpack.Exact()),
        ("near-lossless", kvpack.presets["near-lossless"]),
        ("tiny", kvpack.presets["tiny"]),
        ("q4:window=64", kvpack.Q4(window=64)),
        ("rotated:bits=3:group=32", kvpack.Rotated(bits=3, group=32)),
        ("graded:key_bits=2.5:value_bits=2", kvpack.Graded(key_bits=2.5, value_bits=2)),
        ("kivi:bits=2:compensation=gptq", kvpack.KIVI(bits=2, compensation=kvpack.GPTQ())),
        ("exact/graded", kvpack.KeyValue(kvpack.Exact(), kvpack.Graded())),  # values as Graded stores them
        ("kivi:bits=4 / rotated:bits=2", kvpack.KeyValue(kvpack.KIVI(bits=4), kvpack.Rotated(bits=2))),
    ],
)
def test_a_name_and_its_parameters(text: str, method: object) -> None:
    assert parse_spec(text).options == {"quantize": method}


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("small@0=exact", kvpack.PerLayer(kvpack.presets["small"], {0: kvpack.Exact()})),
        (
            "tiny@0=small@-1=near-lossless",
            kvpack.PerLayer(kvpack.presets["tiny"], {0: kvpack.presets["small"], -1: kvpack.presets["near-lossless"]}),
        ),
        ("exact@1=tiny", kvpack.PerLayer(kvpack.Exact(), {1: kvpack.presets["tiny"]})),
        (
            "kivi:bits=4/q8@0=exact",
            kvpack.PerLayer(kvpack.KeyValue(kvpack.KIVI(bits=4), kvpack.Q8()), {0: kvpack.Exact()}),
        ),
        ("h2o:budget=0.5:protect=((0, 120), (200, 220))", kvpack.H2O(budget=0.5, protect=((0, 120), (200, 220)))),
        ("adakv(h2o:budget=(9,20):protect=((0,4),))", kvpack.AdaKV(kvpack.H2O(budget=(9, 20), protect=((0, 4),)))),
        ("rotated:bits=3:levels='lloyd-max'", kvpack.Rotated(bits=3, levels="lloyd-max")),
    ],
)
def test_layers_presets_brackets_and_quotes(text: str, method: object) -> None:
    assert list(parse_spec(text).options.values()) == [method]
    assert [contender.label for contender in parse_all(f"{text},exact, window:tokens=5")] == [
        text,
        "exact",
        "window:tokens=5",
    ]
    assert [contender.label for contender in parse_all(f"q8,{text}")] == ["q8", text]


PATHS = (
    "/plain/a.safetensors",
    "a+b.safetensors",
    "/some where/a, b and c.safetensors",
    "/it's/a:b=c@0=d/(e)[f.safetensors",
    "/a+kivitty,q8er/exactly.safetensors",
    '"quotes" and \\ more',
)


@pytest.fixture
def any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Calibrated, "__post_init__", lambda self: None)
    monkeypatch.setattr(Calibrated, "sha256", "", raising=False)


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize("path", PATHS)
def test_paths_are_read_whole(path: str) -> None:
    plain, quoted = f"calibrated:path={path}", f"calibrated : path = {path!r}"
    for text in (plain, quoted):
        if text == plain and path[0] == '"':
            continue  # it begins with a quote, and so must be quoted
        assert parse_spec(text).options["quantize"].path == path
        both = parse_spec(f"{text} + snapkv:budget=0.5").options
        assert (both["quantize"].path, both["evict"]) == (path, kvpack.SnapKV(budget=0.5))
        assert parse_spec(f"snapkv:budget=0.5+{text}").options["quantize"].path == path
        listed = parse_all(f"exact,{text},window:tokens=5,{text}+snapkv:budget=0.5, kivi:bits=2@0=q8")
        assert [contender.label for contender in listed][::2] == ["exact", "window:tokens=5", "kivi:bits=2@0=q8"]
        assert [listed[i].spec.options["quantize"].path for i in (1, 3)] == [path, path]
    layers = parse_spec(f"{quoted}@0=exact").options["quantize"]
    assert (layers.default.path, layers.others) == (path, {0: kvpack.Exact()})


@pytest.mark.usefixtures("any_path")
def test_a_path_that_holds_the_name_of_a_method_is_quoted() -> None:
    path = "/a,exact"
    assert [c.label for c in parse_all(f"calibrated:path={path}")] == ["calibrated:path=/a", "exact"]
    (only,) = parse_all(f"calibrated:path={path!r}")
    assert only.spec.options["quantize"].path == path
    assert parse_all([f"calibrated:path={path}"])[0].spec.options["quantize"].path == path


def every_setting() -> list[object]:
    texts = [setting for family in FAMILIES.values() for method in family.values() for setting in method.standard]
    methods = [method for text in texts for method in parse_spec(text).options.values()]
    return [
        *methods,
        *kvpack.presets.values(),
        kvpack.KIVI(),
        kvpack.KIVI(bits=3, compensation=kvpack.GPTQ(), sinks=0),
        kvpack.Rotated(bits=3, levels="lloyd-max", center=True),
        kvpack.KeyValue(kvpack.KIVI(bits=4), kvpack.Rotated(bits=2)),
        kvpack.PerLayer(kvpack.KeyValue(kvpack.KIVI(), kvpack.Q8()), {0: kvpack.Exact(), -1: kvpack.presets["tiny"]}),
        kvpack.KVQuant(bits=2, norm=True),
        kvpack.SnapKV(budget=(10, 0.5), protect=((0, 120),), decode=True),
        kvpack.AdaKV(kvpack.H2O(budget=0.25, protect=((0, 4),)), floor=0.1),
    ]  # fmt: skip


@pytest.mark.parametrize("method", every_setting(), ids=str)
def test_what_is_spelled_is_read_again(method: object) -> None:
    assert list(parse_spec(spell(method)).options.values()) == [method]
    assert parse_all(f"{spell(method)},window:tokens=5")[0].label == spell(method)


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize("path", [*PATHS, "/a,exact", "/a+exact", "None", "1"])
def test_paths_that_are_spelled_are_read_again(path: str) -> None:
    text = spell(Calibrated(path))
    assert parse_spec(text).options["quantize"].path == path
    assert [c.spec.options["quantize"].path for c in parse_all(f"{text},exact")[:1]] == [path]
    assert parse_spec(text + "+snapkv:budget=0.5").options["quantize"].path == path


@pytest.mark.parametrize(
    "method", [kvpack.KIVI(compensation=kvpack.GPTQ(damping=0.2)), kvpack.KVQuant(tables={0: object()})], ids=str
)
def test_what_no_text_says_is_refused(method: object) -> None:
    with pytest.raises(kvpack.OptionError, match="cannot be written as text"):
        spell(method)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("balanced", ["kvpack.presets['balanced']"]),
        ("kivi:bits=2:compensation=gptq", ["kvpack.KIVI(bits=2", "compensation=kvpack.GPTQ()"]),
        ("kivi:bits=4/q8", ["kvpack.KeyValue(keys=kvpack.KIVI(bits=4", "values=kvpack.Q8("]),
        ("snapkv:budget=0.25", ["evict=kvpack.SnapKV(", "budget=0.25"]),
        ("medium", ["kvpack.KIVI(...)", "kvpack.presets[name]", "'balanced'", "None"]),
        (4, ["kvpack.KIVI(...)", "'tiny'"]),
        (kvpack.KIVI, ["kvpack.KIVI(...)"]),
    ],
)
def test_what_is_accepted_as_a_codec_is_said(given: object, words: list[str]) -> None:
    for word in words:
        assert word in accepted_quantize(given)


def test_what_is_said_for_a_text_is_what_it_means() -> None:
    for text in ("balanced", *(setting for method in QUANTIZE.values() for setting in method.standard)):
        assert eval(accepted_quantize(text), {"kvpack": kvpack}) == parse_spec(text).options["quantize"]


def test_a_preset_that_there_is_not_is_named_with_those_that_there_are() -> None:
    with pytest.raises(KeyError) as refused:
        kvpack.presets["medium"]
    assert isinstance(refused.value, kvpack.OptionError)
    for word in ("'medium'", *map(repr, kvpack.presets), "kvpack.KIVI(bits=4)"):
        assert word in str(refused.value)
    assert str(refused.value).startswith("presets: 'medium' is unknown")
    with pytest.raises(kvpack.OptionError, match="accepted"):
        kvpack.presets[["tiny"]]  # type: ignore[index]
    assert "medium" not in kvpack.presets
    assert kvpack.presets.get("medium") is None
    assert kvpack.presets.get("tiny") is kvpack.presets["tiny"]
    assert list(kvpack.presets) == ["lossless", "near-lossless", "balanced", "small", "tiny"]
    assert len(kvpack.presets) == 5
    with pytest.raises(TypeError):
        kvpack.presets["mine"] = kvpack.Exact()  # type: ignore[index]


def test_every_registered_method_is_named_and_has_standard_settings() -> None:
    assert set(QUANTIZE) <= set(names())
    for name, method in QUANTIZE.items():
        assert method.standard or method in (kvpack.KVQuant, Calibrated, kvpack.Simulated)  # made of tables, functions
        for setting in method.standard:
            chosen = parse_spec(setting).options["quantize"]
            assert name in setting
            assert isinstance(chosen, method) or isinstance(chosen.values, method)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kivy", ["'kivy'", "exact", "kivi"]),
        ("", ["''", "exact"]),
        ("kivi:bit=2", ["'bit'", "bits", "group", "window", "sinks"]),
        ("exact:bits=2", ["'bits'", "none"]),
        ("kivi:bits=5", ["bits=5", "2, 3, 4, 8"]),
        ("kivi:bits=two", ["bits='two'"]),
        ("kivi:bits", ["'bits'", "parameter=value"]),
        ("kivi:bits=2:bits=4", ["'bits'", "twice"]),
        ("exact+kivi", ["two methods", "quantize"]),
        ("kivi/exact/kivi", ["slash"]),
        ("tiny:bits=2", ["'tiny'"]),
        ("kivi/", ["''"]),
        ("graded:key_bits=9", ["key_bits=9", "1 to 8"]),
        ("graded:value_bits=5", ["value_bits=5", "2, 3, 4, 8"]),
        ("rotated:group=8", ["group=8", "multiples of 16"]),
        ("q8:bits=4", ["'bits'", "window", "sinks"]),
    ],
)
def test_what_is_not_accepted_is_named(text: str, words: list[str]) -> None:
    with pytest.raises(kvpack.OptionError) as refused:
        parse_spec(text)
    for word in words:
        assert word in str(refused.value)
