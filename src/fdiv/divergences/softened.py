"""The softened KL divergences: a KL taken from, or to, the midpoint of p and q."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import bregman_exp, log_mixture


@dataclass(frozen=True)
class SoftenedKL(FDivergence):
    """2 KL(m, q), m = (p + q)/2: mode-covering, with a finite price f(0) = 1 - log 2 on q's excess."""

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 2 * bregman_exp(log_q, log_mixture(log_p, log_q, 0.5))

    @property
    def reverse(self) -> "SoftenedReverseKL":
        return SoftenedReverseKL()


@dataclass(frozen=True)
class SoftenedReverseKL(FDivergence):
    """2 KL(m, p), m = (p + q)/2: mode-seeking, with a finite price 1 - log 2 on missing p."""

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 2 * bregman_exp(log_p, log_mixture(log_p, log_q, 0.5))

    @property
    def reverse(self) -> SoftenedKL:
        return SoftenedKL()
