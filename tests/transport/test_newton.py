"""Sinkhorn-Newton-Sparse."""

import math

import pytest
import torch
from tests.transport.problems import TIGHT, cloud, problem, weights

from fdiv.transport import newton
from fdiv.transport.newton import sparse_newton
from fdiv.transport.sinkhorn import Solver, sinkhorn


def assignment(n: int, seed: int = 0):
    """The paper's first problem: independent uniform costs."""
    return torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_finds_what_sinkhorn_finds():
    cost, log_a, log_b = problem(30, 20)
    for eps in (1.0, 0.05):
        found = sparse_newton(cost, log_a, log_b, eps, solver=TIGHT)
        expected = sinkhorn(cost, log_a, log_b, eps, solver=TIGHT)
        assert found.converged
        torch.testing.assert_close(found.f, expected.f, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(found.plan, expected.plan, rtol=1e-8, atol=1e-12)
        assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-11)


def test_the_papers_assignment_takes_twenty_steps_and_a_few():
    cost = assignment(500)
    for keep in (4, 8):
        found = sparse_newton(cost, eps=1 / 1200, keep=keep, solver=Solver(tolerance=1e-11))
        assert found.converged and found.iterations <= 20 + 15
    solver = Solver(tolerance=1e-9, newton=False, max_iter=350, unconverged="ignore")
    assert not sinkhorn(cost, eps=1 / 1200, solver=solver).converged  # ten times as many, and stretched


def test_clouds_of_points_take_few_steps_too():
    cost = torch.cdist(cloud(150, 2), cloud(150, 2, seed=1)).square()
    found = sparse_newton(cost, eps=cost.max().item() / 1000, solver=Solver(tolerance=1e-11))
    assert found.converged and found.iterations <= 60


def test_distances_whose_assignment_is_all_but_ambiguous_converge():
    cost = torch.cdist(cloud(60, 1), cloud(60, 1, seed=1))
    found = sparse_newton(cost, eps=1e-3, warmup=100, solver=Solver(tolerance=1e-9))
    assert found.converged
    assert found.value.item() == pytest.approx(sinkhorn(cost, eps=1e-3).value.item(), rel=1e-9)


def test_keeping_everything_is_no_failure():
    cost, log_a, log_b = problem(12, 9)
    found = sparse_newton(cost, log_a, log_b, 0.1, keep=1000, solver=TIGHT)
    assert found.converged


def test_the_thinned_hessian_is_positive_across_its_null_vector():
    plan = sinkhorn(problem(12, 9)[0], eps=0.3).plan
    for kept in (3, 30, 100):
        thin = torch.where(plan >= plan.flatten().topk(kept).values[-1], plan, 0.0)
        rows, columns = plan.sum(1).diag(), plan.sum(0).diag()
        matrix = torch.cat([torch.cat([rows, thin], 1), torch.cat([thin.mT, columns], 1)])
        assert torch.linalg.eigvalsh(matrix).min() > 0
        there, back = newton._largest(plan, kept)
        ones = torch.ones(12, dtype=torch.float64)
        torch.testing.assert_close(there(ones[:9]), thin.sum(1))
        torch.testing.assert_close(back(ones), thin.sum(0))


def test_zero_weights_and_forbidden_pairs_stand_aside():
    cost, _, log_b = problem(5, 4)
    cost = cost.clone()
    cost[0, 0] = math.inf
    log_a = torch.cat([weights(4), torch.tensor([-math.inf], dtype=torch.float64)])
    found = sparse_newton(cost, log_a, log_b, 0.2, solver=TIGHT)
    expected = sinkhorn(cost, log_a, log_b, 0.2, solver=TIGHT)
    torch.testing.assert_close(found.plan, expected.plan, rtol=1e-8, atol=1e-12)


def test_its_value_is_differentiable_once():
    cost, log_a, log_b = (t.requires_grad_() for t in problem(5, 4))

    def value(cost, log_a, log_b):
        return sparse_newton(cost, log_a.log_softmax(0), log_b.log_softmax(0), 0.3, solver=TIGHT).value

    assert torch.autograd.gradcheck(value, (cost, log_a, log_b), fast_mode=True)


@pytest.mark.parametrize(
    ("cost", "options"),
    [
        (torch.zeros(3, 3), {}),
        (torch.zeros(2, 3, 3, dtype=torch.float64), {}),
        (torch.zeros(3, 3, dtype=torch.float64), {"keep": 0}),
        (torch.zeros(3, 3, dtype=torch.float64), {"warmup": 0}),
    ],
)
def test_what_it_does_not_solve_is_refused(cost, options):
    with pytest.raises(ValueError, match="got"):
        sparse_newton(cost, **options)
