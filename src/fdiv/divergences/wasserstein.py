"""Optimal transport on a line, and its average over lines."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fdiv._metric import MetricDivergence, weighted_points

MASS_TOLERANCE = 1e-2  # what rounding to bfloat16 does to the total of a softmax


@dataclass(frozen=True)
class Wasserstein1D(MetricDivergence):
    """W_p^p = integral of |F^-1(u) - G^-1(u)|^p du over the quantiles of points [..., N, 1]: exact.

    The p-th power, not the root; in the units of the points to the p. Total masses must agree, and
    the gradient in the weights is defined up to a constant. O((N + M) log(N + M)).
    cost: any convex function of x - y, elementwise, in place of |x - y|^p: Huber's, or one that charges more
        for the way to the left. Quantiles go to quantiles under all of them.
    Source: Vallender, "Calculation of the Wasserstein distance between probability distributions on
    the line" (1974).
    """

    p: float = 2
    cost: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self):
        require_exponent(self.p, "Wasserstein1D(p)")
        if self.cost is not None:
            if self.p != 2:
                raise ValueError(f"Wasserstein1D has an exponent or a cost, got {self.p!r} and {self.cost!r}")
            _require_convex(self.cost)

    def between(
        self, x: Tensor, y: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None
    ) -> Tensor:
        x, y, a, b = weighted_points(x, y, log_a, log_b)
        if x.shape[-1] != 1:
            raise ValueError(
                f"Wasserstein1D takes points on a line, [..., N, 1], got D = {x.shape[-1]}; "
                "write Sliced() to average over directions, or Sinkhorn(blur) for the plane and up"
            )
        require_equal_masses(a, b, "Wasserstein1D")
        x, a = _in_order(x.squeeze(-1), a)
        y, b = _in_order(y.squeeze(-1), b)
        batch = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        x, a, y, b = (t.expand(*batch, -1) for t in (x, a, y, b))
        levels, order = torch.cat([a, b], -1).sort(dim=-1, stable=True)  # [..., N + M]
        # Past the top of either measure only rounding is left, and no atom to charge it to.
        top = torch.minimum(a[..., -1:], b[..., -1:])
        levels = levels - (levels - top).clamp(min=0.0).detach()
        steps = levels.diff(dim=-1, prepend=levels.new_zeros(*batch, 1))
        gap = _atoms(x, order < x.shape[-1]) - _atoms(y, order >= x.shape[-1])
        return (steps * (gap.abs().pow(self.p) if self.cost is None else self.cost(gap))).sum(-1)


@dataclass(frozen=True)
class Sliced(MetricDivergence):
    """The mean of W_p^p over `directions` unit vectors, the projections of points [..., N, D].

    The directions are drawn once from `seed` and stay: it is one divergence, not a noisy one, whose
    error as an integral over the sphere falls as 1/sqrt(directions). No root; on a line it is
    Wasserstein1D. Memory batch x directions x (N + M).
    orthogonal: in blocks of D directions at right angles, whose errors partly cancel. At p = 2 whole blocks
        are exact for a cloud that is shifted, and scaled too if its covariance is a multiple of I.
    Source: Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures" (2015).
    """

    p: float = 2
    directions: int = 64
    seed: int = 0
    orthogonal: bool = False

    def __post_init__(self):
        require_exponent(self.p, "Sliced(p)")
        require_count(self.directions, "Sliced(directions)")
        if not isinstance(self.seed, int):
            raise ValueError(f"Sliced(seed) is an int, one divergence each, got {self.seed!r}")
        if not isinstance(self.orthogonal, bool):
            raise ValueError(f"Sliced(orthogonal) is True or False, got {self.orthogonal!r}")

    def between(
        self, x: Tensor, y: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None
    ) -> Tensor:
        x, y, _, _ = weighted_points(x, y, log_a, log_b)
        lines = unit_vectors(self.directions, x.shape[-1], self.seed, self.orthogonal).to(x)  # [L, D]
        return along(lines, self.p, x, y, log_a, log_b).mean(-1)


def along(
    lines: Tensor, p: float, x: Tensor, y: Tensor, log_a: Tensor | None, log_b: Tensor | None
) -> Tensor:
    """W_p^p of the projections on each of lines [..., L, D]: [..., L]."""
    with torch.autocast(x.device.type, enabled=False):
        x, y = ((lines @ points.mT).unsqueeze(-1) for points in (x, y))  # [..., L, N, 1]
    log_a, log_b = (None if w is None else w.unsqueeze(-2) for w in (log_a, log_b))
    return Wasserstein1D(p).between(x, y, log_a, log_b)


def _in_order(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Points [..., N] from left to right, and the mass up to and with each."""
    points, weights = torch.broadcast_tensors(points, weights)
    points, order = points.sort(-1)
    return points, weights.gather(-1, order).cumsum(-1)


def _atoms(points: Tensor, own: Tensor) -> Tensor:
    """The atom below each merged level, counting the levels that are a measure's `own`.

    Counted, and not looked up by level: so an atom of no mass has its place, hence its gradient.
    """
    passed = own.long().cumsum(-1) - own.long()
    return points.gather(-1, passed.clamp(max=points.shape[-1] - 1))


@lru_cache(maxsize=64)
def unit_vectors(count: int, width: int, seed: int, orthogonal: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not orthogonal:
        return normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)
    blocks = torch.randn(-(-count // width), width, width, generator=generator, dtype=torch.float64)
    frames, triangle = torch.linalg.qr(blocks)
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # with which frames are uniform
    return (frames * signs).mT.flatten(0, 1)[:count]


def require_count(number: int, name: str) -> None:
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} is a count, an int >= 1, got {number!r}")


def _require_convex(cost: Callable[[Tensor], Tensor]) -> None:
    """Raise where a cost is seen not to be convex: its best plan would not go from quantile to quantile."""
    if not callable(cost) or isinstance(cost, type):
        raise TypeError(f"Wasserstein1D(cost) is a function of x - y, got {cost!r}")
    for reach in (1.0, 100.0):
        values = cost(torch.linspace(-reach, reach, 201, dtype=torch.float64))
        if bool((values.diff(n=2) < -1e-9 * values.abs().max()).any()):
            raise ValueError(f"Wasserstein1D(cost) is a convex function of x - y, which {cost!r} is not")


def require_exponent(p: float, name: str) -> None:
    if not (isinstance(p, int | float) and 1 <= p < math.inf):
        raise ValueError(f"{name} is the exponent of the cost, finite and >= 1, got {p!r}")


def require_equal_masses(a: Tensor, b: Tensor, who: str) -> None:
    """Transport moves mass and makes none: refuse measures of different total mass."""
    mass_a, mass_b = torch.broadcast_tensors(a.detach().sum(-1), b.detach().sum(-1))
    apart = (mass_a - mass_b).abs() > MASS_TOLERANCE * torch.maximum(mass_a, mass_b)
    if bool(apart.any()):
        raise ValueError(
            f"{who} needs measures of equal mass, got {mass_a[apart][0].item():.6g} and "
            f"{mass_b[apart][0].item():.6g}; normalise the log weights with log_softmax in float32"
        )
