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


def rust_code(path: Path) -> str:
    """A file without its comments, and without what only tests see."""
    code = path.read_text().split("#[cfg(test)]\nmod tests {")[0]
    return "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("//"))


def rust_files() -> list[Path]:
    """The files of the crate but its tests'."""
    tests = {path for path in CRATE.rglob("*.rs") if "tests" in path.parts or path.stem.endswith("tests")}
    return sorted({*CRATE.rglob("*.rs")} - tests)


def rust_uses() -> dict[str, set[str]]:
    """Which rooms of the crate each room uses."""
    rooms = {path.stem for path in CRATE.iterdir() if path.stem not in ("lib", "tests")}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for path in rust_files():
        room = path.relative_to(CRATE).parts[0].removesuffix(".rs")
        if room in rooms:
            code = rust_code(path)
            used = set(re.findall(r"\bcrate::(\w+)", code))
            used |= {name for group in re.findall(r"\bcrate::\{([^}]*)\}", code) for name in re.findall(r"\w+", group)}
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


def test_arrows_of_the_map_hold() -> None:
    """A room uses none that stands below it in the table of `src/lib.rs`."""
    rooms = re.findall(r"^//! \| \[?`(?:mod@)?(\w+)`", (CRATE / "lib.rs").read_text(), re.MULTILINE)
    uses = rust_uses()
    assert set(rooms) == set(uses)
    wrong = {room: {used for used in uses[room] if rooms.index(used) > rooms.index(room)} for room in rooms}
    assert not any(wrong.values()), wrong


FAMILIES = ["quantize", "evict", "select", "compact", "prune", "share"]


def test_families_of_methods_are_folders() -> None:
    folders = {path.parent.name for path in (PACKAGE / "methods").glob("*/__init__.py")}
    assert folders == set(FAMILIES) == set(kvpack.methods.FAMILIES)
    for family in FAMILIES:
        assert (PACKAGE / "methods" / family / "base.py").exists()
        assert (CRATE / family / "mod.rs").exists()


def test_no_method_is_named_outside_its_family() -> None:
    """What is outside knows traits: `match` on a method, or a call of one, could not be written there."""
    words = {"quantize": set(), "evict": set(), "select": set(), "compact": set(), "prune": set(), "share": set()}
    for family, methods in words.items():
        for path in rust_files():
            if path.relative_to(CRATE).parts[0] == family:
                methods |= set(
                    re.findall(r"impl (?:Method|Scorer|Selector|Compactor|Prune|Share) for (\w+)", rust_code(path))
                )
    assert {"Kivi", "Kvarn"} <= words["quantize"]
    assert {"SnapKv", "Keys"} <= words["evict"]
    assert all(words.values())
    for path in rust_files():
        room = path.relative_to(CRATE).parts[0]
        for family, methods in words.items():
            if room != family:
                named = {
                    name for name in methods if re.search(rf"\b{family}::(?:\{{[^}}]*\b)?{name}\b", rust_code(path))
                }
                assert not named, f"{path.relative_to(CRATE)} names {named}"


def test_quantize_forbids_states_by_types() -> None:
    for path in rust_files():
        if path.relative_to(CRATE).parts[0] == "quantize":
            code = rust_code(path)
            assert "unreachable!" not in code
            assert "panic!" not in code


@pytest.mark.parametrize("path", sorted(CRATE.rglob("*.rs")), ids=lambda path: str(path.relative_to(CRATE)))
def test_files_of_the_crate_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_what_all_methods_share_knows_no_family() -> None:
    imports = python_imports()
    for module in ("methods.base", "methods.registry", "methods.renamed"):
        assert not [other for other in imports[module] if other.split(".")[1:2] and other.split(".")[1] in FAMILIES]
    forbidden = {"attention", "cache", "companion", "inspection", "layer", "transaction"}
    for module in imports:
        if module.startswith("methods"):
            assert not imports[module] & forbidden


@pytest.mark.parametrize("name", ["cache", "inspection", "layer", "transaction", "companion"])
def test_a_cache_names_no_companion(name: str) -> None:
    text = (PACKAGE / f"{name}.py").read_text().replace("`kvpack.LazyLLM`", "")  # an example
    assert not [companion for companion in kvpack.methods.COMPANIONS.values() if companion.__name__ in text]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
