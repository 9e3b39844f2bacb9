"""Costs between points, [..., N, D] and [..., M, D] to [..., N, M]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fdiv.divergences.kernels import distances
from fdiv.divergences.wasserstein import require_exponent


@dataclass(frozen=True)
class Power:
    """|x - y|^p / p. Differentiable twice for p = 2, else once.

    Coordinates are subtracted before they are squared, so clouds far from the origin lose no digits.
    """

    p: float = 2

    def __post_init__(self):
        require_exponent(self.p, "Power(p)")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if self.p == 2:
            return squared_distance(x, y) / 2
        return distances(x, y).pow(self.p) / self.p


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2, differentiable as often as asked."""
    value = distances(x.detach(), y.detach()).square()
    if not torch.is_grad_enabled():
        return value
    # Its derivatives are those of |x|^2 + |y|^2 - 2 <x, y>, which are matrix products; its value is not.
    middle = y.detach().mean(-2, keepdim=True)
    x, y = x - middle, y - middle
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2) - 2 * (x @ y.mT)
    return squares + (value - squares).detach()
