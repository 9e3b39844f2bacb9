"""Entropic transport by POT and geomloss: dual values in geomloss's units, and their gradients in x."""

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
    with torch.set_grad_enabled(x.requires_grad):
        value = loss(x, y)
    return Outcome(value.detach(), torch.autograd.grad(value.sum(), x) if x.requires_grad else ())


def pot_batch(x: Tensor, y: Tensor, blur: float, iterations: int) -> Outcome:
    eps, cost = blur**2, _cost(x, y)
    a, b = _uniform(x), _uniform(y)
    grad = "envelope" if x.requires_grad else "detach"
    found: Any = ot.batch.solve_batch(
        cost, eps, a, b, max_iter=iterations, tol=0.0, method="log_sinkhorn", reg_type="kl", grad=grad
    )
    log_u, log_v = (potential.detach() for potential in found.potentials)
    gradients = torch.autograd.grad(found.value.sum(), x) if x.requires_grad else ()
    return Outcome(_dual(a, b, log_u, log_v, eps), gradients)


@torch.no_grad()
def pot_loop(x: Tensor, y: Tensor, blur: float, iterations: int) -> Outcome:
    """sinkhorn_log, problem by problem, and the gradient by its plan."""
    eps, a, b = blur**2, _uniform(x), _uniform(y)
    values, plans = [], []
    for cost, a_one, b_one in zip(_cost(x, y), a, b, strict=True):
        found: Any = ot.bregman.sinkhorn_log(
            a_one, b_one, cost, eps, iterations, stopThr=0.0, log=True, warn=False
        )
        values.append(_dual(a_one, b_one, found[1]["log_u"], found[1]["log_v"], eps))
        plans.append(found[0])
    if not x.requires_grad:
        return Outcome(torch.stack(values))
    plan = torch.stack(plans)
    return Outcome(torch.stack(values), (plan.sum(-1, keepdim=True) * x - plan @ y,))


def _dual(a: Tensor, b: Tensor, log_u: Tensor, log_v: Tensor, eps: float) -> Tensor:
    """<f, a> + <g, b> with f = eps (log_u - log a): POT folds the weights into its scalings."""
    return eps * ((log_u - a.log()) * a + (log_v - b.log()) * b).sum(-1)


def _cost(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).square() / 2


def _uniform(points: Tensor) -> Tensor:
    return points.new_full(points.shape[:-1], 1 / points.shape[-2])
