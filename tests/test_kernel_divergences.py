"""MMD, the energy distance and Cauchy-Schwarz between Gaussians, and of samples without bias."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from fdiv import MMD, CauchySchwarz, Energy, Gaussian, Laplace

MEANS = torch.tensor([[0.3, -0.2], [-0.5, 0.6]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]], dtype=torch.float64)


def as_points(mean, covariance, nodes=40):
    """(points [nodes^2, 2], log weights) whose sums are the plane Gaussian's integrals, as Gauss did."""
    x, weights = np.polynomial.hermite_e.hermegauss(nodes)
    grid = torch.tensor(list(product(x, x)))
    mass = torch.tensor([a * b for a, b in product(weights, weights)]) / (2 * math.pi)
    return mean + grid @ torch.linalg.cholesky(covariance).T, mass.log()


def both():
    (x, log_a), (y, log_b) = (as_points(*g) for g in zip(MEANS, COVARIANCES, strict=True))
    return x, y, log_a, log_b


def mean_kernel(i, j, width):
    """E exp(-|x - y|^2 / 2 width^2) of x ~ i, y ~ j: width^D N(m; 0, S + width^2 I), unnormalised."""
    m, spread = MEANS[i] - MEANS[j], COVARIANCES[i] + COVARIANCES[j] + width**2 * torch.eye(2).double()
    return width**2 / spread.det().sqrt() * (-0.5 * m @ torch.linalg.solve(spread, m)).exp()


@pytest.mark.parametrize("width", [0.7, 2.0])
def test_mmd_between_gaussians_has_a_closed_form(width):
    expected = mean_kernel(0, 0, width) + mean_kernel(1, 1, width) - 2 * mean_kernel(0, 1, width)
    assert MMD(Gaussian(width)).between(*both()).item() == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("width", [0.7, 2.0])
def test_cauchy_schwarz_between_gaussians_is_that_of_gaussians_wider_by_half_the_squared_bandwidth(width):
    def overlap(i, j):  # the integral of the product of both densities, each smoothed by width / sqrt 2
        spread = COVARIANCES[i] + COVARIANCES[j] + width**2 * torch.eye(2).double()
        density = torch.distributions.MultivariateNormal(torch.zeros(2).double(), spread)
        return density.log_prob(MEANS[i] - MEANS[j])

    expected = overlap(0, 0) + overlap(1, 1) - 2 * overlap(0, 1)
    assert CauchySchwarz(width).between(*both()).item() == pytest.approx(expected.item(), rel=1e-8)


def test_energy_between_gaussians_on_a_line_has_a_closed_form():
    def mean_distance(mean, spread):  # E |N(mean, spread^2)|
        z = mean / (spread * math.sqrt(2))
        return spread * math.sqrt(2 / math.pi) * math.exp(-z * z) + mean * math.erf(z)

    levels = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    normal = math.sqrt(2) * torch.erfinv(2 * levels - 1).unsqueeze(-1)
    value = Energy().between(0.7 * normal, 0.9 + 1.4 * normal)
    within = mean_distance(0, 0.7 * math.sqrt(2)) + mean_distance(0, 1.4 * math.sqrt(2))
    expected = 2 * mean_distance(0.9, math.hypot(0.7, 1.4)) - within
    assert value.item() == pytest.approx(expected, rel=1e-3)


# -- samples ----------------------------------------------------------------------------------------------

PLACES = torch.tensor([[0.0], [0.7], [2.0]], dtype=torch.float64)
P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64)
KERNELS = [(MMD(), MMD(unbiased=True)), (MMD(Laplace(2.0)), MMD(Laplace(2.0), unbiased=True))]
KERNELS += [(Energy(), Energy(unbiased=True))]


def mean_over_samples(statistic, n, m):
    """E of a statistic of n draws from P and m from Q, over all that can be drawn."""
    total = 0.0
    for drawn in product(range(3), repeat=n + m):
        first, second = list(drawn[:n]), list(drawn[n:])
        chance = P[first].prod() * Q[second].prod()
        total += chance.item() * statistic.between(PLACES[first], PLACES[second]).item()
    return total


@pytest.mark.parametrize(("plain", "unbiased"), KERNELS, ids=repr)
@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 2)])
def test_the_mean_over_all_samples_is_the_divergence_itself_only_without_bias(plain, unbiased, n, m):
    truth = plain.on(PLACES)(P.log(), Q.log()).item()
    assert mean_over_samples(unbiased, n, m) == pytest.approx(truth, rel=1e-9)
    assert mean_over_samples(plain, n, m) > truth + 0.01


def test_without_bias_it_can_be_negative_and_its_gradient_is_that_of_its_value():
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert MMD(unbiased=True).between(x, x).item() < 0
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 2, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 3))
    assert torch.autograd.gradcheck(MMD(unbiased=True).between, (x, y))
    assert torch.autograd.gradcheck(Energy(unbiased=True).between, (x, y))


def test_rows_of_a_batch_are_samples_of_their_own():
    x, y = torch.randn(2, 3, 4, 1), torch.randn(3, 5, 1)
    values = MMD(unbiased=True).between(x, y)
    assert values.shape == (2, 3)
    torch.testing.assert_close(values[1, 2], MMD(unbiased=True).between(x[1, 2], y[2]))


@pytest.mark.parametrize("unbiased", [MMD(unbiased=True), Energy(unbiased=True)], ids=repr)
def test_weights_histograms_and_single_points_have_no_unbiased_statistic(unbiased):
    with pytest.raises(ValueError, match="samples, which weigh the same"):
        unbiased.on(PLACES)(P.log(), Q.log())
    with pytest.raises(ValueError, match="two points a side, got 1 and 3"):
        unbiased.between(PLACES[:1], PLACES)


@pytest.mark.parametrize("member", [MMD, Energy])
def test_unbiased_is_a_switch(member):
    with pytest.raises(ValueError, match="True or False, got 1"):
        member(unbiased=1)
