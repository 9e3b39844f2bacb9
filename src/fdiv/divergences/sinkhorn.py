"""Entropic optimal transport as a divergence between clouds."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._metric import MetricDivergence, weighted_points
from fdiv.divergences.kernels import require_positive
from fdiv.divergences.wasserstein import require_equal_masses
from fdiv.transport.clouds import sinkhorn_between
from fdiv.transport.costs import Power
from fdiv.transport.debiased import sinkhorn_divergence
from fdiv.transport.sinkhorn import Solver


@dataclass(frozen=True)
class Sinkhorn(MetricDivergence):
    """S(a, b) = OT(a, b) - OT(a, a)/2 - OT(b, b)/2 >= 0; without `debias`, OT(a, b).

    OT(a, b) = min over plans P of <P, |x - y|^p / p> + blur^p KL(P, a x b): geomloss's convention,
    blur is a length, and for p = 2 cost and value are half those of POT and OTT. S tends to
    W_p^p / p for a small blur and, for p = 1, to half of Energy for a large one. Masses must agree.

    tolerance: each of the three problems is solved until a marginal misses by that share of the mass;
        the error of OT is of its square. None: 1e-9 in float64, 1e-5 in float32 (see Solver). What does
        not get there within 10,000 steps warns; `transport.sinkhorn_divergence` gives the status, the
        plan, unbalanced marginals and second derivatives, too.
    chunk: rows of the cost in memory at a time, 0 for all; None: all of up to 2^26 costs.

    Gradients come from the envelope theorem: first order only, a Hessian is refused.
    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences", arXiv 1810.08278.
    """

    blur: float
    p: float = 2
    debias: bool = True
    tolerance: float | None = None
    chunk: int | None = None

    def __post_init__(self):
        require_positive(self.blur, "Sinkhorn(blur)")
        if not (isinstance(self.p, int | float) and 1 <= self.p <= 2):
            raise ValueError(
                f"Sinkhorn(p) needs 1 <= p <= 2, where S is never negative, got {self.p!r}; "
                "write Sliced(p) for larger exponents"
            )
        if not isinstance(self.debias, bool):
            raise ValueError(f"Sinkhorn(debias) is True or False, got {self.debias!r}")
        if not (self.chunk is None or (isinstance(self.chunk, int) and self.chunk >= 0)):
            raise ValueError(f"Sinkhorn(chunk) is a number of rows, 0 for all, or None, got {self.chunk!r}")
        self._solver()  # checks the tolerance

    def _solver(self) -> Solver:
        return Solver(self.tolerance)

    def between(
        self, x: Tensor, y: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None
    ) -> Tensor:
        x, y, a, b = weighted_points(x, y, log_a, log_b)
        require_equal_masses(a, b, "Sinkhorn")
        divergence = sinkhorn_divergence if self.debias else sinkhorn_between
        return divergence(
            x, y, log_a, log_b, self.blur**self.p, cost=Power(self.p), solver=self._solver(), chunk=self.chunk
        ).value
