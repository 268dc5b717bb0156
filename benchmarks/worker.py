"""A process that measures, driven over a pipe one call at a time.

A number of threads is set once in a process's life, so that OpenMP's state is clean; a peer lives in an environment
of its own; and whoever drives several workers by turns interleaves them. Only the driver's current call runs: the
other workers wait for a line, asleep.

One JSON object a line, both ways. This module needs nothing but the standard library.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .paths import ROOT


class WorkerError(RuntimeError):
    """A call of a worker failed, or the worker died; the message is its last line of error."""


class Worker:
    """An object that lives in a process of its own."""

    def __init__(self, target: str, threads: int, *, python: Path | str = sys.executable, **arguments: Any) -> None:
        """Start the process and make the object there.

        Args:
            target: `module:class`.
            threads: for OpenMP, and the first argument of the class.
            python: the interpreter.
            **arguments: the further arguments of the class.

        Raises:
            WorkerError: the object could not be made.
        """
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process does
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PATH": _path(Path(python))},
        )
        try:
            self._ask({"target": target, "arguments": {"threads": threads} | arguments})
        except WorkerError:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method there and return what it returned.

        Raises:
            WorkerError: it raised, or the process died.
        """
        return self._ask({"method": method, "arguments": arguments})

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            # A request that it never read may be left in the pipe of a process that died.
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process died: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "without a word")


def _path(python: Path) -> str:
    """Return `PATH` with the interpreter's environment first, as if it were activated: quanto needs its ninja."""
    return os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)])


def serve() -> None:
    """Make the object that the first line asks for, then answer calls until the input ends."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    made: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if made is None:
                made = _class_of(request["target"])(**request["arguments"])
                result = None
            else:
                result = getattr(made, request["method"])(**request["arguments"])
            answer = {"result": result}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": _one_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _class_of(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


if __name__ == "__main__":
    serve()
