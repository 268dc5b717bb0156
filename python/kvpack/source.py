"""What the source of a model's classes says: whether they hand keys to a cache, and how they call their attention."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Source:
    """What the source of a class, or of a module's table of classes, says.

    Attributes:
        names: the names in it.
        updates: whether it hands keys and values to a cache.
        compares: whether what it does depends on whether attention is called "sdpa".
        picks: whether it picks a class by the name of the attention implementation.
        passed: arguments that it names when it calls its attention function.
    """

    names: frozenset[str]
    updates: bool
    compares: bool
    picks: bool
    passed: frozenset[str]

    @property
    def uses_interface(self) -> bool:
        """Whether the attention function is looked up by name."""
        return "ALL_ATTENTION_FUNCTIONS" in self.names


@functools.cache
def sources_of(module: str) -> dict[str, Source]:
    """The classes of a module, and its variables, by name; empty where its source is not to be had."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    sources = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            sources[node.name] = _source(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            sources[node.targets[0].id] = _source(node)
    return sources


def _source(tree: ast.AST) -> Source:
    names, passed = set(), set()
    updates = compares = picks = False
    for node in _walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            updates |= node.func.attr == "update" and len(node.args) >= 3  # (keys, values, layer_idx)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) >= 4:
            if isinstance(node.args[0], ast.Name) and node.args[0].id == "self":
                passed |= {keyword.arg for keyword in node.keywords if keyword.arg}
        elif isinstance(node, ast.Compare):
            compares |= _says_implementation(node.left) and any(_says_sdpa(right) for right in node.comparators)
        elif isinstance(node, ast.Subscript):
            picks |= _says_implementation(node.slice) and not ast.unparse(node.value).startswith("ALL_")
    return Source(frozenset(names), updates, compares, picks, frozenset(passed))


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a tree but what can be recorded of a model and how its weights begin, which name other models' classes."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        recorded = isinstance(child, ast.Assign) and "_can_record_outputs" in ast.unparse(child.targets[0])
        if not recorded and getattr(child, "name", None) != "_init_weights":
            yield from _walk(child)


def _says_implementation(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name in ("_attn_implementation", "attn_implementation")


def _says_sdpa(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Constant) and part.value == "sdpa" for part in ast.walk(node))


def parts_of(model_class: type[PreTrainedModel]) -> Iterator[tuple[str, Source]]:
    """The classes that a model is made of, as far as they share its configuration, with their sources."""
    config_class = getattr(model_class, "config_class", None)
    stack: list[tuple[str, str]] = [(base.__module__, base.__name__) for base in bases_of(model_class)]
    done: set[tuple[str, str]] = set()
    while stack:
        module, name = stack.pop()
        source = sources_of(module).get(name)
        if (module, name) in done or source is None:
            continue
        done.add((module, name))
        yield name, source
        for other in sorted(source.names):
            found = getattr(sys.modules[module], other, None)
            if isinstance(found, dict):  # a table of classes
                stack.append((module, other))
            elif isinstance(found, type) and issubclass(found, nn.Module) and _of_a_model(found):
                another = issubclass(found, PreTrainedModel) and getattr(found, "config_class", None) != config_class
                if not another:
                    stack.extend((base.__module__, base.__name__) for base in bases_of(found))


def bases_of(module_class: type) -> Iterator[type]:
    """The class and what it inherits from models."""
    return (base for base in module_class.__mro__ if issubclass(base, nn.Module) and _of_a_model(base))


def _of_a_model(module_class: type) -> bool:
    module = module_class.__module__
    return not module.startswith(("torch.", "transformers.")) or module.startswith("transformers.models.")
