"""Transport without entropy."""

import math
import sys

import pytest
import torch
from tests.transport.problems import cloud, problem, weights

from fdiv import Wasserstein1D
from fdiv.transport.sinkhorn import sinkhorn

pytest.importorskip("ot")

from fdiv.adapters.pot import emd


def test_the_least_cost_is_that_of_quantiles_on_a_line():
    x, y, log_a, log_b = cloud(6, 1), cloud(4, 1, seed=1), weights(6), weights(4, seed=2)
    found = emd(torch.cdist(x, y).square(), log_a, log_b)
    assert found.value.item() == pytest.approx(Wasserstein1D().between(x, y, log_a, log_b).item())
    torch.testing.assert_close(found.plan.sum(1), log_a.exp())
    torch.testing.assert_close(found.plan.sum(0), log_b.exp())


def test_plan_and_potentials_certify_each_other():
    cost, log_a, log_b = problem(7, 5)
    found = emd(cost, log_a, log_b)
    slack = cost - found.f[:, None] - found.g
    assert slack.min() > -1e-12
    assert (slack * found.plan).abs().max() < 1e-12
    assert found.value.item() == pytest.approx((found.f @ log_a.exp() + found.g @ log_b.exp()).item())


def test_it_is_the_limit_of_a_small_eps():
    cost, log_a, log_b = problem(7, 5)
    entropic = sinkhorn(cost, log_a, log_b, 1e-4)
    assert emd(cost, log_a, log_b).value.item() == pytest.approx(entropic.linear.item(), rel=1e-6)


def test_its_gradient_is_that_of_finite_differences():
    def value(cost, log_a, log_b):
        return emd(cost, log_a.log_softmax(0), log_b.log_softmax(0)).value

    assert torch.autograd.gradcheck(value, [t.requires_grad_() for t in problem(4, 3)], fast_mode=True)


def test_batches_are_problems_one_by_one():
    cost, log_a = torch.stack([problem(4, 3, seed=s)[0] for s in range(2)]), weights(4)
    found = emd(cost.float(), log_a)
    assert found.value.shape == (2,) and found.value.dtype == torch.float32
    assert found.value[1].item() == pytest.approx(emd(cost[1], log_a).value.item(), rel=1e-6)


def test_what_it_cannot_solve_is_refused():
    with pytest.raises(ValueError, match="equal mass"):
        emd(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="finite"):
        emd(torch.full((2, 2), math.inf))
    with pytest.raises(RuntimeError, match="stopped early"):
        emd(torch.rand(40, 40), max_iter=1)


def test_without_pot_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot.lp", None)
    monkeypatch.delitem(sys.modules, "fdiv.adapters.pot")
    with pytest.raises(ImportError, match=r'pip install "fdiv\[transport\]"'):
        import fdiv.adapters.pot  # noqa: F401
