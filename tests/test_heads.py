"""KV heads of which less is held: each rung of the ladder, alone and with other methods, in every way of decoding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import kvpack
import pytest
import torch
from kvpack.methods.spec import parse_spec, spell
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
from test_transactions import mixed_model, state
from torch import Tensor

SINKS, WINDOW = 4, 24
LADDER = {(0, 0): "streaming", (0, 1): "compensated", (1, 0): "gone", (1, 1): kvpack.KIVI(bits=2, window=32)}
HEADS = kvpack.Heads(LADDER, sinks=SINKS, window=WINDOW)
CODECS = [kvpack.Exact(), kvpack.KIVI(bits=8, window=16, group=16), kvpack.Q8(window=16), kvpack.Graded()]
GREEDY: dict[str, Any] = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False}


def one_layer(rungs: list[Any], quantize: Any = None, **more: Any) -> kvpack.PackedCache:
    config = tiny_config(layers=1, heads=4, kv_heads=2)
    return kvpack.PackedCache(config, prune=kvpack.Heads([rungs], SINKS, WINDOW), quantize=quantize, **more)


# ---- what is held, and what is read -------------------------------------------------------------------------------


class SlowHead:
    """What a rung says, in plain torch: exact tokens of one KV head, in blocks as kvpack lets them go."""

    def __init__(self, rung: Any) -> None:
        self.rung = rung
        self.key = self.value = torch.empty(0, 32, dtype=torch.float64)
        self.positions: list[int] = []
        self.left: list[tuple[Tensor, Tensor]] = []
        self.seen = 0

    def flush(self, together: int) -> None:
        passed = len(self.positions) - SINKS - WINDOW
        if self.rung in ("streaming", "compensated") and passed >= max(together, 1):
            self.left += [(self.key[t], self.value[t]) for t in range(SINKS, SINKS + passed)]
            stay = [*range(SINKS), *range(SINKS + passed, len(self.positions))]
            self.key, self.value = self.key[stay], self.value[stay]
            self.positions = [self.positions[t] for t in stay]

    def append(self, key: Tensor, value: Tensor) -> None:
        if self.rung != "gone":
            self.key, self.value = torch.cat([self.key, key.double()]), torch.cat([self.value, value.double()])
            self.positions += range(self.seen, self.seen + len(key))
        self.seen += len(key)

    def attend(self, query: Tensor) -> Tensor:
        """Outputs `[G, q, D]` of queries `[G, q, D]` of the newest tokens."""
        if not self.positions:
            return torch.zeros_like(query, dtype=torch.float64)
        new = query.shape[1]
        logits = query.double() @ self.key.T / 32**0.5
        at = torch.tensor(self.positions)
        logits = logits.masked_fill(at[None, :] > torch.arange(self.seen - new, self.seen)[:, None], -torch.inf)
        value = self.value
        if self.rung == "compensated" and self.left:
            mean_key, mean_value = (torch.stack(part).mean(0) for part in zip(*self.left, strict=True))
            slot = query.double() @ mean_key / 32**0.5 + torch.tensor(float(len(self.left))).log()
            logits, value = torch.cat([slot[..., None], logits], -1), torch.cat([mean_value[None], value])
        return logits.softmax(-1) @ value


@pytest.mark.parametrize("rungs", [["streaming", "full"], ["compensated", "gone"], ["gone", "compensated"]])
@pytest.mark.parametrize("prompt", [20, 27, 28, 29, 31, 150])
def test_each_rung_is_what_its_equation_says(rungs: list[str], prompt: int) -> None:
    cache, slow = one_layer(rungs), [SlowHead(rung) for rung in rungs]
    for step, n in enumerate([prompt, *[1] * 9, 5, 1, 17, *[1] * 12, 60, 1]):
        key, value = random_kv(1, 2, n, 32)
        query = torch.randn(1, 4, n, 32)
        for head in slow:
            head.flush(together=1 if step == 1 else WINDOW // 8)  # of a first prompt just so many tokens are stored
        out = forward(cache, key, value, query)[0].transpose(0, 1)
        for h, head in enumerate(slow):
            head.append(key[0, h], value[0, h])
            want = head.attend(query[0, 2 * h : 2 * h + 2])
            if head.rung == "gone":
                assert out[2 * h : 2 * h + 2].abs().max() == 0
                continue
            assert relative_error(out[2 * h : 2 * h + 2], want) < 1e-5
            if step:
                assert cache.kept(0, h) == head.positions


def test_a_head_that_is_gone_gives_nothing_to_a_first_prompt_either() -> None:
    cache = one_layer(["gone", "full"])
    key, value = random_kv(1, 2, 40, 32)
    out = forward(cache, key, value, torch.randn(1, 4, 40, 32))
    assert out[:, :, :2].abs().max() == 0
    assert out[:, :, 2:].abs().max() > 0


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_streaming_heads_read_what_they_hold_with_every_codec(codec: Any) -> None:
    cache = one_layer(["streaming", "full"], codec)
    key, value = random_kv(1, 2, 203, 32)
    forward(cache, key, value, torch.randn(1, 4, 203, 32))
    for step in range(60):
        n = 1 if step % 9 else 5
        new_key, new_value = random_kv(1, 2, n, 32)
        query = torch.randn(1, 4, n, 32)
        out = forward(cache, new_key, new_value, query)
        held = cache.kept(0, 0)
        seen = cache.get_seq_length()
        assert held[:SINKS] == list(range(SINKS))
        assert held[-WINDOW:] == list(range(seen - WINDOW, seen))
        assert len(held) <= SINKS + WINDOW + WINDOW // 8 + 5 + (0 if isinstance(codec, kvpack.Exact) else 64)
        if step % 10 == 0:
            layer = cache.layers[0]
            visible = torch.ones(n, seen, dtype=torch.bool).tril(seen - n)[:, held]
            want = attention(query[0, :2], layer.keys[0, :1, held], layer.values[0, :1, held], visible)
            assert relative_error(out[0].transpose(0, 1)[:2], want.transpose(0, 1)) < 1e-4


def test_all_heads_full_changes_nothing() -> None:
    for ladder in ({}, [["full", "full"]] * 2):
        model = tiny_model()
        ids = ids_of(1, 60)
        want = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=4, window=32))
        got = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=4, window=32), prune=kvpack.Heads(ladder))
        expected = model.generate(input_ids=ids, past_key_values=want, **GREEDY)
        assert torch.equal(model.generate(input_ids=ids, past_key_values=got, **GREEDY), expected)
        assert got.memory() == want.memory()


def test_bytes_are_those_of_the_tokens_that_are_held() -> None:
    key, value = random_kv(1, 2, 4000, 32)
    query = torch.randn(1, 4, 4000, 32)
    exact = {}
    for rungs in (["full", "full"], ["streaming", "full"], ["compensated", "full"], ["gone", "full"]):
        cache = one_layer(rungs)
        forward(cache, key, value, query)
        cache.store.settle_forward()
        exact[rungs[0]] = cache.memory().parts["exact"]
    token = 2 * 32 * 4
    room = 16 * token  # of each head, for tokens to come
    assert exact["full"] == 2 * (4000 * token + room)
    assert exact["gone"] == 4000 * token + room
    assert 0 <= exact["streaming"] - (4000 + SINKS + WINDOW) * token - room <= room
    assert 0 < exact["compensated"] - exact["streaming"] < 2 * token


def test_own_codecs_are_as_small_as_they_are_elsewhere() -> None:
    key, value = random_kv(1, 2, 4000, 32)
    query = torch.randn(1, 4, 4000, 32)
    total = {}
    for name, rungs in (("mixed", [kvpack.KIVI(bits=2), "full"]), ("two", [kvpack.KIVI(bits=2)] * 2), ("q8", ["full"])):
        cache = one_layer(rungs, kvpack.Q8())
        forward(cache, key, value, query)
        total[name] = cache.memory().total
    assert total["mixed"] == pytest.approx((total["two"] + total["q8"]) / 2, rel=0.01)


# ---- every way of decoding ----------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("codec", CODECS[:2], ids=lambda codec: codec.name)
def test_every_way_of_generating(mode: str, codec: Any) -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model, prune=HEADS, quantize=codec)
    out = generated(model, cache, mode, 90, 50)
    assert len(cache.kept(0, 0)) < SINKS + WINDOW + 40
    assert len(cache.kept(1, 0)) == 0
    assert len(cache.kept(1, 1)) == out.shape[1] - 1


def test_guesses_change_no_token() -> None:
    model = tiny_model()
    ids = ids_of(1, 12).repeat(1, 6)
    found = []
    for guesses in (None, 4):
        cache = kvpack.PackedCache(model, prune=kvpack.Heads(LADDER, sinks=SINKS, window=200))
        found.append(model.generate(input_ids=ids, past_key_values=cache, prompt_lookup_num_tokens=guesses, **GREEDY))
    assert torch.equal(*found)


@pytest.mark.parametrize("rung", ["streaming", "compensated", "gone", "kivi:bits=4:group=16:window=16"])
def test_rows_of_a_padded_batch_are_single_rows(rung: str) -> None:
    prune = kvpack.Heads({(0, 0): rung, (1, 1): rung}, SINKS, WINDOW)
    model = tiny_model()
    ids = ids_of(2, 90)
    batch = kvpack.PackedCache(model, prune=prune)
    both = model(input_ids=ids, attention_mask=left_padding([90, 70]), past_key_values=batch)
    more = ids_of(2, 40)
    mask = torch.cat([left_padding([90, 70]), torch.ones(2, 40, dtype=torch.long)], 1)
    both = torch.cat(
        [model(more[:, :20], attention_mask=mask[:, :110], past_key_values=batch).logits]
        + [
            model(more[:, i : i + 1], attention_mask=mask[:, : 111 + i - 20], past_key_values=batch).logits
            for i in range(20, 40)
        ],
        1,
    )
    for row, pads in ((0, 0), (1, 20)):
        cache = kvpack.PackedCache(model, prune=prune)
        model(input_ids=ids[row : row + 1, pads:], past_key_values=cache)
        single = [model(more[row : row + 1, :20], past_key_values=cache).logits]
        single += [model(more[row : row + 1, i : i + 1], past_key_values=cache).logits for i in range(20, 40)]
        # A code that is rounded the other way moves the logits of four bits by more than the order of sums does.
        assert (torch.cat(single, 1) - both[row]).abs().max() < (1e-3 if "kivi" in rung else 1e-4)
        for layer, head in ((0, 0), (1, 1)):
            assert [t + pads for t in cache.kept(layer, head)] == batch.kept(layer, head, row)


def test_what_left_is_not_brought_back_by_a_crop() -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model, prune=HEADS)
    ids = ids_of(1, 100)
    model(input_ids=ids[:, :60], past_key_values=cache)
    before = copy.deepcopy(cache)
    model(input_ids=ids[:, 60:65], past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 60
    again = model(input_ids=ids[:, 65:70], past_key_values=cache).logits
    assert torch.equal(again, model(input_ids=ids[:, 65:70], past_key_values=before).logits)
    with pytest.raises(kvpack.CropError):
        cache.crop(-40)
    assert cache.get_seq_length() == 65


def test_forks_copies_and_pickles_go_on_alike() -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model, prune=HEADS, quantize=kvpack.KIVI(bits=8, window=16, group=16))
    model(input_ids=ids_of(1, 90), past_key_values=cache)
    ids = ids_of(1, 60)
    outputs = [
        [model(ids[:, i : i + 1], past_key_values=each).logits for i in range(60)]
        for each in (cache.fork(), copy.deepcopy(cache), cache)
    ]
    for other in outputs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outputs[0], other, strict=True))
    assert pickle.loads(pickle.dumps(HEADS)) == HEADS


@pytest.mark.parametrize("evict", ["snapkv:budget=0.3:window=8", "h2o:budget=40:block=8", "adakv(keydiff:budget=0.4)"])
def test_evictions_choose_among_the_other_heads(evict: str) -> None:
    model = tiny_model()
    method = parse_spec(evict).options["evict"]
    ladder = {(0, 0): "compensated", (1, 0): "gone"}
    cache = kvpack.PackedCache(model, evict=method, prune=kvpack.Heads(ladder, SINKS, WINDOW))
    model.generate(input_ids=ids_of(1, 120), past_key_values=cache, **GREEDY)
    assert SINKS + WINDOW <= len(cache.kept(0, 0)) < SINKS + WINDOW + 3
    assert len(cache.kept(1, 0)) == 0
    alone = kvpack.PackedCache(model, evict=method)
    model(input_ids=ids_of(1, 120), past_key_values=alone)
    if "adakv" not in evict:
        fresh = kvpack.PackedCache(model, evict=method, prune=kvpack.Heads(ladder, SINKS, WINDOW))
        model(input_ids=ids_of(1, 120), past_key_values=fresh)
        alone.store.settle_forward()
        fresh.store.settle_forward()
        assert len(fresh.kept(0, 1)) == len(alone.kept(0, 1))


def test_quest_reads_pages_of_heads_that_hold_all() -> None:
    model = tiny_model()
    caches = [kvpack.PackedCache(model, prune=HEADS, select=select) for select in (kvpack.Quest(budget=100_000), None)]
    ids = ids_of(1, 340)
    for part in ids.split([300, *[1] * 40], dim=1):
        chosen, whole = (model(part, past_key_values=cache).logits for cache in caches)
        assert (chosen - whole).abs().max() < 1e-5


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_forward_that_fails_leaves_no_trace(layer: int) -> None:
    model = mixed_model()
    ladder = {(0, 0): "compensated", (1, 1): "gone", (3, 0): "streaming"}
    cache = kvpack.PackedCache(model, prune=kvpack.Heads(ladder, sinks=SINKS, window=WINDOW))
    ids = torch.arange(1, 100)[None] % 120
    model(input_ids=ids[:, :70], past_key_values=cache)
    for n in (1, 5, 60):
        expected = model(input_ids=ids[:, 30 : 30 + n], past_key_values=cache.fork()).logits
        before = state(cache)
        hook = model.model.layers[layer].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids[:, 30 : 30 + n], past_key_values=cache)
        hook.remove()
        assert state(cache)[:3] == before[:3]
        assert torch.equal(model(input_ids=ids[:, 30 : 30 + n], past_key_values=cache).logits, expected)


# ---- from a cache, a mask, a text ---------------------------------------------------------------------------------


def test_a_sheared_model_and_its_mask_are_one() -> None:
    """A model whose weights were cut to fewer heads is one of more heads of which the others are gone."""
    big = tiny_model(tiny_config(layers=2, heads=4, kv_heads=4, hidden_size=48))
    small = tiny_model(tiny_config(layers=2, heads=3, kv_heads=3, hidden_size=48))
    weights = big.state_dict()
    for name in list(weights):
        if "o_proj" in name:
            weights[name] = weights[name][:, :96]
        elif "self_attn" in name:
            weights[name] = weights[name][:96]
    small.load_state_dict(weights)
    ids = ids_of(1, 60)
    mask = torch.tensor([[True, True, True, False]] * 2)
    masked = big.generate(
        input_ids=ids, past_key_values=kvpack.PackedCache(big, prune=kvpack.Heads.masked(mask)), **GREEDY
    )
    sheared = kvpack.PackedCache(small)
    assert torch.equal(small.generate(input_ids=ids, past_key_values=sheared, **GREEDY), masked)


def test_as_text() -> None:
    text = "heads:ladder={(0, 0): 'streaming', (1, 0): 'kivi:bits=2'}:window=64"
    found = parse_spec(f"{text}+kivi:bits=4").options
    assert found["prune"] == kvpack.Heads({(0, 0): "streaming", (1, 0): kvpack.KIVI(bits=2)}, window=64)
    assert parse_spec(spell(found["prune"])).options["prune"] == found["prune"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ladder": {(0, 0): "half"}}, "'half' for .0, 0. is not accepted; accepted: 'full', 'streaming'"),
        ({"ladder": {(0, 0): "snapkv"}}, "'snapkv'"),
        ({"ladder": {(0, -1): "gone"}}, "rungs by .layer, KV head."),
        ({"ladder": {0: "gone"}}, "rungs by .layer, KV head."),
        ({"ladder": ["gone"]}, "'gone' for layer 0"),
        ({"ladder": 3}, "ladder=3"),
        ({"window": 0}, "window=0"),
        ({"sinks": -1}, "sinks=-1"),
    ],
)
def test_what_is_no_ladder_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(kvpack.OptionError, match=words):
        kvpack.Heads(**options)


def test_what_does_not_fit_the_model_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(kvpack.OptionError, match=r"layer 7 is not accepted: the model has 2 layers; .* 0 to 1"):
        kvpack.PackedCache(model, prune=kvpack.Heads({(7, 0): "gone"}))
    cache = kvpack.PackedCache(model, prune=kvpack.Heads({(0, 2): "gone"}))
    with pytest.raises(kvpack.OptionError, match=r"KV head 2.*below 2"):
        model(input_ids=ids_of(1, 9), past_key_values=cache)
    with pytest.raises(kvpack.OptionError, match="KVQuant needs consecutive positions"):
        kvpack.PackedCache(model, quantize=kvpack.KVQuant(), prune=HEADS)
    with pytest.raises(kvpack.OptionError, match="TOVA needs as many tokens in each head"):
        kvpack.PackedCache(model, evict=kvpack.TOVA(), prune=HEADS)
    sliding = mixed_model()
    with pytest.raises(kvpack.OptionError, match="layer 1, which has a sliding window of 16"):
        kvpack.PackedCache(sliding, prune=kvpack.Heads({(1, 0): "streaming"}))
    with pytest.raises(kvpack.OptionError, match="mask="):
        kvpack.Heads.masked([[0.5]])
    with kvpack.LazyLLM(model), pytest.raises(kvpack.OptionError, match="some of its heads hold nothing"):
        model(ids_of(1, 40), past_key_values=kvpack.PackedCache(model, prune=kvpack.Heads({(0, 0): "gone"})))
    eager = tiny_model(attention="sdpa")
    with pytest.raises(kvpack.OptionError, match="prune=heads that hold some of their tokens"):
        eager.generate(input_ids=ids_of(1, 40), past_key_values=kvpack.PackedCache(eager, prune=HEADS), **GREEDY)


def test_attach_and_from_cache_take_it() -> None:
    model = tiny_model()
    ids = ids_of(1, 60)
    cache = kvpack.PackedCache(model, prune=HEADS)
    expected = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    with kvpack.attach(model, prune=HEADS) as handle:
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)
        assert handle.cache.prune == HEADS
    out = model.generate(input_ids=ids, custom_generate=kvpack.generate, prune=HEADS, **GREEDY)
    assert torch.equal(out, expected)
    plain = model(input_ids=ids, use_cache=True).past_key_values
    packed = kvpack.PackedCache.from_cache(plain, model, prune=HEADS)
    assert packed.kept(0, 0) == [*range(SINKS), *range(60 - WINDOW, 60)]
    assert len(packed.kept(1, 0)) == 0
