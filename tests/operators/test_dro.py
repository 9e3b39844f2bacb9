"""max over w of E_w[losses] near p: primal solvers, duals, closed forms and limits."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize, minimize_scalar
from tests.thinned import fewer, thinned

from fdiv import (
    JS,
    KL,
    TV,
    Alpha,
    Neyman,
    Pearson,
    Renyi,
    Reverse,
    ReverseKL,
    SquaredHellinger,
    Triangular,
)
from fdiv.operators.dro import constrained, cvar, penalised
from fdiv.operators.worst_case import worst_case

torch.set_num_threads(1)

# f(u), written here once more, and not by the code under test.
F = {
    KL(): lambda u: u * np.log(u) - u + 1,
    ReverseKL(): lambda u: -np.log(u) + u - 1,
    Pearson(): lambda u: (u - 1) ** 2,
    Neyman(): lambda u: (u - 1) ** 2 / u,
    Alpha(1.5): lambda u: (u**1.5 - 1 - 1.5 * (u - 1)) / 0.75,
    Alpha(3.0): lambda u: (u**3 - 1 - 3 * (u - 1)) / 6,
    JS(0.5): lambda u: 0.5 * (u * np.log(2 * u / (1 + u)) + np.log(2 / (1 + u))),
    SquaredHellinger(): lambda u: (np.sqrt(u) - 1) ** 2 / 2,
    Triangular(): lambda u: (u - 1) ** 2 / (u + 1),
}
each_member = pytest.mark.parametrize("divergence", F, ids=repr)
LOSSES = torch.tensor([0.2, 1.5, 0.7, 3.0, 0.1, 0.9], dtype=torch.float64)
UNIFORM = torch.full((6,), 1 / 6, dtype=torch.float64).log()
LOG_P = torch.tensor([0.05, 0.3, 0.15, 0.1, 0.2, 0.2], dtype=torch.float64).log()


def mean(losses, log_p):
    return (log_p.exp() * losses).sum(-1)


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def assert_close(actual, wanted, atol=1e-12):
    torch.testing.assert_close(actual, wanted, rtol=0.0, atol=atol)


# -- primal --------------------------------------------------------------------------------------------


def by_slsqp(divergence, rho=None, lam=None):
    """The largest E_w[losses] (- lam D) over the simplex (with D <= rho)."""
    losses, p = LOSSES.numpy(), LOG_P.exp().numpy()

    def distance(w):
        return (p * F[divergence](w / p)).sum()

    constraints = [{"type": "eq", "fun": lambda w: w.sum() - 1}]
    if rho is not None:
        constraints.append({"type": "ineq", "fun": lambda w: rho - distance(w)})
    found = minimize(
        lambda w: -(w * losses).sum() + (lam * distance(w) if lam else 0.0),
        p,
        bounds=[(1e-10, 1)] * 6,
        constraints=constraints,
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return -found.fun


def by_linprog(bounds, equalities=None, rows=None, limits=None, cost=None):
    cost = -LOSSES.numpy() if cost is None else cost
    first = np.r_[np.ones(6), np.zeros(len(cost) - 6)][None]
    return -linprog(cost, rows, limits, first, [1.0], bounds=bounds).fun


@pytest.mark.parametrize("rho", thinned([0.15, 0.02]))
@each_member
def test_the_constrained_value_is_the_optimum_of_the_primal(divergence, rho):
    found = constrained(LOSSES, divergence, rho, LOG_P)
    assert found.value.item() == pytest.approx(by_slsqp(divergence, rho=rho), abs=1e-6)
    assert_close(found.weights.sum(), number(1.0))
    assert_close(divergence(found.weights.log(), LOG_P), number(rho), 1e-9)
    assert_close(mean(LOSSES, found.weights.log()), found.value)


@each_member
def test_the_penalised_value_is_the_optimum_of_the_primal(divergence):
    found = penalised(LOSSES, divergence, 1.7, LOG_P)
    assert found.value.item() == pytest.approx(by_slsqp(divergence, lam=1.7), abs=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.4, 0.93, 1.0])
def test_cvar_is_its_linear_programme(share):
    found = cvar(LOSSES, share, LOG_P)
    wanted = by_linprog([(0, mass / share) for mass in LOG_P.exp().tolist()])
    assert found.value.item() == pytest.approx(wanted, abs=1e-12)
    eta = found.multiplier
    assert_close(eta + mean((LOSSES - eta).clamp(min=0), LOG_P) / share, found.value)


@pytest.mark.parametrize("rho", [0.01, 0.25, 0.7, 0.9, 1.5])
@pytest.mark.parametrize("empty", [[], [0], [3]])
def test_total_variation_is_its_linear_programme_also_where_p_has_no_mass(rho, empty):
    p = LOG_P.exp()
    p[empty] = 0.0
    p = p / p.sum()
    found = constrained(LOSSES, TV(), rho, p.log())
    eye = np.eye(6)
    rows = np.r_[np.c_[eye, -eye], np.c_[-eye, -eye], np.r_[np.zeros(6), np.full(6, 0.5)][None]]
    wanted = by_linprog(None, rows=rows, limits=np.r_[p, -p, rho], cost=np.r_[-LOSSES.numpy(), np.zeros(6)])
    assert found.value.item() == pytest.approx(wanted, abs=1e-9)
    assert TV()(found.weights.log(), p.log()) <= rho + 1e-12
    assert_close(constrained(LOSSES, 0.5 * TV() + 1.5 * TV(), 2 * rho, p.log()).value, found.value)


# -- duals and closed forms ----------------------------------------------------------------------------


def test_the_worked_numbers():
    assert_close(cvar(LOSSES, 0.4).value, number(2.025))
    for divergence, rho, wanted in (
        (TV(), 0.25, 1.7833),
        (KL(), 0.3, 1.89568),
        (Alpha(2.0), 0.3, 1.82649),  # 1/2 (u - 1)^2
        (Pearson(), 0.6, 1.82649),
        (0.5 * Pearson(), 0.3, 1.82649),
    ):
        assert constrained(LOSSES, divergence, rho).value.item() == pytest.approx(
            wanted, abs=6e-5 if divergence == TV() else 6e-6
        )


@pytest.mark.parametrize("k", [1.2, 1.5, 2.0, 3.0, 7.0])
@pytest.mark.parametrize("rho", [1e-3, 0.2, 0.6])
def test_alpha_is_the_dual_of_cressie_and_read(k, rho):
    power, p = k / (k - 1), LOG_P.exp()

    def dual(eta):
        moment = (p * (LOSSES - eta).clamp(min=0) ** power).sum() ** (1 / power)
        return ((1 + k * (k - 1) * rho) ** (1 / k) * moment + eta).item()

    wanted = minimize_scalar(dual, bounds=(-400.0, 3.0), method="bounded", options={"xatol": 1e-10}).fun
    assert constrained(LOSSES, Alpha(k), rho, LOG_P).value.item() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("divergence", [KL(), Alpha(2.0), JS(0.5), SquaredHellinger()], ids=repr)
@pytest.mark.parametrize("rho", thinned([0.2, 0.01]))
def test_the_multiplier_solves_the_dual_and_is_the_derivative_in_rho(divergence, rho):
    found = constrained(LOSSES, divergence, rho, LOG_P)
    lam = found.multiplier.item()

    def dual(lam):
        return lam * rho + penalised(LOSSES, divergence, lam, LOG_P).value.item()

    assert dual(lam) == pytest.approx(found.value.item(), abs=1e-9)
    assert min(dual(0.99 * lam), dual(1.01 * lam)) > found.value.item()
    assert_close(penalised(LOSSES, divergence, lam, LOG_P).weights, found.weights, 1e-8)
    ahead, behind = (constrained(LOSSES, divergence, rho + h, LOG_P).value for h in (1e-6, -1e-6))
    assert ((ahead - behind) / 2e-6).item() == pytest.approx(lam, rel=1e-5)


@pytest.mark.parametrize("rho", [0.05, 0.3])
def test_the_multiplier_of_total_variation_is_the_derivative_in_rho(rho):
    lam = constrained(LOSSES, TV(), rho).multiplier
    ahead, behind = (constrained(LOSSES, TV(), rho + h).value for h in (1e-6, -1e-6))
    assert_close((ahead - behind) / 2e-6, lam, 1e-8)


def test_chi_square_is_the_mean_and_a_deviation_while_all_weights_are_positive():
    average = mean(LOSSES, LOG_P)
    deviation = mean((LOSSES - average).square(), LOG_P).sqrt()
    for rho in (1e-6, 0.05):
        found = constrained(LOSSES, Pearson(), rho, LOG_P)
        assert (found.weights > 0).all()
        assert_close(found.value, average + math.sqrt(rho) * deviation)
        assert_close(found.multiplier, deviation / (2 * math.sqrt(rho)), 1e-8)


@pytest.mark.parametrize("lam", [0.05, 1.0, 30.0])
def test_penalised_kl_is_the_tilted_mean(lam):
    found = penalised(LOSSES, KL(), lam, LOG_P)
    assert_close(found.value, lam * (LOG_P + LOSSES / lam).logsumexp(-1))
    assert_close(found.weights, (LOG_P + LOSSES / lam).softmax(-1))
    assert_close(found.multiplier, found.value, 1e-10)  # f' = log u


@each_member
def test_penalised_is_the_worst_case_of_the_gains(divergence):
    found, other = penalised(LOSSES, divergence, 0.8, LOG_P), worst_case(-LOSSES, LOG_P, divergence, 0.8)
    assert torch.equal(found.value, -other.value) and torch.equal(found.weights, other.distribution)


# -- limits --------------------------------------------------------------------------------------------


@fewer(each_member)
def test_no_radius_gives_the_mean_and_a_large_one_the_largest_loss(divergence):
    still = constrained(LOSSES, divergence, 0.0, LOG_P)
    assert_close(still.value, mean(LOSSES, LOG_P))
    assert_close(still.weights, LOG_P.exp())
    assert still.multiplier == math.inf
    assert_close(constrained(LOSSES, divergence, 1e-14, LOG_P).value, still.value, 1e-5)
    for rho in (1e4, math.inf):
        free = constrained(LOSSES, divergence, rho, LOG_P)
        assert_close(free.value, LOSSES.max(), 1e-3 if math.isinf(divergence.f_at_zero) else 1e-12)


@each_member
def test_at_a_small_radius_the_value_rises_by_the_deviation(divergence):
    rho, average = 1e-8, mean(LOSSES, LOG_P)
    variance = mean((LOSSES - average).square(), LOG_P)
    rise = constrained(LOSSES, divergence, rho, LOG_P).value - average
    assert_close(rise / (2 * rho * variance / divergence.curvature_at_one).sqrt(), number(1.0), 1e-3)


def test_the_radius_at_which_all_mass_is_on_the_largest_loss_is_found():
    free = -math.log(0.1)  # KL of the one atom with p = 0.1
    assert constrained(LOSSES, KL(), free + 1e-9, LOG_P).multiplier == 0
    near = constrained(LOSSES, KL(), free - 1e-3, LOG_P)
    assert near.multiplier > 0 and near.value < 3
    tied = torch.where(LOSSES == 1.5, 3.0, LOSSES)
    weights = constrained(tied, KL(), 5.0, LOG_P).weights
    assert_close(weights[[1, 3]], torch.tensor([0.75, 0.25], dtype=torch.float64))


def test_equal_losses_leave_everything_as_it_is():
    for divergence in (KL(), Alpha(3.0), JS(0.5), TV()):
        found = constrained(torch.full((6,), 2.0).double(), divergence, 0.1, LOG_P)
        assert_close(found.value, number(2.0))
        assert found.multiplier == 0
    assert_close(constrained(LOSSES[:1], KL(), 0.1).weights, torch.ones(1).double())


def test_many_powers_approach_cvar():
    """D_k <= rho bounds E u^k: with u <= 1/share at k -> inf."""
    share, k = 0.4, 400.0
    rho = (share ** -(k - 1) - 1) / (k * (k - 1))
    assert_close(constrained(LOSSES, Alpha(k), rho).value, cvar(LOSSES, share).value, 0.02)


# -- atoms without mass, and kinks ---------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [SquaredHellinger(), Triangular()], ids=repr)
def test_a_bounded_price_lets_mass_leave_the_support_of_p(divergence):
    p = torch.tensor([0.2, 0.3, 0.3, 0.0, 0.1, 0.1], dtype=torch.float64)
    found = constrained(LOSSES, divergence, 0.2, p.log())
    assert found.weights[3] > 0
    assert_close(divergence(found.weights.log(), p.log()), number(0.2), 1e-9)
    # No direction that keeps D to first order gains: gradients are parallel.
    slope = divergence.phi((found.weights / p).log())
    gain = LOSSES - found.multiplier * slope
    assert_close(gain, gain[3].expand(6), 1e-7)
    assert_close(constrained(LOSSES, divergence, divergence.bound, p.log()).value, LOSSES.max())


@pytest.mark.parametrize("divergence", [KL(), Alpha(2.0)], ids=repr)
def test_an_infinite_price_keeps_mass_inside_and_infinite_losses_leave_atoms_out(divergence):
    p = torch.tensor([0.2, 0.3, 0.3, 0.0, 0.1, 0.1], dtype=torch.float64)
    rest = [0, 1, 2, 4, 5]
    padded = LOSSES.clone()
    padded[3] = -math.inf
    for rho in (0.1, 9.0):
        cut = constrained(LOSSES[rest], divergence, rho, p[rest].log())
        for losses in (LOSSES, padded):
            found = constrained(losses, divergence, rho, p.log())
            assert found.weights[3] == 0
            assert_close(found.value, cut.value)
    cut = constrained(LOSSES[rest], JS(0.5), 0.1, p[rest].log())
    assert_close(constrained(padded, JS(0.5), 0.1, p.log()).value, cut.value)


@pytest.mark.slow
def test_where_f_is_straight_the_weights_are_mixed():
    losses, log_p = LOSSES[[0, 1, 3]], torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    found, closed = (constrained(losses, divergence, 0.25, log_p) for divergence in (Reverse(TV()), TV()))
    assert_close(found.value, closed.value, 1e-7)
    assert_close(found.weights, closed.weights, 1e-6)


# -- derivatives, shapes, precision, refusals ------------------------------------------------------------


@pytest.mark.parametrize("divergence", [KL(), ReverseKL(), Pearson(), JS(0.5), TV()], ids=repr)
def test_the_derivative_in_the_losses_is_the_weights(divergence):
    for robust in (
        lambda x: constrained(x, divergence, 0.15, LOG_P),
        lambda x: penalised(x, divergence, 0.7, LOG_P),
        lambda x: cvar(x, 0.45, LOG_P),
    ):
        losses = LOSSES.clone().requires_grad_()
        found = robust(losses)
        (slope,) = torch.autograd.grad(found.value, losses)
        assert_close(slope, found.weights.detach())
        steps = 1e-5 * torch.eye(6, dtype=torch.float64)
        ahead, behind = robust(torch.cat([LOSSES + steps, LOSSES - steps])).value.chunk(2)
        assert_close((ahead - behind) / 2e-5, slope, 1e-6)


def test_the_constrained_value_refuses_a_second_derivative():
    losses = LOSSES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(constrained(losses, KL(), 0.2).value.square(), losses, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), SquaredHellinger(), TV()], ids=repr)
def test_rows_are_independent_and_in_any_dimension(divergence):
    losses = torch.stack([LOSSES, 5 * LOSSES.flip(0), torch.full_like(LOSSES, 0.3)])
    for robust in (
        lambda x, p, dim: constrained(x, divergence, 0.2, p, dim),
        lambda x, p, dim: penalised(x, divergence, 0.6, p, dim),
        lambda x, p, dim: cvar(x, 0.3, p, dim),
    ):
        found = robust(losses, LOG_P, -1)
        for row in range(3):
            assert_close(found.value[row], robust(losses[row], LOG_P, -1).value, 1e-10)
        turned = robust(losses.T, LOG_P.unsqueeze(-1), 0)
        assert_close(turned.value, found.value)
        assert_close(turned.weights, found.weights.T)
        assert_close(robust(losses + 1e3, LOG_P, -1).value, found.value + 1e3, 1e-8)
        assert_close(robust(losses, None, -1).value, robust(losses, UNIFORM, -1).value)


@pytest.mark.parametrize("dtype", thinned([torch.float32, torch.float16, torch.bfloat16]))
@pytest.mark.parametrize("divergence", [KL(), ReverseKL(), Alpha(1.5), JS(0.5), TV()], ids=repr)
def test_lower_precision_is_computed_in_float32(divergence, dtype):
    losses = LOSSES.to(dtype)
    found = constrained(losses, divergence, 0.2)
    exact = constrained(losses.double(), divergence, 0.2).value
    assert found.value.dtype == torch.float32
    assert found.value.item() == pytest.approx(exact.item(), abs=1e-5)


@pytest.mark.parametrize("dtype", thinned([torch.float32, torch.float64]))
@pytest.mark.parametrize("divergence", [KL(), ReverseKL(), Pearson(), Alpha(1.5), JS(0.3), TV()], ids=repr)
def test_extreme_losses_and_references_give_finite_values_and_gradients(divergence, dtype):
    losses = torch.tensor([[1e4, -1e4, 0.0, 3.0], [5.0, 5.0, 5.0, 5.0], [0.0, 1e4, 1e4, -1e4]], dtype=dtype)
    losses.requires_grad_()
    logits = torch.tensor([[0.0, -1e4, 2.0, 1.0], [0.0, -90.0, 1.0, -1e4], [0.0, 0.0, -200.0, -90.0]])
    log_p = logits.to(dtype).log_softmax(-1)
    for rho in (1e-6, 0.3, 1e3):
        found = constrained(losses, divergence, rho, log_p)
        assert found.value.isfinite().all() and found.weights.isfinite().all()
        (slope,) = torch.autograd.grad(found.value.sum(), losses)
        assert slope.isfinite().all()
        assert_close(found.weights.sum(-1), torch.ones(3, dtype=dtype), 1e-5)
        assert_close(found.value[1], torch.tensor(5.0, dtype=dtype), 1e-5)


def test_what_cannot_be_solved_is_refused():
    for rho in (-1.0, math.nan):
        with pytest.raises(ValueError, match="rho"):
            constrained(LOSSES, KL(), rho)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="share"):
            cvar(LOSSES, share)
    with pytest.raises(ValueError, match="lam"):
        penalised(LOSSES, KL(), 0.0)
    with pytest.raises(TypeError, match="f-divergence"):
        constrained(LOSSES, Renyi(2.0), 0.1)  # pyright: ignore[reportArgumentType]
    for robust in (lambda x, p: constrained(x, KL(), 0.1, p), lambda x, p: cvar(x, 0.5, p)):
        with pytest.raises(ValueError, match="log_p is normalised"):
            robust(LOSSES, LOG_P + 1)
        with pytest.raises(ValueError, match="losses are finite"):
            robust(LOSSES * math.nan, LOG_P)
        with pytest.raises(ValueError, match="no derivative in log_p"):
            robust(LOSSES, LOG_P.clone().requires_grad_())
        with pytest.raises(ValueError, match="at least one atom"):
            robust(LOSSES[:0], None)
