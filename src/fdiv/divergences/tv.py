"""The total variation distance."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import exp_difference


@dataclass(frozen=True)
class TV(FDivergence):
    """1/2 sum |p - q| <= 1: symmetric, bounded, with a kink at p = q (its gradient there is 0).

    Trains badly from far away: the gradient fades where the supports separate.
    """

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return exp_difference(log_p, log_q).abs() / 2

    @property
    def reverse(self) -> "TV":
        return self
