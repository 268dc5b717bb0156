"""Evaluations that cannot be, and methods that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kvpack
import pytest
import torch
from evaluations import WORDS, Fragile, rows
from kvpack.evaluation import evaluate
from kvpack.evaluation.contenders import parse_all
from kvpack.methods.file import identity as calibration_identity
from kvpack.methods.file import write as write_calibration
from support import small_model, tiny_model


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


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"methods": [kvpack.KIVI]}, "a method, or a Contender"),
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
