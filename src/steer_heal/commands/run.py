"""steer-heal run PRESET [flags], or steer-heal run --config FILE [flags]: a new run, in a folder of its own."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from loguru import logger
from safetensors import SafetensorError

from steer_heal.check import check
from steer_heal.commands.new_trait import require_personas, write_trait
from steer_heal.errors import UserError, nearest, print_safe
from steer_heal.events import AnyEvent, Dropped, RoundDone, Run, RunEnd
from steer_heal.flags import flags_in, read_flags, read_known
from steer_heal.inputs import Inputs
from steer_heal.inputs.new_trait import trait_text
from steer_heal.plugins import load
from steer_heal.presets import PRESETS
from steer_heal.runs.config import as_toml, read_config
from steer_heal.runs.log import last_hash, read_events
from steer_heal.runs.results import append_result, has_result, result_row, run_cell
from steer_heal.runs.resume import (
    begun,
    finished,
    more_rounds,
    no_other_files,
    require_plugins,
    same_inputs,
    same_settings,
)
from steer_heal.runs.signals import handled, stoppable
from steer_heal.settings import RunConfig, settings
from steer_heal.verdict import best_round, ended_early, exit_status, table, verdict

if TYPE_CHECKING:  # torch: seconds
    from steer_heal.backends.track import Tracking
    from steer_heal.bench import Bench
    from steer_heal.loop import Loop
    from steer_heal.runs.stored import FolderRun


@settings("")
class Source:
    """What is given beside the settings of a run."""

    config: Path | None = None
    """A TOML file, or the folder of an earlier run, whose settings are taken in place of a preset's. The folder, the
    plugins and the place in a sweep of that run are not."""
    print_config: bool = False
    """Print the settings as a TOML file, and run nothing."""
    positive: str | None = None
    """In place of --trait: the persona that has the trait, as a system prompt. The run then uses everyday messages as
    prompts, has no pairs, and is judged by the eval persona. The personas are kept as a trait file in OUT/traits."""
    negative: str | None = None
    """The opposite persona."""
    plan: bool = False
    """Load the model, probe it for some seconds, print the stages with their seconds and the memory of the weights and
    of the probe, and stop. No run is started."""
    exit_status: bool = False
    """Let the exit status tell the verdict on the last round: 0 GOOD (or the untrained tiny-random), 3 MIXED, 4 SMALL
    SHIFT, 5 WRONG WAY, 6 BROKEN, UNREADABLE or no healed round."""


def main(argv: Sequence[str]) -> int:
    preset, cfg, source = parse(argv)
    if source.positive is not None or source.negative is not None:
        if "trait" in flags_in(argv):
            given = "--negative" if source.positive is None else "--positive"
            raise UserError(f"--trait and {given} were given; give --trait, or --positive and --negative")
        for one, flag in ((source.positive, "--positive"), (source.negative, "--negative")):
            if one is None:
                raise UserError(f"one persona was given; give {flag} too")
        cfg = first_try(cfg, source.positive or "", source.negative or "")
    if source.plan and source.print_config:
        raise UserError("--plan and --print-config were given; give one of them")
    if source.print_config:
        print_safe(as_toml(cfg).rstrip())
        return 0
    if source.plan:
        return show_plan(cfg, check(cfg))
    if cfg.folder is not None:
        if begun(cfg.folder):
            same_settings(cfg.folder, cfg)
            n_rounds = more_rounds(cfg.folder, None)
            return go_on(replace(cfg, n_rounds=n_rounds), cfg.folder, graded=source.exit_status)
        no_other_files(cfg.folder)
    inputs = check(cfg)
    from steer_heal.loop import run_loop  # torch: seconds

    with running(cfg, inputs, preset=preset, command=("steer-heal", "run", *argv)) as opened:
        run_loop(opened.loop)
    return opened.end(graded=source.exit_status)


def first_try(cfg: RunConfig, positive: str, negative: str) -> RunConfig:
    """The settings with a trait of these two personas alone, whose file is written, and without evals that need
    pairs. UserError if one is empty, or both are one."""
    from steer_heal.evals import EVALS  # torch: seconds

    require_personas(positive, negative)
    load(cfg)
    digest = hashlib.sha256(f"{positive}\n{negative}".encode()).hexdigest()[:8]
    words = "-".join(re.findall("[a-z]+", positive.lower().removeprefix("you are "))[:4])
    file = cfg.out / "traits" / f"{words or 'trait'}-{digest}.toml"
    if not file.exists():
        write_trait(file, trait_text(positive, negative))
    evals = [name for name in cfg.eval.evals if name not in EVALS or not EVALS[name].needs]
    return replace(cfg, trait=str(file), eval=replace(cfg.eval, evals=tuple(dict.fromkeys((*evals, "persona")))))


def show_plan(cfg: RunConfig, inputs: Inputs) -> int:
    """Prints the stages of a run, their seconds, and the memory."""
    from steer_heal.estimate import estimate, memory
    from steer_heal.report import console, tables
    from steer_heal.runs.opened import loaded_bench

    console.start(cfg.quiet)
    began = time.monotonic()
    bench = loaded_bench(cfg, inputs)
    loaded = time.monotonic()
    plan = estimate(bench)
    seconds = sum(stage.seconds for stage in plan) + loaded - began
    rows = [{"stage": "load", "times": 1, "each": cfg.model, "seconds": round(loaded - began)}]
    rows += [asdict(stage) | {"seconds": round(stage.seconds)} for stage in plan]
    tables.show(rows)
    print_safe(f"about {seconds / 60:.0f} minutes in all, from a probe of {time.monotonic() - loaded:.0f} seconds")
    print_safe(f"memory: {memory(bench)}")
    return 0


def parse(argv: Sequence[str]) -> tuple[str, RunConfig, Source]:
    """(preset name, settings, what was given beside them). A bad value exits with status 2 and names the
    field, the value and the limit; a bad file, flag or preset is a UserError."""
    if argv and argv[0] in ("-h", "--help"):
        show_presets()
    source, rest = read_known(Source, argv, "run")
    preset = next(iter(rest), "")
    if source.config is not None:
        if preset in PRESETS:
            raise UserError(f"preset {preset!r} and --config {source.config} were given; give one of them")
        command = f"run --config {source.config}"
        preset, cfg = read_config(source.config)
    elif not preset or preset.startswith("-"):
        raise UserError(
            f"no preset was given before the flags; choose from {', '.join(PRESETS)}, or give --config FILE"
        )
    elif preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; {nearest(preset, PRESETS)}")
    else:
        cfg, rest, command = PRESETS[preset][1], rest[1:], f"run {preset}"
    cfg = read_flags(RunConfig, rest, command, default=cfg, beside=Source)
    if source.config is not None and source.config.is_dir():
        require_plugins(source.config, cfg.plugin, same=False)
    return preset, cfg, source


def show_presets() -> NoReturn:
    """Prints what `run` takes in place of settings, and exits."""
    presets = [f"{name}: {text}" for name, (text, _) in PRESETS.items()]
    shown = [RunConfig.__doc__, "", "Presets:", *presets, "", "steer-heal run PRESET --help lists the settings."]
    read_flags(Source, ["--help"], "run PRESET", description="\n".join(map(str, shown)))
    raise AssertionError("--help exits")


def go_on(cfg: RunConfig, folder: Path, *, graded: bool = False) -> int:
    """Continues a run. One that is finished gets its pictures and its row of results.tsv, if it has no row. Returns the
    exit status, which with `graded` tells the verdict. UserError before anything is loaded."""
    require_plugins(folder, cfg.plugin)
    if finished(folder) and cfg.n_rounds == more_rounds(folder, None):
        run = Run(read_events(folder))
        if not has_result(folder):
            from steer_heal.runs.stored import FolderRun

            complete(FolderRun.read(folder), cfg)
        print_safe(f"{folder} is finished; read {folder / 'report.html'}")
        if not ended_early(run):
            more = [str(folder), "--n-rounds", str(run.n_rounds + 1)]
            more += ["--plugin", *run.start.config.plugin] if run.start.config.plugin else []
            print_safe(f"more rounds: steer-heal resume {shlex.join(more)}")
        return exit_status(run) if graded else 0
    inputs = check(cfg)
    same_inputs(folder, inputs)
    from steer_heal.loop import run_loop

    with running(cfg, inputs, folder=folder) as opened:
        run_loop(opened.loop)
    return opened.end(graded=graded)


@dataclass
class Opened:
    """A run with its model, ready for its loop."""

    loop: Loop
    run: FolderRun
    status: int = 0

    def end(self, *, graded: bool = False) -> int:
        """Offers a conversation. Returns the exit status, which with `graded` tells the verdict."""
        cfg = self.loop.bench.cfg
        del self.loop  # and with it the model, which the question must not hold
        if self.status == 0:
            _offer_chat(self.run, cfg)
        return exit_status(self.run) if graded and self.status == 0 else self.status


@contextmanager
def running(
    cfg: RunConfig, inputs: Inputs, *, preset: str = "", command: tuple[str, ...] = (), folder: Path | None = None
) -> Iterator[Opened]:
    """A run in a new folder or, with a `folder`, one that was stopped. The loop runs inside; at its end the run is
    finished. If an error stops it, the exit status says so, and the person is told how to continue."""
    from steer_heal.backends.track import Tracking
    from steer_heal.loop import Loop
    from steer_heal.report import console
    from steer_heal.runs import begin

    with stoppable():
        console.start(cfg.quiet)
        if folder is None:
            bench, run, lock = begin.begin(cfg, inputs, preset, command)
        else:
            bench, run, lock = begin.go_on(cfg, inputs, folder)
        console.start(cfg.quiet, run.folder / "run.log")
        console.opened(run, resumed=folder is not None)
        tracking = Tracking(cfg.track, run, run.folder)
        run.subscribers += [lambda event: console.show(event, run), tracking.see, lambda event: _draw_after(event, run)]
        opened = Opened(Loop(bench, run, console.Bar(run, quiet=cfg.quiet)), run)
    try:
        with stoppable():
            yield opened
            finish(bench, run, tracking)
    except (UserError, KeyboardInterrupt, RuntimeError, OSError, SafetensorError) as error:
        opened.status = _stopped(run, error)
        if isinstance(error, UserError):
            draw(run.folder)
    finally:
        run.close()
        tracking.close()
        lock.close()


def _draw_after(event: AnyEvent, run: FolderRun) -> None:
    """The pictures, at the end of each round but the last, which `finish` draws."""
    if isinstance(event, RoundDone | Dropped) and len(run.rounds) < run.n_rounds:
        draw(run.folder)


def draw(folder: Path) -> None:
    """The pictures, the page and the model cards so far. A failure does not stop the run."""
    from steer_heal import report
    from steer_heal.share.card import write_cards

    try:
        report.draw(folder)
        write_cards(folder)
    except Exception as error:
        command = shlex.join(["steer-heal", "report", str(folder)])
        logger.warning(f"could not draw the report ({error}); `{command}` tries again")


def finish(bench: Bench, run: FolderRun, tracking: Tracking) -> None:
    """Verdict, pictures and the row of results.tsv."""
    from steer_heal.report import console

    if run.end is None:
        run.add(RunEnd(verdict=verdict(run), table=tuple(table(run))))
    complete(run, bench.cfg)
    tracking.pictures([run.folder / "trajectory.png", run.folder / "map.png"])
    console.print_table(run)
    print_safe(f"read {run.folder / 'report.html'} first; everything of this run is in {run.folder}")


def complete(run: FolderRun, cfg: RunConfig) -> None:
    """Makes what follows from the events of a finished run: its pictures and its row of results.tsv. It can be
    repeated."""
    run.require_in_place()
    draw(run.folder)
    run.clear()
    settings = replace(run.start.config, n_rounds=run.n_rounds).fingerprint()  # cfg has the dtype and date of a resume
    row = {"run": run_cell(run.folder), "arm": cfg.arm or run.start.preset, "settings": settings}
    append_result(run.folder.resolve().parent, {**row, **result_row(run), "last_hash": last_hash(run.folder)})


def _stopped(run: FolderRun, error: BaseException) -> int:
    """Says why a run ended and how to continue it, and records why. Returns the exit status. Raises errors that are no
    user's."""
    from steer_heal.model.memory import ran_out

    status = 1
    resumable = True
    if isinstance(error, KeyboardInterrupt):
        status = getattr(error, "status", 130)
        message = "interrupted"
        recorded = "interrupted"
    elif isinstance(error, UserError):
        message = f"error: {error}"
        recorded = str(error)
        resumable = error.resumable
    elif isinstance(error, OSError | SafetensorError) and not isinstance(error, BrokenPipeError):
        message = f"error: could not write to {run.folder}: {error}; free some space"
        recorded = ""  # a disk that is full takes no event
    elif isinstance(error, RuntimeError) and ran_out(error):
        fix = "lower --gen.batch-size, --eval.batch-size or --heal.tokens-per-pass"
        message = f"error: out of memory; {fix} ({str(error).splitlines()[0]})"
        recorded = "out of memory"
    else:
        raise error
    if resumable:
        plugins = run.start.config.plugin
        command = ["steer-heal", "resume", str(run.folder), *(["--plugin", *plugins] if plugins else [])]
        message += f"\ncontinue with: {shlex.join(command)}"
    with handled(signal.SIG_IGN), suppress(OSError, UserError):  # a folder that was moved takes no event
        print_safe(message, sys.stderr)
        if recorded and run.end is None:
            run.end_with(recorded, resumable=resumable)
    return status


def _offer_chat(run: FolderRun, cfg: RunConfig) -> None:
    """In a terminal: how to talk to a run that has a healed round, and whether to do it now."""
    if cfg.quiet or not in_terminal() or not run.rounds:
        return
    argv = [str(run.folder)]
    if best_round(run) is None and not run.untrained:
        argv.append("--allow-broken")
    argv += ["--plugin", *run.start.config.plugin] if run.start.config.plugin else []
    print_safe(f"talk to it: steer-heal chat {shlex.join(argv)}")
    if not cfg.chat or "CI" in os.environ:
        return
    try:
        answer = input("talk to it now? [y/N] ")
    except (EOFError, KeyboardInterrupt):
        print_safe("")
        return
    if answer.strip().lower() in ("y", "yes"):
        from steer_heal.commands.chat import main as chat

        try:
            chat([*argv, "--device", cfg.device, "--n-threads", str(cfg.n_threads)])
        except UserError as error:  # the run is finished all the same
            print_safe(f"error: {error}", sys.stderr)


def in_terminal() -> bool:
    """Whether a person can read what is printed, and answer."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
