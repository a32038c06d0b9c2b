"""The quickstart's text: three files, the same each time, nothing left over."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "quickstart_text.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, pointed at a small library instead of this machine's."""
    spec = importlib.util.spec_from_file_location("quickstart_text", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    doc = "A sentence that is long enough to be kept as a docstring by the script."
    files = {
        "lib/b.py": "x = 1\n",
        "lib/a.py": "y = 'é'\n",
        "lib/test/c.py": "z = 1\n",
        "lib/bad.py": b"\xff\xfe",
        "lib/site-packages/p/__init__.py": f'"""{doc}"""\ndef f():\n    """{doc} \\d"""\ndef g():\n    """short"""\n',
        "lib/site-packages/p/broken.py": f'"""{doc}""" """ """ """ ( \n',
        "lib/site-packages/p/tests/t.py": f'"""{doc}"""\n' * 4,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    paths = {"stdlib": str(tmp_path / "lib"), "purelib": str(tmp_path / "lib" / "site-packages")}
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: paths)
    return module


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_three_files(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.warnings, "simplefilter", lambda *_: None)  # it would outlive the test
    script.main([str(tmp_path / "one")])
    assert capsys.readouterr().out.count("documents") == 3
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["code.jsonl", "docstrings.jsonl", "reference.jsonl"]
    assert documents(tmp_path / "one" / "code.jsonl") == ["y = 'é'\n", "x = 1\n"]
    (docs,) = documents(tmp_path / "one" / "docstrings.jsonl")
    assert docs.count("A sentence") == 2
    assert len(documents(tmp_path / "one" / "reference.jsonl")) > 50
    script.main([str(tmp_path / "two")])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_size_is_bounded(script: ModuleType, tmp_path: Path) -> None:
    script.write(tmp_path / "a.jsonl", ("x" * 100 for _ in range(1000)), 1000)
    assert 1000 <= (tmp_path / "a.jsonl").stat().st_size < 1200


def test_a_failure_leaves_nothing(script: ModuleType, tmp_path: Path) -> None:
    def texts() -> object:
        yield "x"
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        script.write(tmp_path / "out" / "a.jsonl", texts())
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["a", "b"], 2)])
def test_usage(script: ModuleType, arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(arguments)
    assert caught.value.code == code
    assert "OUT_DIR" in capsys.readouterr().out


def test_it_needs_only_the_standard_library() -> None:
    import ast

    tree = ast.parse(SCRIPT.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
