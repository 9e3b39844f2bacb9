"""EDM's levels, scaling and solvers, against Gaussian data, of which the whole flow is known."""

import math
from itertools import pairwise

import pytest
import torch

from fdiv.diffusion.edm import Churn, Preconditioning, denoised, euler, heun, karras, score, spread_to
from fdiv.diffusion.mixture import Mixture

F64 = torch.float64
MEAN, SCALE = 0.5, 0.7
GAUSSIAN = Mixture(((MEAN, MEAN),), (SCALE,), (1.0,))


def start(count=64, sigma=80.0, dtype=F64):
    return sigma * torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)


def exact(x, sigma, after=0.0):
    """Where the flow of Gaussian data carries x from one level to another: deviations shrink as it does."""
    return MEAN + (x - MEAN) * math.sqrt((SCALE**2 + after**2) / (SCALE**2 + sigma**2))


def test_levels_fall_from_the_most_to_the_least_and_end_at_zero():
    levels = karras(18)
    assert levels.dtype == F64
    assert levels[0].item() == pytest.approx(80)
    assert levels[-2].item() == pytest.approx(0.002)
    assert levels[-1] == 0
    assert bool((levels.diff() < 0).all())


def test_levels_are_even_in_the_power_one_over_rho():
    gaps = (karras(18, 0.01, 20.0, rho=5.0)[:-1] ** (1 / 5)).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(17))


def test_the_loss_weight_is_one_over_the_square_of_the_networks_scale():
    sigma = torch.logspace(-4, 4, 50, dtype=F64)
    for scaling in (Preconditioning(), Preconditioning(0.752)):
        torch.testing.assert_close(scaling.weight(sigma) * scaling.out(sigma) ** 2, torch.ones_like(sigma))


def test_what_the_network_reads_and_is_to_say_has_variance_one():
    # x0 ~ N(0, s^2) and x = x0 + sigma n; the network is to say (x0 - skip x) / out.
    sigma, scaling = torch.logspace(-3, 3, 20, dtype=F64), Preconditioning(0.6)
    s = scaling.sigma_data
    torch.testing.assert_close(scaling.into(sigma) ** 2 * (s**2 + sigma**2), torch.ones_like(sigma))
    skip = scaling.skip(sigma)
    target = ((1 - skip) ** 2 * s**2 + skip**2 * sigma**2) / scaling.out(sigma) ** 2
    torch.testing.assert_close(target, torch.ones_like(sigma))
    torch.testing.assert_close(scaling.noise(sigma), sigma.log() / 4)


def test_an_ideal_skip_is_the_denoiser_of_gaussian_data_about_zero():
    data, sigma, x = Mixture(((0.0, 0.0),), (0.5,), (1.0,)), torch.rand(9, dtype=F64), start(9, 1.0)
    torch.testing.assert_close(spread_to(Preconditioning(0.5).skip(sigma), x) * x, data.denoise(x, sigma))


def test_heun_overshoots_gaussian_deviations_by_the_known_shares():
    x = start()
    for steps, share in ((18, 0.05), (64, 0.0035)):
        found = (heun(GAUSSIAN.denoise, x, karras(steps)) - MEAN) / (exact(x, 80.0) - MEAN)
        assert found.min().item() == pytest.approx(1 + share, abs=share / 10)


def test_twice_the_steps_leave_a_quarter_of_heuns_error_and_half_of_eulers():
    x = start()
    for solver, low, high in ((heun, 3.0, 5.0), (euler, 1.7, 2.3)):
        errors = [
            (solver(GAUSSIAN.denoise, x, karras(n)) - exact(x, 80.0)).abs().max() for n in (32, 64, 128)
        ]
        assert all(low < a / b < high for a, b in pairwise(errors)), solver


def test_a_flow_may_end_above_zero():
    x = start()
    sigmas = torch.linspace(80 ** (1 / 7), 0.3 ** (1 / 7), 200, dtype=F64) ** 7
    torch.testing.assert_close(heun(GAUSSIAN.denoise, x, sigmas), exact(x, 80.0, 0.3), rtol=1e-3, atol=1e-3)


def test_a_step_to_zero_is_the_denoiser_itself():
    x = start(sigma=3.0)
    for solver in (heun, euler):
        found = solver(GAUSSIAN.denoise, x, torch.tensor([3.0, 0.0]))
        torch.testing.assert_close(found, GAUSSIAN.denoise(x, 3.0))


def test_the_state_is_float64_and_the_denoiser_reads_the_dtype_of_x():
    seen = set()

    def denoiser(x, sigma):
        seen.add((x.dtype, sigma.dtype))
        return GAUSSIAN.denoise(x, sigma)

    x = start(dtype=torch.float32)
    found = heun(denoiser, x, karras(64))
    assert seen == {(torch.float32, torch.float32)}
    assert found.dtype == torch.float32
    precise = heun(GAUSSIAN.denoise, x.double(), karras(64))
    torch.testing.assert_close(found.double(), precise, rtol=1e-5, atol=1e-5)


def test_heun_calls_twice_a_step_but_once_in_the_last():
    calls = []
    heun(lambda x, sigma: calls.append(sigma) or 0 * x, start(), karras(18))
    assert len(calls) == 35


def test_a_condition_reaches_the_denoiser_and_none_does_not():
    x = start(4, 1.0)
    assert bool((denoised(lambda x, sigma, c: c.view(-1, 1) + 0 * x, x, 1.0, torch.arange(4.0)) >= 0).all())
    assert bool((denoised(lambda x, sigma: 0 * x, x, 1.0) == 0).all())


def test_the_score_is_the_gradient_of_the_log_density():
    x, sigma = start(8, 1.0).requires_grad_(), torch.rand(8, dtype=F64) + 0.1
    (slope,) = torch.autograd.grad(GAUSSIAN.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(score(GAUSSIAN.denoise, x, sigma), slope)


def test_churn_leaves_the_law_of_the_samples():
    # Over all levels and with many steps: the mean and the variance of the data, within sampling error.
    x = start(5000)
    found = heun(
        GAUSSIAN.denoise, x, karras(64), churn=Churn(20.0), generator=torch.Generator().manual_seed(1)
    )
    assert not torch.allclose(found, heun(GAUSSIAN.denoise, x, karras(64)), atol=0.1)
    assert found.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert found.std().item() == pytest.approx(SCALE, abs=0.03)


def test_churn_adds_nothing_outside_its_levels_and_at_most_doubles_the_variance():
    assert Churn(80.0, least=0.1, most=10.0).factor(0.05, 18) == 1
    assert Churn(80.0).factor(1.0, 18) == pytest.approx(math.sqrt(2))
    assert Churn(1.0).factor(1.0, 18) == pytest.approx(1 + 1 / 18)
    x = start()
    torch.testing.assert_close(
        heun(GAUSSIAN.denoise, x, karras(18), churn=Churn(5.0, least=100.0)),
        heun(GAUSSIAN.denoise, x, karras(18)), rtol=0, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: karras(0), "steps"),
        (lambda: karras(5, 1.0, 0.5), "least < most"),
        (lambda: karras(5, rho=0.0), "rho"),
        (lambda: Preconditioning(0.0), "sigma_data"),
        (lambda: Churn(-1.0), "amount"),
        (lambda: Churn(1.0, 2.0, 1.0), "least <= most"),
        (lambda: heun(GAUSSIAN.denoise, start(), torch.tensor([1.0, 1.0])), "each below"),
        (lambda: heun(GAUSSIAN.denoise, start(), torch.tensor([1.0])), "two levels"),
        (lambda: heun(GAUSSIAN.denoise, start(), torch.tensor([1.0, -1.0])), ">= 0"),
        (lambda: heun(GAUSSIAN.denoise, start(), torch.tensor([math.inf, 0.0])), "finite"),
    ],
)
def test_what_makes_no_sense_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
