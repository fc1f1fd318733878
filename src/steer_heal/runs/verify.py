"""Whether a run's folder is still what the run wrote: events, vectors, checkpoints and base weights.

Every event names the SHA-256 of the line before it; the events of vectors and checkpoints name the SHA-256 of their
files; run_start names the base model and the plugins; results.tsv names the hash of the last line. This proves that
the parts belong together. It is no signature: whoever rewrites all of it can make it consistent again, but with another
last hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from steer_heal.errors import UserError
from steer_heal.events import AnyEvent, Extended, Extracted, Run, RunEnd, Trained
from steer_heal.plugins import name_of
from steer_heal.records import round_name
from steer_heal.runs.log import EVENTS, broken_link, line_hash, lines_of, read_events
from steer_heal.runs.results import RESULTS, row_of
from steer_heal.runs.resume import changed_plugin, changed_weights, settings_then
from steer_heal.runs.storage import damaged_file


def violations(folder: Path, wanted: str | None = None, plugin: Sequence[str] = ()) -> list[str]:
    """Everything that is not as recorded, in words: the first event that does not follow, every changed file, the
    plugins, the base model. No plugin runs.

    UserError where the folder holds no run.

    Args:
        wanted: The hash that the last line should have.
        plugin: Where plugins of the run lie now, by name. The others are where the run found them.
    """
    cfg = settings_then(folder)
    events = read_events(folder)
    lines = lines_of(folder)[: len(events)]
    found = []
    if (at := broken_link(lines)) is not None:
        changed = max(0, at - 1)
        found.append(
            f"{EVENTS} line {at + 1} does not follow from the line before it: {_name(events[changed])} (line "
            f"{changed + 1}) was changed, or lines were removed or added here"
        )
    row = row_of(folder)
    run = Run(events)
    extended = run.each(Extended)
    named = lines[events.index(extended[-1]) - 1] if extended and run.end is None else lines[-1]
    if row is not None and row.get("last_hash") != line_hash(named):
        found.append(
            f"{EVENTS} does not end in the line that {RESULTS} names: {_name(events[-1])} was changed, or the end was "
            "removed"
        )
    if wanted is not None and wanted != line_hash(lines[-1]):
        found.append(f"the last line of {EVENTS}, {_name(events[-1])}, has another hash than the one that was given")
    for event in run.events:
        if isinstance(event, Extracted | Trained) and (damage := damaged_file(folder, event.files)) is not None:
            found.append(f"{_name(event)}: {damage}")
    places = {name_of(each): each for each in plugin}
    for each in cfg.plugin:
        try:
            change = changed_plugin(run.start, places.get(name_of(each), each))
        except UserError:
            change = (
                f"plugin {each} cannot be checked, since it is not here; name it with --plugin PATH/{name_of(each)}"
            )
            change += ".py" if each.endswith(".py") else ""
        found += [] if change is None else [change]
    from steer_heal.bench import read_model, weights_of  # transformers: seconds

    try:
        change = changed_weights(folder, weights_of(read_model(replace(cfg, device="cpu"))))
    except UserError as error:
        change = f"they cannot be checked: {error}"
    if change is not None:
        found.append(f"base weights: {change}")
    return found


def unchecked(folder: Path, wanted: str | None = None) -> list[str]:
    """What `violations` cannot judge, in words."""
    found = ["files that no event names (pictures, pages, model cards, readings of tasks)"]
    if wanted is None and row_of(folder) is None:
        found.append(
            f"the last event, since {folder.resolve().parent / RESULTS} has no row of this run (give the published "
            "hash: --hash)"
        )
    return found


def _name(event: AnyEvent) -> str:
    where = "before the loop" if event.round is None else f"of {round_name(event.round)}"
    if isinstance(event, Extended | RunEnd):
        where = "after the loop"
    return f"{event.event!r} {where}"
