"""The value of a solved problem as a function of costs and weights, to first order or to every order."""

import torch
from torch import Tensor

from fdiv.operators.implicit import implicit
from fdiv.operators.linear import ConjugateGradients
from fdiv.transport._given import Given, GivenPoints, are_kept
from fdiv.transport._pairs import Dense, weighted
from fdiv.transport._problem import Solution


def dual_value(
    given: Given | GivenPoints, f: Tensor, g: Tensor, x: Tensor, y: Tensor, mass: Tensor
) -> Tensor:
    """sum_i a_i (-phi*(-f_i)) + the same of b - eps (mass of the plan - m_a m_b), f and g in units of eps."""
    a, b, eps = given.log_a.exp(), given.log_b.exp(), given.eps
    gain_a, gain_b = given.at_a.gain(f, x, eps), given.at_b.gain(g, y, eps)
    gains = (a * torch.where(a > 0, gain_a, 0.0)).sum(-1) + (b * torch.where(b > 0, gain_b, 0.0)).sum(-1)
    return eps.squeeze(-1) * (gains - mass + a.sum(-1) * b.sum(-1))


# -- first order ---------------------------------------------------------------------------------------------


def envelope(given: Given | GivenPoints, found: Solution, value: Tensor) -> Tensor:
    """The value, with its derivatives at fixed potentials, which are all there are at an optimum."""
    eps, f, g = given.eps, found.f, found.g
    gains = given.at_a.gain(f, found.x, eps), given.at_b.gain(g, found.y, eps)
    known = (given.log_a, given.log_b, eps, f, g, *gains, value)
    if isinstance(given, GivenPoints):
        return _OfPoints.apply(given.x, given.y, *known, (given.cost, given.chunk))
    return _OfCosts.apply(given.cost, *known)


class _OfCosts(torch.autograd.Function):
    @staticmethod
    def forward(cost, log_a, log_b, eps, f, g, gain_a, gain_b, value):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        given = ctx.saved_tensors[:3]
        with torch.no_grad():
            cost, log_a, log_b, eps, f, g, *gains = ctx.saved_tensors
            plan = Dense(cost / eps.unsqueeze(-1)).log_plan(weighted(f, log_a), weighted(g, log_b)).exp()
            in_weights = _in_weights(grad, log_a, log_b, eps, gains, plan.sum(-1), plan.sum(-2))
            in_cost = (grad.unsqueeze(-1).unsqueeze(-1) * plan).sum_to_size(cost.shape)
        return *_FirstOrder.apply(3, in_cost, *in_weights, *given, grad), None, None, None, None, None, None


class _OfPoints(torch.autograd.Function):
    @staticmethod
    def forward(x, y, log_a, log_b, eps, f, g, gain_a, gain_b, value, tiles):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cost, ctx.chunk = inputs[-1]
        ctx.save_for_backward(*inputs[:-2])

    @staticmethod
    def backward(ctx, grad: Tensor):
        given = ctx.saved_tensors[:4]
        with torch.no_grad():
            x, y, log_a, log_b, eps, f, g, *gains = ctx.saved_tensors
            rows, columns = weighted(f, log_a), weighted(g, log_b)
            in_x, in_y, of_rows, of_columns = [], torch.zeros_like(y), [], torch.zeros_like(columns)
            for first in range(0, x.shape[-2], ctx.chunk):
                block = slice(first, first + ctx.chunk)
                cost, pull = torch.func.vjp(ctx.cost, x[..., block, :], y)[:2]
                plan = Dense(cost / eps.unsqueeze(-1)).log_plan(rows[..., block], columns).exp()
                to_x, to_y = pull(grad.unsqueeze(-1).unsqueeze(-1) * plan)
                in_x.append(to_x)
                of_rows.append(plan.sum(-1))
                in_y, of_columns = in_y + to_y, of_columns + plan.sum(-2)
            in_weights = _in_weights(grad, log_a, log_b, eps, gains, torch.cat(of_rows, -1), of_columns)
        results = _FirstOrder.apply(4, torch.cat(in_x, -2), in_y, *in_weights, *given, grad)
        return *results, None, None, None, None, None, None, None


def _in_weights(grad: Tensor, log_a, log_b, eps, gains, of_rows: Tensor, of_columns: Tensor):
    """Derivatives in the log-weights, from the plan's marginals."""
    share, a, b = grad.unsqueeze(-1) * eps, log_a.exp(), log_b.exp()
    in_a = _priced(a, gains[0], of_rows, b.sum(-1, keepdim=True))
    in_b = _priced(b, gains[1], of_columns, a.sum(-1, keepdim=True))
    return share * in_a, share * in_b


class _FirstOrder(torch.autograd.Function):
    """Derivatives that may not be differentiated again: the potentials were taken to be fixed."""

    @staticmethod
    def forward(count, *results_and_given):
        return tuple(result.clone() for result in results_and_given[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            'grad="envelope" gives first derivatives only: the second ones would be silently wrong, as the '
            'potentials count as fixed. Write grad="implicit" (or "unroll")'
        )


def _priced(weight: Tensor, gain: Tensor, marginal: Tensor, other_mass: Tensor) -> Tensor:
    """weight times the derivative in the weight, per eps: gain - (marginal / weight - mass of the other)."""
    return torch.where(weight > 0, weight * (gain + other_mass) - marginal, 0.0)


# -- every order ---------------------------------------------------------------------------------------------


def implicit_potentials(given: Given, found: Solution) -> tuple[Tensor, Tensor]:
    """F and G with their derivatives, from the equations that an optimum satisfies.

    The unknowns are sqrt(a) F and sqrt(b) G: so the system is symmetric and well scaled. An atom without
    weight keeps its potential, on which nothing depends. Where both marginals are kept, F + c and G - c
    solve the equations, too, and <a, F> = <b, G> is added to them.
    """
    at_a, at_b = given.at_a, given.at_b
    held_a, held_b = given.log_a.detach() > -torch.inf, given.log_b.detach() > -torch.inf
    root_a = torch.where(held_a, given.log_a.detach() / 2, 0.0).exp()
    root_b = torch.where(held_b, given.log_b.detach() / 2, 0.0).exp()
    fixed = (torch.where(held_a, found.f * root_a, 0.0), torch.where(held_b, found.g * root_b, 0.0))

    def equations(unknown, cost, log_a, log_b, eps):
        f, g, a, b = unknown[0] / root_a, unknown[1] / root_b, log_a.exp(), log_b.exp()
        plan = Dense(cost / eps.unsqueeze(-1)).log_plan(weighted(f, log_a), weighted(g, log_b)).exp()
        off_a = plan.sum(-1) - a * at_a.log_ratio(f, eps, found.x).exp()
        off_b = plan.sum(-2) - b * at_b.log_ratio(g, eps, found.y).exp()
        if are_kept(at_a, at_b):
            level = ((a * f).sum(-1, keepdim=True) - (b * g).sum(-1, keepdim=True)) / a.sum(-1, keepdim=True)
            off_a, off_b = off_a + a * level, off_b - b * level
        off_a = torch.where(held_a, off_a / root_a, unknown[0] - fixed[0])
        return off_a, torch.where(held_b, off_b / root_b, unknown[1] - fixed[1])

    solve = implicit(lambda *_: fixed, equations, ConjugateGradients(), batched=True)
    f, g = solve(given.cost.expand(len(given.log_a), -1, -1), given.log_a, given.log_b, given.eps)
    return torch.where(held_a, f / root_a, found.f), torch.where(held_b, g / root_b, found.g)


def unrolled(given: Given, start: tuple[Tensor, Tensor], tolerance: Tensor, most: int, mirrored: bool):
    """(F, G, error, steps): Sinkhorn's iteration in logarithms, which autograd follows step by step."""
    pairs, log_a, log_b, eps = given.pairs, given.log_a, given.log_b, given.eps
    f, g = start
    step = 0
    while True:
        exact = pairs.rows(weighted(g, log_b))
        wanted = given.at_a.potential(exact, eps)
        with torch.no_grad():
            a = log_a.exp()
            off = a * ((f - exact).exp() - (wanted - exact).exp()).abs()
            error = torch.where(a > 0, off, 0.0).sum(-1) / a.sum(-1)
        if step == most or (step > 0 and bool((error <= tolerance).all())):
            return f, g, error, torch.full_like(error, step, dtype=torch.long)
        if mirrored:
            f = g = (f + wanted) / 2
        else:
            f, g = wanted, given.at_b.potential(pairs.columns(weighted(wanted, log_a)), eps)
        step += 1
