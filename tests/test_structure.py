"""Arrows run one way: no circle of imports, in the package or between the rooms of the crate."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import kvpack
import pytest

PACKAGE = Path(kvpack.__file__).parent
CRATE = Path(__file__).resolve().parent.parent / "src"


def python_imports() -> dict[str, set[str]]:
    """Which modules each module imports when it is itself imported."""
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items() if name != "__init__"}

    def target(name: str) -> str | None:
        """The module that a dotted name is, or is in."""
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or None

    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.parse(path.read_text()).body:  # not what only types or calls need
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    found[name].add(target(".".join([*base, alias.name])) or name)
        found[name].discard(name)
    return found


def rust_uses() -> dict[str, set[str]]:
    """Which rooms of the crate each room uses."""
    rooms = {path.stem for path in CRATE.iterdir() if path.stem not in ("lib", "tests")}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for path in CRATE.rglob("*.rs"):
        room = path.relative_to(CRATE).parts[0].removesuffix(".rs")
        if room in rooms and path.stem != "tests":
            code = path.read_text().split("#[cfg(test)]")[0]
            code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("//"))
            used = set(re.findall(r"\bcrate::(\w+)", code))
            found[room] |= (used & rooms) - {room}
    return found


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle, if there is one."""
    done: set[str] = set()

    def walk(at: str, path: list[str]) -> list[str]:
        if at in path:
            return [*path[path.index(at) :], at]
        if at not in done:
            for to in sorted(arrows.get(at, ())):
                if found := walk(to, [*path, at]):
                    return found
            done.add(at)
        return []

    return next((found for start in sorted(arrows) if (found := walk(start, []))), [])


@pytest.mark.parametrize("arrows", [python_imports, rust_uses])
def test_no_import_runs_in_a_circle(arrows: object) -> None:
    found = arrows()  # type: ignore[operator]
    assert len(found) > 8
    assert any(found.values())
    assert circle(found) == []


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
