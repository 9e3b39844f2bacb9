"""f-DPO: direct preference optimisation under any f-divergence to the reference.

Wang, Jiang, Yang, Liu and Chen, "Beyond Reverse KL: Generalizing Direct Preference Optimization with
Diverse Divergence Constraints", arXiv 2309.16240.

    L = -log sigmoid( beta [ s(y_w) - s(y_l) ] ),   s(y) = f'(pi/ref)

The paper's f is of the ratio policy / reference; here p is the reference and q the policy, and its f' is
the divergence's psi, dD/dq. So ReverseKL() is DPO, KL() the paper's "forward KL", 2 * JS(0.5) its
"Jensen-Shannon" and Alpha(a) its alpha = a.

Other losses of the margin m = beta [s(y_w) - s(y_l)], with e = `label_smoothing`:

    hinge   relu(1 - m)
    ipo     (m / beta - 1 / (2 beta))^2; Azar et al., arXiv 2310.12036
    robust  [-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2e); Chowdhury et al., arXiv 2403.00409
    exo     KL of (sigmoid(m), sigmoid(-m)) from (1 - e, e); Ji et al., arXiv 2402.00856
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fdiv._divergence import FDivergence
from fdiv.divergences.kl import ReverseKL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.prefer._rewards import finite_scores, log_ratios, require_steep, reward_metrics

SUMS = ("log_p_chosen", "log_p_rejected", "log_q_chosen", "log_q_rejected")
LENGTHS = ("length_chosen", "length_rejected")
SMOOTHED = ("sigmoid", "robust", "exo")
LOSSES = (*SMOOTHED, "hinge", "ipo")


@dataclass(frozen=True)
class FDPO:
    """Preference loss on the scores psi(log ref - log policy) of whole responses.

    label_smoothing: the chance that a label is flipped, for "sigmoid" (which fits the flipped labels),
    "robust" (which undoes flips: its mean over them is "sigmoid" of true labels) and "exo" (which needs one).
    length_normalised: each score over its own response's tokens, before the difference. psi(1) = 0, so an
    answer that policy and reference find equally likely scores 0 at any length, and so does an empty one.
    A divergence is admissible if its price for leaving a response of the reference out is infinitely steep
    (f'(0) = -inf in the paper's ratio); otherwise optima are sparse and rewards cannot be read off them.
    """

    consumes: ClassVar[Consumes] = "pairs"

    divergence: FDivergence = field(default_factory=ReverseKL)
    beta: float = 0.1
    loss: Literal["sigmoid", "hinge", "ipo", "robust", "exo"] = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False

    def __post_init__(self):
        require_steep(self.divergence, "FDPO")
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is one of {', '.join(map(repr, LOSSES))}, got {self.loss!r}")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss not in SMOOTHED):
            raise ValueError(
                "label_smoothing is in [0, 0.5) and belongs to loss='sigmoid', 'robust' or 'exo', "
                f"got {self.label_smoothing!r} with {self.loss!r}"
            )
        if self.loss == "exo" and self.label_smoothing == 0:
            raise ValueError(
                "loss='exo' compares with labels that may be flipped and is infinite for certain ones; write "
                "label_smoothing=0.001 beside it"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        return SUMS + LENGTHS if self.length_normalised else SUMS

    def score(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The implicit reward over beta: psi(log p - log q) = f'(policy / reference)."""
        return self.divergence.psi(log_p - log_q)

    def __call__(
        self,
        *,
        log_p_chosen: Tensor,
        log_p_rejected: Tensor,
        log_q_chosen: Tensor,
        log_q_rejected: Tensor,
        length_chosen: Tensor | None = None,
        length_rejected: Tensor | None = None,
    ) -> Out:
        """Summed log-probabilities of whole responses, [pairs] each; p reference, q policy.

        length_*: their tokens, which `length_normalised` asks for, and nothing else.
        """
        log_ratio = log_ratios((log_p_chosen, log_p_rejected), (log_q_chosen, log_q_rejected))
        scores = finite_scores(self.divergence, log_ratio)
        scores = self._per_token(scores, length_chosen, length_rejected)
        loss = mean_over_tokens(self._loss(scores[0] - scores[1]))
        return Out(loss, reward_metrics(self.beta * scores, log_ratio))

    def _per_token(self, scores: Tensor, chosen: Tensor | None, rejected: Tensor | None) -> Tensor:
        if chosen is None or rejected is None:
            if self.length_normalised or chosen is not rejected:
                raise TypeError("length_normalised=True needs both length_chosen and length_rejected")
            return scores
        if not self.length_normalised:
            raise TypeError(f"{self!r} does not use lengths; write FDPO(length_normalised=True)")
        lengths = torch.stack([chosen, rejected]).to(scores.dtype)
        return torch.where(lengths > 0, scores / lengths.clamp(min=1), 0.0)

    def _loss(self, gap: Tensor) -> Tensor:
        """Of the difference of scores, [pairs]."""
        if self.loss == "ipo":
            return self._square(gap - 1 / (2 * self.beta))
        margin, flip = self.beta * gap, self.label_smoothing
        if self.loss == "hinge":
            return (1 - margin).relu()
        right, wrong = logsigmoid(margin), logsigmoid(-margin)
        if self.loss == "exo":
            return right.exp() * (right - math.log1p(-flip)) + wrong.exp() * (wrong - math.log(flip))
        if self.loss == "robust":
            return (flip * wrong - (1 - flip) * right) / (1 - 2 * flip)
        return -(1 - flip) * right - flip * wrong

    def _square(self, miss: Tensor) -> Tensor:
        """`miss` squared; the square of a score far beyond the range of exp has no number, and no slope."""
        largest = miss.detach().abs().max() if miss.numel() else miss.new_zeros(())
        if bool(largest > 1e-3 * torch.finfo(miss.dtype).max ** 0.5):
            raise ValueError(
                f"loss='ipo' would square a margin of {largest.item():.3g}, too large for {miss.dtype}: the "
                f"policy has left the reference too far for the scores of {self.divergence!r}; write "
                "loss='sigmoid', or a divergence with milder scores, such as ReverseKL()"
            )
        return miss.square()
