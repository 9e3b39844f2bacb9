"""The few stable primitives every divergence is written with.

A divergence that uses these stays finite on peaked rows, is exact at equality (value *and* slope are
zero, bitwise) and loses no digits near it.  They all take natural logarithms of masses; `-inf` is an
empty cell.  Cells empty on *both* sides never arrive here: `FDivergence` leaves them out.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Where |gap| < NEAR two masses are close and their difference is taken by expm1 or a series; further
# apart plain exponentials lose nothing, and their *derivatives* are the accurate ones.
NEAR = 0.5


def effective_count(log_weight: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2, 0 without any weight, [n] -> []; in logs, for the scale of w is arbitrary."""
    total, squares = log_weight.logsumexp(0), (2 * log_weight).logsumexp(0)
    return torch.where(total == -math.inf, 0.0, (2 * total - squares).exp())


def exp_difference(a: Tensor, b: Tensor, gap: Tensor | None = None) -> Tensor:
    """exp(a) - exp(b), without cancellation. `gap` is a - b, if it is known better than by subtracting."""
    gap = a - b if gap is None else gap
    near = b.exp() * gap.clamp(-NEAR, NEAR).expm1()
    return torch.where(gap.abs() < NEAR, near, a.exp() - b.exp())


def bregman_exp(b: Tensor, a: Tensor, gap: Tensor | None = None) -> Tensor:
    """exp(b) - exp(a) - exp(a) (b - a) >= 0: the Bregman divergence of exp.

    With a = log p and b = log q this is p log(p/q) - p + q, the generalised KL term. `gap` is b - a, if it is
    known better than by subtracting.
    """
    return _BregmanExp.apply(*torch.broadcast_tensors(b, a, b - a if gap is None else gap))


def log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q) for 0 < weight < 1."""
    return _LogMixture.apply(*torch.broadcast_tensors(log_p, log_q), weight)


def mixture_gap(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """weight p log(p/m) + (1 - weight) q log(q/m) >= 0, m = weight p + (1 - weight) q, 0 < weight < 1."""
    return _MixtureGap.apply(*torch.broadcast_tensors(log_p, log_q), weight)


# The three below state their derivatives, which are shorter than what differentiating the branches gives:
# fewer exponentials a cell in a compiled kernel, and no rounding that a branch not taken would add.


class _BregmanExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(b: Tensor, a: Tensor, gap: Tensor) -> Tensor:
        empty, mass, gap = a == -math.inf, a.exp(), _finite_gap(a, gap)
        # The price of an infinite b is infinite at either end, even to a mass that underflows to 0.
        far = torch.where((b.abs() == math.inf) & ~empty, math.inf, b.exp() - mass - mass * gap)
        return torch.where(gap.abs() < NEAR, mass * _exp_less_tangent(gap.clamp(-NEAR, NEAR)), far)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        b, a, gap = ctx.saved_tensors
        gap = _finite_gap(a, gap)
        return grad * exp_difference(b, a, gap), -grad * a.exp() * gap, None


def _finite_gap(a: Tensor, gap: Tensor) -> Tensor:
    """`gap`, but +38 where a = -inf: there a mass of 0 multiplies it, and exp(b) stands alone."""
    return torch.where(a == -math.inf, 38.0, gap)


def _exp_less_tangent(x: Tensor) -> Tensor:
    """exp(x) - 1 - x for |x| <= NEAR, by its series."""
    last = 15 if x.dtype == torch.float64 else 9
    total = x * (1 / math.factorial(last))
    for power in range(last - 1, 2, -1):
        total = (total + 1 / math.factorial(power)) * x
    return (total + 0.5) * x * x


class _LogMixture(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
        pair = _ordered(log_p, log_q, weight)
        return pair.top + pair.log_share()

    @staticmethod
    def setup_context(ctx, inputs, output):
        log_p, log_q, ctx.weight = inputs
        ctx.save_for_backward(log_p, log_q)

    @staticmethod
    def backward(ctx, grad: Tensor):
        log_p, log_q = ctx.saved_tensors
        pair = _ordered(log_p, log_q, ctx.weight)
        # The shares of the mixture: of p, weight p/m, and of q.
        per_mass = grad / (pair.upper + pair.lower * pair.gap.exp())
        return *pair.as_given(per_mass * pair.upper, per_mass * pair.lower * pair.gap.exp()), None


class _MixtureGap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
        pair = _ordered(log_p, log_q, weight)
        larger, smaller = pair.excesses()
        # Far apart the two terms are of different size; near they cancel, and the terms of
        # weight (m - p - p log(m/p)) + (1 - weight) (m - q - q log(m/q)), which is the same, do not.
        near = pair.upper * _exp_less_tangent(-larger.clamp(-NEAR, NEAR)) + (
            pair.lower * pair.gap.exp() * _exp_less_tangent(-smaller.clamp(-NEAR, NEAR))
        )
        far = pair.upper * larger + pair.lower * _times_exp(smaller, pair.gap)
        return pair.top.exp() * torch.where(pair.gap > -NEAR, near, far)

    @staticmethod
    def setup_context(ctx, inputs, output):
        log_p, log_q, ctx.weight = inputs
        ctx.save_for_backward(log_p, log_q)

    @staticmethod
    def backward(ctx, grad: Tensor):
        log_p, log_q = ctx.saved_tensors
        pair = _ordered(log_p, log_q, ctx.weight)
        larger, smaller = pair.excesses()
        grad = grad * pair.top.exp()
        smaller = grad * pair.lower * _times_exp(smaller, pair.gap)
        return *pair.as_given(grad * pair.upper * larger, smaller), None


class _Ordered(NamedTuple):
    """Two masses by size: log of the larger, log(smaller/larger) <= 0, their weights in the mixture."""

    top: Tensor
    gap: Tensor
    upper: Tensor
    lower: Tensor
    p_is_larger: Tensor

    def log_share(self) -> Tensor:
        """log(m / larger)."""
        near = (self.lower * self.gap.clamp(-NEAR, NEAR).expm1()).clamp(-NEAR, NEAR).log1p()
        return torch.where(self.gap > -NEAR, near, (self.upper + self.lower * self.gap.exp()).log())

    def excesses(self) -> tuple[Tensor, Tensor]:
        """(log(larger/m), log(smaller/m))."""
        share = self.log_share()
        return -share, self.gap - share

    def as_given(self, of_larger: Tensor, of_smaller: Tensor) -> tuple[Tensor, Tensor]:
        """(of p, of q)."""
        p_first = torch.where(self.p_is_larger, of_larger, of_smaller)
        return p_first, torch.where(self.p_is_larger, of_smaller, of_larger)


def _ordered(log_p: Tensor, log_q: Tensor, weight: float) -> _Ordered:
    gap = log_p - log_q
    above = gap > 0
    of_p, of_q = torch.full_like(gap, weight), torch.full_like(gap, 1 - weight)
    upper, lower = torch.where(above, of_p, of_q), torch.where(above, of_q, of_p)
    return _Ordered(torch.where(above, log_p, log_q), torch.where(above, -gap, gap), upper, lower, above)


def _times_exp(x: Tensor, gap: Tensor) -> Tensor:
    """x exp(gap), 0 where gap = -inf."""
    return torch.where(gap == -math.inf, 0.0, x) * gap.exp()


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
