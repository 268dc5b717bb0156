"""The `kvpack eval` command: runs that are killed, and mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kvpack
import pytest
from evaluations import METHODS, WORDS
from kvpack.evaluation.contenders import parse_all
from kvpack.evaluation.store import read
from support import small_model


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
