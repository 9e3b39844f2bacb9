"""The generalised Jensen-Shannon divergence."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import mixture_gap


@dataclass(frozen=True)
class JS(FDivergence):
    """beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q: bounded by the entropy of beta.

    JS(0.5) <= log 2. f-DPO, f-DPG and f-GAN write 2 JS(0.5): say `2 * JS(0.5)` for their scale.
    Source: Lin, "Divergence measures based on the Shannon entropy" (1991); with this beta, Agarwal et
    al., "On-Policy Distillation of Language Models" (GKD), arXiv 2306.13649.
    """

    beta: float = 0.5

    def __post_init__(self):
        if not 0 < self.beta < 1:
            raise ValueError(
                f"JS(beta) needs 0 < beta < 1, got {self.beta!r}: at 0 and 1 the formula is identically 0, "
                "not a KL. Write KL() for the limit of JS/beta at 0, ReverseKL() for JS/(1-beta) at 1"
            )

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return mixture_gap(log_p, log_q, self.beta)

    @property
    def reverse(self) -> "JS":
        return JS(1 - self.beta)
