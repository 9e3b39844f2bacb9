"""PFGM++: heavier-tailed noise, which D more dimensions lend to the data.

Xu, Liu, Tian, Tong, Tegmark, Jaakkola, "PFGM++: Unlocking the Potential of Physics-Inspired Generative
Models", arXiv 2302.04265. Of data in N dimensions,

    p(x | y) ~ (|x - y|^2 + r^2)^(-(N + D)/2),   r = sigma sqrt(D)

D is `dims`, any number > 0, and inf is the Gaussian: this is Student's t in N dimensions with D degrees of
freedom and scale sigma. PFGM is dims=1. All else of EDM stays as it is: levels, network, weights, solvers.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fdiv.diffusion.edm import spread_to

CELLS = 32768  # of the grid on which the law of the radius is integrated
TAIL = 45.0  # its ends: where the log-density of the radius is so far below the largest


def perturbed(
    x: Tensor, sigma: Tensor | float, dims: float, generator: torch.Generator | None = None
) -> Tensor:
    """A draw from p(. | x) of each row of x [B, ...], with sigma a number or [B]."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
    return x + spread_to(sigma, x) * rescaled(_normal(x, generator), dims)


def prior(
    shape: tuple[int, ...], sigma: float, dims: float, generator: torch.Generator | None = None
) -> Tensor:
    """What a sampler starts from, [B, ...] float32: p(. | 0) at its largest sigma."""
    device = "cpu" if generator is None else generator.device
    return perturbed(torch.zeros(shape, device=device), sigma, dims, generator)


def posterior_mean(x: Tensor, points: Tensor, sigma: Tensor | float, dims: float) -> Tensor:
    """E[y | x] of y uniform among `points` [n, ...]: the denoiser that a finite data set has."""
    require_dims(dims)
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
    flat = points.to(x).flatten(1)
    ratio = (x.flatten(1).unsqueeze(1) - flat).square().sum(-1) / sigma.square().unsqueeze(-1)  # [B, n]
    log_kernel = -ratio / 2 if dims == math.inf else -(flat.shape[1] + dims) / 2 * (ratio / dims).log1p()
    return (log_kernel.softmax(-1) @ flat).view_as(x)


def rescaled(noise: Tensor, dims: float) -> Tensor:
    """Standard normal draws [B, ...] -> draws of the kernel at sigma = 1, in the same directions.

    A row's norm becomes that quantile of the kernel's radius which it is of a normal draw's: a monotone map,
    so that one start has one sample, whatever else is in the batch.
    """
    require_dims(dims)
    if dims == math.inf or not noise.numel():
        return noise
    size = noise[0].numel()
    norm = noise.flatten(1).double().norm(dim=1)
    below = torch.special.gammainc(_like(norm, size / 2), norm.square() / 2)
    above = torch.special.gammaincc(_like(norm, size / 2), norm.square() / 2)
    grid, log_below, log_above = _radius(size, dims, noise.device)
    log_radius = torch.where(
        below < above, _inverse(below.log(), log_below, grid), _inverse(-above.log(), -log_above, grid)
    )
    factor = torch.where(norm > 0, log_radius.exp() / norm, 0.0)
    return (spread_to(factor, noise) * noise).to(noise.dtype)


def require_dims(dims: float) -> None:
    if not dims > 0:
        raise ValueError(f"dims, the dimensions added, is > 0, got {dims!r}; write inf for Gaussian noise")


def _normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def _like(x: Tensor, value: float) -> Tensor:
    return torch.full_like(x, value)


@lru_cache(maxsize=8)
def _radius(size: int, dims: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(log R, log P(below), log P(above)) on a grid; log R has a concave log-density, mode log sqrt(N).

    Integrated, for torch lacks the special function, the incomplete beta; to about 1e-6 of the radius.
    """

    def log_density(s: Tensor) -> Tensor:
        return size * s - (size + dims) / 2 * ((2 * s).exp() / dims).log1p()

    mode = torch.tensor(math.log(size) / 2, dtype=torch.float64, device=device)
    low, high = _where_it_falls(log_density, mode, -1.0), _where_it_falls(log_density, mode, 1.0)
    grid = torch.linspace(low, high, CELLS + 1, dtype=torch.float64, device=device)
    height = log_density(grid)
    mass = torch.logaddexp(height[1:], height[:-1])  # of a cell, by the trapezoid rule, but for a constant
    lowest = height[:1] - TAIL  # beyond the ends there is next to nothing
    below = torch.cat([lowest, mass]).logcumsumexp(0)
    above = torch.cat([lowest, mass.flip(0)]).logcumsumexp(0).flip(0)
    return grid, below - below[-1], above - above[0]


def _where_it_falls(log_density: Callable[[Tensor], Tensor], mode: Tensor, sign: float) -> float:
    """The place on that side of the mode where the log-density is TAIL below it, by bisection."""
    target = log_density(mode) - TAIL
    near, far = 0.0, 1.0
    while log_density(mode + sign * far) > target:
        far *= 2
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (middle, far) if log_density(mode + sign * middle) > target else (near, middle)
    return (mode + sign * far).item()


def _inverse(value: Tensor, rising: Tensor, grid: Tensor) -> Tensor:
    """The place in the grid where `rising` has the value, by linear interpolation; its end beyond it."""
    right = torch.searchsorted(rising, value).clamp(1, len(grid) - 1)
    low, high = rising[right - 1], rising[right]
    share = ((value - low) / (high - low)).clamp(0.0, 1.0)
    return grid[right - 1] + share * (grid[right] - grid[right - 1])
