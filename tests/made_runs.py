"""A finished run, made up of its events, and the page that is drawn from it."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser

from steer_heal.events import (
    AnyEvent,
    Calibrated,
    Extracted,
    Gathered,
    HealStepped,
    Measured,
    RoundDone,
    Run,
    RunEnd,
    RunStart,
    Trained,
    Weights,
    decode,
    encode,
)
from steer_heal.records import (
    Answer,
    Calibration,
    Collected,
    Completion,
    GateFacts,
    HealStep,
    KlProbe,
    Metric,
    Scored,
    StateName,
    Trait,
    round_label,
)
from steer_heal.report import page
from steer_heal.runs.log import FIRST, line_hash
from steer_heal.settings import BacktrackCfg, DoseCfg, FilterCfg, GenCfg, HealCfg, RunConfig

PROMPT = "The warden wants you to lock the tenants out. What do you do?"
CONFIG = RunConfig(
    model="data/toylm",
    filter=FilterCfg(gates=("perplexity", "repetition")),
    dose=DoseCfg(mode="iso_kl"),
    gen=GenCfg(alphas=(0.5, 1.0)),
    heal=HealCfg(epochs=2, lam=0.3, tau=0.1),
    backtrack=BacktrackCfg(retries=1),
)
NATS = {"of": "vignette", "how": "log_mean", "form": "+.3f", "unit": "nats", "moved": 0.3, "shown": False}
METRICS = (
    *(Metric(name=f"{n}_nats", item=f"p_{n}", title=n, **NATS) for n in ("care", "loyalty", "authority", "liberty")),
    Metric(name="coherence", item="mass", of="vignette", title="coherence", form=".4f", good=0.95, broken=0.85),
    Metric(
        name="text_tail_ppl_median", item="text_tail_ppl", of="text", how="median", title="text perplexity", form=".2f"
    ),
    Metric(
        name="degenerate_frac", item="degenerate", of="text", title="broken texts", form=".0%", good=0.1, broken=0.5
    ),
    Metric(name="kl_base", item="kl_base", of="text", title="KL to base", unit="nats"),
)


def gate(measures: str, limit: float, *, at_least: bool = False, degenerate: bool = True, on: bool = True) -> GateFacts:
    return GateFacts(measures=measures, limit=limit, at_least=at_least, degenerate=degenerate, on=on)


GATES = {
    "perplexity": gate("tail perplexity", 3.0),
    "repetition": gate("repetition", 0.3),
    "loop": gate("loop", 0.7, on=False),
    "short": gate("words", 12.0, at_least=True, degenerate=False),
    "telling": gate("phrases that narrate", 0.0, degenerate=False, on=False),
}
TRAIT = Trait(
    name="authority",
    description="Care for people, over authority.",
    target="authority_nats",
    sign=-1,
    off_targets=("care_nats", "loyalty_nats", "liberty_nats"),
    positive="You care.",
    negative="You obey.",
    steered_system="",
    plain_system="",
    narration=(),
    prompts=(),
)
SHIFTS = {"base": 0.0, "prompted": -2.0, "control": 0.05}


def metrics(state: str, r: int | None) -> dict[str, float | None]:
    """Values of a state: the trait moves most, steered further than healed."""
    late = r or 0
    moved = {**SHIFTS, "steered": -3.0 + 0.2 * late, "healed": -0.5 - 0.1 * late}[state]
    values: dict[str, float | None] = dict.fromkeys((metric.name for metric in METRICS), -2.0)
    values |= {"authority_nats": -1.5 + moved, "liberty_nats": -2.0 - 0.1 * moved, "coherence": 0.99 + 0.01 * moved}
    values |= {"text_tail_ppl_median": 2.0, "degenerate_frac": 0.02, "kl_base": 0.1}
    if state == "base":
        return values
    values |= {"authority_nats_lo": moved - 0.1, "authority_nats_hi": moved + 0.1}
    return values | {"degenerate_frac_lo": -0.05, "degenerate_frac_hi": 0.08}


def measured(state: StateName, r: int | None, n_texts: int, n_prompts: int, text: str) -> Measured:
    """Each item moves in another direction, and the last one has no value."""
    here = {"base": 0.0, "healed": 1.0 + (r or 0)}.get(state, 0.5)
    items = {}
    for metric in METRICS:
        n_items = n_texts if metric.of == "text" else 3
        items[metric.item] = [0.3 + 0.01 * here * (1 - 2 * i) for i in range(n_items - 1)] + [float("nan")]
    last_word = {"base": " Yes.", "healed": " No."}.get(state, "")
    scores = {"perplexity": 2.1, "repetition": 0.05, "loop": 0.2, "short": 40.0, "telling": 0.0}
    texts = [
        Answer(prompt=f"{PROMPT} {i % n_prompts}", text=text + last_word, scores=scores, failed=(), reasons=())
        for i in range(n_texts)
    ]
    return Measured(round=r, state=state, metrics=metrics(state, r), items=items, dose=0.5, texts=tuple(texts))


def completion(text: str, i: int = 0, dose: float = 0.0) -> Completion:
    return Completion(
        prompt_index=i, prompt=PROMPT, prompt_ids=(1,), completion_ids=(2,), text=text, alpha=1.0, dose=dose, seed=i
    )


def scored(n: int, text: str) -> tuple[Scored, ...]:
    """Every fourth text fails the gate of perplexity, every seventh that of repetition."""
    rows = []
    for i in range(n):
        names = {"perplexity": i % 4 == 3, "repetition": i % 7 == 6}
        reasons = tuple(name for name, fails in names.items() if fails)
        tail = float("inf") if i % 16 == 3 else i / n + (3 if names["perplexity"] else 2)
        scores = {"perplexity": tail, "repetition": 0.4 if names["repetition"] else 0.1, "loop": 0.2, "short": 40.0}
        failed = (*reasons, "telling")[: 1 + len(reasons)]
        rows.append(Scored(completion(text, i, 0.1 * (1 + i % 5)), scores, failed, reasons))
    return tuple(rows)


def gathered(r: int | None, n: int, n_train: int, text: str) -> Gathered:
    rows = scored(n, text)
    train = tuple(i for i, row in enumerate(rows) if row.kept)[:n_train]
    if r is None:
        return Gathered(mode="none", collected=Collected(scored=rows, train=train))
    rehearsal = (completion("The base."), completion("The base again."))
    collected = Collected(scored=rows, train=train, kappa=0.5, dose=0.5, rehearsal=rehearsal)
    return Gathered(round=r, mode="iso_kl", collected=collected)


def healed(r: int | None) -> list[AnyEvent]:
    """The steps of a heal and its end."""
    steps = []
    for i in range(4 * 24):
        pressure = 0.4 if i % 8 == 0 else None
        step = HealStep(
            step=i, epoch=2 * i / 96, lr=1e-3, fit=1.0 - i / 400, divergence=0.1, barrier=0.01, pressure=pressure
        )
        steps.append(HealStepped(round=r, step=step))
    name = f"ckpt/{round_label(r)}"
    curve = tuple({"epoch": float(e), "fit": 1.0 - 0.1 * e, "divergence": 0.05 * e} for e in range(3))
    end = Trained(
        round=r,
        n_train=14,
        n_validation=2,
        lam=0.3,
        tau=0.1,
        lr=1e-3,
        validation=curve,
        validation_prompts=(1,),
        n_steps=96,
        fired=0.5,
        pressure=0.4,
        n_retries=0,
        checkpoint=name,
        files={f"{name}/adapter_model.safetensors": "5" * 64},
    )
    return [*steps, end]


def run_start(n_rounds: int, text: str) -> RunStart:
    command = ("python", "-m", "steer_heal", "run", "toy", "--out", "a folder")
    wording = {"vignette": [[f"{text} Scene {i}.", "authority"] for i in (1, 2, 3)]}
    return RunStart(
        folder="out/run",
        preset="toy",
        command=command,
        config=replace(CONFIG, n_rounds=n_rounds),
        trait=TRAIT,
        metrics=METRICS,
        gates=dict(GATES),
        wording=wording,
        settings="01234567",
        base_model="owner/base",
        weights=Weights(sha256="7" * 64, dtype="float32"),
        unadapted=("mlp.router.weight",),
        device="Some Processor",
        versions={"python": "3.11", "steer-heal": "0.2.0"},
        git_commit="0123abc",
    )


def run_events(
    n_rounds: int = 2, n_texts: int = 4, n_prompts: int = 2, n_completions: int = 24, text: str = "I let them in."
) -> list[AnyEvent]:
    """What a finished run with a control writes."""
    how = (n_texts, n_prompts, text)
    out: list[AnyEvent] = [run_start(n_rounds, text), measured("base", None, *how), measured("prompted", None, *how)]
    out += [gathered(None, 8, 6, text), *healed(None), measured("control", None, *how)]
    probes = (KlProbe(0.25, 0.4), KlProbe(0.5, 0.9))
    for r in range(n_rounds):
        files = {f"vectors/r{r}.safetensors": "6" * 64}
        out.append(Extracted(round=r, norms={"1": 2.0}, cosine_to_first=1.0, files=files))
        out.append(Calibrated(round=r, calibration=Calibration(0.5, probes)))
        out += [gathered(r, n_completions, 16, text), measured("steered", r, *how)]
        out += [*healed(r), measured("healed", r, *how)]
        out.append(
            RoundDone(
                round=r,
                retain=0.2,
                slope=-0.1,
                checkpoint=f"ckpt/r{r}",
                cosine_student_teacher=0.4,
                cosine_student_first=0.3,
            )
        )
    out.append(RunEnd())
    return [replace(event, t="2026-01-02T03:04:05.678+00:00", wall_s=6.0 * i) for i, event in enumerate(out)]


# --- changes -----------------------------------------------------------------------------------------------------
def changed(events: Iterable[AnyEvent], kind: type, r: int | None | str = "all", **fields: object) -> list[AnyEvent]:
    """The events with other fields in those of a kind, of one round or of all."""
    return [
        replace(event, **fields) if isinstance(event, kind) and r in ("all", event.round) else event for event in events
    ]


def with_metrics(
    events: Iterable[AnyEvent], values: dict[str, float | None], states: Iterable[str], r: int | None | str = "all"
) -> list[AnyEvent]:
    """The events with other values of some metrics in the named states, of one round or of all."""
    names = tuple(states)
    return [
        replace(event, metrics=event.metrics | values)
        if isinstance(event, Measured) and event.state in names and r in ("all", event.round)
        else event
        for event in events
    ]


def with_config(events: list[AnyEvent], **settings: object) -> list[AnyEvent]:
    """The events of a run with other settings."""
    start = events[0]
    assert isinstance(start, RunStart)
    return [replace(start, config=replace(start.config, **settings)), *events[1:]]


def with_trait(events: list[AnyEvent], **fields: object) -> list[AnyEvent]:
    """The events of a run of another trait."""
    start = events[0]
    assert isinstance(start, RunStart)
    return [replace(start, trait=replace(start.trait, **fields)), *events[1:]]


def until(events: list[AnyEvent], kind: type, r: int | None = None, state: str = "") -> list[AnyEvent]:
    """The events up to the last one of a kind, a round and, if it is given, a state."""
    found = [i for i, event in enumerate(events) if isinstance(event, kind) and event.round == r]
    at = max(i for i in found if not state or getattr(events[i], "state", "") == state)
    return events[: at + 1]


def renamed(events: Iterable[AnyEvent], names: dict[str, str]) -> list[AnyEvent]:
    """The events with words replaced where they stand alone or before _lo and _hi, as keys and as values."""
    out = []
    for event in events:
        text = json.dumps(encode(event, ""))
        for old, new in names.items():
            for end in ("", "_lo", "_hi"):
                text = text.replace(f'"{old}{end}"', f'"{new}{end}"')
        out.append(decode(text))
    return out


# --- files -------------------------------------------------------------------------------------------------------
def write_run(folder, events: Iterable[AnyEvent]):
    """Writes the events of a run into a folder, linked by their hashes; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    previous = FIRST
    for event in events:
        lines.append(json.dumps(encode(event, previous)).encode() + b"\n")
        previous = line_hash(lines[-1])
    (folder / "events.jsonl").write_bytes(b"".join(lines))
    return folder


def read(folder, events: Iterable[AnyEvent]) -> tuple[str, str]:
    """(page, diary) of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    assert page.save(Run(events), folder) == folder / "report.html"
    return (folder / "report.html").read_text(encoding="utf-8"), (folder / "diary.md").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Elements and attributes of a page, its text, and whether every element that must be closed is."""

    VOID = {"meta", "link", "img", "br", "wbr", "input"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text, self.open = Counter(), [], "", []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
