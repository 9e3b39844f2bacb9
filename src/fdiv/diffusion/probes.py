"""What can be asked of a score field: is it a gradient, does that matter, and on what surface are the data.

Horvat, Pfister, "On gauge freedom, conservativity and intrinsic dimensionality estimation in diffusion
models", arXiv 2402.03845. A field is the score s plus a remainder R; where div(R) + R . s = 0, the gauge
condition, R moves no mass: samples and densities are those of s, be R the gradient of anything or not.

A field is a callable of x [B, ...] -> [B, ...] that treats each row by itself; that of a denoiser is
`score(denoiser, x, sigma)`. With `probes`, traces are estimated by as many random vectors; without, they are
exact, at one derivative for each of the d coordinates.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fdiv.diffusion.edm import Denoiser, falling, heun

Field = Callable[[Tensor], Tensor]


def jacobian(field: Field, x: Tensor) -> Tensor:
    """d field_i / d x_j [B, d, d] at each row of x."""
    value, back = _linear(field, x)
    basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, *x.shape[1:])
    return torch.stack([back(one.expand_as(value))[0].flatten(1) for one in basis], 1)


def asymmetry(
    field: Field, x: Tensor, probes: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """E|J - J'|^2 / E|J|^2 over rows: 0 of a gradient, 2 of a field with as much of either, 4 at most."""
    if probes is None:
        found = jacobian(field, x)
        return (found - found.mT).square().sum() / found.square().sum()
    twisted, whole = x.new_zeros(()), x.new_zeros(())
    back = _linear(field, x)[1]
    for probe in _normal(x, probes, generator):  # E|A v|^2 = |A|^2
        ahead = _ahead(field, x, probe)
        twisted = twisted + (ahead - back(probe)[0]).square().sum()
        whole = whole + ahead.square().sum()
    return twisted / whole


def divergence(
    field: Field, x: Tensor, probes: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The trace of the Jacobian, [B]."""
    if probes is None:
        return jacobian(field, x).diagonal(dim1=1, dim2=2).sum(-1)
    return torch.stack([_dot(v, _ahead(field, x, v)) for v in _normal(x, probes, generator)]).mean(0)


def gauge_residual(
    field: Field, score: Field, x: Tensor, probes: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """E[(div(R) + R . s)^2] of R = field - score, over rows x drawn from the law whose score it is.

    Unbiased: with probes it is the product of two independent estimates, so that it may come out below 0.
    Differentiable in the field's parameters, as a penalty.
    """

    def remainder(at: Tensor) -> Tensor:
        return field(at) - score(at)

    along = _dot(remainder(x), score(x))
    first = divergence(remainder, x, probes, generator) + along
    return (first * (first if probes is None else divergence(remainder, x, probes, generator) + along)).mean()


def loop_integral(field: Field, corners: Tensor, points: int = 64) -> Tensor:
    """The integral of the field along the closed polygon through `corners` [K, ...]: 0 of any gradient."""
    if len(corners) < 3:
        raise ValueError(f"a loop has three corners or more, got {len(corners)}")
    edges = corners.roll(-1, 0) - corners
    share = (torch.arange(points, dtype=corners.dtype, device=corners.device) + 0.5) / points
    along = share.view(-1, 1, *(1,) * (corners.ndim - 1)) * edges + corners  # [points, K, ...]
    values = field(along.flatten(0, 1)).view_as(along)
    return (values * edges).sum() / points


def dimension(field: Field, x: Tensor, sigma: float) -> Tensor:
    """How many directions at x the data extend in, [B] int64, from the score field at the level sigma.

    The singular values of sigma^2 J are 1 across the surface and sigma^2 / (spread^2 + sigma^2) along it:
    those below a half are counted, the directions in which the data spread by more than sigma.
    """
    return (torch.linalg.svdvals(sigma**2 * jacobian(field, x)) < 0.5).sum(-1)


def dimension_by_trace(
    field: Field,
    x: Tensor,
    sigma: float,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The same as a number [B], d + sigma^2 div(s), which is the trace of the denoiser's Jacobian."""
    return x[0].numel() + sigma**2 * divergence(field, x, probes, generator)


def dimension_by_flow(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """The same, [B] int64, from the map that carries x at sigmas[0] to sigmas[-1] > 0: the paper's way.

    It shrinks a direction across the surface by sigmas[-1] / sigmas[0], and keeps one along it. Counted are
    the singular values above the root of that ratio.
    """
    levels = falling(sigmas)
    if levels[-1] == 0:
        raise ValueError("the last of the levels is > 0 here, at 0 no direction is left; write sigmas[:-1]")
    carried = jacobian(lambda at: heun(denoiser, at, sigmas), x)
    return (torch.linalg.svdvals(carried) > (levels[-1] / levels[0]) ** 0.5).sum(-1)


def _linear(field: Field, x: Tensor) -> tuple[Tensor, Callable]:
    """field(x), and v -> (J' v,)."""
    found: Any = vjp(field, x)
    return found


def _ahead(field: Field, x: Tensor, v: Tensor) -> Tensor:
    """J v."""
    found: Any = jvp(field, (x.contiguous(),), (v,))  # forward mode refuses rows that share their memory
    return found[1]


def _normal(x: Tensor, probes: int, generator: torch.Generator | None) -> list[Tensor]:
    if not (isinstance(probes, int) and not isinstance(probes, bool) and probes >= 1):
        raise ValueError(f"probes is a whole number >= 1, or None for all directions, got {probes!r}")
    return [torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for _ in range(probes)]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(-1)
