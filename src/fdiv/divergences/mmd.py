"""The squared maximum mean discrepancy."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdiv._metric import MetricDivergence, weighted_points
from fdiv.divergences.kernels import Gaussian

Kernel = Callable[[Tensor, Tensor], Tensor]  # x [..., N, D], y [..., M, D] -> [..., N, M]


@dataclass(frozen=True)
class MMD(MetricDivergence):
    """sum a a' k(x, x') + sum b b' k(y, y') - 2 sum a b k(x, y) >= 0: the squared MMD.

    The divergence of the two weighted measures themselves. Of samples it is the V-statistic, biased
    upwards; the unbiased U-statistic leaves out the diagonals, can be negative and is not this.
    geomloss returns half of it. `kernel` is any symmetric positive definite (x, y) -> [..., N, M].
    Memory N x M. Source: Gretton et al., "A Kernel Two-Sample Test" (2012).
    """

    kernel: Kernel = Gaussian(1.0)

    def __post_init__(self):
        if not callable(self.kernel) or isinstance(self.kernel, type):
            raise TypeError(
                f"MMD(kernel) takes a function of (x, y) such as Gaussian(1.0), got {self.kernel!r}"
            )

    def between(
        self, x: Tensor, y: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None
    ) -> Tensor:
        return squared_mmd(self.kernel, *weighted_points(x, y, log_a, log_b))


def squared_mmd(kernel: Kernel, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The integral of the witness function a k(x, .) - b k(y, .) against a - b."""
    # The witness is differenced before it is summed, so equal measures give 0 and not round-off.
    cross = kernel(x, y)
    on_x = _weigh(a, kernel(x, x).mT) - _weigh(b, cross.mT)  # [..., N]
    on_y = _weigh(b, kernel(y, y)) - _weigh(a, cross)  # [..., M]
    return (a * on_x).sum(-1) + (b * on_y).sum(-1)


def _weigh(weights: Tensor, gram: Tensor) -> Tensor:
    """sum_i weights_i gram_ij: [..., N], [..., N, M] -> [..., M]."""
    with torch.autocast(gram.device.type, enabled=False):  # half precision eats the difference
        return (weights.unsqueeze(-2) @ gram).squeeze(-2)
