"""Slices of the head space: their coordinates, what is held and read of them, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kvpack
import pytest
import torch
from kvpack.calibration.attending import Span
from kvpack.calibration.heads import save
from kvpack.calibration.slices import Moments, coordinates, measure_slices
from kvpack.evaluation.contenders import Packed
from kvpack.methods.file import identity, write
from kvpack.methods.spec import Spec
from reference import attention
from support import (
    every_mode,
    forward,
    generated,
    ids_of,
    left_padding,
    random_kv,
    relative_error,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import AttentionInterface

GREEDY: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
DIM, WINDOW = 32, 32


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A model, and the file of its slices."""
    model = tiny_model()
    path = tmp_path_factory.mktemp("slice") / "slice.safetensors"
    tables = measure_slices(model, [ids_of(1, 200), ids_of(1, 150)], window=WINDOW)
    write(path, {"method": "slice", "model": identity(model)}, {k: x.contiguous() for k, x in tables.items()})
    return model, str(path)


# ---- the coordinates ------------------------------------------------------------------------------------------------


def test_the_leading_coordinates_are_the_optimum_in_the_metric() -> None:
    """Of all projections of rank r none has a smaller `E[(x - x')^T M (x - x')]`, and it is the sum of the last e."""
    torch.manual_seed(0)
    x, g = torch.randn(500, 8).double() @ torch.randn(8, 8).double(), torch.randn(300, 8).double() * torch.rand(8)
    spread, metric = x.T @ x / 500, g.T @ g / 300
    metric += 1e-3 * torch.linalg.eigvalsh(metric)[-1] * torch.eye(8)  # as it is damped
    down, up, energy = coordinates(spread, g.T @ g / 300)
    assert torch.allclose(up @ down, torch.eye(8).double(), atol=1e-6)

    def loss(project: Tensor) -> float:
        rest = x - x @ project.T
        return float((rest @ metric * rest).sum(1).mean())

    for rank in (1, 3, 7):
        best = loss(up[:, :rank] @ down[:rank])
        assert best == pytest.approx(float(energy[rank:].sum()), rel=1e-6)
        for seed in range(20):
            torch.manual_seed(seed)
            a, b = torch.randn(8, rank).double(), torch.randn(rank, 8).double()
            moved = up[:, :rank] @ down[:rank] + 0.1 * a @ b
            other = torch.linalg.svd(moved)
            assert loss((other.U[:, :rank] * other.S[:rank]) @ other.Vh[:rank]) > best


def test_moments_are_those_of_dense_attention() -> None:
    """Against autograd through attention that is written out, with the same labels."""
    model = tiny_model(tiny_config(layers=2)).double()
    ids = ids_of(1, 90)
    moments = Moments(model, Span(4, 16))
    moments.read(ids)
    seen: dict[int, dict[str, Tensor]] = {}

    def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        key, value = (x.detach().requires_grad_() if not x.requires_grad else x for x in (key, value))
        key.retain_grad()
        keys, values = (x.repeat_interleave(2, 1) for x in (key, value))
        n = query.shape[2]
        at = torch.arange(n)
        logits = (query @ keys.mT * options["scaling"]).masked_fill(at > at[:, None], -torch.inf)
        weights = logits.softmax(-1)
        out = weights @ values
        out.retain_grad()
        far = (at >= 4) & (at < at[:, None] - 16)
        seen[module.layer_idx] = {"key": key, "out": out, "far": (weights * far) @ values}
        return out.transpose(1, 2), None

    AttentionInterface.register("dense-for-a-test", eager)
    model.set_attn_implementation("dense-for-a-test")
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
        generator = torch.Generator().manual_seed(0)
        labels = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
        logits.log_softmax(-1)[torch.arange(90), labels].sum().backward()
    for layer, found in seen.items():
        key, grad = found["key"][0].detach(), found["key"].grad[0]
        slope = found["out"].grad[0].unflatten(0, (2, 2)).flatten(1, 2)
        far = found["far"].detach()[0].unflatten(0, (2, 2)).flatten(1, 2)
        for side, (spread, metric) in {"keys": (key, grad), "values": (far, slope)}.items():
            got = moments.means(layer, side)
            want = spread.mT @ spread / spread.shape[1], metric.mT @ metric / 90
            for one, other in zip(got, want, strict=True):
                assert relative_error(one, other) < 1e-4


def test_losses_are_those_of_the_changed_outputs() -> None:
    """Of leaving out coordinates, by autograd through dense attention: `sum_i` of first-order changes, squared."""
    model = tiny_model(tiny_config(layers=2)).double()
    ids = ids_of(1, 90)
    tables = measure_slices(model, [ids], window=16)
    down, up = (tables[f"keys.{name}"].double() for name in ("down", "up"))
    seen: dict[int, Any] = {}

    def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        keys, values = (x.repeat_interleave(2, 1) for x in (key, value))
        at = torch.arange(query.shape[2])
        far = (at >= 4) & (at < at[:, None] - 16)
        logits = query @ keys.mT * options["scaling"]
        logits.retain_grad()
        weights = logits.masked_fill(at > at[:, None], -torch.inf).softmax(-1)
        out = weights @ values
        out.retain_grad()
        seen[module.layer_idx] = (query[0], key[0], value[0], logits, weights[0], out, far, options["scaling"])
        return out.transpose(1, 2), None

    AttentionInterface.register("dense-for-a-test", eager)
    model.set_attn_implementation("dense-for-a-test")
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
        generator = torch.Generator().manual_seed(0)
        labels = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
        logits.log_softmax(-1)[torch.arange(90), labels].sum().backward()
    values_down, values_up = (tables[f"values.{name}"].double() for name in ("down", "up"))
    for layer, (query, key, value, logits, weights, out, far, scaling) in seen.items():
        for head in range(2):
            for rank in (1, 7, 31):
                rest = key[head] - key[head] @ (up[layer, head, :, :rank] @ down[layer, head, :rank]).T
                change, value_change = torch.zeros(90).double(), torch.zeros(90).double()
                project = values_up[layer, head, :, :rank] @ values_down[layer, head, :rank]
                for g in (2 * head, 2 * head + 1):
                    change -= (logits.grad[0, g] * far * (query[g] @ rest.T * scaling)).sum(-1)
                    sums = (weights[g] * far) @ value[head]
                    value_change -= (out.grad[0, g] * (sums - sums @ project.T)).sum(-1)
                for name, moved in (("keys", change), ("values", value_change)):
                    want = float(moved.square().mean() / 2)
                    assert float(tables[f"{name}.loss"][layer, head, rank]) == pytest.approx(want, rel=1e-3, abs=1e-12)


# ---- what is held, and what is read ---------------------------------------------------------------------------------


def test_full_rank_changes_nothing(calibrated: tuple[Any, str]) -> None:
    model, path = calibrated
    ids = ids_of(1, 250)
    whole, sliced = (kvpack.PackedCache(model, prune=prune) for prune in (None, kvpack.Slice(path, DIM, window=WINDOW)))
    for part in ids.split([180, *[1] * 30, 40], dim=1):
        got, want = (model(part, past_key_values=cache).logits for cache in (sliced, whole))
        assert (got - want).abs().max() < 2e-3
    assert sliced.lossy_share() > 0.5


@pytest.mark.parametrize("sides", ["keys", "values", "both"])
def test_what_is_read_is_the_projection(calibrated: tuple[Any, str], sides: str) -> None:
    model, path = calibrated
    prune = kvpack.Slice(path, 20, sides=sides, window=WINDOW)
    cache = kvpack.PackedCache(model, prune=prune)
    key, value = random_kv(1, 2, 230, DIM)
    forward(cache, key, value, torch.randn(1, 4, 230, DIM), layer=0)
    forward(cache, key, value, torch.randn(1, 4, 230, DIM), layer=1)
    new_key, new_value = random_kv(1, 2, 1, DIM)
    query = torch.randn(1, 4, 1, DIM)
    out = forward(cache, new_key, new_value, query, layer=0)
    packed = 4 + (230 - 4 - WINDOW) // 64 * 64
    for head in range(2):
        held = []
        for side, x, new in (("keys", key, new_key), ("values", value, new_value)):
            x = torch.cat([x, new], 2)[0, head].double().clone()
            if side in prune.ranks:
                rank = int(prune.ranks[side][0, head])
                tables = prune._tables
                project = (
                    tables[f"{side}.up"][0, head, :, :rank].double() @ tables[f"{side}.down"][0, head, :rank].double()
                )
                x[4:packed] = x[4:packed] @ project.T
            held.append(x.float())
        layer = cache.layers[0]
        assert relative_error(layer.keys[0, head], held[0]) < 1e-4
        assert relative_error(layer.values[0, head], held[1]) < 1e-4
        own = query[0, 2 * head : 2 * head + 2]
        want = attention(own, held[0][None], held[1][None], torch.ones(1, 231) > 0)
        assert relative_error(out[0].transpose(0, 1)[2 * head : 2 * head + 2], want.transpose(0, 1)) < 1e-4


def test_ranks_are_mixed_and_bytes_fall_with_them(calibrated: tuple[Any, str]) -> None:
    model, path = calibrated
    for rank in (1, 7.5, 20, DIM):
        ranks = kvpack.Slice(path, rank, window=WINDOW).ranks
        every = torch.stack([ranks["keys"], ranks["values"]]).double()
        assert every.mean() == pytest.approx(rank, abs=0.01)
        assert every.min() >= 1
    assert every.min() == DIM
    assert len(set(kvpack.Slice(path, 20, window=WINDOW).ranks["keys"].flatten().tolist())) > 1
    uniform = kvpack.Slice(path, 20, uniform=True, window=WINDOW)
    assert uniform.ranks["values"].flatten().tolist() == [20] * 4
    exact = {}
    for rank in (10, 20):
        cache = kvpack.PackedCache(model, prune=kvpack.Slice(path, rank, uniform=True, window=WINDOW))
        model(ids_of(1, 4 + 64 * 20 + WINDOW), past_key_values=cache)
        exact[rank] = cache.memory().parts["exact"]
    assert exact[20] - exact[10] == pytest.approx(2 * 2 * 2 * 64 * 20 * 10 * 4, rel=0.02)  # layers, heads, sides


@every_mode
def test_every_way_of_generating(calibrated: tuple[Any, str], mode: str) -> None:
    model, path = calibrated
    ladder = kvpack.Heads({(0, 0): "compensated", (1, 1): "gone"}, window=24)
    prune = kvpack.Slice(path, 20, heads=ladder, window=WINDOW)
    cache = kvpack.PackedCache(model, prune=prune, quantize=kvpack.KIVI(bits=4, window=32))
    generated(model, cache, mode, 150, 40)
    assert len(cache.kept(1, 1)) == 0
    assert len(cache.kept(0, 0)) < 80


def test_rows_of_a_padded_batch_are_single_rows_and_forks_go_on_alike(calibrated: tuple[Any, str]) -> None:
    model, path = calibrated
    prune = kvpack.Slice(path, 20, window=WINDOW)
    ids, more = ids_of(2, 160), ids_of(2, 30)
    batch = kvpack.PackedCache(model, prune=prune)
    mask = torch.cat([left_padding([160, 130]), torch.ones(2, 30, dtype=torch.long)], 1)
    at = (mask.cumsum(1) - 1).clamp_min(0)  # what a slice leaves depends on how far keys are rotated
    model(input_ids=ids, attention_mask=mask[:, :160], position_ids=at[:, :160], past_key_values=batch)
    both = model(more, attention_mask=mask, position_ids=at[:, 160:], past_key_values=batch).logits
    for row, pads in ((0, 0), (1, 30)):
        cache = kvpack.PackedCache(model, prune=prune)
        model(input_ids=ids[row : row + 1, pads:], past_key_values=cache)
        twins = (cache.fork(), copy.deepcopy(cache))
        single = model(more[row : row + 1], past_key_values=cache).logits
        assert (single - both[row]).abs().max() < 1e-4
        for twin in twins:
            assert torch.equal(model(more[row : row + 1], past_key_values=twin).logits, single)


def test_an_evaluation_knows_files_by_what_they_hold(calibrated: tuple[Any, str], tmp_path: Path) -> None:
    model, path = calibrated
    losses = {"fisher.streaming": torch.rand(2, 2)}
    heads = str(tmp_path / "heads.safetensors")
    save(heads, model, losses)
    ladder = kvpack.Heads(calibration=heads, demote=0.5)
    both = kvpack.Slice(path, 20, heads=ladder, window=WINDOW)
    known = Packed(Spec("both", {"prune": both})).files
    assert known == "".join(sorted([both.sha256, str(ladder.sha256)]))
    save(heads, model, {"fisher.streaming": torch.rand(2, 2)})
    assert kvpack.Heads(calibration=heads, demote=0.5).sha256 != ladder.sha256
    assert Packed(Spec("by hand", {"prune": kvpack.Heads({(0, 0): "gone"})})).files == ""


# ---- by the front door, and what is refused -------------------------------------------------------------------------


def test_calibrate_writes_it(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(vocab_size=len(tokenizer)))
    text = "some words and others again " * 400
    found = kvpack.calibrate(
        model,
        tokenizer,
        text,
        method="slice",
        budget=20,
        out=tmp_path / "s.safetensors",
        context=128,
        documents=2,
        progress=False,
    )
    assert isinstance(found, kvpack.Slice)
    assert found == kvpack.Slice(str(tmp_path / "s.safetensors"), 20)
    assert "keys" in found.words()


def test_what_does_not_fit_is_refused(calibrated: tuple[Any, str], tmp_path: Path) -> None:
    _, path = calibrated
    for options, words in (
        ({"rank": 0}, "rank=0"),
        ({"rank": 33}, "1 to 32"),
        ({"rank": 7.5, "uniform": True}, "whole numbers"),
        ({"rank": 8, "sides": "queries"}, "sides="),
        ({"rank": 8, "heads": 3}, "heads=3"),
        ({"rank": 8, "window": -1}, "window=-1"),
    ):
        with pytest.raises(kvpack.OptionError, match=words):
            kvpack.Slice(path, **options)
    with pytest.raises(kvpack.OptionError, match="cannot be read"):
        kvpack.Slice(str(tmp_path / "none"), 8)
    with pytest.raises(kvpack.ModelMismatchError, match="other weights"):
        kvpack.PackedCache(tiny_model(seed=1), prune=kvpack.Slice(path, 8))
    with pytest.raises(kvpack.ModelMismatchError, match="another model"):
        kvpack.PackedCache(tiny_config(layers=3), prune=kvpack.Slice(path, 8))
