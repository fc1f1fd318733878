"""What a run reads from files, parsed once: editing a file later changes nothing of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from steer_heal.errors import Problems, UserError
from steer_heal.inputs.files import DataFile, parse_texts, read_file, resolve
from steer_heal.inputs.instruments import (
    Instrument,
    LikelihoodInstrument,
    Vignette,
    parse_instrument,
    parse_likelihood,
    parse_vignettes,
)
from steer_heal.inputs.pairs import Pair, held_out
from steer_heal.inputs.traits import TraitFile, make_trait, prompts_file, read_pairs, read_trait
from steer_heal.records import Trait
from steer_heal.settings import RunConfig

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Inputs:
    """The parsed data of a run."""

    trait: Trait
    targets: tuple[str, ...]
    """Metrics that may judge the trait: the first that is measured does (check.py)."""
    prompts: tuple[str, ...]
    """Prompts that training text is written for."""
    eval_prompts: tuple[str, ...]
    """Prompts answered in free text, never trained on."""
    contexts: tuple[str, ...]
    """User messages that the steering vector is read on."""
    rehearsal: tuple[str, ...]
    """Prompts on which the base is the teacher; there may be none."""
    vignettes: tuple[Vignette, ...]
    instrument: Instrument
    likelihood: LikelihoodInstrument
    pairs: tuple[Pair, ...]
    """Contrast pairs of the trait; there may be none."""
    sha256: Mapping[str, str]
    """Of every file, by the setting that names it. The trait's values are recorded instead."""

    @property
    def wording(self) -> dict[str, list[list[str]]]:
        """The items of the evals in words and in their order, by what an item is (Metric.of): [scene, its answer] of
        each vignette, [prompt, positive reply, negative reply] of each pair. Texts are not among the inputs."""
        scenes = [[v.text, " or ".join(filter(None, (v.foundation, v.also)))] for v in self.vignettes]
        return {"vignette": scenes, "pair": [[pair.prompt, pair.positive, pair.negative] for pair in self.pairs]}


def load_inputs(cfg: RunConfig, given: TraitFile | None = None) -> Inputs:
    """Reads and checks every data file. UserError with a line for each thing that is wrong.

    `given` is the trait itself, in place of the file that cfg.trait names by its path.
    """
    problems, trait, targets, prompts, pairs = Problems(), None, (), (), ()
    sha256: dict[str, str] = {}

    def parsed(setting: str, path: Path, parse: Callable[[DataFile], Parsed]) -> Parsed | None:
        """None: what is wrong was noted."""
        with problems.noted():
            file = read_file(resolve(path, setting))
            sha256[setting] = file.sha256
            return parse(file)

    with problems.noted():
        if cfg.gen.prompts is not None and (path := prompts_file(cfg.gen.prompts, cfg.trait)) is not None:
            prompts = parsed("gen.prompts", path, parse_texts) or ()
    with problems.noted():
        own, source = read_trait(cfg.trait) if given is None else (DataFile(Path(cfg.trait), "", ""), given)
        trait, targets = make_trait(cfg.trait, source, prompts), source.target
        with problems.noted():
            _check_pool(cfg, trait)
        file, placed = read_pairs(cfg.eval.pairs, cfg.trait, own, source)
        pairs = held_out(placed, trait.prompts)
        sha256 |= {"eval.pairs": file.sha256} if pairs else {}
    contexts = parsed("steer.contexts", cfg.steer.contexts, parse_texts)
    rehearsal = cfg.heal.rehearsal and parsed("heal.rehearsal_prompts", cfg.heal.rehearsal_prompts, parse_texts)
    vignettes = parsed("eval.vignettes", cfg.eval.vignettes, parse_vignettes)
    instrument = parsed("eval.instrument", cfg.eval.instrument, parse_instrument)
    likelihood = parsed("eval.likelihood", cfg.eval.likelihood, parse_likelihood)
    with problems.noted():
        contexts = contexts and _spaced("steer.n_contexts", contexts, cfg.steer.n_contexts)
    with problems.noted():
        rehearsal = rehearsal and _spaced("heal.rehearsal", rehearsal, cfg.heal.rehearsal)
        if trait is not None and rehearsal:
            _require_apart(rehearsal, trait, pairs)
    with problems.noted():
        vignettes = vignettes and _spaced("eval.n_vignettes", vignettes, cfg.eval.n_vignettes or len(vignettes))
    problems.raise_if_any()
    assert trait is not None and contexts is not None and vignettes is not None
    assert instrument is not None and likelihood is not None
    return Inputs(
        trait=trait,
        targets=targets,
        prompts=trait.prompts[: cfg.gen.n_prompts],
        eval_prompts=trait.prompts[-cfg.eval.n_prompts :],
        contexts=contexts,
        rehearsal=rehearsal or (),
        vignettes=vignettes,
        instrument=instrument,
        likelihood=likelihood,
        pairs=pairs,
        sha256=sha256,
    )


def _check_pool(cfg: RunConfig, trait: Trait) -> None:
    """Enough prompts, and none of them both in training and in evaluation."""
    wanted, problems = cfg.gen.n_prompts + cfg.eval.n_prompts, Problems()
    if wanted > len(trait.prompts):
        problems.found.append(
            f"gen.n_prompts + eval.n_prompts is {cfg.gen.n_prompts} + {cfg.eval.n_prompts} = {wanted}: trait "
            f"{trait.name!r} has {len(trait.prompts)} prompts, and no prompt is used for both; ask for fewer"
        )
    prompt, n = Counter(trait.prompts).most_common(1)[0] if trait.prompts else ("", 0)
    if n > 1:
        problems.found.append(
            f"the prompts of trait {trait.name!r} hold {prompt!r:.80} {n} times: evaluation prompts are never trained "
            "on; keep it once"
        )
    problems.raise_if_any()


def _require_apart(rehearsal: Sequence[str], trait: Trait, pairs: Sequence[Pair]) -> None:
    """No prompt both of the rehearsal and of the trait: evaluation prompts are never trained on."""
    if both := {*rehearsal} & {*trait.prompts, *(pair.prompt for pair in pairs)}:
        raise UserError(
            f"heal.rehearsal_prompts holds {min(both)!r:.80}, a prompt of trait {trait.name!r}: what is rehearsed is "
            "to stay as the base has it; take the prompt out of the file"
        )


def _spaced(setting: str, rows: Sequence[Parsed], n: int) -> tuple[Parsed, ...]:
    """n of the rows of a file, evenly spaced over it."""
    if n > len(rows):
        raise UserError(f"{setting} is {n}: its file holds {len(rows)} rows; ask for fewer or add some")
    return tuple(rows[i * len(rows) // n] for i in range(n))
