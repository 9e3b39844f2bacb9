"""EDM: the levels of noise, the network's scaling and the solver of "Elucidating the Design Space of
Diffusion-Based Generative Models", Karras, Aittala, Aila, Laine, arXiv 2206.00364.

A denoiser is any callable D(x [B, ...], sigma [B], condition=None) -> [B, ...]: the mean of x0 given
x = x0 + sigma noise. It states the score, (D - x) / sigma^2, and the slope dx/dsigma = (x - D) / sigma of the
equation that carries the law at one sigma to that at another. Models of other conventions, a x0 + s noise,
are the same at x / a and sigma = s / a.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Denoiser = Callable[..., Tensor]


def karras(steps: int, least: float = 0.002, most: float = 80.0, rho: float = 7.0) -> Tensor:
    """[steps + 1] float64 levels from `most` down to `least`, evenly spaced in sigma^(1/rho), and a 0."""
    if not (isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1):
        raise ValueError(f"steps is a whole number >= 1, got {steps!r}")
    if not 0 < least < most < math.inf:
        raise ValueError(f"levels fall from most to least, 0 < least < most, got {least!r} and {most!r}")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho is finite and > 0, got {rho!r}")
    ends = most ** (1 / rho), least ** (1 / rho)
    levels = torch.linspace(*ends, steps, dtype=torch.float64) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


@dataclass(frozen=True)
class Preconditioning:
    """D(x, sigma) = skip x + out F(into x, noise): F reads and returns numbers of variance 1 at every sigma.

    sigma_data is the standard deviation of a coordinate of the data; weight = 1 / out^2 is the loss's.
    """

    sigma_data: float = 0.5

    def __post_init__(self):
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data is finite and > 0, got {self.sigma_data!r}")

    def skip(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def out(self, sigma: Tensor) -> Tensor:
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def into(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2).rsqrt()

    def noise(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class Churn:
    """Noise that a solver adds before each step, and takes away with it: sigma -> sigma (1 + amount / steps).

    At most by a factor sqrt(2), and only at levels in [least, most]. noise: the standard deviation of what is
    added, relative to what the level asks for.
    """

    amount: float
    least: float = 0.0
    most: float = math.inf
    noise: float = 1.0

    def __post_init__(self):
        if not (0 <= self.amount < math.inf and 0 <= self.noise < math.inf):
            raise ValueError(f"amount and noise are finite and >= 0, got {self!r}")
        if not 0 <= self.least <= self.most:
            raise ValueError(f"the levels are 0 <= least <= most, got {self!r}")

    def factor(self, sigma: float, steps: int) -> float:
        inside = self.least <= sigma <= self.most
        return 1 + (min(self.amount / steps, math.sqrt(2) - 1) if inside else 0.0)


def spread_to(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [B] as [B, 1, ...], to multiply x [B, ...] with."""
    return sigma.reshape(-1, *(1,) * (x.ndim - 1))


def denoised(denoiser: Denoiser, x: Tensor, sigma: Tensor | float, condition: Any = None) -> Tensor:
    """D(x, sigma) [B, ...] with sigma a number or [B], and the condition only where there is one."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
    return denoiser(x, sigma) if condition is None else denoiser(x, sigma, condition)


def guided(network: Any, guidance: float) -> Denoiser:
    """D of no condition + guidance (D of the condition - D of none): classifier-free guidance.

    Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598. 1 is the network itself, more
    goes beyond its condition. No condition is the class `network.null`, which the network has been taught.
    """
    if guidance == 1:
        return network
    null = getattr(network, "null", None)
    if null is None:
        raise ValueError(
            f"guidance={guidance:g} goes away from what the model says of no condition, and this one has not "
            "learnt that; train it with Denoising(drop=0.1) as a Denoiser(classes=..., null=True)"
        )

    def denoise(x: Tensor, sigma: Any, condition: Tensor) -> Tensor:
        free = network(x, sigma, torch.full_like(condition, null))
        return free + guidance * (network(x, sigma, condition) - free)

    return denoise


def score(denoiser: Denoiser, x: Tensor, sigma: Tensor | float, condition: Any = None) -> Tensor:
    """grad log p_sigma(x) = (D - x) / sigma^2, [B, ...]."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
    return (denoised(denoiser, x, sigma, condition) - x) / spread_to(sigma, x) ** 2


def euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    condition: Any = None,
    churn: Churn | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x [B, ...] at sigmas[0], carried to sigmas[-1] in steps of first order; one call of D each."""
    return _solve(denoiser, x, sigmas, condition, churn, generator, second_order=False)


def heun(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    condition: Any = None,
    churn: Churn | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The same in steps of second order: two calls of D each, and one in a step that ends at 0.

    x is noise already: sigmas[0] times a standard normal draw. The state is kept in float64, D reads it in
    the dtype of x. generator: of the churn's noise.
    """
    return _solve(denoiser, x, sigmas, condition, churn, generator, second_order=True)


def _solve(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    condition: Any,
    churn: Churn | None,
    generator: torch.Generator | None,
    second_order: bool,
) -> Tensor:
    levels = falling(sigmas)
    state = x.double()

    def slope(state: Tensor, sigma: float) -> Tensor:
        return (state - denoised(denoiser, state.to(x.dtype), sigma, condition).double()) / sigma

    for sigma, after in pairwise(levels):
        if churn is not None and (raised := sigma * churn.factor(sigma, len(levels) - 1)) > sigma:
            noise = torch.randn(x.shape, dtype=torch.float64, device=x.device, generator=generator)
            state = state + math.sqrt(raised**2 - sigma**2) * churn.noise * noise
            sigma = raised
        first = slope(state, sigma)
        ahead = state + (after - sigma) * first
        if second_order and after > 0:
            ahead = state + (after - sigma) * (first + slope(ahead, after)) / 2
        state = ahead
    return state.to(x.dtype)


def falling(sigmas: Tensor) -> list[float]:
    """The levels as numbers; raise unless there are two or more, which fall to 0 at most."""
    levels = sigmas.tolist()
    if sigmas.ndim != 1 or len(levels) < 2 or any(a <= b for a, b in pairwise(levels)):
        raise ValueError(f"sigmas are two levels or more, each below the one before, got {levels}")
    if not (math.isfinite(levels[0]) and levels[-1] >= 0):
        raise ValueError(f"sigmas are finite and >= 0, got {levels}; write karras(18)")
    return levels
