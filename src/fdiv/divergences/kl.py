"""The two Kullback-Leibler divergences."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import bregman_exp


@dataclass(frozen=True)
class KL(FDivergence):
    """sum p log(p/q): mode-covering; maximum likelihood, "forward KL" in distillation and RLHF.

    Source: Kullback and Leibler, "On information and sufficiency" (1951).
    """

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return bregman_exp(log_q, log_p)

    @property
    def reverse(self) -> "ReverseKL":
        return ReverseKL()

    def closed_inverse_slope(self, slope: Tensor) -> Tensor:
        return slope


@dataclass(frozen=True)
class ReverseKL(FDivergence):
    """sum q log(q/p): mode-seeking; the regulariser of RLHF and DPO.

    Source: Kullback and Leibler, "On information and sufficiency" (1951).
    """

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return bregman_exp(log_p, log_q)

    @property
    def reverse(self) -> KL:
        return KL()

    def closed_inverse_slope(self, slope: Tensor) -> Tensor:
        return -(-slope).log1p()
