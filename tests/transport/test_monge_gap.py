"""The Monge gap: closed forms, its bounds around the exact one, and gradients."""

import math

import pytest
import torch
from tests.worlds import close, gradient

import fdiv
from fdiv.transport.costs import squared_distance
from fdiv.transport.monge_gap import MongeGap
from fdiv.transport.sinkhorn import Solver

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def turn(angle):
    return torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=DOUBLE
    )


def rings(points=12, radii=(0.5, 1.0, 1.7)):
    """A law that does not change when it is turned by a multiple of 2 pi / points."""
    angles = 2 * math.pi * torch.arange(points, dtype=DOUBLE) / points
    unit = torch.stack([angles.cos(), angles.sin()], -1)
    return torch.cat([radius * unit for radius in radii])


def exact_gap(x, y, cost=squared_distance):
    """By the linear programme."""
    ot = pytest.importorskip("ot")
    costs = cost(x, y)
    return costs.diagonal().mean().item() - ot.emd2([], [], costs.numpy())


def distance_to_the(power):
    return lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).norm(dim=-1) ** power


def angle_between(x, y):
    """1 - cos: blind to length."""
    x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
    return 1 - x @ y.mT


def within(gap, exact, eps, n):
    """What entropy does: exact + eps log n <= gap <= exact + 2 eps log n."""
    slack = 1e-5 * (1 + abs(exact))
    return exact + eps * math.log(n) - slack <= gap <= exact + 2 * eps * math.log(n) + slack


# -- closed forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_turn_of_a_round_law_costs_its_whole_way(steps):
    """2 (1 - cos phi) E|x|^2: the law is where it was, and could have stayed."""
    x, angle = rings(), 2 * math.pi * steps / 12
    closed = 2 * (1 - math.cos(angle)) * x.square().sum(-1).mean().item()
    assert exact_gap(x, x @ turn(angle).T) == pytest.approx(closed)
    assert within(MongeGap(0.02)(x, x @ turn(angle).T).item(), closed, 0.02, len(x))


def test_a_point_reflection_of_a_symmetric_law_costs_four_times_its_second_moment():
    half = normal(20, 3)
    x = torch.cat([half, -half])
    closed = 4 * x.square().sum(-1).mean().item()
    assert within(MongeGap(0.05)(x, -x).item(), closed, 0.05, len(x))


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.02])
def test_a_gradient_of_a_convex_function_has_no_gap_but_that_of_entropy(eps):
    """T = A x + b, A positive definite; the identity is one."""
    x, root = normal(30, 2), normal(2, 2, seed=1)
    for matrix in (root @ root.T + 0.1 * torch.eye(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)):
        y = x @ matrix + 3.0
        assert exact_gap(x, y) == pytest.approx(0, abs=1e-9)
        assert within(MongeGap(eps)(x, y).item(), 0.0, eps, len(x))


def test_affine_maps_of_gaussians_have_the_gap_of_their_closed_form():
    """E|x - Ax - b|^2 - W2^2(N, T#N), by Bures; of a sample up to its own error."""
    matrix, shift = (
        torch.tensor([[0.3, -1.1], [0.9, 0.4]], dtype=DOUBLE),
        torch.tensor([0.5, -1.0], dtype=DOUBLE),
    )
    still = torch.eye(2, dtype=DOUBLE) - matrix
    displacement = still.square().sum() + shift.square().sum()
    moved = matrix @ matrix.T
    bures = shift.square().sum() + 2 + moved.trace() - 2 * torch.linalg.eigvalsh(moved).sqrt().sum()
    x = normal(600, 2)
    eps = 0.01
    gap = MongeGap(eps)(x, x @ matrix.T + shift).item() - 1.5 * eps * math.log(len(x))
    assert gap == pytest.approx((displacement - bures).item(), rel=0.1)


# -- other costs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [distance_to_the(1.5), distance_to_the(1.0), angle_between])
def test_any_cost_has_a_gap_above_that_of_the_linear_programme(cost):
    x = normal(25, 2)
    for y in (normal(25, 2, seed=4), x @ turn(0.7).T):
        assert within(MongeGap(0.02, cost=cost)(x, y).item(), exact_gap(x, y, cost), 0.02, len(x))


def test_a_map_is_optimal_under_one_cost_and_not_under_another():
    """Points change their distance from the origin, in the wrong order, and keep their direction."""
    x = rings()
    y = x / x.square().sum(-1, keepdim=True)
    assert within(MongeGap(0.01, cost=angle_between)(x, y).item(), 0.0, 0.01, len(x))
    exact = exact_gap(x, y)
    assert exact > 1 and within(MongeGap(0.01)(x, y).item(), exact, 0.01, len(x))


# -- gradients, batches, weights --------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [None, distance_to_the(1.5)], ids=["squares", "1.5"])
def test_its_gradient_is_that_of_its_value(cost):
    x, y = normal(7, 2).requires_grad_(), normal(7, 2, seed=1).requires_grad_()
    gap = MongeGap(0.3, cost=cost, solver=Solver(tolerance=1e-12))
    assert torch.autograd.gradcheck(gap, (x, y), eps=1e-5, atol=1e-6)


def test_its_gradient_by_the_envelope_is_what_the_plan_says():
    """(1/n) d2 c(x_i, y_i) - sum_k P_ki d2 c(x_k, y_i); of squares 2 (P'x - x / n)_i."""
    x, y = normal(9, 2), normal(9, 2, seed=1).requires_grad_()
    eps = 0.2
    log_plan = _plan(squared_distance(x, y.detach()) / eps)
    expected = 2 * (log_plan.exp().T @ x - x / 9)
    close(gradient(MongeGap(eps, solver=Solver(tolerance=1e-12))(x, y), y).reshape(9, 2), expected, 1e-7)


def _plan(scaled):
    n = len(scaled)
    log_plan = -scaled
    for _ in range(5000):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True) - math.log(n)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True) - math.log(n)
    return log_plan


def test_batches_are_problems_of_their_own():
    x, y = normal(3, 8, 2), normal(3, 8, 2, seed=1)
    values = MongeGap(0.1)(x, y)
    assert values.shape == (3,)
    assert values[1].item() == pytest.approx(MongeGap(0.1)(x[1], y[1]).item(), rel=1e-6)


def test_a_point_without_weight_is_as_good_as_none():
    x, y = normal(6, 2), normal(6, 2, seed=1)
    log_a = normal(5, seed=2).log_softmax(-1)
    padded = torch.cat([log_a, torch.tensor([-math.inf], dtype=DOUBLE)])
    alone = MongeGap(0.1)(x[:5], y[:5], log_a)
    y = y.requires_grad_()
    value = MongeGap(0.1)(x, y, padded)
    assert value.item() == pytest.approx(alone.item(), rel=1e-6)
    slope = gradient(value, y).reshape(6, 2)
    assert slope.isfinite().all() and not slope[5].any()


def test_a_relative_eps_is_that_share_of_the_mean_cost_and_has_no_gradient():
    x, y = normal(8, 2), normal(8, 2, seed=1).requires_grad_()
    mean = squared_distance(x, y.detach()).mean().item()
    relative, fixed = MongeGap(0.1, relative=True)(x, y), MongeGap(0.1 * mean)(x, y)
    assert relative.item() == pytest.approx(fixed.item(), rel=1e-6)
    close(gradient(relative, y), gradient(fixed, y), 1e-5)


def test_the_units_of_the_points_are_nothing_to_a_relative_eps():
    x, y = normal(8, 2), normal(8, 2, seed=1)
    one, other = MongeGap(0.1, relative=True)(x, y), MongeGap(0.1, relative=True)(10 * x, 10 * y)
    assert other.item() == pytest.approx(100 * one.item(), rel=1e-5)


# -- edges ------------------------------------------------------------------------------------------------


def test_float32_and_bfloat16_points_are_close_to_float64():
    x, y = normal(20, 2), normal(20, 2, seed=1)
    exact = MongeGap(0.1)(x, y).item()
    assert MongeGap(0.1)(x.float(), y.float()).item() == pytest.approx(exact, rel=1e-4)
    halves = MongeGap(0.1)(x.bfloat16(), y.bfloat16())
    assert halves.dtype == torch.float32 and halves.item() == pytest.approx(exact, rel=2e-2)


def test_points_on_each_other_and_points_far_apart_have_finite_gradients():
    for scale in (0.0, 1e4):
        y = (scale * normal(6, 2)).requires_grad_()
        value = MongeGap(0.1, relative=scale > 0)(scale * normal(6, 2, seed=1), y)
        assert value.isfinite() and gradient(value, y).isfinite().all()


def test_clouds_that_are_not_paired_are_refused():
    with pytest.raises(ValueError, match="one image of each point"):
        MongeGap(0.1)(normal(4, 2), normal(5, 2))


@pytest.mark.parametrize(
    "arguments",
    [{"eps": 0.0}, {"eps": -1.0}, {"eps": math.nan}, {"relative": 1}, {"cost": 2}, {"solver": 1e-9}],
)
def test_parameters_out_of_range_are_refused_when_built(arguments):
    with pytest.raises((ValueError, TypeError), match="got"):
        MongeGap(**({"eps": 0.1} | arguments))


def test_its_notation_reads_back():
    gap = MongeGap(0.1, relative=True)
    assert fdiv.parse("MongeGap(eps=0.1, relative=True)", ["fdiv.transport.monge_gap"]) == gap
