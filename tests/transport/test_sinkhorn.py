"""Balanced entropic transport: POT, closed forms, laws, and inputs that break solvers."""

import math
import warnings

import pytest
import torch
from tests.transport.problems import TIGHT, cloud, kl, primal, problem, weights

from fdiv.transport.sinkhorn import Solver, self_sinkhorn, sinkhorn


@pytest.mark.parametrize("eps", [3.0, 0.3, 0.05])
def test_value_plan_and_linear_part_are_those_of_pot(eps):
    ot = pytest.importorskip("ot")
    cost, log_a, log_b = problem()
    a, b = log_a.exp(), log_b.exp()
    found = sinkhorn(cost, log_a, log_b, eps, solver=TIGHT)
    for reference, reg_type in (("product", "KL"), ("uniform", "entropy")):
        peer = ot.solve(cost, a, b, reg=eps, reg_type=reg_type, max_iter=200_000, tol=1e-14)
        value = sinkhorn(cost, log_a, log_b, eps, reference=reference, solver=TIGHT).value
        assert value.item() == pytest.approx(peer.value.item(), rel=1e-9)
        torch.testing.assert_close(found.plan, peer.plan, rtol=1e-8, atol=1e-10)
        assert found.linear.item() == pytest.approx(peer.value_linear.item(), rel=1e-9)


def test_a_batch_is_that_of_pots_batch_solver():
    batch = pytest.importorskip("ot.batch")
    x, y = cloud(4, 6, 2), cloud(4, 6, 2, seed=1)
    cost, uniform = torch.cdist(x, y).square(), torch.full((4, 6), 1 / 6, dtype=torch.float64)
    peer = batch.solve_batch(cost, 0.5, uniform, uniform, max_iter=5000, tol=1e-13, reg_type="kl")
    torch.testing.assert_close(sinkhorn(cost, eps=0.5, solver=TIGHT).plan, peer.plan, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eps", [2.0, 0.3, 0.01])
def test_the_primal_the_dual_and_the_marginals_agree(eps):
    cost, log_a, log_b = problem()
    a, b = log_a.exp(), log_b.exp()
    found = sinkhorn(cost, log_a, log_b, eps, solver=TIGHT)
    assert found.converged and found.error <= 1e-12
    assert found.value.item() == pytest.approx(primal(found.plan, cost, a, b, eps).item(), rel=1e-11)
    assert found.value.item() == pytest.approx((a @ found.f + b @ found.g).item(), rel=1e-11)
    assert (a @ found.f).item() == pytest.approx((b @ found.g).item())
    for got, wanted, summed in zip(
        found.marginals, (a, b), (found.plan.sum(1), found.plan.sum(0)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(got, summed)


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.003])
def test_two_atoms_against_the_same_two_have_a_closed_form(eps):
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    expected = -eps * math.log((1 + math.exp(-1 / eps)) / 2)
    for found in (sinkhorn(cost, eps=eps, solver=TIGHT), self_sinkhorn(cost, eps=eps, solver=TIGHT)):
        assert found.value.item() == pytest.approx(expected, rel=1e-12)


def test_the_reported_error_is_that_of_the_marginals_also_where_it_stopped_early():
    cost, log_a, log_b = problem(20, 30)
    for newton in (True, False):
        solver = Solver(max_iter=7, tolerance=1e-12, unconverged="ignore", newton=newton)
        found = sinkhorn(cost, log_a, log_b, 0.1, solver=solver)
        off = [(got - w.exp()).abs().sum() for got, w in zip(found.marginals, (log_a, log_b), strict=True)]
        assert not found.converged and found.iterations == 7
        assert found.error.item() == pytest.approx(sum(off).item(), rel=1e-6)


def test_what_does_not_converge_warns_raises_or_keeps_quiet_as_asked():
    cost, log_a, log_b = problem()

    def solve(unconverged):
        solver = Solver(max_iter=2, tolerance=1e-9, unconverged=unconverged)
        return sinkhorn(cost, log_a, log_b, 0.01, solver=solver)

    with pytest.warns(RuntimeWarning, match="1 of 1 transport problems did not converge in 2 steps"):
        solve("warn")
    with pytest.raises(RuntimeError, match=r"tolerance is 1\.0e-09"):
        solve("raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not solve("ignore").converged


def test_a_large_eps_gives_the_product_and_a_small_one_the_linear_programme():
    ot = pytest.importorskip("ot")
    cost, log_a, log_b = problem()
    a, b = log_a.exp(), log_b.exp()
    torch.testing.assert_close(sinkhorn(cost, log_a, log_b, 1e7).plan, a[:, None] * b, rtol=1e-5, atol=0)
    exact = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    assert sinkhorn(cost, log_a, log_b, 1e-4).linear.item() == pytest.approx(exact, rel=1e-6)


def test_the_laws_of_permutation_shift_and_scale():
    cost, log_a, log_b = problem()
    found = sinkhorn(cost, log_a, log_b, 0.3, solver=TIGHT)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    moved = sinkhorn(cost[order], log_a[order], log_b, 0.3, solver=TIGHT)
    torch.testing.assert_close(moved.plan, found.plan[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved.f, found.f[order], rtol=1e-8, atol=1e-9)
    turned = sinkhorn(cost.mT, log_b, log_a, 0.3, solver=TIGHT)
    torch.testing.assert_close(turned.plan.mT, found.plan, rtol=1e-9, atol=1e-12)
    shifts = cloud(7, 1, seed=5), cloud(5, seed=6)
    shifted = sinkhorn(cost + shifts[0] + shifts[1], log_a, log_b, 0.3, solver=TIGHT)
    torch.testing.assert_close(shifted.plan, found.plan, rtol=1e-9, atol=1e-12)
    scaled = sinkhorn(10 * cost, log_a, log_b, 3.0, solver=TIGHT)
    assert scaled.value.item() == pytest.approx(10 * found.value.item())


def test_the_options_of_the_solver_all_lead_to_one_solution():
    cost, log_a, log_b = problem(20, 15)
    expected = sinkhorn(cost, log_a, log_b, 0.2, solver=TIGHT)
    for options in ({"newton": False}, {"annealed": True}, {"newton": False, "annealed": True}):
        found = sinkhorn(cost, log_a, log_b, 0.2, solver=Solver(tolerance=1e-12, **options))
        torch.testing.assert_close(found.plan, expected.plan, rtol=1e-8, atol=1e-11)
    again = sinkhorn(cost, log_a, log_b, 0.2, start=(expected.f, expected.g), solver=Solver(tolerance=1e-11))
    assert again.iterations == 0
    torch.testing.assert_close(again.f, expected.f, rtol=1e-14, atol=0)


def test_stretched_steps_are_fewer_and_safe_from_any_start():
    cost, log_a, log_b = problem(40, 40, seed=3)
    solver = Solver(tolerance=1e-10, newton=False)
    found = sinkhorn(cost, log_a, log_b, 0.5, solver=solver)
    f, plain = torch.zeros(40, dtype=torch.float64), 0
    while True:  # plain steps, until as good
        g = -0.5 * ((f[:, None] - cost) / 0.5 + log_a[:, None]).logsumexp(0)
        new = -0.5 * ((g - cost) / 0.5 + log_b).logsumexp(1)
        off = (log_a.exp() * ((f - new) / 0.5).expm1().abs()).sum()
        f, plain = new, plain + 1
        if off < 1e-10:
            break
    assert 2 * found.iterations < plain
    far = (1e3 * cloud(40, seed=8), 1e3 * cloud(40, seed=9))
    assert sinkhorn(cost, log_a, log_b, 0.5, start=far, solver=solver).converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_tiny_eps_converges_in_either_precision(dtype, share):
    cost, log_a, log_b = problem(30, 40)
    eps = share * cost.max().item()
    found = sinkhorn(*(t.to(dtype) for t in (cost, log_a, log_b)), eps)
    assert found.converged and found.iterations < 500
    exact = sinkhorn(cost, log_a, log_b, eps, solver=TIGHT)
    accuracy = 1e-9 if dtype == torch.float64 else 1e-4
    assert found.value.item() == pytest.approx(exact.value.item(), rel=accuracy)


def test_an_atom_without_weight_changes_nothing_and_has_the_price_of_giving_it_some():
    cost, log_a, log_b = problem()
    extra = torch.cat([cost, cloud(1, 5, seed=7).square()])
    none = torch.cat([log_a, torch.tensor([-math.inf], dtype=torch.float64)])
    without, found = (sinkhorn(c, w, log_b, 0.3, solver=TIGHT) for c, w in ((cost, log_a), (extra, none)))
    assert found.value.item() == pytest.approx(without.value.item(), rel=1e-12)
    assert (found.plan[-1] == 0).all() and found.f.isfinite().all()
    transform = -0.3 * ((found.g - extra[-1]) / 0.3 + log_b).logsumexp(0)
    assert found.f[-1].item() == pytest.approx(transform.item(), abs=1e-9)
    backwards = sinkhorn(extra.mT, log_b, none, 0.3, solver=TIGHT)
    assert backwards.g[-1].item() == pytest.approx(transform.item(), abs=1e-9)


def test_a_forbidden_pair_carries_nothing():
    cost = problem(4, 4)[0].clone()
    cost[0, :2] = cost[3, 2] = math.inf
    found = sinkhorn(cost, eps=2.0, solver=TIGHT)
    assert found.converged and (found.plan[0, :2] == 0).all() and found.plan[3, 2] == 0
    scaled = (-cost / 2.0).exp()
    for _ in range(5000):
        scaled = scaled / (4 * scaled.sum(1, keepdim=True))
        scaled = scaled / (4 * scaled.sum(0))
    torch.testing.assert_close(found.plan, scaled, rtol=1e-8, atol=1e-12)
    assert found.linear.item() == pytest.approx((scaled * cost.nan_to_num(posinf=0.0)).sum().item())


def test_forbidden_pairs_that_leave_no_plan_are_reported():
    cost = torch.zeros(3, 3, dtype=torch.float64)
    cost[:2, :2] = math.inf  # two rows, of 2/3 of the mass, share one column of 1/3
    found = sinkhorn(cost, eps=1.0, solver=Solver(unconverged="ignore", max_iter=500))
    assert not found.converged and found.error > 0.1


def test_one_atom_gets_everything():
    cost, _, log_b = problem()
    found = sinkhorn(cost[:1], None, log_b, 0.3)
    torch.testing.assert_close(found.plan[0], log_b.exp(), rtol=1e-12, atol=0)
    assert found.value.item() == pytest.approx((cost[0] @ log_b.exp()).item())


def test_batches_broadcast_and_are_problems_one_by_one():
    costs = torch.stack([problem(seed=s)[0] for s in range(3)])
    log_a, log_b = weights(2, 1, 7), weights(3, 5, seed=2)
    eps = torch.tensor([[2.0, 0.3, 0.01], [1.0, 0.1, 0.5]], dtype=torch.float64)
    found = sinkhorn(costs, log_a, log_b, eps, solver=TIGHT)
    assert found.value.shape == found.converged.shape == (2, 3) and found.plan.shape == (2, 3, 7, 5)
    for i, j in ((0, 0), (0, 2), (1, 1)):
        alone = sinkhorn(costs[j], log_a[i, 0], log_b[j], eps[i, j].item(), solver=TIGHT)
        torch.testing.assert_close(found.plan[i, j], alone.plan, rtol=1e-8, atol=1e-12)
        assert found.linear[i, j].item() == pytest.approx(alone.linear.item(), rel=1e-9)
    shared = sinkhorn(costs[0], log_a[:, 0], log_b[:1], 0.3, solver=TIGHT)
    alone = sinkhorn(costs[0], log_a[1, 0], log_b[0], 0.3, solver=TIGHT)
    torch.testing.assert_close(shared.plan[1], alone.plan, rtol=1e-9, atol=1e-12)


def test_masses_other_than_one_scale_the_plan():
    cost, log_a, log_b = problem()
    more = sinkhorn(cost, log_a + math.log(3.0), log_b + math.log(3.0), 0.3, solver=TIGHT)
    one = sinkhorn(cost, log_a, log_b, 0.3, solver=TIGHT)
    torch.testing.assert_close(more.plan, 3 * one.plan, rtol=1e-9, atol=1e-12)
    product = 9 * log_a.exp()[:, None] * log_b.exp()
    expected = (more.plan * cost).sum() + 0.3 * kl(more.plan, product)
    assert more.value.item() == pytest.approx(expected.item())


def test_a_rounding_error_in_the_mass_is_no_obstacle():
    cost, log_a, log_b = problem()
    found = sinkhorn(cost, log_a + 0.004, log_b, 0.3)
    assert found.converged
    assert found.plan.sum().item() == pytest.approx(math.exp(0.002))


def test_the_averaged_map_solves_the_symmetric_problem_in_a_few_steps():
    x = cloud(60, 2)
    cost, log_a = torch.cdist(x, x).square(), weights(60)
    for eps in (0.5, 0.1, 0.02):
        found = self_sinkhorn(cost, log_a, eps, solver=Solver(tolerance=1e-9))
        assert found.iterations < 80 and torch.equal(found.f, found.g)
        expected = sinkhorn(cost, log_a, log_a, eps, solver=Solver(tolerance=1e-9))
        assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-8)


def test_half_precision_is_computed_in_float32():
    cost, log_a, log_b = (t.bfloat16() for t in problem())
    found = sinkhorn(cost, log_a, log_b, 0.3)
    assert found.value.dtype == found.plan.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": torch.zeros(0, 3)}, "an atom on each side"),
        ({"cost": torch.zeros(3)}, r"\[..., N, M\]"),
        ({"log_a": torch.zeros(3)}, "one weight an atom"),
        ({"log_a": torch.zeros(2)}, "equal mass, got 2 and 1"),
        ({"log_a": torch.full((2,), -math.inf)}, "no mass"),
        ({"log_a": torch.tensor([math.nan, 0.0]), "marginals": "balanced"}, "nan|mass"),
        ({"cost": torch.tensor([[1.0, math.nan], [0.0, 1.0]])}, "got -inf or nan"),
        ({"cost": torch.tensor([[1.0, -math.inf], [0.0, 1.0]])}, "got -inf or nan"),
        ({"cost": torch.tensor([[math.inf, math.inf], [0.0, 1.0]])}, "no allowed partner"),
        ({"cost": torch.tensor([[math.inf, 1.0], [math.inf, 1.0]])}, "no allowed partner"),
        ({"eps": 0.0}, "finite and > 0"),
        ({"eps": torch.tensor(1.0, requires_grad=True)}, "not differentiated"),
        ({"reference": "shannon"}, "got 'shannon'"),
        ({"grad": "autodiff"}, "got 'autodiff'"),
        ({"marginals": "free"}, "got 'free'"),
        ({"marginals": ("balanced",) * 3}, "a pair"),
        ({"start": (torch.zeros(3), torch.zeros(2))}, "3 potentials for 2 atoms"),
    ],
)
def test_what_cannot_be_solved_is_refused_with_a_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(**{"cost": torch.eye(2), **arguments})


@pytest.mark.parametrize(
    "options", [{"tolerance": 0.0}, {"max_iter": 0}, {"unconverged": "silent"}, {"annealed": 0.5}]
)
def test_solvers_out_of_range_are_refused_when_built(options):
    with pytest.raises(ValueError, match="got"):
        Solver(**options)


def test_the_symmetric_solver_refuses_a_cost_that_is_not():
    with pytest.raises(ValueError, match="symmetric"):
        self_sinkhorn(problem(5, 5)[0])
