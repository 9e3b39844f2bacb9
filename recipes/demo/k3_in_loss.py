"""A known mistake, kept as a plugin so that the demo can show what it does.

k3 = u - 1 - log u is an unbiased estimate of reverse KL at samples of the policy. Differentiated there, with
the samples held fixed, its expected gradient is that of *forward* KL. fdiv's own estimators refuse to do so.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fdiv import FDivergence, Guarantee


@dataclass(frozen=True)
class K3InLoss:
    """f(u) at samples of q, differentiated as if the samples did not move with q."""

    sees: ClassVar[str] = "log_probs"
    evidence = ("log_p", "log_q")
    guarantee = Guarantee("none in the value; the gradient is wrong", "unbiased", "samples of q")

    def check(self, divergence: object) -> None:
        if not isinstance(divergence, FDivergence):
            raise TypeError(f"K3InLoss takes an f-divergence, got {divergence!r}")

    def __call__(self, divergence: FDivergence, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.f(log_p - log_q)
