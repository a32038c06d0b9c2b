"""The house holds: levels, no cycles, 400 lines, docstrings, public names, and commands that are functions of the same name."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import shearling
from shearling import api, cli
from shearling.compare import compare

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "shearling"
LEVELS: dict[str, int] = {
    **dict.fromkeys(("errors", "io", "modeling_sheared", "inputs"), 0),
    **dict.fromkeys(("config", "arch", "shapes", "schedules", "board", "world"), 1),
    **dict.fromkeys(("prune", "data", "objectives"), 2),
    **dict.fromkeys(("train", "evaluate", "sources", "export"), 3),
    **dict.fromkeys(("recipe", "planning", "run", "show", "texts", "summary", "steering"), 4),
    **dict.fromkeys(
        ("stages", "distilling", "subject", "pruning", "training", "measure", "pictures", "report", "progress", "wiring", "api"), 4
    ),
    **dict.fromkeys(("budget", "contenders", "compare", "comparison", "comparison_picture"), 4),
    **dict.fromkeys(("cli", "__init__", "__main__"), 5),
}
"""Level of every room: a file, or a folder as a whole. A room imports from its own level and below."""
FOLDERS = ("prune", "data", "objectives", "train", "evaluate")
"""Folders that never import one another inside a level; lower levels they may use, and only what their level allows."""


def name_of(path: Path) -> str:
    """`prune.gates` for src/shearling/prune/gates.py; a folder's __init__ has the folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, *, only_at_import: bool = False) -> set[str]:
    """Modules of ours that a module imports, typing's excepted; `only_at_import` leaves out those inside functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    visit(other)
                continue
            if only_at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: a relative import"
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(FILES[name].read_text()))
    ours = (target.removeprefix("shearling.") for target in found if target.startswith("shearling."))
    return {target if target in FILES else target.rpartition(".")[0] or "__init__" for target in ours} - {"__init__"}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in FILES} == set(LEVELS)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name: str) -> None:
    own, level = room(name), LEVELS[room(name)]
    for target in imports(name):
        other = room(target)
        if other == own:
            continue
        assert LEVELS[other] <= level, f"{name} (level {level}) imports {target} (level {LEVELS[other]})"
        if own in FOLDERS and other in FOLDERS:
            assert LEVELS[other] < level, f"{name} imports {target}: folders of one level never import one another"


def test_the_reader_of_imports_sees_imports() -> None:
    assert imports("prune.transform") == {"arch.axes", "arch.families", "prune.plan"}
    assert "stages" in imports("wiring") and "stages" not in imports("wiring", only_at_import=True)
    assert not imports("errors")


def test_no_cycles() -> None:
    """Not even through imports inside functions."""
    graph = {name: imports(name) for name in FILES}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("folder", ["src", "tests", "recipes", "examples"])
def test_no_file_is_longer_than_400_lines(folder: str) -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert not {path: length for path, length in lengths.items() if length > 400}


def test_every_module_says_what_it_is_for() -> None:
    for name, path in FILES.items():
        if path.stat().st_size:  # the __init__ of a folder may be empty
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            assert docstring and docstring.split("\n")[0].endswith((".", ":", ";")), name


def test_what_is_public_is_documented() -> None:
    missing = []
    for name, path in FILES.items():
        owners: list[Any] = [(name, ast.parse(path.read_text()))]
        while owners:
            where, owner = owners.pop()
            for node in owner.body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                    if ast.get_docstring(node) is None:
                        missing.append(f"{where}.{node.name}")
                    if isinstance(node, ast.ClassDef):
                        owners.append((f"{where}.{node.name}", node))
    assert not missing


def test_all_is_what_the_package_gives() -> None:
    assert sorted(shearling.__all__) == list(shearling.__all__)
    for name in shearling.__all__:
        assert getattr(shearling, name).__name__ in (name, "RecipeLike")
    assert set(shearling.__all__) == set(shearling._HOME_OF)
    assert set(shearling.__all__) <= set(dir(shearling))
    typed = next(node for node in ast.parse(FILES["__init__"].read_text()).body if isinstance(node, ast.If))
    assert {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names} == set(shearling.__all__)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = shearling.nothing_of_the_kind


def test_the_functions_stay_when_folders_of_their_names_are_imported() -> None:
    """`shearling.prune` is a command, and a folder; whatever was imported before, the name gives the command."""
    code = "import {0}\nimport shearling\nassert shearling.{1} is __import__('shearling.api').api.{1}, shearling.{1}"
    modules = ("shearling.run", "shearling.report", "shearling.prune.plan", "shearling.train.config", "shearling.evaluate")
    for module in modules:
        importlib.import_module(module)
        assert getattr(shearling, module.split(".")[1]) is getattr(api, module.split(".")[1])
    lines = "\n".join(code.format(module, module.split(".")[1]) for module in modules)
    subprocess.run([sys.executable, "-c", lines], check=True)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, shearling.cli; print([m for m in ('torch', 'transformers', 'datasets', 'matplotlib', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def commands() -> dict[str, Any]:
    """Function name -> command; `data inspect` is the function `inspect_data`."""
    groups = {"": cli.app} | {f"_{group.name}": group.typer_instance for group in cli.app.registered_groups}
    return {
        f"{command.name or command.callback.__name__}{suffix}": command.callback
        for suffix, app in groups.items()
        for command in app.registered_commands  # type: ignore[union-attr]
        if command.callback
    }


HOMES = (api, inspect.getmodule(compare))
"""Modules whose public functions are commands."""


def test_every_command_is_a_function_and_the_reverse() -> None:
    functions = {name for name in shearling.__all__ if inspect.getmodule(getattr(shearling, name)) in HOMES}
    assert set(commands()) == functions
    alone = {name for name in functions if not name.endswith("_data")}
    assert set(typer.main.get_command(cli.app).commands) == alone | {"data"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", commands())
def test_a_command_has_its_functions_arguments_and_defaults(name: str) -> None:
    """`show` is Python's own and `--json` the command's; nothing given is None, () or an empty text."""
    function, command = (inspect.signature(f).parameters for f in (getattr(shearling, name), commands()[name]))
    assert set(function) - {"show"} == set(command) - {"as_json"}
    for parameter in set(command) - {"as_json"}:
        defaults = [None if p.default in (None, (), "") else p.default for p in (function[parameter], command[parameter])]
        assert defaults[0] == defaults[1], parameter
