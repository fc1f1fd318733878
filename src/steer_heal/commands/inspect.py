"""steer-heal inspect RUN: writes a run as an evaluation log of inspect_ai."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import tyro

from steer_heal.errors import UserError, print_safe
from steer_heal.events import Run
from steer_heal.flags import parsed
from steer_heal.runs.log import last_hash, read_events, schema_errors
from steer_heal.settings import settings


@settings("")
class Inspect:
    """Write the answers and items of each measured state of a run as a log that `inspect view` opens."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path | None = None
    """File of the log, which ends in .eval or .json. Default: inspect.eval in the folder of the run."""


def main(argv: Sequence[str]) -> int:
    given, _ = parsed(Inspect, argv, "inspect")
    if not find_spec("inspect_ai"):
        raise UserError("inspect_ai is not installed; pip install 'steer-heal[inspect]'")
    out = given.out or given.run / "inspect.eval"
    if out.suffix not in (".eval", ".json"):
        raise UserError(f"out is {str(out)!r}: it must end in .eval or .json")
    from steer_heal.share.inspect import eval_log, write_log

    with schema_errors(given.run):
        log = eval_log(Run(read_events(given.run)), last_hash(given.run))
    write_log(log, out)
    print_safe(f"{out}; open it with inspect view")
    return 0
