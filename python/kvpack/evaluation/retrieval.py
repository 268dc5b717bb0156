"""The tasks put to one contender."""

from __future__ import annotations

from typing import Any

import torch

from .contenders import Contender
from .forward import Reader
from .store import Record
from .tasks import build, score


def answer(
    model: Any, tokenizer: Any, contender: Contender, filler: str, cell: Record, seed: int, ask: str = "after"
) -> Record:
    """Read a task's text at once, then its question, and generate an answer: the text is packed when it is asked about.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        contender: whose cache is used.
        filler: a text to hide the needles in.
        cell: `task`, `context`, `depth` and `sample`.
        seed: of all samples; a cell's text is the same for every contender.
        ask: "after" the text, or "with" it: all but the last token of the question is then read at once with the text.

    Returns:
        The cell with `score` (share of the expected strings in the answer) and `answer`.
    """
    name = f"{seed} {cell['context']} {cell['depth']} {cell['sample']}"
    sample = build(cell["task"], tokenizer, filler, cell["context"], cell["depth"], name)
    reader = Reader(model, contender)
    cut = -1 if ask == "with" else 0
    reader(torch.tensor(sample.text + sample.question[:cut]), keep=1)
    found = tokenizer.decode(list(reader.greedy(torch.tensor(sample.question[cut:]), sample.length)))
    return {
        "kind": "task",
        "method": contender.label,
        **cell,
        "tokens": len(sample.text) + len(sample.question),
        "score": score(found, sample.answers),
        "answer": found,
    }
