"""The symmetric sum of the two KL divergences."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import exp_difference


@dataclass(frozen=True)
class Jeffreys(FDivergence):
    """KL(p, q) + KL(q, p) = sum (p - q) log(p/q): also the population stability index.

    Source: Jeffreys, "An invariant form for the prior probability in estimation problems" (1946).
    """

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return exp_difference(log_p, log_q) * (log_p - log_q)

    @property
    def reverse(self) -> "Jeffreys":
        return self
