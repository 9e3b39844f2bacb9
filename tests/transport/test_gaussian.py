"""Closed forms between Gaussians."""

import math

import pytest
import torch
from tests.transport.problems import cloud

from fdiv.transport import gaussian
from fdiv.transport.clouds import sinkhorn_between
from fdiv.transport.sinkhorn import Solver


def laws(width: int = 3):
    roots = cloud(2, width, width) + 1.5 * torch.eye(width)
    (cov_a, cov_b), (mean_a, mean_b) = roots @ roots.mT, cloud(2, width, seed=1)
    return mean_a, cov_a, mean_b, cov_b


def of_eigenvalues(matrix, function):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ function(values).diag() @ vectors.mT


def test_bures_is_its_definition_by_matrix_roots():
    _, a, _, b = laws()
    root = of_eigenvalues(a, torch.sqrt)
    middle = of_eigenvalues(root @ b @ root, torch.sqrt)
    expected = a.trace() + b.trace() - 2 * middle.trace()
    assert gaussian.bures(a, b).item() == pytest.approx(expected.item())
    assert gaussian.bures(a, a).item() == pytest.approx(0, abs=1e-12)
    eye = torch.eye(3, dtype=torch.float64)
    assert gaussian.bures(4 * eye, 9 * eye).item() == pytest.approx(3.0)
    inverse = of_eigenvalues(a, torch.rsqrt)
    matrix = gaussian.monge_map(*laws()).matrix
    torch.testing.assert_close(matrix, inverse @ middle @ inverse)


def test_the_monge_map_carries_one_law_to_the_other_as_the_gradient_of_a_convex_function():
    mean_a, cov_a, mean_b, cov_b = laws()
    carry = gaussian.monge_map(mean_a, cov_a, mean_b, cov_b)
    torch.testing.assert_close(carry.matrix @ cov_a @ carry.matrix.mT, cov_b)
    torch.testing.assert_close(carry.matrix, carry.matrix.mT)
    assert torch.linalg.eigvalsh(carry.matrix).min() > 0
    torch.testing.assert_close(carry(mean_a.unsqueeze(0))[0], mean_b)
    moved = (torch.eye(3, dtype=torch.float64) - carry.matrix) @ cov_a @ (torch.eye(3) - carry.matrix)
    cost = (mean_a - mean_b).square().sum() + moved.trace()
    assert cost.item() == pytest.approx(gaussian.wasserstein(mean_a, cov_a, mean_b, cov_b).item())


def test_in_one_dimension_the_entropic_value_is_that_on_a_grid():
    grid = torch.linspace(-8, 8, 250, dtype=torch.float64).unsqueeze(-1)
    for mean, variance, eps in ((0.0, 1.0, 0.5), (1.0, 0.5, 2.0)):
        log_a = (-grid[:, 0].square() / 2).log_softmax(0)
        log_b = (-(grid[:, 0] - mean).square() / (2 * variance)).log_softmax(0)
        found = sinkhorn_between(grid, grid, log_a, log_b, eps, solver=Solver(tolerance=1e-10))
        law = [torch.tensor(t, dtype=torch.float64) for t in ([0.0], [[1.0]], [mean], [[variance]])]
        assert found.value.item() == pytest.approx(gaussian.entropic(*law, eps).item(), rel=1e-9)
        cross = (found.plan * grid * grid.mT).sum()
        assert cross.item() == pytest.approx(gaussian.cross_covariance(law[1], law[3], eps).item(), rel=1e-8)


def test_the_entropic_value_is_what_its_plan_costs():
    """E|x - y|^2 + eps times the mutual information of the plan, which is Gaussian."""
    mean_a, cov_a, mean_b, cov_b = laws()
    for eps in (0.3, 5.0):
        cross = gaussian.cross_covariance(cov_a, cov_b, eps)
        spread = cov_a.trace() + cov_b.trace() - 2 * cross.trace()
        joint = torch.cat([torch.cat([cov_a, cross], 1), torch.cat([cross.mT, cov_b], 1)])
        information = (cov_a.logdet() + cov_b.logdet() - joint.logdet()) / 2
        expected = (mean_a - mean_b).square().sum() + spread + eps * information
        found = gaussian.entropic(mean_a, cov_a, mean_b, cov_b, eps)
        assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_the_limits_in_eps():
    law = laws()
    exact = gaussian.wasserstein(*law).item()
    assert gaussian.entropic(*law, 1e-8).item() == pytest.approx(exact, rel=1e-6)
    assert gaussian.debiased(*law, 1e-8).item() == pytest.approx(exact, rel=1e-6)
    mean_a, cov_a, mean_b, cov_b = law
    product = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
    assert gaussian.entropic(*law, 1e6).item() == pytest.approx(product.item(), rel=1e-4)
    assert gaussian.debiased(*law, 1e7).item() == pytest.approx(
        (mean_a - mean_b).square().sum().item(), rel=1e-3
    )
    soft = gaussian.monge_map(*law, eps=1e-8).matrix
    torch.testing.assert_close(soft, gaussian.monge_map(*law).matrix, rtol=1e-5, atol=1e-6)


def test_values_are_differentiable_where_eigenvalues_are_equal():
    eye = torch.eye(2, dtype=torch.float64)

    def values(scale, other):
        return gaussian.bures(scale * eye, other * eye), gaussian.entropic(
            eye[0], scale * eye, eye[1], other * eye, 0.3
        )

    inputs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.3, 0.4)]
    assert torch.autograd.gradcheck(values, inputs)


def test_batches_of_laws_are_laws_one_by_one():
    law = laws(2)
    twice = [torch.stack([t, t]) for t in law]
    assert gaussian.entropic(*twice, 0.5).tolist() == pytest.approx([gaussian.entropic(*law, 0.5).item()] * 2)
    points = cloud(5, 2)
    carried = gaussian.monge_map(*twice)(torch.stack([points, points]))
    torch.testing.assert_close(carried[1], gaussian.monge_map(*law)(points))


def test_a_singular_covariance_is_refused():
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="positive definite"):
        gaussian.bures(eye[:1].mT @ eye[:1], eye)


def test_samples_come_near_the_closed_form():
    law = laws(2)
    x, y = (
        m + cloud(600, 2, seed=s) @ torch.linalg.cholesky(c).mT for m, c, s in ((*law[:2], 1), (*law[2:], 2))
    )
    found = sinkhorn_between(x.float(), y.float(), eps=1.0).value
    assert found.item() == pytest.approx(gaussian.entropic(*law, 1.0).item(), rel=0.1)
    assert math.isfinite(found.item())
