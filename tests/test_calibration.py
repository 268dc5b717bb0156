"""Calibrations: what is measured, how bits are spent, and that the file fits its model alone."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kvpack
import pytest
import torch
from kvpack.calibration.budget import Option, allocate, sides
from kvpack.calibration.losses import measure_losses, range_of_bits
from kvpack.methods.file import read, write
from kvpack.methods.spec import parse_spec
from safetensors.torch import save_file
from support import forward, random_kv, small_model, tiny_config

WORDS = "The harbour was quiet. A boat came in, and nobody spoke of it! " * 300
SMALL: dict[str, Any] = {"context": 512, "documents": 2, "progress": False}


@pytest.fixture(scope="module")
def bits(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "bits.safetensors"
    with torch.no_grad():
        kvpack.calibrate(
            small_model(), tokenizer, WORDS, method="graded:window=64:group=32", budget=4, out=path, **SMALL
        )
    return path


# ---- spending --------------------------------------------------------------------------------------------------------


def options(seed: int) -> dict[tuple[int, int], list[Option]]:
    torch.manual_seed(seed)
    return {
        (layer, side): [Option(w, w + 0.25, float(torch.rand(()) + 0.1) * 4.0**-w) for w in (2, 3, 4, 8)]
        for layer in range(3)
        for side in range(2)
    }


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_is_spent_where_it_saves_most(seed: int) -> None:
    """Against all ways there are: none with as few bits loses less than what the hull gives, but for the last step."""
    choices = options(seed)
    before = float("inf")
    for budget in (2.25, 2.6, 3.0, 3.7, 5.0, 8.25, 20.0):
        found = allocate(choices, budget)
        spent = sum(option.bits for option in found.values())
        loss = sum(option.loss for option in found.values())
        assert spent <= budget * len(choices) + 1e-9
        assert loss <= before
        before = loss
        ways = itertools.product(*choices.values())
        best = min(sum(o.loss for o in way) for way in ways if sum(o.bits for o in way) <= spent + 1e-9)
        assert loss == pytest.approx(best, rel=1e-9)


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(kvpack.OptionError, match=r"from 2\.250"):
        allocate(options(0), 2.2)


def test_single_layers_are_measured_alone() -> None:
    """A layer's loss is the divergence with that layer's keys, or values, packed and all else exact."""
    model = small_model(layers=3)
    ids = torch.randint(3, 999, (1, 600))
    both = sides("kivi/rotated")
    with torch.no_grad():
        losses = measure_losses(model, ids, both, lambda _: None)
        place = (1, 0, 2.0)
        codec = kvpack.PerLayer(kvpack.Exact(), {1: kvpack.KeyValue(kvpack.KIVI(bits=2), kvpack.Exact())})
        found = []
        for cache in (kvpack.PackedCache(model), kvpack.PackedCache(model, quantize=codec)):
            model(input_ids=ids[:, :-128], past_key_values=cache)
            found.append(model(input_ids=ids[:, -128:], past_key_values=cache).logits[0].log_softmax(-1))
    kl = (found[0].exp() * (found[0] - found[1])).sum().item()
    assert losses.kl[place] == pytest.approx(kl, rel=1e-3)
    assert losses.tokens == 128
    assert losses.bits[place] == pytest.approx(3.0)  # 2 bits and 32 of a grid for 32 numbers
    for layer, side in itertools.product(range(3), range(2)):
        by_width = [losses.kl[layer, side, w] for w in (2.0, 4.0, 8.0)]
        assert by_width == sorted(by_width, reverse=True)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_bits_are_what_the_cache_holds(bits: Path) -> None:
    codec = kvpack.load_calibration(bits)
    header, tensors = read(bits)
    assert header["report"]["bits"] <= 4
    assert tensors["losses"].shape == (2 * (5 + 4), 5)
    cache = kvpack.PackedCache(small_model().config, quantize=codec)
    key, value = random_kv(1, 2, 4 + 64 * 40, 32)
    for layer in range(2):
        forward(cache, key, value, layer=layer)
    memory = cache.memory()
    stored = [cache.layers[layer].packed(0, 0) for layer in range(2)]
    numbers = 2 * sum(packed[name].numel() for packed in stored for name in ("key_codes", "value_codes"))
    held = 8 * (memory.parts["codes"] + memory.parts["scales"]) / numbers
    assert held == pytest.approx(header["report"]["bits"], abs=0.1)  # pages of values that are not full
    assert header["report"]["kl"] > 0


def test_what_was_chosen_is_used(bits: Path) -> None:
    header, _ = read(bits)
    model = small_model()
    cache = kvpack.PackedCache(model, quantize=kvpack.load_calibration(bits))
    by_hand = kvpack.PerLayer(
        kvpack.Exact(), {int(layer): parse_spec(text).options["quantize"] for layer, text in header["layers"].items()}
    )
    expected = kvpack.PackedCache(model, quantize=by_hand)
    ids = torch.randint(3, 999, (2, 400))
    with torch.no_grad():
        for part in ids.split(100, 1):
            logits = [model(input_ids=part, past_key_values=c).logits for c in (cache, expected)]
            assert torch.equal(*logits)
    assert parse_spec(f"calibrated:path={bits}").options["quantize"].path == str(bits)


def test_it_fits_its_model_alone(bits: Path, tmp_path: Path) -> None:
    codec = kvpack.load_calibration(bits)
    kvpack.PackedCache(small_model(), quantize=codec)
    kvpack.PackedCache(small_model().bfloat16(), quantize=codec)
    kvpack.PackedCache(small_model().config, quantize=codec)
    with pytest.raises(kvpack.ModelMismatchError, match="other weights"):
        kvpack.PackedCache(small_model(seed=1), quantize=codec)
    with pytest.raises(kvpack.ModelMismatchError, match="num_hidden_layers=3"):
        kvpack.PackedCache(small_model(layers=3), quantize=codec)
    with pytest.raises(kvpack.OptionError, match=r"nothing\.safetensors"):
        kvpack.load_calibration(tmp_path / "nothing.safetensors")
    half = tmp_path / "half.safetensors"
    half.write_bytes(bits.read_bytes()[:-100])
    with pytest.raises(kvpack.OptionError, match="half"):
        kvpack.load_calibration(half)
    save_file({"x": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(kvpack.OptionError, match="no calibration"):
        kvpack.load_calibration(tmp_path / "other.safetensors")
    header, tensors = read(bits)
    write(tmp_path / "damaged.safetensors", {name: x for name, x in header.items() if name != "layers"}, tensors)
    with pytest.raises(kvpack.OptionError, match="damaged"):
        kvpack.load_calibration(tmp_path / "damaged.safetensors")
    save_file(tensors, tmp_path / "new.safetensors", metadata={"kvpack": json.dumps(header | {"format": 99})})
    with pytest.raises(kvpack.OptionError, match="format 99"):
        kvpack.load_calibration(tmp_path / "new.safetensors")


@pytest.mark.parametrize("gradients", [True, False])
def test_kvquant_goes_through_a_file(gradients: bool, tokenizer: Any, tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "kvquant.safetensors"
    made = kvpack.calibrate(
        model, tokenizer, WORDS, method="kvquant:bits=4:outliers=0.05", out=path, gradients=gradients, **SMALL
    )
    assert "2 layers" in made.words()
    ids = torch.randint(3, 999, (1, 300))
    with torch.no_grad():
        full = model(input_ids=ids).logits
        logits = []
        for codec in (made, kvpack.load_calibration(path)):
            cache = kvpack.PackedCache(model, quantize=codec)
            logits.append(
                torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids.split(50, 1)], 1)
            )
    assert torch.equal(*logits)
    assert 0 < (logits[0] - full).norm() < 0.5 * full.norm()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "q8"}, "no bits to choose"),
        ({"method": "nothing"}, "unknown"),
        ({"method": 5}, "method=5"),
        ({"method": "kivi/graded"}, "codec of keys"),
        ({"budget": None}, "budget=None"),
        ({"budget": "3"}, "budget='3'"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": 2.99}, r"accepted: 3\.000 to 9\.000"),  # 2 and 8 bits, and 32 of a grid for 32 numbers
        ({"budget": 9.01}, r"accepted: 3\.000 to 9\.000"),
        ({"budget": 99}, "budget=99"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"budget": -3}, "budget=-3"),
        ({"budget": 8.3, "method": "graded"}, "budget=8.3"),
        ({"budget": 99, "method": "kivi/rotated"}, "budget=99"),
        ({"method": "kvquant:bits=3"}, "kvquant"),
        ({"method": "kvquant:bits=3/kivi", "budget": None}, "kvquant"),
        ({"method": "kvquant:bits=7", "budget": None}, "bits=7"),
        ({"context": 100}, "context=100"),
        ({"documents": 0}, "documents=0"),
        ({"context": 8192}, "4096"),
        ({"text": "Too short."}, "tokens"),
        ({"out": "/dev/null/x/bits"}, "out"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(
    changed: dict[str, Any], words: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"method": "kivi", "budget": 4, "out": tmp_path / "x", "text": WORDS, **SMALL}
    arguments |= changed
    monkeypatch.setattr("kvpack.calibration.plan.Plan.run", None)
    with pytest.raises(kvpack.OptionError, match=words):
        kvpack.calibrate(small_model(), tokenizer, **arguments)
    assert not (tmp_path / "x").exists()


def test_the_command(tmp_path: Path, tokenizer: Any) -> None:
    folder, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "bits.safetensors"
    small_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text.write_text(WORDS)
    command = [sys.executable, "-m", "kvpack.cli", "calibrate", "--model", str(folder), "--text", str(text)]
    command += ["--out", str(out), "--method", "kivi:window=64", "--context", "400", "--documents", "1"]
    done = subprocess.run([*command, "--bytes-per-token", "140"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bits a number" in done.stdout
    assert read(out)[0]["report"]["bits"] <= 8 * 140 / (2 * 2 * 2 * 32)
    done = subprocess.run([*command, "--budget", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "budget=1.0 is not accepted" in done.stderr


@pytest.mark.parametrize(
    "method", ["kivi", "rotated", "graded", "kivi/rotated", "rotated:levels=lloyd-max", "kivi:group=16:window=64"]
)
def test_the_range_of_budgets_is_what_layers_hold(method: str) -> None:
    """Against what is measured on a model."""
    model, both = small_model(), sides(method)
    with torch.no_grad():
        losses = measure_losses(model, torch.randint(3, 999, (1, 1156)), both, lambda _: None)
    least, most = range_of_bits(model.config, both)
    for bound, pick in ((least, min), (most, max)):
        widths = [float(pick(side.widths)) for side in both]
        assert bound == pytest.approx(sum(losses.bits[0, side, widths[side]] for side in (0, 1)) / 2, abs=0.02)
    assert allocate(losses.choices, least + 0.02)


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_layers_have_codecs_of_their_own() -> None:
    codec = parse_spec("kivi:bits=2/rotated:bits=2@0=exact@-1=q8").options["quantize"]
    assert codec == kvpack.PerLayer(
        kvpack.KeyValue(kvpack.KIVI(bits=2), kvpack.Rotated(bits=2)), {0: kvpack.Exact(), -1: kvpack.Q8()}
    )
    cache = kvpack.PackedCache(tiny_config(layers=4), quantize=codec)
    single = [
        kvpack.PackedCache(tiny_config(layers=4), quantize=c) for c in (codec.others[0], codec.default, kvpack.Q8())
    ]
    key, value = random_kv(1, 2, 300, 32)
    for held, layer in ((cache, 0), (cache, 2), (cache, 3), (single[0], 0), (single[1], 2), (single[2], 3)):
        forward(held, key, value, layer=layer)
    for layer, other in ((0, single[0]), (2, single[1]), (3, single[2])):
        assert torch.equal(cache.layers[layer].keys, other.layers[layer].keys)
        assert torch.equal(cache.layers[layer].values, other.layers[layer].values)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: kvpack.PerLayer("q8"), "default"),
        (lambda: kvpack.PerLayer(kvpack.Q8(), {0: "q8"}), "layer 0"),
        (lambda: kvpack.PerLayer(kvpack.Q8(), {"0": kvpack.Q4()}), "'0'"),
        (lambda: kvpack.PerLayer(kvpack.Q8(), 5), "others=5"),
        (lambda: kvpack.PackedCache(tiny_config(), quantize=kvpack.PerLayer(kvpack.Q8(), {2: kvpack.Q4()})), "layers"),
        (
            lambda: kvpack.PackedCache(
                tiny_config(), quantize=kvpack.PerLayer(kvpack.Q8(), {1: kvpack.Q4(), -1: kvpack.Q8()})
            ),
            "twice",
        ),
        (lambda: parse_spec("kivi@x=q8"), "number"),
        (lambda: parse_spec("kivi@1=q8@1=q4"), "number"),
        (lambda: parse_spec("kivi@1"), "number"),
    ],
)
def test_layers_that_are_none_are_refused(make: Any, words: str) -> None:
    with pytest.raises(kvpack.OptionError, match=words):
        make()
