"""What the numbers depend on: the demo's environment, for several numbers of threads."""

from __future__ import annotations

import os
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import paths
from .options import Options

# isort: split
import demo_environment

COMPARED = ("hqq", "optimum-quanto")
# A part's results change the committed ones before the next part runs, so the whole checkout would soon be dirty.
MEASURED = ("src", "python", "benches", "Cargo.toml", "Cargo.lock", "benchmarks/*.py")


class OtherPrograms:
    """Watches, from its creation on, how much of the CPUs' time is taken by others than this process and its workers.

    A worker counts once it has ended.
    """

    def __init__(self) -> None:
        self._wall, self._own, self._all = time.perf_counter(), _own_seconds(), demo_environment._busy_seconds()

    def share(self) -> float | None:
        """Return the share (0 to 1) of all CPUs' time that others took; None where the system does not say."""
        busy = demo_environment._busy_seconds()
        if busy is None or self._all is None:
            return None
        others = (busy - self._all) - (_own_seconds() - self._own)
        return max(0.0, others / ((time.perf_counter() - self._wall) * (os.cpu_count() or 1)))


def environment(options: Options) -> dict[str, Any]:
    """Return CPU, versions, commit and date, and the sizes of the run."""
    surroundings = demo_environment.environment(paths.ROOT)
    surroundings["kvpack"].pop("threads", None)  # those of this process, which measures nothing
    return surroundings | {
        "commit": commit(),
        "compared": {name: found for name in COMPARED if (found := _version(name))},
        "threads": list(options.threads),
        "quick": options.quick,
    }


def commit() -> str | None:
    """Return the checkout's commit, with "-dirty" if what is measured differs from it; None outside a git checkout."""
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name}-dirty" if changed else name


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(paths.ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
