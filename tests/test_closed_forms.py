"""Divergences between members of a family, known in the parameters: value and gradient."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fdiv
from fdiv import (
    JS,
    KL,
    TV,
    Alpha,
    Jeffreys,
    Neyman,
    Pearson,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SoftenedKL,
    SoftenedReverseKL,
    SquaredHellinger,
    Triangular,
)  # fmt: skip

LOG2 = math.log(2)
PoissonForm = Callable[[Tensor, Tensor], Tensor]


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


def assert_same_value_and_gradients(got: Tensor, exact: Tensor, parameters: list[Tensor]) -> None:
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=0.0)
    slopes = zip(torch.autograd.grad(got, parameters), torch.autograd.grad(exact, parameters), strict=True)
    for slope, expected in slopes:
        torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-12)


# -- coins ---------------------------------------------------------------------------------------


def coin(a: Tensor) -> Tensor:
    return torch.stack([a.log(), (-a).log1p()])


COINS = {
    KL(): lambda a, b: a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log(),
    ReverseKL(): lambda a, b: b * (b / a).log() + (1 - b) * ((1 - b) / (1 - a)).log(),
    Jeffreys(): lambda a, b: (a - b) * (a * (1 - b) / (b * (1 - a))).log(),
    Pearson(): lambda a, b: (a - b).square() / (b * (1 - b)),
    Neyman(): lambda a, b: (a - b).square() / (a * (1 - a)),
    TV(): lambda a, b: (a - b).abs(),
    SquaredHellinger(): lambda a, b: 1 - (a * b).sqrt() - ((1 - a) * (1 - b)).sqrt(),
    Triangular(): lambda a, b: 2 * (a - b).square() / ((a + b) * (2 - a - b)),
    Alpha(3.0): lambda a, b: (a**3 / b**2 + (1 - a) ** 3 / (1 - b) ** 2 - 1) / 6,
    Alpha(-2.0): lambda a, b: (b**3 / a**2 + (1 - b) ** 3 / (1 - a) ** 2 - 1) / 6,
    Renyi(2.0): lambda a, b: (a**2 / b + (1 - a) ** 2 / (1 - b)).log(),
}


@pytest.mark.parametrize("divergence", COINS, ids=repr)
@pytest.mark.parametrize(("a", "b"), [(0.2, 0.7), (0.9, 0.5), (0.01, 0.02)])
def test_coins_have_the_closed_form(divergence, a, b):
    a, b = number(a), number(b)
    assert_same_value_and_gradients(divergence(coin(a), coin(b)), COINS[divergence](a, b), [a, b])


# -- Poisson -------------------------------------------------------------------------------------


def poisson(rate: Tensor) -> Tensor:
    k = torch.arange(160, dtype=torch.float64)
    return k * rate.log() - rate - torch.lgamma(k + 1)


def poisson_power(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """log sum p^alpha q^(1 - alpha)."""
    return a**alpha * b ** (1 - alpha) - alpha * a - (1 - alpha) * b


POISSONS = {
    KL(): lambda a, b: a * (a / b).log() - a + b,
    ReverseKL(): lambda a, b: b * (b / a).log() - b + a,
    Jeffreys(): lambda a, b: (a - b) * (a / b).log(),
    Pearson(): lambda a, b: ((a - b).square() / b).expm1(),
    Neyman(): lambda a, b: ((a - b).square() / a).expm1(),
    SquaredHellinger(): lambda a, b: -(-(a.sqrt() - b.sqrt()).square() / 2).expm1(),
    Alpha(0.3): lambda a, b: poisson_power(a, b, 0.3).expm1() / (0.3 * -0.7),
    Alpha(1.5): lambda a, b: poisson_power(a, b, 1.5).expm1() / 0.75,
    Alpha(-0.5): lambda a, b: poisson_power(a, b, -0.5).expm1() / 0.75,
    Renyi(0.3): lambda a, b: poisson_power(a, b, 0.3) / -0.7,
    Renyi(2.5): lambda a, b: poisson_power(a, b, 2.5) / 1.5,
}


@pytest.mark.parametrize("divergence", POISSONS, ids=repr)
@pytest.mark.parametrize(("a", "b"), [(3.0, 5.0), (9.0, 4.0)])
def test_poisson_pairs_have_the_closed_form(divergence, a, b):
    a, b = number(a), number(b)
    got = divergence(poisson(a), poisson(b))
    assert_same_value_and_gradients(got, POISSONS[divergence](a, b), [a, b])


# -- Gaussians -----------------------------------------------------------------------------------


def gaussian(mean: Tensor, scale: Tensor) -> Tensor:
    """Masses of a fine grid: the trapezium rule is exact for analytic densities that die out."""
    x = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    density = -(((x - mean) / scale) ** 2) / 2 - scale.log() - math.log(2 * math.pi) / 2
    return density + math.log(80 / 8000)


def gaussian_kl(m, s, n, t):
    return (t / s).log() + (s.square() + (m - n).square()) / (2 * t.square()) - 0.5


def gaussian_power(m, s, n, t, alpha):
    """log of the integral of p^alpha q^(1 - alpha)."""
    variance = alpha * t.square() + (1 - alpha) * s.square()
    spread = (1 - alpha) * s.log() + alpha * t.log() - variance.log() / 2
    return spread - alpha * (1 - alpha) * (m - n).square() / (2 * variance)


GAUSSIANS = {
    KL(): gaussian_kl,
    ReverseKL(): lambda m, s, n, t: gaussian_kl(n, t, m, s),
    Jeffreys(): lambda m, s, n, t: gaussian_kl(n, t, m, s) + gaussian_kl(m, s, n, t),
    Pearson(): lambda *theta: gaussian_power(*theta, 2.0).expm1(),
    Neyman(): lambda *theta: gaussian_power(*theta, -1.0).expm1(),
    SquaredHellinger(): lambda *theta: -gaussian_power(*theta, 0.5).expm1(),
    Alpha(0.3): lambda *theta: gaussian_power(*theta, 0.3).expm1() / (0.3 * -0.7),
    Alpha(1.5): lambda *theta: gaussian_power(*theta, 1.5).expm1() / 0.75,
    Renyi(0.3): lambda *theta: gaussian_power(*theta, 0.3) / -0.7,
    Renyi(1.5): lambda *theta: gaussian_power(*theta, 1.5) / 0.5,
}


@pytest.mark.parametrize("divergence", GAUSSIANS, ids=repr)
def test_gaussian_pairs_have_the_closed_form(divergence):
    theta = [number(x) for x in (0.3, 1.1, -0.4, 1.3)]  # mean and deviation of p, of q
    got = divergence(gaussian(*theta[:2]), gaussian(*theta[2:]))
    assert_same_value_and_gradients(got, GAUSSIANS[divergence](*theta), theta)


# -- worked example, local rule, limits, conventions ---------------------------------------------

EXAMPLE = {
    KL(): 0.498223582,
    ReverseKL(): 0.584996498,
    JS(0.5): 0.125100606,
    JS(0.1): 0.044420725,
    JS(0.9): 0.050029545,
    SkewKL(0.1): 0.397168809,
    SkewReverseKL(0.1): 0.430558954,
    TV(): 0.4,
    Pearson(): 1.12,
    SquaredHellinger(): 0.129983041,
}


@pytest.mark.parametrize("divergence", EXAMPLE, ids=repr)
def test_the_worked_example_comes_out_to_nine_digits(divergence):
    p, q = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64)
    value = divergence(p.log(), q.log()).item()
    assert value == pytest.approx(EXAMPLE[divergence], abs=6e-10)


def pair(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 12, generator=source, dtype=torch.float64) * scale
    return logits.log_softmax(-1).unbind()


@pytest.mark.parametrize(
    "divergence",
    [KL(), JS(0.1), JS(0.9), SkewKL(0.1), SkewReverseKL(0.7), SquaredHellinger(), Neyman()],
    ids=repr,
)
def test_divided_by_its_curvature_every_divergence_is_half_of_chi_square_nearby(divergence):
    log_p, other = pair()
    direction = (other.exp() - log_p.exp()).unsqueeze(0) * torch.tensor([[1e-4], [-1e-4]])
    log_q = (log_p.exp() + direction).log()
    chi_square = (direction.square() / log_p.exp()).sum(-1)
    ratio = divergence(log_p, log_q) / (divergence.curvature_at_one * chi_square / 2)
    assert ratio.mean().item() == pytest.approx(1.0, rel=1e-6)  # odd orders cancel in the mean


def test_js_over_its_parameter_tends_to_the_two_kls():
    log_p, log_q = pair()
    near_zero, near_one = JS(1e-7)(log_p, log_q) / 1e-7, JS(1 - 1e-7)(log_p, log_q) / 1e-7
    torch.testing.assert_close(near_zero, KL()(log_p, log_q), rtol=1e-5, atol=0)
    torch.testing.assert_close(near_one, ReverseKL()(log_p, log_q), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan])
def test_js_refuses_the_ends_and_says_what_to_write(beta):
    with pytest.raises(ValueError, match=r"0 < beta < 1.*identically 0.*KL\(\).*ReverseKL\(\)"):
        JS(beta)


def test_twice_js_is_the_divergence_of_fdpo_and_fgan():
    log_ratio = torch.linspace(-9, 9, 37, dtype=torch.float64)
    t = log_ratio.exp()
    theirs = t * t.log() - (1 + t) * ((1 + t) / 2).log()
    torch.testing.assert_close((2 * JS(0.5)).f(log_ratio), theirs, rtol=1e-10, atol=1e-13)
    score = (2 * JS(0.5)).reverse.phi(log_ratio)  # f'(policy / reference)
    torch.testing.assert_close(score, (2 * t / (1 + t)).log())


def test_the_constructors_of_other_conventions_are_their_formulas_at_three_tenths():
    log_p, log_q = pair()
    p, q, c = log_p.exp(), log_q.exp(), 0.3
    amari = 4 / (1 - c**2) * (1 - (p ** ((1 - c) / 2) * q ** ((1 + c) / 2)).sum())
    torch.testing.assert_close(Alpha.amari(c)(log_p, log_q), amari)
    cressie_read = (p * ((p / q) ** c - 1)).sum() / (c * (c + 1))
    torch.testing.assert_close(Alpha.cressie_read(c)(log_p, log_q), cressie_read)
    t = q / p  # their numerator is the policy, our q
    paper = (p * (t ** (1 - c) - (1 - c) * t - c) / (c * (c - 1))).sum()
    torch.testing.assert_close(Alpha.fdpo(c)(log_p, log_q), paper)
    trl = (((c - 1) * t.log()).exp() - 1) / (c - 1)  # the score of its preference loss
    torch.testing.assert_close(Alpha.trl(c).psi(-t.log()), trl)
    assert Alpha.trl(c) == Alpha(0.7) and Alpha.fdpo(c) == Alpha(0.3)
    assert Alpha.cressie_read(c) == Alpha(1.3) and Alpha.amari(c) == Alpha(0.35)


@pytest.mark.parametrize(
    ("constructor", "at_kl", "at_reverse_kl"),
    [(Alpha, 1, 0), (Alpha.amari, -1, 1), (Alpha.cressie_read, 0, -1), (Alpha.fdpo, 1, 0),
     (Alpha.trl, 0, 1)],
    ids=["Alpha", "amari", "cressie_read", "fdpo", "trl"],
)  # fmt: skip
def test_the_constructors_of_other_conventions_have_the_right_limits(constructor, at_kl, at_reverse_kl):
    log_p, log_q = pair()
    torch.testing.assert_close(constructor(at_kl)(log_p, log_q), KL()(log_p, log_q))
    reverse = constructor(at_reverse_kl)(log_p, log_q)
    torch.testing.assert_close(reverse, ReverseKL()(log_p, log_q))


@pytest.mark.parametrize(
    ("alpha", "factor", "other"),
    [(2, 0.5, Pearson()), (-1, 0.5, Neyman()), (0.5, 4.0, SquaredHellinger())],
)
def test_members_of_the_alpha_family_are_multiples_of_the_named_divergences(alpha, factor, other):
    log_p, log_q = pair()
    torch.testing.assert_close(Alpha(alpha)(log_p, log_q), factor * other(log_p, log_q))


def test_the_reverse_of_every_directed_divergence_is_the_named_one():
    assert KL().reverse == ReverseKL() and ReverseKL().reverse == KL()
    assert Pearson().reverse == Neyman() and Neyman().reverse == Pearson()
    assert SkewKL(0.2).reverse == SkewReverseKL(0.2)
    assert SoftenedKL().reverse == SoftenedReverseKL()
    assert JS(0.25).reverse == JS(0.75) and Alpha(0.25).reverse == Alpha(0.75)
    assert TV().reverse == TV() and Jeffreys().reverse == Jeffreys()


@pytest.mark.parametrize(
    "divergence",
    [KL(), ReverseKL(), JS(), JS(0.1), SkewKL(0.1), SkewReverseKL(0.1), SquaredHellinger(), TV(),
     Triangular(), Jeffreys()],
    ids=repr,
)  # fmt: skip
def test_no_row_of_a_peaked_vocabulary_of_32k_is_lost_in_float32(divergence):
    source = torch.Generator().manual_seed(0)
    logits = [(30 * torch.randn(16, 32768, generator=source)).requires_grad_() for _ in range(2)]
    value = divergence(*(x.log_softmax(-1) for x in logits))
    assert value.isfinite().all()
    exact = divergence(*(x.detach().double().log_softmax(-1) for x in logits))
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)
    for slope in torch.autograd.grad(value.sum(), logits):
        assert slope.isfinite().all()


@pytest.mark.parametrize("make", [
    lambda: SkewKL(0), lambda: SkewReverseKL(1.0), lambda: Alpha(math.inf), lambda: fdiv.ChiKL(0),
    lambda: Renyi(0), lambda: fdiv.Sum(()), lambda: 0 * KL(), lambda: -1 * KL(),
])  # fmt: skip
def test_parameters_outside_their_domain_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()


def test_the_sum_of_sums_is_one_flat_sum():
    combined = 2 * (0.5 * KL() + TV()) + Pearson()
    assert combined == fdiv.Sum(((1.0, KL()), (2, TV()), (1.0, Pearson())))
    with pytest.raises(TypeError, match="f-divergence"):
        fdiv.Sum(((1.0, Renyi(2.0)),))
    with pytest.raises(TypeError):
        KL() + 1
