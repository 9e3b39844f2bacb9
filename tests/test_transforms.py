"""Renyi and AlphaBeta, the divergences of densities that are no f-divergence."""

import math

import pytest
import torch
from torch import Tensor

import fdiv
from fdiv import AlphaBeta, Renyi

INF = math.inf
EXPONENTS = [
    (0.2, 0.7), (0.5, 0.5), (1.0, 1.0), (2.0, -1.0), (-1.0, 2.0), (0.3, -0.1), (-0.1, 0.3),
    (-0.5, -0.3), (-1.0, 0.4), (0.4, -1.0),
]  # fmt: skip
LIMITS = [(0.0, 0.7), (0.7, 0.0), (1.0, 0.0), (0.0, 1.0), (0.6, -0.6), (-0.6, 0.6), (0.0, 0.0)]
ORDERS = [0.3, 0.999, 1.0, 1.001, 2.0, 8.0]


def rows(*shape: int, scale: float = 1.0, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    draw = scale * torch.randn(2, *shape, generator=generator, dtype=dtype)
    return draw.log_softmax(-1).unbind(0)


def alpha_beta(p: Tensor, q: Tensor, a: float, b: float) -> Tensor:
    """The paper's formula and its limits, each written out."""
    s = a + b
    if a == b == 0:
        terms = (p.log() - q.log()).square() / 2
    elif a == 0:
        terms = (q**b * (q**b / p**b).log() - q**b + p**b) / b**2
    elif b == 0:
        terms = (p**a * (p**a / q**a).log() - p**a + q**a) / a**2
    elif s == 0:
        terms = (a * (q / p).log() + (p / q) ** a - 1) / a**2
    else:
        terms = -(p**a * q**b - a / s * p**s - b / s * q**s) / (a * b)
    return terms.sum(-1)


def renyi(p: Tensor, q: Tensor, a: float) -> Tensor:
    if a == 1:
        return (p * (p / q).log()).sum(-1)
    return (p**a * q ** (1 - a)).sum(-1).log() / (a - 1)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS + LIMITS)
def test_alpha_beta_is_its_formula_and_its_limits(alpha, beta):
    log_p, log_q = rows(5, 6)
    expected = alpha_beta(log_p.exp(), log_q.exp(), alpha, beta)
    torch.testing.assert_close(AlphaBeta(alpha, beta)(log_p, log_q), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), LIMITS)
@pytest.mark.parametrize("step", [(1e-9, 0.0), (0.0, -1e-9), (1e-9, 1e-9), (-1e-12, 2e-12)])
def test_alpha_beta_is_continuous_at_its_limits(alpha, beta, step):
    log_p, log_q = rows(5, 6)
    nearby = AlphaBeta(alpha + step[0], beta + step[1])(log_p, log_q)
    torch.testing.assert_close(nearby, AlphaBeta(alpha, beta)(log_p, log_q), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("alpha", "beta", "value"),
    [
        (0.2, 0.7, 0.619750576), (0.5, 0.5, 0.519932163), (1, 1, 0.16), (0, 0.7, 0.823331252),
        (0.6, -0.6, 1.723356130), (0, 0, 1.898619677),
    ],
)  # fmt: skip
def test_alpha_beta_takes_the_reference_values(alpha, beta, value):
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    assert AlphaBeta(alpha, beta)(p.log(), q.log()).item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    ("exponents", "divergence"),
    [((1, 0), fdiv.KL()), ((0, 1), fdiv.ReverseKL()), ((0.3, 0.7), fdiv.Alpha(0.3))],
)
def test_alpha_beta_of_sum_one_is_the_alpha_family(exponents, divergence):
    log_p, log_q = rows(5, 6)
    log_p[0, 2] = -INF
    torch.testing.assert_close(AlphaBeta(*exponents)(log_p, log_q), divergence(log_p, log_q))


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS + LIMITS)
def test_alpha_beta_is_exactly_zero_at_equality_with_zero_slope(alpha, beta):
    log_p = rows(5, 6, dtype=torch.float32)[0]
    log_q = log_p.clone().requires_grad_()
    value = AlphaBeta(alpha, beta)(log_p, log_q)
    assert torch.equal(value, torch.zeros(5))
    assert torch.autograd.grad(value.sum(), log_q)[0].abs().max() == 0


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS + LIMITS)
def test_alpha_beta_keeps_its_digits_close_to_equality(alpha, beta):
    log_p, noise = rows(5, 40, dtype=torch.float32)
    log_q = log_p + 1e-4 * noise.sin()
    value = AlphaBeta(alpha, beta)(log_p, log_q)
    exact = AlphaBeta(alpha, beta)(log_p.double(), log_q.double())
    assert (value > 0).all()
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS + LIMITS)
def test_alpha_beta_gradients_are_those_of_the_value(alpha, beta):
    log_p, log_q = (t.requires_grad_() for t in rows(2, 4))
    assert torch.autograd.gradcheck(AlphaBeta(alpha, beta), (log_p, log_q))


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS + LIMITS)
def test_alpha_beta_on_peaked_float32_rows_is_never_nan_nor_negative(alpha, beta):
    log_p, log_q = (t.requires_grad_() for t in rows(32, 300, scale=30.0, dtype=torch.float32))
    value = AlphaBeta(alpha, beta)(log_p, log_q)
    assert (value >= 0).all()  # false for nan
    exact = AlphaBeta(alpha, beta)(log_p.double(), log_q.double())
    finite = exact < 1e30
    torch.testing.assert_close(value[finite].double(), exact[finite], rtol=1e-3, atol=1e-6)
    for gradient in torch.autograd.grad(value.sum(), (log_p, log_q)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS + LIMITS)
def test_alpha_beta_of_an_empty_atom_is_the_limit_of_a_small_one(alpha, beta):
    divergence = AlphaBeta(alpha, beta)
    whole = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    for small in (-INF, -300.0):
        partial = torch.tensor([0.0, small], dtype=torch.float64).requires_grad_()
        values = torch.stack([divergence(partial, whole), divergence(whole, partial)])
        if small == -INF:
            at_zero = values
            gradient = torch.autograd.grad(values[values.isfinite()].sum(), partial, allow_unused=True)
            assert gradient[0] is None or gradient[0].isfinite().all()
    large = values > 50  # -300 is not yet -inf: powers have exploded, logarithms only grow
    assert (at_zero[large] == INF).all()
    torch.testing.assert_close(at_zero[~large], values[~large], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS + LIMITS)
def test_alpha_beta_of_disjoint_supports_is_finite_only_for_positive_exponents(alpha, beta):
    p, q = torch.tensor([0.0, -INF, -INF]), torch.tensor([-INF, 0.0, -INF])
    value = AlphaBeta(alpha, beta)(p, q).item()
    if alpha > 0 and beta > 0:
        assert value == pytest.approx(1 / (alpha * beta))
    else:
        assert value == INF


@pytest.mark.parametrize("alpha", ORDERS)
def test_renyi_is_its_formula(alpha):
    log_p, log_q = rows(5, 6)
    torch.testing.assert_close(Renyi(alpha)(log_p, log_q), renyi(log_p.exp(), log_q.exp(), alpha))


@pytest.mark.parametrize("alpha", [1 - 1e-9, 1 + 1e-9])
def test_renyi_is_continuous_at_kl(alpha):
    log_p, log_q = rows(5, 6)
    torch.testing.assert_close(Renyi(alpha)(log_p, log_q), fdiv.KL()(log_p, log_q), rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", ORDERS)
def test_renyi_keeps_its_digits_close_to_equality(alpha):
    log_p, noise = rows(5, 40, dtype=torch.float32)
    log_q = (log_p + 1e-3 * noise.sin()).double().log_softmax(-1).float()
    value, exact = Renyi(alpha)(log_p, log_q), Renyi(alpha)(log_p.double(), log_q.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=0)
    assert torch.equal(Renyi(alpha)(log_p, log_p), torch.zeros(5))


@pytest.mark.parametrize("alpha", ORDERS)
def test_renyi_gradients_are_those_of_the_value(alpha):
    log_p, log_q = (t.requires_grad_() for t in rows(3, 4))
    through_softmax = lambda a, b: Renyi(alpha)(a.log_softmax(-1), b.log_softmax(-1))  # noqa: E731
    assert torch.autograd.gradcheck(through_softmax, (log_p, log_q))


@pytest.mark.parametrize("alpha", ORDERS)
def test_renyi_on_peaked_float32_rows_is_finite_with_its_gradient(alpha):
    log_p, log_q = (t.requires_grad_() for t in rows(32, 300, scale=30.0, dtype=torch.float32))
    value = Renyi(alpha)(log_p, log_q)
    exact = Renyi(alpha)(log_p.double(), log_q.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4)
    for gradient in torch.autograd.grad(value.sum(), (log_p, log_q)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", ORDERS)
def test_renyi_of_an_empty_atom_is_finite_where_it_should_be(alpha):
    p = torch.tensor([0.0, -INF, -INF], requires_grad=True)
    q = torch.tensor([-0.5, math.log(1 - math.exp(-0.5)), -INF], requires_grad=True)
    value = Renyi(alpha)(p, q)  # log(1^alpha e^(-(1 - alpha)/2)) / (alpha - 1)
    assert value.item() == pytest.approx(0.5, abs=1e-4)
    for gradient in torch.autograd.grad(value, (p, q)):
        assert gradient.isfinite().all()
    back = Renyi(alpha)(q, p).item()
    assert back == (pytest.approx(alpha / (1 - alpha) / 2, rel=1e-3) if alpha < 1 else INF)


@pytest.mark.parametrize("alpha", ORDERS)
def test_renyi_of_disjoint_supports_is_infinite_and_not_nan(alpha):
    p, q = torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0])
    assert Renyi(alpha)(p, q).item() == INF


@pytest.mark.parametrize("alpha", ORDERS)
def test_the_first_variation_of_renyi_is_the_change_of_its_value(alpha):
    log_p, log_q = rows(6)
    divergence = Renyi(alpha)
    in_p, in_q = divergence.first_variation(log_p, log_q)
    move = torch.zeros(6, dtype=torch.float64)
    move[1], move[4] = 1e-6, -1e-6
    p, q = log_p.exp(), log_q.exp()
    by_p = divergence((p + move).log(), log_q) - divergence((p - move).log(), log_q)
    by_q = divergence(log_p, (q + move).log()) - divergence(log_p, (q - move).log())
    assert by_p.item() == pytest.approx(2 * (in_p * move).sum().item(), rel=1e-5)
    assert by_q.item() == pytest.approx(2 * (in_q * move).sum().item(), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, -1.0, INF, math.nan])
def test_renyi_refuses_orders_outside_its_range(alpha):
    with pytest.raises(ValueError, match="0 < alpha < inf"):
        Renyi(alpha)


def test_alpha_beta_refuses_exponents_that_are_not_finite():
    with pytest.raises(ValueError, match="finite exponents"):
        AlphaBeta(math.nan, 1.0)
