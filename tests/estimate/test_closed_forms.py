"""Moments of ratios within one family, against sums, quadrature and the formulas written out."""

import math

import pytest
import torch
from tests.worlds import LOG_BEHAVIOUR, LOG_P, close
from torch.distributions import Bernoulli, Beta, Categorical, Gamma, Normal, kl_divergence

import fdiv
from fdiv.estimate.closed_forms import chi_square, log_power_moment


def float64(*numbers):
    return [torch.tensor(number, dtype=torch.float64) for number in numbers]


def quadrature(p, q, power, points):
    """log E_q[(p/q)^power] by the trapezoid rule, exponentially accurate where tails decay smoothly."""
    log_p, log_q = p.log_prob(points), q.log_prob(points)
    return torch.trapezoid((power * log_p + (1 - power) * log_q).exp(), points).log()


def test_of_categories_it_is_the_sum_of_squares_whatever_is_added_to_the_logits():
    p, q = Categorical(logits=LOG_P + 3.0), Categorical(logits=LOG_BEHAVIOUR - 1.0)
    close(chi_square(p, q), fdiv.Pearson()(LOG_P, LOG_BEHAVIOUR))
    close(chi_square(q, p), fdiv.Neyman()(LOG_P, LOG_BEHAVIOUR))
    alpha = log_power_moment(p, q, 0.3).expm1() / (0.3 * (0.3 - 1))
    close(alpha, fdiv.Alpha(0.3)(LOG_P, LOG_BEHAVIOUR))


def test_a_coin_is_two_categories():
    one, other = float64(0.2, 0.7)
    close(chi_square(Bernoulli(one), Bernoulli(other)), (one - other).square() / (other * (1 - other)))


def test_of_normals_it_is_the_formula_and_the_integral():
    m1, s1, m2, s2 = float64(0.3, 0.8, -0.5, 1.1)
    p, q = Normal(m1, s1), Normal(m2, s2)
    left = 2 * s2.square() - s1.square()
    formula = s2.square() / (s1 * left.sqrt()) * ((m1 - m2).square() / left).exp()
    close(chi_square(p, q), formula - 1)
    points = torch.linspace(-25, 25, 20_001, dtype=torch.float64)
    close(log_power_moment(p, q, 2.0), quadrature(p, q, 2.0, points))
    close(log_power_moment(p, q, -0.7), quadrature(p, q, -0.7, points))


def test_of_betas_it_is_the_integral():
    p, q = Beta(*float64(3.5, 4.0)), Beta(*float64(2.0, 3.0))
    points = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    close(log_power_moment(p, q, 2.0), quadrature(p, q, 2.0, points), 1e-8)


@pytest.mark.parametrize(
    ("p", "q", "finite"),
    [
        (Normal(*float64(0.0, 1.4)), Normal(*float64(0.0, 1.0)), True),  # 2 s2^2 > s1^2: 2 > 1.96
        (Normal(*float64(0.0, 1.42)), Normal(*float64(0.0, 1.0)), False),
        (Beta(*float64(1.1, 3.0)), Beta(*float64(2.0, 3.0)), True),  # 2 a1 > a2
        (Beta(*float64(0.9, 3.0)), Beta(*float64(2.0, 3.0)), False),
        (Beta(*float64(3.0, 0.9)), Beta(*float64(3.0, 2.0)), False),
    ],
    ids=repr,
)
def test_it_is_infinite_where_the_ratio_has_no_second_moment(p, q, finite):
    assert chi_square(p, q).isfinite() == finite
    assert finite or chi_square(p, q) == math.inf


def test_the_slope_of_the_moment_at_one_is_the_kl_divergence_from_p():
    p, q = Normal(*float64([0.3, -1.0], [0.8, 2.0])), Normal(*float64([-0.5, 0.0], [1.1, 1.7]))
    power = torch.ones((), dtype=torch.float64, requires_grad=True)
    for row in (0, 1):
        (slope,) = torch.autograd.grad(log_power_moment(p, q, power)[row], power)
        close(slope, kl_divergence(p, q)[row])
    close(log_power_moment(p, q, 1.0).exp(), torch.ones(2, dtype=torch.float64))


def test_gradients_reach_the_parameters_and_stay_finite_where_it_is_infinite():
    mean, scale = (t.requires_grad_() for t in float64([0.0, 0.0], [1.0, 3.0]))
    value = chi_square(Normal(mean, scale), Normal(*float64(0.1, 1.0)))
    assert value[1] == math.inf
    value[0].backward()
    assert mean.grad.isfinite().all() and scale.grad.isfinite().all() and mean.grad[0] != 0


def test_categories_without_mass():
    p, q = (Categorical(logits=torch.tensor(row).log()) for row in ([0.5, 0.5, 0.0], [0.25, 0.75, 0.0]))
    close(chi_square(p, q), torch.tensor(0.25**2 / 0.25 + 0.25**2 / 0.75), 1e-6)
    none = Categorical(logits=torch.tensor([1.0, 0.0, 0.0]).log())
    assert chi_square(p, none) == math.inf
    close(chi_square(none, p), torch.tensor(1.0), 1e-6)


def test_two_families_and_unknown_ones_are_refused():
    for pair in ((Normal(0.0, 1.0), Beta(1.0, 1.0)), (Gamma(1.0, 1.0), Gamma(2.0, 1.0))):
        with pytest.raises(TypeError, match="one family among Categorical, Bernoulli, Normal, Beta"):
            chi_square(*pair)
