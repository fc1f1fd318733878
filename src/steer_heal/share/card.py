"""Model cards: the README.md of each checkpoint and export, made from the events of its run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from steer_heal.errors import UserError
from steer_heal.events import Measured, RoundDone, Run, Trained
from steer_heal.inputs.files import ADAPTER_FILE, OWN_CONFIG_FILE, is_path
from steer_heal.report.view import inline, template, visible, with_interval
from steer_heal.runs.log import last_hash, read_events
from steer_heal.runs.storage import atomic_write
from steer_heal.settings import TEACHER_WORDS, Form, HealCfg
from steer_heal.share.readings import Reading, read_readings, with_stderr
from steer_heal.verdict import health_of, verdict

if TYPE_CHECKING:  # torch: seconds
    from steer_heal.runs.stored import FolderRun

CARD = "README.md"
TEMPLATE = Path(__file__).parent / "card.md.j2"


def write_cards(folder: Path) -> list[Path]:
    """Writes the card of each checkpoint of a run whose student was measured; returns their paths."""
    run = Run(read_events(folder))
    digest = last_hash(folder)
    tasks = read_readings(folder)
    written = []
    for trained in run.each(Trained):
        name = trained.checkpoint
        if name is not None and _student(run, trained.round) is not None and (folder / name).is_dir():
            written.append(_write(folder / name, card(run, trained.round, digest, tasks.get(name, ()))))
    return written


def write_export_card(run: FolderRun, r: int, export: Path, form: Form, changes: Sequence[str]) -> None:
    """Writes the card of an export of the student after round r. `changes` are sentences on what differs from it."""
    tasks = read_readings(run.folder).get(run.require(Trained, r).checkpoint or "", ())
    _write(export, card(run, r, last_hash(run.folder), tasks, form=form, changes=changes))


def _write(folder: Path, text: str) -> Path:
    with atomic_write(folder / CARD) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    return folder / CARD


def _student(run: Run, r: int | None) -> Measured | None:
    """The measured student after round r. Round None is the control."""
    return run.measured("control" if r is None else "healed", r)


def card(
    run: Run,
    r: int | None,
    digest: str,
    tasks: Sequence[Reading] = (),
    *,
    form: Form | None = None,
    changes: Sequence[str] = (),
) -> str:
    """The model card of the student after round r: YAML metadata, then Markdown. Round None is the control.

    Args:
        run: A run in which that student was measured.
        digest: Hash of the last event.
        tasks: Readings of standard tasks from this checkpoint.
        form: Of an export. None: the folder is a checkpoint.
        changes: Sentences on what differs from the student that was measured.
    """
    start = run.start
    if start.weights is None:
        raise UserError("the run did not record its base weights, so its checkpoints have no card")
    trained = run.require(Trained, r)
    seen = until_measured(run, r)
    hub = hub_id(start.hub_id)
    note = start.weights.note
    peft = f"{trained.checkpoint}/{OWN_CONFIG_FILE}" not in trained.files
    return template(TEMPLATE.name, inline, TEMPLATE.parent).render(
        metadata=Markup(metadata(hub, form or ("peft" if peft else None))),
        start=start,
        trait=start.trait,
        adapter=start.adapter,
        r=r,
        form=form,
        merged=form in ("hf", "gguf"),
        changes=changes,
        peft=peft,
        note=note,
        code_note=Markup(f"  # {' '.join(visible(note).split())}") if note else "",
        hub_id=hub,
        name=start.config.model if note or hub is None else hub,
        base_name=_literal(start.config.model),
        hub_name=_literal(hub or ""),
        dtype=_literal(start.weights.dtype),
        untrained=run.untrained,
        method=method(start.config.heal, trained),
        verdict=verdict(seen) if r is not None and not run.untrained else "",
        readings=readings(seen, r),
        tasks=tasks,
        with_stderr=with_stderr,
        adapter_sha256=trained.files.get(f"{trained.checkpoint}/{ADAPTER_FILE}"),
        digest=digest,
    )


def _literal(value: str) -> Markup:
    """The text as a Python literal in a block of code. It has no line break, so it cannot end the block."""
    return Markup(repr(visible(value)))


def hub_id(name: str | None) -> str | None:
    """A name that a repository of the hub can have, `owner/name`. None for any other name."""
    if name is None or "/" not in name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def in_card(text: str) -> str:
    """A text of a card without the escapes of Markdown."""
    return re.sub(r"\\(.)", r"\1", text)


def with_base(text: str, bases: Sequence[str], hub: str) -> str:
    """A card whose base is a model on the hub in place of `bases`, folders and files on this machine; the longest comes
    first. A path is replaced anywhere, a bare name, which may be a common word, only where the template puts it."""
    for base in bases:
        shown = {str(show(base)): str(show(hub)) for show in (str, inline, _literal)}
        name = "|".join(map(re.escape, sorted(shown, key=len, reverse=True)))
        place = r"()" if is_path(base) else r"^(# .* in |\| base weights \| |.*\bload\()"
        end = "" if is_path(base) else r"(?=$|, )"
        text = re.sub(f"{place}({name}){end}", lambda at, to=shown: at[1] + to[at[2]], text, flags=re.MULTILINE)
    try:
        data: Any = ModelCard(text).data
    except Exception as error:  # of the YAML that someone wrote by hand
        raise UserError(f"the metadata of {CARD} cannot be read ({error}); restore the card") from None
    data.base_model = hub
    return re.sub(r"\A---\n.*?\n---\n", lambda _: f"---\n{data.to_yaml()}\n---\n", text, flags=re.DOTALL)


def metadata(base: str | None, form: Form | None) -> str:
    """The YAML block of the card. It names no licence, because the licence is the base model's."""
    library = {None: "steer-heal", "hf": "transformers", "peft": "peft"}.get(form, "gguf")
    tags = ["steer-heal", "activation-steering", "self-distillation", "persona"]
    if form in ("peft", "gguf-lora"):
        tags.append("lora")
    return ModelCardData(
        base_model=base, library_name=library, pipeline_tag="text-generation", language="en", tags=tags
    ).to_yaml()


def until_measured(run: Run, r: int | None) -> Run:
    """The run as it was when round r was kept or, if it was not, when its student had just been measured."""
    last = run.at(RoundDone, r) or _student(run, r)
    assert last is not None, "only a measured student has a card"
    return Run(run.events[: run.events.index(last) + 1])


def method(cfg: HealCfg, trained: Trained) -> list[str]:
    """How the student was made, in three sentences."""
    r = trained.round
    pays = ""
    if trained.lam > 0:
        reference = "base model" if cfg.reference == "base" else "student before the round"
        pays = (
            f", with a penalty if {cfg.divergence} ({cfg.aggregate}) to the {reference} exceeds {trained.tau:.3g} nats"
        )
    if r is None:
        return [
            "This is the control: the model wrote text without steering, and a filter dropped the incoherent text.",
            f"The adapter was trained on {trained.n_train} of these texts{pays}.",
            "It shows how training alone moves the trait.",
        ]
    teacher = f"with {TEACHER_WORDS[cfg.teacher]}"
    if cfg.target == "distribution":
        whose = "its own plain text" if cfg.text == "own" else "the teacher's text"
        first = f"In each round the teacher is the model itself {teacher}."
        second = f"The adapter was trained on the teacher's next-token distribution along {whose}"
        if cfg.hold:
            second += f" ({cfg.hold:.0%} of it written under prompts that oppose the trait)"
        if cfg.rehearsal:
            second += ", and on the base model's distribution along texts that have nothing to do with the trait"
        second += f"{pays}."
    else:
        first = f"In each round the model wrote text {teacher}, and a filter dropped the incoherent text."
        second = f"The adapter was trained on the tokens of that text, under the plain prompt{pays}."
    rounds = "one round" if r == 0 else f"rounds 1 to {r + 1}"
    return [first, second, f"What was learned in {rounds} is folded into one adapter, without rounding."]


def readings(run: Run, r: int | None) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): target, health metrics and off-targets in each state of the round, with the 95 percent interval
    of the difference to base in brackets."""
    target = run.trait_metric
    health = [metric.name for metric in health_of(run.metrics.values())]
    states = [state for state in run.each(Measured) if state.round in (None, r)]
    rows = []
    for name in dict.fromkeys((target.name, *health, *run.start.trait.off_targets)):
        metric = run.metrics[name]
        rows.append([name, *(with_interval(state.metrics, metric, "{} ({} to {})") for state in states)])
    return ["metric", *(state.label for state in states)], rows
