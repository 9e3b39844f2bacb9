"""The forward problem of f_softargmax: the tau at which x_j = q_j (f')^{-1}(theta_j - tau) sums to one.

The unknown is not tau but t, the log-ratio of the best atom: theta_j - tau = theta_j - max theta + f'(e^t).
Then t lies between -log of all mass and -log of the best atom's, whatever f is; the best x keeps its digits
where f' is flat; and log sum x is close to linear in t, for KL exactly so.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.divergences.alpha import Alpha
from fdiv.operators._root import MAX_STEPS, rising_root
from fdiv.operators._slopes import slopes_of

NEWTON_STEPS = 12
FAR = 60.0  # a best atom of less mass than e^-60 leaves the fast path, whose numbers are no logarithms


class Solution(NamedTuple):
    x: Tensor  # [rows, atoms]
    slope: Tensor  # [rows, 1]: max theta - tau


def solve(theta: Tensor, log_q: Tensor, divergence: FDivergence) -> Solution:
    """The maximiser for [rows, atoms], each row with a finite maximum."""
    gap = theta - theta.amax(-1, keepdim=True)
    low = -torch.where(gap > -math.inf, log_q, -math.inf).logsumexp(-1, keepdim=True)
    high = -torch.where(gap == 0, log_q, -math.inf).logsumexp(-1, keepdim=True)
    if isinstance(divergence, Alpha) and 1.1 <= divergence.alpha <= 2 and bool((high < FAR).all()):
        return _solve_power(gap, log_q, divergence.alpha - 1, high)
    log_x, slope, converged = _newton(gap, log_q, divergence, low, high)
    if not bool(converged.all()):
        left = (~converged).squeeze(-1).nonzero().squeeze(-1)
        found = _bracketed(gap[left], log_q[left], divergence, low[left], high[left])
        log_x, slope = (t.index_copy(0, left, new) for t, new in zip((log_x, slope), found, strict=True))
    return Solution((log_x - log_x.logsumexp(-1, keepdim=True)).exp(), slope)


def _solve_power(gap: Tensor, log_q: Tensor, power: float, high: Tensor) -> Solution:
    """`Alpha(1 + power)`, power in (0, 1]: x = q (z + power gap)_+^(1/power), z = e^(power t).

    The sum of x is convex in z: Newton from above comes down to the root and never passes it.
    """
    q = x = log_q.exp()
    below, root = power * gap, 1 / power
    tolerance = 4 * torch.finfo(gap.dtype).eps
    z = (power * high).exp()
    if log_q.stride() != (0, 0):  # no x_j is above 1; the best atom's alone may say so far above the root
        z = z.minimum(((-power * log_q).exp() - below).amin(-1, keepdim=True))
    for _ in range(MAX_STEPS):
        y = (z + below).clamp(min=0.0)
        # x = rate y; the rate is 0 outside the support also where its power is y^0.
        rate = q * (y.sign() if power == 1 else y.pow(root - 1))
        x = rate * y
        step = ((x.sum(-1, keepdim=True) - 1) / (root * rate.sum(-1, keepdim=True))).clamp(min=0.0)
        if bool((step <= tolerance * z).all()):
            break
        z = z - step
    return Solution(x / x.sum(-1, keepdim=True), (z - 1) / power)


def _newton(gap: Tensor, log_q: Tensor, divergence: FDivergence, low: Tensor, high: Tensor):
    """(log x, slope, which rows converged): Newton on t and on all log-ratios at once, without inverting f'.

    It starts from f' on a grid, which also holds each log-ratio in the cell of its slope.
    """
    slopes, lowest = slopes_of(divergence, gap.dtype, gap.device), divergence.slope_at_zero
    best, at_best, flat = gap == 0, gap.argmax(-1, keepdim=True), flat_rise(divergence, gap.dtype)
    small = torch.finfo(gap.dtype).eps ** 0.6

    def guess(t: Tensor) -> Tensor:
        slope = gap + slopes.at(t)
        return torch.where(best, t, torch.where(slope > lowest, slopes.inverse(slope), -math.inf))

    t = rising_root(lambda t: (guess(t) + log_q).logsumexp(-1, keepdim=True), low, high, 1e-3)
    log_ratio = guess(t).clamp(min=slopes.log_ratio[0].item())
    slope = slopes.at(t)
    log_x, converged = log_ratio + log_q, torch.zeros_like(low, dtype=torch.bool)
    for left in reversed(range(NEWTON_STEPS)):
        value, rise = _phi_and_rise(divergence, log_ratio)
        slope, best_rise = value.gather(-1, at_best), rise.gather(-1, at_best)
        inside = best | (gap + slope > lowest)
        log_x = torch.where(inside, log_ratio + log_q, -math.inf)
        share = log_x.softmax(-1)
        # To first order log_ratio is off by `error`, and follows t at `rate`.
        moves = inside & (rise > flat)
        error = torch.where(moves & ~best, (gap + slope - value) / rise, 0.0)
        rate = torch.where(best, 1.0, torch.where(moves, best_rise / rise, 0.0))
        excess = log_x.logsumexp(-1, keepdim=True) + (share * error).sum(-1, keepdim=True)
        step = -excess / (share * rate).sum(-1, keepdim=True)
        t = (t + step).clamp(low, high)
        target = gap + slope + best_rise * step
        least, most = slopes.cell(target)
        log_ratio = torch.where(best, t, (log_ratio + error + rate * step).clamp(least, most).fmin(t))
        slope = slope + best_rise * step
        converged = (share * error.abs()).sum(-1, keepdim=True) + step.abs() <= small
        if bool(converged.all()) or left == 0:  # then the step just taken was the last
            log_x = torch.where(best | (target > lowest), log_ratio + log_q, -math.inf)
            # unless an atom had stood where f' is too flat for it to move: its cell has brought it back.
            converged = converged & (log_x.logsumexp(-1, keepdim=True).abs() <= small)
            if bool(converged.all()):
                break
    return log_x, slope, converged


def flat_rise(divergence: FDivergence, dtype: torch.dtype) -> float:
    """u f''(u) up to here is lost in the rounding of f'(0): an atom at the very edge of the support."""
    lowest = divergence.slope_at_zero
    return 16 * torch.finfo(dtype).eps * abs(lowest) if math.isfinite(lowest) else 0.0


def _phi_and_rise(divergence: FDivergence, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """(f'(u), u f''(u))."""

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        value = divergence.phi(x)
        return value.sum(), value

    rise, value = torch.func.grad(total, has_aux=True)(log_ratio)
    return value, rise


def _bracketed(gap: Tensor, log_q: Tensor, divergence: FDivergence, low: Tensor, high: Tensor):
    """(log x, slope) by inverting f' at each trial t: slow, and sure."""

    def log_x(t: Tensor) -> Tensor:
        log_ratio = divergence.inverse_slope(gap + divergence.phi(t))
        return log_q + torch.where(gap == 0, t, torch.fmin(log_ratio, t))  # fmin: rounding may pass f'(inf)

    def log_sum(t: Tensor) -> Tensor:
        return log_x(t).logsumexp(-1, keepdim=True)

    t = rising_root(log_sum, low, high, 4 * torch.finfo(gap.dtype).eps)
    return log_x(t), divergence.phi(t)
