"""Evaluation: the arithmetic on small models, resuming, refusing; and that the tasks tell good caches from bad."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpack
import pytest
import torch
from evaluations import METHODS, SMALL, WORDS, rows
from kvpack.evaluation import Evaluation, evaluate
from kvpack.evaluation.contenders import held_bytes, parse, parse_all
from kvpack.evaluation.greedy import equal_prefix
from kvpack.evaluation.intervals import quantile
from kvpack.evaluation.peak import PeakMemory
from kvpack.evaluation.pictures import pareto, pareto_front
from kvpack.methods import EVICT
from support import small_model


@pytest.fixture(scope="module")
def result(tokenizer: Any) -> Evaluation:
    with torch.no_grad():
        return evaluate(small_model(), tokenizer, WORDS, METHODS, progress=False, **SMALL)


def test_full_perplexity_is_the_models_own(result: Evaluation, tokenizer: Any) -> None:
    model = small_model()
    model.set_attn_implementation("sdpa")
    ids = torch.tensor(tokenizer(WORDS).input_ids[:1200]).reshape(4, 300)
    losses = [model(document[None], labels=document[None]).loss.item() for document in ids]
    assert rows(result)["full"]["perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)
    assert rows(result)["full"]["tokens"] == 4 * 299


def test_exact_loses_nothing_and_kivi_more_with_fewer_bits(result: Evaluation) -> None:
    by_method = rows(result)
    assert by_method["exact"]["kl"] < 1e-9  # float32 rounding, squared
    assert by_method["exact"]["agreement"] == 1
    assert by_method["exact"]["greedy"] == by_method["exact"]["greedy_of"] == 6
    assert by_method["exact"]["lossy"] == by_method["full"]["lossy"] == 0
    losses = [by_method[f"kivi:bits={bits}"]["kl"] for bits in (8, 4, 2)]
    assert 0 < losses[0] < losses[1] < losses[2]
    for method, row in by_method.items():
        if method != "full":
            assert row["kl_low"] <= row["kl"] <= row["kl_high"]
            assert row["agreement_low"] <= row["agreement"] <= row["agreement_high"]
    # The past of 0, 64, ... 256 tokens: four sinks are exact, keys are packed by 128, values but for the newest 128.
    keys, values = [0, 0, 0, 128, 128], [0, 0, 0, 192 - 132, 256 - 132]
    past = [(k + v) / (2 * 64 * max(i, 1)) for i, (k, v) in enumerate(zip(keys, values, strict=True))]
    expected = sum(share * n for share, n in zip(past, [64, 64, 64, 64, 43], strict=True)) / 299
    assert by_method["kivi:bits=2"]["lossy"] == pytest.approx(expected, abs=1e-4)
    errors = {r["method"]: r["errors"] for r in result.records if r["kind"] == "layers"}
    assert all(a < b < c for a, b, c in zip(*(errors[f"kivi:bits={bits}"] for bits in (8, 4, 2)), strict=True))
    assert max(errors["exact"]) < 1e-5


def test_bytes_are_what_memory_says(result: Evaluation, tokenizer: Any) -> None:
    model = small_model()
    ids = torch.tensor(tokenizer(WORDS).input_ids[:300])
    for bits in (8, 2):
        cache = kvpack.PackedCache(model, quantize=kvpack.KIVI(bits=bits))
        for new in (ids, *ids[-1:].repeat(4).split(1)):
            model(new[None], past_key_values=cache)
        row = rows(result)[f"kivi:bits={bits}"]
        assert row["bytes_per_token"] == pytest.approx(cache.memory().total / 304, abs=0.01)
        assert row["of_fp16"] == pytest.approx(cache.memory().total / (304 * 2 * 2 * 2 * 32 * 2))


def test_kl_is_of_the_next_tokens_distribution(tokenizer: Any) -> None:
    """Against the plain formula, for a cache that forgets."""
    model = small_model()
    result = evaluate(
        model,
        tokenizer,
        WORDS,
        "window:tokens=40",
        progress=False,
        context=200,
        tokens=200,
        chunk=50,
        greedy=0,
        costs=False,
    )
    model.set_attn_implementation("sdpa")
    ids = torch.tensor(tokenizer(WORDS).input_ids[:200])
    p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    # A chunk's tokens see the chunk so far and the 40 tokens before it.
    mask = torch.ones(200, 200, dtype=torch.bool).tril()
    for first in range(0, 200, 50):
        mask[first : first + 50, : max(first - 40, 0)] = False
    q = model(ids[None], attention_mask=mask[None, None]).logits[0, :-1].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    row = rows(result)["window:tokens=40"]
    assert row["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert row["kl_p95"] == pytest.approx(float(kl.quantile(0.95)), rel=1e-2)
    assert row["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_the_window_holds_its_tokens_and_no_more(tokenizer: Any) -> None:
    model = small_model()
    model.set_attn_implementation("sdpa")
    contender = parse("window:tokens=64")
    cache = contender.new_cache(model)
    model(torch.randint(3, 99, (1, 300)), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [64, 64]
    model(torch.randint(3, 99, (1, 1)), past_key_values=cache)
    full = parse_all("window:tokens=1000")[0].new_cache(model)
    model(torch.randint(3, 99, (1, 65)), past_key_values=full)
    assert held_bytes(cache) == held_bytes(full) > 2 * 2 * 65 * 2 * 32 * 4


def test_a_model_is_as_it_was_afterwards(tokenizer: Any) -> None:
    model = small_model().train()
    model.set_attn_implementation("eager")
    evaluate(model, tokenizer, WORDS, "exact", progress=False, context=64, tokens=64, greedy=0, costs=False)
    assert model.training
    assert model.config._attn_implementation == "eager"


def test_tasks_tell_a_cache_that_forgets(float32_models: SimpleNamespace, tokenizer: Any, document: str) -> None:
    result = evaluate(
        float32_models.reference,
        tokenizer,
        document,
        "kivi:bits=8,window:tokens=128",
        progress=False,
        context=512,
        tokens=512,
        greedy=0,
        costs=False,
        tasks=["passkey"],
        task_contexts=[512],
        depths=[0.1, 0.4, 0.6, 0.9],
        samples=1,
    )
    scores = {method: row["task_passkey"] for method, row in rows(result).items()}
    assert scores["full"] == scores["kivi:bits=8"] == 1
    assert scores["window:tokens=128"] == 0.25  # the needle in the last quarter


def test_a_question_in_the_prompt_says_what_to_keep(
    float32_models: SimpleNamespace, tokenizer: Any, document: str
) -> None:
    scores = {}
    for ask in ("with", "after"):
        result = evaluate(
            float32_models.reference,
            tokenizer,
            document,
            "snapkv:budget=0.1:window=8" + (",expected:budget=0.5" if ask == "with" else ""),
            progress=False,
            context=256,
            tokens=256,
            greedy=0,
            costs=False,
            tasks=["passkey"],
            task_contexts=[1024],
            depths=[0.2, 0.5],
            samples=1,
            ask=ask,
        )
        scores[ask] = {method: row["task_passkey"] for method, row in rows(result).items()}
        assert ("end of the prompt" in result.markdown()) == (ask == "with")
    assert scores["with"]["full"] == scores["after"]["full"] == 1
    assert scores["with"]["snapkv:budget=0.1:window=8"] == 1 > scores["after"]["snapkv:budget=0.1:window=8"]
    assert "expected:budget=0.5" in scores["with"]


def test_reports_are_made_again_from_the_numbers(result: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(result.identity))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in result.records))
    loaded = Evaluation.load(tmp_path)
    assert loaded.rows == result.rows
    assert loaded.markdown() == result.markdown()
    files = {path.name for path in loaded.save(tmp_path / "again")}
    assert {"leaderboard.md", "kl-bytes.png", "kl-ms.png", "layers.png"} == files
    assert "<table>" in loaded._repr_html_()
    for row in loaded.rows:
        assert row["method"] in str(loaded)


def test_costs_of_methods_that_look_at_queries_are_measured(tokenizer: Any) -> None:
    """All evictions there are: by queries their packing is part of the prompt's forward, and has no time of its own."""
    settings = {name: method.standard[0] for name, method in EVICT.items() if method.standard}
    settings["adakv"] = "adakv(snapkv:budget=0.5)"
    methods = [*settings.values(), "snapkv:budget=0.5+kivi:bits=4:window=32", "quest:budget=0.5"]
    result = evaluate(
        small_model(), tokenizer, WORDS, methods, progress=False, context=200, tokens=200, chunk=64, greedy=3
    )
    assert set(settings) == set(EVICT) - {"scored"}  # a function's cost is its own
    for method in methods:
        row = rows(result)[method]
        assert row["ms"] > 0
        assert row["prefill_ms"] > 0
        by_queries = any(name in method for name in ("snapkv", "pyramidkv", "h2o", "a2sf", "tova", "expected"))
        assert (row["pack_ms"] is None) == by_queries
    assert "part of their prefill" in result.markdown()


def test_the_table_so_far_is_shown(tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    result = evaluate(small_model(), tokenizer, WORDS, "exact,kivi:bits=2", **(SMALL | {"costs": False}))
    shown = capfd.readouterr()
    assert shown.out == ""
    tables = shown.err.split("so far, ")[1:]
    assert 2 <= len(tables) <= 8
    assert all("kivi:bits=2" in table and "KL, nats" in table for table in tables)
    assert "(too few)" in tables[0]
    assert next(line for line in str(result).splitlines() if "perplexity" in line) not in tables[0]


def test_times_are_drawn_with_their_spread_and_no_front() -> None:
    measured = {"kl_low": 1e-3, "kl_high": 4e-3, "bytes_per_token": 100.0, "ms": 10.0, "ms_p10": 9.0, "ms_p90": 13.0}
    methods = [{"method": f"m{i}", "kl": 2e-3 + i * 1e-3, **measured} for i in range(3)]
    methods.append({"method": "few", "kl": 5e-3, **{n: x for n, x in measured.items() if not n.startswith("kl")}})
    full = {"method": "full", "bytes_per_token": 400.0, "ms": 11.0, "ms_p10": 10.0, "ms_p90": 12.0}
    for against, front, bars in (("bytes", True, 3), ("ms", False, 7)):
        axes = pareto([full, *methods], {}, against).axes[0]
        assert ("Pareto front" in axes.get_legend_handles_labels()[1]) == front
        assert len(axes.collections) == bars  # of KL where there are enough documents, of times always
    across = [c.get_segments()[0] for c in axes.collections if c.get_segments()[0][0][1] == c.get_segments()[0][1][1]]
    assert [(segment[0][0], segment[1][0]) for segment in across] == [(9, 13)] * 4


def test_the_peak_is_what_was_held_meanwhile() -> None:
    with PeakMemory() as peak:
        torch.ones(50_000_000)  # 200 MB, given back at once
    assert peak.bytes is not None
    assert 195e6 < peak.bytes < 230e6  # the system counts in batches


def test_small_arithmetic() -> None:
    assert quantile([0, 1, 2, 3], 0.5) == 1.5
    assert pareto_front([(1, 5), (2, 3), (3, 4), (4, 1)]) == [(1, 5), (2, 3), (4, 1)]
    assert equal_prefix([1, 2, 3], [1, 2, 4]) == equal_prefix([1, 2], [1, 2, 4]) == 2
