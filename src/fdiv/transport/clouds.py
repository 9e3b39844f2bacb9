"""Entropic optimal transport between clouds of points, with costs in memory or made again block by block."""

import torch
from torch import Tensor

from fdiv._math import in_working_precision
from fdiv.transport._given import (
    Gradient,
    Marginals,
    Penalty,
    Reference,
    check_modes,
    given_costs,
    given_points,
    sides_of,
)
from fdiv.transport._pairs import Cost
from fdiv.transport._plan import Transport
from fdiv.transport._solved import Solver, solved
from fdiv.transport.costs import squared_distance

IN_MEMORY = 2**26  # costs: 256 MB in float32
BLOCK = 2**22  # of them made at a time beyond that


def sinkhorn_between(
    x: Tensor,
    y: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    eps: float | Tensor = 1.0,
    *,
    cost: Cost = squared_distance,
    marginals: Marginals = "balanced",
    reference: Reference = "product",
    grad: Gradient = "envelope",
    solver: Solver = Solver(),
    start: tuple[Tensor, Tensor] | None = None,
    chunk: int | None = None,
) -> Transport:
    """`sinkhorn` between points x [..., N, D] and y [..., M, D], differentiable in them.

    `cost`: any function of (x, y) to [..., N, M]; the default is |x - y|^2, Power(p) is |x - y|^p / p.
    `chunk`: costs are made again, for so many rows at a time, whenever they are needed, so that memory is
    chunk x max(N, M), forward and backward; slower, without Newton's method, and with the envelope's
    gradient alone. 0 holds all costs; None does up to 2^26 of them.
    Everything else is as for `sinkhorn`.
    """
    sides = sides_of(marginals)
    check_modes(sides, reference, grad)
    given, batch = _given(x, y, log_a, log_b, eps, sides, cost, chunk)
    return solved(given, batch, reference, grad, solver, start)


def self_sinkhorn_between(
    x: Tensor,
    log_a: Tensor | None = None,
    eps: float | Tensor = 1.0,
    *,
    cost: Cost = squared_distance,
    marginals: Penalty = "balanced",
    reference: Reference = "product",
    grad: Gradient = "envelope",
    solver: Solver = Solver(),
    chunk: int | None = None,
) -> Transport:
    """The same between a measure and itself, as `self_sinkhorn`; `cost` is symmetric."""
    sides = sides_of(marginals)
    check_modes(sides, reference, grad)
    given, batch = _given(x, x, log_a, log_a, eps, sides, cost, chunk)
    return solved(given, batch, reference, grad, solver, mirrored=True)


def _given(x, y, log_a, log_b, eps, sides, cost: Cost, chunk: int | None):
    x, y = in_working_precision(x, y)
    _require_points(x, y)
    chunk = _automatic(x, y, log_a, log_b) if chunk is None else chunk
    if not (isinstance(chunk, int) and chunk >= 0):
        raise ValueError(f"chunk is a number of rows, 0 for all at once, or None, got {chunk!r}")
    if chunk == 0:
        return given_costs(cost(x, y), log_a, log_b, eps, sides)
    return given_points(x, y, log_a, log_b, eps, sides, cost, chunk)


def _require_points(x: Tensor, y: Tensor) -> None:
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1] or 0 in (*x.shape[-2:], *y.shape[-2:]):
        raise ValueError(
            f"points are [..., N, D] and [..., M, D], at least one each, got {tuple(x.shape)} and "
            f"{tuple(y.shape)}; write x.unsqueeze(-1) for points on a line"
        )


def _automatic(x: Tensor, y: Tensor, log_a: Tensor | None, log_b: Tensor | None) -> int:
    weights = [log.shape[:-1] for log in (log_a, log_b) if log is not None]
    problems = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2], *weights).numel()
    widest = problems * max(x.shape[-2], y.shape[-2])
    return 0 if problems * x.shape[-2] * y.shape[-2] <= IN_MEMORY else max(1, BLOCK // widest)
