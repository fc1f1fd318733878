"""Does the adapter beat a prompt? Compares states of finished runs, and what remains of each without a prompt.

All runs must have the same trait, model and evals. The states are base, prompted, steered and healed. Of the doses
that leave the model intact, the steered state has the one that moves the trait furthest. Each state is measured on the
items of its run.
"""

import statistics
from dataclasses import replace
from pathlib import Path

from steer_heal.diag.lab import Given, Lab, OutFlags, Row, replay, show
from steer_heal.errors import UserError
from steer_heal.events import Trained
from steer_heal.runs.chosen import run_and_round
from steer_heal.settings import RunFolders, settings

NOT_AVERAGED = ("state", "needs", "lo", "hi", "intact")


@settings("")
class Flags(OutFlags):
    runs: RunFolders = ()
    """Folders of the runs."""
    doses: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    """Doses to try for the steered state."""
    name: str = "prompting"
    """Name of the JSON file."""


def furthest(lab: Lab, rows: list[Row]) -> Row:
    """The intact row with the largest shift in the wanted direction. The first row if none is intact. All rows count as
    intact if nothing is known of that."""
    intact = [row for row in rows if lab.is_healthy(row) is not False]
    return max(intact, key=lambda row: lab.bench.trait.sign * row["shift"], default=rows[0])


def of_run(folder: Path, doses: tuple[float, ...], given: Given) -> list[Row]:
    """Every state of one run. `shift_bare` is the shift that remains without system prompt and hook."""
    from steer_heal.model.steering import Condition  # torch: seconds
    from steer_heal.runs.stored import FolderRun

    lab, _ = replay(folder, 0, given)
    run = FolderRun.read(folder)
    persona = Condition(lab.bench.trait.positive)
    doses_of = {dose: replace(lab.bench.plain, vector=lab.vector, dose=dose) for dose in doses}
    steered = [lab.row("", lab.measure(condition)) | {"dose": dose} for dose, condition in doses_of.items()]
    prompted = lab.row("", lab.measure(persona))
    healed = []
    for event in run.each(Trained):
        if event.round is not None:
            run.restore_student(event.round, lab.bench.student)
            healed.append(lab.row("", lab.measure()) | {"round": event.round + 1})
    both = lab.row("", lab.measure(persona))
    best = furthest(lab, healed)
    last = healed[-1]
    states = [
        ("base", "nothing", lab.row("", lab.base), 0.0),
        ("prompted", "a system prompt", prompted, 0.0),
        ("steered, furthest intact dose", "a hook", furthest(lab, steered), 0.0),
        ("healed, furthest intact round", "nothing", best, best["shift"]),
        ("healed, last round", "nothing", last, last["shift"]),
        ("healed, last round, and prompted", "a system prompt", both, last["shift"]),
    ]
    return [
        row | {"state": state, "needs": needs, "shift_bare": bare, "intact": lab.is_healthy(row)}
        for state, needs, row, bare in states
    ]


def main(flags: Flags, given: Given) -> None:
    if not flags.runs:
        raise UserError("no run was given; usage: steer-heal diag prompting RUN [RUN ...]")
    if len({folder.resolve() for folder in flags.runs}) < len(flags.runs):
        raise UserError("a run is given twice; give each run once")
    starts = {folder: run_and_round(folder, "last", allow_broken=True)[0].start for folder in flags.runs}
    for what, of in (
        ("trait", lambda start: start.trait.name),
        ("model", lambda start: start.config.model),
        ("set of evals", lambda start: " ".join(sorted(start.config.eval.evals))),
    ):
        found = {of(start): folder for folder, start in starts.items()}
        if len(found) > 1:
            told = ", ".join(f"{folder} has {each}" for each, folder in found.items())
            raise UserError(f"runs hold more than one {what}: {told}; give runs with one {what}")
    per_run = {folder: of_run(folder, flags.doses, given) for folder in flags.runs}
    rows = []
    for states in zip(*per_run.values(), strict=True):
        same = list[Row](states)
        columns = {name: [row[name] for row in same] for name in same[0] if name not in NOT_AVERAGED}
        means = {name: statistics.mean(values) for name, values in columns.items() if None not in values}
        spread = statistics.stdev(columns["shift"]) if len(same) > 1 else None
        known = [row["intact"] for row in same if row["intact"] is not None]
        intact = f"{sum(known)} of {len(known)}" if known else "unknown"
        rows.append(
            {name: same[0][name] for name in ("state", "needs")} | {"intact": intact, "shift_sd": spread, **means}
        )
    should = (
        "every row but base be intact (coherence and degenerate_frac) before its shift is compared.",
        "shift_bare be 0 for prompted and steered, which leave nothing behind; only the healed rows keep theirs.",
        "the shift of `healed, last round, and prompted` be larger than that of `prompted`, otherwise the adapter adds "
        "nothing to a prompt.",
    )
    by_run = [{"run": run.name, "rows": states} for run, states in per_run.items()]
    show(__doc__, rows, should, flags.out, flags.name, per_run=by_run)
