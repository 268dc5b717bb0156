"""The pages and the README's tables of what was measured: they are what the stored numbers give."""

from __future__ import annotations

import json

import kvpack
import pytest
from kvpack.evaluation import Evaluation
from leaderboard import BOARDS, FOLDER, README, in_readme

every_board = pytest.mark.parametrize("board", BOARDS.values(), ids=lambda board: board.name)


@every_board
def test_pages_are_made_from_the_numbers(board: object) -> None:
    result = Evaluation.load(FOLDER / "results" / board.name)
    page = (FOLDER / f"{board.name}.md").read_text(encoding="utf-8")
    assert page.startswith(board.head + result.markdown() + "\n![")
    readme = README.read_text(encoding="utf-8")
    assert in_readme(readme, board, result) == readme


@every_board
def test_numbers_say_of_which_weights_they_are(board: object) -> None:
    assert len(json.loads((FOLDER / "results" / board.name / "run.json").read_text())["weights"]) == 16


def test_a_folder_without_numbers_is_no_evaluation(tmp_path: object) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(kvpack.OptionError, match="no results"):
        Evaluation.load(tmp_path)
