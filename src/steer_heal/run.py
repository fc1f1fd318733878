"""A run: parse, check, load, loop.

steer-heal run {gemma,toy,toy-distil,smol,smol-distil,fast-dev} [flags]
steer-heal run --config FILE [flags]
steer-heal resume out/<run> [flags that do not change the result]
"""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import tyro

from steer_heal.check import check, holds_files
from steer_heal.errors import UserError, nearest, print_error, print_safe
from steer_heal.inputs import Inputs
from steer_heal.presets import PRESETS
from steer_heal.runs.config import as_toml, read_config
from steer_heal.runs.signals import Stopped, stoppable
from steer_heal.settings import RunConfig

FILES = """

In place of a preset, --config FILE starts from a TOML file, or from the settings of an earlier run (--config
out/<run>). With --print-config the settings are printed as such a file, and nothing is run.
"""


def parse(argv: Sequence[str]) -> tuple[str, RunConfig, bool]:
    """(preset name, settings, whether they are only to be printed). A bad value exits with status 2 and names the
    field, the value and the limit; a bad file or preset is a UserError."""
    own = ArgumentParser("steer-heal run", add_help=False, allow_abbrev=False)
    own.add_argument("--config", type=Path)
    own.add_argument("--print-config", action="store_true")
    given, rest = own.parse_known_args(argv)
    preset, choices = next(iter(rest), ""), PRESETS
    if given.config is not None:
        if preset in PRESETS:
            raise UserError(f"preset {preset!r} and --config {given.config} were given; give one of them")
        preset, cfg = read_config(given.config)
        choices, rest = {"config": (f"The settings of {given.config}.", cfg)}, ["config", *rest]
    elif preset and not preset.startswith("-") and preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}: {nearest(preset, PRESETS)}")
    description = f"{inspect.getdoc(RunConfig)}{FILES}"
    cfg = tyro.extras.overridable_config_cli(choices, args=rest, prog="steer-heal run", description=description)
    return preset, cfg, given.print_config


def main(argv: Sequence[str] | None = None) -> int:
    """A new run. Exit status: 0 done, 1 stopped by a user error, 2 a wrong argument, 130 by Ctrl-C, 143 by SIGTERM."""
    try:
        preset, cfg, only_print = parse(sys.argv[1:] if argv is None else argv)
        if only_print:
            print_safe(as_toml(cfg).rstrip())
            return 0
        if cfg.folder is not None and (stopped := _begun(cfg)):
            return _continue(cfg.folder, stopped, cfg)
        inputs = check(cfg)
    except (UserError, OSError, ValueError) as error:
        print_error(error)
        return 2
    return _go(cfg, preset, inputs)


def _begun(cfg: RunConfig) -> str | None:
    """The preset of the run that `cfg.folder` holds; None: there is none. UserError where it is another run, or files
    of something else."""
    assert cfg.folder is not None
    from steer_heal.runs.resume import begun, no_other_files, same_settings

    if begun(cfg.folder):
        return same_settings(cfg.folder, cfg)
    no_other_files(cfg.folder)
    return None


def resume(argv: Sequence[str]) -> int:
    """A run that was stopped goes on; what is missing beside a finished one is made. Exit status: as of `main`."""
    from steer_heal.runs.resume import Resume

    try:
        given = tyro.cli(Resume, args=argv, prog="steer-heal resume")
        preset, cfg = given.config()
        return _continue(given.run, preset, cfg, new_export=given.export is not None)
    except (UserError, OSError, ValueError) as error:
        print_error(error)
        return 2


def _continue(folder: Path, preset: str, cfg: RunConfig, *, new_export: bool = False) -> int:
    """A run goes on; one that is finished gets what is missing beside it. UserError before anything is loaded."""
    from steer_heal.runs.resume import finished, same_inputs

    if finished(folder) and (cfg.export is None or holds_files(cfg.export)):
        from steer_heal.runs.events import schema_errors
        from steer_heal.session import complete

        with schema_errors(folder):
            complete(folder, cfg)
        print_safe(f"{folder} is finished; read {folder / 'report.html'}")
        return 0
    inputs = check(cfg, resumed=not new_export)
    same_inputs(folder, inputs)
    return _go(cfg, preset, inputs, folder)


def _go(cfg: RunConfig, preset: str, inputs: Inputs, folder: Path | None = None) -> int:
    try:
        with stoppable():
            from steer_heal.loop import run_loop
            from steer_heal.session import guard, open_session

            session = open_session(cfg, preset, inputs, folder)
            status, folder = guard(session, run_loop), session.folder
            del session  # and with it the model, which the question must not hold
    except (UserError, OSError) as error:
        print_error(error)
        return 1
    except Stopped as stopped:
        print("stopped before it began", file=sys.stderr)
        return stopped.status
    if status == 0:
        _offer_chat(folder, cfg)
    return status


def _offer_chat(folder: Path, cfg: RunConfig) -> None:
    """In a terminal: how to talk to a run that ended whole, and whether to do it now."""
    from steer_heal.runs.events import current, of_stage, read_events

    if cfg.quiet or not in_terminal() or not of_stage(current(read_events(folder)), "round"):
        return
    print_safe(f"talk to it: steer-heal chat {shlex.quote(str(folder))}")
    if not cfg.chat or "CI" in os.environ:
        return
    try:
        answer = input("talk to it now? [y/N] ")
    except (EOFError, KeyboardInterrupt):
        print_safe("")
        return
    if answer.strip().lower() in ("y", "yes"):
        from steer_heal.chat.__main__ import main as chat

        chat([str(folder), "--device", cfg.device, "--n-threads", str(cfg.n_threads)])


def in_terminal() -> bool:
    """Whether a person can read what is printed, and answer."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


if __name__ == "__main__":
    sys.exit(main())
