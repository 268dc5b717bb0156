"""Results on disk: one line a finished cell, so that whatever ends a run loses nothing but the cell at work."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import OptionError

Record = dict[str, Any]
"""One measured cell: `kind`, `method`, what else tells it from others, and numbers."""

ABOUT, RESULTS = "run.json", "results.jsonl"
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
    """The records of one evaluation, in memory and, with a folder, on disk.

    Lines are only ever added to the file, under a lock: several processes can write into one folder at the same time.
    """

    def __init__(self, folder: Path | None, identity: Record) -> None:
        """Take what the folder holds already; nothing is written yet.

        Raises:
            OptionError: it holds results of another model, text or setting.
        """
        self._records: dict[tuple[Any, ...], Record] = {}
        self._seen = 0  # bytes of the file that are in `_records`
        self.identity = identity
        self._folder = folder
        if folder is not None and (folder / ABOUT).exists():
            self._check(_read_about(folder / ABOUT))

    def begin(self, weights: str) -> None:
        """Write what the results belong to, now that the model is there, with a hash of its weights.

        Raises:
            OptionError: the folder holds results of other weights, or of whatever another process has begun meanwhile.
        """
        self.identity["weights"] = weights
        if self._folder is None:
            return
        about = self._folder / ABOUT
        with self._locked() as file:
            self._take(file)
            if about.exists():
                before = _read_about(about)
                self._check(before)
                if files := before.get("files", {}) | self.identity.get("files", {}):
                    self.identity["files"] = files
            _write_whole(about, json.dumps(self.identity, indent=2) + "\n")

    def __contains__(self, wanted: tuple[Any, ...]) -> bool:
        return wanted in self._records

    def add(self, records: Iterable[Record]) -> None:
        """Keep finished cells: they are on disk when this returns."""
        records = list(records)
        if self._folder is not None:
            with self._locked() as file:
                half = self._take(file)  # of a line that a process which was killed has left
                file.write(b"\n" * half + b"".join(map(_line, records)))
                file.flush()
                os.fsync(file.fileno())
                self._seen = file.tell()
        for record in records:
            self._records[key(record)] = record

    def catch_up(self) -> None:
        """Take what other processes have added to the folder."""
        if self._folder is not None:
            with self._locked() as file:
                self._take(file)

    @property
    def records(self) -> list[Record]:
        """All records."""
        return list(self._records.values())

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file of the results, which no other process writes to meanwhile."""
        assert self._folder is not None
        with (self._folder / RESULTS).open("a+b") as file:
            with suppress(OSError):  # some network folders know no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _take(self, file: BinaryIO) -> bool:
        """Take all whole lines that are new, and say whether half a line follows them."""
        file.seek(self._seen)
        whole, newline, half = file.read().rpartition(b"\n")
        self._seen += len(whole) + len(newline)
        self._records |= _parse(whole, file.name)
        return bool(half)

    def _check(self, before: Record) -> None:
        """Raise OptionError when the folder's results are of something else."""
        now = self.identity
        different = {name for name, value in now.items() if name != "files" and before.get(name) != value}
        if different & {"context", "tokens"}:
            different.discard("text")  # its hash is of the text as it is cut
        known, measured = before.get("files", {}), {method for _, method, *_ in self._records}
        for label, content in now.get("files", {}).items():
            if label in known or label in measured:
                different |= {"files"} if known.get(label) != content else set()
        if different:
            names = [name for name in now if name in different]
            had, has = (", ".join(f"{name}={of.get(name)!r}" for name in names) for of in (before, now))
            why = "; a calibration was made anew since" if "files" in different else ""
            if "weights" in different:
                why += "; the model has the name of theirs, and other weights"
            raise OptionError(
                f"out: {self._folder} holds results with {had}, this run has {has}; expected the same, or another "
                f"folder{why}"
            )


def read(path: Path) -> list[Record]:
    """Return the records of a file, of each cell the newest; a line that was not finished is left out.

    Raises:
        OptionError: a line is something else than a record.
    """
    return list(_parse(path.read_bytes(), path).values())


def _parse(lines: bytes, path: Any) -> dict[tuple[Any, ...], Record]:
    records: dict[tuple[Any, ...], Record] = {}
    for line in lines.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # half of a line, or bytes that are no text
            continue
        try:
            records[key(record)] = record
        except (KeyError, TypeError):
            raise OptionError(f"{path} holds a line that is no record of an evaluation: {line[:80]!r}") from None
    return records


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


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
