"""steer-heal resume RUN [flags that do not change the result]: a run that was stopped, or is to have more rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steer_heal.commands.run import go_on
from steer_heal.flags import parsed
from steer_heal.runs.log import read_start
from steer_heal.runs.resume import more_rounds, require_plugins
from steer_heal.settings import RUN_ONLY, Count, RunFolder, changed, settings

RESUMABLE = [name for name in RUN_ONLY if name not in ("out", "folder", "quiet", "chat", "share_base")]


@settings("")
class Resume:
    """Continue a stopped run, or with --n-rounds a finished one. You can change only settings that do not affect the
    rounds so far. A setting that you leave out keeps the run's value."""

    run: RunFolder
    """Folder of the run."""
    n_rounds: Count | None = None
    """Total number of rounds. The result equals that of a run started with this number."""
    quiet: bool = False
    """Print only warnings and errors."""
    chat: bool = True
    """After a run in a terminal, offer to chat with the result."""


def main(argv: Sequence[str]) -> int:
    given, own = parsed(Resume, argv, "resume", [*RESUMABLE, "plugin"])
    require_plugins(given.run, own.get("plugin", ()))
    cfg = changed(read_start(given.run).config, own)
    n_rounds = more_rounds(given.run, given.n_rounds)
    cfg = replace(
        cfg, n_rounds=n_rounds, out=given.run.resolve().parent, folder=None, quiet=given.quiet, chat=given.chat
    )
    return go_on(cfg, given.run)
