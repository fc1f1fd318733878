"""Arms of results.tsv over seeds or, of run folders, every state; as Markdown."""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from steer_heal.diag.lab import cli, markdown
from steer_heal.errors import UserError, print_safe
from steer_heal.report.measurements import table, verdict
from steer_heal.runs.events import RESULTS, current, of_stage, read_events, read_results, schema_errors
from steer_heal.sweep.results import frame, over_seeds, spread

COLUMNS = (
    "shift",
    "coherence",
    "text_tail_ppl_median",
    "degenerate_frac",
    "oracle",
    "kl_base",
    "persona_log_odds",
    "cosine_to_first",
    "cosine_student_first",
    "wall_s",
)


def states(run: Path, rounds: int | None) -> tuple[list[dict[str, Any]], str]:
    """(a row for each state of a run, its verdict) after so many rounds."""
    events = [e for e in current(read_events(run)) if rounds is None or e["round"] is None or e["round"] < rounds]
    if not (ends := of_stage(events, "round")):
        raise UserError(f"{run} has no finished round; give a run that has one")
    with schema_errors(run):
        seed = events[0]["seed"]
        rows = [{"seed": seed, **row} for row in table(events)]
        return rows, f"- seed {seed}, {ends[-1]['wall_s']:.0f} s: {verdict(events)}"


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    out: Path = Path("out"),
    rounds: int | None = None,
    columns: tuple[str, ...] = COLUMNS,
) -> None:
    """Prints the tables.

    Args:
        runs: Folders whose states are shown.
        out: Without folders: where results.tsv is.
        rounds: Shows only so many rounds of each run.
        columns: Of the arms.
    """
    if runs:
        tables = [states(run, rounds) for run in runs]
        print_safe(markdown([row for rows, _ in tables for row in rows]))
        print_safe("\n" + "\n".join(line for _, line in tables))
    elif rows := read_results(out / RESULTS):
        print_safe(markdown(spread(over_seeds(frame(rows)), columns).to_dicts()))
    else:
        raise UserError(f"{out / RESULTS} has no rows yet; finish a run first (`just toy`)")


if __name__ == "__main__":
    sys.exit(cli(main))
