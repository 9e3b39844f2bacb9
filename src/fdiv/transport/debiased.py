"""The Sinkhorn divergence: entropic transport without its bias."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._math import in_working_precision
from fdiv.transport._given import Gradient, Penalty
from fdiv.transport._pairs import Cost
from fdiv.transport._plan import Transport
from fdiv.transport._solved import Solver
from fdiv.transport.clouds import self_sinkhorn_between, sinkhorn_between
from fdiv.transport.costs import squared_distance


@dataclass(frozen=True, eq=False)
class Debiased:
    """The divergence [...] and the three problems behind it."""

    value: Tensor
    cross: Transport
    of_x: Transport
    of_y: Transport

    @property
    def converged(self) -> Tensor:
        return self.cross.converged & self.of_x.converged & self.of_y.converged


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    eps: float | Tensor = 1.0,
    *,
    cost: Cost = squared_distance,
    marginals: Penalty = "balanced",
    grad: Gradient = "envelope",
    solver: Solver = Solver(),
    chunk: int | None = None,
) -> Debiased:
    """S(a, b) = OT(a, b) - OT(a, a)/2 - OT(b, b)/2, and + eps (m_a - m_b)^2 / 2 where masses may differ.

    It is 0 at a = b and, for a cost as |x - y|^p with 1 <= p <= 2, above 0 elsewhere and convex in either.
    It tends to OT without entropy for a small eps, to half the squared MMD of the kernel -cost for a large
    one. `marginals` is one penalty, the same for both sides; the rest is as for `sinkhorn_between`.
    The problem between x and y starts at the potentials of the other two: at a = b it is solved already.
    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences" (arXiv
    1810.08278); without the marginals: Sejourne, Feydy, Vialard, Trouve, Peyre, "Sinkhorn Divergences for
    Unbalanced Optimal Transport" (arXiv 1910.12958).
    """
    x, y = in_working_precision(x, y)
    options = {"cost": cost, "marginals": marginals, "grad": grad, "solver": solver, "chunk": chunk}
    of_x = self_sinkhorn_between(x, log_a, eps, **options)
    of_y = self_sinkhorn_between(y, log_b, eps, **options)
    cross = sinkhorn_between(x, y, log_a, log_b, eps, start=(of_x.f, of_y.f), **options)
    value = cross.value - of_x.value / 2 - of_y.value / 2
    if marginals != "balanced":
        value = value + cross.eps.reshape(value.shape) * (_mass(log_a, x) - _mass(log_b, y)).square() / 2
    return Debiased(value, cross, of_x, of_y)


def _mass(log_weights: Tensor | None, like: Tensor) -> Tensor:
    return like.new_ones(()) if log_weights is None else log_weights.to(like.dtype).exp().sum(-1)
