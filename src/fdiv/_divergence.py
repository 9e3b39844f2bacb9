"""The idea of the package, in one file: a divergence is its perspective, and everything else follows.

Conventions that never vary: p is what you want (target, teacher, data, reference); q is what you have
(model, student, policy); both come as natural logarithms, `-inf` being an empty cell; u = p/q and
log_ratio = log u. Masses need not sum to one.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fdiv import _ratio
from fdiv._math import derivative, in_working_precision

Character = Literal["mode-covering", "mode-seeking", "covering and seeking", "bounded"]


class Divergence(ABC):
    """A number >= 0 that says how far q is from p; 0 where they agree. Frozen, hashable, printable."""

    @abstractmethod
    def __call__(self, log_p: Tensor, log_q: Tensor, dim: int = -1) -> Tensor:
        """D(p, q) with the support `dim` reduced.

        Shapes: [..., support, ...] twice, broadcastable -> [...]. Units: nats where D has them.
        float16 and bfloat16 are computed, and returned, in float32.
        """

    def first_variation(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """(dD/dp, dD/dq), each shaped like the inputs; the support is the last dimension.

        An atom without mass is priced as one of mass e^-60, since a density has no derivative at log 0.
        """
        log_p, log_q = (t.clamp(min=-60.0) for t in on_one_support(log_p, log_q))

        def total(a: Tensor, b: Tensor) -> Tensor:
            return self(a, b).sum()

        grad_p, grad_q = torch.func.grad(total, argnums=(0, 1))(log_p, log_q)
        return grad_p / log_p.exp(), grad_q / log_q.exp()


class FDivergence(Divergence):
    """D(p, q) = sum q f(p/q), f convex with f(1) = f'(1) = 0. A member writes `perspective`, no more.

    Mass where the other side has none, under an f that forbids it, makes D +inf; its gradient is then 0.
    Source: Csiszar, "Information-type measures of difference of probability distributions" (1967).
    """

    @abstractmethod
    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """g(p, q) = q f(p/q), elementwise and in standard form: g >= 0, zero with zero slope at p = q.

        One of the masses may be 0 (log -inf), never both; dtype is float32 or float64.
        """

    def __call__(self, log_p: Tensor, log_q: Tensor, dim: int = -1) -> Tensor:
        log_p, log_q = on_one_support(log_p, log_q, dim)
        no_p, no_q = log_p == -math.inf, log_q == -math.inf
        none, some = log_p.new_full((), -math.inf), log_p.new_zeros(())
        forbidden = (no_p & ~no_q & (self.perspective(none, some) == math.inf)) | (
            no_q & ~no_p & (self.perspective(some, none) == math.inf)
        )
        forbidden = forbidden.any(dim, keepdim=True)
        idle = (no_p & no_q) | forbidden  # both empty cost nothing: g(1, 1) = 0
        log_p, log_q = log_p.masked_fill(idle, 0.0), log_q.masked_fill(idle, 0.0)
        return self.perspective(log_p, log_q).sum(dim).masked_fill(forbidden.squeeze(dim), math.inf)

    # -- functions of the ratio u = p/q ---------------------------------------------------------------

    def f(self, log_ratio: Tensor) -> Tensor:
        """f(u): the unbiased value of D at a sample of q (Schulman's "k3", for every f)."""
        (log_ratio,) = in_working_precision(log_ratio)
        below, above = log_ratio.clamp(max=0.0), log_ratio.clamp(min=0.0)
        # For u > 1 the larger mass is set to 1, so that only a true overflow of f overflows.
        return torch.where(
            log_ratio > 0,
            above.exp() * self.perspective(torch.zeros_like(above), -above),
            self.perspective(below, torch.zeros_like(below)),
        )

    def potentials(self, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """(phi, psi) = (f'(u), f(u) - u f'(u)) = (dg/dp, dg/dq): also the f-GAN / NWJ critics.

        Continued linearly in the log-ratio beyond e^38 (float32) or e^300 (float64), never clamped.
        """
        return self.phi(log_ratio), self.psi(log_ratio)

    def phi(self, log_ratio: Tensor) -> Tensor:
        """phi = f'(u), the first variation in p."""
        (log_ratio,) = in_working_precision(log_ratio)
        ends = _ratio.ends(self)
        inside = torch.where(log_ratio == math.inf, ends.slope_at_infinity, _ratio.phi(self, log_ratio))
        return torch.where(log_ratio == -math.inf, ends.slope_at_zero, inside)

    def psi(self, log_ratio: Tensor) -> Tensor:
        """psi = f(u) - u f'(u), the first variation in q: the f-DPO score; -psi is the RL reward."""
        (log_ratio,) = in_working_precision(log_ratio)
        ends = _ratio.ends(self)
        inside = torch.where(log_ratio == -math.inf, ends.f_at_zero, _ratio.psi(self, log_ratio))
        return torch.where(log_ratio == math.inf, ends.psi_at_infinity, inside)

    def curvature(self, log_ratio: Tensor) -> Tensor:
        """u^2 f''(u) = -dpsi/dlog u: the weight of score distillation; 0 beside a kink."""
        (log_ratio,) = in_working_precision(log_ratio)
        return -derivative(self.psi, log_ratio)

    def first_variation(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_p, log_q = on_one_support(log_p, log_q)
        empty = (log_p == -math.inf) & (log_q == -math.inf)
        return self.potentials(torch.where(empty, 0.0, log_p - log_q))

    def inverse_slope(self, slope: Tensor) -> Tensor:
        """log of (f')^{-1}(slope): -inf where slope <= f'(0), nan where slope > f'(inf).

        Differentiable once; at a kink of f the ratio 1 is returned for the whole interval of slopes.
        """
        return _ratio.inverse_slope(self, *in_working_precision(slope))

    def conjugate(self, slope: Tensor) -> Tensor:
        """f*(y) = sup over u >= 0 of u y - f(u): -f(0) for y <= f'(0), +inf for y > f'(inf)."""
        return _ratio.conjugate(self, *in_working_precision(slope))

    # -- what the ends of f say about training -------------------------------------------------------

    @property
    def f_at_zero(self) -> float:
        """f(0): the price of a unit of q's mass where p has none. inf forbids it."""
        return _ratio.ends(self).f_at_zero

    @property
    def slope_at_infinity(self) -> float:
        """f'(inf): the price of a unit of p's mass where q has none. inf forbids it."""
        return _ratio.ends(self).slope_at_infinity

    @property
    def slope_at_zero(self) -> float:
        """f'(0). -inf keeps every atom in the support of an optimum; finite lets atoms drop out."""
        return _ratio.ends(self).slope_at_zero

    @property
    def curvature_at_one(self) -> float:
        """f''(1), the scale of the loss near p = q: D is about f''(1)/2 chi^2. inf at a kink (TV)."""
        return _ratio.ends(self).curvature_at_one

    @property
    def is_smooth(self) -> bool:
        """Whether f is differentiable at 1, which score distillation and normalisation need."""
        return math.isfinite(self.curvature_at_one)

    @property
    def bound(self) -> float:
        """sup D over probability vectors: f(0) + f'(inf), reached on disjoint supports."""
        return self.f_at_zero + self.slope_at_infinity

    @property
    def character(self) -> Character:
        """What an infinite price at either end makes the trained q do."""
        covers, seeks = math.isinf(self.slope_at_infinity), math.isinf(self.f_at_zero)
        if covers and seeks:
            return "covering and seeking"
        if covers:
            return "mode-covering"
        return "mode-seeking" if seeks else "bounded"

    # -- the convex cone -------------------------------------------------------------------------------

    @property
    def reverse(self) -> "FDivergence":
        """(p, q) -> D(q, p)."""
        return Reverse(self)

    def __rmul__(self, weight: float) -> "Sum":
        return Sum(((weight, self),))

    def __add__(self, other: "FDivergence") -> "Sum":
        if not isinstance(other, FDivergence):
            return NotImplemented
        return Sum((*_terms(self), *_terms(other)))


@dataclass(frozen=True)
class Reverse(FDivergence):
    """(p, q) -> D(q, p): the perspective with its arguments swapped."""

    divergence: FDivergence

    def __post_init__(self):
        require_f_divergence(self.divergence, "Reverse")

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.divergence.perspective(log_q, log_p)

    @property
    def reverse(self) -> FDivergence:
        return self.divergence


@dataclass(frozen=True)
class Sum(FDivergence):
    """sum of w D, w > 0, written `0.5 * KL() + 2 * TV()`: f-divergences form a convex cone."""

    terms: tuple[tuple[float, FDivergence], ...]

    def __post_init__(self):
        if not self.terms:
            raise ValueError("Sum needs at least one (weight, divergence) pair, got none")
        for weight, divergence in self.terms:
            require_f_divergence(divergence, "Sum")
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(
                    f"the weights of a Sum are finite and > 0, got {weight!r} for {divergence!r}; "
                    "leave a divergence out rather than give it weight 0"
                )

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        first, *others = (w * d.perspective(log_p, log_q) for w, d in self.terms)
        return sum(others, start=first)

    def __rmul__(self, weight: float) -> "Sum":
        return Sum(tuple((weight * w, d) for w, d in self.terms))


def on_one_support(log_p: Tensor, log_q: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Check that two log-densities can be compared, and bring them to one dtype and shape."""
    try:
        torch.broadcast_shapes(log_p.shape, log_q.shape)
        same = log_p.shape[dim] == log_q.shape[dim]
    except (RuntimeError, IndexError):
        same = False
    if not same:
        raise ValueError(
            f"log_p {tuple(log_p.shape)} and log_q {tuple(log_q.shape)} are not over one support in "
            f"dimension {dim}; slice padded vocabularies to their true size before the softmax"
        )
    return torch.broadcast_tensors(*in_working_precision(log_p, log_q))


def require_f_divergence(divergence: object, who: str) -> None:
    """Raise the TypeError that says what `who` needs."""
    if not isinstance(divergence, FDivergence):
        raise TypeError(
            f"{who} takes an f-divergence (KL(), JS(0.5), ...), got {divergence!r}; "
            "for a divergence between points use the estimator Exact with `.on(points)`"
        )


def _terms(divergence: FDivergence) -> tuple[tuple[float, FDivergence], ...]:
    return divergence.terms if isinstance(divergence, Sum) else ((1.0, divergence),)
