"""The Renyi divergence: a monotone transform of the alpha family, no f-divergence itself."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fdiv._divergence import Divergence, on_one_support
from fdiv.divergences.alpha import Alpha


@dataclass(frozen=True)
class Renyi(Divergence):
    """log(sum p^alpha q^(1-alpha)) / (alpha - 1) of normalised p and q; alpha > 0, KL at alpha = 1.

    Source: Renyi, "On measures of entropy and information" (1961).
    """

    alpha: float

    def __post_init__(self):
        if not 0 < self.alpha < math.inf:
            raise ValueError(
                f"Renyi(alpha) needs 0 < alpha < inf, got {self.alpha!r}; "
                "for alpha < 0 swap the arguments: Renyi(1 - alpha) of (q, p), scaled"
            )

    def __call__(self, log_p: Tensor, log_q: Tensor, dim: int = -1) -> Tensor:
        log_p, log_q = on_one_support(log_p, log_q, dim)
        a = self.alpha
        if a == 1.0:
            return Alpha(a)(log_p, log_q, dim)
        far = _log_power_sum(log_p, log_q, a, dim)
        small = far.abs() < 0.5  # then sum p^a q^(1-a) - 1 is taken to full accuracy, and only then
        power = Alpha(a)(torch.where(small.unsqueeze(dim), log_p, log_q), log_q, dim)
        return torch.where(small, (a * (a - 1) * power).log1p(), far) / (a - 1)

    def first_variation(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alpha
        if a == 1.0:
            return Alpha(1.0).first_variation(log_p, log_q)
        log_p, log_q = on_one_support(log_p, log_q)
        gap = torch.where((log_p == -math.inf) & (log_q == -math.inf), 0.0, log_p - log_q)
        log_sum = _log_power_sum(log_p, log_q, a, -1).unsqueeze(-1)
        return a / (a - 1) * ((a - 1) * gap - log_sum).exp(), -(a * gap - log_sum).exp()


def _log_power_sum(log_p: Tensor, log_q: Tensor, a: float, dim: int) -> Tensor:
    empty = (log_p == -math.inf) & (log_q == -math.inf)
    log_power = torch.where(empty, -math.inf, a * log_p + (1 - a) * torch.where(empty, 0.0, log_q))
    return log_power.logsumexp(dim)
