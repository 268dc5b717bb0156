"""A method enters the registry where it is defined: texts and messages follow. Old names still work, and warn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import kvpack
import pytest
from kvpack import methods
from kvpack.methods import EVICT, FAMILIES, QUANTIZE, SELECT, register
from kvpack.methods.spec import accepted_quantize, names, parse_spec, spell
from support import tiny_config


@pytest.fixture
def mine() -> Iterator[Any]:
    """A codec and an eviction that only this test knows."""

    @register
    @dataclass(frozen=True)
    class Mine(kvpack.Q8):
        name: ClassVar[str] = "mine"
        renamed: ClassVar[dict[str, str]] = {"old_depth": "depth"}

        depth: int = 3

    @register
    @dataclass(frozen=True)
    class Coin(kvpack.Random):
        name: ClassVar[str] = "coin"

    yield Mine, Coin
    del QUANTIZE["mine"], EVICT["coin"]


def test_a_registered_method_is_found_everywhere(mine: Any) -> None:
    codec, eviction = mine
    found = parse_spec("mine:depth=5:window=64+coin:budget=0.5").options
    assert found == {"quantize": codec(depth=5, window=64), "evict": eviction(budget=0.5)}
    assert parse_spec("mine/q4@0=mine:depth=1").options["quantize"].others == {0: codec(depth=1)}
    assert parse_spec("adakv(coin:budget=0.5)").options["evict"] == kvpack.AdaKV(eviction(budget=0.5))
    assert spell(codec(depth=5)) == "mine:depth=5"
    assert {"mine", "coin"} <= set(names())
    assert "kvpack.Mine(...)" in accepted_quantize(3)
    with pytest.raises(kvpack.OptionError, match=r"accepted: .*mine.*coin"):
        parse_spec("nothing")
    with pytest.raises(kvpack.OptionError, match=r"kvpack\.Coin\(\.\.\.\)"):
        kvpack.PackedCache(tiny_config(), evict=3)
    assert "Mine(" in repr(kvpack.PackedCache(tiny_config(), **found))


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("name", ["kivi", "snapkv", "mine"])
def test_no_two_methods_have_one_name(name: str) -> None:
    taken = {**QUANTIZE, **EVICT}[name]
    other = type("Other", (kvpack.Exact,), {"name": name})
    with pytest.raises(kvpack.OptionError, match=f"'{name}' is not accepted for Other"):
        register(other)
    assert {**QUANTIZE, **EVICT}[name] is taken


def test_there_are_no_other_families() -> None:
    stray = type("Stray", (kvpack.Exact,), {"name": "stray", "family": "bits"})
    with pytest.raises(kvpack.OptionError, match=r"family: 'bits' is unknown; accepted: quantize, .*, companion"):
        register(stray)
    assert "stray" not in names()


def test_what_was_registered_for_a_test_is_gone() -> None:
    assert not {"mine", "coin"} & set(names())
    with pytest.raises(kvpack.OptionError, match="'mine' is unknown"):
        parse_spec("mine")


def test_families_are_views_of_one_registry() -> None:
    assert list(FAMILIES) == ["quantize", "evict", "select", "compact", "prune", "share"]
    assert (FAMILIES["quantize"], FAMILIES["evict"], FAMILIES["select"]) == (QUANTIZE, EVICT, SELECT)
    assert list(QUANTIZE)[:4] == ["exact", "kivi", "q8", "q4"]
    assert list(EVICT)[:3] == ["snapkv", "pyramidkv", "h2o"]
    bases = kvpack.Quantize, kvpack.Evict, kvpack.Select, kvpack.Compact, kvpack.Prune, kvpack.Share
    for (family, found), base in zip(FAMILIES.items(), bases, strict=True):
        assert base.family == family
        for name, method in found.items():
            assert issubclass(method, base)
            assert method.name == name
            assert dataclasses.is_dataclass(method)
            assert getattr(kvpack, method.__name__) is method
            assert method.__name__ in kvpack.__all__
            assert method.__name__ in methods.__all__


@pytest.mark.parametrize("module", [kvpack, methods], ids=lambda module: module.__name__)
def test_everything_that_is_named_is_there(module: Any) -> None:
    assert module.__all__ == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)
    assert not {"Apart", "Layers"} & set(module.__all__)


# ---- names of the version before ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [kvpack, methods], ids=lambda module: module.__name__)
@pytest.mark.parametrize(("old", "new"), [("Apart", kvpack.KeyValue), ("Layers", kvpack.PerLayer)])
def test_old_names_of_classes(module: Any, old: str, new: type) -> None:
    with pytest.warns(DeprecationWarning, match=rf"kvpack\.{old} is called kvpack\.{new.__name__} now") as warned:
        assert getattr(module, old) is new
    assert warned[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = module.Nothing


@pytest.mark.parametrize("method", [kvpack.KIVI, kvpack.Q8, kvpack.Q4, kvpack.Rotated, kvpack.Graded])
def test_old_names_of_options(method: Any) -> None:
    expected = method(compensation=kvpack.GPTQ())
    with pytest.warns(DeprecationWarning, match="feedback= is called compensation= now") as warned:
        assert method(feedback=kvpack.GPTQ()) == expected
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="feedback="):
        assert parse_spec(f"{method.name}:feedback=gptq").options["quantize"] == expected
    assert spell(expected).endswith(":compensation=gptq")
    with pytest.raises(kvpack.OptionError, match="feedback=None is not accepted beside compensation="):
        method(feedback=None, compensation=None)
    assert dataclasses.replace(expected, compensation=None) == method()
    with pytest.raises(TypeError, match="nothing"):
        method(nothing=3)


def test_old_names_of_a_methods_own(mine: Any) -> None:
    codec, _ = mine
    with pytest.warns(DeprecationWarning, match="Mine: old_depth= is called depth= now"):
        assert codec(old_depth=4) == codec(depth=4)
    with pytest.warns(DeprecationWarning, match="old_depth="):
        assert parse_spec("mine:old_depth=4").options == {"quantize": codec(depth=4)}
