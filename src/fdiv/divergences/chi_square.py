"""The two chi-square divergences."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import exp_difference


@dataclass(frozen=True)
class Pearson(FDivergence):
    """sum (p - q)^2 / q: strongly mode-covering.

    Source: Pearson, "On the criterion that a given system of deviations ..." (1900).
    """

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return exp_difference(log_p - log_q / 2, log_q / 2, log_p - log_q).square()

    @property
    def reverse(self) -> "Neyman":
        return Neyman()

    def closed_inverse_slope(self, slope: Tensor) -> Tensor:
        return (slope / 2).log1p()


@dataclass(frozen=True)
class Neyman(FDivergence):
    """sum (p - q)^2 / p: strongly mode-seeking.

    Source: Neyman, "Contribution to the theory of the chi-square test" (1949).
    """

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return exp_difference(log_q - log_p / 2, log_p / 2, log_q - log_p).square()

    @property
    def reverse(self) -> Pearson:
        return Pearson()

    def closed_inverse_slope(self, slope: Tensor) -> Tensor:
        return -(-slope).log1p() / 2
