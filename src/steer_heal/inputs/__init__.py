"""What a run reads from files, parsed once: editing a file later changes nothing of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from steer_heal.errors import Problems, UserError
from steer_heal.inputs.files import parse_texts, read_file, resolve
from steer_heal.inputs.instruments import Instrument, Vignette, parse_instrument, parse_vignettes
from steer_heal.inputs.pairs import Pair, held_out
from steer_heal.inputs.traits import make_trait, prompts_file, read_pairs, read_trait
from steer_heal.records import Trait
from steer_heal.settings import RunConfig


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
    vignettes: tuple[Vignette, ...]
    instrument: Instrument
    pairs: tuple[Pair, ...]
    """Contrast pairs of the trait; there may be none."""
    sha256: Mapping[str, str]
    """Of every file, by the setting that names it. The trait's values are recorded instead."""


def load_inputs(cfg: RunConfig) -> Inputs:
    """Reads and checks every data file. UserError with a line for each thing that is wrong."""
    problems, source, trait, contexts, vignettes, instrument, pairs = Problems(), None, None, None, None, None, None
    prompts: tuple[str, ...] = ()
    sha256: dict[str, str] = {}
    with problems.noted():
        if cfg.gen.prompts is not None and (path := prompts_file(cfg.gen.prompts, cfg.trait)) is not None:
            pool = read_file(path)
            sha256["gen.prompts"], prompts = pool.sha256, parse_texts(pool)
    with problems.noted():
        own, source = read_trait(cfg.trait)
        trait = make_trait(cfg.trait, source, prompts)
        with problems.noted():
            _check_pool(cfg, trait)
        file, placed = read_pairs(cfg.eval.pairs, cfg.trait, own, source)
        pairs = held_out(placed, trait.prompts)
        sha256 |= {"eval.pairs": file.sha256} if pairs else {}
    with problems.noted():
        file = read_file(resolve(cfg.steer.contexts, "steer.contexts"))
        sha256["steer.contexts"], contexts = file.sha256, _spaced(parse_texts(file), cfg)
    with problems.noted():
        file = read_file(resolve(cfg.eval.vignettes, "eval.vignettes"))
        sha256["eval.vignettes"], vignettes = file.sha256, parse_vignettes(file)
    with problems.noted():
        file = read_file(resolve(cfg.eval.instrument, "eval.instrument"))
        sha256["eval.instrument"], instrument = file.sha256, parse_instrument(file)
    problems.raise_if_any()
    assert source is not None and trait is not None and pairs is not None
    assert contexts is not None and vignettes is not None and instrument is not None
    first, last = trait.prompts[: cfg.gen.n_prompts], trait.prompts[-cfg.eval.n_prompts :]
    return Inputs(trait, source.target, first, last, contexts, vignettes, instrument, pairs, sha256)


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


def _spaced(contexts: tuple[str, ...], cfg: RunConfig) -> tuple[str, ...]:
    """n_contexts of the file, evenly spaced over it."""
    n = cfg.steer.n_contexts
    if n > len(contexts):
        raise UserError(
            f"steer.n_contexts is {n}: {cfg.steer.contexts} holds {len(contexts)}; ask for fewer or add some"
        )
    return tuple(contexts[i * len(contexts) // n] for i in range(n))
