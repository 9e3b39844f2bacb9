"""Multistep solvers: published coefficients, orders, stability limits, and what momentum is for."""

import math
from itertools import pairwise

import pytest
import torch

from fdiv.diffusion.edm import euler, karras
from fdiv.diffusion.mixture import Mixture
from fdiv.diffusion.samplers import (
    Multistep,
    adams_bashforth,
    coefficients,
    ghvb,
    heavy_ball,
    nesterov,
)

F64 = torch.float64
GAUSSIAN = Mixture(((0.5, 0.5),), (0.7,), (1.0,))


def start(sigma=1.0, count=8):
    return sigma * torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


def decay(rate):
    """D of the equation dx/dsigma = rate x, which decays as sigma falls."""
    return lambda x, sigma: x - sigma.unsqueeze(-1) * rate * x


def even(steps, top=2.0, low=1.0):
    return torch.linspace(top, low, steps + 1, dtype=F64)


# -- coefficients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "weights", "over"),
    [
        (1, [1], 1),
        (2, [3, -1], 2),
        (3, [23, -16, 5], 12),
        (4, [55, -59, 37, -9], 24),
        (5, [1901, -2774, 2616, -1274, 251], 720),
    ],
)
def test_the_coefficients_are_those_of_adams_and_bashforth(order, weights, over):
    assert coefficients(order) == pytest.approx([w / over for w in weights])


@pytest.mark.parametrize("beta", [1.0, 0.8, 0.5, 0.1])
def test_those_of_ghvb_are_the_published_ones(beta):
    rows = {
        1: ([beta], 1),
        2: ([2 + beta, -(2 - beta)], 2),
        3: ([18 + 5 * beta, -(24 - 8 * beta), 6 - beta], 12),
        4: ([46 + 9 * beta, -(78 - 19 * beta), 42 - 5 * beta, -(10 - beta)], 24),
    }
    for order, (weights, over) in rows.items():
        found = coefficients(order, (1 - beta) / beta)
        assert found == pytest.approx([w / over / beta for w in weights])


@pytest.mark.parametrize("beta", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_ghvb_is_of_order_k_at_every_momentum(order, beta):
    # A step is exact on slopes that are polynomials in time of degree k - 1, once v has forgotten its start.
    solver = Multistep(order, beta)
    time = torch.arange(-200.0, 1.0, dtype=F64)
    for degree in range(order):
        solver = Multistep(order, beta)
        found = [solver.direction(now**degree) for now in time][-1]
        assert found.item() == pytest.approx(1 / (degree + 1), abs=1e-9)  # the mean of t^degree over [0, 1]
    missed = Multistep(order, beta)
    assert abs([missed.direction(now**order) for now in time][-1].item() - 1 / (order + 1)) > 1e-2


# -- reductions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damped", [ghvb, heavy_ball, nesterov])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_momentum_one_is_none(damped, order):
    x, sigmas = start(80.0), karras(12)
    plain = adams_bashforth(GAUSSIAN.denoise, x, sigmas, order)
    torch.testing.assert_close(damped(GAUSSIAN.denoise, x, sigmas, order, 1.0), plain, rtol=1e-12, atol=1e-12)


def test_the_first_order_is_eulers():
    x, sigmas = start(80.0), karras(12)
    expected = euler(GAUSSIAN.denoise, x, sigmas)
    torch.testing.assert_close(adams_bashforth(GAUSSIAN.denoise, x, sigmas, 1), expected)


def test_nesterov_of_the_first_order_looks_ahead_by_hand():
    sigmas, beta, rate = torch.tensor([3.0, 2.0, 0.5], dtype=F64), 0.6, 0.3
    x = start()
    first, second = rate * x, rate * (x - rate * x)
    v = (1 - beta) * first + beta * second
    expected = x - first - 1.5 * ((1 - beta) * v + beta * second)
    torch.testing.assert_close(nesterov(decay(rate), x, sigmas, 1, beta), expected)


def test_one_call_a_step_in_the_dtype_of_x():
    seen = []

    def denoiser(x, sigma):
        seen.append((x.dtype, sigma.dtype))
        return GAUSSIAN.denoise(x, sigma)

    found = ghvb(denoiser, start(80.0).float(), karras(10), 3, 0.7)
    assert seen == [(torch.float32, torch.float32)] * 10
    assert found.dtype == torch.float32


def test_a_condition_is_handed_on():
    x = start()
    found = ghvb(lambda x, sigma, c: c + 0 * x, x, torch.tensor([1.0, 0.0]), 2, 0.5, torch.tensor(4.0))
    torch.testing.assert_close(found, torch.full_like(x, 4.0))


# -- orders ----------------------------------------------------------------------------------------------


def slope(solve, exact, *steps):
    errors = [(solve(n) - exact).abs().max().item() for n in steps]
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        (lambda x, s: adams_bashforth(decay(1.5), x, s, 1), 0.95, 1.05),
        (lambda x, s: adams_bashforth(decay(1.5), x, s, 2), 1.9, 2.1),
        (lambda x, s: adams_bashforth(decay(1.5), x, s, 4), 1.9, 2.2),  # its first step is Euler's
        (lambda x, s: heavy_ball(decay(1.5), x, s, 2, 0.6), 0.9, 1.1),
        (lambda x, s: heavy_ball(decay(1.5), x, s, 4, 0.6), 0.9, 1.1),
        (lambda x, s: nesterov(decay(1.5), x, s, 2, 0.6), 0.9, 1.1),
        (lambda x, s: ghvb(decay(1.5), x, s, 1, 0.6), 0.9, 1.1),
        (lambda x, s: ghvb(decay(1.5), x, s, 2, 0.6), 1.8, 2.2),
        (lambda x, s: ghvb(decay(1.5), x, s, 4, 0.6), 1.8, 2.2),
    ],
)
def test_momentum_costs_heavy_ball_its_order_and_ghvb_none(solver, low, high):
    x = start()
    orders = slope(lambda n: solver(x, even(n)), x * math.exp(-1.5), 100, 200, 400)
    assert all(low < order < high for order in orders), orders


def test_on_karras_levels_the_second_order_stays():
    x = start(80.0)
    exact = 0.5 + (x - 0.5) * math.hypot(0.7, 0.002) / math.hypot(0.7, 80.0)
    orders = slope(lambda n: ghvb(GAUSSIAN.denoise, x, karras(n)[:-1], 2, 0.8), exact, 100, 200, 400)
    assert all(1.8 < order < 2.2 for order in orders), orders


# -- stability -------------------------------------------------------------------------------------------


def limit(solver):
    """The largest step times rate at which a decay does not blow up, by bisection."""
    low, high = 0.0, 8.0
    x = torch.ones(1, 1, dtype=F64)
    for _ in range(10):
        middle = (low + high) / 2
        end = solver(decay(middle), x, even(200, top=201.0)).abs().item()
        low, high = (middle, high) if end < 1 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (lambda d, x, s: adams_bashforth(d, x, s, 1), 2.0),
        (lambda d, x, s: ghvb(d, x, s, 1, 0.5), 6.0),
        (lambda d, x, s: adams_bashforth(d, x, s, 2), 1.0),
        (lambda d, x, s: ghvb(d, x, s, 2, 0.8), 1.2),
        (lambda d, x, s: ghvb(d, x, s, 2, 0.5), 1.5),
        (lambda d, x, s: adams_bashforth(d, x, s, 4), 0.3),
        (lambda d, x, s: ghvb(d, x, s, 4, 0.8), 0.355),
        (lambda d, x, s: heavy_ball(d, x, s, 2, 0.5), 3.0),
        (lambda d, x, s: heavy_ball(d, x, s, 4, 0.5), 0.9),
    ],
)
def test_less_momentum_is_stable_at_longer_steps(solver, expected):
    assert limit(solver) == pytest.approx(expected, rel=0.03)


def test_momentum_lessens_artifacts_of_a_score_that_is_scaled_up():
    # A ring of modes whose score is five times too large, as guidance makes it: few steps overshoot.
    turns = [2 * math.pi * k / 8 for k in range(8)]
    ring = Mixture(tuple((2 * math.cos(t), 2 * math.sin(t)) for t in turns), (0.15,) * 8, (1.0,) * 8)

    def guided(x, sigma):
        return x + 5 * (ring.denoise(x, sigma) - x)

    x = start(10.0, 500)
    outside = [
        (ghvb(guided, x, karras(14, 0.02, 10.0), 2, beta).norm(dim=1) > 4).double().mean().item()
        for beta in (1.0, 0.8, 0.5)
    ]
    assert outside[0] > outside[1] > outside[2], outside


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ((0,), "order"),
        ((1.8,), "order=2, momentum=0.8"),
        ((2, 0.0), "momentum"),
        ((2, 1.5), "momentum"),
        ((2, 0.5, "polyak"), "ghvb, heavy ball, nesterov"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Multistep(*fields)
