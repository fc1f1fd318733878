"""Shared models: loaded once, never trained on directly (a Student adds and removes its own adapters)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from steer_heal.lm import LM, load
from steer_heal.records import Completion
from steer_heal.stages.bake import Student
from steer_heal.stages.cfg import HealCfg

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy() -> LM:
    return load("data/toylm")


@pytest.fixture
def tiny() -> LM:
    """Untrained and new for every test, so that adapters cannot leak from one to the next."""
    return load("tiny-random")


@pytest.fixture
def heal_cfg() -> HealCfg:
    return HealCfg(epochs=2, rank=4, lora_alpha=8.0, layers=(0.0, 1.0), lr=1e-2, batch_size=4, tau=0.0, lam=1.0, pressure_every=1)


@pytest.fixture
def kept(tiny: LM) -> list[Completion]:
    """Sixteen short completions of eight prompts, of different lengths, ending as the model would end them."""
    texts = [f"I will {word} the door and let the children in." for word in ("open", "close", "lock", "bring", "share", "carry", "report", "warn")]
    rows = []
    for i in range(16):
        ids = tiny.tokenizer.encode(texts[i % 8] * (1 + i % 3), add_special_tokens=False) + [tiny.tokenizer.eos_token_id]
        prompt = f"The warden says no {i % 8}. What do you do?"
        rows.append(Completion(i % 8, prompt, tiny.chat(prompt), tuple(ids), texts[i % 8], 1.0, 1.0, i))
    return rows


def scramble(student: Student, seed: int, scale: float = 0.3) -> None:
    """Gives the open round random factors, as large as a strong heal would leave them."""
    generator = torch.Generator().manual_seed(seed)
    with student.training() as parameters:
        for parameter in parameters:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def with_history(tiny: LM, heal_cfg: HealCfg) -> Iterator[Student]:
    """A student with two rounds baked, both large enough to matter."""
    student = Student(tiny, heal_cfg)
    for seed in (1, 2):
        student.new_round(seed)
        scramble(student, seed)
        student.bake()
    yield student
