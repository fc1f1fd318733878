"""Events to log lines, tables and advice. The stages know nothing of it."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size
from statistics import mean
from typing import Any

import polars as pl
from loguru import logger
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from steer_heal.errors import print_safe, printable
from steer_heal.report.advice import checks
from steer_heal.report.measurements import (
    MEASURED,
    Measurement,
    direction,
    metrics_of,
    number,
    run_start,
    signed,
    table_cells,
    table_columns,
    target_of,
    title,
    verdict,
)

Event = Mapping[str, Any]


def start(quiet: bool, log_file: Path | None = None) -> None:
    """Log lines that do not tear progress bars, warnings among them; everything also goes to the run's log file.

    Silences peft's own notices and a deprecation between it and transformers, which no user can act on.
    """
    warnings.filterwarnings("ignore", module="peft")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.showwarning = lambda message, *_, **__: logger.warning(str(message))
    transformers_logging.disable_progress_bar()
    logger.remove()
    logger.configure(patcher=lambda record: record.update(message=printable(record["message"])))
    level, write = "WARNING" if quiet else "INFO", lambda line: tqdm.write(line, end="", file=sys.stderr)
    logger.add(write, level=level, format="{time:HH:mm:ss} {message}")
    if log_file is not None:
        logger.add(log_file, level="DEBUG", format="{time:HH:mm:ss} {level} {message}")


class Bar(tqdm):
    """A stage with the time left. It starts again with each part of the stage's work, whose size is known then."""

    def at(self, done: float | int, total: int) -> None:
        """So much of the work at hand is done. Less than before, or another total: another part has begun."""
        if self.disable or not total:
            return
        if total != self.total or done < self.n:
            self.bar_format = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]"
            self.initial = 0
            self.reset(total)
            self.n = self.last_print_n = self.initial = done
        self.update(done - self.n)

    def part(self, n: int, n_parts: int) -> None:
        """Names the eval that begins, behind the name of the stage."""
        if not self.disable:
            self.desc = f"{self.desc.partition(', eval')[0]}, eval {n} of {n_parts}"


@contextmanager
def progress(what: str, quiet: bool) -> Iterator[Bar]:
    """A bar on a terminal, nothing elsewhere or when `quiet`."""
    with Bar(desc=what, bar_format="{desc}", leave=False, disable=quiet or None, dynamic_ncols=True) as bar:
        yield bar


def place(stage: str, r: int, events: Sequence[Event]) -> str:
    """Where in the run a stage is: `base`, `control`, `round 2 of 4, 5 min left`."""
    if r < 0:
        return stage if stage in MEASURED else "control"
    left = seconds_left(events)
    return _of_rounds(r, events) + ("" if left is None else f", {duration(left)} left")


def _of_rounds(r: int, events: Sequence[Event]) -> str:
    return f"round {r + 1} of {run_start(events)['config']['n_rounds']}"


def seconds_left(events: Sequence[Event]) -> float | None:
    """Estimate for the rest of the run: the mean seconds of each stage in the finished rounds, for each stage to come.
    None while no round is finished."""
    rounds = [event["seconds"] for event in events if event["stage"] == "round"]
    if not rounds:
        return None
    stages = {name for seconds in rounds for name in seconds} - {"total", "base", "prompted"}
    means = {name: mean(seconds[name] for seconds in rounds if name in seconds) for name in stages}
    done = {event["stage"] for event in events if event["round"] == len(rounds)}
    n_left = run_start(events)["config"]["n_rounds"] - len(rounds)
    return n_left * sum(means.values()) - sum(means.get(name, 0.0) for name in done)


def duration(seconds: float) -> str:
    """`45 s`, `5 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def step_name(event: Event) -> str:
    """`base`, `heal of r0`, `heal of the control`."""
    stage, r = event["stage"], event["round"]
    if r is None or (r < 0 and stage in MEASURED):
        return stage
    return f"{stage} of {'the control' if r < 0 else f'r{r}'}"


def show(event: Event, events: Sequence[Event]) -> None:
    """One event in words, and advice where something is not as it should be."""
    if (line := _LINES.get(event["stage"])) is not None:
        advice = "".join(f" | {check.advice}" for check in checks(event, events) if not check.holds)
        logger.log("WARNING" if event["stage"] in ("heal_retry", "backtrack") else "INFO", line(event, events) + advice)


def print_table(events: Sequence[Event]) -> None:
    """The states of a run, one a row: the target, then the shown metrics, in as many tables as fit the terminal. Below
    them the verdict."""
    columns, rows = table_columns(events), table_cells(events, "")
    table = [[heading, *(row[key] for row in rows)] for key, (heading, _) in columns.items()]
    for part in _fitting(table, min(max(get_terminal_size().columns, 80), 120)):
        print_safe("\n".join(part) + "\n")
    print_safe(verdict(events))


def _fitting(columns: Sequence[Sequence[str]], width: int) -> Iterator[list[str]]:
    """Markdown tables of as many columns as fit, each with the first one on the left. Cells begin with the heading."""
    names, *rest = ([f"{cell:>{max(map(len, cells))}}" for cell in cells] for cells in columns)
    names = [f"{name.strip():<{len(name)}}" for name in names]
    while rest:
        n, room = 0, width - len(names[0]) - 4
        while n < len(rest) and (n == 0 or len(rest[n][0]) + 3 <= room):
            room -= len(rest[n][0]) + 3
            n += 1
        heading, *rows = zip(names, *rest[:n], strict=True)
        rule = f"|{'|'.join('-' * (len(cell) + 2) for cell in heading)}|"
        yield [f"| {' | '.join(heading)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]
        rest = rest[n:]


def print_frame(frame: pl.DataFrame) -> None:
    """All rows and columns of a table, as Markdown."""
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=100,
        fmt_str_lengths=100,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        tbl_formatting="ASCII_MARKDOWN",
        tbl_cell_alignment="RIGHT",
    ):
        print_safe(f"{frame}\n")


def _start(e: Event, _: Sequence[Event]) -> str:
    trait = e["trait"]
    wanted = f"{trait['target']} should go {direction(trait['sign'])}"
    line = f"{e['config']['model']} | trait {trait['name']} ({wanted}) | seed {e['seed']} | {e['folder']}"
    return line + (f" | LoRA leaves out, in the adapted blocks: {', '.join(e['unadapted'])}" if e["unadapted"] else "")


def _measured(e: Event, events: Sequence[Event]) -> str:
    (target, _), m = target_of(events), Measurement(e["stage"], e["round"], e["metrics"])
    low, high = m[f"{target.name}_lo"], m[f"{target.name}_hi"]
    form = signed(target)
    against = "" if low is None else f" (to base: {number(low, form)} to {number(high, form)})"
    others = [
        f"{title(metric)} {number(m[metric.name], metric.form)}"
        for metric in metrics_of(events).values()
        if metric.shown and metric.name != target.name
    ]
    return ", ".join([f"{m.state:<11} {target.name} {number(m[target.name], target.form)}{against}", *others])


def _vector(e: Event, _: Sequence[Event]) -> str:
    norms = ", ".join(f"{layer}: {number(norm, '.2f')}" for layer, norm in e["norms"].items())
    return f"vector      norm at layer {norms}; cosine to round 0 {number(e['cosine_to_first'], '.2f')}"


def _dose(e: Event, _: Sequence[Event]) -> str:
    probes = sorted(e["probes"], key=lambda probe: probe["kappa"])
    if not probes:
        return f"dose        kappa {e['kappa']:.3g} ({e['mode']})"
    told = ", ".join(f"{p['kappa']:.2f}: {p['n_kept']}/{p['n']}" for p in probes)
    return f"dose        kappa {e['kappa']:.2f} (survivors by kappa: {told})"


def _calibration(e: Event, _: Sequence[Event]) -> str:
    probes = sorted(e["probes"], key=lambda probe: probe["dose"])
    told = ", ".join(f"{p['dose']:.3g}: {number(p['kl_p95'], '.3g')}" for p in probes)
    return f"calibration dose {e['dose']:.3g} (95th percentile of KL by dose: {told})"


def _gen(e: Event, _: Sequence[Event]) -> str:
    dropped = Counter(reason for row in e["completions"] for reason in row["reasons"])
    reasons = ", ".join(f"{reason} {n}" for reason, n in dropped.most_common()) or "nothing dropped"
    name = "gen" if e["round"] >= 0 else "control gen"
    rehearsed = f"; {len(e['rehearsal'])} of the base for the rehearsal" if e["rehearsal"] else ""
    return f"{name:<11} {e['n_train']} kept for training of {len(e['completions'])} written ({reasons}){rehearsed}"


def _backtrack(e: Event, _: Sequence[Event]) -> str:
    return f"dropped     r{e['round']}: {'; '.join(e['past'])} (dose {e['dose']:.3g}, learning rate {e['lr']:.3g})"


def _heal(e: Event, _: Sequence[Event]) -> str:
    first, last = e["validation"][0], e["validation"][-1]
    pressure = e["pressure"] or 0.0
    name = "heal" if e["round"] >= 0 else "control heal"
    fit, divergence = f"{number(first['fit'], '.3f')} to {number(last['fit'], '.3f')}", last["divergence"]
    line = f"{name:<11} {e['n_steps']} steps; validation {fit} nats; divergence {number(divergence, '.3f')}, "
    return line + f"the barrier acted in {e['fired']:.0%} of the steps with gradient pressure {pressure:.2f}"


def _heal_retry(e: Event, _: Sequence[Event]) -> str:
    return f"heal        {e['error']}; the round is healed again from its start, at learning rate {e['lr']:g}"


def _round(e: Event, events: Sequence[Event]) -> str:
    kept = "" if e["retain"] is None else f", retains {e['retain']:.0%} of the steered shift"
    learnt = e["cosine_student_teacher"]
    left = seconds_left(events)
    to_come = f"; about {duration(left)} left" if left else ""
    name, took = f"r{e['round']} done", duration(e["seconds"]["total"])
    line = f"{name:<11} {_of_rounds(e['round'], events)} in {took}{kept}{to_come}; "
    return line + f"the adapter's own shift has cosine {number(learnt, '.2f')} to the vector"


_LINES: dict[str, Callable[[Event, Sequence[Event]], str]] = {
    "run_start": _start,
    **dict.fromkeys(MEASURED, _measured),
    "vector": _vector,
    "dose": _dose,
    "calibration": _calibration,
    "backtrack": _backtrack,
    "control_gen": _gen,
    "gen": _gen,
    "heal": _heal,
    "heal_retry": _heal_retry,
    "round": _round,
}
