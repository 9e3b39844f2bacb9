"""implicit: the derivative of a solver's solution, against closed forms and the solver unrolled."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fdiv import KL, Alpha, SquaredHellinger, f_softargmax
from fdiv.operators.implicit import implicit
from fdiv.operators.linear import GMRES, ConjugateGradients, LeastSquares

torch.set_num_threads(1)

SOLVERS = [None, GMRES(memory=3), ConjugateGradients(), LeastSquares()]
each_solver = pytest.mark.parametrize("linear", SOLVERS, ids=repr)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(got, expected, atol: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=atol)


# -- ridge regression: every derivative is that of the closed form ---------------------------------------

DESIGN, TARGET, PENALTY = draw(9, 4, seed=1), draw(9, seed=2), torch.tensor(0.7, dtype=torch.float64)


def ridge(design: Tensor, target: Tensor, penalty: Tensor) -> Tensor:
    curvature = design.T @ design + penalty * torch.eye(design.shape[1], dtype=design.dtype)
    return torch.linalg.solve(curvature, design.T @ target)


def ridge_slope(w: Tensor, design: Tensor, target: Tensor, penalty: Tensor) -> Tensor:
    return design.T @ (design @ w - target) + penalty * w


@each_solver
def test_ridge_regression_has_the_gradients_of_its_closed_form(linear):
    given = [t.clone().requires_grad_() for t in (DESIGN, TARGET, PENALTY)]
    solved = implicit(ridge, ridge_slope, linear)(*given)
    assert_close(solved, ridge(*given).detach())
    found = torch.autograd.grad((solved**3).sum(), given)
    assert_close(found, torch.autograd.grad((ridge(*given) ** 3).sum(), given))


@each_solver
def test_and_forward(linear):
    given, moves = (DESIGN, TARGET, PENALTY), (draw(9, 4, seed=3), draw(9, seed=4), draw(1, seed=5)[0])
    _, expected = torch.func.jvp(ridge, given, moves)
    solved = implicit(ridge, ridge_slope, linear)
    assert_close(torch.func.jvp(solved, given, moves)[1], expected)
    with forward_ad.dual_level():
        dual = solved(*(forward_ad.make_dual(t, m) for t, m in zip(given, moves, strict=True)))
        assert_close(forward_ad.unpack_dual(dual).tangent, expected)
        one = solved(DESIGN, forward_ad.make_dual(TARGET, moves[1]), PENALTY)
        assert_close(forward_ad.unpack_dual(one).tangent, ridge(DESIGN, moves[1], PENALTY))  # it is linear


def test_derivatives_of_derivatives_in_any_order_but_forward_over_forward():
    def outer(penalty: Tensor, solved=implicit(ridge, ridge_slope)) -> Tensor:
        return solved(DESIGN, TARGET, penalty).square().sum()

    def closed(penalty: Tensor) -> Tensor:
        return outer(penalty, ridge)

    grad, one = torch.func.grad, torch.ones_like(PENALTY)
    second, third = grad(grad(closed))(PENALTY), grad(grad(grad(closed)))(PENALTY)
    assert_close(grad(grad(outer))(PENALTY), second)
    assert_close(grad(grad(grad(outer)))(PENALTY), third)
    assert_close(torch.func.jvp(grad(outer), (PENALTY,), (one,))[1], second)
    assert_close(grad(lambda p: torch.func.jvp(outer, (p,), (one,))[1])(PENALTY), second)


def test_torch_finds_the_derivatives_right():
    given = [t.clone().requires_grad_() for t in (DESIGN[:4, :2], TARGET[:4], PENALTY)]
    solved = implicit(ridge, ridge_slope)
    assert torch.autograd.gradcheck(solved, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solved, given, check_fwd_over_rev=True)


def test_what_has_no_gradient_is_handed_through():
    def solver(a: Tensor, which: Tensor, power: int) -> Tensor:
        assert not a.requires_grad and not torch.is_grad_enabled()
        return a[which] ** (1 / power)

    solved = implicit(solver, lambda x, a, which, power: x**power - a[which])
    a = torch.tensor([1.0, 8.0, 27.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(solved(a, torch.tensor([1, 2]), 3).sum(), a)
    assert_close(grad, torch.tensor([0.0, 1 / 12, 1 / 27], dtype=torch.float64))
    _, moved = torch.func.jvp(
        lambda a: solved(a, torch.tensor([1, 2]), 3), (a.detach(),), (torch.ones_like(a),)
    )
    assert_close(moved, torch.tensor([1 / 12, 1 / 27], dtype=torch.float64))


# -- f_softargmax, whose own implicit gradient has been checked ------------------------------------------


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), Alpha(0.5), SquaredHellinger()], ids=repr)
def test_f_softargmax_has_the_gradient_of_its_conditions(divergence):
    """theta_j - f'(x_j / q_j) = tau where x_j > 0, x_j = 0 elsewhere, and the sum is one."""
    log_q = draw(5, seed=6).log_softmax(-1)

    def solver(theta: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        x = f_softargmax(theta, divergence, log_q)
        best = x.argmax()
        return x, theta[best] - divergence.phi(x[best].log() - log_q[best])

    def conditions(solution: tuple[Tensor, Tensor], theta: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        x, tau = solution
        slope = divergence.phi(torch.where(x > 0, x, 1.0).log() - log_q)
        return torch.where(x > 0, theta - tau - slope, x), x.sum() - 1

    theta, weight = (2 * draw(5, seed=7)).requires_grad_(), draw(5, seed=8)
    reference = log_q.clone().requires_grad_()
    x, _ = implicit(solver, conditions)(theta, reference)
    found = torch.autograd.grad((weight * x).sum(), (theta, reference))
    own = torch.autograd.grad((weight * f_softargmax(theta, divergence, reference)).sum(), (theta, reference))
    assert_close(found, own)


# -- Sinkhorn's potentials: a singular system, and several problems at once ------------------------------

COST = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
BLUR = torch.tensor(0.2, dtype=torch.float64)
SCORES_A, SCORES_B = draw(3, 5, seed=10), draw(3, 4, seed=11)


def potentials(cost: Tensor, log_a: Tensor, log_b: Tensor, blur: Tensor) -> tuple[Tensor, Tensor]:
    f = torch.zeros_like(log_a)
    for _ in range(200):
        g = -blur * ((f.unsqueeze(-1) - cost) / blur + log_a.unsqueeze(-1)).logsumexp(-2)
        f = -blur * ((g.unsqueeze(-2) - cost) / blur + log_b.unsqueeze(-2)).logsumexp(-1)
    return f, g


def log_plan(potentials: tuple[Tensor, Tensor], cost: Tensor, log_a: Tensor, log_b: Tensor, blur: Tensor):
    f, g = potentials
    log_ratio = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / blur
    return log_ratio + log_a.unsqueeze(-1) + log_b.unsqueeze(-2)


def marginals(potentials: tuple[Tensor, Tensor], *given: Tensor) -> tuple[Tensor, Tensor]:
    plan = log_plan(potentials, *given).exp()
    return plan.sum(-1) - given[1].exp(), plan.sum(-2) - given[2].exp()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("linear", [GMRES(), ConjugateGradients(), LeastSquares()], ids=repr)
def test_the_transport_plan_has_the_gradient_of_sinkhorn_unrolled(linear, batched):
    """A constant moves from f to g without effect: the system is singular, and the plan does not care."""

    def gradients(solver) -> tuple[Tensor, ...]:
        given = [t.clone().requires_grad_() for t in (COST, SCORES_A, SCORES_B, BLUR)]
        inputs = (given[0], given[1].log_softmax(-1), given[2].log_softmax(-1), given[3])
        weight = draw(3, 5, 4, seed=12)
        return torch.autograd.grad((weight * log_plan(solver(*inputs), *inputs).exp()).sum(), given)

    assert_close(gradients(implicit(potentials, marginals, linear, batched)), gradients(potentials), 1e-8)


def test_problems_of_a_batch_are_each_solved_for_themselves():
    """As one block-diagonal system they need as many steps as they have unlike eigenvalues, together."""
    scales = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 300.0]], dtype=torch.float64)
    problem = (lambda a: a / scales, lambda x, a: scales * x - a)
    a = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    few = GMRES(steps=2)
    (grad,) = torch.autograd.grad(implicit(*problem, few, batched=True)(a).sum(), a)
    assert_close(grad, 1 / scales)
    with pytest.raises(ArithmeticError, match="stopped with a residual"):
        torch.autograd.grad(implicit(*problem, few)(a).sum(), a)


# -- the linear solvers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [GMRES(), GMRES(memory=4), LeastSquares(steps=5000)], ids=repr)
def test_any_matrix_is_solved_row_by_row(solver):
    matrices, right = draw(2, 12, 12, seed=13) + 6 * torch.eye(12), draw(2, 12, seed=14)
    right[1] = 0.0  # nothing to do here, and no 0/0
    x = solver(
        lambda v: (matrices @ v.unsqueeze(-1)).squeeze(-1),
        lambda v: (matrices.mT @ v.unsqueeze(-1)).squeeze(-1),
        right,
    )
    assert_close(x, torch.linalg.solve(matrices, right))
    assert (x[1] == 0).all()


def test_a_symmetric_matrix_of_either_sign_and_its_ridge():
    half, right = draw(6, 6, seed=15), draw(1, 6, seed=16)
    matrix = half @ half.T + torch.eye(6)
    for sign in (1.0, -1.0):
        given = (lambda v, s=sign: s * v @ matrix,) * 2
        assert_close(ConjugateGradients()(*given, right), torch.linalg.solve(sign * matrix, right[0])[None])
        shifted = sign * (matrix + 0.5 * torch.eye(6))
        found = ConjugateGradients(ridge=sign * 0.5)(*given, right)
        assert_close(found, torch.linalg.solve(shifted, right[0])[None])


def test_least_squares_takes_the_least_solution_of_a_singular_system():
    """Of x_1 + x_2 = 2: (1, 1); of (1, 3), which no x solves, the nearest: (2, 2)."""
    matrix = torch.ones(2, 2, dtype=torch.float64) / 2
    right = torch.tensor([[1.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    given = (lambda v: v @ matrix,) * 2
    assert_close(LeastSquares()(*given, right), torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64))
    assert_close(LeastSquares(ridge=1.0)(*given, right)[0], torch.full((2,), 0.5, dtype=torch.float64))
    with pytest.raises(ArithmeticError, match=r"LeastSquares\(ridge=...\)"):
        GMRES()(*given, right)


# -- refusals --------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    a = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"the shapes of x \[\(3,\)\], got \[\(\)\]"):
        implicit(lambda a: a, lambda x, a: (x - a).sum())(a).sum().backward()
    for bad in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance is relative"):
            GMRES(tolerance=bad)
    with pytest.raises(ValueError, match="steps is the number of steps"):
        ConjugateGradients(steps=0)
    with pytest.raises(ValueError, match="memory is the number of vectors"):
        GMRES(memory=0)
    with pytest.raises(ValueError, match="ridge is finite"):
        LeastSquares(ridge=-1.0)
