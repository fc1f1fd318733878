from dataclasses import replace

import pytest
import torch

from steer_heal.inputs.traits import load_trait
from steer_heal.model.lm import LM
from steer_heal.model.steering import METHODS, Vector
from steer_heal.settings import SteerCfg
from steer_heal.stages.vector import cosine, last_token_states, teacher_vec

CFG = SteerCfg(layers=(0.25, 0.75))
CONTEXTS = ("What is ice?", "Tell me a short story about a fox.", "A clerk asks you for help.")
TRAIT = load_trait("authority")


def persona_states(lm: LM, persona: str) -> dict[int, torch.Tensor]:
    return last_token_states(lm, [lm.chat(context, persona) for context in CONTEXTS], range(1, 3))


def test_neither_the_head_nor_the_blocks_above_the_band_run(toy: LM):
    ran = []
    modules = (toy.blocks[2], toy.blocks[3], toy.head)
    handles = [module.register_forward_hook(lambda module, *_: ran.append(module)) for module in modules]
    last_token_states(toy, [toy.chat("What is ice?")], range(1, 3))
    for handle in handles:
        handle.remove()
    assert ran == [toy.blocks[2]]


@pytest.mark.parametrize("method", METHODS)
def test_the_vector_is_what_the_method_extracts_from_the_personas_raw_or_normalised(toy: LM, method):
    positive, negative = persona_states(toy, TRAIT.positive), persona_states(toy, TRAIT.negative)
    cfg = replace(CFG, method=method)
    raw, unit = (teacher_vec(toy, TRAIT, CONTEXTS, replace(cfg, normalize=flag)) for flag in (False, True))
    assert raw.method == unit.method == method and list(raw.directions) == list(unit.directions) == [1, 2]
    for layer in (1, 2):
        direction = METHODS[method].extract(positive[layer], negative[layer])
        assert torch.allclose(raw.directions[layer], direction, atol=1e-4)
        assert torch.allclose(unit.directions[layer], direction / direction.norm(), atol=1e-4)


def test_the_cosine_takes_all_layers_of_a_vector_as_one():
    a, b = Vector({1: torch.tensor([1.0, 0.0]), 2: torch.zeros(2)}), Vector({1: torch.ones(2), 2: torch.ones(2)})
    assert cosine(a, b) == pytest.approx(0.5) and cosine(b, b) == pytest.approx(1.0)
