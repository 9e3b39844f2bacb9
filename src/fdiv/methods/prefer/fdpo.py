"""f-DPO: direct preference optimisation under any f-divergence to the reference.

Wang, Jiang, Yang, Liu and Chen, "Beyond Reverse KL: Generalizing Direct Preference Optimization with
Diverse Divergence Constraints", arXiv 2309.16240.

    L = -log sigmoid( beta [ s(y_w) - s(y_l) ] ),   s(y) = f'(pi/ref)

The paper's f is of the ratio policy / reference; here p is the reference and q the policy, and its f' is
the divergence's psi, dD/dq. So ReverseKL() is DPO, KL() the paper's "forward KL", 2 * JS(0.5) its
"Jensen-Shannon" and Alpha(a) its alpha = a.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import ratio_cap
from fdiv.divergences.kl import ReverseKL
from fdiv.methods._method import Consumes, Out


@dataclass(frozen=True)
class FDPO:
    """Preference loss on the scores psi(log ref - log policy) of whole responses.

    loss: "sigmoid" (Bradley-Terry, with `label_smoothing` the chance that a label is flipped), "hinge", or
    "ipo", whose optimum is the margin 1 / (2 beta).
    A divergence is admissible if its price for leaving a response of the reference out is infinitely steep
    (f'(0) = -inf in the paper's ratio); otherwise optima are sparse and rewards cannot be read off them.
    """

    consumes: ClassVar[Consumes] = "pairs"

    divergence: FDivergence = field(default_factory=ReverseKL)
    beta: float = 0.1
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self):
        require_f_divergence(self.divergence, "FDPO")
        slope = self.divergence.reverse.slope_at_zero
        if slope != -math.inf:
            raise TypeError(
                f"FDPO cannot use {self.divergence!r}: its score is bounded below by {slope:.4g} as the "
                "policy leaves a response, so optima drop responses and no reward can be recovered. Add "
                f"some ReverseKL(), as {self.divergence!r} + 0.1 * ReverseKL()"
            )
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta!r}")
        if self.loss not in ("sigmoid", "hinge", "ipo"):
            raise ValueError(f"loss is 'sigmoid', 'hinge' or 'ipo', got {self.loss!r}")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss != "sigmoid"):
            raise ValueError(
                f"label_smoothing is in [0, 0.5) and belongs to loss='sigmoid', got {self.label_smoothing!r} "
                f"with {self.loss!r}"
            )

    def score(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The implicit reward over beta: psi(log p - log q) = f'(policy / reference)."""
        return self.divergence.psi(log_p - log_q)

    def __call__(
        self, *, log_p_chosen: Tensor, log_p_rejected: Tensor, log_q_chosen: Tensor, log_q_rejected: Tensor
    ) -> Out:
        """Summed log-probabilities of whole responses, [pairs] each; p reference, q policy."""
        log_p = torch.stack([log_p_chosen, log_p_rejected]).detach()
        log_q = torch.stack([log_q_chosen, log_q_rejected])
        chosen, rejected = self.score(log_p, log_q)
        margin = self.beta * (chosen - rejected)
        with torch.no_grad():
            ratios = log_q - log_p
            metrics = {
                "reward_chosen": self.beta * chosen.mean(),  # the reward that is optimised,
                "reward_rejected": self.beta * rejected.mean(),
                "accuracy": (margin > 0).float().mean(),
                "margin": margin.mean(),
                "log_ratio_chosen": ratios[0].mean(),  # and the plain log-ratio beside it
                "log_ratio_rejected": ratios[1].mean(),
                "linearised": (ratios.abs() > ratio_cap(ratios.dtype)).float().mean(),
            }
        return Out(self._loss(margin).mean(), {k: v.detach() for k, v in metrics.items()})

    def _loss(self, margin: Tensor) -> Tensor:
        if self.loss == "hinge":
            return (1 - margin).relu()
        if self.loss == "ipo":
            return (margin / self.beta - 1 / (2 * self.beta)).square()
        return -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)
