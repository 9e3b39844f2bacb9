"""The potential: closed forms, the integral that defines it, and its derivative psi."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence

import fdiv
from fdiv.estimate import potential as module
from fdiv.estimate.potential import potential, with_slope

LOG_RATIO = torch.tensor([-9.0, -2.5, -0.3, -1e-3, 0.0, 1e-3, 0.2, 1.7, 8.0], dtype=torch.float64)


def slope(divergence, log_ratio):
    x = log_ratio.clone().requires_grad_()
    return torch.autograd.grad(potential(divergence, x).sum(), x)[0]


# In x = log q/p, each less its value at 0.
CLOSED = (
    (fdiv.KL(), lambda x: (-x).exp() + x),
    (fdiv.ReverseKL(), lambda x: x.square() / 2),
    (fdiv.Jeffreys(), lambda x: x.square() / 2 + x + (-x).exp()),
    (fdiv.Neyman(), lambda x: 2 * x.exp() - 2 * x),
    (fdiv.Pearson(), lambda x: x + (-2 * x).exp() / 2),
    (2 * fdiv.SquaredHellinger(), lambda x: x + 2 * (-x / 2).exp()),
    (fdiv.Alpha(1 - 0.3), lambda x: ((-0.7 * x).exp() / -0.7 - x) / -0.7),  # power 0.3 of q/p
    (fdiv.Triangular(), lambda x: x + 4 * torch.nn.functional.softplus(-x) + 4 * x.sigmoid()),
    (fdiv.TV(), lambda x: x.abs() / 2),
    (fdiv.ChiKL(0.5), lambda x: (-x).exp() + x + (x + (-2 * x).exp() / 2) / 2),
    (0.7 * fdiv.KL() + 0.3 * fdiv.TV(), lambda x: 0.7 * ((-x).exp() + x) + 0.15 * x.abs()),
)


@pytest.mark.parametrize(("divergence", "closed"), CLOSED, ids=[repr(row[0]) for row in CLOSED])
def test_it_is_the_known_closed_form(divergence, closed):
    expected = closed(-LOG_RATIO) - closed(torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(potential(divergence, LOG_RATIO), expected, rtol=1e-11, atol=1e-13)


@each_divergence
def test_its_slope_in_log_q_is_psi_bitwise(divergence):
    assert torch.equal(slope(divergence, LOG_RATIO), -divergence.psi(LOG_RATIO))


@each_divergence
def test_its_value_is_the_integral_of_its_slope_and_never_negative(divergence):
    """By Simpson's rule on either side of the one place where there may be a kink."""
    for end in (-6.0, 6.0):
        x = torch.linspace(0, end, 4001, dtype=torch.float64)
        x[0] = math.copysign(1e-30, end)
        rule = torch.tensor([4.0, 2.0], dtype=torch.float64).repeat(2000)[:-1]
        inner = -divergence.psi(x)
        integral = (inner[0] + inner[1:-1] @ rule + inner[-1]) * end / 4000 / 3
        close(potential(divergence, x[-1]), integral, 1e-9)
    assert (potential(divergence, LOG_RATIO) >= 0).all()
    assert potential(divergence, LOG_RATIO)[4] == 0


@each_divergence
def test_the_closed_forms_agree_with_the_quadrature(divergence):
    """Which is what a divergence without a closed form gets."""
    close(module._integral(divergence, LOG_RATIO), potential(divergence, LOG_RATIO), 1e-12)


def test_the_quadrature_integrates_polynomials_exactly():
    nodes, weights = module._gauss_legendre()
    for degree in (0, 1, 2, 63, 127):
        close(weights @ nodes**degree, torch.tensor(1 / (degree + 1), dtype=torch.float64), 1e-13)


@each_divergence
def test_its_second_derivative_is_the_curvature(divergence):
    x = LOG_RATIO[LOG_RATIO != 0].clone().requires_grad_()
    (first,) = torch.autograd.grad(potential(divergence, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    close(second, divergence.curvature(x.detach()), 1e-12)


@each_divergence
def test_straight_through_has_any_value_and_the_same_slope(divergence):
    x = LOG_RATIO.clone().requires_grad_()
    value = with_slope(divergence, x, torch.full_like(x, 7.0))
    assert (value == 7).all()
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], slope(divergence, LOG_RATIO))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_divergence
def test_it_stays_finite_and_grows_outwards(divergence, dtype):
    far = torch.tensor([30.0, 300.0, 400.0, 1e4, 1e30, math.inf], dtype=dtype)
    for x in (far, -far):
        value = potential(divergence, x)
        assert value.isfinite().all()
        assert (value.diff() >= 0).all()
        assert slope(divergence, x).isfinite().all()


def test_it_goes_through_torch_func():
    x = LOG_RATIO[:3]
    mapped = torch.func.vmap(torch.func.grad(lambda t: potential(fdiv.JS(0.1), t)))(x)
    close(mapped, slope(fdiv.JS(0.1), x), 1e-14)
