"""The few stable primitives every divergence is written with.

A divergence that uses these stays finite on peaked rows, is exact at equality (value *and* slope are
zero, bitwise) and loses no digits near it.  They all take natural logarithms of masses; `-inf` is an
empty cell.  Cells empty on *both* sides never arrive here: `FDivergence` leaves them out.
"""

import math

import torch
from torch import Tensor

# Where |gap| < NEAR two masses are close and their difference is taken by expm1 or a series; further
# apart plain exponentials lose nothing, and their *derivatives* are the accurate ones.
NEAR = 1.0
SERIES = 0.03


def exp_difference(a: Tensor, b: Tensor, gap: Tensor | None = None) -> Tensor:
    """exp(a) - exp(b), without cancellation. `gap` is a - b, if it is known better than by subtracting."""
    gap = a - b if gap is None else gap
    near = b.exp() * gap.clamp(-NEAR, NEAR).expm1()
    return torch.where(gap.abs() < NEAR, near, a.exp() - b.exp())


def bregman_exp(b: Tensor, a: Tensor) -> Tensor:
    """exp(b) - exp(a) - exp(a) (b - a) >= 0: the Bregman divergence of exp.

    With a = log p and b = log q this is p log(p/q) - p + q, the generalised KL term.
    """
    empty = a == -math.inf  # then exp(a) (b - a) is 0 * inf, and its limit is 0
    gap = torch.where(empty, 0.0, b - a)
    mass = a.exp()
    x = gap.clamp(-SERIES, SERIES)
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    x = gap.clamp(-NEAR, NEAR)
    near = torch.where(gap.abs() < SERIES, mass * series, mass * (x.expm1() - x))
    far = b.exp() - mass - mass * gap
    return torch.where((gap.abs() < NEAR) & ~empty, near, far)


def log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q) for 0 < weight < 1."""
    gap = log_p - log_q
    near = log_q + (weight * gap.clamp(-NEAR, NEAR).expm1()).log1p()
    # Each far branch factors out the larger mass; the clamp keeps the branch not taken finite.
    below = log_q + (weight * gap.clamp(max=0.0).exp() + (1 - weight)).log()
    above = log_p + (weight + (1 - weight) * (-gap).clamp(max=0.0).exp()).log()
    far = torch.where(gap > 0, above, below)
    return torch.where(gap.abs() < NEAR, near, far)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 (-inf at 0): the mass a set of atoms has left over."""
    near_zero = x > -math.log(2.0)
    safe = torch.where(near_zero, x, -1.0)
    return torch.where(near_zero, (-safe.expm1()).log(), (-torch.where(near_zero, -1.0, x).exp()).log1p())


def in_working_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast half-precision inputs to float32 and everything to one dtype; refuse integers."""
    for tensor in tensors:
        if not torch.is_floating_point(tensor):
            raise TypeError(
                f"expected floating-point log-densities, got {tensor.dtype}; "
                "convert with .float(), and pass logarithms, not counts"
            )
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def ratio_cap(dtype: torch.dtype) -> float:
    """The log-ratio beyond which functions of the ratio are continued linearly (see `continued`)."""
    # A chi-square's e^(2 cap), continued to a log-ratio of 1e4, still has to fit.
    return 300.0 if dtype == torch.float64 else 38.0


def continued(function, log_ratio: Tensor, slopes: tuple[float, float]) -> Tensor:
    """`function(log_ratio)`, continued linearly in the log-ratio beyond +-`ratio_cap`.

    exp(|log_ratio|) overflows there. `slopes` are the function's at -cap and +cap; the continuation keeps
    value and slope, is exact for functions that are bounded or logarithmic in the ratio, and has a gradient
    where a clamp would have none.
    """
    cap = ratio_cap(log_ratio.dtype)
    value = function(log_ratio.clamp(-cap, cap))
    beyond = log_ratio.isfinite() & (log_ratio.abs() > cap)
    step = torch.where(beyond, log_ratio.abs() - cap, 0.0)
    low, high = (torch.full_like(log_ratio, slope) for slope in slopes)
    slope = torch.where(log_ratio < 0, -low, high)
    return torch.where(beyond, value + slope * step, value)


def derivative(function, x: Tensor) -> Tensor:
    """d function / dx for an elementwise function."""
    return torch.func.grad(lambda t: function(t).sum())(x)
