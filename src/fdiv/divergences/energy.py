"""The energy distance."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._metric import MetricDivergence, weighted_points
from fdiv.divergences.kernels import distances
from fdiv.divergences.mmd import require_switch, squared_mmd, unbiased_mmd


@dataclass(frozen=True)
class Energy(MetricDivergence):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| >= 0 for equal total masses: no bandwidth to choose.

    Un-rooted, as in dcor; `scipy.stats.energy_distance` is its square root, geomloss's its half.
    It is the squared MMD of the kernel -|x - y|, in the units of the points. Memory N x M.
    unbiased: as in MMD, the mean over pairs of different points of samples.
    Source: Szekely and Rizzo, "Energy statistics: A class of statistics based on distances" (2013).
    """

    unbiased: bool = False

    def __post_init__(self):
        require_switch(self.unbiased, "Energy(unbiased)")

    def between(
        self, x: Tensor, y: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None
    ) -> Tensor:
        if self.unbiased:
            return unbiased_mmd(_minus_distance, x, y, log_a, log_b)
        return squared_mmd(_minus_distance, *weighted_points(x, y, log_a, log_b))


def _minus_distance(x: Tensor, y: Tensor) -> Tensor:
    return -distances(x, y)
