"""The worst expectation near a reference: what a robust, regularised Bellman backup takes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, Sum, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.tv import TV
from fdiv.operators._solver import _bracketed
from fdiv.operators.softargmax import f_softargmax

AT_A_KINK = 1e-6  # a log-ratio up to which an atom stands where f' jumps
ABOVE_A_KINK = 1e-30  # f' is read from here on, as the ratio of the best atom is at least 1


class WorstCase(NamedTuple):
    """value [...], the least E_p[v] + lam D(p, q); its minimiser [..., atoms]; its multiplier eta [...]."""

    value: Tensor
    distribution: Tensor
    eta: Tensor


def worst_case(
    values: Tensor, log_q: Tensor, divergence: FDivergence, lam: float = 1.0, dim: int = -1
) -> WorstCase:
    """min of E_p[values] + lam D(p, q) over the probability vectors p along `dim`.

    The minimiser is that of f_softargmax: p = argmax <p, -values/lam> - D(p, q), with D(p, q) = sum q f(p/q)
    of the worst case p and the reference q. So KL() is sum p log(p/q), with the value
    -lam log E_q exp(-values/lam), and Pearson() the chi-square sum (p - q)^2/q. eta solves the dual,

        max over eta of eta - lam E_q f*((eta - values)/lam),   p_j = q_j (f')^{-1}((eta - values_j)/lam)

    `TV()` is E_q min(values, min values + lam); a sum with a kink (`KL() + TV()`) is solved by bracketing.

    Shapes: values and log_q [..., atoms, ...], broadcastable. log_q is normalised. p puts mass where log_q is
    -inf if its price f'(inf) is finite and the value there low enough; a value of +inf leaves the atom out.
    The value is differentiable in `values` (its derivative is p, and once more that of f_softargmax where f
    has no kink), and in log_q, as masses that are free: lam q psi(p/q).
    Errors: TypeError for what is no f-divergence, or flat at 1; ValueError for lam, for log_q that is not
    normalised, and for values that are not finite where q has mass.
    Source: Tang, Liu and Xu, "Robust Offline Reinforcement Learning with Linearly Structured f-Divergence
    Regularization" (arXiv 2411.18612), for TV, KL and chi-square.

    >>> import torch
    >>> from fdiv import TV
    >>> worst_case(torch.tensor([0.0, 1.0, 4.0]), torch.full((3,), 1 / 3).log(), TV(), lam=2.0).value
    tensor(1.)
    """
    require_f_divergence(divergence, "worst_case")
    if not (0 < lam < math.inf):
        raise ValueError(f"lam is finite and > 0, got {lam!r}; for lam = inf take the mean under q")
    lam, divergence = weighted(lam, divergence)
    v, log_q = (t.movedim(dim, -1) for t in torch.broadcast_tensors(*in_working_precision(values, log_q)))
    _check(v, log_q)
    least = v.detach().masked_fill(log_q == -math.inf, math.inf).amin(-1, keepdim=True)
    v = v - least  # keeps the digits where lam is small; the value and eta move with it
    p, eta = _total_variation(v, log_q, lam) if divergence == TV() else _any(v, log_q, divergence, lam)
    value = _Envelope.apply(v, log_q, p, eta, divergence, lam)
    return WorstCase(value + least.squeeze(-1), p.movedim(-1, dim), (eta + least).squeeze(-1))


def weighted(lam: float, divergence: FDivergence) -> tuple[float, FDivergence]:
    """lam D without the weight of D: that of a single term, and of total variations that were added up."""
    if isinstance(divergence, Sum) and len({member for _, member in divergence.terms}) == 1:
        inner = divergence.terms[0][1]
        return weighted(lam * sum(weight for weight, _ in divergence.terms), inner)
    return lam, divergence


def _check(values: Tensor, log_q: Tensor) -> None:
    empty = log_q == -math.inf
    total = log_q.logsumexp(-1)
    if log_q.shape[-1] == 0 or not bool((total.abs() <= 1e-3).all()):
        raise ValueError("log_q is normalised over the atoms; write log_q.log_softmax(-1)")
    if not bool((values.isfinite() | (empty & (values == math.inf))).all()):
        raise ValueError(
            "values are finite; +inf is allowed where log_q = -inf, and leaves that atom out of the minimum"
        )


def _total_variation(v: Tensor, log_q: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """(p, eta): the mass of what lies more than lam above the least value goes there, in equal parts."""
    least = v.detach().amin(-1, keepdim=True)
    p = torch.where(v <= least + lam, log_q.exp(), 0.0)
    lowest = (v == least).to(p.dtype)
    rest = (1 - p.sum(-1, keepdim=True)).clamp(min=0.0)
    return p + rest * lowest / lowest.sum(-1, keepdim=True), least + lam / 2


def _any(v: Tensor, log_q: Tensor, divergence: FDivergence, lam: float) -> tuple[Tensor, Tensor]:
    """(p, eta) where f' is inverted; v is 0 at the best atom of the support of q."""
    kinked = divergence.curvature_at_one == math.inf
    if kinked:
        p = _with_kink(-v.detach() / lam, log_q.detach(), divergence)
    else:
        p = f_softargmax(-v / lam, divergence, log_q)
    held = log_q > -math.inf
    best = v.masked_fill(~held, math.inf).argmin(-1, keepdim=True)
    at_best = p.detach().gather(-1, best).log() - log_q.detach().gather(-1, best)
    eta = lam * divergence.phi(at_best.clamp(min=ABOVE_A_KINK) if kinked else at_best)
    if math.isinf(divergence.slope_at_infinity) or bool(held.all()):
        return p, eta
    return _with_outside(v, log_q, p, eta, divergence, lam)


def _with_kink(theta: Tensor, log_q: Tensor, divergence: FDivergence) -> Tensor:
    """f_softargmax at scores whose best is 0, for an f' that jumps at 1."""
    gap = theta.masked_fill(log_q == -math.inf, -math.inf)
    low = torch.zeros_like(gap[..., :1])
    high = -torch.where(gap == 0, log_q, -math.inf).logsumexp(-1, keepdim=True)
    log_x, _ = _bracketed(gap, log_q, divergence, low, high)
    return log_x.softmax(-1)


def _with_outside(v: Tensor, log_q: Tensor, p: Tensor, eta: Tensor, divergence: FDivergence, lam: float):
    """(p, eta) where mass may leave the support of q, at the price lam f'(inf) for each unit of it."""
    outside = v.masked_fill(log_q > -math.inf, math.inf)
    cheapest, where = outside.min(-1, keepdim=True)
    limit = cheapest + lam * divergence.slope_at_infinity
    leaves = limit.detach() < eta
    slope = (torch.where(leaves, limit, 0.0) - v) / lam
    log_ratio = divergence.inverse_slope(torch.where(leaves & (log_q > -math.inf), slope, 0.0))
    stays = (log_ratio + log_q).exp()
    moved = stays.scatter(-1, where, 1 - stays.sum(-1, keepdim=True))
    return torch.where(leaves, moved, p), torch.where(leaves, limit.detach(), eta)


class _Envelope(torch.autograd.Function):
    """E_p[v] + lam D(p, q) at the minimiser p, which its derivatives keep as it is."""

    @staticmethod
    def forward(v: Tensor, log_q: Tensor, p: Tensor, eta: Tensor, divergence: FDivergence, lam: float):
        mean = (p * v.masked_fill(p == 0, 0.0)).sum(-1)
        return mean + lam * divergence(_log(p, log_q, divergence), log_q)

    @staticmethod
    def setup_context(ctx, inputs, output):
        v, log_q, p, eta, ctx.divergence, ctx.lam = inputs
        ctx.save_for_backward(v, log_q, p, eta)

    @staticmethod
    def backward(ctx, grad: Tensor):
        v, log_q, p, eta = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        if not ctx.needs_input_grad[1]:
            return grad * p, None, None, None, None, None
        price = _price_of_reference(v, log_q, p, eta, ctx.divergence, ctx.lam)
        return grad * p, grad * ctx.lam * log_q.exp() * price, None, None, None, None


def _price_of_reference(
    v: Tensor, log_q: Tensor, p: Tensor, eta: Tensor, divergence: FDivergence, lam: float
) -> Tensor:
    """psi(p/q), which is -f'(1) at p = q, and there -(eta - v)/lam if f' jumps."""
    log_ratio = torch.where(log_q > -math.inf, _log(p, log_q, divergence) - log_q, 0.0)
    psi = divergence.psi(log_ratio)
    if divergence.is_smooth:
        return psi
    return torch.where(log_ratio.abs() <= AT_A_KINK, (v - eta) / lam, psi)


def _log(p: Tensor, log_q: Tensor, divergence: FDivergence) -> Tensor:
    """log p; where f(0) = inf a p of 0 is rounded from so little mass of q that it costs nothing."""
    held = p > 0
    log_p = torch.where(held, p, 1.0).log()
    return torch.where(held, log_p, log_q if math.isinf(divergence.f_at_zero) else -math.inf)
