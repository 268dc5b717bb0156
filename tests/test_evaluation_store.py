"""Results on disk: what is not mixed, and who writes."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path
from typing import Any

import kvpack
import pytest
import torch
from evaluations import WORDS, rows
from kvpack.evaluation import evaluate
from kvpack.evaluation.settings import weights
from kvpack.evaluation.store import Store, read
from kvpack.methods.file import identity as calibration_identity
from kvpack.methods.file import write as write_calibration
from support import small_model, tiny_model
from torch.testing._internal.two_tensor import TwoTensor


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
