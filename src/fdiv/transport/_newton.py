"""Newton's method on the dual value as a function of one side's potential, for what is slow otherwise.

With the rows fitted at each G the dual value h(G) is concave, its gradient what the columns lack, and its
curvature diag(c + slack) - P' diag(r)^-1 P: one Cholesky factor a step. Where a step does not raise h enough,
one step of Sinkhorn's is taken in its place, which always does. Always in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.transport._problem import Problem

TRIALS = 12  # of ever shorter steps
RISE = 1e-4  # of the promised gain in h, from which a step is taken
DAMPING = 1e-2  # of the error is added to the curvature, which is all but singular far from the solution


class Point(NamedTuple):
    """The dual value at G and what the next step needs. P [problems, N, M], the rest [problems, atoms]."""

    f: Tensor
    g: Tensor
    x: Tensor  # log-ratios of the wanted marginals
    y: Tensor
    plan: Tensor
    lacking: Tensor  # what the columns are short of
    height: Tensor  # [problems]


def ascend(problem: Problem, g: Tensor, tolerance: Tensor, steps: int) -> tuple[Point, Tensor, Tensor]:
    """(where it ended, the columns' L1 error over the mass of a, steps taken)."""
    mass = problem.log_a.exp().sum(-1)
    point = _at(problem, g)
    taken = torch.zeros_like(mass, dtype=torch.long)
    damping = torch.full_like(mass, DAMPING)
    for _ in range(steps):
        error = point.lacking.abs().sum(-1) / mass
        at_work = ~(error <= tolerance)
        if not bool(at_work.any()):
            break
        direction = _direction(problem, point, damping * error)
        point, rose = _climb(problem, point, direction, at_work)
        damping = torch.where(rose, damping / 3, damping * 10).clamp(1e-4, 100.0)
        taken = taken + at_work
    return point, point.lacking.abs().sum(-1) / mass, taken


def _at(problem: Problem, g: Tensor, guess: Tensor | None = None) -> Point:
    pairs, log_a, log_b, eps, at_a, at_b = problem
    a, b = log_a.exp(), log_b.exp()
    exact = torch.where(a > 0, pairs.rows(g + log_b), 0.0)
    f = at_a.potential(exact, eps, guess)
    plan = pairs.log_plan(f + log_a, g + log_b).exp()
    x, y = f - exact, at_b.log_ratio(g, eps, plan.sum(-2).log() - log_b)
    y = torch.where(b > 0, y, 0.0)
    gains = (a * at_a.gain(f, x, eps)).sum(-1) + (b * at_b.gain(g, y, eps)).sum(-1)
    return Point(f, g, x, y, plan, b * y.exp() - plan.sum(-2), gains - (a * x.exp()).sum(-1))


def _direction(problem: Problem, point: Point, damping: Tensor) -> Tensor:
    """The step [problems, M]."""
    in_a, in_b = problem.at_a.slack(point.x, problem.eps), problem.at_b.slack(point.y, problem.eps)
    rows = problem.log_a.exp() * point.x.exp() * (1 + in_a)
    bottom = point.plan.sum(-2) + problem.log_b.exp() * point.y.exp() * in_b
    stiff = (in_a == 0).all(-1, keepdim=True) & (in_b == 0).all(-1, keepdim=True)
    return factored_step(point.plan, rows, bottom, point.lacking, damping, stiff)


def factored_step(
    plan: Tensor, rows: Tensor, bottom: Tensor, lacking: Tensor, damping: Tensor, stiff: Tensor | bool = True
) -> Tensor:
    """(diag(bottom) - P' diag(rows)^-1 P)^-1 lacking [problems, M], 0 where it cannot be had.

    Where nothing gives way, `stiff`, the matrix takes no notice of a constant; nor does the plan.
    """
    scale = inverse_root(bottom)
    q = plan * inverse_root(rows).unsqueeze(-1) * scale.unsqueeze(-2)
    flat = torch.nn.functional.normalize(torch.where(torch.as_tensor(stiff), bottom, 0.0).sqrt(), dim=-1)
    curvature = flat.unsqueeze(-1) * flat.unsqueeze(-2) - q.mT @ q
    curvature.diagonal(dim1=-2, dim2=-1).add_(1 + damping.clamp(1e-13, 0.1).unsqueeze(-1))
    factor, failed = torch.linalg.cholesky_ex(curvature)
    step = torch.cholesky_solve((lacking * scale).unsqueeze(-1), factor).squeeze(-1) * scale
    usable = (failed == 0) & step.isfinite().all(-1)
    return torch.where(usable.unsqueeze(-1), step, 0.0)


def _climb(problem: Problem, point: Point, step: Tensor, at_work: Tensor) -> tuple[Point, Tensor]:
    """(the next point, where it is by the step), each problem on its own."""
    pairs, log_a, _, eps, _, at_b = problem
    promised = (step * point.lacking).sum(-1)
    rising, slack = at_work & (promised > 0), 1e-14 * point.height.abs()
    length, rose, new = rising.to(step.dtype), torch.zeros_like(rising), point
    for _ in range(TRIALS):
        g = at_b.allowed(point.g + length.unsqueeze(-1) * step, eps)
        new = _at(problem, g, point.x)
        rose = rising & (new.height >= point.height + RISE * length * promised - slack)
        if bool((rose | ~rising).all()):
            break
        length = torch.where(rose, length, length / 4)
    if bool((rose | ~at_work).all()):
        return new, rose
    plain = at_b.potential(pairs.columns(point.f + log_a), eps)
    plain = torch.where(at_work.unsqueeze(-1), plain, point.g)
    return _at(problem, torch.where(rose.unsqueeze(-1), new.g, plain), point.x), rose


def inverse_root(x: Tensor) -> Tensor:
    """0 where x is 0, an atom without weight, or inf, one that is held: both stand aside."""
    return torch.where(x > 0, x, 1.0).rsqrt() * (x > 0)
