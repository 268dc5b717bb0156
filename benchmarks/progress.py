"""Progress bars that say what is measured and how long it will last."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining


class Bar:
    """One bar: a part's steps."""

    def __init__(self, bars: Progress, task: TaskID, title: str) -> None:
        self._bars, self._task, self._title = bars, task, title

    def say(self, what: str) -> None:
        """Show what is measured now."""
        self._bars.update(self._task, description=f"{self._title}: {what}"[:58])

    def advance(self) -> None:
        """One step is done."""
        self._bars.advance(self._task)

    def end(self) -> None:
        """Show the title alone again."""
        self._bars.update(self._task, description=self._title)


class Bars:
    """All bars of a run; a context manager."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:<58}"), BarColumn(bar_width=24), MofNCompleteColumn())
        # Steps are long and few: the estimate must look back farther than rich does by default.
        times = (TimeElapsedColumn(), TextColumn("left"), Remaining(elapsed_when_finished=False))
        # Once a second, as drawing takes from the CPUs that are measured.
        self._bars = Progress(*columns, *times, console=console, speed_estimate_period=600, refresh_per_second=1)

    def add(self, title: str, total: int) -> Bar:
        """Add a bar of `total` steps."""
        return Bar(self._bars, self._bars.add_task(title, total=total), title)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
