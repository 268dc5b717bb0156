"""The peak of a process's memory."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Watches a `with` block.

    Attributes:
        bytes: afterwards, the most memory that the process had meanwhile above what it had before; None where the
            system does not let the peak be reset.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        return_free_memory()  # or what is taken from it would not count
        self._resettable = _reset_peak()
        self._before = _status_bytes("VmRSS") if self._resettable else 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._resettable:
            self.bytes = _status_bytes("VmHWM") - self._before


def return_free_memory() -> None:
    """Give the system the memory back that the process has freed and its allocator has kept."""
    with suppress(OSError, AttributeError):  # glibc alone can
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Make the system forget the process's peak memory; say whether it did."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)
