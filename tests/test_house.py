"""The house: which room may use which, no import in a circle or up a floor, and how long things are."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hvd_saef"
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "older_torch", "settings", "kernels"}),
    frozenset({"compression"}),
    frozenset({"memory", "transport"}),
    frozenset({"round"}),
    frozenset({"checkpoints"}),
    frozenset({""}),  # what users hold: the other files of hvd_saef/ itself
    frozenset({"planning", "doctor"}),
    frozenset({"cli"}),
)
"""Rooms from the lowest floor to the highest. A room uses its own files and the floors below."""


def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its dotted name within the package; "" is the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of the package that this one imports when it is imported itself."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hvd_saef":
            base = (node.module or "").removeprefix("hvd_saef").removeprefix(".")
            for name in node.names:
                inner = f"{base}.{name.name}".removeprefix(".")
                found.add(inner if inner in known else base)
    return found


def graph() -> dict[str, set[str]]:
    """What each module imports of the package."""
    trees = modules()
    return {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}


def room(module: str) -> str:
    """The room that a module belongs to: its folder, or its own name where that is a floor's."""
    first = module.split(".")[0]
    return first if any(first in floor for floor in FLOORS) else ""


def floor(module: str) -> int:
    """The number of the floor that a module is on."""
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def upwards(edges: dict[str, set[str]]) -> list[str]:
    """The imports that go up a floor, or into another room of the same floor."""
    return [
        f"{user} uses {used}"
        for user, targets in edges.items()
        for used in sorted(targets)
        if room(user) != room(used) and floor(used) >= floor(user)
    ]


def test_no_import_goes_up_a_floor() -> None:
    edges = graph()
    assert len(edges) > 40
    assert upwards(edges) == []


def test_no_import_goes_in_a_circle() -> None:
    edges = graph()
    order = list(TopologicalSorter(edges).static_order())
    assert order.index("settings") < order.index("round.session") < order.index("optimizer")


def test_both_would_be_found() -> None:
    edges = graph()
    edges["memory.layout"] = edges["memory.layout"] | {"round.session"}
    assert upwards(edges) == ["memory.layout uses round.session"]
    with pytest.raises(CycleError):
        list(TopologicalSorter(edges).static_order())


MOST_LINES, MOST_LINES_OF_CODE = 330, 65


def lines_of_code(function: ast.AST) -> int:
    """The lines of a function's own statements: without its signature, docstring and nested definitions."""
    body: list[ast.stmt] = getattr(function, "body", [])
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        body = body[1:]
    nested = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return sum((s.end_lineno or 0) - s.lineno + 1 for s in body if not isinstance(s, nested))


def test_files_and_functions_are_of_a_size_to_be_read() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert [path for path, length in lengths.items() if length > MOST_LINES] == []
    functions = {
        f"{name}.{node.name}": lines_of_code(node)
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert len(functions) > 500
    assert {name: lines for name, lines in functions.items() if lines > MOST_LINES_OF_CODE} == {}
    assert max(functions.values()) > 40  # the count counts
