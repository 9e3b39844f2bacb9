"""Small transport problems, and what a plan costs, written down plainly."""

import torch
from torch import Tensor

from fdiv import FDivergence
from fdiv.transport.sinkhorn import Solver

TIGHT = Solver(tolerance=1e-12)


def cloud(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(*shape: int, seed: int = 1) -> Tensor:
    return cloud(*shape, seed=seed).log_softmax(-1)


def problem(n: int = 7, m: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances in the plane, and weights."""
    x, y = cloud(n, 2, seed=seed), cloud(m, 2, seed=seed + 100) + 0.5
    return torch.cdist(x, y).square(), weights(n, seed=seed + 1), weights(m, seed=seed + 2)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p/q) - p + q over everything."""
    return torch.special.xlogy(p, p / q).sum() - p.sum() + q.sum()


def primal(
    plan: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: float, *penalties: FDivergence | str
) -> Tensor:
    """<P, C> + eps KL(P, a x b) + what the marginals cost."""
    value = (plan * cost).sum() + eps * kl(plan, a[:, None] * b)
    for penalty, got, wanted in zip(penalties, (plan.sum(1), plan.sum(0)), (a, b), strict=False):
        if not isinstance(penalty, str):
            value = value + penalty(got.log(), wanted.log())
    return value
