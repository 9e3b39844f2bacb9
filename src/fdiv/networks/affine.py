"""Laws known in closed form: a generator of one Gaussian, and the denoiser of a mixture."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdiv.diffusion.edm import spread_to
from fdiv.diffusion.mixture import Mixture
from fdiv.networks._network import Network


@dataclass(frozen=True)
class Affine:
    """The generator mean + scale x / sigma of points, with a mean and a scale > 0 of each coordinate.

    Of noise x = sigma z it makes N(mean, scale^2): whatever a divergence prefers, a Gaussian has to do.
    mean and scale are where the training starts.
    """

    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.mean) and 0 < self.scale < math.inf):
            raise ValueError(f"Affine takes a finite mean and a finite scale > 0, got {self!r}")

    def build(self, shape: torch.Size, outputs: int) -> "AffineNetwork":
        _require_points(self, shape, outputs)
        return AffineNetwork(self, outputs)


@dataclass(frozen=True)
class ClosedForm:
    """The exact denoiser of a mixture, with nothing to be trained.

    law: None for that of the task, see fdiv.tasks.points.
    """

    law: Mixture | None = None

    def build(self, shape: torch.Size, outputs: int) -> "ClosedFormNetwork":
        _require_points(self, shape, outputs)
        if self.law is None or self.law.dim != outputs:
            raise ValueError(
                f"the task has points of {outputs} coordinates and no law, or another one than {self!r}; "
                "write ClosedForm() with the task Points(), or train a Denoiser()"
            )
        return ClosedFormNetwork(self.law)


class AffineNetwork(Network):
    """network(x, sigma): its law is N(mean, exp(log_scale)^2), which `log_prob` and `denoise` state."""

    conditional = False

    def __init__(self, start: Affine, coordinates: int):
        nn.Module.__init__(self)  # no stages and no head
        self.mean = nn.Parameter(torch.full((coordinates,), float(start.mean)))
        self.log_scale = nn.Parameter(torch.full((coordinates,), math.log(start.scale)))

    def forward(self, x: Tensor, sigma: Any, condition: None = None) -> Tensor:  # type: ignore[override]
        return self.mean + self.log_scale.exp() * x / _levels(sigma, x)

    def log_prob(self, x: Tensor, sigma: Any) -> Tensor:
        """The log-density [B] of what it makes plus sigma times noise, at x [B, d]."""
        variance = self._variance(x) + _levels(sigma, x) ** 2
        squares = (x - self.mean.to(x)).square() / variance + (2 * math.pi * variance).log()
        return -squares.sum(-1) / 2

    def denoise(self, x: Tensor, sigma: Any, condition: None = None) -> Tensor:
        """What it made, on average, where that plus sigma times noise is x [B, d]."""
        variance, noise = self._variance(x), _levels(sigma, x) ** 2
        return (variance * x + noise * self.mean.to(x)) / (variance + noise)

    def _variance(self, x: Tensor) -> Tensor:
        return (2 * self.log_scale.to(x)).exp()


class ClosedFormNetwork(Network):
    """network(x, sigma) = E[x0 | x0 + sigma noise = x], and the log-density of that sum."""

    conditional = False

    def __init__(self, law: Mixture):
        nn.Module.__init__(self)
        self.law = law

    def forward(self, x: Tensor, sigma: Any, condition: None = None) -> Tensor:  # type: ignore[override]
        return self.law.denoise(x, _levels(sigma, x).squeeze(-1))

    denoise = forward

    def log_prob(self, x: Tensor, sigma: Any) -> Tensor:
        """[B], at x [B, d]."""
        return self.law.log_prob(x, _levels(sigma, x).squeeze(-1))


def _levels(sigma: Any, x: Tensor) -> Tensor:
    """[B, 1], from a number or from [B]."""
    return spread_to(torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x)), x)


def _require_points(who: object, shape: torch.Size, outputs: int) -> None:
    if len(shape) != 1 or outputs != shape.numel():
        raise ValueError(
            f"{who!r} is for points [d], got inputs of shape {tuple(shape)} and {outputs} outputs; write "
            "Denoiser()"
        )
