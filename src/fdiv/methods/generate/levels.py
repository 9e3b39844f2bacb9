"""Laws of the level of noise that a step of training is taken at: what they are, as quantiles."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fdiv._math import derivative


@runtime_checkable
class Levels(Protocol):
    """A law of sigma > 0, by its quantile function of u in (0, 1); a frozen dataclass."""

    def quantile(self, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Karras:
    """sigma^(1/rho) uniform between its values at `least` and at `most`: the law of `karras`'s levels.

    The first eight tenths of Karras() are Karras(most=24.4).
    """

    least: float = 0.002
    most: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        if not (0 < self.least < self.most < math.inf and 0 < self.rho < math.inf):
            raise ValueError(f"Karras takes 0 < least < most and rho > 0, all finite, got {self!r}")

    def quantile(self, u: Tensor) -> Tensor:
        low, high = self.least ** (1 / self.rho), self.most ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho


@dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(mean, std^2); EDM's own law by default."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"LogNormal takes a finite mean and a finite std > 0, got {self!r}")

    def quantile(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(u)).exp()


@dataclass(frozen=True)
class LogLogistic:
    """median u / (1 - u): sigma of a flow whose time is uniform, shifted by median / sigma_data."""

    median: float = 2.5

    def __post_init__(self):
        if not 0 < self.median < math.inf:
            raise ValueError(f"LogLogistic takes a finite median > 0, got {self!r}")

    def quantile(self, u: Tensor) -> Tensor:
        return self.median * u / (1 - u)


class Drawn(NamedTuple):
    """Levels sigma [B] of an inputs' dtype, and the quantiles rank [B] in (0, 1) that they are, float64."""

    sigma: Tensor
    rank: Tensor


def drawn(levels: Levels, inputs: Tensor) -> Drawn:
    """One level for each of the inputs, by torch's global generator."""
    # In float64 and off both ends: a level of 0 has no score.
    rank = torch.rand(len(inputs), dtype=torch.float64, device=inputs.device) * (1 - 2**-50) + 2**-51
    return Drawn(levels.quantile(rank).to(inputs.dtype), rank)


def stretch(levels: Levels, rank: Tensor) -> Tensor:
    """dsigma/du at the quantiles, one over the density: what makes a mean over draws an integral dsigma."""
    return derivative(levels.quantile, rank)


def require_levels(levels: object, who: str) -> None:
    if not isinstance(levels, Levels) or isinstance(levels, type):
        raise TypeError(
            f"{who} is a law of sigma, Karras(0.02, 20.0) or LogNormal(-1.2, 1.2), got {levels!r}"
        )
