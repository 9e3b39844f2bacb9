"""Sinkhorn's iteration for many problems at once, until the marginal that was not just fitted is near enough.

A step fits the rows, F = -log sum_j b_j e^(G_j - C_ij), then the columns. Where the cost is in memory a step
is two products with a kernel e^(F0 + G0 - C), which is made anew when the potentials have moved far from
where it was made: no exponential of costs a step, and in float32 neither over- nor underflow. Steps are
stretched by what is seen of their rate, and problems that are slow all the same end with Newton's method. All
in units of eps.
"""

import torch
from torch import Tensor

from fdiv.transport._newton import ascend
from fdiv.transport._pace import Pace
from fdiv.transport._pairs import Dense, weighted
from fdiv.transport._problem import Problem, Solution, Stop
from fdiv.transport._run import Mirror, Run

FAR = 0.5  # the error of a given start from which it is not used
LONGEST = 10  # steps between two looks at the error
PATIENCE = 50  # steps before Newton's method may take over,
WORTH = 400  # and the steps still to go from which it is the cheaper
NEWTON_SIZE, NEWTON_STEPS = 2048, 300  # atoms of the smaller side, and when to give up


def alternate(problem: Problem, start: tuple[Tensor, Tensor], stop: Stop) -> Solution:
    """Fit rows and columns in turn."""
    newton = stop.newton and _suits_newton(problem)
    return _iterate(Run(problem, *start), stop._replace(newton=newton))


def average(problem: Problem, start: Tensor, stop: Stop) -> Solution:
    """The problem of a measure with itself: half a step at a time keeps F = G, and converges at once."""
    return _iterate(Mirror(problem, start, start), stop._replace(newton=False))


def anneal(problem: Problem) -> tuple[Tensor, Tensor]:
    """Potentials from one step at each of the temperatures 2^k eps, from the largest cost down."""
    pairs, log_a, log_b, eps, at_a, at_b = problem
    heat = (1 / pairs.most()).clamp(max=1.0).expand_as(eps)
    g = torch.zeros_like(log_b)
    while True:
        f = at_a.potential(pairs.rows(weighted(heat * g, log_b), heat), eps / heat) / heat
        g = at_b.potential(pairs.columns(weighted(heat * f, log_a), heat), eps / heat) / heat
        if bool((heat >= 1).all()):
            return f, g
        heat = (2 * heat).clamp(max=1.0)


def nearer(
    problem: Problem, start: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """`start` where its marginals are roughly right, else `other`: from far away a small eps takes long."""
    run = Run(problem, *start)
    near = (run.error(run.exact_rows()) < FAR).unsqueeze(-1)
    return torch.where(near, start[0], other[0]), torch.where(near, start[1], other[1])


def _iterate(run: Run, stop: Stop) -> Solution:
    roll, pace, length = _Roll(run), Pace(run), 1
    while True:
        exact = run.exact_rows()
        if run.is_far() and run.steps < stop.steps:
            run.renew()
            pace, length = Pace(run), 1
            continue
        error = run.error(exact)
        there = (error <= stop.tolerance[roll.left]) | (run.steps >= stop.steps)
        roll.end(there, run.solution(exact, error))
        if not bool(roll.held.any()):
            return roll.result()
        if 2 * int(roll.held.sum()) <= len(roll.held):  # go on with those that are not there yet
            at = roll.close_up()
            run.take(at)
            pace.take(at)
            exact, error = exact[at], error[at]
        togo = pace.look(run, error, stop.tolerance[roll.left])
        if stop.newton and run.steps >= PATIENCE and bool((togo[roll.held] > WORTH).any()):
            return roll.result(_by_newton(run, roll.held, stop, stop.tolerance[roll.left]))
        length = min(length, stop.steps - run.steps)
        for step in range(length):
            exact = run.exact_rows() if step > 0 or pace.has_gone_back else exact
            run.step(exact, pace.relaxation, last=step == length - 1)
        length = min(2 * length, LONGEST)


class _Roll:
    """Which of the problems are still at work, and what became of the others when they ended."""

    def __init__(self, run: Run):
        self.left = torch.arange(len(run.a), device=run.a.device)  # those in `run`, by number
        self.held = torch.ones_like(self.left, dtype=torch.bool)  # which of these have not ended
        self.ended: list[tuple[Tensor, Solution]] = []

    def end(self, there: Tensor, solution: Solution) -> None:
        now = self.held & there
        if bool(now.any()):
            self.ended.append((self.left[now], Solution(*(part[now] for part in solution))))
            self.held = self.held & ~now

    def close_up(self) -> Tensor:
        """Which to keep."""
        at = self.held.nonzero().squeeze(-1)
        self.left, self.held = self.left[at], self.held[at]
        return at

    def result(self, rest: Solution | None = None) -> Solution:
        """All problems as they were given, whenever they ended."""
        ended = self.ended if rest is None else [*self.ended, (self.left[self.held], rest)]
        order = torch.cat([index for index, _ in ended]).argsort()
        return Solution(*(torch.cat(parts)[order] for parts in zip(*(s for _, s in ended), strict=True)))


def _suits_newton(problem: Problem) -> bool:
    side = min(problem.log_a.shape[-1], problem.log_b.shape[-1])
    smooth = problem.at_a.suits_newton and problem.at_b.suits_newton
    return isinstance(problem.pairs, Dense) and smooth and side <= NEWTON_SIZE


def _by_newton(run: Run, held: Tensor, stop: Stop, tolerance: Tensor) -> Solution:
    """The rest of the way in float64, from the smaller side."""
    problem = run.problem.take(held)
    turned = problem.log_a.shape[-1] < problem.log_b.shape[-1]
    start = (run.f0 + run.f if turned else run.g0 + run.g)[held]
    problem = (problem.turned() if turned else problem).double()
    most = min(stop.steps - run.steps, NEWTON_STEPS)
    point, error, taken = ascend(problem, start.double(), tolerance[held], most)
    found = (point.f, point.g, point.x, point.y, point.plan.sum((-2, -1)), error)
    f, g, x, y, mass, error = (t.to(start.dtype) for t in found)
    sides = (g, f, y, x) if turned else (f, g, x, y)
    return Solution(*sides, mass, error, taken + run.steps)
