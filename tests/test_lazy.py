"""LazyLLM: what is computed is what the paper's rules say, each token at most once a layer; the rest is as dense."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from support import ids_of, left_padding, tiny_config, tiny_model
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

SCHEDULE = {1: 0.6, 3: 0.3}


def model_of() -> Any:
    return tiny_model(tiny_config(layers=5))


class SlowLazy:
    """One sequence, layer by layer, a dictionary of what each layer has computed."""

    def __init__(self, model: Any, schedule: dict[int, float], revive: bool = True) -> None:
        self.decoder, self.head, self.schedule, self.revive = model.model, model.lm_head, schedule, revive
        self.held: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in self.decoder.layers]
        self.aux: dict[int, dict[int, Tensor]] = {layer: {} for layer in schedule}
        self.seen = 0
        self.counts: list[list[int]] = []

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the newest token."""
        hidden = dict(enumerate(self.decoder.embed_tokens(ids[0]), self.seen))
        self.seen += ids.shape[1]
        attention: dict[int, float] = {}
        counts = []
        for i, layer in enumerate(self.decoder.layers):
            if i in self.schedule:
                hidden = self._choose(i, hidden, attention)
            hidden, attention = self._layer(i, layer, hidden)
            counts.append(len(hidden))
        self.counts.append(counts)
        return self.head(self.decoder.norm(hidden[self.seen - 1][None, None]))[0, 0]

    def _choose(self, i: int, hidden: dict[int, Tensor], attention: dict[int, float]) -> dict[int, Tensor]:
        wanted = -int(-self.schedule[i] * self.seen // 1)
        ranks = {**attention, 0: torch.inf, self.seen - 1: torch.inf}
        best = set(sorted(ranks, key=lambda p: -ranks[p])[:wanted])
        aux = self.aux[i]
        aux.update({p: x for p, x in hidden.items() if p not in best})
        revived = {p for p in aux if p in best} if self.revive else set()
        return {**{p: x for p, x in hidden.items() if p in best}, **{p: aux.pop(p) for p in revived}}

    def _layer(self, i: int, layer: Any, hidden: dict[int, Tensor]) -> tuple[dict[int, Tensor], dict[int, float]]:
        positions = sorted(hidden)
        x = torch.stack([hidden[p] for p in positions])[None]
        attn, normed = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            proj(normed).view(1, len(positions), -1, attn.head_dim).transpose(1, 2)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *self.decoder.rotary_emb(x, torch.tensor([positions])))
        assert not set(positions) & set(self.held[i])  # a layer computes each token at most once
        self.held[i].update({p: (k[0, :, t], v[0, :, t]) for t, p in enumerate(positions)})
        order = sorted(self.held[i])
        keys, values = (torch.stack([self.held[i][p][side] for p in order], 1)[None] for side in (0, 1))
        groups = q.shape[1] // keys.shape[1]
        logits = q @ repeat_kv(keys, groups).transpose(2, 3) * attn.scaling
        hidden_from = torch.tensor([[p > own for p in order] for own in positions])
        weights = logits.masked_fill(hidden_from, -torch.inf).softmax(-1)
        out = (weights @ repeat_kv(values, groups)).transpose(1, 2).reshape(1, len(positions), -1)
        x = x + attn.o_proj(out)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return dict(zip(positions, x[0], strict=True)), dict(
            zip(order, weights[0, :, -1].mean(0).tolist(), strict=True)
        )


@pytest.mark.parametrize("revive", [True, False])
@torch.no_grad()
def test_every_step_computes_what_the_rules_say(revive: bool) -> None:
    model = model_of()
    slow, cache = SlowLazy(model, SCHEDULE, revive), kvpack.PackedCache(model)
    with kvpack.LazyLLM(model, SCHEDULE, revive=revive) as lazy:
        for step in range(12):
            ids = ids_of(1, 41 if step == 0 else 9 if step == 6 else 1)
            before = list(lazy.computed)
            logits = model(ids, past_key_values=cache).logits
            assert torch.allclose(logits[0, -1], slow.forward(ids), atol=1e-4)
            assert [n - m for n, m in zip(lazy.computed, before, strict=True)] == slow.counts[-1]
            for layer in range(5):
                assert cache.kept(layer, 1) == sorted(slow.held[layer])
    assert slow.counts[0] == [41, 25, 25, 13, 13]
    revived = [counts for counts in slow.counts[1:] if max(counts) > counts[0]]
    assert bool(revived) is revive


@pytest.mark.parametrize("schedule", [{}, {1: 1.0, 3: 1.0}])
@pytest.mark.parametrize("mode", ["greedy", "padded", "beams", "turns"])
def test_a_schedule_that_drops_nothing_gives_dense_tokens(schedule: dict[int, float], mode: str) -> None:
    model, batch = model_of(), 2 if mode == "padded" else 1
    inputs = {"input_ids": ids_of(batch, 40), "attention_mask": left_padding([40, 27][:batch])}
    options = {"max_new_tokens": 20, "do_sample": False, **({"num_beams": 3} if mode == "beams" else {})}
    outputs = []
    for lazy in (None, kvpack.LazyLLM(model, schedule)):
        cache = kvpack.PackedCache(model)
        if lazy is None:
            out = model.generate(**inputs, past_key_values=cache, **options)
        else:
            with lazy:
                out = model.generate(**inputs, past_key_values=cache, **options)
        if mode == "turns":
            more = torch.cat([out, torch.full((1, 12), 7)], 1)
            if lazy is None:
                out = model.generate(input_ids=more, past_key_values=cache, **options)
            else:
                with lazy:
                    out = model.generate(input_ids=more, past_key_values=cache, **options)
        outputs.append(out)
    assert torch.equal(*outputs)


@torch.no_grad()
def test_rows_of_a_batch_are_as_single_rows() -> None:
    model, ids = model_of(), ids_of(3, 50)
    cache = kvpack.PackedCache(model)
    with kvpack.LazyLLM(model, SCHEDULE):
        logits = model(ids, past_key_values=cache).logits
        for row in range(3):
            single = kvpack.PackedCache(model)
            assert torch.allclose(model(ids[row : row + 1], past_key_values=single).logits[0], logits[row], atol=1e-4)
            assert [single.kept(layer, 0) for layer in range(5)] == [cache.kept(layer, 0, row) for layer in range(5)]
    assert logits.shape[1] == 1


@torch.no_grad()
def test_pads_are_never_held_and_change_nothing() -> None:
    """The padded row takes as many tokens as the longer one, and so has all of its own."""
    model, ids, mask = model_of(), ids_of(2, 60), left_padding([60, 18])
    cache, schedule = kvpack.PackedCache(model), {2: 0.3}
    dense = kvpack.PackedCache(model)
    expected = model(ids[1:, 42:], past_key_values=dense).logits[0, -1]
    with kvpack.LazyLLM(model, schedule):
        logits = model(ids, past_key_values=cache, attention_mask=mask).logits
        assert torch.allclose(logits[1, -1], expected, atol=1e-4)
        assert cache.kept(3, 0, 1) == list(range(42, 60))
        assert len(cache.kept(3, 0, 0)) == 18
        for _ in range(4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            step = ids_of(2, 1)
            logits = model(step, past_key_values=cache, attention_mask=mask).logits
            expected = model_without(model, step[1:], dense)
            assert torch.allclose(logits[1, -1], expected, atol=1e-4)


def model_without(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """A dense step of the same model within LazyLLM: its hooks set aside."""
    hooks = [(m, m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
    for module, *_ in hooks:
        module._forward_pre_hooks, module._forward_hooks = {}, {}
    try:
        return model(ids, past_key_values=cache).logits[0, -1]
    finally:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_generate(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": None}
    config = AutoConfig.for_model(family, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="kvpack").eval()
    cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=4, window=32, group=16))
    with kvpack.LazyLLM(model, revive=False) as lazy:
        out = model.generate(input_ids=ids_of(1, 120), past_key_values=cache, max_new_tokens=8, min_new_tokens=8)
    assert out.shape[1] == 128
    assert lazy.computed[0] == 127 > lazy.computed[1] > lazy.computed[2]


@torch.no_grad()
def test_the_store_of_hidden_states_is_counted_forked_and_freed() -> None:
    model, ids = model_of(), ids_of(1, 64)
    cache = kvpack.PackedCache(model)
    with kvpack.LazyLLM(model, {2: 0.25}):
        model(ids, past_key_values=cache)
        left_out = 48 * model.config.hidden_size * 4
        assert left_out <= cache.memory().parts["auxiliary"] <= left_out + 64 * 8 * 8
        fork, step = cache.fork(), ids_of(1, 1)
        fork.batch_repeat_interleave(2)
        logits = model(step.expand(2, -1), past_key_values=fork).logits
        assert torch.allclose(logits[0], logits[1])
        assert torch.allclose(model(step, past_key_values=cache).logits[0], logits[0], atol=1e-5)
        fork.reorder_cache(torch.tensor([1, 0]))
        assert fork.kept(3, 0, 0) == fork.kept(3, 0, 1) == cache.kept(3, 0)
        with pytest.raises(kvpack.CropError, match="LazyLLM"):
            cache.crop(-1)
    with pytest.raises(kvpack.OptionError, match="filled within"):
        model(step, past_key_values=cache)
    cache.reset()
    assert cache.memory().total == 0
    assert model(ids, past_key_values=cache).logits.shape[1] == 64


def test_what_does_not_go_together_is_refused() -> None:
    model, ids = model_of(), ids_of(1, 30)
    packed = kvpack.PackedCache(model)
    with kvpack.LazyLLM(model, SCHEDULE):
        for cache, message in (
            (DynamicCache(config=model.config), "given a DynamicCache, expected a PackedCache"),
            (
                kvpack.PackedCache(model, evict=kvpack.KeyDiff(budget=0.5)),
                "needs all tokens .* which KeyDiff breaks",
            ),
        ):
            with pytest.raises(kvpack.OptionError, match=message):
                model(ids, past_key_values=cache)
        with pytest.raises(kvpack.ShapeError, match="pads on the left"):
            model(ids, past_key_values=packed, attention_mask=left_padding([20]).flip(1).new_ones(1, 30).tril(-1))
        with pytest.raises(kvpack.OptionError, match="assisted decoding"):
            model.generate(input_ids=ids, past_key_values=packed, prompt_lookup_num_tokens=3, max_new_tokens=5)
        with pytest.raises(kvpack.OptionError, match="within LazyLLM already"), kvpack.LazyLLM(model):
            pass
    with pytest.raises(kvpack.OptionError, match="attn_implementation='sdpa'"):
        kvpack.LazyLLM(tiny_model(attention="sdpa"))
    with pytest.raises(kvpack.OptionError, match="given one of type 'int'"):
        kvpack.LazyLLM(3)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({0: 0.5}, "layer 0 is not accepted; accepted: 1 to 4"),
        ({5: 0.5}, "layer 5"),
        ({"a": 0.5}, "layer 'a'"),
        ({1: 0.0}, "a share of 0.0"),
        ({1: 0.5, 2: 0.6}, "at most 0.5"),
        (7, "schedule=7"),
    ],
)
def test_bad_schedules_are_named(schedule: Any, message: str) -> None:
    with pytest.raises(kvpack.OptionError, match=message):
        kvpack.LazyLLM(model_of(), schedule)
