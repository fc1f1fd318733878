import pytest
import torch

from steer_heal.model.lm import LM
from steer_heal.model.steering import METHODS, Vector, ablate, cosine_gate, principal, steer

PROMPT = "The captain orders you to send the widows away to save money. What do you do?"


def some_vector(lm: LM, scale: float = 2.0, method: str = "mean_diff") -> Vector:
    generator = torch.Generator().manual_seed(0)
    return Vector({layer: scale * torch.randn(lm.width, generator=generator) for layer in (1, 2)}, method)


@pytest.mark.parametrize("method", METHODS)
def test_each_row_gets_its_own_dose_in_the_way_of_the_method(toy: LM, method):
    vector, row, states = some_vector(toy, method=method), toy.chat(PROMPT), []
    read = lambda: toy.blocks[1].register_forward_hook(lambda _module, _inputs, output: states.append(output))
    handle = read()
    plain = toy.hidden([row] * 3)
    handle.remove()
    with steer(toy, vector, [0.0, 1.0, -1.0]):
        handle = read()  # behind the hook that steers
        mixed = toy.hidden([row] * 3)
        handle.remove()
    doses = torch.tensor([1.0, -1.0])[:, None, None]
    steered = METHODS[method].apply(states[0][1:], vector.directions[1], doses)
    assert torch.allclose(states[1][1:], steered, atol=1e-4)
    assert torch.allclose(mixed[0], plain[0], atol=1e-4), "dose 0 leaves its row alone"
    assert not torch.allclose(mixed[1], mixed[2], atol=1e-1)


def test_plus_and_minus_move_logits_opposite_ways(toy: LM):
    with steer(toy, some_vector(toy, 0.05), [-1.0, 0.0, 1.0]):
        minus, zero, plus = toy.logits(toy.hidden([toy.chat(PROMPT)] * 3)[:, -1])
    assert torch.nn.functional.cosine_similarity(plus - zero, minus - zero, dim=0) < -0.9


def test_hooks_are_gone_after_the_block_even_after_an_error(toy: LM):
    before = toy.hidden([toy.chat(PROMPT)])
    with pytest.raises(ZeroDivisionError), steer(toy, some_vector(toy), [3.0]):
        1 / 0  # noqa: B018
    assert torch.equal(toy.hidden([toy.chat(PROMPT)]), before)


def test_a_vector_is_restored_with_its_method(toy: LM, tmp_path):
    some_vector(toy, method="cosine_gated").save(tmp_path / "v.safetensors")
    again = Vector.load(tmp_path / "v.safetensors")
    assert again.method == "cosine_gated" and list(again.directions) == [1, 2]
    assert all(torch.equal(again.directions[layer], d) for layer, d in some_vector(toy).directions.items())


def test_ablation_replaces_the_component_and_leaves_the_rest():
    hidden, v = torch.randn(2, 3, 8), torch.randn(8)
    unit = v / v.norm()
    steered = ablate(hidden, v, torch.tensor([0.0, 0.5])[:, None, None])
    assert torch.allclose(steered @ unit, torch.tensor([0.0, 0.5])[:, None] * v.norm(), atol=1e-5)
    rest = lambda h: h - (h @ unit)[..., None] * unit
    assert torch.allclose(rest(steered), rest(hidden), atol=1e-5)


def test_the_cosine_gate_pushes_aligned_positions_fully_and_orthogonal_ones_not():
    v = torch.tensor([2.0, 0.0])
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 5.0], [-1.0, 1.0]]])
    pushed = cosine_gate(hidden, v, torch.ones(1, 1, 1)) - hidden
    assert torch.allclose(pushed[0], torch.tensor([[2.0, 0.0], [0.0, 0.0], [2.0 / 2**0.5, 0.0]]), atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_principal_component_finds_the_axis_that_noise_hides_from_no_pair(sign):
    generator = torch.Generator().manual_seed(0)
    negative, axis = torch.randn(200, 16, generator=generator), torch.eye(16)[3]
    strength = sign * (2 + torch.rand(200, 1, generator=generator))
    found = principal(negative + strength * axis + 0.1 * torch.randn(200, 16, generator=generator), negative)
    assert torch.nn.functional.cosine_similarity(found, sign * axis, dim=0) > 0.99
    assert found.norm().item() == pytest.approx(strength.square().mean().sqrt().item(), rel=0.01)
