"""Derivatives of values and plans, by finite differences; and those that are refused."""

import math
from functools import partial

import pytest
import torch
from tests.thinned import thinned
from tests.transport.problems import TIGHT, cloud, problem, weights

from fdiv import JS, KL, TV
from fdiv.transport.clouds import sinkhorn_between
from fdiv.transport.costs import Power, squared_distance
from fdiv.transport.debiased import sinkhorn_divergence
from fdiv.transport.sinkhorn import self_sinkhorn, sinkhorn

gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)  # along random directions
gradgradcheck = partial(torch.autograd.gradgradcheck, fast_mode=True)
MODES = ["envelope", "implicit", "unroll"]


def given(n: int = 4, m: int = 3):
    return [t.requires_grad_() for t in problem(n, m)]


def value(grad, marginals="balanced", eps=0.5, **options):
    def of(cost, log_a, log_b):
        if marginals == "balanced":  # a function of probabilities only
            log_a, log_b = log_a.log_softmax(-1), log_b.log_softmax(-1)
        return sinkhorn(
            cost, log_a, log_b, eps, marginals=marginals, grad=grad, solver=TIGHT, **options
        ).value

    return of


@pytest.mark.parametrize("grad", MODES)
@pytest.mark.parametrize("marginals", ["balanced", 2.0 * KL(), ("balanced", KL()), 3.0 * TV()], ids=repr)
def test_the_gradient_of_the_value_is_that_of_finite_differences(grad, marginals):
    if grad == "implicit" and marginals == 3.0 * TV():
        pytest.skip("refused")
    assert gradcheck(value(grad, marginals), given())


@pytest.mark.parametrize("grad", thinned(["implicit", "envelope"]))
def test_the_same_under_a_penalty_without_a_closed_form(grad):
    assert gradcheck(value(grad, JS()), given(2, 2))


@pytest.mark.parametrize("grad", MODES)
def test_the_value_with_shannons_entropy_has_its_own_gradient_in_the_weights(grad):
    assert gradcheck(value(grad, reference="uniform"), given())


def test_the_gradients_are_the_plan_and_the_potentials():
    cost, log_a, log_b = given(5, 4)
    found = sinkhorn(cost, log_a, log_b, 0.5, solver=TIGHT)
    in_cost, in_a, in_b = torch.autograd.grad(found.value, (cost, log_a, log_b))
    torch.testing.assert_close(in_cost, found.plan, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(in_a / log_a.exp(), found.f, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(in_b / log_b.exp(), found.g, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("grad", ["implicit", "unroll"])
@pytest.mark.parametrize("marginals", ["balanced", 2.0 * KL()], ids=repr)
def test_the_hessian_of_the_value_is_that_of_finite_differences(grad, marginals):
    assert gradgradcheck(value(grad, marginals, eps=1.0), given(3, 2))


@pytest.mark.slow
def test_the_hessian_under_a_penalty_without_a_closed_form():
    cost, log_a, log_b = (t.detach() for t in problem(2, 2))

    def of(cost):
        return value("implicit", JS())(cost, log_a, log_b)

    assert gradgradcheck(of, (cost.requires_grad_(),))


def test_a_third_derivative_is_that_of_the_second():
    cost, log_a, log_b = problem(2, 2)

    def second(scale):
        of = value("implicit")
        (first,) = torch.autograd.grad(of(scale * cost, log_a, log_b), scale, create_graph=True)
        return torch.autograd.grad(first, scale, create_graph=True)[0]

    assert gradcheck(second, (torch.tensor(1.3, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("grad", ["implicit", "unroll"])
@pytest.mark.parametrize("marginals", ["balanced", 2.0 * KL()], ids=repr)
def test_plan_potentials_marginals_and_linear_part_have_derivatives(grad, marginals):
    def of(cost, log_a, log_b):
        if marginals == "balanced":
            log_a, log_b = log_a.log_softmax(-1), log_b.log_softmax(-1)
        found = sinkhorn(cost, log_a, log_b, 0.5, marginals=marginals, grad=grad, solver=TIGHT)
        return found.plan, found.f, found.g, found.linear, *found.marginals

    assert gradcheck(of, given())


def test_the_envelopes_plan_is_a_constant_and_its_hessian_is_refused():
    cost, log_a, log_b = given()
    found = sinkhorn(cost, log_a, log_b, 0.5)
    assert not (found.plan.requires_grad or found.f.requires_grad or found.linear.requires_grad)
    (first,) = torch.autograd.grad(found.value, cost, create_graph=True)
    with pytest.raises(RuntimeError, match='Write grad="implicit"'):
        torch.autograd.grad(first.sum(), cost)
    # Through the points, and through a function of the value, just the same.
    x = cloud(4, 2).requires_grad_()
    loss = sinkhorn_between(x, cloud(3, 2, seed=1), eps=0.5, chunk=2).value ** 2
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="silently wrong"):
        first.sum().backward()


@pytest.mark.parametrize("cost", [squared_distance, Power(1.5), Power(1)], ids=["squares", "1.5", "1"])
@pytest.mark.parametrize(
    ("grad", "chunk"), [("envelope", 0), ("envelope", 2), ("implicit", 0), ("unroll", 0)]
)
def test_the_gradient_in_points_is_that_of_finite_differences(cost, grad, chunk):
    y, log_b = cloud(4, 2, seed=1), weights(4)

    def of(x, y, log_a):
        return sinkhorn_between(
            x, y, log_a.log_softmax(-1), log_b, 0.7, cost=cost, grad=grad, chunk=chunk, solver=TIGHT
        ).value

    inputs = [t.requires_grad_() for t in (cloud(3, 2), y, weights(3))]
    assert gradcheck(of, inputs)


@pytest.mark.parametrize("marginals", thinned([2.0 * KL(), "balanced"]), ids=repr)
@pytest.mark.parametrize(
    ("grad", "chunk"), [("envelope", 0), ("envelope", 2), ("implicit", 0), ("unroll", 0)]
)
def test_the_gradient_of_the_divergence_is_that_of_finite_differences(marginals, grad, chunk):
    def of(x, y, log_a, log_b):
        if marginals == "balanced":
            log_a, log_b = log_a.log_softmax(-1), log_b.log_softmax(-1)
        return sinkhorn_divergence(
            x, y, log_a, log_b, 0.7, marginals=marginals, grad=grad, chunk=chunk, solver=TIGHT
        ).value

    inputs = [t.requires_grad_() for t in (cloud(3, 2), cloud(3, 2, seed=1), weights(3), weights(3, seed=4))]
    assert gradcheck(of, inputs)


def test_the_hessian_of_the_divergence_in_the_points_is_that_of_finite_differences():
    y = cloud(3, 1, seed=1)

    def of(x):
        return sinkhorn_divergence(x, y, eps=0.7, grad="implicit", solver=TIGHT).value

    assert gradgradcheck(of, (cloud(2, 1).requires_grad_(),))


def test_the_self_problem_moves_both_of_its_sides():
    def of(x, log_a):
        return self_sinkhorn(squared_distance(x, x), log_a.log_softmax(-1), 0.7, solver=TIGHT).value

    assert gradcheck(of, (cloud(4, 2).requires_grad_(), weights(4).requires_grad_()))


def test_the_gradient_at_equality_is_zero():
    x, log_a = cloud(6, 2).requires_grad_(), weights(6).requires_grad_()
    value = sinkhorn_divergence(x, x.detach(), log_a, log_a.detach(), 0.3).value
    for gradient in torch.autograd.grad(value, (x, log_a)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_an_atom_without_weight_has_gradient_zero(grad):
    cost, _, log_b = given(3, 4)
    log_a = torch.tensor([math.log(0.4), -math.inf, math.log(0.6)], dtype=torch.float64, requires_grad=True)
    value = sinkhorn(cost, log_a, log_b, 0.5, grad=grad, solver=TIGHT).value
    in_cost, in_a = torch.autograd.grad(value, (cost, log_a))
    assert in_cost.isfinite().all() and in_a.isfinite().all()
    assert (in_cost[1] == 0).all() and in_a[1] == 0


def test_a_cost_shared_by_a_batch_gets_the_sum_of_its_gradients():
    cost, log_a, log_b = given()
    many = torch.stack([log_a.detach(), log_a.detach().flip(0)])
    together = torch.autograd.grad(sinkhorn(cost, many, log_b, 0.5, solver=TIGHT).value.sum(), cost)[0]
    single = [sinkhorn(cost, one, log_b, 0.5, solver=TIGHT).plan for one in many]
    torch.testing.assert_close(together, sum(single), rtol=1e-9, atol=1e-12)


def test_torch_func_finds_the_same_gradients():
    cost, log_a, log_b = (t.detach() for t in problem(4, 3))
    for grad in ("envelope", "implicit"):
        of = value(grad)
        by_func = torch.func.grad(lambda c, of=of: of(c, log_a, log_b))(cost)
        torch.testing.assert_close(by_func, sinkhorn(cost, log_a, log_b, 0.5, solver=TIGHT).plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad": "implicit", "marginals": TV()}, "without a kink"),
        ({"grad": "unroll", "marginals": JS()}, "implicit"),
    ],
)
def test_modes_that_would_be_wrong_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(problem()[0], **options)
    with pytest.raises(ValueError, match="chunk=0"):
        sinkhorn_between(cloud(4, 2), cloud(4, 2), grad="implicit", chunk=2)
    with pytest.raises(ValueError, match="chunk=0"):
        sinkhorn_between(cloud(4, 2), cloud(4, 2), grad="unroll", chunk=2)
