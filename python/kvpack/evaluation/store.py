"""Results on disk: one line a finished cell, so that whatever ends a run loses nothing but the cell at work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import OptionError

Record = dict[str, Any]
"""One measured cell: `kind`, `method`, what else tells it from others, and numbers."""

# What tells a record from all others of its kind.
KEYS = {
    "text": ("method", "document"),
    "greedy": ("method", "document"),
    "task": ("method", "task", "context", "depth", "sample"),
    "cost": ("method", "context"),
    "layers": ("method", "document"),
}


def key(record: Record) -> tuple[Any, ...]:
    """Return what tells a record from all others."""
    return (record["kind"], *(record[name] for name in KEYS[record["kind"]]))


class Store:
    """The records of one evaluation, in memory and, with a folder, on disk."""

    def __init__(self, folder: Path | None, identity: Record) -> None:
        """Open the folder: what it holds already is kept.

        Raises:
            OptionError: it holds results of another model, text or setting.
        """
        self._records: dict[tuple[Any, ...], Record] = {}
        self.identity = identity
        self._path = folder / "results.jsonl" if folder else None
        if self._path is None:
            return
        about = self._path.with_name("run.json")
        if about.exists():
            _check_same(_read_about(about), identity, folder)
        _write_whole(about, json.dumps(identity, indent=2) + "\n")
        if self._path.exists():
            for record in read(self._path):
                self._records[key(record)] = record
            # Without the half line that a killed run may have left.
            _write_whole(self._path, "".join(_line(record) for record in self._records.values()))

    def __contains__(self, wanted: tuple[Any, ...]) -> bool:
        return wanted in self._records

    def add(self, records: Iterable[Record]) -> None:
        """Keep finished cells: they are on disk when this returns."""
        records = list(records)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(_line(record) for record in records)
                file.flush()
                os.fsync(file.fileno())
        for record in records:
            self._records[key(record)] = record

    @property
    def records(self) -> list[Record]:
        """All records."""
        return list(self._records.values())


def read(path: Path) -> list[Record]:
    """Return the records of a file, of each cell the newest; a line that was not finished is left out.

    Raises:
        OptionError: a line is something else than a record.
    """
    records: dict[tuple[Any, ...], Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        try:
            records[key(record)] = record
        except (KeyError, TypeError):
            raise OptionError(f"{path} holds a line that is no record of an evaluation: {line[:80]}") from None
    return list(records.values())


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _write_whole(path: Path, text: str) -> None:
    """Replace a file: it is the old one or the new one, whenever the run ends."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _read_about(path: Path) -> Record:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise OptionError(f"out: {path} is not the description of an evaluation: {error}") from None


def _check_same(before: Record, now: Record, folder: Path | None) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise OptionError(
                f"out: {folder} holds results with {name}={before.get(name)!r}, this run has {name}={value!r}; "
                "expected another folder"
            )
