"""The house: which room may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

ROOMS = ("api", "telemetry", "verification", "pipeline", "engine", "protocol", "imaging", "errors")
"""Each imports only rooms to its right, and itself."""

MAY_IMPORT = {
    **{room: set(ROOMS[number:]) for number, room in enumerate(ROOMS)},
    "intake": {"intake", "imaging", "errors"},
    "settings": {"settings", "telemetry", "verification", "pipeline", "engine", "intake", "imaging"},
    "__main__": {"api", "telemetry", "settings", "protocol", "imaging"},
}
MAY_IMPORT["api"] |= {"intake"}
MAY_IMPORT["telemetry"] |= {"intake"}

ASSEMBLY = {"api/app.py", "__main__.py"}
"""The only files that read the settings."""

SERVER = ROOT / "server" / "ergo_server"
FILES = sorted(path for path in SERVER.rglob("*.py") if path != SERVER / "__init__.py")


def _imports(path: Path, package: str) -> Iterator[str]:
    """Yield the dotted names below ``package`` that a file imports anywhere, type checking included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == package:
            names = [f"{package}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}."))


def _room(path: Path) -> str:
    return path.relative_to(SERVER).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SERVER)))
def test_a_room_imports_only_rooms_to_its_right(path: Path) -> None:
    """No file imports against the order api, telemetry, pipeline, engine, protocol, imaging, errors."""
    rooms = {name.split(".")[0] for name in _imports(path, "ergo_server")} - {"__version__"}
    allowed = MAY_IMPORT[_room(path)] | ({"settings"} if str(path.relative_to(SERVER)) in ASSEMBLY else set())
    assert rooms <= allowed


def test_no_two_modules_import_each_other() -> None:
    """The graph of modules has no cycle."""
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(SERVER).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set(_imports(path, "ergo_server"))
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        for imported in graph.get(name, set()) - done:
            visit(imported, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_only_one_file_imports_torch() -> None:
    """torch and transformers are imported by the embedded engine alone."""
    users = [path for path in FILES if any(word in path.read_text() for word in ("import torch", "from transformers"))]
    assert users == [SERVER / "engine" / "embedded.py"]


def test_the_client_imports_nothing_of_the_server() -> None:
    """ergo_client stands alone: httpx2 and the standard library."""
    text = "".join(path.read_text() for path in (ROOT / "client").rglob("*.py"))
    assert "ergo_server" not in text
    assert "ergo_train" not in text
