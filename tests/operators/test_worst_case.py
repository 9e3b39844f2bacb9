"""min over p of E_p[v] + lam D(p, q): primal, dual, closed forms and limits."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize_scalar
from tests.test_divergences import ROWS
from tests.thinned import fewer, thinned

from fdiv import (
    JS,
    KL,
    TV,
    Generator,
    Pearson,
    Renyi,
    Reverse,
    ReverseKL,
    SkewReverseKL,
    SquaredHellinger,
    Triangular,
)
from fdiv.operators.softargmax import f_softargmax
from fdiv.operators.worst_case import worst_case

torch.set_num_threads(1)

CATALOGUE = [row.divergence for row in ROWS]
MEMBERS = list({type(d): d for d in CATALOGUE if d.is_smooth}.values())  # the last row of each
KINKED = [d for d in CATALOGUE if not d.is_smooth]
each_member = pytest.mark.parametrize("divergence", MEMBERS, ids=repr)
each_divergence = pytest.mark.parametrize("divergence", MEMBERS + KINKED, ids=repr)
each_kind = pytest.mark.parametrize(
    "divergence", [KL(), ReverseKL(), Pearson(), JS(0.3), TV(), KL() + TV()], ids=repr
)
VALUES = torch.tensor([0.3, 1.9, 0.8, 2.6, 1.1, 0.5], dtype=torch.float64)
LOG_Q = torch.tensor([0.05, 0.3, 0.15, 0.25, 0.2, 0.05], dtype=torch.float64).log()
BOTTOM = VALUES.min().item()


def expected(values, log_q):
    return (log_q.exp() * values).sum(-1)


def assert_close(actual, wanted, atol=1e-12):
    torch.testing.assert_close(actual, wanted, rtol=0.0, atol=atol)


# -- primal and dual -----------------------------------------------------------------------------------


def primal(divergence, values, log_q, lam):
    """The least E_p[v] + lam D(p, q) by Newton steps within the simplex, behind a barrier mu sum -log p."""
    p = q = log_q.exp()
    for mu in 10.0 ** -torch.arange(1.0, 13.0, 1.5):
        for _ in range(20):
            log_ratio = p.log() - log_q
            slope = values + lam * divergence.phi(log_ratio) - mu / p
            rise = lam * divergence.curvature(log_ratio) * q / p.square() + mu / p.square()
            step = -(slope - (slope / rise).sum() / (1 / rise).sum()) / rise
            p = p + step * (0.9 / (-step / p).amax().clamp(min=1e-12)).clamp(max=1.0)
            if (step / p).abs().max() < 1e-7:
                break
    return ((p * values).sum() + lam * divergence(p.log(), log_q)).item()


def dual(divergence, values, log_q, lam):
    """The largest eta - lam E_q f*((eta - v)/lam), by a search in eta alone."""

    def less(eta):
        slope = (eta - values) / lam
        return -(eta - lam * expected(divergence.conjugate(slope), log_q)).item()

    top = divergence.slope_at_infinity
    low = BOTTOM + lam * max(divergence.slope_at_zero, -100.0)
    high = BOTTOM + lam * top if math.isfinite(top) else values.max().item() + lam
    return -minimize_scalar(less, bounds=(low, high), method="bounded", options={"xatol": 1e-7}).fun


@pytest.mark.parametrize("divergence", thinned(MEMBERS), ids=repr)
def test_the_value_is_the_optimum_of_the_primal(divergence):
    value = worst_case(VALUES, LOG_Q, divergence, 0.7).value.item()
    assert value == pytest.approx(primal(divergence, VALUES, LOG_Q, 0.7), abs=1e-9)


@pytest.mark.parametrize("divergence", [KL(), ReverseKL(), Pearson(), JS(0.3)], ids=repr)
def test_the_value_is_the_optimum_of_the_dual(divergence):
    value = worst_case(VALUES, LOG_Q, divergence, 0.7).value.item()
    assert value == pytest.approx(dual(divergence, VALUES, LOG_Q, 0.7), abs=1e-9)


@pytest.mark.parametrize("divergence", thinned(MEMBERS + KINKED, 2), ids=repr)
def test_eta_and_the_distribution_certify_each_other(divergence):
    """No search: any p is an upper bound, any eta a lower one, and these two meet."""
    lam = 0.4
    values = VALUES * torch.tensor([[8.0], [1.0], [0.1], [0.004]])  # as lam = 0.05, 0.4, 4 and 100
    found = worst_case(values, LOG_Q, divergence, lam)
    p, eta = found.distribution, found.eta.unsqueeze(-1)
    assert (p >= 0).all()
    assert_close(p.sum(-1), torch.ones(4, dtype=torch.float64))
    above = (p * values).sum(-1) + lam * divergence(p.log(), LOG_Q)
    slope = (eta - values) / lam
    slope = slope.clamp(max=divergence.slope_at_infinity)  # a rounding above, for TV at its lowest value
    below = found.eta - lam * expected(divergence.conjugate(slope), LOG_Q)
    assert_close(found.value, above)
    assert_close(found.value, below, 1e-11)


def linear_programme(values, q, lam):
    """E_p[v] + lam/2 sum t, t >= |p - q|."""
    n = len(values)
    cost = np.r_[values, np.full(n, lam / 2)]
    rows = np.r_[np.c_[np.eye(n), -np.eye(n)], np.c_[-np.eye(n), -np.eye(n)]]
    return linprog(cost, rows, np.r_[q, -q], np.r_[np.ones(n), np.zeros(n)][None], [1.0]).fun


@pytest.mark.parametrize("lam", [0.01, 0.4, 1.5, 9.0])
@pytest.mark.parametrize("empty", [[], [0], [0, 2, 3]])
def test_total_variation_is_its_linear_programme_also_where_q_has_no_mass(lam, empty):
    q = LOG_Q.exp()
    q[empty] = 0.0
    q = q / q.sum()
    found = worst_case(VALUES, q.log(), TV(), lam)
    assert found.value.item() == pytest.approx(linear_programme(VALUES.numpy(), q.numpy(), lam), abs=1e-9)
    assert_close(found.value, (q * VALUES.clamp(max=BOTTOM + lam)).sum())
    assert worst_case(VALUES, q.log(), 0.5 * TV() + 1.5 * TV(), lam / 2).value == found.value


def test_the_bracket_finds_the_closed_form_of_total_variation():
    for lam in (0.05, 0.45, 1.5, 4.0):
        found, closed = (worst_case(VALUES, LOG_Q, d, lam) for d in (Reverse(TV()), TV()))
        assert_close(found.value, closed.value)
        assert_close(found.distribution, closed.distribution)


def test_where_the_kink_is_worth_more_than_the_values_nothing_moves():
    found = worst_case(VALUES, LOG_Q, KL() + 10 * TV(), lam=1.0)
    assert_close(found.distribution, LOG_Q.exp(), 1e-14)
    assert_close(found.value, expected(VALUES, LOG_Q), 1e-14)


# -- closed forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.1, 1.0, 20.0])
def test_kl_is_the_soft_minimum(lam):
    found = worst_case(VALUES, LOG_Q, KL(), lam)
    assert_close(found.value, -lam * (LOG_Q - VALUES / lam).logsumexp(-1))
    assert_close(found.distribution, (LOG_Q - VALUES / lam).softmax(-1))
    weighted = worst_case(VALUES, LOG_Q, 4.0 * KL(), lam / 4)
    assert_close(weighted.value, found.value)


@pytest.mark.parametrize("lam", [0.05, 0.3, 3.0])
def test_chi_square_takes_what_lies_above_a_level_away(lam):
    """The level a has E_q (a - v)_+ = 2 lam, or the mean of all where that is beyond the range."""
    level = VALUES.max() + (2 * lam - expected(VALUES.max() - VALUES, LOG_Q))
    if level < VALUES.max():
        low, high = BOTTOM, VALUES.max().item()
        for _ in range(200):
            level = torch.tensor((low + high) / 2, dtype=torch.float64)
            below = expected((level - VALUES).clamp(min=0), LOG_Q) < 2 * lam
            low, high = (level.item(), high) if below else (low, level.item())
    found = worst_case(VALUES, LOG_Q, Pearson(), lam)
    ratio = (level - VALUES).clamp(min=0) / (2 * lam)
    assert_close((found.distribution / LOG_Q.exp()), ratio, 1e-10)
    capped = VALUES.minimum(level)
    mean = expected(capped, LOG_Q)
    variance = expected((capped - mean).square(), LOG_Q)
    assert_close(found.value, mean - variance / (4 * lam), 1e-10)


# -- limits --------------------------------------------------------------------------------------------


@each_divergence
def test_a_small_lam_gives_the_least_value_and_a_large_one_the_mean(divergence):
    assert_close(worst_case(VALUES, LOG_Q, divergence, 1e-12).value, VALUES.min(), 1e-4)
    assert_close(worst_case(VALUES, LOG_Q, divergence, 1e9).value, expected(VALUES, LOG_Q), 1e-6)


@each_member
def test_the_price_of_robustness_begins_as_the_variance_over_twice_the_curvature(divergence):
    mean = expected(VALUES, LOG_Q)
    variance = expected((VALUES - mean).square(), LOG_Q)
    price = 1e4 * (mean - worst_case(VALUES, LOG_Q, divergence, 1e4).value)
    assert_close(price * 2 * divergence.curvature_at_one, variance, 2e-3)


def test_kl_and_total_variation_are_as_near_to_the_least_value_as_their_formulas_say():
    lam = 1e-3
    assert_close(worst_case(VALUES, LOG_Q, KL(), lam).value, BOTTOM - lam * LOG_Q[0])
    assert_close(worst_case(VALUES, LOG_Q, TV(), lam).value, BOTTOM + lam * (1 - LOG_Q[0].exp()))
    assert_close(worst_case(VALUES, LOG_Q, TV(), VALUES.max().item() - BOTTOM).value, expected(VALUES, LOG_Q))


# -- atoms without mass --------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [JS(0.3), SquaredHellinger(), Triangular(), JS(0.5) + TV()], ids=repr)
@pytest.mark.parametrize("lam", [0.05, 0.5, 5.0])
def test_a_bounded_price_lets_mass_leave_the_support(divergence, lam):
    q = torch.tensor([0.0, 0.3, 0.2, 0.4, 0.1, 0.0], dtype=torch.float64)
    found = worst_case(VALUES, q.log(), divergence, lam)
    p, slope = found.distribution, (found.eta - VALUES) / lam
    assert_close(found.value, (p * VALUES).sum() + lam * divergence(p.log(), q.log()), 1e-10)
    # eta is feasible where q has no mass either, and as good.
    assert (slope <= divergence.slope_at_infinity + 1e-12).all()
    inside = q > 0
    below = found.eta - lam * expected(divergence.conjugate(slope[inside]), q[inside].log())
    assert_close(found.value, below, 1e-10)
    assert p[5] == 0  # there the value is not the least
    assert (p[0] > 0) == (lam < 5)


@pytest.mark.parametrize("divergence", [KL(), Pearson(), SkewReverseKL(0.3).reverse], ids=repr)
def test_an_infinite_price_keeps_it_inside_and_infinite_values_leave_atoms_out(divergence):
    q = torch.tensor([0.0, 0.3, 0.2, 0.4, 0.1, 0.0], dtype=torch.float64)
    if math.isinf(divergence.slope_at_infinity):
        assert worst_case(VALUES, q.log(), divergence, 0.1).distribution[[0, 5]].sum() == 0
    padded = VALUES.clone()
    padded[[0, 5]] = math.inf
    for other in (divergence, TV(), JS(0.5), KL() + TV()):
        got = worst_case(padded, q.log(), other, 0.1)
        cut = worst_case(VALUES[1:5], q[1:5].log(), other, 0.1)
        assert_close(got.value, cut.value)
        assert_close(got.eta, cut.eta)
        assert_close(got.distribution[1:5], cut.distribution)


# -- derivatives ---------------------------------------------------------------------------------------


@each_kind
def test_the_derivative_in_the_values_is_the_worst_distribution(divergence):
    values = VALUES.clone().requires_grad_()
    found = worst_case(values, LOG_Q, divergence, 0.7)
    (slope,) = torch.autograd.grad(found.value, values)
    assert_close(slope, found.distribution.detach())
    steps = 1e-6 * torch.eye(6, dtype=torch.float64)
    moved = torch.cat([VALUES + steps, VALUES - steps])
    ahead, behind = worst_case(moved, LOG_Q, divergence, 0.7).value.chunk(2)
    assert_close((ahead - behind) / 2e-6, slope, 1e-7)


@each_kind
def test_the_derivative_in_the_reference_is_that_of_free_masses(divergence):
    """Steps that keep the sum of q; others would leave the probability vectors."""
    log_q = LOG_Q.clone().requires_grad_()
    (slope,) = torch.autograd.grad(worst_case(VALUES, log_q, divergence, 0.7).value, log_q)
    q = LOG_Q.exp()
    moves = torch.tensor([[1.0, -1, 0, 0, 0, 0], [0, 0, 1, 1, -2, 0]], dtype=torch.float64)
    moved = torch.cat([q + 1e-7 * moves, q - 1e-7 * moves]).log()
    ahead, behind = worst_case(VALUES, moved, divergence, 0.7).value.chunk(2)
    assert_close((ahead - behind) / 2e-7, moves @ (slope / q), 1e-6)


@pytest.mark.parametrize("divergence", [KL(), SquaredHellinger()], ids=repr)
def test_the_second_derivatives_are_right(divergence):
    values = VALUES.clone().requires_grad_()
    for log_q in (LOG_Q, torch.tensor([0.0, 0.3, 0.2, 0.4, 0.1, 0.0], dtype=torch.float64).log()):
        assert torch.autograd.gradcheck(lambda v, s=log_q: worst_case(v, s, divergence, 0.3).value, values)
        assert torch.autograd.gradgradcheck(
            lambda v, s=log_q: worst_case(v, s, divergence, 0.3).value, values
        )


# -- shapes, precision and hostile inputs ------------------------------------------------------------------


def test_the_minimiser_is_f_softargmax_at_minus_the_values():
    found = worst_case(VALUES, LOG_Q, JS(0.3), 0.4)
    assert_close(found.distribution, f_softargmax(-VALUES / 0.4, JS(0.3), LOG_Q))


@fewer(each_kind)
def test_rows_are_independent_broadcast_and_in_any_dimension(divergence):
    values, log_q = torch.stack([VALUES, VALUES.flip(0) * 3]), LOG_Q.roll(2)
    found = worst_case(values, log_q, divergence, 0.6)
    assert_close(found.value[1], worst_case(values[1], log_q, divergence, 0.6).value)
    turned = worst_case(values.T, log_q.unsqueeze(-1), divergence, 0.6, dim=0)
    assert_close(turned.value, found.value)
    assert_close(turned.distribution, found.distribution.T)
    assert worst_case(values[:0], log_q, divergence, 0.6).value.shape == (0,)
    assert_close(worst_case(values + 1e3, log_q, divergence, 0.6).value, found.value + 1e3, 1e-9)


@pytest.mark.parametrize("dtype", thinned([torch.float32, torch.float16, torch.bfloat16]))
@each_kind
def test_lower_precision_is_computed_in_float32(divergence, dtype):
    values, log_q = VALUES.to(dtype), LOG_Q.float()
    found = worst_case(values, log_q, divergence, 0.4)
    assert found.value.dtype == torch.float32
    exact = worst_case(values.double(), log_q.double().log_softmax(-1), divergence, 0.4).value
    assert found.value.item() == pytest.approx(exact.item(), abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "divergence",
    [KL(), ReverseKL(), Pearson(), JS(0.3), Triangular(), TV(), Reverse(TV())],
    ids=repr,
)
def test_extreme_values_and_references_give_finite_values_and_gradients(divergence, dtype):
    values = torch.tensor([[1e4, -1e4, 0.0, 3.0], [5.0, 5.0, 5.0, 5.0], [0.0, 1e4, 1e4, -1e4]], dtype=dtype)
    logits = torch.tensor([[0.0, -1e4, 2.0, 1.0], [0.0, -90.0, 1.0, -1e4], [0.0, 0.0, -200.0, -90.0]])
    values.requires_grad_()
    log_q = logits.to(dtype).log_softmax(-1).requires_grad_()
    for lam in (1e-3, 1e4):
        found = worst_case(values, log_q, divergence, lam)
        assert found.value.isfinite().all()
        assert found.distribution.isfinite().all()
        grads = torch.autograd.grad(found.value.sum(), (values, log_q))
        assert all(grad.isfinite().all() for grad in grads)
        assert_close(found.value[1], values[1, 0].detach(), 1e-3 if dtype == torch.float32 else 1e-9)


def test_what_cannot_be_solved_is_refused():
    for lam in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="lam is finite and > 0"):
            worst_case(VALUES, LOG_Q, KL(), lam)
    with pytest.raises(TypeError, match="worst_case takes an f-divergence"):
        worst_case(VALUES, LOG_Q, Renyi(2.0))
    for log_q in (LOG_Q + 1, torch.full_like(LOG_Q, -math.inf), LOG_Q * math.nan):
        with pytest.raises(ValueError, match="log_q is normalised"):
            worst_case(VALUES, log_q, KL())
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="values are finite"):
            worst_case(torch.cat([VALUES[:5], torch.tensor([bad])]), LOG_Q, KL())
    with pytest.raises(ValueError, match="values are finite"):
        worst_case(torch.tensor([1.0, -math.inf]), torch.tensor([0.0, -math.inf]), KL())


def flat_below_one(log_ratio):
    return log_ratio.expm1().clamp(min=0.0) ** 3


def test_an_f_that_is_flat_at_one_is_refused():
    with pytest.raises(TypeError, match="jumps or is flat"):
        worst_case(VALUES, LOG_Q, Generator(flat_below_one), 0.5)
