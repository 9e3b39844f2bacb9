"""Gradient ascent: the plainest unlearning, and what it is usually kept from collapse with.

As Zhang, Lin, Bai and Mei, "Negative Preference Optimization: From Catastrophic Collapse to Effective
Unlearning", arXiv 2404.05868, have it as a baseline.

    L = mean over answers to be forgotten of log q(y|x)  -  retain * mean over retained text of log q(token)

With retain > 0 it is often called GradDiff. The loss has no lower bound.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_sequences

RETAINED = ("log_q_retain_label", "retain_sequence")


@dataclass(frozen=True)
class GradientAscent:
    """Ascends KL(answers to be forgotten, q), the cross-entropy of the pair's rejected answer.

    per_token: divide each answer's log-probability by its length, as the mean cross-entropy of libraries.
    retain: weight of the cross-entropy of text that is not to be forgotten; 0 reads none.
    """

    consumes: ClassVar[Consumes] = "pairs"
    divergence: ClassVar[FDivergence] = KL()

    per_token: bool = False
    retain: float = 0.0

    def __post_init__(self):
        check_retain(self.retain)

    @property
    def reads(self) -> tuple[str, ...]:
        length = ("length_rejected",) if self.per_token else ()
        return ("log_q_rejected", *length, *(RETAINED if self.retain else ()))

    def __call__(
        self,
        *,
        log_q_rejected: Tensor,
        length_rejected: Tensor | None = None,
        log_q_retain_label: Tensor | None = None,
        retain_sequence: Tensor | None = None,
    ) -> Out:
        """log_q_rejected [pairs] of whole answers, length_rejected their tokens; the retained text's [R]."""
        likelihood = log_q_rejected
        if self.per_token:
            if length_rejected is None:
                raise TypeError("per_token=True divides by the tokens of each answer: give length_rejected")
            likelihood = likelihood / length_rejected.clamp(min=1)
        metrics = {"log_q_forget": log_q_rejected.detach().mean()}
        out = Out(likelihood.mean(), metrics)
        return with_retained(out, self.retain, log_q_retain_label, retain_sequence)


def check_retain(weight: float) -> None:
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"retain is a finite weight >= 0, got {weight!r}: a negative one forgets all")


def with_retained(out: Out, weight: float, log_q_label: Tensor | None, sequence: Tensor | None) -> Out:
    """And `weight` times the cross-entropy of retained text: each one's mean over tokens, averaged."""
    if not weight:
        return out
    if log_q_label is None or sequence is None:
        raise TypeError(f"retain={weight!r} reads {' and '.join(RETAINED)}; write retain=0 to go without")
    kept = mean_over_sequences(-log_q_label, sequence)
    return Out(out.loss + weight * kept, out.metrics | {"retain_nll": kept.detach()})
