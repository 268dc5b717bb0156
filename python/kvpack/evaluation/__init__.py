"""Quality, memory and speed of any method, on any causal language model and text.

`evaluate` is the way in; `Evaluation` is what it returns. Where everything is:

    contenders.py   what is compared        store.py       results on disk, one line a cell
    settings.py     how much of it          summary.py     from records to a row a method
    streaming.py    perplexity, KL          bootstrap.py   confidence intervals
    greedy.py       continuations           report.py      tables
    tasks.py        retrieval tasks         pictures.py    pictures
    retrieval.py    ... put to a model      evaluation.py  all of these together
    layers.py       error of each layer     run.py         the order of the cells
    costs.py        bytes, milliseconds     forward.py     a model that reads through a cache
    inspect.py      what a cache is like
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import DeviceError, OptionError
from .contenders import Contender, parse_all
from .evaluation import Evaluation
from .run import jobs, run
from .settings import Settings, check_folder, check_methods, check_tasks, cut, identity
from .store import Store
from .tasks import TASKS

__all__ = ["TASKS", "Contender", "Evaluation", "Settings", "evaluate"]


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    methods: str | Path | Iterable[str | Contender] = "exact,kivi:bits=4",
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
        methods: names such as `"exact,kivi:bits=2"`, a YAML file of them, or a list. `window:tokens=n` keeps only the
            newest tokens; `hqq:bits=4` and `quanto:bits=4` are transformers' own.
        out: a folder for the results. Each cell is written when it is finished, and what is there already is not
            measured again.
        progress: whether to show a bar.
        **settings: the fields of `Settings`: `context`, `tokens`, `chunk`, `greedy`, `tasks`, ...

    Returns:
        The results, as records, as a table and as pictures.

    Raises:
        OptionError: something is not accepted; nothing was measured then.
        DeviceError: the model is not in CPU memory.
    """
    contenders = parse_all(methods)
    chosen = make_settings(settings)
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "forward"):
        raise OptionError(f"model: given a {type(model).__name__}, expected a transformers model")
    if model.device.type != "cpu":
        raise DeviceError(f"model: given one on {model.device}, expected it in CPU memory")
    chosen.check_model(config)
    check_methods(contenders, config)
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_folder(folder)
    documents = cut(text, tokenizer, chosen)
    check_tasks(text, tokenizer, chosen)
    store = Store(folder, identity(chosen, config, documents, str(model.dtype).removeprefix("torch.")))
    run(list(jobs(model, tokenizer, documents, contenders, chosen, store)), store, model, progress)
    return Evaluation(store.records, store.identity)


def make_settings(settings: dict[str, Any]) -> Settings:
    """Return `Settings` with these fields.

    Raises:
        OptionError: there is no such field, or it does not accept the value.
    """
    accepted = list(Settings.__dataclass_fields__)
    for name in settings:
        if name not in accepted:
            raise OptionError(f"{name!r} is unknown; accepted: {', '.join(accepted)}")
    many = {"tasks": str, "task_contexts": int, "depths": float}
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        one = name in many and isinstance(value, many[name])  # "passkey" means ["passkey"]
        fields[name] = (value,) if one else tuple(value) if isinstance(value, list) else value
    return Settings(**fields)
