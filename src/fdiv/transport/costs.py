"""Costs between points, [..., N, D] and [..., M, D] to [..., N, M]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fdiv.divergences.kernels import distances
from fdiv.divergences.wasserstein import require_exponent

FEW = 8  # coordinates


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
    value = _squares(x.detach(), y.detach())
    if not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)):
        return value
    # Its derivatives are those of |x|^2 + |y|^2 - 2 <x, y>, which are matrix products; its value is not.
    middle = y.detach().mean(-2, keepdim=True)
    x, y = x - middle, y - middle
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2) - 2 * (x @ y.mT)
    return squares + (value - squares).detach()


def _squares(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[-1] > FEW:
        return distances(x, y).square()
    # cdist is slow here: it works along the coordinates, of which there are too few.
    total = (x[..., :, None, 0] - y[..., None, :, 0]).square_()
    for i in range(1, x.shape[-1]):
        total += (x[..., :, None, i] - y[..., None, :, i]).square_()
    return total
