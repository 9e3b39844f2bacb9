"""From a problem to the result: solved without a graph, and then made differentiable."""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fdiv.transport._given import Given, GivenPoints, Gradient, Reference, are_kept
from fdiv.transport._gradients import dual_value, envelope, implicit_potentials, unrolled
from fdiv.transport._pairs import Dense, Tiles, weighted
from fdiv.transport._plan import Transport
from fdiv.transport._problem import Problem, Solution, Stop
from fdiv.transport._solver import alternate, anneal, average, nearer

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
WIDE = 1000.0  # from this |cost| / eps on, the start is annealed


@dataclass(frozen=True)
class Solver:
    """When to stop, and how to get there.

    `tolerance`: of the L1 distance of a marginal to what it should be, over the mass of a. None is 1e-9 in
    float64 and 1e-5 in float32, or what rounding allows where |C| / eps is large: its maximum times the
    epsilon of the dtype.
    `max_iter`: steps, each of which fits both marginals. `unconverged`: what to do about a problem that is
    not there by then; the result says so in any case.
    `annealed`: start at a high eps and halve it; None does so where |C| / eps exceeds 1000.
    `newton`: let Newton's method end problems that converge slowly, if the smaller side has at most 2048
    atoms. It works in float64, and each of its steps takes a Cholesky factor of that side.
    """

    tolerance: float | None = None
    max_iter: int = 10_000
    unconverged: Literal["warn", "raise", "ignore"] = "warn"
    annealed: bool | None = None
    newton: bool = True

    def __post_init__(self):
        if self.tolerance is not None and not (0 < self.tolerance < 1):
            raise ValueError(
                "Solver(tolerance) is a share of the mass, > 0 and < 1, or None for that of the dtype, got "
                f"{self.tolerance!r}"
            )
        if not (isinstance(self.max_iter, int) and self.max_iter >= 1):
            raise ValueError(f"Solver(max_iter) is a count of steps, at least 1, got {self.max_iter!r}")
        if self.unconverged not in ("warn", "raise", "ignore"):
            raise ValueError(f'Solver(unconverged) is "warn", "raise" or "ignore", got {self.unconverged!r}')
        if self.annealed not in (None, True, False) or self.newton not in (True, False):
            raise ValueError(
                "Solver(annealed) is None, True or False, and newton is True or False, got "
                f"{self.annealed!r} and {self.newton!r}"
            )


def solved(
    given: Given | GivenPoints,
    batch: torch.Size,
    reference: Reference,
    grad: Gradient,
    solver: Solver,
    start: tuple[Tensor, Tensor] | None = None,
    mirrored: bool = False,
) -> Transport:
    with torch.no_grad():
        plain = given.detached()
        problem = Problem(plain.pairs, plain.log_a, plain.log_b, plain.eps, plain.at_a, plain.at_b)
        tolerance = tolerance_of(problem.pairs, problem.eps, solver)
        first = _start(problem, solver, mirrored)
        if start is not None:
            first = nearer(problem, _given_start(problem, batch, *start), first)
    if grad == "unroll":
        return _unrolled(given, first, tolerance, batch, reference, solver, mirrored)
    with torch.no_grad():
        stop = Stop(tolerance, solver.max_iter, solver.newton)
        found = average(problem, first[0], stop) if mirrored else alternate(problem, first, stop)
    return finished(given, found, tolerance, batch, reference, grad, solver)


def finished(
    given: Given | GivenPoints,
    found: Solution,
    tolerance: Tensor,
    batch: torch.Size,
    reference: Reference,
    grad: Gradient,
    solver: Solver,
) -> Transport:
    """The result of potentials that were found without a graph."""
    plain = given.detached()
    with torch.no_grad():
        f, g = _levelled(found.f, found.g, plain)
        found = found._replace(f=f, g=g)
    if grad == "envelope":
        value = envelope(given, found, dual_value(plain, *found[:5]))
    elif isinstance(given, Given):
        f, g = implicit_potentials(given, found)
        value = _dual(given, f, g, found.x, found.y)
    else:
        raise ValueError('grad="implicit" holds the whole cost in memory; write chunk=0 or "envelope"')
    if reference == "uniform":
        value = value + _entropy_of_weights(given)
    _report(found.error, tolerance, found.steps, solver)
    at = plain if grad == "envelope" else given
    return _result(at, value, f, g, (found.error <= tolerance, found.error, found.steps), batch)


def _unrolled(given, first, tolerance: Tensor, batch, reference, solver: Solver, mirrored: bool) -> Transport:
    if not isinstance(given, Given):
        raise ValueError('grad="unroll" keeps every block of costs; write chunk=0 or "envelope"')
    f, g, error, steps = unrolled(given, first, tolerance, solver.max_iter, mirrored)
    f, g = _levelled(f, g, given)
    value = _dual(given, f, g, torch.zeros_like(f), torch.zeros_like(g))
    if reference == "uniform":
        value = value + _entropy_of_weights(given)
    _report(error, tolerance, steps, solver)
    return _result(given, value, f, g, (error <= tolerance, error, steps), batch)


def _result(at: Given | GivenPoints, value: Tensor, f: Tensor, g: Tensor, status, batch) -> Transport:
    f, g = ((t * at.eps).reshape(*batch, -1) for t in (f, g))
    converged, error, steps = (t.reshape(batch) for t in status)
    known = (at.log_a, at.log_b, at.eps, at.pairs)
    return Transport(value.reshape(batch), f, g, converged, error, steps, *known)


def tolerance_of(pairs: Dense | Tiles, eps: Tensor, solver: Solver) -> Tensor:
    """[problems]"""
    ones = torch.ones_like(eps.squeeze(-1))
    if solver.tolerance is not None:
        return solver.tolerance * ones
    rounding = torch.finfo(eps.dtype).eps * pairs.most().squeeze(-1)
    return torch.maximum(rounding, TOLERANCE[eps.dtype] * ones)


def _start(problem: Problem, solver: Solver, mirrored: bool) -> tuple[Tensor, Tensor]:
    far = bool(problem.pairs.most().max() > WIDE) if solver.annealed is None else solver.annealed
    f, g = anneal(problem) if far else problem.pairs.start(problem.log_a, problem.log_b)
    return ((f + g) / 2, (f + g) / 2) if mirrored else (f, g)


def _given_start(problem: Problem, batch: torch.Size, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for potential, log, name in ((f, problem.log_a, "f"), (g, problem.log_b, "g")):
        count = log.shape[-1]
        if potential.shape[-1] != count:
            raise ValueError(f"start: {name} has {potential.shape[-1]} potentials for {count} atoms")
        potential = potential.detach().to(log).expand(*batch, count).reshape(-1, count)
        found.append(potential / problem.eps)
    return found[0], found[1]


def _levelled(f: Tensor, g: Tensor, given: Given | GivenPoints) -> tuple[Tensor, Tensor]:
    """The potentials with <a, f> = <b, g>, if a constant may go from one to the other."""
    if not are_kept(given.at_a, given.at_b):
        return f, g
    a, b = given.log_a.exp(), given.log_b.exp()
    in_f = (a * torch.where(a > 0, f, 0.0)).sum(-1, keepdim=True)
    in_g = (b * torch.where(b > 0, g, 0.0)).sum(-1, keepdim=True)
    shift = (in_g - in_f) / (2 * a.sum(-1, keepdim=True))
    return f + shift, g - shift


def _dual(given: Given, f: Tensor, g: Tensor, near_x: Tensor, near_y: Tensor) -> Tensor:
    """The dual value as a function of everything."""
    rows, columns = weighted(f, given.log_a), weighted(g, given.log_b)
    mass = given.pairs.log_plan(rows, columns).exp().sum((-2, -1))
    x = given.at_a.log_ratio(f, given.eps, near_x)
    y = given.at_b.log_ratio(g, given.eps, near_y)
    return dual_value(given, f, g, x, y, mass)


def _entropy_of_weights(given: Given | GivenPoints) -> Tensor:
    """From KL(P, a x b) to sum P log P."""
    a, b = given.log_a.exp(), given.log_b.exp()
    mass_a, mass_b = a.sum(-1), b.sum(-1)
    in_a = (a * torch.where(a > 0, given.log_a, 0.0)).sum(-1)
    in_b = (b * torch.where(b > 0, given.log_b, 0.0)).sum(-1)
    return given.eps.squeeze(-1) * (in_a + in_b + (mass_a + mass_b) / 2 - mass_a * mass_b)


def _report(error: Tensor, tolerance: Tensor, steps: Tensor, solver: Solver) -> None:
    off = ~(error <= tolerance)
    if solver.unconverged == "ignore" or not bool(off.any()):
        return
    text = (
        f"{int(off.sum())} of {off.numel()} transport problems did not converge in {int(steps.max())} steps: "
        f"a marginal is off by up to {error[off].max().item():.1e} of the mass, and the tolerance is "
        f"{tolerance[off].min().item():.1e}; take a larger eps or tolerance, more steps, or float64"
    )
    if solver.unconverged == "raise":
        raise RuntimeError(text)
    warnings.warn(text, RuntimeWarning, stacklevel=5)
