"""B15: 64 entropic transport problems at once, everybody set to one and the same error of the dual value."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Outcome, Target
from benchmarks.speed.measure import Absent, relative_error
from benchmarks.speed.peers import peer

BATCH, POINTS = 64, 64
BLUR = 0.09  # eps = blur^2 is then a twentieth of the mean cost in the unit square
ERROR = 1e-3
SCALINGS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.998)
ITERATIONS = (5, 10, 15, 20, 25, 30, 35, 40, 50, 70, 100, 150, 200, 300, 500)
TOLERANCES = (0.5, 0.3, 0.2, 0.1, 0.07, 0.05, 0.04, 0.03, 0.02, 0.01, 3e-3, 1e-3)
CONVERGED = 3000


class Solver(NamedTuple):
    """`ladder`: settings from the cheapest to the most accurate. `promise`: its time over ours."""

    name: str
    solve: Callable[[float], Outcome]
    ladder: tuple[float, ...]
    promise: float | None = None


def cases(quick: bool) -> Iterator[Case]:
    batch, points = (4, 16) if quick else (BATCH, POINTS)
    for backward in (False, True):
        x, y = problem(batch, points)
        x.requires_grad_(backward)
        reference = _exact(x.detach().double(), y.double())
        what = "value and gradient of" if backward else "value of"
        yield Case(
            rows="B15",
            setting=f"{what} {batch} problems of {points} x {points}, blur {BLUR}, dual error ≤ {ERROR:g}",
            candidates=tuple(_candidate(solver, reference) for solver in _solvers(x, y)),
            reference=partial(_same, reference),
            repeat=3,
        )


def _same(outcome: Outcome) -> Outcome:
    return outcome


def problem(batch: int, points: int) -> tuple[Tensor, Tensor]:
    """Two clouds of points in the unit square, [batch, points, 2] each."""
    x, y = torch.rand(2, batch, points, 2, generator=torch.Generator().manual_seed(0))
    return x, y


def _solvers(x: Tensor, y: Tensor) -> list[Solver]:
    def pot(function: str) -> Callable[[float], Outcome]:
        return lambda iterations: peer("transport", function, x, y, BLUR, int(iterations))()

    def geomloss(scaling: float) -> Outcome:
        return peer("transport", "geomloss_sinkhorn", x, y, BLUR, scaling)()

    return [
        Solver("fdiv Sinkhorn", partial(ours.sinkhorn, x, y, BLUR), TOLERANCES),
        Solver("POT solve_batch", pot("pot_batch"), ITERATIONS, 4.0),
        Solver("geomloss", geomloss, SCALINGS, 1.3),
        Solver("POT sinkhorn_log, a loop", pot("pot_loop"), ITERATIONS),
    ]


def _candidate(solver: Solver, reference: Outcome) -> Candidate:
    targets = () if solver.promise is None else (Target("B15", "time", at_least=solver.promise),)
    try:
        setting, error = _cheapest(solver, reference)
    except (Absent, ImportError):  # said again, and noted, when it is measured
        return Candidate(solver.name, partial(solver.solve, solver.ladder[0]), targets=targets)
    word = {SCALINGS: "scaling", TOLERANCES: "tolerance"}.get(solver.ladder, "iterations")
    missed = "" if error <= ERROR else f", error {error:.0e}: no setting tried is better"
    note = f"{word} {setting:g}{missed}"
    return Candidate(solver.name, partial(solver.solve, setting), targets=targets, note=note)


def _cheapest(solver: Solver, reference: Outcome) -> tuple[float, float]:
    """The first setting that is accurate enough, or else the most accurate one."""
    best = (solver.ladder[0], math.inf)
    for setting in solver.ladder:
        error = relative_error(solver.solve(setting).value, reference.value)
        if error < best[1]:
            best = (setting, error)
        if error <= ERROR:
            break
    return best


def _exact(x: Tensor, y: Tensor) -> Outcome:
    """The converged dual value in float64, with C = |x - y|^2 / 2 and eps = blur^2, and its gradient in x."""
    eps, cost = BLUR**2, torch.cdist(x, y).square() / 2
    log_weight = -math.log(x.shape[-2])
    g = torch.zeros_like(cost[..., 0, :])
    for _ in range(CONVERGED):
        f = -eps * (log_weight + (g.unsqueeze(-2) - cost) / eps).logsumexp(-1)
        g = -eps * (log_weight + (f.unsqueeze(-1) - cost) / eps).logsumexp(-2)
    plan = (2 * log_weight + (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps).exp()
    return Outcome(f.mean(-1) + g.mean(-1), (plan.sum(-1, keepdim=True) * x - plan @ y,))
