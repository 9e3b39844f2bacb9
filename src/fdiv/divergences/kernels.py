"""Kernels between points, for MMD, and the distance they are all written with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """exp(-|x - y|^2 / (2 bandwidth^2)): smooth, bounded, blind to what is much finer than it."""

    bandwidth: float

    def __post_init__(self):
        require_positive(self.bandwidth, "Gaussian(bandwidth)")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (-(distances(x, y) / self.bandwidth).square() / 2).exp()


@dataclass(frozen=True)
class Laplace:
    """exp(-|x - y| / bandwidth): heavier tails than Gaussian, and sharp where points meet."""

    bandwidth: float

    def __post_init__(self):
        require_positive(self.bandwidth, "Laplace(bandwidth)")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (-distances(x, y) / self.bandwidth).exp()


def distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j| of x [..., N, D] and y [..., M, D]: [..., N, M]. Differentiable once.

    Coordinates are subtracted before they are squared, so clouds far from the origin lose no
    digits; the gradient of two coincident points is 0.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def require_positive(value: float, name: str) -> None:
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"{name} is a length in the units of the points, finite and > 0, got {value!r}")
