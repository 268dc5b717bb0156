"""The harness's model: likelihoods and continuations through a packed cache."""

from __future__ import annotations

import json
import subprocess
import sys

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


CHOICE = {"output": "multiple_choice", "target": "index", "more": 'doc_to_choice: "{{choices}}"', "metric": "acc"}
WRITTEN = {
    "output": "generate_until",
    "target": '" {{answer}}"',
    "more": "generation_kwargs: {until: ['.', ',', '\\n'], max_gen_toks: 4}",
    "metric": "exact_match",
}
RUNS = [("exact", CHOICE), ("kivi:bits=8", CHOICE), ("kivi:bits=4", WRITTEN)]

# The harness's own command for each argv, in one process: its import takes longest.
COMMANDS = """
import json, runpy, sys
first, *others = json.loads(sys.argv[1])
sys.argv[1:] = first
runpy.run_module("kvpack.lm_eval", run_name="__main__")
from lm_eval.__main__ import cli_evaluate
for arguments in others:
    sys.argv[1:] = arguments
    cli_evaluate()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What the harness finds in each of `RUNS`."""
    folder = tmp_path_factory.mktemp("harness")
    data = folder / "data.jsonl"
    choices = [answer for _, answer in QUESTIONS]
    rows = [{"question": q, "answer": a, "choices": choices, "index": i} for i, (q, a) in enumerate(QUESTIONS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = []
    for number, (method, task) in enumerate(RUNS):
        place = folder / str(number)
        place.mkdir()
        (place / "task.yaml").write_text(TASK.format(data=data, **task))
        model = f"pretrained={model_files.test_model_path()},method={method},dtype=float32,chunk=4"
        commands.append([
            "--model", "kvpack", "--model_args", model, "--tasks", "kvpack_capitals", "--include_path", str(place),
            "--output_path", str(place / "out"), "--batch_size", "2",
        ])  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for number in range(len(RUNS)):
        (file,) = (folder / str(number) / "out").rglob("results*.json")
        found.append(dict(json.loads(file.read_text())["results"]["kvpack_capitals"]))
    return found


@pytest.mark.slow
def test_multiple_choice(results: list[dict[str, float]]) -> None:
    exact, eight_bits, _ = results
    assert exact["acc,none"] == 1
    assert eight_bits["acc,none"] == 1


@pytest.mark.slow
def test_generation(results: list[dict[str, float]]) -> None:
    assert results[2]["exact_match,none"] >= 0.5
