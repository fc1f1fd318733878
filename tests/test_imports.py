"""Imports run one way: run -> stages, evals -> lm, divergence, records."""

import ast

from steer_heal.files import ROOT

PACKAGE = ROOT / "src" / "steer_heal"
ABOVE = {
    "run",
    "session",
    "config",
    "events",
    "console",
    "plot",
    "report",
    "readings",
    "lab",
    "resume",
    "guard",
    "provenance",
    "eval_cache",
}
FORBIDDEN = {
    "stages": ABOVE,
    "evals": ABOVE,
    "records": None,
    "files": {"*records"},
    "divergence": set(),
    "eval_cache": {"config", "console", "lab", "session"},
    "terminal": None,
    "account": None,
    "memory": {"*records"},
    "sampling": {"*"},
    "lm": {"*files", "*memory", "*records"},
    "caches": {"*lm"},
    "steering": {"*caches", "*lm", "*memory", "*sampling"},
    "traits": {"*files", "*records", "*stages"},
    "provenance": {"*events", "*files", "*lm", "*records", "*terminal"},
    "readings": {"*records"},
    "events": {"*files", "*records", "*terminal"},
    "plot": {"*events", "*readings", "*terminal"},
    "report": {"*events", "*plot", "*readings", "*terminal"},
}
"""Per module or folder: names it must not import, or, starred, the only ones that it may."""


def _imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("steer_heal"):
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
    return found


def test_imports_run_one_way():
    for path in sorted(PACKAGE.rglob("*.py")):
        owner = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if owner not in FORBIDDEN or path.name == "__main__.py":
            continue
        rule, imports = FORBIDDEN[owner], _imports(path)
        allowed = {name[1:] for name in rule or () if name.startswith("*")}
        if rule is None or allowed:
            assert imports <= allowed, f"{path.name} imports {imports - allowed}"
        else:
            assert not imports & rule, f"{path.name} imports {imports & rule}"


def test_no_trait_is_named_in_code():
    for path in PACKAGE.rglob("*.py"):
        for line in path.read_text().splitlines():
            assert "if trait ==" not in line and "trait.name ==" not in line, f"{path.name}: {line}"


def test_files_stay_readable_in_one_sitting():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 300}
    assert long == {}
