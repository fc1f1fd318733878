"""What a run records: one dataclass for each kind of event, one codec, and the run as a list of events.

An event is one JSON object on a line of events.jsonl. Tables, pictures, pages and cards are made from events alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import Discriminator, TypeAdapter, ValidationError

from steer_heal.errors import UserError, problem_lines
from steer_heal.records import (
    Answer,
    Calibration,
    Collected,
    EvalResult,
    GateFacts,
    HealReport,
    HealStep,
    HealSummary,
    Metric,
    Number,
    StateName,
    Strength,
    Teachable,
    Trait,
    Values,
    round_name,
    state_label,
)
from steer_heal.settings import TINY_RANDOM, RunConfig

SCHEMA = 9
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character. JSON readers refuse it."""
Files = dict[str, str]
"""SHA-256 of files by their path within the run's folder."""
TableRow = dict[str, str | Number | None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """What every event has."""

    round: int | None = None
    """None: before or after the loop. The control, which is healed before the loop, has None too."""
    t: str = ""
    """Time of writing, UTC."""
    wall_s: float = 0.0
    """Seconds that the run has taken so far, without the time in which it was stopped."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The base weights that a run began with."""

    sha256: str
    dtype: str
    parts: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the chat template, the tokenizer, the config and the generation config."""
    note: str = ""
    """How the weights differ from those of the named model, such as a quantisation. Empty: they do not."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """How the chat template writes a conversation, as it was found when the model was loaded."""

    date: str = ""
    """The date that it reads, as YYYY-MM-DD. Empty: it reads none."""
    opening: str = ""
    """What stands between the user's message and a reply: the tags, and an empty thought if the model thinks."""
    ends: tuple[str, ...] = ()
    """Tokens that end a reply."""
    takes_system: bool = True
    """Whether it supports system messages."""


@dataclass(frozen=True, kw_only=True)
class RunStart(Event):
    """A run begins: its settings, its data, and what it runs on."""

    event: Literal["run_start"] = "run_start"
    folder: str = ""
    preset: str
    command: tuple[str, ...] = ()
    config: RunConfig
    trait: Trait
    metrics: tuple[Metric, ...]
    gates: dict[str, GateFacts]
    wording: dict[str, list[list[str]]]
    """The items of the evals in words, by what an item is: vignette, pair or question. For attack: names and kinds."""
    inputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every data file, by the setting that names it; see `Inputs.sha256`."""
    settings: str = ""
    """Fingerprint of the settings without the seed."""
    base_from: str = ""
    """The run beside this one from which the pre-flight and the states base and prompted are taken. Empty: none."""
    base_model: str = ""
    """What the adapters name as their base: a hub id, a name that steer-heal knows, or a path."""
    hub_id: str | None = None
    """The model on the hub whose weights these are, or nearly are if weights.note is not empty."""
    loaded_with: Literal["AutoModelForCausalLM", "AutoModelForImageTextToText"] = "AutoModelForCausalLM"
    """The class of transformers that loads the model."""
    adapter: str = "a LoRA adapter"
    """The kind of adapter with its settings, as a noun phrase."""
    weights: Weights | None = None
    chat: Chat | None = None
    unadapted: tuple[str, ...] = ()
    """Weights of the adapted blocks that the adapter leaves out."""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured(Event):
    """One state of the model, measured by every eval."""

    event: Literal["measured"] = "measured"
    state: StateName
    metrics: Values
    items: dict[str, list[Number]]
    dose: float = 0.0
    texts: tuple[Answer, ...] = ()

    def __getitem__(self, name: str) -> float | None:
        """A metric by name; None where it has no value."""
        return self.metrics.get(name)

    @property
    def label(self) -> str:
        """`base`, `healed round 1`."""
        return state_label(self.state, self.round)

    @property
    def result(self) -> EvalResult:
        return EvalResult(self.metrics, self.items, self.texts)


@dataclass(frozen=True, kw_only=True)
class Preflight(Event):
    """Before any text was written: whether the personas give the model anything to teach."""

    event: Literal["preflight"] = "preflight"
    found: Teachable


@dataclass(frozen=True, kw_only=True)
class Extracted(Event):
    """The steering vector of a round was read from the student."""

    event: Literal["extracted"] = "extracted"
    norms: dict[str, Number]
    """Length of the vector by block."""
    cosine_to_first: Number
    """Cosine to the vector of round 0."""
    files: Files


@dataclass(frozen=True, kw_only=True)
class Calibrated(Event):
    """The dose of mode iso_kl was found."""

    event: Literal["calibrated"] = "calibrated"
    calibration: Calibration


@dataclass(frozen=True, kw_only=True)
class Gathered(Event):
    """All text of a round was written and scored, and the dose was chosen."""

    event: Literal["gathered"] = "gathered"
    mode: str
    """How the dose was chosen: dose.mode, or none for the control."""
    collected: Collected


@dataclass(frozen=True, kw_only=True)
class Contrasted(Event):
    """The strength of a contrast was found, along the text of the round."""

    event: Literal["contrasted"] = "contrasted"
    found: Strength


@dataclass(frozen=True, kw_only=True)
class HealStepped(Event):
    """One optimiser step of a heal."""

    event: Literal["heal_step"] = "heal_step"
    step: HealStep


@dataclass(frozen=True, kw_only=True)
class HealRetried(Event):
    """A loss was not finite: the heal starts again at half the learning rate. Earlier steps of the round are void."""

    event: Literal["heal_retried"] = "heal_retried"
    step: int
    prompt_index: int | None
    text: str
    lr: float
    error: str


@dataclass(frozen=True, kw_only=True)
class Trained(Event, HealSummary):
    """A heal ended and its factor was folded into the history."""

    event: Literal["trained"] = "trained"
    n_steps: int
    fired: float
    pressure: Number | None
    n_retries: int
    checkpoint: str | None
    """Folder of the student within the run's; None in memory."""
    files: Files

    @classmethod
    def of(cls, report: HealReport, *, r: int | None, n_retries: int, checkpoint: str | None, files: Files) -> Trained:
        """The report of a heal without its steps, which are events of their own."""
        return cls(
            **{each.name: getattr(report, each.name) for each in fields(HealSummary)},
            round=r,
            n_steps=len(report.steps),
            fired=report.fired,
            pressure=report.pressure,
            n_retries=n_retries,
            checkpoint=checkpoint,
            files=files,
        )


@dataclass(frozen=True, kw_only=True)
class Dropped(Event):
    """A round whose student is past a limit was undone. All earlier events of the round are void."""

    event: Literal["dropped"] = "dropped"
    past: tuple[str, ...]
    """Every limit that the student is past, in words."""
    dose: float
    lr: float
    metrics: Values
    next_kappa: float
    next_lr_share: float


@dataclass(frozen=True, kw_only=True)
class RoundDone(Event):
    """A round was kept."""

    event: Literal["round_done"] = "round_done"
    retain: Number | None
    slope: Number | None
    checkpoint: str | None
    cosine_student_teacher: Number
    cosine_student_first: Number


@dataclass(frozen=True, kw_only=True)
class RunEnd(Event):
    """A run ended: finished, or stopped by an error."""

    event: Literal["run_end"] = "run_end"
    verdict: str = ""
    table: tuple[TableRow, ...] = ()
    error: str | None = None
    resumable: bool = True
    """Whether a run that an error stopped can go on once its cause is mended."""


@dataclass(frozen=True, kw_only=True)
class Extended(Event):
    """A finished run goes on to more rounds. Its earlier run_end is void."""

    event: Literal["extended"] = "extended"
    n_rounds: int
    """Number of rounds in all."""


AnyEvent = (
    RunStart
    | Preflight
    | Measured
    | Extracted
    | Calibrated
    | Gathered
    | Contrasted
    | HealStepped
    | HealRetried
    | Trained
    | Dropped
    | RoundDone
    | RunEnd
    | Extended
)
Kind = TypeVar("Kind", bound=Event)
_codec: TypeAdapter[AnyEvent] = TypeAdapter(Annotated[AnyEvent, Discriminator("event")])


# --- codec -------------------------------------------------------------------------------------------------------
def encode(event: AnyEvent, prev: str) -> dict[str, object]:
    """The JSON object of an event. `prev` is the hash of the line before it."""
    body = plain(event)
    assert isinstance(body, dict)
    first = {"schema": SCHEMA, "event": event.event, "round": event.round, "t": event.t, "wall_s": event.wall_s}
    return {**first, "prev": prev, **body}


def decode(line: bytes | str) -> AnyEvent:
    """The event of a line. ValueError naming each field that is not as this version writes it."""
    try:
        return _codec.validate_json(line, strict=True)
    except ValidationError as error:
        raise ValueError("; ".join(problem_lines(error, AnyEvent, lambda at: at))) from None


def plain(value: object) -> object:
    """The value made of JSON types. Numbers that are not finite become strings: NaN, Infinity, -Infinity."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float):
        return value
    return LONE_SURROGATE.sub("\ufffd", str(value))


# --- a run as its events -----------------------------------------------------------------------------------------
class Run:
    """The events of a run in their order, without those that a later event made void, and how to find one.

    Whoever wants to follow a run subscribes: the console, trackers, the pictures, a callback of the library.
    """

    def __init__(self, events: Iterable[AnyEvent] = ()) -> None:
        self.events: list[AnyEvent] = []
        """All but the steps of heals."""
        self.steps: list[HealStepped] = []
        self.n_steps = 0
        """Steps of all heals, those that were made void too."""
        self.subscribers: list[Callable[[AnyEvent], object]] = []
        self.asked_rounds: int | None = None
        """Number of rounds of the library's `loop`, in place of the settings'."""
        for event in events:
            self.take(event)

    def add(self, event: AnyEvent) -> None:
        """Records an event and tells the subscribers."""
        self.take(event)
        for tell in self.subscribers:
            tell(event)

    def take(self, event: AnyEvent) -> None:
        """Adds an event; drops what it makes void."""
        if isinstance(event, HealStepped):
            self.steps.append(event)
            self.n_steps += 1
            return
        if isinstance(event, HealRetried | Dropped):
            self.steps = [step for step in self.steps if step.round != event.round]
        if isinstance(event, Dropped):
            self.events = [e for e in self.events if e.round != event.round or isinstance(e, Dropped)]
        if isinstance(event, Extended):
            self.events = [e for e in self.events if not isinstance(e, RunEnd)]
        self.events.append(event)

    def each(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]

    def at(self, kind: type[Kind], r: int | None) -> Kind | None:
        """The event of a kind and round; None: it was not recorded yet. Round None is before the loop."""
        return next((e for e in reversed(self.events) if isinstance(e, kind) and e.round == r), None)

    def require(self, kind: type[Kind], r: int | None) -> Kind:
        """As `at`. UserError where the run has no such event."""
        found = self.at(kind, r)
        if found is None:
            where = "before the loop" if r is None else f"of {round_name(r)}"
            raise UserError(f"the run has no event {kind.__name__} {where}; ask for another round")
        return found

    def measured(self, state: str, r: int | None = None) -> Measured | None:
        """A measured state; None: it was not measured yet."""
        return next((m for m in self.each(Measured) if m.state == state and m.round == r), None)

    @property
    def start(self) -> RunStart:
        """UserError where the run has none."""
        return self.require(RunStart, None)

    @property
    def end(self) -> RunEnd | None:
        """The end of a finished run."""
        return next((end for end in self.each(RunEnd) if end.error is None), None)

    @property
    def dead_end(self) -> str:
        """The error that stopped the run for good. Empty: it is finished, or can go on."""
        last = self.events[-1] if self.events else None
        return last.error or "" if isinstance(last, RunEnd) and not last.resumable else ""

    @property
    def n_rounds(self) -> int:
        """The number of rounds that the run was asked for."""
        if self.asked_rounds is not None:
            return self.asked_rounds
        extended = self.each(Extended)
        return extended[-1].n_rounds if extended else self.start.config.n_rounds

    @property
    def rounds(self) -> list[int]:
        """The rounds that were kept, in order."""
        return [event.round for event in self.each(RoundDone) if event.round is not None]

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of the run by name, in the order of its evals."""
        return {metric.name: metric for metric in self.start.metrics}

    @property
    def trait_metric(self) -> Metric:
        """The metric that judges the run's trait. ValueError where the run has no such metric."""
        name = self.start.trait.target
        metrics = self.metrics
        if name not in metrics:
            raise ValueError(f"the trait's target is {name!r:.80}, none of {', '.join(metrics)}")
        if metrics[name].moved is None:
            raise ValueError(f"the trait's target is {name}, which has no smallest shift that counts (Metric.moved)")
        return metrics[name]

    @property
    def untrained(self) -> bool:
        """Whether nobody trained the model: it only tries the commands, and its numbers mean nothing."""
        return self.start.config.model == TINY_RANDOM
