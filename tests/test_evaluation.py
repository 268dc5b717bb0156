"""Evaluation: the arithmetic on small models, resuming, refusing; and that the tasks tell good caches from bad."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpack
import pytest
import torch
from kvpack.evaluation import Evaluation, evaluate
from kvpack.evaluation.contenders import Quantized, held_bytes, parse, parse_all
from kvpack.evaluation.greedy import equal_prefix
from kvpack.evaluation.intervals import quantile
from kvpack.evaluation.peak import PeakMemory
from kvpack.evaluation.pictures import pareto, pareto_front
from kvpack.evaluation.settings import weights
from kvpack.evaluation.store import Store, read
from kvpack.methods import EVICT
from kvpack.methods.quantize.calibrated import identity as calibration_identity
from kvpack.methods.quantize.calibrated import write as write_calibration
from support import tiny_config, tiny_model
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache

WORDS = "The harbour was quiet. A boat came in, and nobody spoke of it! " * 200
METHODS = "exact,kivi:bits=8,kivi:bits=4,kivi:bits=2"
SMALL: dict[str, Any] = {"context": 300, "tokens": 1200, "chunk": 64, "greedy": 6, "greedy_prompts": 2}


def small_model() -> Any:
    """A random model with the test model's vocabulary, whose predictions are not all alike."""
    return tiny_model(tiny_config(vocab_size=49_152, initializer_range=0.2, max_position_embeddings=4096))


@pytest.fixture(scope="module")
def result(tokenizer: Any) -> Evaluation:
    with torch.no_grad():
        return evaluate(small_model(), tokenizer, WORDS, METHODS, progress=False, **SMALL)


def rows(result: Evaluation) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in result.rows}


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


# ---- on disk -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A saved model, its tokenizer and a text."""
    path = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "text.txt").write_text(WORDS)
    return path


def command(folder: Path, out: Path, *more: str, text: Path | None = None) -> list[str]:
    sizes = ["--context", "300", "--tokens", "900", "--chunk", "32", "--greedy", "5", "--threads", "1"]
    tasks = ["--tasks", "passkey", "--task-contexts", "160", "--samples", "1"]
    program = [
        sys.executable,
        "-m",
        "kvpack.cli",
        "eval",
        "--model",
        str(folder),
        "--text",
        str(text or folder / "text.txt"),
    ]
    return [*program, "--methods", METHODS, "--out", str(out), *sizes, *tasks, *more]


def numbers(out: Path) -> dict[tuple[Any, ...], Any]:
    """All that is not a time, and so must be the same in every run."""
    timed = {"full_ms", "ms", "median_ms", "prefill_ms", "pack_ms", "peak_bytes"}
    return {
        (r["kind"], r["method"], r.get("document"), r.get("task"), r.get("depth")): {
            name: value for name, value in r.items() if name not in timed
        }
        for r in read(out / "results.jsonl")
    }


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(folder, whole), check=True, capture_output=True)
    for wanted in (2, 9):
        process = subprocess.Popen(command(folder, killed), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        lines = killed / "results.jsonl"
        while process.poll() is None and not (lines.exists() and lines.read_text().count("\n") >= wanted):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with (killed / "results.jsonl").open("a") as file:
        file.write('{"kind": "text", "method": "ex')  # as a kill in the middle of a line leaves it
    before = numbers(killed)
    done = subprocess.run(command(folder, killed), check=True, capture_output=True, text=True)
    assert len(before) < len(numbers(whole))
    assert numbers(killed) == numbers(whole)
    assert "leaderboard.md" in done.stdout
    for name in ("leaderboard.md", "kl-bytes.png", "kl-ms.png", "task-passkey.png", "layers.png"):
        assert (killed / name).stat().st_size > 100


class Fragile(Quantized):
    """transformers' cache with a backend that cannot read some prompts."""

    backend, module, package, axis = "fragile", "torch", "torch", 0

    def new_cache(self, model: Any) -> Any:
        cache = DynamicCache(config=getattr(model, "config", model))
        update = cache.update

        def failing(keys: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if keys.shape[2] > 128:
                raise RuntimeError("an odd number\nof tokens")
            return update(keys, *args, **kwargs)

        cache.update = failing  # type: ignore[method-assign]
        return cache


def test_a_reference_that_fails_does_not_end_the_run(tokenizer: Any) -> None:
    sizes: dict[str, Any] = {
        "context": 300,
        "tokens": 300,
        "chunk": 64,
        "greedy": 4,
        "greedy_prompts": 1,
        "costs": False,
    }
    tasks: dict[str, Any] = {"tasks": ("passkey",), "task_contexts": (128, 256), "depths": (0.5,), "samples": 1}
    contenders = [*parse_all("exact"), Fragile()]
    result = evaluate(small_model(), tokenizer, WORDS, contenders, progress=False, **sizes, **tasks)
    failed = [record for record in result.records if "failed" in record]
    assert {(record["kind"], record["method"]) for record in failed} == {
        ("greedy", "fragile:bits=4"),
        ("task", "fragile:bits=4"),
    }
    assert failed[0]["failed"] == "RuntimeError: an odd number"
    row = rows(result)["fragile:bits=4"]
    assert (row["task_samples"], row["task_failed"]) == (1, 1)
    assert "greedy" not in row
    assert "fragile:bits=4: 1" in result.markdown()


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


def test_another_text_is_not_mixed_in(tokenizer: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"context": 64, "tokens": 64, "greedy": 0, "costs": False, "progress": False}
    evaluate(small_model(), tokenizer, WORDS, "exact", out=tmp_path, **sizes)
    with pytest.raises(kvpack.OptionError, match="text="):
        evaluate(small_model(), tokenizer, WORDS + "!", "exact", out=tmp_path, **sizes)


def test_what_changed_is_named_and_the_text_only_when_it_did(tokenizer: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"context": 64, "greedy": 0, "costs": False, "progress": False}
    evaluate(small_model(), tokenizer, WORDS, "exact", out=tmp_path, tokens=64, **sizes)
    for changed in ({"tokens": 128}, {"tokens": 128, "context": 128}, {"chunk": 32}):
        with pytest.raises(kvpack.OptionError) as refused:
            evaluate(small_model(), tokenizer, WORDS, "exact", out=tmp_path, **({"tokens": 64} | sizes | changed))
        for name, value in changed.items():
            assert f"{name}={value}" in str(refused.value).partition("this run has")[2]
        assert " text=" not in str(refused.value)


def test_results_of_other_weights_are_not_taken(tokenizer: Any, tmp_path: Path) -> None:
    """Each change by itself: another checkpoint, a single number, a shape of the same bytes."""
    sizes: dict[str, Any] = {"context": 64, "tokens": 64, "greedy": 0, "costs": False, "progress": False}
    first = evaluate(small_model(), tokenizer, WORDS, "exact", out=tmp_path, **sizes)
    assert evaluate(small_model(), tokenizer, WORDS, "exact", out=tmp_path, **sizes).records == first.records
    other = tiny_model(small_model().config, seed=1)
    nudged = small_model()
    nudged.model.layers[1].mlp.up_proj.weight[17, 33] += 1e-3
    for model in (other, nudged):
        before = (tmp_path / "results.jsonl").read_bytes()
        with pytest.raises(kvpack.OptionError, match="other weights"):
            evaluate(model, tokenizer, WORDS, "exact,kivi:bits=4", out=tmp_path, **sizes)
        assert (tmp_path / "results.jsonl").read_bytes() == before


def test_weights_are_known_by_every_number_name_dtype_and_shape() -> None:
    base = torch.nn.Linear(40, 300)
    known = {weights(base)}
    for tensor in (base.weight, base.bias):
        for at in (0, 1, tensor.numel() // 2 + 1, tensor.numel() - 1):
            changed = copy.deepcopy(base)
            dict(changed.named_parameters())["weight" if tensor is base.weight else "bias"].data.view(-1)[at] += 1e-3
            known.add(weights(changed))
    swapped = copy.deepcopy(base)  # the same numbers, and so the same sum
    swapped.weight.data[[0, 1]] = base.weight.data[[1, 0]]
    turned = torch.nn.Linear(300, 40, bias=False)
    turned.bias = base.bias
    turned.weight.data = base.weight.data.view(40, 300)
    known |= {weights(swapped), weights(turned), weights(copy.deepcopy(base).half())}
    assert len(known) == 12
    assert weights(copy.deepcopy(base)) in known
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert weights(base.to(dtype)) == weights(copy.deepcopy(base))
    wrapped = {TwoTensor(base.weight.detach().float(), torch.full((300, 40), float(x))) for x in (0, 1)}
    assert len({weights(nn_of(tensor)) for tensor in wrapped}) == 2
    assert weights(torch.nn.Linear(3, 4, device="meta")) != weights(torch.nn.Linear(4, 3, device="meta"))


def nn_of(tensor: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer("weight", tensor)
    return module


def test_a_calibration_made_anew_is_not_mixed_in(tokenizer: Any, tmp_path: Path) -> None:
    def calibrated(layer: str) -> None:
        model = small_model()
        header = {"method": "bits", "layers": {"0": layer, "1": layer}, "model": calibration_identity(model)}
        write_calibration(tmp_path / "a.safetensors", header, {"losses": torch.zeros(1)})

    sizes: dict[str, Any] = {"context": 200, "tokens": 200, "chunk": 50, "greedy": 0, "costs": False, "progress": False}
    text = f"calibrated:path={tmp_path / 'a.safetensors'}"
    out = tmp_path / "out"
    calibrated("kivi:bits=8:window=32")
    evaluate(small_model(), tokenizer, WORDS, [text, "exact"], out=out, **sizes)
    first = evaluate(small_model(), tokenizer, WORDS, [text, "exact"], out=out, **sizes)
    calibrated("kivi:bits=2:window=32")
    for methods in ([text], ["exact", text], ["kivi:bits=2", text]):
        with pytest.raises(kvpack.OptionError, match="made anew"):
            evaluate(small_model(), tokenizer, WORDS, methods, out=out, **sizes)
    anew = evaluate(small_model(), tokenizer, WORDS, [text, "exact"], out=tmp_path / "other", **sizes)
    assert rows(anew)[text]["kl"] > 10 * rows(first)[text]["kl"]
    # Other methods may come and go, and do not make the folder forget which file it was.
    evaluate(small_model(), tokenizer, WORDS, "kivi:bits=4", out=out, **sizes)
    with pytest.raises(kvpack.OptionError, match="made anew"):
        evaluate(small_model(), tokenizer, WORDS, [text], out=out, **sizes)
    calibrated("kivi:bits=8:window=32")
    assert rows(evaluate(small_model(), tokenizer, WORDS, [text], out=out, **sizes))[text] == rows(first)[text]


def write_lines(folder: Path, name: str) -> None:
    for start in range(0, 100, 10):  # opened again and again, as by runs that are ended and started
        store = Store(folder, {"model": "m"})
        store.begin("w")
        for i in range(start, start + 10):
            store.add([{"kind": "layers", "method": name, "document": i, "errors": [0.5] * 300}])
        if name == "killed":
            with store._locked() as file:  # who is killed while it writes has the lock
                file.write(b'{"kind": "layers", "meth')


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_write_one_folder_lose_no_line(tmp_path: Path) -> None:
    """One of them leaves half lines, as if it were killed."""
    names = ["one", "two", "killed"]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write_lines, args=(tmp_path, name)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {(r["method"], r["document"]) for r in read(tmp_path / "results.jsonl")} == {
        (name, i) for name in names for i in range(100)
    }
    store = Store(tmp_path, {"model": "m"})
    store.begin("w")
    assert len(store.records) == 300
    store.add([{"kind": "layers", "method": "last", "document": 0, "errors": []}])
    assert len(read(tmp_path / "results.jsonl")) == 301


def test_a_store_sees_what_another_process_adds(tmp_path: Path) -> None:
    one, two = Store(tmp_path, {"model": "m"}), Store(tmp_path, {"model": "m"})
    one.begin("w")
    two.begin("w")
    with pytest.raises(kvpack.OptionError, match="weights='w', this run has weights='v'"):
        Store(tmp_path, {"model": "m"}).begin("v")
    for i, store in enumerate((one, two, one)):
        store.add([{"kind": "layers", "method": "exact", "document": i, "errors": []}])
    assert len(one.records) == 3
    assert len(two.records) == 2
    two.catch_up()
    assert two.records == one.records


def test_costs_of_methods_that_look_at_queries_are_measured(tokenizer: Any) -> None:
    """All evictions there are: by queries their packing is part of the prompt's forward, and has no time of its own."""
    settings = {name: method.standard[0] for name, method in EVICT.items() if method.standard}
    settings["adakv"] = "adakv(snapkv:budget=0.5)"
    methods = [*settings.values(), "snapkv:budget=0.5+kivi:bits=4:window=32", "quest:budget=0.5"]
    result = evaluate(
        small_model(), tokenizer, WORDS, methods, progress=False, context=200, tokens=200, chunk=64, greedy=3
    )
    assert set(settings) == set(EVICT)
    for method in methods:
        row = rows(result)[method]
        assert row["ms"] > 0
        assert row["prefill_ms"] > 0
        by_queries = any(name in method for name in ("snapkv", "pyramidkv", "h2o", "a2sf", "tova", "expected"))
        assert (row["pack_ms"] is None) == by_queries
    assert "part of their prefill" in result.markdown()


class Unfit(Fragile):
    """A method that does not work."""

    backend = "unfit"

    def new_cache(self, model: Any) -> Any:
        if not hasattr(model, "config"):
            raise kvpack.ModelNeededError("it needs the model")
        raise kvpack.OptionError("not this model")


def test_what_cannot_work_fails_before_anything_is_measured(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpack.evaluation.run.read_document", None)
    sizes: dict[str, Any] = {"context": 64, "tokens": 64, "greedy": 0, "progress": False, "out": tmp_path}
    with pytest.raises(kvpack.OptionError, match="'unfit:bits=4': not this model"):
        evaluate(small_model(), tokenizer, WORDS, [*parse_all("exact"), Unfit()], **sizes)
    header = {"method": "bits", "layers": {"0": "q8", "1": "q8"}, "model": calibration_identity(small_model())}
    write_calibration(tmp_path / "a.safetensors", header, {"losses": torch.zeros(1)})
    other = tiny_model(small_model().config, seed=1)
    sizes["out"] = tmp_path / "other"
    with pytest.raises(kvpack.ModelMismatchError, match=r"'calibrated:path=.*other weights"):
        evaluate(other, tokenizer, WORDS, ["exact", f"calibrated:path={tmp_path / 'a.safetensors'}"], **sizes)


def test_the_table_so_far_is_shown(tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    result = evaluate(small_model(), tokenizer, WORDS, "exact,kivi:bits=2", **(SMALL | {"costs": False}))
    shown = capfd.readouterr()
    assert shown.out == ""
    tables = shown.err.split("so far, ")[1:]
    assert 2 <= len(tables) <= 8
    assert all("kivi:bits=2" in table and "KL, nats" in table for table in tables)
    assert "(too few)" in tables[0]
    assert next(line for line in str(result).splitlines() if "perplexity" in line) not in tables[0]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"methods": [kvpack.KIVI(bits=2)]}, "Contender"),
        ({"tasks": 5}, "tasks=5"),
        ({"depths": ["a"]}, "'a'"),
        ({"context": 15}, "context=15"),
        ({"contexts": 64}, "'contexts' is unknown"),
        ({"text": None}, "text"),
        ({"tokenizer": None}, "tokenizer"),
        ({"model": 5}, "model"),
    ],
)
def test_mistakes_in_python_are_errors_of_ours(changed: dict[str, Any], word: str, tokenizer: Any) -> None:
    arguments = {"model": small_model(), "tokenizer": tokenizer, "text": WORDS, "context": 64, "tokens": 64} | changed
    with pytest.raises(kvpack.OptionError, match=word):
        evaluate(progress=False, **arguments)


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3Text", "Bloom"])
def test_models_of_other_kinds(name: str, tokenizer: Any) -> None:
    """A model without sdpa, one with sliding layers, one with attention code of its own."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 49_152, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    more = {} if name == "Bloom" else {"num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    if name == "Gemma3Text":
        config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
        config.sliding_window = 48
    model = tiny_model(config, attention="eager")
    result = evaluate(
        model, tokenizer, WORDS, "exact,kivi:bits=8,window:tokens=32", progress=False, context=200, tokens=200,
        chunk=64, greedy=4,
    )  # fmt: skip
    by_method = rows(result)
    assert by_method["exact"]["kl"] < 1e-7
    assert by_method["exact"]["kl"] <= by_method["kivi:bits=8"]["kl"] < by_method["window:tokens=32"]["kl"]
    assert by_method["window:tokens=32"]["of_fp16"] < by_method["full"]["of_fp16"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "kivi:bits=2,nothing"], ["nothing", "exact", "kivi", "window"]),
        (["--methods", "kivi:bit=2"], ["'bit'", "bits"]),
        (["--methods", "kivi:group=64"], ["group=64", "head_dim"]),
        (["--methods", "exact,exact"], ["exact", "twice"]),
        (["--methods", "full"], ["full"]),
        (["--methods", "quanto:bits=3"], ["quanto"]),
        (["--tasks", "common_words"], ["common_words", "160"]),
        (["--tokens", "900000"], ["tokens=900000"]),
        (["--context", "8000", "--tokens", "8000"], ["8028", "4096"]),
        (["--tasks", "riddle"], ["riddle", "passkey"]),
        (["--filler", "sand"], ["sand", "noise"]),
        (["--ask", "never"], ["never", "after", "with"]),
        (["--task-contexts", "many"], ["many"]),
        (["--dtype", "int8"], ["int8", "float32"]),
        (["--out", "/proc/nothing"], ["/proc/nothing", "written"]),
        (["--text", "/nowhere.txt"], ["/nowhere.txt"]),
        (["--model", "/nowhere"], ["/nowhere", "configuration"]),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    more: list[str], words: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpack import cli
    from typer.testing import CliRunner

    def load(*_: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(cli, "_load", load)
    done = CliRunner().invoke(cli.app, command(folder, tmp_path / "out", *more)[3:])
    assert done.exit_code == 2, done.output
    for word in words:
        assert word in done.output


def test_the_command_says_its_version() -> None:
    from kvpack import cli
    from typer.testing import CliRunner

    done = CliRunner().invoke(cli.app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"kvpack {kvpack.__version__}\n")
    assert CliRunner().invoke(cli.app, ["info"]).output.startswith(f"version: {kvpack.__version__}")
    assert "Usage" in CliRunner().invoke(cli.app, []).output


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


def test_a_model_without_tokenizer_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpack import cli
    from typer.testing import CliRunner

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    monkeypatch.setattr(cli, "_load", None)
    done = CliRunner().invoke(cli.app, command(bare, tmp_path / "out", text=folder / "text.txt")[3:])
    assert done.exit_code == 2
    assert "tokenizer" in done.output


def test_methods_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text("- exact\n- kivi:bits=2\n")
    assert [contender.label for contender in parse_all(str(file))] == ["exact", "kivi:bits=2"]
    file.write_text("exact: 1\n")
    with pytest.raises(kvpack.OptionError, match="no list"):
        parse_all(file)


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def test_the_peak_is_what_was_held_meanwhile() -> None:
    with PeakMemory() as peak:
        torch.ones(50_000_000)  # 200 MB, given back at once
    assert peak.bytes is not None
    assert 195e6 < peak.bytes < 230e6  # the system counts in batches


def test_small_arithmetic() -> None:
    assert quantile([0, 1, 2, 3], 0.5) == 1.5
    assert pareto_front([(1, 5), (2, 3), (3, 4), (4, 1)]) == [(1, 5), (2, 3), (4, 1)]
    assert equal_prefix([1, 2, 3], [1, 2, 4]) == equal_prefix([1, 2], [1, 2, 4]) == 2
