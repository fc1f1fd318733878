"""The data files of a run. They are read once, so that later edits do not change the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from steer_heal.errors import Problems, UserError
from steer_heal.inputs.alike import alike
from steer_heal.inputs.attacks import Attack, parse_attacks
from steer_heal.inputs.files import DataFile, parse_texts, read_file, resolve
from steer_heal.inputs.instruments import (
    Instrument,
    LikelihoodInstrument,
    Vignette,
    parse_instrument,
    parse_likelihood,
    parse_vignettes,
)
from steer_heal.inputs.pairs import Pair, Question, held_out, parse_questions
from steer_heal.inputs.traits import (
    TraitFile,
    make_trait,
    other_traits,
    prompts_file,
    read_pairs,
    read_panel,
    read_trait,
    readable_part,
)
from steer_heal.records import OPPOSES, Trait
from steer_heal.settings import RunConfig

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Inputs:
    """The parsed data of a run."""

    trait: Trait
    targets: tuple[str, ...]
    """Metrics that can be the target of the trait, the preferred one first: see check.py."""
    prompts: tuple[str, ...]
    """Prompts that training text is written for."""
    eval_prompts: tuple[str, ...]
    """Prompts answered in free text. The model is never trained on them."""
    contexts: tuple[str, ...]
    """User messages from which the steering vector is extracted."""
    hold: tuple[Attack, ...]
    """Attacks that a share of the student's own text is written under. Empty without heal.hold."""
    rehearsal: tuple[str, ...]
    """Prompts on which the base model is the teacher. May be empty."""
    vignettes: tuple[Vignette, ...]
    instrument: Instrument
    likelihood: LikelihoodInstrument
    everyday: tuple[Question, ...]
    instructions: tuple[Question, ...]
    """Empty without the eval instructions."""
    pairs: tuple[Pair, ...]
    """Contrast pairs of the trait. May be empty."""
    attacks: tuple[Attack, ...]
    """What the eval holds tries against the trait."""
    panel: Mapping[str, tuple[Pair, ...]]
    """Contrast pairs of the other traits, by trait, without those whose prompt is among the trait's or rehearsed. Empty
    without the eval panel."""
    sha256: Mapping[str, str]
    """SHA-256 of each file, by the setting that names it, of the pairs that are read of each other trait, as
    `panel.<trait>`, of the files of other traits, as `rehearsal.<trait>`, and of plugins, as `plugin.<name>`. The trait
    file is missing: its values are recorded."""

    @property
    def digest(self) -> str:
        """16 hex digits that are equal for the same trait and the same content of the files."""
        content = json.dumps([sorted(self.sha256.items()), asdict(self.trait)])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def wording(self) -> dict[str, list[list[str]]]:
        """The wording of each item of the evals, in the order of the items, by `Metric.of`.

        For a vignette it is [scene, right answer], for a pair [prompt, positive reply, negative reply], for a question
        [question, right answer, wrong answer], for an instruction [system prompt and question, answer that follows it,
        answer that does not]. Texts are not inputs, and are missing. For an attack it is [name,
        `opposes` or `context`].
        """
        scenes = [[v.text, f"{v.foundation} or {v.also}" if v.also else v.foundation] for v in self.vignettes]
        return {
            "vignette": scenes,
            "pair": [[pair.prompt, pair.positive, pair.negative] for pair in self.pairs],
            "question": [[each.question, each.right, each.wrong] for each in self.everyday],
            "instruction": [
                [f"{each.system or ''}\n{each.question}", each.right, each.wrong] for each in self.instructions
            ],
            "attack": [[each.name, OPPOSES if each.opposes else "context"] for each in self.attacks],
        }


def load_inputs(cfg: RunConfig, given: TraitFile | None = None) -> Inputs:
    """Reads and checks every data file. UserError with a line for each problem.

    `given` is the content of a trait file, used instead of the file that cfg.trait names by its path."""
    problems = Problems()
    sha256: dict[str, str] = {}
    parsed = partial(_parsed, problems, sha256)
    prompts = None
    with problems.noted():
        if cfg.gen.prompts is not None and (path := prompts_file(cfg.gen.prompts, cfg.trait)) is not None:
            prompts = parsed("gen.prompts", path, parse_texts)
    trait, targets, pairs = _trait(cfg, given, prompts, problems, sha256)
    contexts = parsed("steer.contexts", cfg.steer.contexts, parse_texts)
    hold = parsed("heal.hold_attacks", cfg.heal.hold_attacks, parse_attacks) if cfg.heal.hold else ()
    vignettes = parsed("eval.vignettes", cfg.eval.vignettes, parse_vignettes)
    instrument = parsed("eval.instrument", cfg.eval.instrument, parse_instrument)
    likelihood = parsed("eval.likelihood", cfg.eval.likelihood, parse_likelihood)
    everyday = parsed("eval.everyday", cfg.eval.everyday, partial(parse_questions, with_system=False))
    asks = "instructions" in cfg.eval.evals
    instructions = parsed("eval.instructions", cfg.eval.instructions, parse_questions) if asks else ()
    attacks = parsed("eval.attacks", cfg.eval.attacks, parse_attacks)
    if "holds" in cfg.eval.evals:
        problems.attempt(_require_held_out, hold or (), attacks or ())
    rehearsal = problems.attempt(_rehearsal, cfg, trait, pairs, sha256)
    panel: dict[str, tuple[Pair, ...]] = {}
    if "panel" in cfg.eval.evals and trait is not None:
        with problems.noted():
            panel = _panel(cfg, trait, pairs, rehearsal or (), sha256)
    contexts = problems.attempt(_spaced, "steer.n_contexts", contexts, cfg.steer.n_contexts)
    vignettes = problems.attempt(_spaced, "eval.n_vignettes", vignettes, cfg.eval.n_vignettes)
    problems.raise_if_any()
    assert trait is not None and contexts is not None and rehearsal is not None and vignettes is not None
    assert instrument is not None and likelihood is not None and everyday is not None and attacks is not None
    assert hold is not None and instructions is not None
    return Inputs(
        trait=trait,
        targets=targets,
        prompts=trait.prompts[: cfg.gen.n_prompts],
        eval_prompts=trait.prompts[-cfg.eval.n_prompts :],
        contexts=contexts,
        hold=hold,
        rehearsal=rehearsal,
        vignettes=vignettes,
        instrument=instrument,
        likelihood=likelihood,
        everyday=everyday,
        instructions=instructions,
        pairs=pairs,
        attacks=attacks,
        panel=panel,
        sha256=sha256,
    )


def _parsed(
    problems: Problems, sha256: dict[str, str], setting: str, path: Path, parse: Callable[[DataFile], Parsed]
) -> Parsed | None:
    """The parsed file, whose hash is added. None: its problems were noted."""
    with problems.noted():
        file = read_file(resolve(path, setting))
        sha256[setting] = file.sha256
        return parse(file)


def _panel(
    cfg: RunConfig, trait: Trait, pairs: Sequence[Pair], rehearsal: Sequence[str], sha256: dict[str, str]
) -> dict[str, tuple[Pair, ...]]:
    """The pairs of other traits, by trait, without those whose prompt is among the trait's or rehearsed. The hash of
    those of each trait is added. UserError if no pair is left."""
    seen = set(map(alike, (*trait.prompts, *rehearsal)))
    panel = {}
    for name, placed in read_panel(cfg.eval.pairs, trait, pairs).items():
        if unseen := [pair for pair in held_out(placed, ()) if alike(pair.prompt) not in seen]:
            panel[name] = evenly(unseen, cfg.eval.n_panel)
            sha256[f"panel.{name}"] = hashlib.sha256(json.dumps([*map(asdict, panel[name])]).encode()).hexdigest()
    if not panel:
        raise UserError(
            "eval.evals contains 'panel': the prompt of every pair is trained or rehearsed; leave out panel, or give "
            "other --eval.pairs"
        )
    return panel


def _trait(
    cfg: RunConfig, given: TraitFile | None, prompts: tuple[str, ...] | None, problems: Problems, sha256: dict[str, str]
) -> tuple[Trait | None, tuple[str, ...], tuple[Pair, ...]]:
    """(trait, its targets, its pairs) with `prompts` in place of its own. What is wrong is noted, and the hash of the
    pairs is added. None: the file has faults."""
    trait = None
    targets: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    whole = problems.attempt(read_trait, cfg.trait) if given is None else (DataFile(Path(cfg.trait), "", ""), given)
    if (found := whole or readable_part(cfg.trait)) is not None:
        own, source = found
        prompts = prompts or source.prompts or _everyday(cfg)
        with problems.noted():
            if whole is not None:
                trait = make_trait(cfg.trait, source, prompts)
                targets = source.target
            problems.attempt(_check_pool, cfg, cfg.trait if trait is None else trait.name, prompts)
            file, placed = read_pairs(cfg.eval.pairs, cfg.trait, own, file=source)
            pairs = held_out(placed, prompts)
            if pairs:
                sha256["eval.pairs"] = file.sha256
    return trait, targets, pairs


def _everyday(cfg: RunConfig) -> tuple[str, ...]:
    """The prompts of a trait that has none: everyday messages of the package. Those of the evaluation do not depend on
    gen.n_prompts."""
    texts = parse_texts(read_file(resolve("data/contexts.jsonl", "gen.prompts")))
    asked = evenly(texts, cfg.eval.n_prompts)
    return evenly([text for text in texts if text not in asked], cfg.gen.n_prompts) + asked


def _check_pool(cfg: RunConfig, name: str, prompts: Sequence[str]) -> None:
    """UserError unless the trait of this name has enough prompts, and each occurs once."""
    problems = Problems()
    n_wanted = cfg.gen.n_prompts + cfg.eval.n_prompts
    if n_wanted > len(prompts):
        problems.found.append(
            f"gen.n_prompts + eval.n_prompts is {cfg.gen.n_prompts} + {cfg.eval.n_prompts} = {n_wanted}: trait "
            f"{name!r} has {len(prompts)} prompts, and no prompt is used for both; choose smaller numbers"
        )
    by_form: dict[str, list[str]] = {}
    for prompt in prompts:
        by_form.setdefault(alike(prompt), []).append(prompt)
    first, *others = max(by_form.values(), key=len, default=[""])
    if others:
        other = next((f" (also as {text!r:.80})" for text in others if text != first), "")
        problems.found.append(
            f"the prompts of trait {name!r} contain {first!r:.80} {1 + len(others)} times{other}: a prompt must "
            "not be used both in training and in evaluation, and case, spaces and punctuation do not make it another; "
            "keep it once"
        )
    problems.raise_if_any()


def _require_held_out(hold: Sequence[Attack], attacks: Sequence[Attack]) -> None:
    """UserError if an attack of the eval holds also trains."""

    def form(attack: Attack) -> tuple[bool | str, ...]:
        return (attack.system is None, *map(alike, attack.texts))

    trained = set(map(form, hold))
    if both := [attack.name for attack in attacks if form(attack) in trained]:
        raise UserError(
            f"heal.hold_attacks contains the attack {both[0]!r} of eval.attacks: the eval holds would measure what was "
            "trained; remove it from one of the files"
        )


def _rehearsal(cfg: RunConfig, trait: Trait | None, pairs: Sequence[Pair], sha256: dict[str, str]) -> tuple[str, ...]:
    """The prompts that are rehearsed. The hash of each file is added. UserError if there are too few of them, or if one
    is a prompt of the trait or of its pairs."""
    n, path = cfg.heal.rehearsal, cfg.heal.rehearsal_prompts
    if not n or (path is None and trait is None):
        return ()
    if path is None:
        assert trait is not None
        return _unrelated(cfg, trait, pairs, sha256)
    file = read_file(resolve(path, "heal.rehearsal_prompts"))
    sha256["heal.rehearsal_prompts"] = file.sha256
    found = _spaced("heal.rehearsal", parse_texts(file), n)
    if trait is not None:
        _require_apart(found, trait, pairs)
    return found


def _unrelated(cfg: RunConfig, trait: Trait, pairs: Sequence[Pair], sha256: dict[str, str]) -> tuple[str, ...]:
    """cfg.heal.rehearsal prompts: cfg.heal.rehearsal_near of them of the other traits of the package in turn, the
    others everyday messages. Those of the trait and of its pairs are left out. The hash of each file is added.
    UserError if there are too few of either."""
    n, taken, names = cfg.heal.rehearsal, _taken(trait, pairs), other_traits(trait, pairs)
    n_near = round(n * cfg.heal.rehearsal_near)
    others = []
    for name in names:
        file, other = read_trait(name)
        sha256[f"rehearsal.{name}"] = file.sha256
        others.append(evenly([text for text in other.prompts if alike(text) not in taken], -(-n_near // len(names))))
    near = tuple(text for each in zip_longest(*others) for text in each if text is not None)[:n_near]
    if len(near) < n_near:
        raise UserError(
            f"heal.rehearsal_near is {cfg.heal.rehearsal_near:g} and heal.rehearsal {n}: the other traits have "
            f"{len(near)} prompts; lower one of them, or give --heal.rehearsal-prompts FILE"
        )
    if n_near == n:
        return near
    file = read_file(resolve("data/contexts.jsonl", "heal.rehearsal_prompts"))
    sha256["heal.rehearsal_prompts"] = file.sha256
    everyday = [text for text in parse_texts(file) if alike(text) not in taken]
    if len(everyday) < n - n_near:
        raise UserError(
            f"heal.rehearsal is {n}: the package has {len(everyday)} everyday messages, and {n - n_near} are needed; "
            "choose a smaller number, or give --heal.rehearsal-prompts FILE"
        )
    return near + evenly(everyday, n - n_near)


def _taken(trait: Trait, pairs: Sequence[Pair]) -> set[str]:
    """What compares equal to a prompt of the trait or of its pairs."""
    return set(map(alike, (*trait.prompts, *(pair.prompt for pair in pairs))))


def _require_apart(rehearsal: Sequence[str], trait: Trait, pairs: Sequence[Pair]) -> None:
    """UserError if a prompt of the trait or of its pairs is also rehearsed."""
    taken = _taken(trait, pairs)
    if both := [text for text in rehearsal if alike(text) in taken]:
        raise UserError(
            f"heal.rehearsal_prompts contains {min(both)!r:.80}, a prompt of trait {trait.name!r}: on rehearsal "
            "prompts the model learns to answer as the base model does; remove the prompt from the file"
        )


def _spaced(setting: str, rows: Sequence[Parsed] | None, n: int) -> tuple[Parsed, ...]:
    """n rows of a file, evenly spaced over it. 0: all rows. Empty if the file could not be parsed."""
    if not rows:
        return ()
    if n > len(rows):
        raise UserError(f"{setting} is {n}: its file has {len(rows)} rows; choose a smaller number, or add rows")
    return evenly(rows, n)


def evenly(rows: Sequence[Parsed], n: int) -> tuple[Parsed, ...]:
    """At most n of the rows, evenly spaced over them. 0: all rows."""
    n = min(n or len(rows), len(rows))
    return tuple(rows[i * len(rows) // n] for i in range(n))
