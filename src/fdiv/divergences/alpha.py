"""The alpha (Cressie-Read, power) family, under the names of its several conventions."""

import math
from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import bregman_exp


@dataclass(frozen=True)
class Alpha(FDivergence):
    """(sum p^alpha q^(1-alpha) - 1) / (alpha (alpha - 1)); `alpha` is the exponent of p, any real.

    1 is KL and 0 ReverseKL, exactly; 1/2 is 4 SquaredHellinger, 2 half of Pearson, -1 half of Neyman.
    Covers modes for alpha >= 1, seeks them for alpha <= 0, is bounded between.
    Other conventions: `Alpha.amari`, `Alpha.cressie_read`, `Alpha.fdpo`, `Alpha.trl`.
    Source: Cressie and Read, "Multinomial goodness-of-fit tests" (1984).
    """

    alpha: float

    def __post_init__(self):
        if not math.isfinite(self.alpha):
            raise ValueError(f"Alpha(alpha) needs a finite exponent, got {self.alpha!r}")

    @classmethod
    def amari(cls, alpha: float) -> "Alpha":
        """Amari's alpha, with -1 for KL(p, q) and +1 for KL(q, p); some authors use the other sign."""
        return cls((1 - alpha) / 2)

    @classmethod
    def cressie_read(cls, power: float) -> "Alpha":
        """Cressie and Read's lambda: 0 is KL(p, q), -1 is KL(q, p), 1 is half of Pearson."""
        return cls(power + 1)

    @classmethod
    def fdpo(cls, alpha: float) -> "Alpha":
        """The f-DPO paper's alpha (arXiv 2309.16240): 0 is KL(policy, reference), 1 the other way."""
        return cls(alpha)

    @classmethod
    def trl(cls, coefficient: float) -> "Alpha":
        """TRL >= 0.29 `f_alpha_divergence_coef`: mirrored, 1 is KL(policy, reference)."""
        return cls(1 - coefficient)

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a = self.alpha
        if a == 0.0:
            return bregman_exp(log_p, log_q)
        if a == 1.0:
            return bregman_exp(log_q, log_p)
        gap = log_p - log_q
        log_power = a * log_p + (1 - a) * log_q  # log p^a q^(1-a)
        # log p, log q and log_power lie on a line: exp of the middle one is under the chord of the others,
        # and the two tangents there, each >= 0, say by how much. No digits are lost near p = q or either KL.
        if a > 1:
            tangents = bregman_exp(log_power, log_p, (a - 1) * gap) / (a - 1)
            return (tangents + bregman_exp(log_q, log_p, -gap)) / a
        if a < 0:
            tangents = bregman_exp(log_power, log_q, a * gap) / -a
            return (tangents + bregman_exp(log_p, log_q, gap)) / (1 - a)
        tangents = bregman_exp(log_p, log_power, (1 - a) * gap) / (1 - a)
        return tangents + bregman_exp(log_q, log_power, -a * gap) / a

    @property
    def reverse(self) -> "Alpha":
        return Alpha(1 - self.alpha)

    def closed_rise(self, log_ratio: Tensor) -> Tensor:
        return ((self.alpha - 1) * log_ratio).exp()

    def closed_inverse_slope(self, slope: Tensor) -> Tensor:
        power = self.alpha - 1
        return (power * slope).log1p() / power if power else slope
