"""Methods written as text: what is accepted, and what the errors say."""

from __future__ import annotations

import kvpack
import pytest
from kvpack.methods import QUANTIZE, Calibrated
from kvpack.methods.spec import names, parse_spec


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
        ("kivi:bits=2:feedback=gptq", kvpack.KIVI(bits=2, feedback=kvpack.GPTQ())),
        ("exact/graded", kvpack.Apart(kvpack.Exact(), kvpack.Graded())),  # values as Graded stores them
        ("kivi:bits=4 / rotated:bits=2", kvpack.Apart(kvpack.KIVI(bits=4), kvpack.Rotated(bits=2))),
    ],
)
def test_a_name_and_its_parameters(text: str, method: object) -> None:
    assert parse_spec(text).options == {"quantize": method}


def test_every_registered_method_is_named_and_has_standard_settings() -> None:
    assert set(QUANTIZE) <= set(names())
    for name, method in QUANTIZE.items():
        assert method.standard or method in (kvpack.KVQuant, Calibrated)  # these need a calibration
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
