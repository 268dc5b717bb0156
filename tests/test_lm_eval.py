"""The harness's model: likelihoods and continuations through a packed cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import test_model as model_files

TASK = """
task: kvpack_capitals
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {output}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
"""
QUESTIONS = [
    ("The capital of France is", "Paris"),
    ("The capital of Italy is", "Rome"),
    ("The capital of Japan is", "Tokyo"),
    ("The capital of England is", "London"),
]


def run(folder: Path, method: str, task: str) -> dict[str, float]:
    """The results of the harness's own command."""
    (folder / "task.yaml").write_text(task)
    arguments = f"pretrained={model_files.test_model_path()},method={method},dtype=float32,chunk=4"
    done = subprocess.run(
        [
            sys.executable, "-m", "kvpack.lm_eval", "--model", "kvpack", "--model_args", arguments,
            "--tasks", "kvpack_capitals", "--include_path", str(folder), "--output_path", str(folder / "out"),
            "--batch_size", "2",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results*.json")
    return dict(json.loads(results.read_text())["results"]["kvpack_capitals"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    choices = [answer for _, answer in QUESTIONS]
    rows = [{"question": q, "answer": a, "choices": choices, "index": i} for i, (q, a) in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("method", ["exact", "kivi:bits=8"])
def test_multiple_choice(method: str, data: Path, tmp_path: Path) -> None:
    task = TASK.format(
        data=data, output="multiple_choice", target="index", more='doc_to_choice: "{{choices}}"', metric="acc"
    )
    assert run(tmp_path, method, task)["acc,none"] == 1


def test_generation(data: Path, tmp_path: Path) -> None:
    more = "generation_kwargs: {until: ['.', ',', '\\n'], max_gen_toks: 4}\nfilter_list: []"
    task = TASK.format(data=data, output="generate_until", target='" {{answer}}"', more=more, metric="exact_match")
    assert run(tmp_path, "kivi:bits=4", task.replace("filter_list: []\n", ""))["exact_match,none"] >= 0.5
