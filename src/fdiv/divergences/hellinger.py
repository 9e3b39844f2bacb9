"""The squared Hellinger distance."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import exp_difference


@dataclass(frozen=True)
class SquaredHellinger(FDivergence):
    """1/2 sum (sqrt p - sqrt q)^2 <= 1: symmetric and bounded. Some authors leave out the 1/2.

    Source: Hellinger, "Neue Begruendung der Theorie quadratischer Formen" (1909).
    """

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return exp_difference(log_p / 2, log_q / 2).square() / 2

    @property
    def reverse(self) -> "SquaredHellinger":
        return self

    def closed_inverse_slope(self, slope: Tensor) -> Tensor:
        return -2 * (-2 * slope).log1p()
