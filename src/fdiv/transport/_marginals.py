"""What a plan pays where it misses a marginal: it keeps it exactly, or the price is any f-divergence.

Everything is per unit of the marginal's mass and in units of eps: F = f/eps, and u = e^x is the ratio of the
plan's marginal to a. An optimum has f = -phi'(u); an atom then adds phi(u)/eps + u F to the dual value.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import KL
from fdiv.divergences.tv import TV
from fdiv.operators._solver import _phi_and_rise
from fdiv.operators.worst_case import weighted

STEPS, FEW = 200, 4
AT_A_KINK = 1e-30
NEAR = 1e-3


class Marginal(Protocol):
    """One side of the plan. Shapes [problems, atoms], eps [problems, 1]."""

    @property
    def suits_newton(self) -> bool: ...

    @property
    def is_smooth(self) -> bool:
        """Whether x is a function of F, as implicit derivatives need."""
        ...

    def potential(self, exact: Tensor, eps: Tensor, guess: Tensor | None = None) -> Tensor:
        """F, from that of an exact marginal; x is then F - exact. `guess`: of x."""
        ...

    def log_ratio(self, potential: Tensor, eps: Tensor, actual: Tensor) -> Tensor:
        """x, from F and, where that does not tell it, from the ratio that the plan has."""
        ...

    def allowed(self, potential: Tensor, eps: Tensor) -> Tensor:
        """The nearest F for which there is an x."""
        ...

    def slack(self, log_ratio: Tensor, eps: Tensor) -> Tensor:
        """-dx/dF: how far the marginal gives way."""
        ...

    def gain(self, potential: Tensor, log_ratio: Tensor, eps: Tensor) -> Tensor:
        """What an atom of unit mass adds to the dual value: -phi*(-f)/eps."""
        ...


@dataclass(frozen=True)
class Exact:
    """The marginal is kept."""

    suits_newton = is_smooth = True

    def potential(self, exact: Tensor, eps: Tensor, guess: Tensor | None = None) -> Tensor:
        return exact

    def log_ratio(self, potential: Tensor, eps: Tensor, actual: Tensor) -> Tensor:
        return torch.zeros_like(potential)

    def allowed(self, potential: Tensor, eps: Tensor) -> Tensor:
        return potential

    def slack(self, log_ratio: Tensor, eps: Tensor) -> Tensor:
        return torch.zeros_like(log_ratio)

    def gain(self, potential: Tensor, log_ratio: Tensor, eps: Tensor) -> Tensor:
        return potential


@dataclass(frozen=True)
class ByKL:
    """rho KL(plan's marginal, a)."""

    rho: float
    suits_newton = is_smooth = True

    def potential(self, exact: Tensor, eps: Tensor, guess: Tensor | None = None) -> Tensor:
        return exact * (self.rho / (self.rho + eps))

    def log_ratio(self, potential: Tensor, eps: Tensor, actual: Tensor) -> Tensor:
        return -potential * (eps / self.rho)

    def allowed(self, potential: Tensor, eps: Tensor) -> Tensor:
        return potential

    def slack(self, log_ratio: Tensor, eps: Tensor) -> Tensor:
        return (eps / self.rho).expand_as(log_ratio)

    def gain(self, potential: Tensor, log_ratio: Tensor, eps: Tensor) -> Tensor:
        return -(self.rho / eps) * torch.expm1(-potential * (eps / self.rho))


@dataclass(frozen=True)
class ByTV:
    """rho TV(plan's marginal, a), where TV is half the sum of |u - 1|: f stays within rho / 2 of 0."""

    rho: float
    suits_newton, is_smooth = True, False

    def potential(self, exact: Tensor, eps: Tensor, guess: Tensor | None = None) -> Tensor:
        return self.allowed(exact, eps)

    def log_ratio(self, potential: Tensor, eps: Tensor, actual: Tensor) -> Tensor:
        """At a bound the marginal may miss, by whatever it does; elsewhere it is kept."""
        most = self.rho / 2 / eps
        gives = ((potential >= most) & (actual < 0)) | ((potential <= -most) & (actual > 0))
        return torch.where(gives, actual, 0.0)

    def allowed(self, potential: Tensor, eps: Tensor) -> Tensor:
        most = (self.rho / 2 / eps).expand_as(potential)
        return torch.minimum(torch.maximum(potential, -most), most)

    def slack(self, log_ratio: Tensor, eps: Tensor) -> Tensor:
        return torch.where(log_ratio == 0, 0.0, math.inf).to(log_ratio)

    def gain(self, potential: Tensor, log_ratio: Tensor, eps: Tensor) -> Tensor:
        return potential  # phi*(y) = y for |y| <= rho / 2


@dataclass(frozen=True)
class By:
    """Any f-divergence D(plan's marginal, a)."""

    divergence: FDivergence

    @property
    def suits_newton(self) -> bool:
        return self.is_smooth

    @property
    def is_smooth(self) -> bool:
        return self.divergence.is_smooth

    def potential(self, exact: Tensor, eps: Tensor, guess: Tensor | None = None) -> Tensor:
        """exact + x, with phi'(e^x)/eps + x + exact = 0: rising in x, and x of the sign of -exact."""
        low, high = (-exact).clamp(max=0.0), (-exact).clamp(min=0.0)
        at_one = self._is_kept(exact, eps)
        x = torch.where(low < 0, low.clamp(min=-1.0), high.clamp(max=1.0)) if guess is None else guess
        x = torch.minimum(torch.maximum(x, low), high)
        # Steps are quadratic: from `near` the next is exact, or good enough in an iteration that goes on.
        near = torch.finfo(exact.dtype).eps ** 0.6 if guess is None else NEAR
        for _ in range(STEPS):
            value, rise = _phi_and_rise(self.divergence, x)
            value, rise = value / eps + x + exact, rise / eps + 1
            low, high = torch.where(value < 0, x, low), torch.where(value > 0, x, high)
            step = x - value / rise
            step = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
            step, off = torch.where(at_one, 0.0, step), (step - x).abs() / (1 + x.abs())
            x = step
            if bool((at_one | (off <= near)).all()):
                break
        return exact + x

    def _is_kept(self, exact: Tensor, eps: Tensor) -> Tensor:
        """Whether a kink of phi holds the marginal where it is."""
        if self.is_smooth:
            return torch.zeros_like(exact, dtype=torch.bool)
        at_one = torch.full_like(exact, AT_A_KINK)
        below, above = (self.divergence.phi(x) / eps + exact for x in (-at_one, at_one))
        return (below <= 0) & (above >= 0)

    def log_ratio(self, potential: Tensor, eps: Tensor, actual: Tensor) -> Tensor:
        """By Newton's method from `actual`, which near an optimum is all but right. Differentiable once."""
        slope = -potential * eps
        x = actual.detach().nan_to_num(0.0, 0.0, 0.0)
        for _ in range(FEW):
            value, rise = _phi_and_rise(self.divergence, x)
            step = (slope.detach() - value) / rise
            x = x + step
            if bool((step.abs() <= 1e-6 * (1 + x.abs())).all()):
                return x + (slope - slope.detach()) / rise
        return self.divergence.inverse_slope(slope)

    def allowed(self, potential: Tensor, eps: Tensor) -> Tensor:
        return potential

    def slack(self, log_ratio: Tensor, eps: Tensor) -> Tensor:
        return eps / _phi_and_rise(self.divergence, log_ratio)[1]

    def gain(self, potential: Tensor, log_ratio: Tensor, eps: Tensor) -> Tensor:
        return self.divergence.f(log_ratio) / eps + log_ratio.exp() * potential


def marginal_of(penalty: FDivergence | str) -> Marginal:
    """The side for "balanced" or an f-divergence such as 2.0 * KL(), whose weight is rho."""
    if penalty == "balanced":
        return Exact()
    if isinstance(penalty, str):
        raise ValueError(f'a marginal is "balanced" or an f-divergence such as 2.0 * KL(), got {penalty!r}')
    require_f_divergence(penalty, "a marginal")
    rho, member = weighted(1.0, penalty)
    if member == KL():
        return ByKL(rho)
    return ByTV(rho) if member == TV() else By(penalty)
