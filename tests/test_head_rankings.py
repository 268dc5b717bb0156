"""Rankings of KV heads against their equations in dense attention, and the ladder that is planned of them."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import kvpack
import pytest
import torch
from kvpack.calibration import head_losses
from kvpack.calibration.demoting import demoted
from kvpack.calibration.heads import RANKINGS, measure, save
from kvpack.calibration.ladder_picture import draw
from kvpack.errors import ModelMismatchError, OptionError
from kvpack.methods.prune.ladder import plan, predicted, retrieval_heads
from support import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GptOssConfig

SINKS, WINDOW, TOKENS = 2, 9, 150  # more than one chunk of rows
SMALL: dict[str, Any] = {"sinks": SINKS, "window": WINDOW}
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
KINDS: dict[str, Any] = {
    "llama": tiny_config(layers=3, heads=4, kv_heads=2, head_dim=8, initializer_range=0.3),
    "mha": tiny_config(layers=2, heads=3, kv_heads=3, head_dim=8, initializer_range=0.3),
    "gemma2": Gemma2Config(
        num_hidden_layers=3,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        attn_logit_softcapping=2.0,
        **COMMON,
    ),
    "gpt_oss": GptOssConfig(
        num_hidden_layers=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        **COMMON,
    ),
}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind]).eval().double()
    if kind == "gpt_oss":
        model.set_experts_implementation("eager")  # the other has no float64
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.normal_()
    return model


def documents_of(count: int = 1, tokens: int = TOKENS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (1, tokens), generator=generator) for _ in range(count)]


class Dense:
    """What each layer's eager attention was given, and made."""

    def __init__(self, model: Any, ids: torch.Tensor, patch: pytest.MonkeyPatch) -> None:
        self.seen: dict[int, tuple[Any, ...]] = {}
        module = sys.modules[type(model).__module__]
        eager = module.eager_attention_forward

        def recording(layer: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
            out, weights = eager(layer, q, k, v, mask, **options)
            out.retain_grad()
            self.seen[layer.layer_idx] = (q[0].detach(), k[0].detach(), v[0].detach(), out, weights[0].detach(), layer)
            return out, weights

        before = model.config._attn_implementation
        with patch.context() as context:
            context.setattr(module, "eager_attention_forward", recording)
            model.set_attn_implementation("eager")
            self.logits = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation(before)

    def change(self, layer: int, head: int, rung: str) -> torch.Tensor:
        """`o' - o` of a query head `[n, E]`, a query at a time."""
        q, k, v, out, _, module = self.seen[layer]
        group = len(q) // len(k)
        keys, values = k[head // group], v[head // group]
        cap = getattr(module, "attn_logit_softcapping", None)
        changes = []
        for i in range(q.shape[1]):
            near = [j for j in range(i + 1) if j < SINKS or i - j <= WINDOW]
            far = [j for j in range(i + 1) if j not in near]
            heads = [keys[j] for j in near], [values[j] for j in near], [0.0] * len(near)
            if far and rung == "compensated":
                heads[0].append(keys[far].mean(0))
                heads[1].append(values[far].mean(0))
                heads[2].append(float(torch.tensor(float(len(far))).double().log()))
            logits = torch.stack(heads[0]) @ q[head, i] * module.scaling
            logits = (logits if cap is None else cap * torch.tanh(logits / cap)) + torch.tensor(heads[2])
            if hasattr(module, "sinks"):
                logits = torch.cat([logits, module.sinks[head, None].detach()])
            p = logits.softmax(0)[: len(heads[1])]
            new = torch.zeros_like(values[0]) if rung == "gone" else p @ torch.stack(heads[1])
            changes.append(new - out[0, i, head].detach())
        return torch.stack(changes)


# ---- each ranking against its equation -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_and_michel_are_what_their_equations_say(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(kind), documents_of()[0]
    names = ("fisher.streaming", "fisher.compensated", "fisher.gone", "michel")
    found = measure(model, [ids], rankings=names, **SMALL)
    with torch.enable_grad():
        dense = Dense(model, ids, monkeypatch)
        logs = dense.logits[0].log_softmax(-1)
        draws = torch.Generator().manual_seed(0)
        chunks = dense.logits[0].detach().float().softmax(-1).split(128)
        labels = torch.cat([torch.multinomial(p, 1, generator=draws) for p in chunks])
        sampled = logs.gather(1, labels).sum()
        text = -logs[:-1].gather(1, ids[0, 1:, None]).mean()
    outputs = [seen[3] for seen in dense.seen.values()]
    slopes = [torch.autograd.grad(x, outputs, retain_graph=True) for x in (sampled, text)]
    for at, (layer, (_, k, _, out, _, module)) in enumerate(dense.seen.items()):
        if getattr(module, "sliding_window", None):
            assert all(found[name][layer].isnan().all() for name in names)
            continue
        g, loss = slopes[0][at][0], slopes[1][at][0]
        group = out.shape[2] // len(k)
        gates = (out[0].detach() * loss).sum(-1).abs().mean(0).unflatten(0, (len(k), group)).sum(1)
        torch.testing.assert_close(found["michel"][layer], (gates / gates.norm()).float(), rtol=1e-3, atol=1e-6)
        for rung in ("streaming", "compensated", "gone"):
            for head in range(len(k)):
                of_group = range(head * group, (head + 1) * group)
                inner = sum((g[:, query] * dense.change(layer, query, rung)).sum(-1) for query in of_group)
                expected = inner.square().mean().float() / 2
                torch.testing.assert_close(found[f"fisher.{rung}"][layer, head], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_distance_is_the_weight_beyond_sinks_and_window(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(kind), documents_of()[0]
    found = measure(model, [ids], rankings=["distance"], **SMALL)["distance"]
    with torch.enable_grad():
        dense = Dense(model, ids, monkeypatch)
    for layer, (_, k, _, _, weights, module) in dense.seen.items():
        if getattr(module, "sliding_window", None):
            assert found[layer].isnan().all()
            continue
        weights = weights[..., :TOKENS].double().unflatten(0, (len(k), -1)).mean(1)
        far = sum(weights[:, i, SINKS : i - WINDOW].sum(-1) for i in range(SINKS + WINDOW, TOKENS)) / TOKENS
        torch.testing.assert_close(found[layer], far.float(), rtol=1e-3, atol=1e-6)


def test_echo_is_the_weight_of_earlier_copies_and_what_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, block = model_of("llama"), TOKENS // 4
    found = measure(model, documents_of(), rankings=["echo"], **SMALL)["echo"]
    once = torch.randint(0, 128, (1, block), generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        dense = Dense(model, once.repeat(1, 4), monkeypatch)
    for layer, (_, k, _, _, weights, _) in dense.seen.items():
        sums = torch.zeros(len(weights), dtype=torch.float64)
        for i in range(block, 4 * block):
            for earlier in range(i % block, i, block):
                sums += weights[:, i, earlier].double() + weights[:, i, earlier + 1].double()
        expected = (sums / (3 * block)).unflatten(0, (len(k), -1)).amax(1)
        torch.testing.assert_close(found[layer], expected.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_measured_is_the_divergence_of_a_head_alone(kind: str) -> None:
    """The streaming one against a 4-dimensional mask that hides the far tokens, of a model with one head alike."""
    model, ids = model_of(kind), documents_of(1, 40)[0]
    names = ["measured.streaming", "measured.gone"]
    found = measure(model, [ids], rankings=names, **SMALL)
    full = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    layer = model.model.layers[2].self_attn
    for head in range(2):
        taken = slice(head * 16, head * 16 + 16)  # two query heads of 8
        before = layer.o_proj.weight[:, taken].clone()
        layer.o_proj.weight[:, taken] = 0
        gone = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        layer.o_proj.weight[:, taken] = before
        expected = (full.exp() * (full - gone)).sum(-1).mean().float()
        torch.testing.assert_close(found["measured.gone"][2, head], expected, rtol=1e-3, atol=1e-9)
        assert 0 < found["measured.streaming"][2, head] < 10 * expected
    assert found[names[0]][0].isnan().all() == (kind == "gemma2")


def test_all_heads_that_stream_are_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens fed together see each other, sinks, and the window before them."""
    model, ids = model_of("llama"), documents_of()[0]
    for step in (1, 32):
        with demoted(model, [["streaming"] * 2] * 3, step=step, **SMALL):
            found = model(input_ids=ids, use_cache=False).logits
        i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
        shown = (j <= i) & ((j < SINKS) | (j >= i // step * step - WINDOW))
        model.set_attn_implementation("sdpa")
        expected = model(input_ids=ids, attention_mask=shown[None, None], use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_documents_are_averaged_and_other_dtypes_do() -> None:
    documents = documents_of(2, 60)
    model = model_of("llama")
    both, *single = (measure(model, d, rankings=["distance"], **SMALL) for d in (documents, *([x] for x in documents)))
    torch.testing.assert_close(both["distance"], (single[0]["distance"] + single[1]["distance"]) / 2)
    wide = measure(model, documents, **SMALL)["fisher.gone"]
    narrow = measure(model.bfloat16(), documents, **SMALL)["fisher.gone"]
    assert narrow.dtype is torch.float32
    assert 0.2 < float(narrow.sum() / wide.sum()) < 5


# ---- the model is as it was ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_it_was(error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = mark = torch.ones_like(model.model.norm.weight)
    modes = [module.training for module in model.modules()]
    learned = [parameter.requires_grad for parameter in model.parameters()]
    if error is not None:

        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(head_losses.Gradients, "look", fail)
        with pytest.raises(error):
            measure(model, documents_of(), **SMALL)
    else:
        with torch.inference_mode():
            measure(model, documents_of(), rankings=RANKINGS[:6], **SMALL)
    assert model.config._attn_implementation == "sdpa"
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == learned
    assert model.model.norm.weight.grad is mark
    assert mark.eq(1).all()
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_attention_is_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that a graph keeps has a row a token and a column a token."""
    model, kept = model_of("llama"), []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        measure(model, documents_of(1, 200), **SMALL)
    assert kept
    assert max(shape.numel() for shape in kept) < 200 * 200


def test_what_cannot_be_measured_is_refused() -> None:
    model, documents = model_of("llama"), documents_of()
    for wrong, match in (
        ({"rankings": ["fisher"]}, "rankings="),
        ({"rankings": []}, "rankings="),
        ({"window": 0}, "window="),
        ({"sinks": -1}, "sinks="),
    ):
        with pytest.raises(OptionError, match=match):
            measure(model, documents, **wrong)
    for given in ([], [torch.ones(2, 9, dtype=torch.long)], [[1, 2]]):
        with pytest.raises(OptionError, match="documents"):
            measure(model, given)
    with pytest.raises(OptionError, match="expected a transformers model with its weights"):
        measure(model.config, documents)
    for ladder in ([["full"]], [["half"] * 2] * 3):
        with pytest.raises(OptionError, match="ladder"), demoted(model, ladder):
            pass
    with pytest.raises(OptionError, match="layer 0"), demoted(model_of("gemma2"), [["gone"] * 2] * 3):
        pass


def test_a_model_with_attention_of_its_own_is_refused() -> None:
    model = tiny_model(BloomConfig(vocab_size=128, hidden_size=32, n_layer=1, n_head=4), attention="eager")
    with pytest.raises(OptionError, match="quantize="):
        measure(model, documents_of())


# ---- the ladder ------------------------------------------------------------------------------------------------------


def losses_of(seed: int, layers: int = 2, heads: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    streaming = torch.rand(layers, heads) ** 3
    compensated = streaming * torch.rand(layers, heads)
    gone = streaming + torch.rand(layers, heads)
    return {"fisher.streaming": streaming, "fisher.compensated": compensated, "fisher.gone": gone}


def test_a_share_of_the_heads_is_exact_and_lowest_first() -> None:
    losses = losses_of(0, 5, 4)
    for share in (0, 0.25, 0.33, 0.5, 1.0):
        ladder = plan(losses, demote=share)
        down = torch.tensor([[rung == "streaming" for rung in rungs] for rungs in ladder])
        assert int(down.sum()) == round(share * 20)
        values = losses["fisher.streaming"]
        if 0 < share < 1:
            assert values[down].max() <= values[~down].min()
        assert predicted(losses, ladder) == pytest.approx(float(values[down].sum()))


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_spent_as_well_as_can_be(seed: int) -> None:
    """Against all ladders: none that holds as few bytes loses less, but for the last step of one head."""
    losses = losses_of(seed)
    held = {"full": 1000, "streaming": 132, "compensated": 133, "gone": 0}
    names = tuple(held)
    table = [[0.0] + [float(losses[f"fisher.{r}"].flatten()[i]) for r in names[1:]] for i in range(6)]
    ways = [
        (sum(held[names[r]] for r in way), sum(table[i][r] for i, r in enumerate(way)))
        for way in itertools.product(range(4), repeat=6)
    ]
    rungs = names[1:]
    for share in (0.0, 0.2, 0.45, 0.7, 1.0):
        ladder = plan(losses, rungs=rungs, share=share, context=1000)
        flat = [rung for of_layer in ladder for rung in of_layer]
        spent, lost = sum(held[rung] for rung in flat), predicted(losses, ladder)
        assert spent <= share * 6000
        assert lost <= min(loss for cost, loss in ways if cost <= max(share * 6000 - 1000, 0)) + 1e-6
        assert lost <= min(loss for cost, loss in ways if cost <= spent) + 1e-6 or share not in (0.0, 1.0)
    for nats in (0.0, 0.1, 0.5, 10.0):
        ladder = plan(losses, rungs=rungs, nats=nats, context=1000)
        flat = [rung for of_layer in ladder for rung in of_layer]
        assert predicted(losses, ladder) <= nats + 1e-6
        assert sum(held[rung] for rung in flat) <= min(cost for cost, loss in ways if loss <= nats) + 1000


def test_what_is_kept_or_not_known_stays_full() -> None:
    losses = losses_of(1, 3, 2)
    losses["fisher.streaming"][0] = torch.nan
    keep = retrieval_heads(torch.tensor([[torch.nan, torch.nan], [0.1, 0.9], [0.3, 0.2]]), 0.25)
    assert keep.tolist() == [[False, False], [False, True], [False, False]]
    ladder = plan(losses, demote=0.75, keep=keep)
    assert ladder == (("full", "full"), ("streaming", "full"), ("streaming", "streaming"))
    for budget in ({"share": 0.5}, {"nats": 100.0}):
        ladder = plan(losses, context=1000, keep=keep, **budget)
        assert ladder[0] == ("full", "full")
        assert ladder[1][1] == "full"
    with pytest.raises(OptionError, match="keep= leaves 3"):
        plan(losses, demote=1.0, keep=keep)


def test_wrong_plans_are_refused() -> None:
    losses = losses_of(0)
    for wrong, match in (
        ({}, "expected one of them"),
        ({"demote": 0.5, "share": 0.5}, "expected one of them"),
        ({"demote": 1.5}, "demote="),
        ({"demote": 0.5, "by": "distance"}, "expected 'distance.streaming'"),
        ({"share": 0.05, "context": 1000}, "share="),
        ({"share": 0.5, "rungs": "gone"}, "rungs="),
        ({"nats": -1.0}, "nats="),
        ({"nats": 1.0, "context": 0}, "context="),
        ({"nats": 1.0, "keep": torch.ones(2, 3)}, "keep"),
    ):
        with pytest.raises(OptionError, match=match):
            plan(losses, **wrong)


def test_a_ladder_is_made_of_a_file_for_its_model_alone(tmp_path: Path) -> None:
    model, losses, path = tiny_model(KINDS["llama"]), losses_of(0, 3, 2), str(tmp_path / "heads.safetensors")
    save(path, model, losses, **SMALL)
    heads = kvpack.Heads(calibration=path, demote=0.5, **SMALL)
    found, ladder = heads.table()
    assert all(torch.equal(found[name], losses[name]) for name in losses)
    assert ladder == plan(losses, demote=0.5)
    assert heads.chosen == {(i, h): r for i, row in enumerate(ladder) for h, r in enumerate(row) if r != "full"}
    assert kvpack.PackedCache(model, prune=heads).prune.chosen == heads.chosen
    assert kvpack.Heads(calibration=path, nats=1e9, rungs=("streaming", "gone"), **SMALL).chosen
    assert "3 heads" in heads.words()
    with pytest.raises(ModelMismatchError, match="another model"):
        kvpack.PackedCache(tiny_model(KINDS["mha"]), prune=heads)
    with pytest.raises(ModelMismatchError, match="other weights"):
        kvpack.PackedCache(tiny_model(KINDS["llama"], seed=1), prune=heads)
    for options, words in (
        ({"demote": 0.5, "window": 64}, "measured"),
        ({"demote": 0.5, "share": 0.5}, "one of them"),
        ({}, "one of them"),
        ({"demote": 0.5, "keep": 0.2}, "no echo"),
        ({"demote": 0.5, "by": "distance"}, "fisher.gone"),
        ({"demote": 0.5, "ladder": {(0, 0): "gone"}}, "one of them"),
    ):
        with pytest.raises(OptionError, match=words):
            kvpack.Heads(calibration=path, **{**SMALL, **options})
    with pytest.raises(OptionError, match="without calibration="):
        kvpack.Heads(demote=0.5)


def test_kvpack_calibrate_writes_it(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(layers=2, vocab_size=len(tokenizer)))
    text, common = "some words and others again " * 500, {"context": 256, "documents": 2, "progress": False}
    found = kvpack.calibrate(
        model, tokenizer, text, method="heads:window=32", budget="50%", out=tmp_path / "h.safetensors", **common
    )
    assert isinstance(found, kvpack.Heads)
    losses, _ = found.table()
    assert set(losses) == {name for name in RANKINGS if "measured" not in name}
    assert found.chosen
    free = kvpack.calibrate(
        model, tokenizer, text, method="heads", gradients=False, out=tmp_path / "free.safetensors", **common
    )
    assert set(free.table()[0]) == {"distance", "echo"}
    assert not free.chosen
    for options, words in (
        ({"method": "heads:bits=3"}, "'bits' is unknown"),
        ({"method": "heads", "budget": 3.0}, "budget=3.0 is not accepted for heads"),
        ({"method": "heads", "budget": "3.0bits"}, "is not accepted for heads"),
        ({"method": "heads", "budget": "50%", "gradients": False}, "found by gradients"),
        ({"method": "slice"}, "the mean rank"),
        ({"method": "slice", "budget": 8, "gradients": False}, "gradients=False"),
    ):
        with pytest.raises(OptionError, match=words):
            kvpack.calibrate(model, tokenizer, text, out=tmp_path / "x.safetensors", **{**common, **options})


def test_a_ladder_is_drawn(tmp_path: Path) -> None:
    losses = losses_of(0, 6, 3)
    ladder = plan(losses, rungs=("streaming", "compensated", "gone"), share=0.4, context=1000)
    draw(losses, ladder).savefig(tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    with pytest.raises(OptionError, match="shape"):
        draw(losses, ladder[:2])
