"""Model cards: the README.md of every checkpoint and export, made from the events of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from steer_heal.inputs.files import ADAPTER_FILE
from steer_heal.records import Metric
from steer_heal.report.measurements import (
    Measurement,
    health_of,
    is_untrained,
    measurements,
    metrics_of,
    run_start,
    signed,
    target_of,
    verdict,
)
from steer_heal.report.view import inline, number, template, visible
from steer_heal.runs.checkpoint import checkpoint_name
from steer_heal.runs.events import current, last_hash, of_stage, read_events, schema_errors
from steer_heal.runs.storage import atomic_write
from steer_heal.share.readings import Reading, read_readings, with_stderr

Event = Mapping[str, Any]
CARD = "README.md"
TEMPLATE = Path(__file__).parent / "card.md.j2"
COLUMNS = ("base", "prompted", "control", "steered", "healed")
TEACHERS = {
    "vector": "under the steering vector",
    "prompt": "with the positive persona as system prompt",
    "both": "under the steering vector and the positive persona as system prompt",
}


def write_cards(folder: Path) -> list[Path]:
    """Writes the card of every checkpoint of a run whose state was measured; returns their paths."""
    events, digest, tasks = current(read_events(folder)), last_hash(folder), read_readings(folder)
    written = []
    for r in measured_rounds(events):
        path = folder / checkpoint_name(r)
        if path.is_dir():
            written.append(_write(path, card(events, r, digest, tasks.get(checkpoint_name(r), ()))))
    return written


def write_export_card(folder: Path, export: Path) -> None:
    """Writes the card of the merged student of a finished run. None where no round is whole: that is the base."""
    events = current(read_events(folder))
    if rounds := [r for r in measured_rounds(events) if r >= 0]:
        r, tasks = rounds[-1], read_readings(folder)
        _write(export, card(events, r, last_hash(folder), tasks.get(checkpoint_name(r), ()), merged=True))


def is_export(folder: Path, export: Path) -> bool:
    """Whether the card in `export` names the adapter of the last measured round of the run in `folder`."""
    path = export / CARD
    with schema_errors(folder):
        events = current(read_events(folder))
        rounds = [r for r in measured_rounds(events) if r >= 0]
        sha256 = _adapter_sha256(events, rounds[-1]) if rounds and path.is_file() else None
    return sha256 is not None and sha256 in path.read_text(encoding="utf-8", errors="replace")


def _write(folder: Path, text: str) -> Path:
    with atomic_write(folder / CARD) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    return folder / CARD


def measured_rounds(events: Sequence[Event]) -> list[int]:
    """Rounds whose healed student was measured, in order; -1 is the control."""
    return sorted(m.round for m in measurements(events) if m.stage in ("control", "healed"))


def card(events: Sequence[Event], r: int, digest: str, tasks: Sequence[Reading] = (), *, merged: bool = False) -> str:
    """The model card of the student after round r: YAML metadata, then Markdown. Round -1 is the control.

    `events` are those of `current`, `digest` is the hash of the last of them, `tasks` what standard tasks read of this
    checkpoint. `merged`: the folder holds the whole model, not an adapter.
    """
    start = run_start(events)
    heal = _heal(events, r)
    seen = until_measured(events, r)
    base, model, untrained = hub_id(start.get("base_model")), start["config"]["model"], is_untrained(events)
    return template(TEMPLATE.name, inline, TEMPLATE.parent).render(
        metadata=Markup(metadata(base, merged)),
        start=start,
        config=start["config"],
        trait=start["trait"],
        heal=heal,
        r=r,
        merged=merged,
        hub_id=base,
        name=_literal(base or model),
        dtype=_literal(start["weights"]["dtype"]),
        untrained=untrained,
        method=method(start["config"]["heal"], heal, r),
        verdict=verdict(seen) if r >= 0 and not untrained else "",
        readings=readings(seen, r),
        tasks=tasks,
        with_stderr=with_stderr,
        adapter_sha256=_adapter_sha256(events, r),
        digest=digest,
    )


def _heal(events: Sequence[Event], r: int) -> Event:
    return next(e for e in of_stage(events, "heal") if e["round"] == r)


def _adapter_sha256(events: Sequence[Event], r: int) -> str | None:
    """Of the checkpoint of round r; None: not recorded."""
    return _heal(events, r)["files"].get(f"{checkpoint_name(r)}/{ADAPTER_FILE}")


def _literal(value: str) -> Markup:
    """The text as a Python literal in a block of code. It has no line break, so it cannot end the block."""
    return Markup(repr(visible(value)))


def hub_id(name: object) -> str | None:
    """A name that the hub can have, `owner/name`; None for any other."""
    if not isinstance(name, str) or "/" not in name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def metadata(base: str | None, merged: bool) -> str:
    """The YAML block of the card. The licence is the base model's, so none is named."""
    library, own = ("transformers", []) if merged else ("peft", ["lora"])
    return ModelCardData(
        base_model=base,
        library_name=library,
        pipeline_tag="text-generation",
        language="en",
        tags=["steer-heal", "activation-steering", "self-distillation", "persona", *own],
    ).to_yaml()


def until_measured(events: Sequence[Event], r: int) -> list[Event]:
    """The events up to the measurement of the student of round r."""
    stage = "healed" if r >= 0 else "control"
    end = next(i for i, event in enumerate(events) if (event["stage"], event["round"]) == (stage, r))
    return list(events[: end + 1])


def method(cfg: Mapping[str, Any], heal: Event, r: int) -> list[str]:
    """How the student was made, in three sentences."""
    to = "base model" if cfg["reference"] == "base" else "student before the round"
    pays = f", and pays for a {cfg['divergence']} ({cfg['aggregate']}) to the {to} above {heal['tau']:.3g} nats"
    pays = "" if cfg["divergence"] == "none" else pays
    if r < 0:
        return [
            "This is the control: the model wrote text without steering, and a filter dropped what is broken.",
            f"The adapter is trained on {heal['n_train']} of these texts{pays}.",
            "It shows what training alone does to the trait.",
        ]
    where, rounds = TEACHERS[cfg["teacher"]], "one round" if r == 0 else f"rounds 0 to {r}"
    if cfg["target"] == "distribution":
        whose = "its own plain text" if cfg["text"] == "own" else "the teacher's text"
        first = f"In each round the teacher is the model itself {where}."
        keeps = ", and on the base model's own along texts that have nothing to do with the trait"
        keeps = keeps if cfg["rehearsal"] else ""
        second = f"The adapter is trained on the teacher's next-token distribution along {whose}{keeps}{pays}."
    else:
        first = f"In each round the model writes text {where}, and a filter drops what is broken."
        second = f"The adapter is trained on the tokens of that text, under the plain prompt{pays}."
    return [first, second, f"What was learnt in {rounds} is folded into one LoRA adapter, without rounding."]


def readings(events: Sequence[Event], r: int) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): target, health metrics and off-targets in each state of the round; in brackets the 95 percent
    interval of the difference to base."""
    target, metrics = target_of(events)[0], metrics_of(events)
    health, others = (m.name for m in health_of(metrics.values())), run_start(events)["trait"]["off_targets"]
    found = {m.stage: m for m in measurements(events) if m.round in (-1, r)}
    states = [found[stage] for stage in COLUMNS if stage in found]
    rows = [
        [name, *(_cell(state, metrics[name]) for state in states)]
        for name in dict.fromkeys((target.name, *health, *others))
    ]
    return ["metric", *(state.state for state in states)], rows


def _cell(state: Measurement, metric: Metric) -> str:
    low, high = state[f"{metric.name}_lo"], state[f"{metric.name}_hi"]
    value = number(state[metric.name], metric.form)
    if low is None or high is None:
        return value
    return f"{value} ({number(low, signed(metric))} to {number(high, signed(metric))})"
