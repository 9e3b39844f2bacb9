"""Family: derivatives in the parameters of a divergence, against entmax, closed forms and differences."""

import math

import pytest
import torch
from torch import Tensor

from fdiv import JS, KL, Alpha, ChiKL, Pearson, SkewKL, SkewReverseKL, f_softargmax
from fdiv.operators.family import Family
from fdiv.operators.softmax import f_softmax

torch.set_num_threads(1)

FAMILIES = [
    (Alpha, 1.5),
    (Alpha, 1.0),
    (Alpha, 0.0),
    (Alpha, -0.5),
    (JS, 0.3),
    (SkewKL, 0.1),
    (SkewReverseKL, 0.1),
    (ChiKL, 0.5),
    (lambda t: t * (KL() + 0.3 * Pearson()), 0.7),
]
NAMES = [
    "Alpha",
    "Alpha at KL",
    "Alpha at ReverseKL",
    "Alpha below 0",
    "JS",
    "SkewKL",
    "SkewReverseKL",
    "ChiKL",
    "a sum",
]
each_family = pytest.mark.parametrize(("make", "at"), FAMILIES, ids=NAMES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(shape, generator=source, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


THETA, LOG_Q, WEIGHT = draw(3, 6, seed=1), draw(3, 6, seed=2).log_softmax(-1), draw(3, 6, seed=3)


def difference(function, at: float) -> Tensor:
    """The slope of `function` by differences of sixth order."""
    step = 1e-3
    terms = ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60))
    return sum(w * (function(at + n * step) - function(at - n * step)) for n, w in terms) / step


def assert_close(got: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=atol)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0])
def test_the_entmax_package_agrees_on_the_gradient_in_alpha(alpha):
    entmax = pytest.importorskip("entmax")
    theta = THETA.clone().requires_grad_()
    ours, theirs = number(alpha), number(alpha)
    x = f_softargmax(theta, Family(Alpha, ours))
    found = torch.autograd.grad((WEIGHT * x).sum(), (theta, ours))
    y = entmax.entmax_bisect(theta, theirs, n_iter=70)
    expected = torch.autograd.grad((WEIGHT * y).sum(), (theta, theirs))
    assert_close(x, y)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@each_family
def test_the_maximiser_moves_with_the_parameter_as_finite_differences_do(make, at):
    def total(parameter) -> Tensor:
        family = Family(make, parameter) if isinstance(parameter, Tensor) else make(parameter)
        return (WEIGHT * f_softargmax(THETA, family, LOG_Q)).sum()

    (found,) = torch.autograd.grad(total(parameter := number(at)), parameter)
    assert_close(found, difference(total, at))
    _, forward = torch.func.jvp(total, (parameter.detach(),), (torch.ones((), dtype=torch.float64),))
    assert_close(forward, found, 1e-12)


@each_family
def test_the_largest_value_moves_as_the_divergence_at_the_maximiser(make, at):
    def value(parameter) -> Tensor:
        family = Family(make, parameter) if isinstance(parameter, Tensor) else make(parameter)
        return f_softmax(THETA, family, LOG_Q).sum()

    (found,) = torch.autograd.grad(value(parameter := number(at)), parameter)
    assert_close(value(parameter), value(at), 1e-12)
    assert_close(found, difference(value, at))
    x = f_softargmax(THETA, make(at), LOG_Q)
    (price,) = torch.autograd.grad(Family(make, again := number(at))(x.log(), LOG_Q).sum(), again)
    assert_close(found, -price, 1e-11)


def test_a_temperature_has_its_closed_form():
    """x = softmax(theta / t): dx/dt = -x (theta - <x, theta>) / t^2."""
    t = number(0.7)
    x = f_softargmax(THETA, Family(lambda t: t * KL(), t))
    (found,) = torch.autograd.grad((WEIGHT * x).sum(), t)
    closed = -x * (THETA - (x * THETA).sum(-1, keepdim=True)) / t**2
    assert_close(found, (WEIGHT * closed).sum().detach())


@pytest.mark.parametrize(("make", "at"), [FAMILIES[1], FAMILIES[4]], ids=["KL", "JS"])
def test_second_derivatives_are_those_of_first_ones(make, at):
    def slopes(parameter: Tensor) -> tuple[Tensor, Tensor]:
        theta = THETA[:1].clone().requires_grad_()
        x = f_softargmax(theta, Family(make, parameter), LOG_Q[:1])
        return torch.autograd.grad((WEIGHT[:1] * x).sum(), (theta, parameter), create_graph=True)

    in_theta, in_parameter = slopes(parameter := number(at))
    (second,) = torch.autograd.grad(in_parameter, parameter, retain_graph=True)
    (mixed,) = torch.autograd.grad((WEIGHT[:1] * in_theta).sum(), parameter)
    assert_close(second, difference(lambda a: slopes(number(a))[1].detach(), at), 1e-6)
    assert_close(mixed, difference(lambda a: (WEIGHT[:1] * slopes(number(a))[0]).sum().detach(), at), 1e-6)


def test_several_parameters_and_float32():
    a, t = (torch.tensor(v, requires_grad=True) for v in (1.4, 0.6))
    family = Family(lambda a, t: t * Alpha(a), a, t)
    assert repr(family) == "Family(Sum(terms=((0.6000000238418579, Alpha(alpha=1.399999976158142)),)))"
    x = f_softargmax(THETA.float(), family)
    found = torch.autograd.grad((WEIGHT.float() * x).sum(), (a, t))
    exact = number(a.item()), number(t.item())
    y = f_softargmax(THETA, Family(family.make, *exact))
    for one, other in zip(found, torch.autograd.grad((WEIGHT * y).sum(), exact), strict=True):
        assert one.dtype == torch.float32 and one.shape == ()
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_alpha_is_learnt_by_gradient_descent():
    """A target that 1.7-entmax made is found again."""
    target, log_alpha = (
        f_softargmax(THETA, Alpha(1.7)),
        torch.zeros((), dtype=torch.float64, requires_grad=True),
    )
    optimiser = torch.optim.LBFGS([log_alpha], lr=0.5, max_iter=15)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (f_softargmax(THETA, Family(Alpha, 1 + log_alpha.exp())) - target).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    assert 1 + log_alpha.exp().item() == pytest.approx(1.7, abs=1e-4)


def test_masked_atoms_and_peaked_rows_stay_finite():
    theta, log_q = 1e4 * THETA, LOG_Q.clone()
    theta[0, 1], log_q[0, 3] = -math.inf, -math.inf
    alpha = number(1.5)
    x = f_softargmax(theta, Family(Alpha, alpha), log_q)
    value = f_softmax(theta, Family(Alpha, alpha), log_q)
    assert x.isfinite().all() and value.isfinite().all() and (x[0, [1, 3]] == 0).all()
    for total in ((WEIGHT * x).sum(), value.sum()):
        assert torch.autograd.grad(total, alpha)[0].isfinite()


def test_mistakes_are_named():
    with pytest.raises(TypeError, match=r"floating-point tensors, got 1\.5"):
        Family(Alpha, 1.5)
    with pytest.raises(ValueError, match=r"is one number, got \(2,\)"):
        Family(Alpha, torch.ones(2))
    with pytest.raises(TypeError, match="at least one parameter"):
        Family(KL)
    with pytest.raises(TypeError, match="Family takes an f-divergence"):
        Family(lambda a: a, torch.ones(()))
    with pytest.raises(ValueError, match="0 < beta < 1"):
        Family(JS, torch.ones(()))
    edge = number(1e-13)
    with pytest.raises(ValueError, match="at the very edge of what"):
        torch.autograd.grad(f_softargmax(THETA, Family(JS, edge)).square().sum(), edge)
    with pytest.raises(ValueError, match="log_q finite"):
        Family(Alpha, number(1.5))(LOG_Q, torch.full_like(LOG_Q, -math.inf))
