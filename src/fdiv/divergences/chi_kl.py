"""KL with a chi-square on top."""

import math
from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.divergences.chi_square import Pearson
from fdiv.divergences.kl import KL


@dataclass(frozen=True)
class ChiKL(FDivergence):
    """KL(p, q) + weight Pearson(p, q). chi-PO regularises with `ChiKL(0.5).reverse`: its p is the policy.

    Source: Huang et al., "Correcting the Mythos of KL-Regularization: Direct Alignment without
    Overoptimization via Chi-Squared Preference Optimization", arXiv 2407.13399.
    """

    weight: float = 0.5

    def __post_init__(self):
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"ChiKL(weight) needs a finite weight > 0, got {self.weight!r}; write KL() for 0"
            )

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        chi_square = Pearson().perspective(log_p, log_q)
        return KL().perspective(log_p, log_q) + self.weight * chi_square
