"""The questions, one file each. A question prints one table and says how to read it."""

from __future__ import annotations

import ast
from pathlib import Path

QUESTIONS = {
    path.stem: (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem not in ("__init__", "lab")
}
"""What each question asks, by the name that `steer-heal diag` takes. It is read without importing torch."""
