"""Entropic transport by POT and geomloss; each returns the dual value a problem, in geomloss's units."""

from typing import Any

import geomloss
import ot
import ot.batch
import torch
from torch import Tensor

from benchmarks.speed.case import Outcome


def geomloss_sinkhorn(x: Tensor, y: Tensor, blur: float, scaling: float) -> Outcome:
    loss = geomloss.SamplesLoss(
        "sinkhorn", p=2, blur=blur, scaling=scaling, debias=False, backend="tensorized"
    )
    with torch.no_grad():
        return Outcome(loss(x, y))


def pot_batch(x: Tensor, y: Tensor, blur: float, iterations: int) -> Outcome:
    eps, cost = blur**2, _cost(x, y)
    a, b = _uniform(x), _uniform(y)
    found: Any = ot.batch.solve_batch(
        cost, eps, a, b, max_iter=iterations, tol=0.0, method="log_sinkhorn", grad="detach"
    )
    log_u, log_v = found.potentials
    return Outcome(_dual(a, b, log_u, log_v, eps))


def pot_loop(x: Tensor, y: Tensor, blur: float, iterations: int) -> Outcome:
    """sinkhorn_log, problem by problem."""
    eps, a, b = blur**2, _uniform(x), _uniform(y)
    values = []
    for cost, a_one, b_one in zip(_cost(x, y), a, b, strict=True):
        found: Any = ot.bregman.sinkhorn_log(
            a_one, b_one, cost, eps, iterations, stopThr=0.0, log=True, warn=False
        )
        values.append(_dual(a_one, b_one, found[1]["log_u"], found[1]["log_v"], eps))
    return Outcome(torch.stack(values))


def _dual(a: Tensor, b: Tensor, log_u: Tensor, log_v: Tensor, eps: float) -> Tensor:
    """<f, a> + <g, b> with f = eps (log_u - log a): POT folds the weights into its scalings."""
    return eps * ((log_u - a.log()) * a + (log_v - b.log()) * b).sum(-1)


def _cost(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).square() / 2


def _uniform(points: Tensor) -> Tensor:
    return points.new_full(points.shape[:-1], 1 / points.shape[-2])
