"""Events to log lines, tables and SHOULD readings. The stages know nothing of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from loguru import logger
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from steer_heal import readings
from steer_heal.terminal import printable, say

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
    logger.add(lambda line: tqdm.write(line, end="", file=sys.stderr), level="WARNING" if quiet else "INFO", format="{time:HH:mm:ss} {message}")
    if log_file is not None:
        logger.add(log_file, level="DEBUG", format="{time:HH:mm:ss} {level} {message}")


@contextmanager
def progress(what: str, total: int | None, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; yields the function that advances it."""
    with tqdm(total=total, desc=what, leave=False, disable=quiet or None, dynamic_ncols=True, mininterval=0.5) as bar:
        yield lambda n=1: bar.update(n)


def show(event: Event, events: Sequence[Event]) -> None:
    """One event, in words."""
    line = _LINES.get(event["stage"])
    if line is not None:
        logger.log("WARNING" if event["stage"] == "heal_retry" else "INFO", line(event, events))


def print_table(events: Sequence[Event]) -> None:
    """The states of a run, one a row, and the verdict below."""
    with pl.Config(
        tbl_rows=-1, tbl_cols=-1, tbl_width_chars=160, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, float_precision=3,
        tbl_formatting="ASCII_MARKDOWN",
    ):
        say(pl.DataFrame(readings.table(events), infer_schema_length=None))
    say(f"\n{readings.verdict(events)}")


def number(value: float | None, form: str) -> str:
    """The number, or ? for one that was not finite."""
    return "?" if value is None else format(value, form)


def _start(e: Event, _: Sequence[Event]) -> str:
    trait = e["trait"]
    way = "down" if trait["sign"] < 0 else "up"
    return f"{e['config']['model']} | trait {trait['name']} ({trait['target']} should go {way}) | seed {e['seed']} | {e['folder']}"


def _measured(e: Event, events: Sequence[Event]) -> str:
    target, _ = readings.target_of(events)
    metric, m = readings.nats_name(target), e["metrics"]
    name = e["stage"] if e["round"] < 0 else f"{e['stage']} r{e['round']}"
    low, high = m.get(f"{metric}_lo"), m.get(f"{metric}_hi")
    against = "" if low is None else f" (to base: {number(low, '+.2f')} to {number(high, '+.2f')})"
    oracle = f", oracle {m['oracle']:.2f}" if m.get("oracle") is not None else ""
    return (
        f"{name:<11} {metric} {number(m.get(metric), '+.3f')}{against}, coherence {number(m.get('coherence'), '.3f')}, "
        f"text perplexity {number(m.get('text_ppl_median'), '.2f')}, degenerate {number(m.get('degenerate_frac'), '.0%')}{oracle}"
    )


def _vector(e: Event, _: Sequence[Event]) -> str:
    should = "" if e["round"] == 0 else " | SHOULD stay above 0.5: the loop pushes one way"
    norms = ", ".join(f"{layer}: {number(norm, '.2f')}" for layer, norm in e["norms"].items())
    return f"vector      norm at layer {norms}; cosine to round 0 {number(e['cosine_to_first'], '.2f')}{should}"


def _dose(e: Event, _: Sequence[Event]) -> str:
    probes = ", ".join(f"{p['kappa']:.2f}: {p['n_kept']}/{p['n']}" for p in sorted(e["probes"], key=lambda p: p["kappa"]))
    if not e["probes"]:
        return f"dose        kappa {e['kappa']:.3g} ({e['mode']})"
    return f"dose        kappa {e['kappa']:.2f} (survivors by kappa: {probes}) | SHOULD fall as kappa rises"


def _calibration(e: Event, _: Sequence[Event]) -> str:
    probes = ", ".join(f"{p['dose']:.3g}: {number(p['kl_p95'], '.3g')}" for p in e["probes"])
    return f"calibration dose {e['dose']:.3g} (95th percentile of KL by dose: {probes}) | SHOULD rise with the dose, as its square while small"


def _gen(e: Event, _: Sequence[Event]) -> str:
    dropped: dict[str, int] = {}
    for row in e["completions"]:
        for reason in row["reasons"]:
            dropped[reason] = dropped.get(reason, 0) + 1
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(dropped.items(), key=lambda item: -item[1])) or "nothing dropped"
    return f"gen         {e['n_train']} kept for training of {len(e['completions'])} written ({reasons})"


def _heal(e: Event, _: Sequence[Event]) -> str:
    first, last = e["validation"][0], e["validation"][-1]
    seen = [row["sft"] for row in e["validation"] if row["sft"] is not None]
    overfit = " | SHOULD still be at its lowest: fewer epochs?" if seen and (last["sft"] is None or last["sft"] > min(seen) + 0.02) else ""
    pressure = e["pressure"] or 0.0
    should = " | SHOULD fire in more than a tenth of the steps: lower heal.tau" if e["lam"] > 0 and e["fired"] < 0.1 else ""
    should = " | pressure SHOULD be below 1: the barrier undoes the trait, lower heal.lam" if pressure > 1 else should
    return (
        f"heal        {e['n_steps']} steps; validation {number(first['sft'], '.3f')} to {number(last['sft'], '.3f')} nats{overfit}; divergence "
        f"{number(last['divergence'], '.3f')}, the barrier fired in {e['fired']:.0%} of the steps with gradient pressure {pressure:.2f}{should}"
    )


def _heal_retry(e: Event, _: Sequence[Event]) -> str:
    return f"heal        {e['error']}; the round is healed again from its start, at learning rate {e['lr']:g}"


def _round(e: Event, _: Sequence[Event]) -> str:
    kept = "" if e["retain"] is None else f", retains {e['retain']:.0%} of the steered shift"
    return (
        f"round {e['round']}     done in {e['seconds']['total']:.0f} s{kept}; the adapter's own shift has cosine {number(e['cosine_student_teacher'], '.2f')} to the "
        "vector | SHOULD be well above 0: it learnt the direction"
    )


_LINES: dict[str, Callable[[Event, Sequence[Event]], str]] = {
    "run_start": _start, **{stage: _measured for stage in readings.MEASURED}, "vector": _vector, "dose": _dose, "calibration": _calibration, "gen": _gen, "heal": _heal,
    "heal_retry": _heal_retry, "round": _round,
}
