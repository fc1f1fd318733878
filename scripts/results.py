"""Arms of out/results.tsv with mean, sd and n over seeds."""

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import polars as pl
import tyro

from steer_heal.events import RESULTS, read_results
from steer_heal.terminal import complain, say

COLUMNS = (
    "shift",
    "coherence",
    "text_ppl",
    "degenerate",
    "oracle",
    "kl_base",
    "log_odds",
    "cosine_to_first",
    "cosine_student_first",
    "wall_s",
)


def arms(rows: list[dict[str, str]], columns: tuple[str, ...]) -> list[dict[str, str]]:
    """One row an arm and its settings: `mean ± sd` of each column over its runs, the last run of each seed.

    Runs that differ in anything but the seed never share a row.
    """
    groups: dict[tuple[str, ...], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        groups[row["arm"], row["trait"], row["n_rounds"], row["settings"]][row["seed"]] = row
    out = []
    for (arm, trait, n_rounds, settings), by_seed in groups.items():
        line = {"arm": arm, "trait": trait, "rounds": n_rounds, "settings": settings, "n": str(len(by_seed))}
        for name in columns:
            values = [float(row[name]) for row in by_seed.values() if row.get(name)]
            sd = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            line[name] = f"{statistics.mean(values):.3f}{sd}" if values else ""
        out.append(line)
    return out


def main(out: Annotated[Path, tyro.conf.Positional] = Path("out"), columns: tuple[str, ...] = COLUMNS) -> int:
    """Arms of OUT/results.tsv with mean, sd and n over seeds (of the last healed round)."""
    rows = read_results(out / RESULTS)
    if not rows:
        complain(f"{out / RESULTS} has no rows yet; finish a run first (`just toy`)")
        return 1
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=250,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        tbl_formatting="ASCII_MARKDOWN",
        fmt_str_lengths=60,
    ):
        say(pl.DataFrame(arms(rows, columns)))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
