"""What was measured: for each part its environment and rows, on disk as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows(list[Row]):
    """Rows of one part, found by the values of their fields."""

    def where(self, **fields: Any) -> Rows:
        """Return the rows that have all these values."""
        return Rows(row for row in self if all(row.get(name) == value for name, value in fields.items()))

    def one(self, **fields: Any) -> Row | None:
        """Return the first row that has all these values; None where there is none."""
        return next(iter(self.where(**fields)), None)

    def distinct(self, name: str) -> list[Any]:
        """Return the values of a field in the order of their first row."""
        values: list[Any] = []
        for row in self:
            if name in row and row[name] not in values:  # a head shape is a list, so no dict can find it
                values.append(row[name])
        return values

    def measured(self) -> Rows:
        """Return the rows that have a result: where something was missing, `missing` says what."""
        return Rows(row for row in self if "missing" not in row)


@dataclass
class Part:
    """One part's rows, and what the numbers depend on."""

    environment: dict[str, Any]
    rows: Rows


@dataclass
class Results:
    """All parts, by name. Ratios are taken within a part, so parts may be of different runs."""

    parts: dict[str, Part] = field(default_factory=dict)

    def rows(self, part: str) -> Rows:
        """Return the rows of a part; none where it was not run."""
        return self.parts[part].rows if part in self.parts else Rows()

    def __iter__(self) -> Iterator[tuple[str, Part]]:
        return iter(self.parts.items())

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote; a file that is not there holds no parts."""
        if not path.exists():
            return cls()
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls({name: Part(part["environment"], Rows(part["rows"])) for name, part in content["parts"].items()})

    def save(self, path: Path) -> None:
        """Write all parts."""
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {name: {"environment": part.environment, "rows": list(part.rows)} for name, part in self}
        path.write_text(json.dumps({"parts": parts}, indent=1) + "\n", encoding="utf-8")
