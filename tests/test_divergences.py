"""The table: one row a divergence and a regime of its parameter, in closed forms without fdiv.

A new f-divergence takes one row here. Laws (tests/test_laws.py) and the tests below run on each.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy.special import lambertw
from tests.thinned import thinned
from torch import Tensor

import fdiv
from fdiv import (
    JS,
    KL,
    TV,
    Alpha,
    ChiKL,
    FDivergence,
    Generator,
    Jeffreys,
    Neyman,
    Pearson,
    Reverse,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SoftenedKL,
    SoftenedReverseKL,
    SquaredHellinger,
    Sum,
    Triangular,
)  # fmt: skip

Function = Callable[[Tensor], Tensor]
INF, LOG2 = math.inf, math.log(2)


@dataclass(frozen=True)
class Row:
    """Closed forms in u = p/q, written from the definition, in float64."""

    divergence: FDivergence
    value: Callable[[Tensor, Tensor], Tensor]  # terms of D(p, q), for probability vectors
    curvature: float  # f''(1)
    ends: tuple[float, float, float]  # f(0), f'(inf), f'(0)
    phi: Function  # f'(u)
    psi: Function  # f(u) - u f'(u)
    conjugate: Function | None = None  # f*(y) for f'(0) < y < f'(inf)
    inverse: Function | None = None  # (f')^{-1}(y), the ratio
    exact: bool = True  # False for a Generator, which is as accurate as the f it is given

    def __str__(self) -> str:
        return repr(self.divergence)


def w0(x: Tensor) -> Tensor:
    return torch.from_numpy(lambertw(x.numpy(), 0).real)


def w_minus_1(x: Tensor) -> Tensor:
    return torch.from_numpy(lambertw(x.numpy(), -1).real)


def js(b: float) -> Row:
    def s(u):
        return b * u + 1 - b

    def value(p, q):
        m = b * p + (1 - b) * q
        return b * p * (p / m).log() + (1 - b) * q * (q / m).log()

    def inverse(y):
        w = (y / b).exp()
        return (1 - b) * w / (1 - b * w)

    return Row(
        JS(b), value, b * (1 - b), (-(1 - b) * math.log(1 - b), -b * math.log(b), -INF),
        phi=lambda u: b * (u / s(u)).log(),
        psi=lambda u: -(1 - b) * s(u).log(),
        conjugate=lambda y: (1 - b) * ((1 - b) / (1 - b * (y / b).exp())).log(),
        inverse=inverse,
    )  # fmt: skip


def skew_kl(a: float) -> Row:
    def s(u):
        return a * u + 1 - a

    def w(y):  # u / s(u) at the slope y
        return -w0(-a * (y - a).exp()) / a

    return Row(
        SkewKL(a), lambda p, q: p * (p / (a * p + (1 - a) * q)).log(), (1 - a) ** 2,
        (1 - a, -math.log(a) - (1 - a), -INF),
        phi=lambda u: (u / s(u)).log() + a * (1 - u / s(u)),
        psi=lambda u: (1 - a) * (1 - u / s(u)),
        conjugate=lambda y: (1 - a) * (w(y) - 1),
        inverse=lambda y: (1 - a) * w(y) / (1 - a * w(y)),
    )  # fmt: skip


def skew_reverse_kl(a: float) -> Row:
    def s(u):
        return a + (1 - a) * u

    def conjugate(y):
        z = y - (1 - a)
        return -1 - a * z / (1 - a) + (-(1 - a) / z).log() + (1 - a)

    return Row(
        SkewReverseKL(a), lambda p, q: q * (q / (a * q + (1 - a) * p)).log(), (1 - a) ** 2,
        (-math.log(a) - (1 - a), 1 - a, -((1 - a) ** 2) / a),
        phi=lambda u: (1 - a) * (1 - 1 / s(u)),
        psi=lambda u: -s(u).log() - (1 - a) * (1 - u / s(u)),
        conjugate=conjugate,
        inverse=lambda y: -1 / (y - (1 - a)) - a / (1 - a),
    )  # fmt: skip


def alpha(a: float) -> Row:
    """For a not 0 nor 1. expm1 keeps its digits beside these limits."""
    ends = (1 / a if a > 0 else INF, INF if a > 1 else 1 / (1 - a), -1 / (a - 1) if a > 1 else -INF)

    def power(x, c):  # (u^c - 1) / c
        return (c * x.log()).expm1() / c

    def value(p, q):
        if a < 0.5:
            return (q * power(p / q, a) - (p - q)) / (a - 1)
        return (-p * power(q / p, 1 - a) - (p - q)) / a

    def base(y):  # u^(a-1) at the slope y
        return ((a - 1) * y).log1p()

    return Row(
        Alpha(a), value, 1.0, ends,
        phi=lambda u: power(u, a - 1),
        psi=lambda u: -power(u, a),
        conjugate=lambda y: (base(y) * a / (a - 1)).expm1() / a,
        inverse=lambda y: (base(y) / (a - 1)).exp(),
    )  # fmt: skip


def chi_kl(w: float) -> Row:
    def inverse(y):
        return w0(2 * w * (y + 2 * w).exp()) / (2 * w)

    def f(u):
        return u * u.log() - (u - 1) + w * (u - 1).square()

    return Row(
        ChiKL(w), lambda p, q: p * (p / q).log() + w * (p - q).square() / q, 1 + 2 * w,
        (1 + w, INF, -INF),
        phi=lambda u: u.log() + 2 * w * (u - 1),
        psi=lambda u: 1 - u + w * (1 - u.square()),
        conjugate=lambda y: inverse(y) * y - f(inverse(y)),
        inverse=inverse,
    )  # fmt: skip


def jeffreys_conjugate(y: Tensor) -> Tensor:
    w = w0((1 - y).exp())
    return w + 1 / w + y - 2


def kl_terms(p, q):
    return p * (p / q).log()


def hellinger_terms(p, q):
    return (p.sqrt() - q.sqrt()).square() / 2


def square_of_ratio(log_ratio: Tensor) -> Tensor:
    return (2 * log_ratio).exp()


def half_square_of_root(log_ratio: Tensor) -> Tensor:
    return ((log_ratio / 2).exp() - 1).square() / 2


def minus_log(log_ratio: Tensor) -> Tensor:
    return -log_ratio


def skewed(log_ratio: Tensor) -> Tensor:
    """JS(0.3) as f-GAN writes it, but for the linear part."""
    mixture = (0.3 * log_ratio.exp() + 0.7).log()
    return 0.3 * log_ratio.exp() * (log_ratio - mixture) - 0.7 * mixture


def like(row: Row, divergence: FDivergence, exact: bool = True) -> Row:
    """Another way to write the divergence of `row`."""
    return Row(**{**vars(row), "divergence": divergence, "exact": exact})


KL_ROW = Row(
    KL(), kl_terms, 1.0, (1.0, INF, -INF),
    phi=torch.log, psi=lambda u: 1 - u, conjugate=torch.expm1, inverse=torch.exp,
)  # fmt: skip
REVERSE_KL_ROW = Row(
    ReverseKL(), lambda p, q: q * (q / p).log(), 1.0, (INF, 1.0, -INF),
    phi=lambda u: 1 - 1 / u, psi=lambda u: -u.log(),
    conjugate=lambda y: -(1 - y).log(), inverse=lambda y: 1 / (1 - y),
)  # fmt: skip
HELLINGER_ROW = Row(
    SquaredHellinger(), hellinger_terms, 0.25, (0.5, 0.5, -INF),
    phi=lambda u: (1 - u**-0.5) / 2, psi=lambda u: (1 - u.sqrt()) / 2,
    conjugate=lambda y: y / (1 - 2 * y), inverse=lambda y: (1 - 2 * y) ** -2,
)  # fmt: skip
PEARSON_ROW = Row(
    Pearson(), lambda p, q: (p - q).square() / q, 2.0, (1.0, INF, -2.0),
    phi=lambda u: 2 * (u - 1), psi=lambda u: 1 - u.square(),
    conjugate=lambda y: y + y.square() / 4, inverse=lambda y: 1 + y / 2,
)  # fmt: skip
NEYMAN_ROW = Row(
    Neyman(), lambda p, q: (p - q).square() / p, 2.0, (INF, 1.0, -INF),
    phi=lambda u: 1 - u**-2, psi=lambda u: 2 / u - 2,
    conjugate=lambda y: 2 - 2 * (1 - y).sqrt(), inverse=lambda y: (1 - y) ** -0.5,
)  # fmt: skip

ROWS = (
    KL_ROW,
    REVERSE_KL_ROW,
    Row(
        Jeffreys(), lambda p, q: (p - q) * (p / q).log(), 2.0, (INF, INF, -INF),
        phi=lambda u: u.log() + 1 - 1 / u, psi=lambda u: 1 - u - u.log(),
        conjugate=jeffreys_conjugate, inverse=lambda y: 1 / w0((1 - y).exp()),
    ),
    *(js(beta) for beta in (0.1, 0.3, 0.5, 0.9)),
    *(skew_kl(skew) for skew in (0.1, 0.7)),
    *(skew_reverse_kl(skew) for skew in (0.1, 0.7)),
    *(alpha(a) for a in (-1.0, -0.5, 0.3, 0.5, 0.7, 1.5, 2.0, 3.0)),
    *(alpha(a) for a in (1e-6, -1e-6, 1 - 1e-6, 1 + 1e-6)),
    like(REVERSE_KL_ROW, Alpha(0.0)),
    like(KL_ROW, Alpha(1.0)),
    HELLINGER_ROW,
    PEARSON_ROW,
    NEYMAN_ROW,
    Row(
        TV(), lambda p, q: (p - q).abs() / 2, INF, (0.5, 0.5, -0.5),
        phi=lambda u: (u - 1).sign() / 2, psi=lambda u: -(u - 1).sign() / 2,
        conjugate=lambda y: y,
    ),
    Row(
        Triangular(), lambda p, q: (p - q).square() / (p + q), 1.0, (1.0, 1.0, -3.0),
        phi=lambda u: 1 - 4 / (u + 1).square(),
        psi=lambda u: 1 - 4 * (u / (u + 1)).square(),
        conjugate=lambda y: 4 - y - 4 * (1 - y).sqrt(), inverse=lambda y: 2 / (1 - y).sqrt() - 1,
    ),
    Row(
        SoftenedKL(), lambda p, q: (p + q) * ((p + q) / (2 * q)).log(), 0.5,
        (1 - LOG2, INF, -LOG2),
        phi=lambda u: ((1 + u) / 2).log(), psi=lambda u: ((1 + u) / 2).log() + 1 - u,
        conjugate=lambda y: 2 * y.exp() - y - 2, inverse=lambda y: 2 * y.exp() - 1,
    ),
    Row(
        SoftenedReverseKL(), lambda p, q: (p + q) * ((p + q) / (2 * p)).log(), 0.5,
        (INF, 1 - LOG2, -INF),
        phi=lambda u: ((1 + u) / (2 * u)).log() + 1 - 1 / u,
        psi=lambda u: ((1 + u) / (2 * u)).log(),
        conjugate=lambda y: -(-w_minus_1(-2 * (y - 2).exp()) / 2).log(),
        inverse=lambda y: 1 / (-1 - w_minus_1(-2 * (y - 2).exp())),
    ),
    *(chi_kl(weight) for weight in (0.5, 2.0)),
    like(skew_reverse_kl(0.3), Reverse(SkewKL(0.3))),
    Row(
        Reverse(ChiKL(0.5)), lambda p, q: q * (q / p).log() + (p - q).square() / (2 * p), 2.0,
        (INF, 1.5, -INF),
        phi=lambda u: 1.5 - 1 / u - u**-2 / 2, psi=lambda u: 1 / u - 1 - u.log(),
    ),
    Row(
        0.5 * KL() + 3.0 * Pearson(),
        lambda p, q: 0.5 * p * (p / q).log() + 3 * (p - q).square() / q, 6.5, (3.5, INF, -INF),
        phi=lambda u: 0.5 * u.log() + 6 * (u - 1), psi=lambda u: 0.5 * (1 - u) + 3 * (1 - u * u),
    ),
    Row(
        Sum(((0.25, TV()), (2.0, ReverseKL()))),
        lambda p, q: (p - q).abs() / 8 + 2 * q * (q / p).log(), INF, (INF, 2.125, -INF),
        phi=lambda u: (u - 1).sign() / 8 + 2 - 2 / u,
        psi=lambda u: -(u - 1).sign() / 8 - 2 * u.log(),
    ),
    like(PEARSON_ROW, Generator(square_of_ratio), exact=False),
    like(REVERSE_KL_ROW, Generator(minus_log), exact=False),
    like(HELLINGER_ROW, Generator(half_square_of_root), exact=False),
    like(js(0.3), Generator(skewed), exact=False),
)  # fmt: skip

each_row = pytest.mark.parametrize("row", ROWS, ids=str)


def log_probabilities(seed: int, rows: int = 5, support: int = 8) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, rows, support, generator=source, dtype=torch.float64)
    return logits.log_softmax(-1).unbind()


def assert_close(got: Tensor, expected: Tensor, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@each_row
def test_the_value_is_the_sum_of_the_definition(row):
    log_p, log_q = log_probabilities(seed=0)
    assert_close(row.divergence(log_p, log_q), row.value(log_p.exp(), log_q.exp()).sum(-1))


@each_row
def test_the_logit_gradients_are_those_of_the_definition(row):
    z_p, z_q = (x.clone().requires_grad_() for x in log_probabilities(seed=1))
    ours = torch.autograd.grad(row.divergence(z_p.log_softmax(-1), z_q.log_softmax(-1)).sum(), (z_p, z_q))
    exact = torch.autograd.grad(row.value(z_p.softmax(-1), z_q.softmax(-1)).sum(), (z_p, z_q))
    for got, expected in zip(ours, exact, strict=True):
        assert_close(got, expected, rtol=1e-8)


@each_row
def test_the_potentials_are_the_closed_forms(row):
    log_ratio = torch.linspace(-12, 12, 50, dtype=torch.float64)
    phi, psi = row.divergence.potentials(log_ratio)
    u = log_ratio.exp()
    # What a sum of terms as large as u phi and psi can round away.
    rounding = 2e-15 * (1 + row.phi(u).abs() + row.psi(u).abs() / u)
    assert ((phi - row.phi(u)).abs() <= 1e-10 * row.phi(u).abs() + rounding + 1e-11).all()
    assert ((psi - row.psi(u)).abs() <= 1e-10 * row.psi(u).abs() + u * rounding + 1e-11).all()


@pytest.mark.parametrize("row", [row for row in ROWS if row.exact], ids=str)
def test_the_potentials_stay_exact_at_ratios_of_e60(row):
    log_ratio = torch.tensor([-60.0, -45.0, -30.0, 30.0, 45.0, 60.0], dtype=torch.float64)
    phi, psi = row.divergence.potentials(log_ratio)
    assert_close(phi, row.phi(log_ratio.exp()))
    assert_close(psi, row.psi(log_ratio.exp()))


@pytest.mark.parametrize("row", [row for row in ROWS if row.exact], ids=str)
def test_potentials_are_never_nan_and_never_turn_back_up_to_ratios_of_e10000(row):
    log_ratio = torch.tensor([0.5, 5, 30, 37, 39, 50, 200, 1e3, 1e4])
    phi, psi = row.divergence.potentials(torch.cat([-log_ratio.flip(0), log_ratio]))
    for rising in (phi, -psi):
        slack = 1e-5 * (1 + rising.abs().nan_to_num(posinf=0.0))
        assert (rising[1:] >= rising[:-1] - slack[1:]).all()


def fifth_power(log_ratio: Tensor) -> Tensor:
    return (5 * log_ratio).exp()


def test_the_linear_part_of_a_generator_costs_no_digits_at_large_ratios():
    x = torch.tensor([-60.0, -30.0, 18.0, 30.0, 37.0])
    assert_close(Generator(minus_log).psi(x), -x, rtol=1e-5, atol=1e-5)
    assert_close(Generator(square_of_ratio).phi(x), 2 * x.expm1(), rtol=1e-5, atol=1e-5)
    assert_close(Generator(square_of_ratio).psi(x), -(2 * x).expm1(), rtol=1e-5, atol=1e-5)
    assert Generator(square_of_ratio).slope_at_zero == pytest.approx(-2)
    assert Generator(fifth_power).f(torch.tensor(100.0)) == INF


def test_beyond_the_range_of_exp_the_potentials_are_continued_and_keep_their_gradient():
    for dtype, far in ((torch.float32, (60.0, 1e4)), (torch.float64, (500.0, 1e4))):
        x = torch.tensor([*far, *(-x for x in far)], dtype=dtype, requires_grad=True)
        assert_close(KL().phi(x), x.detach(), rtol=1e-6)
        assert_close(ReverseKL().psi(x), -x.detach(), rtol=1e-6)
        limits = torch.tensor([0.0, 0.0, LOG2 / 2, LOG2 / 2], dtype=dtype)
        assert_close(JS().psi(x)[2:], limits[2:], rtol=1e-6)
        assert_close(JS().phi(x)[:2], limits[2:], rtol=1e-6)
        for d, side in ((KL(), x > 0), (SquaredHellinger(), x > 0)):
            (slope,) = torch.autograd.grad(d.psi(x).sum(), x)
            assert (slope[side] < 0).all(), "a clamp has no gradient"


@pytest.mark.parametrize("row", [row for row in ROWS if row.exact], ids=str)
def test_no_digits_are_lost_in_float32_where_p_and_q_nearly_agree(row):
    log_p, other = log_probabilities(seed=2)
    log_q = torch.lerp(log_p, other, 1e-4).log_softmax(-1)
    log_p, log_q = log_p.float(), log_q.float()
    exact = row.divergence(log_p.double(), log_q.double())
    # A mixture of p and q is rounded once more; a difference of theirs is not.
    direct = (KL, ReverseKL, Jeffreys, SquaredHellinger, Pearson, Neyman)
    rtol = 1e-6 if isinstance(row.divergence, direct) else 5e-3
    assert_close(row.divergence(log_p, log_q).double(), exact, rtol=rtol, atol=0.0)


@each_row
def test_the_curvature_is_that_of_the_closed_form(row):
    log_ratio = torch.linspace(-8, 8, 40, dtype=torch.float64)
    ones = torch.ones_like(log_ratio)
    falling = torch.func.jvp(lambda x: row.psi(x.exp()), (log_ratio,), (ones,))[1]
    atol = 1e-9 if row.exact else 1e-5
    assert_close(row.divergence.curvature(log_ratio), -falling, rtol=1e-6, atol=atol)
    assert row.divergence.curvature_at_one == pytest.approx(row.curvature, rel=1e-9)
    assert row.divergence.is_smooth == math.isfinite(row.curvature)


@each_row
def test_the_ends_of_the_generator_are_the_closed_forms(row):
    d = row.divergence
    ends = (d.f_at_zero, d.slope_at_infinity, d.slope_at_zero)
    assert ends == pytest.approx(row.ends, rel=1e-9)
    assert d.bound == pytest.approx(row.ends[0] + row.ends[1], rel=1e-9)
    assert (d.character == "bounded") == math.isfinite(d.bound)


@pytest.mark.parametrize(
    ("divergence", "character"),
    [(KL(), "mode-covering"), (ReverseKL(), "mode-seeking"), (Jeffreys(), "covering and seeking"),
     (JS(), "bounded"), (Pearson(), "mode-covering"), (Neyman(), "mode-seeking")],
)  # fmt: skip
def test_the_character_says_what_the_trained_model_does(divergence, character):
    assert divergence.character == character


@pytest.mark.parametrize("row", thinned(row for row in ROWS if row.conjugate), ids=str)
def test_the_conjugate_and_the_inverse_are_the_closed_forms(row):
    log_ratio = torch.linspace(-6, 5, 24, dtype=torch.float64)
    slope = row.phi(log_ratio.exp())
    if row.divergence.is_smooth:
        assert_close(row.divergence.conjugate(slope), row.conjugate(slope), rtol=1e-8, atol=1e-9)
    else:  # TV: between its two slopes
        inside = torch.linspace(-0.4, 0.4, 7, dtype=torch.float64)
        assert_close(row.divergence.conjugate(inside), row.conjugate(inside))
    if row.inverse:
        ratio = row.divergence.inverse_slope(slope).exp()
        assert_close(ratio, row.inverse(slope), rtol=1e-6, atol=1e-8)


@each_row
def test_the_potentials_at_ratios_of_zero_and_infinity_are_the_ends(row):
    zero, infinity = torch.tensor([-INF, INF], dtype=torch.float64).unbind()
    d, (f_at_zero, slope_at_infinity, slope_at_zero) = row.divergence, row.ends
    assert d.phi(zero).item() == pytest.approx(slope_at_zero, rel=1e-9)
    assert d.phi(infinity).item() == pytest.approx(slope_at_infinity, rel=1e-9)
    assert d.psi(zero).item() == pytest.approx(f_at_zero, rel=1e-9)
    # psi of D is phi of its reverse at 1/u.
    assert d.psi(infinity).item() == pytest.approx(d.reverse.slope_at_zero, rel=1e-9)


@each_row
def test_disjoint_supports_cost_the_bound(row):
    log_p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    value = row.divergence(log_p, log_p.flip(0).roll(1))
    assert value.item() > 0
    disjoint = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).log()
    assert row.divergence(disjoint[0], disjoint[1]).item() == pytest.approx(
        row.ends[0] + row.ends[1], rel=1e-9
    )


def test_every_exported_f_divergence_has_a_row():
    exported = {
        value for value in vars(fdiv).values()
        if inspect.isclass(value) and issubclass(value, FDivergence) and value is not FDivergence
    }  # fmt: skip
    forgotten = exported - {type(row.divergence) for row in ROWS}
    assert not forgotten, f"add a row of closed forms for {sorted(c.__name__ for c in forgotten)}"


def test_every_row_is_another_divergence():
    names = [str(row) for row in ROWS]
    assert len(names) == len(set(names))


def test_a_users_f_that_overflows_is_infinite_there_and_has_finite_gradients_elsewhere():
    steep = fdiv.Generator(lambda log_ratio: (10 * log_ratio).exp())
    far = steep.perspective(torch.tensor([-0.01]), torch.tensor([-50.0]))
    assert far.item() == math.inf  # p u^9 of u = e^50 is more than float32 holds
    p, q = (torch.tensor([0.3, 0.7]).log().requires_grad_(), torch.tensor([0.5, 0.5]).log().requires_grad_())
    for slope in torch.autograd.grad(steep.perspective(p, q).sum(), (p, q)):
        assert slope.isfinite().all()
