"""Kinetic-optimal paths: Gaussian data for nothing, separated data straight ahead, two points in between."""

import math

import numpy as np
import pytest
import torch
from tests.thinned import thinned

from fdiv.diffusion.kinetic import Separation, middles, of_function, separation
from fdiv.diffusion.mixture import Mixture

F64 = torch.float64
TIMES = torch.linspace(0, 1, 2001, dtype=F64)
PAIR = Mixture(((-1.0,), (1.0,)), (0.0, 0.0), (1.0, 1.0))


def two_points(s):
    """lambda of +-1 by Gauss-Hermite: E tanh^2 at the posterior's log-odds, given x1 = 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    return (s.unsqueeze(-1) ** 2 + s.unsqueeze(-1) * nodes).tanh().square() @ weights


def separated(s):
    return torch.ones_like(s)


def gaussian(s):
    return s**2 / (1 + s**2)


def cond_ot(t):
    return t, 1 - t


def circle(t):
    return (math.pi / 2 * t).sin(), (math.pi / 2 * t).cos()


def quadrature(ratio, path, count=200_000):
    """The energy by its definition, on the middles of as many steps."""
    t = ((torch.arange(count, dtype=F64) + 0.5) / count).requires_grad_()
    a, m = path(t)
    (da,) = torch.autograd.grad(a.sum(), t, retain_graph=True)
    (dm,) = torch.autograd.grad(m.sum(), t)
    a, m = a.detach(), m.detach()
    return (da**2 + dm**2 - (1 - ratio(a / m)) * (da - a * dm / m) ** 2).mean().item()


def test_gaussian_data_cost_nothing_along_the_circle():
    found = of_function(gaussian)
    assert found.total == pytest.approx(0, abs=1e-4)
    assert found.least_energy == pytest.approx(0, abs=1e-8)
    assert found.energy(*circle(TIMES)) == pytest.approx(0, abs=1e-8)
    a, m = found.optimal(TIMES)
    torch.testing.assert_close(a**2 + m**2, torch.ones_like(a), rtol=0, atol=1e-6)
    assert found.energy(a, m) == pytest.approx(0, abs=1e-6)


def test_separated_data_are_reached_in_straight_lines():
    found = of_function(separated)
    assert found.total == pytest.approx(math.pi / 2)
    assert found.least_energy == pytest.approx(2)
    a, m = found.optimal(TIMES)
    torch.testing.assert_close(a, TIMES, rtol=0, atol=1e-6)
    torch.testing.assert_close(m, 1 - TIMES, rtol=0, atol=1e-6)


def test_two_points_lie_in_between():
    found = of_function(two_points)
    assert found.total == pytest.approx(0.691, abs=5e-4)
    assert found.least_energy == pytest.approx(0.459, abs=5e-4)
    assert found.energy(*circle(TIMES)) == pytest.approx(0.869, abs=5e-4)
    assert found.energy(*cond_ot(TIMES)) == pytest.approx(0.982, abs=5e-4)
    # No path is shorter than optimal transport from N(0, 1) to +-1: E(|x| - 1)^2.
    assert found.least_energy > 2 - 2 * math.sqrt(2 / math.pi)


@pytest.mark.parametrize("ratio", thinned([separated, two_points, gaussian]))
@pytest.mark.parametrize("path", [cond_ot, circle, lambda t: (t**2, 1 - t), lambda t: (t, (1 - t) ** 1.5)])
def test_the_energy_is_the_integral_that_defines_it(ratio, path):
    expected = quadrature(ratio, path)
    assert of_function(ratio).energy(*path(TIMES)) == pytest.approx(expected, abs=2e-3)


def test_the_optimal_path_has_the_least_energy_and_others_have_more():
    found = of_function(two_points)
    assert found.energy(*found.optimal(TIMES)) == pytest.approx(found.least_energy, abs=1e-4)
    assert found.least_energy == pytest.approx(4 * math.sin(found.total / 2) ** 2)
    a, m = found.optimal(TIMES)
    for bump in (0.05, -0.05):
        moved = bump * TIMES * (1 - TIMES)
        assert found.energy(a + moved, m + moved) > found.least_energy
        assert found.energy(a + moved, m - moved) > found.least_energy


def test_a_law_without_slack_for_a_while_is_crossed_at_once_and_both_ends_are_reached():
    slack = torch.cat([torch.zeros(50), torch.ones(30), torch.zeros(48)])
    a, m = Separation(slack).optimal(TIMES)
    ends = torch.stack([a[[0, -1]], m[[0, -1]]])
    torch.testing.assert_close(ends, torch.eye(2, dtype=F64).flip(0), rtol=0, atol=1e-9)


# -- from samples ------------------------------------------------------------------------------------------


def test_the_separation_of_gaussian_data_is_exactly_that_of_its_best_multiple():
    data = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    data = data / data.square().mean().sqrt() * 0.7
    found = separation(Mixture(((0.0,) * 3,), (0.7,), (1.0,)).denoise, data, cells=16)
    assert found.slack.max().item() < 1e-20


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_separation_is_estimated_by_sampling_at_any_scale_of_the_data(scale):
    pair = Mixture(((-scale,), (scale,)), (0.0, 0.0), (1.0, 1.0))
    data = scale * torch.tensor([[-1.0], [1.0]], dtype=F64)
    found = separation(pair.denoise, data, 32, draws=5000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.ratio(), two_points(middles(32).tan()), rtol=0, atol=0.02)
    assert found.total == pytest.approx(0.691, abs=0.01)


def test_the_energy_is_that_of_samples_as_they_move():
    # E|v_t(x_t)|^2 with v = a' D + m' (x - a D) / m, along Cond-OT, whose a' = 1 and m' = -1.
    generator, energies = torch.Generator().manual_seed(0), []
    for t in ((torch.arange(50) + 0.5) / 50).tolist():
        data = PAIR.sample(5000, generator).double()
        x = t * data + (1 - t) * torch.randn(data.shape, dtype=F64, generator=generator)
        clean = PAIR.denoise(x / t, (1 - t) / t)
        energies.append((clean - (x - t * clean) / (1 - t)).square().mean().item())
    assert sum(energies) / 50 == pytest.approx(of_function(two_points).energy(*cond_ot(TIMES)), rel=0.02)


def test_few_points_in_many_dimensions_are_separated_and_in_few_they_are_not():
    found = []
    for dim in (64, 2):
        points = torch.randn(50, dim, generator=torch.Generator().manual_seed(0), dtype=F64)
        points = points / points.square().mean().sqrt()
        data = Mixture(tuple(map(tuple, points.tolist())), (0.0,) * 50, (1.0,) * 50)
        whole = separation(data.denoise, points, 1, draws=200, generator=torch.Generator().manual_seed(1))
        found.append(whole.ratio().item())  # at theta = pi / 4, s = 1
    assert found[0] == pytest.approx(0.999, abs=0.002)
    assert found[1] == pytest.approx(0.53, abs=0.04)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: of_function(lambda s: torch.full_like(s, 0.5)), "at least"),
        (lambda: of_function(lambda s: torch.full_like(s, 1.5)), "at most 1"),
        (lambda: of_function(separated).energy(TIMES, TIMES), "goes from 0 to 1"),
        (lambda: of_function(separated).energy(TIMES, 1 - TIMES[:-1]), "two times or more"),
        (lambda: middles(0), "cells"),
        (lambda: separation(PAIR.denoise, torch.zeros(3, 1)), "scale"),
    ],
)
def test_what_makes_no_sense_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
