"""The alpha-beta divergence of Cichocki, Cruces and Amari, with its three limits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fdiv._divergence import Divergence, on_one_support
from fdiv._math import NEAR, bregman_exp, exp_difference


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """-1/(alpha beta) sum (p^alpha q^beta - alpha/s p^s - beta/s q^s), s = alpha + beta.

    (1, 0) is KL, (0, 1) ReverseKL, (1, 1) half the squared Euclidean distance, alpha + beta = 1
    the alpha family; the limits at alpha, beta or s = 0 and at (0, 0) are taken exactly. An
    f-divergence only where s = 1: it does not ignore how mass is split into atoms, so never
    truncate its support. Disjoint supports have a finite value only if alpha > 0 and beta > 0.
    Source: Cichocki, Cruces and Amari, "Generalized Alpha-Beta Divergences and Their Application to
    Robust Nonnegative Matrix Factorization" (2011); ABKD, arXiv 2505.04560.
    """

    alpha: float
    beta: float

    def __post_init__(self):
        if not (math.isfinite(self.alpha) and math.isfinite(self.beta)):
            raise ValueError(f"AlphaBeta needs finite exponents, got {self.alpha!r} and {self.beta!r}")

    def __call__(self, log_p: Tensor, log_q: Tensor, dim: int = -1) -> Tensor:
        log_p, log_q = on_one_support(log_p, log_q, dim)
        no_p, no_q = log_p == -math.inf, log_q == -math.inf
        only_p, only_q = self._alone(log_p, self.beta), self._alone(log_q, self.alpha)
        a, b = log_p.masked_fill(no_p | no_q, 0.0), log_q.masked_fill(no_p | no_q, 0.0)
        if abs(self.alpha) > abs(self.beta):  # the larger exponent divides, so that no limit is 0/0
            terms = _terms(b, a, self.beta, self.alpha)
        else:
            terms = _terms(a, b, self.alpha, self.beta)
        terms = torch.where(no_p & ~no_q, only_q, torch.where(no_q & ~no_p, only_p, terms))
        return terms.sum(dim)

    def _alone(self, log_mass: Tensor, other: float) -> Tensor:
        """The term of an atom where the other measure, whose exponent is `other`, has no mass."""
        s = self.alpha + self.beta
        if other > 0 and s > 0:
            return (s * log_mass).exp() / (other * s)
        return torch.full_like(log_mass, math.inf)


def _terms(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """(E(s) - E(alpha)) / beta, E(c) = q^s (e^(c d) - 1) / c, d = log p/q; |beta| >= |alpha|."""
    gap = log_p - log_q
    if beta == 0.0:
        return gap.square() / 2
    s = alpha + beta
    # The largest power is factored out, so that two that overflow are not subtracted; it saturates
    # short of infinity, where a gradient would be nan.
    top = torch.stack([s * log_q, s * log_p, alpha * log_p + beta * log_q]).amax(0).detach()
    base = s * log_q - top
    reach = NEAR / abs(beta)
    close = gap.clamp(-reach, reach)
    near = _curved(s, base, close) - _curved(alpha, base, close)
    far = _straight(s, base, gap) - _straight(alpha, base, gap)
    scale = top.clamp(max=math.log(torch.finfo(top.dtype).max) - 8).exp()
    return torch.where(gap.abs() < reach, near, far) / beta * scale


def _straight(c: float, base: Tensor, gap: Tensor) -> Tensor:
    """E(c), with its limit q^s d at c = 0."""
    return exp_difference(base + c * gap, base, c * gap) / c if c else base.exp() * gap


def _curved(c: float, base: Tensor, gap: Tensor) -> Tensor:
    """E(c) less q^s d, which cancels in E(s) - E(alpha) and hides the rest of it near d = 0."""
    return bregman_exp(base + c * gap, base) / c if c else torch.zeros_like(gap)
