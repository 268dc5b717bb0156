"""The order of an evaluation: cell after cell, each kept as soon as it is finished."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import KvpackError
from . import costs, report
from .contenders import FULL, Contender, Full, Packed, Quantized, held_bytes
from .forward import Reader, evaluating
from .greedy import continue_document
from .layers import attention_errors
from .retrieval import answer
from .settings import Settings, Text
from .store import Record, Store
from .streaming import read_document
from .summary import summarise
from .tasks import has_depth

Tick = Callable[[], None]
REHEARSED = 64
SHOWN = 1 / 8


@dataclass(frozen=True)
class Job:
    """Cells that are measured together.

    Attributes:
        title: for the progress bar.
        ticks: how often it reports progress.
        weight: tokens that it reads: its share of the time.
        run: does it, and returns the finished records.
    """

    title: str
    ticks: int
    weight: int
    run: Callable[[Tick], list[Record]]


def jobs(
    model: Any, tokenizer: Any, text: Text, contenders: Sequence[Contender], settings: Settings, store: Store
) -> Iterator[Job]:
    """Yield what is still missing in `store`, in the order of the pictures: quality, tasks, costs."""
    yield from _documents(model, text, contenders, settings, store)
    yield from _layers(model, text, contenders, store)
    yield from _continuations(model, text, contenders, settings, store)
    yield from _tasks(model, tokenizer, text, contenders, settings, store)
    yield from _costs(model, text, contenders, settings, store)


def rehearse(model: Any, contenders: Sequence[Contender], ids: Tensor) -> None:
    """Read up to `REHEARSED` tokens `[n]` with each contender, and one more: what cannot work fails before the work.

    Raises:
        KvpackError: a method does not fit the model.
    """
    ids = ids[:REHEARSED]
    with evaluating(model):
        for contender in contenders:
            try:
                reader = Reader(model, contender)
                reader(ids, keep=1)
                reader(ids[-1:], keep=1)
                contender.lossy_share(reader.cache, 1, held_bytes(reader.cache))
            except KvpackError as error:
                raise type(error)(f"method {contender.label!r}: {error}") from error


def run(pending: Sequence[Job], store: Store, model: Any, progress: bool) -> None:
    """Do all jobs under a progress bar. Whatever ends it, what is finished is in `store`.

    The table so far is written above the bar after the first job, and whenever a share `SHOWN` of the work is done.
    """
    from tqdm.auto import tqdm

    total = sum(job.weight for job in pending)
    done, shown = 0, -total
    with (
        evaluating(model),
        tqdm(
            total=total, unit="token", unit_scale=True, disable=not progress or not pending, dynamic_ncols=True
        ) as bar,
    ):
        for job in pending:
            bar.set_description(job.title)
            store.add(job.run(partial(_advance, bar, job.weight / job.ticks)))
            done += job.weight
            if progress and done < total and done - shown >= SHOWN * total:
                so_far = report.text(summarise(store.records))
                bar.write(f"so far, {done / total:.0%} of the work:\n{so_far}\n", file=sys.stderr)
                shown = done


def _advance(bar: Any, step: float) -> None:
    bar.update(step)


def _documents(
    model: Any, text: Text, contenders: Sequence[Contender], settings: Settings, store: Store
) -> Iterator[Job]:
    steps = -(-(settings.context - 1) // settings.chunk)
    for i, ids in enumerate(text.documents):
        missing = [c for c in contenders if ("text", c.label, i) not in store]
        if not missing and ("text", FULL, i) in store:
            continue

        def read(tick: Tick, ids: Any = ids, missing: list[Contender] = missing, i: int = i) -> list[Record]:
            records = read_document(model, missing, ids, settings.chunk, tick)
            return [record | {"document": i} for record in records]

        readers = 1 + len(missing)
        yield Job(f"text {i + 1}/{len(text.documents)}", steps * readers, settings.context * readers, read)


def _layers(model: Any, text: Text, contenders: Sequence[Contender], store: Store) -> Iterator[Job]:
    missing = [c for c in contenders if ("layers", c.label, 0) not in store and isinstance(c, Packed)]
    if missing:

        def compare(tick: Tick) -> list[Record]:
            records = attention_errors(model, missing, text.documents[0])
            tick()
            return [record | {"document": 0} for record in records]

        yield Job("attention of each layer", 1, text.documents.shape[1], compare)


def _continuations(
    model: Any, text: Text, contenders: Sequence[Contender], settings: Settings, store: Store
) -> Iterator[Job]:
    if not settings.greedy:
        return
    expected: dict[int, list[int]] = {
        r["document"]: r["generated"] for r in store.records if r["kind"] == "greedy" and r["method"] == FULL
    }
    for i, ids in enumerate(text.documents[: settings.greedy_prompts]):
        for contender in (Full(), *contenders):
            if ("greedy", contender.label, i) in store:
                continue

            def generate(tick: Tick, ids: Any = ids, contender: Contender = contender, i: int = i) -> list[Record]:
                cell = {"kind": "greedy", "method": contender.label}
                measure = partial(continue_document, model, contender, ids, settings.greedy, expected.get(i))
                record = _attempt(contender, cell, measure)
                if contender.label == FULL:
                    expected[i] = record["generated"]
                tick()
                return [record | {"document": i}]

            yield Job(f"greedy {contender.label}", 1, len(ids), generate)


def _tasks(
    model: Any, tokenizer: Any, text: Text, contenders: Sequence[Contender], settings: Settings, store: Store
) -> Iterator[Job]:
    cells: list[Record] = [
        {"task": task, "context": context, "depth": depth, "sample": sample}
        for task in settings.tasks
        for context in settings.contexts_of_tasks
        for depth in (settings.depths if has_depth(task) else (None,))
        for sample in range(settings.samples)
    ]
    for cell in cells:
        for contender in (Full(), *contenders):
            if ("task", contender.label, *cell.values()) in store:
                continue

            def ask(tick: Tick, cell: Record = cell, contender: Contender = contender) -> list[Record]:
                words = settings.filler_of(text.words)
                measure = partial(answer, model, tokenizer, contender, words, cell, settings.seed, settings.ask)
                record = _attempt(contender, {"kind": "task", "method": contender.label, **cell}, measure)
                tick()
                return [record]

            yield Job(f"{cell['task']} {contender.label}", 1, cell["context"], ask)


def _attempt(contender: Contender, cell: Record, measure: Callable[[], Record]) -> Record:
    """Return what `measure` does, or the cell with `failed` when one of transformers' quantised caches cannot do it.

    They have prompts on which they fail (with HQQ at 2 bits those whose length is no multiple of 4): that is a result,
    and not the end of the evaluation.
    """
    try:
        return measure()
    except (RuntimeError, IndexError, ValueError) as error:
        if not isinstance(contender, Quantized):
            raise
        return cell | {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def _costs(model: Any, text: Text, contenders: Sequence[Contender], settings: Settings, store: Store) -> Iterator[Job]:
    context = settings.context
    if not settings.costs or all(("cost", c.label, context) in store for c in (Full(), *contenders)):
        return

    def measure(tick: Tick) -> list[Record]:
        # In an order of chance, so that none always follows the same other; all of them anew: times of different runs
        # cannot be compared.
        order = random.Random(settings.seed).sample(list(contenders), len(contenders))
        return costs.measure(model, order, text.documents[0], tick)

    yield Job("time and memory", costs.ticks(len(contenders)), context * (2 + 2 * len(contenders)), measure)
