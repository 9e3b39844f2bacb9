"""Denoising: a diffusion model of the data, trained and sampled as EDM is, with EDM's noise or PFGM++'s.

Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv
2206.00364; Xu, Liu, Tian, Tong, Tegmark, Jaakkola, "PFGM++: Unlocking the Potential of Physics-Inspired
Generative Models", arXiv 2302.04265.

    L = E w(sigma) |D(y, sigma) - x|^2,   y ~ p_sigma(. | x),   w = (sigma^2 + s^2) / (sigma s)^2

s is `sigma_data`; their P_mean and P_std are those of `levels`; the sampler's N, sigma_min, sigma_max and rho
are `steps`, `least`, `most` and `rho`. PFGM++'s D is `dims`, at r = sigma sqrt(D); inf is EDM.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.diffusion.edm import Denoiser, Preconditioning, denoised, guided, heun, karras
from fdiv.diffusion.pfgm import perturbed, require_dims, rescaled
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.generate._one_step import require_size
from fdiv.methods.generate.levels import Levels, LogNormal, drawn, require_levels


@dataclass(frozen=True)
class Denoising:
    """Mean over examples and coordinates of w(sigma) (D - x)^2, at one level sigma for each example.

    sigma_data: the standard deviation of a coordinate of the data, as the network has it. levels: the law of
    sigma. dims: inf for Gaussian noise, PFGM++'s D for heavier tails. drop: the share of examples whose class
    is not told, so that `guidance` can go away from what is said then. The rest is for `sample`, by Heun's
    method: 2 steps - 1 calls of the network, twice as many with guidance, see `guided`.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "labels", "network")
    divergence: ClassVar[Divergence] = (
        KL()
    )  # the one that the loss is, if 1 / sigma^2 is its weight per log sigma

    sigma_data: float = 0.5
    levels: Levels = LogNormal()
    dims: float = math.inf
    steps: int = 18
    least: float = 0.002
    most: float = 80.0
    rho: float = 7.0
    drop: float = 0.0
    guidance: float = 1.0

    def __post_init__(self):
        Preconditioning(self.sigma_data)  # these check what they are given
        require_levels(self.levels, "Denoising(levels)")
        require_dims(self.dims)
        karras(self.steps, self.least, self.most, self.rho)
        if not 0 <= self.drop < 1:
            raise ValueError(f"Denoising(drop) is a share of examples, in [0, 1), got {self.drop!r}")
        require_size("Denoising", least=0.0, guidance=self.guidance)

    def __call__(
        self, *, inputs: Tensor, labels: Tensor, network: Any, count: Tensor | float | None = None
    ) -> Out:
        """inputs [B, ...] the data; labels [B, ...] what a network reads that states conditional = True."""
        if not inputs.is_floating_point():
            raise TypeError(f"noise is added to real numbers, got inputs of {inputs.dtype}; write x.float()")
        sigma = drawn(self.levels, inputs).sigma
        noisy = perturbed(inputs, sigma, self.dims)
        condition = labels if getattr(network, "conditional", False) else None
        if self.drop:
            condition = self._with_some_left_out(labels, network)
        squares = (denoised(network, noisy, sigma, condition) - inputs).square().flatten(1).mean(1)
        require_finite(squares)
        metrics = {"squared_error": squares.detach().mean()} if len(squares) else {}
        return Out(
            mean_over_tokens(Preconditioning(self.sigma_data).weight(sigma) * squares, count=count), metrics
        )

    def _with_some_left_out(self, labels: Tensor, network: Any) -> Tensor:
        if getattr(network, "null", None) is None:
            raise ValueError(
                f"drop={self.drop:g} leaves the class out, and the network has none for that; write "
                "Denoiser(classes=..., null=True)"
            )
        left_out = torch.rand(len(labels), device=labels.device) < self.drop
        return torch.where(left_out, network.null, labels)

    def sample(self, network: Denoiser, noise: Tensor, condition: Any = None) -> Tensor:
        """Samples [B, ...] from standard normal noise [B, ...], and from nothing else.

        With finite dims each row's norm is moved to the same quantile of the heavier-tailed prior's.
        """
        start, told = self.most * rescaled(noise, self.dims), guided(network, self.guidance)
        return heun(told, start, karras(self.steps, self.least, self.most, self.rho), condition)


def require_finite(squares: Tensor) -> None:
    finite = squares.isfinite()
    if not bool(finite.all()):
        raise FloatingPointError(
            f"{int((~finite).sum())} of {len(finite)} squared errors are not finite; nothing was updated. "
            "Look at the inputs, or lower train.learning_rate"
        )
