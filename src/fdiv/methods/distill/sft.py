"""SFT: maximum likelihood on text, the baseline that every distillation is compared with.

-log q(y|x) averaged over tokens: KL from the one-hot labels, which is all that a teacher's *samples* tell.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens


@dataclass(frozen=True)
class SFT:
    """Mean negative log-likelihood of the response tokens; its divergence is KL by definition."""

    consumes: ClassVar[Consumes] = "tokens"

    divergence: Divergence = field(default_factory=KL)

    def __post_init__(self):
        if self.divergence != KL():
            raise TypeError(
                f"SFT is KL(labels, model), got {self.divergence!r}: under another divergence a one-hot "
                "label needs the whole vocabulary, write GKD(divergence=...) with a teacher"
            )

    def __call__(
        self, *, log_q: Tensor, mask: Tensor | None = None, count: Tensor | float | None = None
    ) -> Out:
        """log_q: the model's log-probability of each label, [rows]."""
        return Out(mean_over_tokens(-log_q, mask, count), {})
