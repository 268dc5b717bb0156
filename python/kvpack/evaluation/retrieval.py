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
        ask: "after" the text, or "with" it: one prompt, as `generate` reads it; the answer's first token is then found
            before anything is packed.

    Returns:
        The cell with `score` (share of the expected strings in the answer) and `answer`.
    """
    name = f"{seed} {cell['context']} {cell['depth']} {cell['sample']}"
    sample = build(cell["task"], tokenizer, filler, cell["context"], cell["depth"], name)
    reader = Reader(model, contender)
    prompt = sample.question
    if ask == "with":
        prompt = sample.text + sample.question
    else:
        reader(torch.tensor(sample.text), keep=1)
    found = tokenizer.decode(list(reader.greedy(torch.tensor(prompt), sample.length)))
    return {
        "kind": "task",
        "method": contender.label,
        **cell,
        "tokens": len(sample.text) + len(sample.question),
        "score": score(found, sample.answers),
        "answer": found,
    }
