"""results.tsv: one row for each finished run of a folder."""

from __future__ import annotations

import fcntl
from pathlib import Path
from urllib.parse import quote

from steer_heal.errors import printable
from steer_heal.events import Extracted, Measured, RoundDone, Run
from steer_heal.runs.log import last_hash
from steer_heal.runs.storage import atomic_write
from steer_heal.verdict import table

RESULTS = "results.tsv"
OF_HEAL = ("target", "text", "teacher", "divergence", "aggregate", "lam", "tau", "reference")
"""Settings of the heal that have a column."""
Row = dict[str, str | float | None]


def result_row(run: Run) -> Row:
    """What results.tsv says of a finished run: its settings, its last healed state, its cosines and verdict."""
    config = run.start.config
    rows = table(run)
    healed = [row for row, state in zip(rows, run.each(Measured), strict=True) if state.state == "healed"]
    vectors = run.each(Extracted)
    rounds = run.each(RoundDone)
    end = run.end
    assert end is not None
    return {
        "preset": run.start.preset,
        "model": config.model,
        "trait": run.start.trait.name,
        "seed": config.seed,
        "n_rounds": run.n_rounds,
        **{name: getattr(config.heal, name) for name in OF_HEAL},
        **(healed[-1] if healed else dict.fromkeys(rows[-1])),
        "cosine_to_first": vectors[-1].cosine_to_first if vectors else None,
        "cosine_student_first": rounds[-1].cosine_student_first if rounds else None,
        "wall_s": end.wall_s,
        "verdict": end.verdict,
    }


def append_result(out: Path, row: Row) -> None:
    """One row of results.tsv, in place of one that the run had before it went on to more rounds. A new column rewrites
    the header; older rows stay empty there.

    A lock file keeps runs that finish together from losing each other's rows.
    """
    with (out / f".{RESULTS}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = read_results(out / RESULTS)
        new = {key: _cell(value) for key, value in row.items()}
        old = next((i for i, other in enumerate(rows) if other.get("run") == new["run"]), len(rows))
        if old < len(rows) and rows[old].get("last_hash") == new.get("last_hash"):
            return
        rows[old : old + 1] = []
        columns = list(dict.fromkeys([*(rows[0] if rows else ()), *row]))
        rows.insert(old, new)
        lines = ["\t".join(columns), *("\t".join(r.get(c, "") for c in columns) for r in rows)]
        with atomic_write(out / RESULTS) as part:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape", newline="\n")


def read_results(path: Path) -> list[dict[str, str]]:
    """Rows of results.tsv as text; none where there is no file."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n") if path.exists() else [""]
    return [dict(zip(lines[0].split("\t"), line.split("\t"), strict=False)) for line in lines[1:] if line]


def row_of(folder: Path) -> dict[str, str] | None:
    """The row of the run in `folder`; None: it has none."""
    name = run_cell(folder)
    return next((row for row in read_results(folder.resolve().parent / RESULTS) if row.get("run") == name), None)


def has_result(folder: Path) -> bool:
    """Whether results.tsv names the last event of the run, as it does once all that follows from a finished run is
    made."""
    row = row_of(folder)
    return row is not None and row.get("last_hash") == last_hash(folder)


def run_cell(folder: Path) -> str:
    """What the column `run` says of a folder: its name, percent-encoded if a cell would change it."""
    name = folder.resolve().name
    return name if _cell(name) == name else quote(name, safe="", errors="surrogateescape")


def _cell(value: str | float | None) -> str:
    """The value without tabs, line ends and other spaces that a cell cannot hold."""
    return "" if value is None else " ".join(printable(str(value)).split())
