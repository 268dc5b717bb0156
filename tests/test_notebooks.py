"""The notebooks run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPACK_NOTEBOOK_MODEL", str(short_model))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "notebooks are kept without their outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert shown
    assert not [output for output in shown if output.output_type == "error"]
    pictures = sum("image/png" in output.get("data", {}) for output in shown)
    assert pictures == sum(".plot" in cell.source for cell in notebook.cells), "every plot is shown once"


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "quick-start",
        "choose-a-method",
        "fewer-tokens",
        "which-heads",
        "write-your-own-method",
    }
