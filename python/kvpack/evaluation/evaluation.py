"""The results of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .report import html, markdown, text
from .store import ABOUT, RESULTS, Record, read
from .summary import Row, summarise


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        records: a dictionary for each cell; `pandas.DataFrame(evaluation.records)` takes them as they are.
        identity: model, text and sizes that they belong to.
    """

    records: Sequence[Record] = field(repr=False)
    identity: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Read what `evaluate(..., out=folder)` wrote.

        Raises:
            OptionError: there are no results.
        """
        import json

        folder = Path(folder)
        try:
            identity = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            records = read(folder / RESULTS)
        except (OSError, json.JSONDecodeError) as error:
            raise OptionError(f"{folder} holds no results of an evaluation: {error}") from None
        if not records:
            raise OptionError(f"{folder} holds no results of an evaluation yet")
        return cls(records, identity)

    @cached_property
    def rows(self) -> list[Row]:
        """A row a method, the full cache first; see `summary.summarise`."""
        return summarise(self.records)

    def markdown(self) -> str:
        """Return the leaderboard as a Markdown table."""
        return markdown(self.rows, self.identity)

    def save(self, folder: str | Path) -> list[Path]:
        """Write `leaderboard.md` and the pictures into a folder; return the files."""
        from .pictures import draw_all

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / "leaderboard.md"
        pictures = draw_all(self.rows, self.records, self.identity, folder)
        shown = "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in pictures)
        table.write_text(self.markdown() + shown, encoding="utf-8")
        return [table, *pictures]

    def plot(self, against: str = "bytes") -> Any:
        """Return a matplotlib figure: KL against `"bytes"` a token, or against `"ms"` a token.

        Raises:
            OptionError: `against` is something else, or nothing to draw was measured.
        """
        from .pictures import pareto

        return pareto(self.rows, self.identity, against)

    def __str__(self) -> str:
        return text(self.rows)

    def _repr_html_(self) -> str:
        return html(self.rows)
