"""The demo, on a tiny model: what its table says, and its help."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import tiny_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import demo_measure  # noqa: E402
from demo_environment import environment  # noqa: E402
from demo_report import COLUMNS, Report  # noqa: E402
from rich.progress import Progress  # noqa: E402

TOKENIZER = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))


@pytest.fixture(scope="module")
def report() -> Report:
    model = tiny_model(attention="sdpa")
    torch.manual_seed(0)
    prompt = torch.randint(3, 128, (1, 200))
    options = Namespace(tokens=5, seed=0, rounds=3)
    with torch.no_grad(), Progress(disable=True) as bars:
        forced = demo.run_teacher_forced(bars, model, prompt, options)
        demo.run_free(bars, model, prompt, options, forced.results)
    surroundings = environment(EXAMPLES.parent) | {"other_programs": 0.0}
    return Report("tiny", "What?", surroundings, model.config, forced)


def test_the_first_token_is_in_the_table(report: Report) -> None:
    column = [i for i, head in enumerate(COLUMNS) if "first token" in head]
    assert len(column) == 1
    for result, row in zip(report.results, report.rows(), strict=True):
        assert len(row) == len(COLUMNS)
        assert len(result.first_token_s) == 3
        least, middle, most = sorted(result.first_token_s)
        assert least > 0
        assert row[column[0]] == f"{middle:.1f} ({least:.1f}-{most:.1f})"
        assert 1 <= len(result.generated) <= 5
    assert "the median of 3" in " ".join(report.notes())


def test_no_tie_decides_what_the_table_says(report: Report) -> None:
    """Texts are shown, and not compared: one rounding can change all that follows."""
    assert not [head for head in COLUMNS if "equal" in head]
    assert [head for head in COLUMNS if head.startswith("KL")]
    for result in report.results:
        assert len(result.kl) == 5
        assert result.kl == [0] * 5 or result.name != demo_measure.FULL


def test_its_files_hold_the_same(report: Report, tmp_path: Path) -> None:
    report.write_markdown(tmp_path / "demo.md")
    report.write_json(tmp_path / "demo.json", TOKENIZER)
    lines = (tmp_path / "demo.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| kvpack")]) == 4
    caches = json.loads((tmp_path / "demo.json").read_text())["caches"]
    for cache, result in zip(caches, report.results, strict=True):
        assert cache["first_token_s"] == result.first_token_s
        assert cache["first_token_s_median"] == sorted(result.first_token_s)[1]


@pytest.mark.slow
def test_its_help_says_each_default_once() -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    options = [" ".join(option.split()) for option in shown.split("\n  --")[1:]]
    assert len(options) >= 9
    assert all(option.count("(default:") == 1 for option in options)
    assert "None" not in shown
