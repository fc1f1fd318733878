"""Arms of results.tsv over seeds or, for run folders, every state, as Markdown."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from common import cli

from steer_heal.errors import UserError, print_safe
from steer_heal.events import RoundDone, Run
from steer_heal.report.tables import markdown
from steer_heal.runs.log import read_events, schema_errors
from steer_heal.runs.results import RESULTS, read_results
from steer_heal.sweep.results import frame, over_seeds, spread
from steer_heal.verdict import table, verdict

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


def states(folder: Path, n_rounds: int | None) -> tuple[Sequence[Mapping[str, object]], str]:
    """(a row for each state of a run, its verdict) after so many rounds."""
    run = Run(e for e in read_events(folder) if n_rounds is None or e.round is None or e.round < n_rounds)
    ends = run.each(RoundDone)
    if not ends:
        raise UserError(f"{folder} has no finished round; give a run that has one")
    with schema_errors(folder):
        seed = run.start.config.seed
        rows = [{"seed": seed, **row} for row in table(run)]
        return rows, f"- seed {seed}, {ends[-1].wall_s:.0f} s: {verdict(run)}"


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    out: Path = Path("out"),
    rounds: int | None = None,
    columns: tuple[str, ...] = COLUMNS,
) -> None:
    """Prints the tables.

    Args:
        runs: Folders of the runs whose states are shown.
        out: Without runs: the folder of results.tsv.
        rounds: Number of rounds of each run to show. Default: all.
        columns: Columns of the arms.
    """
    if runs:
        found = [states(folder, rounds) for folder in runs]
        print_safe(markdown([row for rows, _ in found for row in rows]))
        print_safe("\n" + "\n".join(line for _, line in found))
    elif rows := read_results(out / RESULTS):
        print_safe(markdown(spread(over_seeds(frame(rows)), columns)))
    else:
        raise UserError(f"{out / RESULTS} has no rows yet; finish a run first (`just toy`)")


if __name__ == "__main__":
    sys.exit(cli(main))
