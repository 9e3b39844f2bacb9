"""The Gaussian that an unnormalised model is compared with."""

import math
from typing import Any

import torch
from torch import Tensor

Gaussian = tuple[float, float] | None


def check(noise: Gaussian, widen: float) -> None:
    if not 0 < widen < math.inf:
        raise ValueError(f"widen is finite and > 0, got {widen!r}")
    if noise is None:
        return
    if len(noise) != 2 or not (math.isfinite(noise[0]) and 0 < noise[1] < math.inf):
        raise ValueError(f"noise is (mean, deviation > 0) of each coordinate, or None, got {noise!r}")


def fitted(inputs: Tensor, noise: Gaussian, widen: float) -> dict[str, Tensor]:
    """Tables of the noise: a mean [d], and a factor [d, d] of its covariance.

    noise: (mean, deviation) of every coordinate; None is fitted to the inputs [N, ...], deviations `widen`
    times theirs.
    """
    rows = inputs.flatten(1).double()
    if noise is not None:
        mean, factor = torch.full_like(rows[0], noise[0]), noise[1] * torch.eye(rows.shape[1])
    else:
        if len(rows) <= rows.shape[1]:
            raise ValueError(f"a Gaussian in {rows.shape[1]} dimensions is not fitted to {len(rows)} inputs")
        mean, covariance = rows.mean(0), torch.atleast_2d(rows.T.cov())
        factor, singular = torch.linalg.cholesky_ex(covariance)
        if singular:
            raise ValueError("the inputs do not vary in every direction; write noise=(mean, deviation)")
        factor = widen * factor
    return {"noise_mean": mean.float(), "noise_factor": factor.to(mean).float()}


def drawn(memory: dict[str, Tensor], count: int, like: Tensor, generator: Any = None) -> Tensor:
    """Noise [count, ...] of the shape of inputs like [B, ...], by torch's global generator."""
    mean, factor = memory["noise_mean"], memory["noise_factor"]
    standard = torch.randn(count, len(mean), generator=generator).to(mean)
    return (mean + standard @ factor.T).reshape(count, *like.shape[1:])


def log_density(memory: dict[str, Tensor], x: Tensor) -> Tensor:
    """Of the noise at x [N, ...], [N]."""
    mean, factor = (memory[name].double() for name in ("noise_mean", "noise_factor"))
    standard = torch.linalg.solve_triangular(factor, (x.flatten(1).double() - mean).T, upper=False)
    volume = factor.diagonal().log().sum() + len(mean) / 2 * math.log(2 * math.pi)
    return -standard.square().sum(0) / 2 - volume


def energy_of(network: Any, x: Tensor) -> Tensor:
    """E [N] of a network with one output, in float64: weights are exponentials of it."""
    found = network(x)
    if found.ndim != 2 or found.shape[1] != 1:
        raise ValueError(f"an energy is a network's one output, got a shape {tuple(found.shape)}")
    return found.squeeze(-1).double()
