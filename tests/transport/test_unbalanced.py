"""Marginals that may be missed at the price of an f-divergence."""

import math

import pytest
import torch
from tests.thinned import thinned
from tests.transport.problems import TIGHT, primal, problem

from fdiv import JS, KL, TV, Generator, Pearson, ReverseKL, SquaredHellinger
from fdiv.transport._marginals import By, ByKL, ByTV, marginal_of
from fdiv.transport.sinkhorn import Solver, self_sinkhorn, sinkhorn

PENALTIES = [2.0 * KL(), 0.7 * TV(), JS(), ReverseKL(), 0.5 * Pearson(), SquaredHellinger(), KL() + TV()]
CLOSE = Solver(tolerance=1e-10)


def unequal():
    cost, log_a, log_b = problem(5, 4)
    return cost, log_a + math.log(1.3), log_b + math.log(0.8)


@pytest.mark.parametrize("penalty", thinned(PENALTIES, 2), ids=repr)
def test_the_dual_value_is_the_primal_one_and_no_other_plan_is_cheaper(penalty):
    cost, log_a, log_b = unequal()
    a, b = log_a.exp(), log_b.exp()
    found = sinkhorn(cost, log_a, log_b, 0.5, marginals=penalty, solver=CLOSE)
    least = primal(found.plan, cost, a, b, 0.5, penalty, penalty)
    assert found.converged
    assert found.value.item() == pytest.approx(least.item(), rel=1e-8)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-2):
        for _ in range(5):
            noise = torch.randn(5, 4, generator=generator, dtype=torch.float64)
            other = found.plan * (size * noise).exp()
            assert primal(other, cost, a, b, 0.5, penalty, penalty) > least


@pytest.mark.parametrize("penalty", thinned(PENALTIES), ids=repr)
def test_an_optimum_has_minus_f_for_the_slope_of_the_penalty(penalty):
    cost, log_a, log_b = unequal()
    found = sinkhorn(cost, log_a, log_b, 0.5, marginals=penalty, solver=CLOSE)
    log_ratio = found.marginals[0].log() - log_a
    smooth = (
        (log_ratio.abs() > 1e-6) if not penalty.is_smooth else torch.ones_like(log_ratio, dtype=torch.bool)
    )
    torch.testing.assert_close(found.f[smooth], -penalty.phi(log_ratio)[smooth], rtol=1e-6, atol=1e-7)


# Not (50, 0.02): there POT stops at a plan whose value is more than twice the least one.
@pytest.mark.parametrize(("rho", "eps"), [(0.3, 0.5), (2.0, 0.5), (50.0, 0.5), (0.3, 0.02), (2.0, 0.02)])
def test_the_kl_plan_is_that_of_pot(rho, eps):
    ot = pytest.importorskip("ot")
    cost, log_a, log_b = unequal()
    a, b = log_a.exp(), log_b.exp()
    found = sinkhorn(cost, log_a, log_b, eps, marginals=rho * KL(), solver=TIGHT)
    peer = ot.unbalanced.sinkhorn_unbalanced(
        a, b, cost, eps, rho, method="sinkhorn_stabilized", reg_type="kl", numItermax=100_000, stopThr=1e-15
    )
    torch.testing.assert_close(found.plan, peer, rtol=1e-8, atol=1e-10)
    assert found.value.item() == pytest.approx(primal(peer, cost, a, b, eps, rho * KL(), rho * KL()).item())


def test_the_kl_value_is_that_of_geomloss():
    ot = pytest.importorskip("geomloss.ot")
    cost, log_a, log_b = unequal()
    peer = ot.solve(cost, a=log_a.exp(), b=log_b.exp(), reg=0.5, unbalanced=2.0, max_iter=2000)
    found = sinkhorn(cost, log_a, log_b, 0.5, marginals=2.0 * KL(), solver=TIGHT)
    assert found.value.item() == pytest.approx(peer.value.item(), rel=1e-4)  # it has no stopping rule


@pytest.mark.parametrize(("rho", "eps", "cost"), [(1.0, 0.5, 0.3), (2.0, 0.1, 4.0), (0.2, 1.0, 10.0)])
def test_two_diracs_under_kl_have_a_closed_form(rho, eps, cost):
    mass_a, mass_b = 1.7, 0.6
    log_a, log_b = (torch.tensor([math.log(m)], dtype=torch.float64) for m in (mass_a, mass_b))
    given = torch.full((1, 1), cost, dtype=torch.float64)
    found = sinkhorn(given, log_a, log_b, eps, marginals=rho * KL(), solver=TIGHT)
    moved = math.exp((-cost + (eps + rho) * math.log(mass_a * mass_b)) / (eps + 2 * rho))
    assert found.plan.item() == pytest.approx(moved)
    expected = -(eps + 2 * rho) * moved + eps * mass_a * mass_b + rho * (mass_a + mass_b)
    assert found.value.item() == pytest.approx(expected)


@pytest.mark.parametrize(("cost", "moves"), [(0.9, True), (1.1, False)])
def test_under_tv_mass_travels_where_that_is_cheaper_than_to_destroy_and_make_it(cost, moves):
    mass_a, mass_b, rho = 1.5, 0.7, 1.0  # to destroy a unit costs rho/2, and to make one, too
    log_a, log_b = (torch.tensor([math.log(m)], dtype=torch.float64) for m in (mass_a, mass_b))
    given = torch.full((1, 1), cost, dtype=torch.float64)
    found = sinkhorn(given, log_a, log_b, 1e-4, marginals=rho * TV(), solver=Solver(tolerance=1e-12))
    moved = min(mass_a, mass_b) if moves else 0.0
    assert found.plan.item() == pytest.approx(moved, abs=1e-3)
    expected = moved * cost + rho / 2 * (mass_a + mass_b - 2 * moved)
    assert found.value.item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("penalty", [KL(), TV(), JS(), Pearson()], ids=repr)
def test_a_prohibitive_price_keeps_the_marginals(penalty):
    cost, log_a, log_b = problem(5, 4)
    balanced = sinkhorn(cost, log_a, log_b, 0.5, solver=TIGHT)
    found = sinkhorn(cost, log_a, log_b, 0.5, marginals=1e6 * penalty, solver=CLOSE)
    assert found.converged
    torch.testing.assert_close(found.plan, balanced.plan, rtol=1e-4, atol=1e-6)
    assert found.value.item() == pytest.approx(balanced.value.item(), rel=1e-5)


def test_scaling_the_plan_of_a_kl_problem_gains_nothing():
    cost, log_a, log_b = unequal()
    a, b = log_a.exp(), log_b.exp()
    for rho, eps in ((2.0, 0.5), (0.3, 0.05)):
        found = sinkhorn(cost, log_a, log_b, eps, marginals=rho * KL(), solver=TIGHT)
        plan, (to_a, to_b) = found.plan, found.marginals
        slope = (plan * cost).sum() + eps * (plan * (plan / (a[:, None] * b)).log()).sum()
        slope = slope + rho * (to_a * (to_a / a).log()).sum() + rho * (to_b * (to_b / b).log()).sum()
        assert slope.item() == pytest.approx(0.0, abs=1e-9)


def test_each_side_has_its_own_penalty():
    cost, log_a, log_b = unequal()
    a, b = log_a.exp(), log_b.exp()
    kept = sinkhorn(cost, log_a, log_b, 0.5, marginals=("balanced", KL()), solver=TIGHT)
    torch.testing.assert_close(kept.plan.sum(1), a, rtol=0, atol=1e-11)
    assert kept.value.item() == pytest.approx(primal(kept.plan, cost, a, b, 0.5, "balanced", KL()).item())
    for pair in ((3.0 * KL(), 0.2 * KL()), (TV(), KL()), (KL(), SquaredHellinger())):
        found = sinkhorn(cost, log_a, log_b, 0.5, marginals=pair, solver=CLOSE)
        turned = sinkhorn(cost.mT, log_b, log_a, 0.5, marginals=pair[::-1], solver=CLOSE)
        torch.testing.assert_close(found.plan, turned.plan.mT, rtol=1e-7, atol=1e-9)
        expected = primal(found.plan, cost, a, b, 0.5, *pair)
        assert found.value.item() == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("penalty", [0.7 * KL(), 0.7 * TV(), KL() + TV(), JS(0.3), ReverseKL()], ids=repr)
@pytest.mark.parametrize("eps", [1.0, 0.01])
def test_the_general_equation_is_solved_and_the_short_cuts_agree_with_it(penalty, eps):
    exact = torch.linspace(-4, 4, 33, dtype=torch.float64).unsqueeze(0) / eps
    scale = torch.full((1, 1), eps, dtype=torch.float64)
    by_newton = By(penalty).potential(exact, scale)
    x = by_newton - exact
    below, above = (penalty.phi(x + nudge) / eps + x + exact for nudge in (-1e-9, 1e-9))
    assert (below <= 1e-6 / eps).all() and (above >= -1e-6 / eps).all()
    side = marginal_of(penalty)
    torch.testing.assert_close(side.potential(exact, scale), by_newton, rtol=1e-9, atol=1e-9)
    assert isinstance(side, {0.7 * KL(): ByKL, 0.7 * TV(): ByTV}.get(penalty, By))


def test_a_penalty_of_ones_own_is_as_good_as_a_built_in_one():
    cost, log_a, log_b = unequal()
    own = Generator(lambda log_ratio: log_ratio.exp() * log_ratio)
    found = sinkhorn(cost, log_a, log_b, 0.5, marginals=own, solver=CLOSE)
    expected = sinkhorn(cost, log_a, log_b, 0.5, marginals=KL(), solver=CLOSE)
    torch.testing.assert_close(found.plan, expected.plan, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("penalty", [KL(), 0.4 * TV()], ids=repr)
def test_a_tiny_eps_converges_under_penalties_too(penalty):
    cost, log_a, log_b = problem(30, 20)
    for eps in (0.1, 1e-2, 1e-3):
        found = sinkhorn(cost, log_a, log_b, eps, marginals=penalty)
        assert found.converged
        coarse = sinkhorn(cost, log_a, log_b, eps, marginals=penalty, solver=Solver(annealed=True))
        assert found.value.item() == pytest.approx(coarse.value.item(), rel=1e-8)


def test_the_symmetric_problem_has_one_potential():
    cost = torch.cdist(*[torch.linspace(0, 3, 6, dtype=torch.float64).unsqueeze(-1)] * 2)
    log_a = torch.linspace(-2, 0, 6, dtype=torch.float64)
    for penalty in (KL(), JS()):
        found = self_sinkhorn(cost, log_a, 0.3, marginals=penalty, solver=CLOSE)
        expected = sinkhorn(cost, log_a, log_a, 0.3, marginals=penalty, solver=CLOSE)
        assert torch.equal(found.f, found.g)
        assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-8)


def test_what_is_no_penalty_is_refused():
    cost = torch.eye(2)
    with pytest.raises(TypeError, match="f-divergence"):
        sinkhorn(cost, marginals=3.0)
    with pytest.raises(ValueError, match="balanced marginals"):
        sinkhorn(cost, marginals=KL(), reference="uniform")
