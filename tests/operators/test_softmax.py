"""f_softmax: worked numbers, log-sum-exp, the derivatives of the envelope, and what holds of such maxima."""

import math

import pytest
import torch
from tests.test_divergences import ROWS
from tests.thinned import thinned
from torch import Tensor

from fdiv import JS, KL, TV, Alpha, Generator, Pearson, Renyi, ReverseKL, SquaredHellinger, f_softargmax
from fdiv.operators.softmax import f_softmax, regulariser

torch.set_num_threads(1)

SMOOTH = [row.divergence for row in ROWS if row.divergence.is_smooth]
each_smooth = pytest.mark.parametrize("divergence", SMOOTH, ids=repr)
each_kind = pytest.mark.parametrize(
    "divergence", [KL(), Alpha(1.5), Alpha(2.5), ReverseKL(), JS(0.3), SquaredHellinger()], ids=repr
)


def draw(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=source, dtype=torch.float64)


def assert_close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=atol)


THETA, LOG_Q = draw(3, 6, seed=1), draw(3, 6, seed=2)  # of any mass
PRIOR = LOG_Q.log_softmax(-1)


def test_the_worked_number_of_entmax():
    value = f_softmax(torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64), Alpha(1.5))
    assert_close(value, torch.tensor(-0.148961954, dtype=torch.float64), 1e-9)


def test_kl_is_log_sum_exp():
    assert_close(f_softmax(THETA, KL(), PRIOR), (THETA + PRIOR).logsumexp(-1))
    assert_close(f_softmax(THETA, KL()), THETA.logsumexp(-1) + 1 - 6)
    assert_close(f_softmax(THETA, 0.5 * KL(), PRIOR), 0.5 * (2 * THETA + PRIOR).logsumexp(-1))


@pytest.mark.parametrize("divergence", thinned(SMOOTH), ids=repr)
def test_it_is_the_objective_at_the_maximiser_and_the_dual_value(divergence):
    """<x, theta> - D(x, q), and tau + sum of q f*(theta - tau): tau is read off the best atom."""
    value, x = f_softmax(THETA, divergence, LOG_Q), f_softargmax(THETA, divergence, LOG_Q)
    scale = max(1.0, divergence.f_at_zero) if math.isfinite(divergence.f_at_zero) else 1.0
    assert_close(value, (x * THETA).sum(-1) - divergence(x.log(), LOG_Q), 1e-12 * scale)
    best = THETA.argmax(-1, keepdim=True)
    log_ratio = x.gather(-1, best).log() - LOG_Q.gather(-1, best)
    tau = THETA.gather(-1, best) - divergence.phi(log_ratio)
    slack = 1e-6 if isinstance(divergence, Generator) else 1e-10 * scale
    dual = tau.squeeze(-1) + (LOG_Q.exp() * divergence.conjugate(THETA - tau)).sum(-1)
    assert_close(value, dual, slack)


@each_smooth
def test_its_gradient_is_the_maximiser(divergence):
    theta = THETA.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f_softmax(theta, divergence, LOG_Q).sum(), theta)
    assert_close(grad, f_softargmax(THETA, divergence, LOG_Q))


@each_smooth
def test_its_gradient_in_the_reference_is_that_of_finite_differences(divergence):
    log_q, step = LOG_Q[0].clone().requires_grad_(), 1e-5
    (grad,) = torch.autograd.grad(f_softmax(THETA[0], divergence, log_q), log_q)
    steps = step * torch.eye(6, dtype=torch.float64)
    high, low = (f_softmax(THETA[0].expand(6, -1), divergence, LOG_Q[0] + s) for s in (steps, -steps))
    slack = 1e-6 if isinstance(divergence, Generator) else 1e-7
    assert_close(grad, (high - low) / (2 * step), 1e-3 if divergence == Alpha(1e-6) else slack)  # f(0) = 1e6


@each_kind
def test_a_constant_added_to_the_scores_is_added_to_it(divergence):
    assert_close(f_softmax(THETA + 7.5, divergence, LOG_Q), f_softmax(THETA, divergence, LOG_Q) + 7.5)


@each_kind
def test_it_is_convex_and_keeps_the_order_of_scores(divergence):
    a, b = draw(200, 6, seed=3), draw(200, 6, seed=4)
    between = f_softmax((a + b) / 2, divergence)
    assert (between <= (f_softmax(a, divergence) + f_softmax(b, divergence)) / 2 + 1e-12).all()
    x, order = f_softargmax(a, divergence), a.argsort(-1)
    assert (x.gather(-1, order).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("divergence", thinned([Alpha(1.5), KL(), JS(0.3)]), ids=repr)
def test_torch_finds_all_derivatives_right(divergence):
    given = (draw(1, 3, seed=5).requires_grad_(), draw(1, 3, seed=6).requires_grad_())

    def function(theta: Tensor, log_q: Tensor) -> Tensor:
        return f_softmax(theta, divergence, log_q)

    assert torch.autograd.gradcheck(function, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, given, check_fwd_over_rev=True)


@each_kind
def test_atoms_that_are_left_out_have_no_price(divergence):
    theta, log_q = THETA.clone(), PRIOR.clone()
    theta[:, 1], log_q[:, 3] = -math.inf, -math.inf
    theta.requires_grad_(), log_q.requires_grad_()
    left = [0, 2, 4, 5]
    value = f_softmax(theta, divergence, log_q)
    assert_close(value, f_softmax(THETA[:, left], divergence, PRIOR[:, left]))
    for grad in torch.autograd.grad(value.sum(), (theta, log_q)):
        assert grad.isfinite().all() and (grad[:, [1, 3]] == 0).all()


@each_kind
def test_large_scores_and_any_dimension(divergence):
    theta = 1e4 * THETA
    value = f_softmax(theta, divergence)
    assert ((value - theta.amax(-1)).abs() <= 1e-9 * theta.amax(-1).abs() + 100).all()
    assert_close(f_softmax(THETA.T, divergence, dim=0), f_softmax(THETA, divergence))
    with torch.autocast("cpu", torch.bfloat16):
        low = f_softmax(THETA.bfloat16(), divergence)
    torch.testing.assert_close(low, f_softmax(THETA.bfloat16().float(), divergence), rtol=0.0, atol=0.0)


def test_atoms_without_probability_leave_no_rounding():
    """A vocabulary of which three atoms are held: the regulariser is that of the three."""
    x, q = torch.zeros(1, 50_000), torch.zeros(1, 1).expand(1, 50_000)
    x[0, :3] = torch.tensor([0.5, 0.25, 0.25])
    for divergence in (Alpha(1.5), Pearson()):
        few = regulariser(x[:, :3].double(), q[:, :3].double(), divergence)
        assert_close(regulariser(x, q, divergence).double(), few, 1e-6)


def test_what_it_does_not_take():
    with pytest.raises(TypeError, match="f_softmax takes an f-divergence"):
        f_softmax(THETA, Renyi(2.0))
    with pytest.raises(TypeError, match="jumps or is flat"):
        f_softmax(THETA, TV())
    with pytest.raises(ValueError, match="has no atom"):
        f_softmax(torch.full((2,), -math.inf), Alpha(1.5))
