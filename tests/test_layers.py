"""Imports go from higher layers to lower ones, in every module."""

import ast
import re

from places import ROOT

PACKAGE = ROOT / "src" / "steer_heal"
AGENTS = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
LAYERS = tuple(
    re.split(r"[,\s`.]+", re.search(r"<!-- layers -->(.*?)<!-- end -->", AGENTS, re.DOTALL)[1].strip(" \n`."))
)
"""From the lowest to the highest, as AGENTS.md lists them: a folder or module imports its own layer and lower ones."""


def layer_of(path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path) -> set[str]:
    """Layers of this package that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            whole = node.module == "steer_heal"
            names = [f"steer_heal.{alias.name}" for alias in node.names] if whole else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("steer_heal.")}
    return found


def upward(path) -> set[str]:
    own = LAYERS.index(layer_of(path))
    return {name for name in imported(path) if LAYERS.index(name) > own}


def test_no_import_goes_from_a_lower_layer_to_a_higher_one():
    modules = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert {layer_of(path) for path in modules} == set(LAYERS), "every module has a layer"
    assert {str(path.relative_to(PACKAGE)): upward(path) for path in modules if upward(path)} == {}


def test_an_import_to_a_higher_layer_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("test_layers.PACKAGE", tmp_path)
    (tmp_path / "model").mkdir()
    for line in (
        "import steer_heal.loop",
        "from steer_heal import report",
        "def f():\n    from steer_heal.runs import x",
    ):
        (tmp_path / "model" / "lm.py").write_text(line)
        assert len(upward(tmp_path / "model" / "lm.py")) == 1, line


def test_no_function_has_more_than_sixty_lines():
    long = [
        (path.name, node.name)
        for path in (*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert not long
