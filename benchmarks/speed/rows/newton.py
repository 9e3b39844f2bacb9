"""B20: Sinkhorn-Newton-Sparse on its own problems, beside Sinkhorn's steps: the notes count the steps."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.case import Candidate, Case, Outcome
from fdiv.transport.newton import sparse_newton
from fdiv.transport.sinkhorn import Solver, Transport, sinkhorn

POINTS, ETA = 500, 1200.0  # as in the paper; eps = 1 / ETA
SOLVER = Solver(1e-11, max_iter=20_000, unconverged="ignore")
STEPS = Solver(1e-11, max_iter=20_000, unconverged="ignore", newton=False)
PLAIN = 100  # steps of the textbook's iteration between two looks at its error
MOST_PLAIN = 20_000


def cases(quick: bool) -> Iterator[Case]:
    points, eps = (40, 1 / 50) if quick else (POINTS, 1 / ETA)
    x, y = torch.rand(2, points, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = torch.rand(points, points, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    yield _case(free, eps, "costs uniform on [0, 1]")
    yield _case(torch.cdist(x, y).square(), eps, "squared distances in the square")


def _case(cost: Tensor, eps: float, what: str) -> Case:
    solvers = {
        "fdiv sparse_newton": partial(sparse_newton, cost, eps=eps, solver=SOLVER),
        "fdiv sinkhorn": partial(sinkhorn, cost, eps=eps, solver=SOLVER),
        "fdiv sinkhorn, stretched steps alone": partial(sinkhorn, cost, eps=eps, solver=STEPS),
    }
    candidates = tuple(Candidate(n, partial(_value, s), note=_note(s())) for n, s in solvers.items())
    size, plain = len(cost), _plain(cost, eps)
    setting = f"{size} x {size}, {what}, marginal error ≤ 1e-11; textbook Sinkhorn: {plain} steps"
    return Case(rows="B20", setting=setting, candidates=candidates, weighed=False)


def _value(solve: Callable[[], Transport]) -> Outcome:
    return Outcome(solve().value)


def _note(found: Transport) -> str:
    return f"{int(found.iterations)} steps" + ("" if found.converged else ", not converged")


def _plain(cost: Tensor, eps: float) -> str:
    """Steps of f, then g, until the rows' error is below 1e-11."""
    log_weight = -torch.tensor(float(len(cost)), dtype=cost.dtype).log()
    g = torch.zeros_like(cost[0])
    for step in range(MOST_PLAIN):
        f = -eps * (log_weight + (g - cost) / eps).logsumexp(1)
        g = -eps * (log_weight + (f[:, None] - cost) / eps).logsumexp(0)
        if step % PLAIN == 0:
            rows = (2 * log_weight + (f[:, None] + g - cost) / eps).exp().sum(1)
            if (rows - 1 / len(cost)).abs().sum() <= 1e-11:
                return f"about {step}"
    return f"more than {MOST_PLAIN}"
