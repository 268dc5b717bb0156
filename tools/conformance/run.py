"""Examines many models, each in a fork of a process that has imported everything, and writes a line of JSON a model."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from . import models
from .examine import Row, examine

FORK = multiprocessing.get_context("fork")


@dataclass
class Worker:
    """A process that examines one model.

    Attributes:
        job: model type and kind.
        process: the process.
        messages: what it does, and at last the row.
        deadline: when it is stopped.
        doing: what it said last.
    """

    job: tuple[str, str]
    process: BaseProcess
    messages: Connection
    deadline: float
    doing: str = "starting"


def _child(job: tuple[str, str], messages: Connection) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()
    row = examine(*job, tell=messages.send)
    messages.send(row)


def _start(job: tuple[str, str], limit: float) -> Worker:
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_child, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    return Worker(job, process, ours, time.monotonic() + limit)


def _lost(worker: Worker, why: str) -> Row:
    """The row of a model that brought none."""
    model_type, kind = worker.job
    row = {"model": model_type, "kind": kind, "class": models.class_name(model_type, kind)}
    if worker.doing.startswith(("starting", "building", "transformers")):
        return {**row, "verdict": "not built", "why": f"{why}: {worker.doing}"}
    way, _, mode = worker.doing.partition(": ")
    return {**row, "verdict": "wrong", "ways": {way: {"verdict": "wrong", "wrong": {mode: why}, "notes": {}}}}


def _row_of(worker: Worker, limit: float) -> Row | None:
    """What a worker brought, if it is done or its time is up."""
    try:
        while worker.messages.poll():
            message: Any = worker.messages.recv()
            if isinstance(message, dict):
                return message
            worker.doing = message
    except EOFError:
        worker.process.join()
        return _lost(worker, f"the process ended with {worker.process.exitcode}")
    if time.monotonic() < worker.deadline:
        return None
    worker.process.kill()
    return _lost(worker, f"not done after {limit:g} s")


def run(jobs: list[tuple[str, str]], workers: int, limit: float) -> Iterator[Row]:
    """The rows of models, as they come.

    Args:
        jobs: model types and kinds.
        workers: processes at a time.
        limit: seconds for each.
    """
    waiting = list(reversed(jobs))
    running: list[Worker] = []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(_start(waiting.pop(), limit))
        wait([worker.messages for worker in running], timeout=1)
        for worker in list(running):
            if (row := _row_of(worker, limit)) is not None:
                running.remove(worker)
                worker.process.join(10)
                worker.messages.close()
                yield row


def read(path: Path) -> dict[tuple[str, str], Row]:
    """The rows of an earlier run, by model type and kind; the later of two."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["model"], row["kind"]): row for row in rows}
