"""Log lines, the progress bar and the table of a run. The stages do not know it."""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOBase
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from loguru import logger
from tqdm import tqdm

from steer_heal.errors import plural, printable, wrapped
from steer_heal.events import (
    AnyEvent,
    Calibrated,
    Contrasted,
    Dropped,
    Extracted,
    Gathered,
    HealRetried,
    Measured,
    Preflight,
    RoundDone,
    Run,
    RunStart,
    Trained,
)
from steer_heal.progress import Progress
from steer_heal.records import round_name
from steer_heal.report import tables
from steer_heal.report.advice import checks
from steer_heal.report.view import event_words, last_event, model_words, table_cells, table_columns
from steer_heal.verdict import blind, direction, interval_words, number, title, verdict

if TYPE_CHECKING:  # torch
    from steer_heal.runs.stored import FolderRun

A_MINUTE = 60.0
"""Seconds between two lines of a stage where there is no bar."""
WIDTH = 15
"""Characters of the name at the start of a log line."""
FULL_BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]"
BEFORE = ("preflight", "base", "prompted", "control")
A_ROUND = {"extracted": 1, "gathered": 1, "measured": 2, "trained": 1, "round_done": 1}
"""How many events of each kind a round has."""
ON_A_LINE = 3
"""Metrics in the line of a state. The log file has all."""


def start(quiet: bool, log_file: Path | None = None) -> None:
    """As `lines`, for a command that loads a model.

    Hides notices of peft, and a deprecation warning between it and transformers, which no user can act on.
    """
    from transformers.utils import logging as transformers_logging  # seconds

    warnings.filterwarnings("ignore", module="peft")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.showwarning = lambda message, *_, **__: logger.warning(str(message))
    transformers_logging.disable_progress_bar()
    lines(quiet, log_file)


def lines(quiet: bool = False, log_file: Path | None = None) -> None:
    """Sends log lines to the terminal, without breaking progress bars, and to the log file of the run."""
    logger.remove()
    logger.configure(patcher=lambda record: record.update(message=printable(record["message"])))
    logger.add(_above_bars, level="WARNING" if quiet else "INFO", format="{time:HH:mm:ss} {message}")
    if log_file is not None:
        logger.add(log_file, level="DEBUG", format="{time:HH:mm:ss} {level} {message}")


def _above_bars(message: str) -> None:
    tqdm.write(wrapped(message, WIDTH + len("00:00:00  ")), end="", file=sys.stderr)


# --- progress ----------------------------------------------------------------------------------------------------
class Bar(Progress):
    """A bar for the stage at hand, with the time left. Shows nothing when `quiet`. If stderr is not a terminal, a line
    per minute takes its place."""

    def __init__(self, run: Run | None, quiet: bool, file: TextIOBase | None = None, *, always: bool = False) -> None:
        """
        Args:
            run: The run whose stages are shown. None: those of a command that makes no run.
            file: Where to draw, instead of on stderr.
            always: Draw off a terminal too, as in a notebook.
        """
        self.run = run
        self.quiet = quiet
        self.always = always
        self.file = file
        self.bar: tqdm | None = None
        self.doing = self.what = ""
        """The stage in words, without and with its part."""
        self.spoke = 0.0
        """Time of the last line, or of the start of the stage."""

    @contextmanager
    def stage(self, stage: str, r: int | None, doing: str) -> Iterator[None]:
        self.doing = self.what = f"{place(stage, r, self.run) if self.run is not None else stage}: {doing}"
        self.spoke = time.monotonic()
        hidden = True if self.quiet else False if self.always else None  # None: shown on a terminal only
        with tqdm(
            desc=self.what, bar_format="{desc}", leave=False, disable=hidden, dynamic_ncols=True, file=self.file
        ) as self.bar:
            yield
        self.bar = None

    def part(self, n: int, n_parts: int, kind: str = "eval") -> None:
        self.what = f"{self.doing}, {kind} {n} of {n_parts}"
        if self.bar is not None and not self.bar.disable:
            self.bar.desc = self.what

    def at(self, done: float | int, total: int) -> None:
        """Fewer than before, or another total, begins the bar again: the next piece of the stage's work."""
        bar = self.bar
        if bar is None or not total:
            return
        if bar.disable:
            if not self.quiet and time.monotonic() - self.spoke >= A_MINUTE:
                self.spoke = time.monotonic()
                logger.info(f"{self.what}, {done:.0f} of {total}")
            return
        if total != bar.total or done < bar.n:
            bar.bar_format = FULL_BAR
            bar.initial = 0
            bar.reset(total)
            bar.n = bar.last_print_n = bar.initial = done
        bar.update(done - bar.n)


def place(stage: str, r: int | None, run: Run) -> str:
    """Where in the run a stage is: `base`, `control`, `round 1 of 4, 5 min left`."""
    if r is None:
        return (stage if stage in BEFORE else "control") + left_words(run, ", ")
    return _of_rounds(r, run) + left_words(run, ", ")


def _of_rounds(r: int, run: Run) -> str:
    return f"{round_name(r)} of {run.n_rounds}"


def seconds_left(run: Run) -> tuple[float, bool] | None:
    """(estimate for the rest of the run, whether each kind of step to come was done before). A step takes the mean of
    its kind so far. None before the first state is measured."""
    if run.measured("base") is None:
        return None
    cfg = run.start.config
    to_come = Counter({(True, kind): n * run.n_rounds for kind, n in A_ROUND.items()})
    before_the_loop = {"measured": 2 + cfg.control, "gathered": int(cfg.control), "trained": int(cfg.control)}
    to_come.update({(False, kind): n for kind, n in before_the_loop.items()})
    to_come.subtract((event.round is not None, event.event) for event in run.events)
    took: dict[str, list[float]] = {}
    for before, event in itertools.pairwise(run.events):
        took.setdefault(event.event, []).append(event.wall_s - before.wall_s)
    left = [(kind, n) for (_, kind), n in to_come.items() if n > 0]
    return sum(n * mean(took[kind]) for kind, n in left if kind in took), all(kind in took for kind, _ in left)


def left_words(run: Run, before: str) -> str:
    """`about 5 min left` behind `before`; empty where nothing is left, or nothing is known."""
    seconds, known = seconds_left(run) or (0.0, True)
    if seconds < 1:
        return ""
    return f"{before}{'about' if known else 'at least'} {duration(seconds)} left"


def duration(seconds: float) -> str:
    """`45 s`, `5 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


# --- events ------------------------------------------------------------------------------------------------------
def opened(run: FolderRun, resumed: bool) -> None:
    """Says what begins and where, or after which event a run is resumed."""
    if resumed:
        logger.info(f"resuming {run.folder} after {event_words(last_event(run))}")
    else:
        show(run.start, run)


def show(event: AnyEvent, run: Run) -> None:
    """One event in words, with advice on each condition that does not hold."""
    line = _words(event, run)
    if line:
        advice = "".join(f" | {check.advice}" for check in checks(event, run) if not check.holds)
        loud = isinstance(event, HealRetried | Dropped) or (advice and isinstance(event, Measured))
        logger.log("WARNING" if loud else "INFO", line + advice)
    if isinstance(event, Measured) and (more := _measured(event, run)[1]):
        logger.debug(_line(event.label, more))


def print_table(run: Run) -> None:
    """The table of states with the verdict below it."""
    headings = {key: heading for key, (heading, _) in table_columns(run).items()}
    tables.show(table_cells(run, ""), headings=headings)
    tables.show_verdict(verdict(run))


def _words(event: AnyEvent, run: Run) -> str:
    """The log line of an event. Empty for the steps of a heal and for the end of a run."""
    control = "control " if event.round is None else ""
    match event:
        case RunStart():
            return _start(event, run)
        case Measured():
            doubts = blind(run) if event.state == "prompted" and not run.untrained else []
            measured = _measured(event, run)[0] + left_words(run, "; ")
            return _line(event.label, "; ".join([measured, *doubts]))
        case Preflight():
            return _line("pre-flight", f"{event.found.verdict}: {event.found.reason}")
        case Extracted():
            norms = ", ".join(f"{layer}: {number(norm, '.2f')}" for layer, norm in event.norms.items())
            cosine = number(event.cosine_to_first, ".2f")
            return _line("vector", f"norm at layer {norms}; cosine to round 1 {cosine}")
        case Calibrated():
            probes = sorted(event.calibration.probes, key=lambda probe: probe.dose)
            found = ", ".join(f"{probe.dose:.3g}: {number(probe.kl_p95, '.3g')}" for probe in probes)
            chosen = f"dose {event.calibration.dose:.3g} (95th percentile of KL by dose: {found})"
            return _line("calibration", chosen)
        case Contrasted():
            found = event.found
            return _line("contrast", f"strength {found.strength:.3g}: KL(teacher || student) {found.kl:.3g} nats")
        case Gathered():
            return _line(f"{control}text", _gathered(event))
        case HealRetried():
            return _line(f"{control}heal", f"{event.error}; the heal starts again at learning rate {event.lr:g}")
        case Trained():
            return _line(f"{control}heal", _trained(event))
        case Dropped():
            tried = f"dose {event.dose:.3g}, learning rate {event.lr:.3g}"
            return _line("dropped", f"{round_name(event.round)}: {'; '.join(event.past)} ({tried})")
        case RoundDone():
            return _line("done", _done(event, run))
    return ""


def _line(name: str, words: str) -> str:
    return f"{name:<{WIDTH}} {words}"


def _start(event: RunStart, run: Run) -> str:
    wanted = f"{event.trait.target} should go {direction(event.trait.sign)}"
    line = f"{model_words(run)} | trait {event.trait.name} ({wanted}) | seed {event.config.seed} | {event.folder}"
    if event.unadapted:
        line += f" | the adapter leaves out these weights of its blocks: {', '.join(event.unadapted)}"
    return line


def _measured(event: Measured, run: Run) -> tuple[str, str]:
    """(the trait's metric with its interval and, before others, the health of the model; all other shown metrics)."""
    first = run.trait_metric
    words = f"{first.name} {number(event[first.name], first.form)}"
    interval = interval_words(event[f"{first.name}_lo"], event[f"{first.name}_hi"], first)
    shown = [metric for metric in run.metrics.values() if metric.shown and metric.name != first.name]
    others = [
        f"{title(metric)} {number(event[metric.name], metric.form)}"
        for metric in sorted(shown, key=lambda metric: not metric.is_health)
    ]
    line = [f"{words} (to base: {interval})" if interval else words, *others[: ON_A_LINE - 1]]
    return ", ".join(line), ", ".join(others[ON_A_LINE - 1 :])


def _gathered(event: Gathered) -> str:
    collected = event.collected
    dropped = Counter(reason for row in collected.scored for reason in row.reasons)
    reasons = ", ".join(f"{reason} {n}" for reason, n in dropped.most_common()) or "nothing dropped"
    words = f"{len(collected.train)} kept for training of {len(collected.scored)} written ({reasons})"
    if collected.rehearsal:
        words += f"; {len(collected.rehearsal)} of the base for the rehearsal"
    if event.mode == "none" or not (collected.dose or collected.probes):
        return words
    probes = sorted(collected.probes, key=lambda probe: probe.kappa)
    survivors = ", ".join(f"{probe.kappa:.2f}: {probe.n_kept}/{probe.n}" for probe in probes)
    how = f"survivors by kappa: {survivors}" if probes else event.mode
    return f"{words}; kappa {collected.kappa:.3g} ({how})"


def _trained(event: Trained) -> str:
    first = event.validation[0]
    last = event.validation[-1]
    fit = f"{number(first['fit'], '.3f')} to {number(last['fit'], '.3f')}"
    pressure = "" if event.pressure is None else f" with gradient pressure {event.pressure:.2f}"
    return (
        f"{plural(event.n_steps, 'step')}; validation {fit} nats; {closed_words(event)}divergence "
        f"{number(last['divergence'], '.3f')}, the barrier acted in {event.fired:.0%} of the steps{pressure}"
    )


def closed_words(event: Trained) -> str:
    """How much of the teacher's distance the heal closed, such as `of KL(teacher || student) it closes 60% on
    trained and 43% on held-out text; `. Empty without a teacher."""
    trained = event.closed("trained")
    held_out = event.closed("held_out")
    if held_out is None:
        return ""
    on_trained = "" if trained is None else f"{trained:.0%} on trained and "
    return f"of KL(teacher || student) it closes {on_trained}{held_out:.0%} on held-out text; "


def _done(event: RoundDone, run: Run) -> str:
    assert event.round is not None
    kept = "" if event.retain is None else f", retains {event.retain:.0%} of the steered shift"
    cosine = number(event.cosine_student_teacher, ".2f")
    began = next(i for i, each in enumerate(run.events) if each.round == event.round)
    took = duration(event.wall_s - run.events[began - 1].wall_s)
    return (
        f"{_of_rounds(event.round, run)} in {took}{kept}; the adapter's own shift "
        f"has cosine {cosine} to the vector{left_words(run, '; ')}"
    )
