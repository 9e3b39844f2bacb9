"""Sinkhorn-Newton-Sparse: a few steps of Sinkhorn's, then Newton's method with a thinned-out Hessian.

Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying, "Accelerating Sinkhorn Algorithm with Sparse
Newton Iterations", arXiv 2401.12253.

    M [dx; dy] = [r - P 1; c - P' 1],      M = [[diag(P 1), P], [P', diag(P' 1)]]

Near the optimum P is all but sparse: its largest entries are kept off the diagonal, and the diagonal is
whole, so M stays positive. The paper's eta is 1 / eps, its x and y are f and g, its r and c are a and b, its
N_1 is `warmup`; for lambda, the density that is kept, stands `keep`, entries an atom. Here rows are fitted
after each step, and a ridge that fades with the error keeps the first ones short.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.operators.linear import Product
from fdiv.transport._given import given_costs
from fdiv.transport._marginals import Exact
from fdiv.transport._newton import DAMPING, factored_step, inverse_root
from fdiv.transport._pairs import Dense, weighted
from fdiv.transport._plan import Transport
from fdiv.transport._problem import Solution
from fdiv.transport._solved import Solver, finished, tolerance_of

SUFFICIENT = 1e-4  # of the promised gain, from which a step is taken
SHORTEST = 1e-3  # a step below which Sinkhorn's is better
CLOSE = 0.1  # an error from which steps should be quadratic:
LINEAR = 0.3  # an error that falls by less in a step needs more of P
DENSE = 0.2  # the share of P from which the whole Hessian is factored


def sparse_newton(
    cost: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    eps: float = 1.0,
    *,
    warmup: int = 20,
    keep: int = 4,
    solver: Solver = Solver(),
) -> Transport:
    """Balanced entropic transport on one cost [N, M], in float64: what `sinkhorn` finds, in fewer steps.

    `warmup`: steps of Sinkhorn's; then Newton steps with the keep x max(N, M) largest entries of P, twice as
    many whenever a step leaves more than 0.3 of the error. `solver` says when to stop; `iterations` counts
    both kinds of steps. The value is differentiable once, as with grad="envelope".
    Errors: ValueError for a batch, and for anything but float64: the last digits of P decide the step.
    """
    if cost.ndim != 2 or cost.dtype != torch.float64:
        raise ValueError(
            f"sparse_newton takes one cost [N, M] in float64, got {tuple(cost.shape)} in {cost.dtype}; for a "
            "batch or float32 write sinkhorn(...), which ends with a dense Newton's method"
        )
    if warmup < 1 or keep < 1:
        raise ValueError(f"warmup and keep are at least 1, got {warmup!r} and {keep!r}")
    given, batch = given_costs(cost, log_a, log_b, eps, (Exact(), Exact()))
    with torch.no_grad():
        plain = given.detached()
        tolerance = tolerance_of(plain.pairs, plain.eps, solver)
        search = _Search(plain.pairs, plain.log_a, plain.log_b, keep * max(cost.shape))
        steps = search.run(warmup, tolerance.item(), solver.max_iter)
        found = search.point.solution(steps)
    return finished(given, found, tolerance, batch, "product", "envelope", solver)


class _Point(NamedTuple):
    """Potentials in units of eps [1, atoms], and the plan [1, N, M] that they make."""

    f: Tensor
    g: Tensor
    plan: Tensor
    lacking_a: Tensor  # a - P 1
    lacking_b: Tensor
    height: Tensor  # the dual value, [1]

    @property
    def error(self) -> Tensor:
        return self.lacking_a.abs().sum(-1) + self.lacking_b.abs().sum(-1)

    def solution(self, steps: int) -> Solution:
        x, y = torch.zeros_like(self.f), torch.zeros_like(self.g)
        mass = (self.plan.sum(-1) + self.lacking_a).sum(-1)
        count = torch.full_like(mass, steps, dtype=torch.long)
        return Solution(self.f, self.g, x, y, self.plan.sum((-2, -1)), self.error / mass, count)


class _Search:
    def __init__(self, pairs: Dense, log_a: Tensor, log_b: Tensor, kept: int):
        self.pairs, self.log_a, self.log_b = pairs, log_a, log_b
        self.a, self.b = log_a.exp(), log_b.exp()
        self.kept = min(kept, pairs.scaled.numel())
        self.damping = DAMPING
        self.point = self._at(*pairs.start(log_a, log_b))

    def run(self, warmup: int, tolerance: float, most: int) -> int:
        """The steps it took."""
        goal = tolerance * self.a.sum()
        for step in range(most):
            before = self.point.error
            if not bool(before > goal):
                return step
            if step < warmup or not self._newton():
                self._sinkhorn()
            elif bool((self.point.error > LINEAR * before) & (before < CLOSE * self.a.sum())):
                self.kept = min(2 * self.kept, self.pairs.scaled.numel())
        return most

    def _at(self, f: Tensor, g: Tensor) -> _Point:
        f, g = f.nan_to_num(posinf=0.0), g.nan_to_num(posinf=0.0)
        plan = self.pairs.log_plan(weighted(f, self.log_a), weighted(g, self.log_b)).exp()
        height = (self.a * f).sum(-1) + (self.b * g).sum(-1) - plan.sum((-2, -1))
        return _Point(f, g, plan, self.a - plan.sum(-1), self.b - plan.sum(-2), height)

    def _sinkhorn(self) -> None:
        f = self.pairs.rows(weighted(self.point.g, self.log_b))
        self.point = self._at(f, self.pairs.columns(weighted(f, self.log_a)))

    def _newton(self) -> bool:
        """One step uphill, if there is one."""
        point = self.point
        damping = (self.damping * point.error / self.a.sum()).clamp(1e-13, 1e-3)
        step = _direction(point, self.kept, damping)
        promised = (step * point.lacking_b).sum(-1)
        length, slack = 1.0, 1e-16 * point.height.abs()
        while length >= SHORTEST:
            g = point.g + length * step
            new = self._at(self.pairs.rows(weighted(g, self.log_b)), g)
            if bool(new.height >= point.height + SUFFICIENT * length * promised - slack):
                self.point, self.damping = new, max(self.damping / 3, DAMPING / 100)
                return True
            length /= 4
        self.damping = min(10 * self.damping, 1.0)
        return False


def _direction(point: _Point, kept: int, damping: Tensor) -> Tensor:
    """The step of G [1, M]; the rows are fitted exactly after it."""
    rows, columns = point.plan.sum(-1), point.plan.sum(-2)
    if kept > DENSE * point.plan.numel():  # nothing to be gained, and without a dropped entry M is singular
        return factored_step(point.plan, rows, columns, point.lacking_b, damping)
    scale_f, scale_g = inverse_root(rows)[0], inverse_root(columns)[0]
    there, back = _largest(point.plan[0] * scale_f.unsqueeze(-1) * scale_g, kept)
    # M takes no notice of (1, -1), as F + c and G - c are no other plan: the step is across that.
    flat = torch.cat([rows[0].sqrt(), -columns[0].sqrt()])
    flat, split = flat / flat.norm(), rows.shape[-1]

    def times(d: Tensor) -> Tensor:
        return (1 + damping) * d + torch.cat([there(d[split:]), back(d[:split])])

    right = torch.cat([point.lacking_a[0] * scale_f, point.lacking_b[0] * scale_g])
    return (_conjugate_gradients(times, right, flat)[split:] * scale_g).unsqueeze(0)


def _largest(plan: Tensor, kept: int) -> tuple[Product, Product]:
    """v -> P v and v -> P' v with so many entries of P."""
    entry, at = plan.flatten().topk(kept, sorted=False)
    row, column = at // plan.shape[1], at % plan.shape[1]
    rows, columns = plan.new_zeros(plan.shape[0]), plan.new_zeros(plan.shape[1])
    return (
        lambda v: rows.index_add(0, row, entry * v[column]),
        lambda v: columns.index_add(0, column, entry * v[row]),
    )


def _conjugate_gradients(times: Product, right: Tensor, flat: Tensor, tolerance: float = 1e-10) -> Tensor:
    """Across `flat`. Where the system is singular beside that it ends early, still going uphill."""
    residual = right - flat * (flat @ right)
    x, direction, square = torch.zeros_like(right), residual, residual @ residual
    goal = tolerance**2 * square
    for _ in range(2 * len(right)):
        along = times(direction)
        curve = direction @ along
        if not bool((square > goal) & (curve > 0)):
            break
        x = x + square / curve * direction
        residual = residual - square / curve * along
        residual = residual - flat * (flat @ residual)
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    return x - flat * (flat @ x)
