"""The Monge gap: how far a map is from being an optimal one, whatever the cost.

Uscidda and Cuturi, "The Monge Gap: A Regularizer to Learn All Transport Maps", arXiv 2302.04953.

    gap(T) = E c(x, T(x)) - W(rho, T#rho),        W = min over plans P of <P, C> + eps sum P log P

Without eps it is >= 0, and 0 where T is optimal between rho and its image T#rho; for |x - y|^2 these are the
gradients of convex functions. The paper's rho-hat, n points, are `x`; T(x) is `y`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdiv._math import in_working_precision
from fdiv.transport.costs import squared_distance
from fdiv.transport.sinkhorn import Solver, sinkhorn

Cost = Callable[[Tensor, Tensor], Tensor]  # points [..., N, D] and [..., M, D] to [..., N, M]


@dataclass(frozen=True)
class MongeGap:
    """mean_i c(x_i, y_i) - W(x, y) of points x [..., N, D] and their images y [..., N, D]: [...].

    With its entropy in W, the gap of N points is between the exact one + eps log N and the exact one + 2 eps
    log N: above 0, also of an optimal map. (Relative to the product of the marginals the entropy would take
    2 eps log N off, and the gap of an optimal map would be below 0.)

    eps: in the units of the cost, or with `relative` a share of its mean, which gets no gradient.
    cost: any function of points to [..., N, N]; None: |x - y|^2. solver: when it stops.
    Differentiable once in x and y, by the plan alone: no step of the solver is kept.
    """

    eps: float
    cost: Cost | None = None
    relative: bool = False
    solver: Solver = Solver()

    def __post_init__(self):
        if not (isinstance(self.eps, int | float) and 0 < self.eps < math.inf):
            raise ValueError(f"MongeGap(eps) is finite and > 0, got {self.eps!r}")
        if self.cost is not None and (not callable(self.cost) or isinstance(self.cost, type)):
            raise TypeError(
                f"MongeGap(cost) is a function of x and y, or None for squares, got {self.cost!r}"
            )
        if not isinstance(self.relative, bool):
            raise ValueError(f"MongeGap(relative) is True or False, got {self.relative!r}")
        if not isinstance(self.solver, Solver):
            raise TypeError(f"MongeGap(solver) is a Solver(...), got {self.solver!r}")

    def __call__(self, x: Tensor, y: Tensor, log_a: Tensor | None = None) -> Tensor:
        """log_a [..., N]: weights of the points, and of their images; uniform by default."""
        x, y = in_working_precision(x, y)
        if x.ndim < 2 or x.shape[-2] != y.shape[-2]:
            raise ValueError(
                f"a gap is of one image of each point, [..., N, D] and [..., N, D], got {tuple(x.shape)} and "
                f"{tuple(y.shape)}"
            )
        costs = (self.cost or squared_distance)(x, y)
        if log_a is None:
            log_a = costs.new_full(costs.shape[-1:], -math.log(costs.shape[-1]))
        paid = (log_a.to(costs.dtype).exp() * costs.diagonal(dim1=-2, dim2=-1)).sum(-1)
        eps = self._eps(costs)
        least = sinkhorn(costs, log_a, log_a, eps, reference="uniform", solver=self.solver)
        return paid - least.value

    def _eps(self, costs: Tensor) -> Tensor:
        """[...]"""
        if not self.relative:
            return costs.new_full(costs.shape[:-2], self.eps)
        mean = costs.detach().mean((-2, -1))
        return self.eps * torch.where(mean > 0, mean, 1.0)
