"""What README and docs show of flags: each is taken by every preset, and the recipes run with the control."""

import re
from functools import cache
from typing import Any

import pytest
from places import ROOT
from runs import DOORS

from steer_heal import SteerHeal
from steer_heal.commands.run import parse
from steer_heal.errors import UserError
from steer_heal.presets import PRESETS
from steer_heal.settings import RunConfig, changed, leaves

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = {f"--{name}".replace("_", "-") for name in leaves(RunConfig())}
SHOWN = re.compile(r"(--[a-z][a-z.-]*[a-z])((?: [^\s`|\\#-][^\s`|\\]*)*)")
SMALLEST = {
    "model": "tiny-random",
    "dtype": "float32",
    "control": True,
    "steer.layers": (0.3, 0.7),
    "steer.n_contexts": 4,
    "gen.max_new_tokens": 6,
    "gen.n_prompts": 4,
    "dose.n_kappas": 2,
    "dose.n_probes": 2,
    "filter.gates": ("loop",),
    "filter.loop_max": 1.0,
    "filter.min_train": 4,
    "filter.n_keep": 6,
    "filter.max_attempts": 24,
    "adapter.rank": 2,
    "adapter.layers": (0.0, 1.0),
    "heal.epochs": 1,
    "backtrack.retries": 0,
    "eval.evals": ("text_quality", "contrast", "persona"),
    "eval.n_prompts": 2,
    "eval.n_texts": 2,
    "eval.max_new_tokens": 6,
    "eval.n_bootstrap": 10,
}
CONTRAST = {"heal.teacher": "contrast", "heal.contrast_kl": 0.01}
RECIPES = [
    ("toy", {}),
    ("toy-distil", {"heal.rehearsal": 16}),
    ("chat", {**CONTRAST, "heal.rehearsal": 16}),
    ("smol-distil", CONTRAST),
    ("smol-distil", {**CONTRAST, "heal.hold": 0.33, "heal.rehearsal": 0}),
    ("smol", {"dose.mode": "iso_kl", "dose.kl_target": 0.01}),
]
"""What docs add to a preset."""


def shown() -> set[tuple[str, ...]]:
    """Every flag of a run that a page shows, with its values."""
    found = set()
    for page in PAGES:
        spans = re.findall(r"`[^`]+`|^```.*?^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for flag, values in (pair for span in spans for pair in SHOWN.findall(re.sub("#.*", "", span))):
            if flag in FLAGS and not re.search(r"\b[A-Z]+\b|<|[.]{3}", values) and values.strip():
                found.add((flag, *values.split()))
    return found


def with_what_it_needs(name: str) -> dict[str, Any]:
    """The settings that a page shows or describes beside a flag."""
    needed = {"heal.target": "distribution", "heal.text": "own"}
    needed |= {"heal.teacher": "contrast"} if name.startswith("heal.contrast") else {}
    needed |= {"filter.max_attempts": 256, "filter.min_train": 4} if name == "filter.n_keep" else {}
    needed |= {"heal.teacher": "vector"} if name == "eval.backend" else {}
    needed |= {"heal.rehearsal": 16, "heal.rehearsal_prompts": None} if name == "heal.rehearsal_near" else {}
    return needed | ({"heal.contrast_kl": 0.0} if name in ("eval.backend", "heal.teacher") else {})


@cache
def read(words: tuple[str, ...]) -> tuple[str, Any]:
    """The setting of a flag that a page shows, and its value."""
    name = words[0][2:].replace("-", "_")
    needed = {name: value for name, value in with_what_it_needs(name).items() if f"--{name}" != words[0]}
    given = [(name, value) for name, value in needed.items() if value is not None]
    flags = [word for flag, value in given for word in (f"--{flag}".replace("_", "-"), str(value))]
    return name, leaves(parse(["chat", *flags, *words])[1])[name]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_flag_that_a_page_shows_is_taken_by_every_preset(preset):
    assert len(shown()) > 20
    for words in shown():
        name, value = read(words)
        try:
            changed(PRESETS[preset][1], {name: value})
        except UserError:
            changed(PRESETS[preset][1], {**with_what_it_needs(name), name: value})


@pytest.mark.parametrize("preset, changes", RECIPES)
def test_a_recipe_of_the_docs_runs_with_the_control(preset, changes):
    settings = {**SMALLEST, **changes, "gen.prompts": None, "eval.pairs": None}
    with SteerHeal(trait=DOORS, preset=preset, settings=settings) as sh:
        states = sh.loop(1)["state"].to_list()
    assert states == ["base", "prompted", "control", "steered round 1", "healed round 1"]
