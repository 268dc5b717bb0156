"""Quality, memory and speed of any method, on any causal language model and text.

`evaluate` is the way in; `Evaluation` is what it returns. Where everything is:

    contenders.py   what is compared        store.py       results on disk, one line a cell
    settings.py     how much of it          summary.py     from records to a row a method
    plan.py         both, checked           intervals.py   95 % intervals
    run.py          the order of the cells  report.py      tables
    forward.py      reading with a cache    pictures.py    pictures
    streaming.py    perplexity, KL          evaluation.py  all of these together
    greedy.py       continuations           costs.py       bytes and milliseconds
    tasks.py        retrieval tasks         peak.py        ... and the peak of memory
    retrieval.py    ... put to a model      layers.py      error of each layer
    inspect.py      what a cache is like
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import DeviceError, OptionError
from ..methods import Method
from .contenders import Contender
from .evaluation import Evaluation
from .plan import prepare
from .settings import Settings
from .tasks import TASKS

__all__ = ["TASKS", "Contender", "Evaluation", "Settings", "evaluate"]


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    methods: str | Path | Iterable[str | Method | Contender] = "exact,kivi:bits=4",
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Evaluation:
    """Measure methods against the full cache: on the same text, in the same run.

    Args:
        model: a causal language model of transformers, on the CPU.
        tokenizer: its tokenizer.
        text: what is read; the tasks are hidden in it too.
        methods: names such as `"exact,kivi:bits=2"`, a YAML file of them, or a list, of methods such as
            `kvpack.KIVI(bits=2)` too. `window:tokens=n` keeps only the newest tokens; `hqq:bits=4` and `quanto:bits=4`
            are transformers' own.
        out: a folder for the results of one model, with its weights, and one text and size. Each cell is written when
            it is finished, and what is there already is not measured again. Several processes can write into it.
        progress: whether to show a bar, and the table so far.
        **settings: the fields of `Settings`: `context`, `tokens`, `chunk`, `greedy`, `tasks`, ...

    Returns:
        The results, as records, as a table and as pictures.

    Raises:
        OptionError: something is not accepted; nothing was measured then.
        DeviceError: the model is not in CPU memory.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "forward"):
        raise OptionError(f"model: given a {type(model).__name__}, expected a transformers model")
    if model.device.type != "cpu":
        raise DeviceError(f"model: given one on {model.device}, expected it in CPU memory")
    folder = Path(out) if out is not None else None
    dtype = str(model.dtype).removeprefix("torch.")
    return prepare(config, tokenizer, text, methods, folder, dtype, settings).run(model, progress)
