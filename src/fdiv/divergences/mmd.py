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
    upwards. geomloss returns half of it. `kernel` is any symmetric positive definite (x, y) -> [..., N, M].
    unbiased: the U-statistic, without the diagonals: its mean over samples is the divergence of what they
        were drawn from, and it can be negative. It takes two points or more of equal weight a side.
    Memory N x M. Source: Gretton et al., "A Kernel Two-Sample Test" (2012).
    """

    kernel: Kernel = Gaussian(1.0)
    unbiased: bool = False

    def __post_init__(self):
        require_switch(self.unbiased, "MMD(unbiased)")
        if not callable(self.kernel) or isinstance(self.kernel, type):
            raise TypeError(
                f"MMD(kernel) takes a function of (x, y) such as Gaussian(1.0), got {self.kernel!r}"
            )

    def between(
        self, x: Tensor, y: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None
    ) -> Tensor:
        if self.unbiased:
            return unbiased_mmd(self.kernel, x, y, log_a, log_b)
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


def unbiased_mmd(kernel: Kernel, x: Tensor, y: Tensor, log_a: Tensor | None, log_b: Tensor | None) -> Tensor:
    """The mean of k(x, x') + k(y, y') - 2 k(x, y) over pairs of different points."""
    if log_a is not None or log_b is not None:
        raise ValueError(
            "unbiased=True is for samples, which weigh the same; weighted points and histograms are the "
            "measures themselves: leave it out, or the weights"
        )
    x, y, _, _ = weighted_points(x, y, None, None)
    if min(x.shape[-2], y.shape[-2]) < 2:
        raise ValueError(
            f"unbiased=True needs two points a side, got {x.shape[-2]} and {y.shape[-2]}; leave it out"
        )
    return _of_pairs(kernel(x, x)) + _of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean((-2, -1))


def _of_pairs(gram: Tensor) -> Tensor:
    """The mean off the diagonal of [..., N, N]."""
    count = gram.shape[-1]
    others = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    return others.sum((-2, -1)) / (count * (count - 1))


def require_switch(value: bool, name: str) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is True or False, got {value!r}")
