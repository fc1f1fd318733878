import numpy as np
import pytest
import torch
from scipy.special import rel_entr

from steer_heal.model.divergence import DIVERGENCES, aggregate, kl_fwd, kl_rev, spectral_step


def log_probabilities(seed: int, n: int = 50, v: int = 400) -> torch.Tensor:
    return (3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


@pytest.mark.parametrize("kl, swapped", [(kl_rev, False), (kl_fwd, True)])
def test_kl_agrees_with_float64(kl, swapped):
    student, reference = log_probabilities(0), log_probabilities(1)
    p, q = (x.double().exp().numpy() for x in ((reference, student) if swapped else (student, reference)))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    np.testing.assert_allclose(kl(student, reference).numpy(), rel_entr(p, q).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_slope_written_by_hand_is_what_autograd_finds(name):
    divergence = DIVERGENCES[name]
    student, reference = log_probabilities(0), log_probabilities(1)
    value = divergence.value(student, reference)
    by_autograd = divergence._replace(slope=None).gradient(student, reference, value)
    assert divergence.slope is not None and by_autograd.abs().max() > 0.1
    assert torch.allclose(divergence.gradient(student, reference, value), by_autograd, atol=1e-5)


def test_rmse_of_zero_has_a_finite_gradient():
    zero = torch.zeros(10, requires_grad=True)
    aggregate(zero, "rmse").backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("how", ["mean", "rmse", "p95", "max"])
def test_low_precision_is_computed_in_float32(how):
    assert aggregate(torch.ones(9, dtype=torch.bfloat16), how).dtype == torch.float32


def test_power_iteration_finds_the_largest_singular_value_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((4, 30), (20, 4)))
    direction = torch.nn.functional.normalize(torch.randn(30, generator=generator), dim=0)
    for _ in range(100):
        size, direction = spectral_step(a, b, direction)
    exact = torch.linalg.matrix_norm(b @ a, 2)
    assert size.item() == pytest.approx(exact.item(), rel=1e-5)
    for x, y in zip(torch.autograd.grad(size, (a, b)), torch.autograd.grad(exact, (a, b)), strict=True):
        assert torch.allclose(x, y, atol=1e-3)


def test_the_spectral_penalty_of_a_new_factor_is_zero_and_finite():
    a, b = torch.randn(4, 30), torch.zeros(20, 4)
    start = torch.nn.functional.normalize(torch.ones(30), dim=0)
    size, direction = spectral_step(a, b, start)
    assert size == 0 and torch.equal(direction, start)
