"""What a run will take: the seconds of each of its steps, from a short probe of the model that it is for."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from steer_heal.bench import Bench, Teacher
from steer_heal.evals import EVALS
from steer_heal.evals.base import Subject
from steer_heal.inputs import evenly
from steer_heal.inputs.traits import other_traits
from steer_heal.model.memory import ROWS_ON_CPU, free_bytes
from steer_heal.model.state import base_state
from steer_heal.recipe import Recipe
from steer_heal.records import Collected, derive_seed
from steer_heal.settings import TINY_RANDOM, HealCfg
from steer_heal.stages.generate import Ask
from steer_heal.teachable import N_TEXTS, N_TOKENS

PROBE_TOKENS = 16
"""Tokens of each text of the probe."""
FEW = 4
"""Items of each kind that the probe reads at first."""
LONG_ENOUGH = 0.5
"""Seconds of a reading from which the time of all items is taken."""
GIB = 2**30
WITHOUT_CONTRAST = ("holds", "instructions")
"""Evals that have no value for a contrast, and do not read it."""


@dataclass(frozen=True)
class Planned:
    """A stage of a run."""

    stage: str
    times: int
    """How often it is done."""
    each: str
    """What is done each time."""
    seconds: float
    """Of all times together."""


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that the context takes."""
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


@dataclass(frozen=True)
class _Probe:
    """Seconds of the steps of a round on a few short texts."""

    n: int
    """Number of texts."""
    longer: float
    """How many times as many tokens a whole prompt and text have, at most."""
    n_read: int
    """How often the teacher reads a text: a contrast more than once."""
    prefill: float
    write: float
    """Of each token after the first."""
    score: float
    vector: float
    """Of all contexts."""
    teacher: float
    step: float


def estimate(bench: Bench) -> list[Planned]:
    """The stages of a run on this bench. Texts are taken to be as long as they may be. The student is as it was."""
    cfg, inputs, recipe = bench.cfg, bench.inputs, Recipe.of(bench.cfg)
    probe, of_state = _probe(bench, recipe), _seconds_of_a_state(bench)
    n_keep, longest = cfg.filter.n_keep, cfg.gen.max_new_tokens

    def written(n: int, n_tokens: int) -> float:
        return (probe.prefill + probe.write * (n_tokens - 1)) * math.ceil(n / probe.n)

    read = probe.score * n_keep / probe.n * probe.longer
    n_probed = cfg.dose.n_kappas * cfg.dose.n_probes if recipe.uses_vector and cfg.dose.mode == "survival" else 0
    n_steps, of_control = (_n_steps(cfg.heal, n_keep, n_rehearsed) for n_rehearsed in (cfg.heal.rehearsal, 0))
    n_writer = probe.n_read if recipe.text == "steered" else 1
    n_more = cfg.heal.rehearsal + (n_probed if recipe.text == "own" else 0)
    n_text = n_keep + n_more
    n_heals, n_rounds = cfg.n_rounds + cfg.control, cfg.n_rounds
    text_s = n_rounds * n_writer * written(n_text, longest) + cfg.control * written(n_keep, longest) + n_heals * read
    at_most = f" (at most {cfg.filter.max_attempts + n_more})" if cfg.filter.max_attempts > n_keep else ""
    n_conditions = 3 + 2 * len(other_traits(inputs.trait, inputs.pairs))
    asked = len(inputs.pairs) > 0 and cfg.model != TINY_RANDOM
    readings = f"{n_conditions} readings of {len(inputs.pairs)} pairs" if asked else "no pairs, or an untrained model"
    read_s = n_conditions * of_state["margins"] + written(N_TEXTS, N_TOKENS) if asked else 0.0
    taught_s = 3 * probe.vector + probe.teacher * n_keep / probe.n * probe.longer
    heal_s = (n_rounds * n_steps + cfg.control * of_control) * probe.step * probe.longer
    plan = [
        Planned("pre-flight", int(asked), readings, read_s),
        Planned("text", n_heals, f"{n_text}{at_most} texts of {longest} tokens", text_s),
        Planned(
            "vector and teacher", n_rounds, f"{len(inputs.contexts)} contexts, {n_keep} texts", n_rounds * taught_s
        ),
        Planned("heal", n_heals, f"{n_steps} steps", heal_s),
    ]
    if n_once := sum(each.writes(inputs) for each in bench.evals if each.writes):
        n_tokens = cfg.eval.max_new_tokens
        plan.append(Planned("text of the evals", 1, f"{n_once} texts of {n_tokens} tokens", written(n_once, n_tokens)))
    n_states = 2 + cfg.control + 2 * n_rounds
    taught = {name: s for name, s in of_state.items() if probe.n_read == 1 or name not in WITHOUT_CONTRAST}
    states_s = (n_states - n_rounds) * sum(of_state.values()) + n_rounds * probe.n_read * sum(taught.values())
    return [*plan, Planned("states", n_states, ", ".join(cfg.eval.evals), states_s)]


def _probe(bench: Bench, recipe: Recipe) -> _Probe:
    """Writes, reads and trains on enough texts for two whole optimiser steps."""
    cfg, inputs = bench.cfg, bench.inputs
    two_steps = math.ceil(2 * cfg.heal.batch_size * 8 / 7)  # an eighth is held out
    n = min(max(cfg.gen.batch_size or ROWS_ON_CPU, two_steps), cfg.filter.n_keep)
    seconds: dict[str, float] = {}
    prompts = [inputs.prompts[i % len(inputs.prompts)] for i in range(n)]
    asks = [Ask(i, text, derive_seed(cfg.seed, "estimate", i)) for i, text in enumerate(prompts)]
    with _timed(seconds, "write"):
        texts = bench.write(bench.plain, asks, max_new_tokens=PROBE_TOKENS)
    with _timed(seconds, "prefill"):
        bench.write(bench.plain, asks, max_new_tokens=1)
    seconds["write"] = max(0.0, seconds["write"] - seconds["prefill"]) / (PROBE_TOKENS - 1)
    with _timed(seconds, "score"):
        scored = bench.score(texts)
    few = replace(bench, inputs=replace(inputs, contexts=evenly(inputs.contexts, 2 * FEW)))
    with _timed(seconds, "vector"):
        vector = few.extract()
    seconds["vector"] *= len(inputs.contexts) / len(few.inputs.contexts)
    collected = Collected(scored=tuple(scored), train=tuple(range(n)))
    heal = replace(cfg.heal, contrast_kl=0.0, rehearsal=0)
    with _timed(seconds, "teacher"):
        teacher = replace(bench, cfg=replace(cfg, heal=heal)).make_teacher(recipe, vector, collected)
    step = _seconds_of_a_step(bench, recipe, collected, teacher)
    n_prompt = sum(len(text.prompt_ids) for text in texts) / n
    longer = (n_prompt + cfg.gen.max_new_tokens) / (n_prompt + PROBE_TOKENS)
    return _Probe(n=n, longer=longer, n_read=len(teacher.condition.terms), step=step, **seconds)


def _n_steps(heal: HealCfg, n_keep: int, n_rehearsed: int) -> int:
    """Optimiser steps of a heal on that many texts. An eighth of the kept ones is held out."""
    return heal.epochs * math.ceil((n_keep * 7 / 8 + n_rehearsed) / heal.batch_size)


def _seconds_of_a_step(bench: Bench, recipe: Recipe, collected: Collected, teacher: Teacher) -> float:
    """Of the second optimiser step of a heal, which is then dropped."""
    ends: list[float] = []
    heal = replace(bench.cfg.heal, epochs=2, rehearsal=0)
    try:
        bench.heal(
            recipe, 0, collected, teacher, settings=heal, n_steps=2, on_step=lambda _: ends.append(time.monotonic())
        )
    finally:
        bench.student.discard_round()
    return ends[1] - ends[0]


def _seconds_of_a_state(bench: Bench) -> dict[str, float]:
    """Of what the evals of one state share, margins and texts, and of each eval beside that.

    The probe measures a few items of the base. It begins with one that does not count, because the first use of an eval
    takes longer. Reading a batch costs a part that does not grow with it, so more items follow until they take
    LONG_ENOUGH.
    """
    few = cache(partial(_few, bench))
    evals = bench.cfg.eval.evals
    shared = {"margins": "pair"} if bench.inputs.pairs else {}
    shared |= {"texts": "text"} if any(EVALS[name].of == "text" for name in evals) else {}

    def measured(name: str, kind: str, n: int) -> tuple[float, float]:
        """(seconds of n items, how many times as many a run has)."""
        subject, ratios = few(n)
        seconds: dict[str, float] = {}
        for once, of in shared.items():
            if of == kind:
                with _timed(seconds, once):
                    getattr(subject, once)
        if name in evals:
            if EVALS[name].writes:
                EVALS[name].items(subject)  # what it keeps is written once a run, and counted there
            with _timed(seconds, name):
                EVALS[name].items(subject)
        return seconds[name], max(ratios[kind], 1.0)

    found = {"margins": 0.0}
    for name, kind in {**shared, **{name: EVALS[name].of for name in evals}}.items():
        measured(name, kind, 1)
        n, (seconds, ratio) = FEW, measured(name, kind, FEW)
        once = name in evals and EVALS[name].writes is not None  # more items would write all texts again
        while seconds < LONG_ENOUGH and ratio > 1 and not once:
            n *= 4
            seconds, ratio = measured(name, kind, n)
        found[name] = seconds * ratio
    return found


def _few(bench: Bench, n: int) -> tuple[Subject, dict[str, float]]:
    """The base with n items of each kind, and how many times as many a run has."""
    cfg, inputs = bench.cfg.eval, bench.inputs
    small = replace(
        cfg,
        n_texts=min(cfg.n_texts, ROWS_ON_CPU * n // FEW),
        max_new_tokens=min(cfg.max_new_tokens, PROBE_TOKENS * n // FEW),
    )
    few = replace(
        inputs,
        pairs=evenly(inputs.pairs, n),
        panel={name: evenly(pairs, math.ceil(n / FEW)) for name, pairs in inputs.panel.items()},
        everyday=evenly(inputs.everyday, n),
        instructions=evenly(inputs.instructions, n),
        vignettes=evenly(inputs.vignettes, n),
    )
    subject = replace(bench, cfg=replace(bench.cfg, eval=small), inputs=few).subject(base_state(bench.trait))
    return subject, {
        "pair": len(inputs.pairs) / max(1, len(few.pairs)),
        "trait": sum(map(len, inputs.panel.values())) / max(1, sum(map(len, few.panel.values()))),
        "question": len(inputs.everyday) / max(1, len(few.everyday)),
        "instruction": len(inputs.instructions) / max(1, len(few.instructions)),
        "vignette": len(inputs.vignettes) / max(1, len(few.vignettes)),
        "text": cfg.n_texts / small.n_texts * cfg.max_new_tokens / small.max_new_tokens,
    }


def memory(bench: Bench) -> str:
    """Memory that the weights take, that the probe took at its peak, and that is still free."""
    lm = bench.student.lm
    weights = sum(each.numel() * each.element_size() for each in lm.model.parameters())
    if lm.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(lm.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = (weights, peak, free_bytes(lm.device))
    held, most, free = (f"{size / GIB:.1f} GiB" for size in sizes)
    return f"weights {held}, peak of the probe {most}, still free {free}"
