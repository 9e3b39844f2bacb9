"""Functions of the ratio u = p/q, derived from the perspective g(p, q) of any f-divergence.

phi = f'(u) is dg/dp where p = 1; psi = f(u) - u f'(u) is dg/dq where q = 1. Inverting f' takes one
safeguarded Newton iteration in the log-ratio, in which phi is increasing for every convex f and close to
linear or exponential at its ends. Members with a closed form give it as `closed_inverse_slope`, and that of
u f''(u) as `closed_rise`: fast paths that the laws hold to what is derived here.
"""

import math
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._math import continued, derivative, ratio_cap

MAX_STEPS = 200


def phi(divergence, log_ratio: Tensor) -> Tensor:
    """f'(u) at finite log-ratios, continued linearly where e^|log_ratio| would overflow."""
    slopes = _end_slopes(divergence, _phi_inside, log_ratio.dtype)
    return continued(partial(_phi_inside, divergence), log_ratio, slopes)


def psi(divergence, log_ratio: Tensor) -> Tensor:
    """f(u) - u f'(u) at finite log-ratios, continued in the same way."""
    slopes = _end_slopes(divergence, _psi_inside, log_ratio.dtype)
    return continued(partial(_psi_inside, divergence), log_ratio, slopes)


def _phi_inside(divergence, log_ratio: Tensor) -> Tensor:
    return _gradient(divergence, 0, torch.zeros_like(log_ratio), -log_ratio)


def _psi_inside(divergence, log_ratio: Tensor) -> Tensor:
    return _gradient(divergence, 1, log_ratio, torch.zeros_like(log_ratio))


@lru_cache(maxsize=4096)
def _end_slopes(divergence, inside, dtype: torch.dtype) -> tuple[float, float]:
    cap = ratio_cap(dtype)
    # In float64: the rounding of a slope that is 0 would be multiplied by how far beyond the cap one is.
    at = torch.tensor([-cap, cap], dtype=torch.float64)
    largest = torch.finfo(dtype).max
    low, high = derivative(partial(inside, divergence), at).clamp(-largest, largest).tolist()
    return low, high


def _gradient(divergence, argument: int, log_p: Tensor, log_q: Tensor) -> Tensor:
    """dg/dlog of one argument, which is dg/d of it where its mass is 1."""

    def total(a: Tensor, b: Tensor) -> Tensor:
        return divergence.perspective(a, b).sum()

    return torch.func.grad(total, argnums=argument)(log_p, log_q)


class Ends(NamedTuple):
    """What a generator does at u = 0, 1 and infinity, as plain numbers."""

    f_at_zero: float
    slope_at_infinity: float
    slope_at_zero: float
    psi_at_infinity: float
    curvature_at_one: float


@lru_cache(maxsize=4096)
def ends(divergence) -> Ends:
    """The ends of a (frozen, hashable) f-divergence, measured once from its perspective."""
    zero, empty, tiny = (torch.tensor(x, dtype=torch.float64) for x in (0.0, -math.inf, 1e-30))
    far = torch.tensor([100.0, 200.0, 300.0], dtype=torch.float64)

    kink = (phi(divergence, tiny) - phi(divergence, -tiny)).item() > 1e-6
    return Ends(
        f_at_zero=divergence.perspective(empty, zero).item(),
        slope_at_infinity=divergence.perspective(zero, empty).item(),
        slope_at_zero=falling_limit(phi(divergence, -far).tolist()),
        psi_at_infinity=falling_limit(psi(divergence, far).tolist()),
        curvature_at_one=math.inf if kink else -derivative(partial(psi, divergence), zero).item(),
    )


def falling_limit(values: list[float]) -> float:
    """The limit of a falling sequence taken at equal steps, -inf if it has none.

    f' and psi tend to a limit like A + B e^(-kx), or fall linearly, or exponentially. The ratio of two
    successive differences tells these apart, and Aitken's formula is exact for the first.
    """
    first, second, third = values
    step, last = second - first, third - second
    if abs(last) <= 1e-13 * abs(second):  # arrived, up to rounding
        return third
    if not abs(last) < (1 - 1e-6) * abs(step):  # also when it overflowed
        return -math.inf
    return third - last * last / (last - step)


def inverse_slope(divergence, slope: Tensor) -> Tensor:
    """The log-ratio x with phi(x) = slope; see `FDivergence.inverse_slope`."""
    with torch.no_grad():
        lowest, highest = divergence.slope_at_zero, divergence.slope_at_infinity
        inside = (slope > lowest) & (slope < highest)
        root = _root(divergence, torch.where(inside, slope, 0.0))
    if slope.requires_grad:
        root = _with_implicit_gradient(divergence, root, torch.where(inside, slope, 0.0))
    root = torch.where(slope <= lowest, -math.inf, root)
    root = torch.where(slope == highest, math.inf, root)
    return torch.where((slope > highest) | slope.isnan(), math.nan, root)


def conjugate(divergence, slope: Tensor) -> Tensor:
    """f*(y) = -psi at the log-ratio where phi = y; see `FDivergence.conjugate`."""
    root = inverse_slope(divergence, slope)
    safe = torch.where(root.isfinite(), root, 0.0)
    # u = 1 is the one place where f may have a kink; there f* has slope u = 1 on a whole interval.
    value = torch.where(safe == 0.0, slope, -divergence.psi(safe))
    value = _Envelope.apply(slope, value.detach(), safe.exp())
    value = torch.where(root == -math.inf, -divergence.f_at_zero, value)
    value = torch.where(root == math.inf, -ends(divergence).psi_at_infinity, value)
    return torch.where(slope > divergence.slope_at_infinity, math.inf, value)


class _Envelope(torch.autograd.Function):
    """A maximum whose derivative in y is its maximiser: f*'(y) = u."""

    @staticmethod
    def forward(ctx, slope: Tensor, value: Tensor, maximiser: Tensor) -> Tensor:
        ctx.save_for_backward(maximiser)
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (maximiser,) = ctx.saved_tensors
        return grad * maximiser, None, None


def _root(divergence, slope: Tensor) -> Tensor:
    closed = getattr(divergence, "closed_inverse_slope", None)
    return closed(slope) if closed else newton_inverse_slope(divergence, slope)


def newton_inverse_slope(divergence, slope: Tensor) -> Tensor:
    """Safeguarded Newton: a step that leaves the bracket is replaced by its midpoint."""
    kink = torch.full_like(slope, 1e-30)
    at_one = (slope >= divergence.phi(-kink)) & (slope <= divergence.phi(kink))
    low, high = _bracket(divergence, torch.where(at_one, 0.0, slope))
    x = torch.zeros_like(slope)
    tolerance = 4 * torch.finfo(slope.dtype).eps
    for _ in range(MAX_STEPS):
        value, rise = divergence.phi(x), derivative(divergence.phi, x)
        low, high = torch.where(value < slope, x, low), torch.where(value > slope, x, high)
        step = x - (value - slope) / rise
        # Where phi is flat its own rounding, not x, decides when there is nothing left to gain.
        done = ((value - slope).abs() <= tolerance * slope.abs()) | (
            (step - x).abs() <= tolerance * (1 + x.abs())
        )
        inside = (step > low) & (step < high)
        x = torch.where(done, x, torch.where(inside, step, (low + high) / 2))
        if bool((done | at_one).all()):
            break
    return torch.where(at_one, 0.0, x)


def _bracket(divergence, slope: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.full_like(slope, -1.0), torch.full_like(slope, 1.0)
    for _ in range(60):
        # Strictly outside: a root on the bracket's end would be bisected for, not stepped to.
        below, above = divergence.phi(low) >= slope, divergence.phi(high) <= slope
        if not bool((below | above).any()):
            break
        low, high = torch.where(below, 2 * low, low), torch.where(above, 2 * high, high)
    return low, high


def _with_implicit_gradient(divergence, root: Tensor, slope: Tensor) -> Tensor:
    """Attach dx/dy = 1 / (dphi/dx) by one Newton step whose value is zero."""
    rise = derivative(divergence.phi, root)
    return root + (slope - slope.detach()) / rise
