"""Shared models: loaded once, never trained on directly (a Student adds and removes its own adapters)."""

from __future__ import annotations

import copy as copying
import json
import shutil
from pathlib import Path

import pytest
import shapes  # before any module that it checks
import torch
from runs import SETTINGS, started, undrawn

from steer_heal.errors import UserError
from steer_heal.inputs.files import DATA
from steer_heal.model import lm as lm_module
from steer_heal.model.gguf import SMOL
from steer_heal.model.lm import LM, load
from steer_heal.model.student import Student
from steer_heal.records import Completion
from steer_heal.settings import TINY_RANDOM, AdapterCfg, HealCfg

torch.set_num_threads(1)
ADAPTER = AdapterCfg(rank=4, alpha=8.0, layers=(0.0, 1.0))
LONGEST = (
    *("resume", "scripts", "families", "report", "sweep", "end_to_end", "faults", "toylm", "gguf", "fuzz", "packaging"),
    *("shown_commands", "plot", "library", "teachable", "verify", "share", "track", "judge", "plugins", "shown_flags"),
)
"""Files that begin first, so that no worker is left with a long one at the end (`just test --durations=0`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def tried_once():
    """Hundreds of tests load tiny-random. It is made once. The model, and the adapter that it is tried with, are tried
    once for each kind."""
    tried, patch = set(), pytest.MonkeyPatch()
    made = lm_module._tiny_random()
    patch.setattr(lm_module, "_tiny_random", lambda: copying.deepcopy(made))

    def once(owner, name, kind):
        work = getattr(owner, name)

        def first(made) -> None:
            own = (name, *kind(made))
            if TINY_RANDOM not in own or own not in tried:
                work(made)
                tried.add(own)

        patch.setattr(owner, name, first)

    once(lm_module, "check_model", lambda lm: (lm.name, lm.model.dtype, lm.max_prompt_tokens))
    once(Student, "require_sound", lambda student: (student.lm.name, student.lm.model.dtype, student.cfg))
    yield
    patch.undo()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Of fixtures of the module too, which come before those of the test."""
    shapes.CALLS.clear()


@pytest.fixture(autouse=True)
def shapes_are_checked_again():
    shapes.CALLS.clear()


@pytest.fixture(scope="session")
def toy() -> LM:
    return load("data/toylm")


@pytest.fixture(scope="session")
def smol() -> LM:
    """A real chat model of 135 M parameters, downloaded once. Tests are skipped where it cannot be had."""
    try:
        return load(SMOL, dtype="float32")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def tiny() -> LM:
    """Untrained and new for every test, so that adapters cannot leak from one to the next."""
    return load("tiny-random")


@pytest.fixture
def student(tiny: LM) -> Student:
    return Student(tiny, ADAPTER)


@pytest.fixture
def heal_cfg() -> HealCfg:
    return HealCfg(epochs=2, lr=1e-2, batch_size=4, tau=0.0, lam=1.0, pressure_every=1)


@pytest.fixture
def kept(tiny: LM) -> list[Completion]:
    """Sixteen short completions of eight prompts, of different lengths, ending as the model would end them."""
    words = ("open", "close", "lock", "bring", "share", "carry", "report", "warn")
    rows = []
    for i in range(16):
        text = f"I will {words[i % 8]} the door and let the children in." * (1 + i % 3)
        ids = (*tiny.tokenizer.encode(text, add_special_tokens=False), tiny.tokenizer.eos_token_id)
        prompt = f"The warden says no {i % 8}. What do you do?"
        rows.append(Completion(i % 8, prompt, tiny.chat(prompt), ids, text, 1.0, 1.0, i))
    return rows


def scramble(student: Student, seed: int, scale: float = 0.3) -> None:
    """Gives the open round random factors, as large as a strong heal would leave them."""
    generator = torch.Generator().manual_seed(seed)
    with student.training() as parameters:
        for parameter in parameters:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def with_history(student: Student) -> Student:
    """A student with two rounds baked, both large enough to matter."""
    for seed in (1, 2):
        student.new_round(seed)
        scramble(student, seed)
        student.bake()
    return student


# --- whole runs, never interrupted: read them, or copy them -------------------------------------------------------
@pytest.fixture(scope="module")
def quick():
    with undrawn():
        yield


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> list[str]:
    vignettes = tmp_path_factory.mktemp("data") / "vignettes.jsonl"
    vignettes.write_text("".join((DATA / "toylm/vignettes.jsonl").read_text().splitlines(keepends=True)[:3]))
    return [*SETTINGS.split(), "--eval.vignettes", str(vignettes)]


@pytest.fixture(scope="session")
def one(settings, tmp_path_factory) -> Path:
    """One round and the control."""
    with undrawn():
        return started(tmp_path_factory.mktemp("one"), settings, "--n-rounds", "1")


@pytest.fixture(scope="session")
def two(settings, tmp_path_factory) -> Path:
    """Two rounds without the control."""
    with undrawn():
        return started(tmp_path_factory.mktemp("two"), settings, "--n-rounds", "2", "--no-control")


@pytest.fixture
def copy(two, tmp_path) -> Path:
    """A copy of two rounds, with their row of results.tsv."""
    return shutil.copytree(two.parent, tmp_path / "copy") / two.name


@pytest.fixture
def after_round_0(two, tmp_path) -> Path:
    """Two rounds, of which the second has only begun."""
    run = tmp_path / two.name
    shutil.copytree(two, run)
    lines = (two / "events.jsonl").read_text().splitlines(keepends=True)
    kinds = [(event["event"], event["round"]) for event in map(json.loads, lines)]
    (run / "events.jsonl").write_text("".join(lines[: kinds.index(("gathered", 1)) + 1]))
    shutil.rmtree(run / "ckpt" / "r1")
    return run
