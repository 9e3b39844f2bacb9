"""The triangular discrimination."""

import math
from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import exp_difference, log_mixture


@dataclass(frozen=True)
class Triangular(FDivergence):
    """sum (p - q)^2 / (p + q) <= 2: symmetric and bounded; twice the Le Cam divergence.

    Source: Topsoe, "Some inequalities for information divergence and related measures of
    discrimination" (2000).
    """

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        half = log_mixture(log_p, log_q, 0.5) / 2 + math.log(2) / 2  # log sqrt(p + q)
        return exp_difference(log_p - half, log_q - half, log_p - log_q).square()

    @property
    def reverse(self) -> "Triangular":
        return self

    def closed_inverse_slope(self, slope: Tensor) -> Tensor:
        return (2 / (1 - slope).sqrt() - 1).log()
