"""TDPO: direct preference optimisation with a divergence at every token.

Zeng, Liu, Ma, Yang, Zhang and Wang, "Token-level Direct Preference Optimization", arXiv 2404.11999.

    L = -log sigmoid( beta [ (l_w - l_l) - alpha (D_l - sg(D_w)) ] )

l is the log-ratio policy / reference of a whole response, D the sum over its tokens of the divergence of the
next token, and sg stops the gradient. The paper's D is KL(reference, policy), here KL(), as p is the
reference; its beta and alpha are `beta` and `alpha`. Its TDPO2 is the default, its TDPO1 has alpha = 1 and no
sg.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.fused_linear import FusedLinear
from fdiv.methods._method import Consumes, Out
from fdiv.methods.prefer._responses import (
    check_estimator,
    log_ratios,
    preference_loss,
    preference_metrics,
    token_divergences,
    totals,
)


@dataclass(frozen=True)
class TDPO:
    """Preference loss on log-ratios, less `alpha` times the divergence that they cost.

    alpha: weight of the divergences; 0 is DPO, whatever the divergence.
    stop_gradient: whether that of the chosen response is a constant. If it is not, the loss raises it.
    TDPO() is the paper's TDPO2, TDPO(alpha=1.0, stop_gradient=False) its TDPO1.
    """

    consumes: ClassVar[Consumes] = "pairs"
    reads: ClassVar[tuple[str, ...]] = ("log_p_label", "log_q_label", "sequence", "pairs", "pairs_in_batch")

    divergence: Divergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=FusedLinear)
    beta: float = 0.1
    alpha: float = 0.5
    stop_gradient: bool = True

    def __post_init__(self):
        check_estimator(self.divergence, self.estimator, "TDPO")
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta!r}")
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {self.alpha!r}; 0 is DPO")

    def __call__(
        self,
        *,
        log_p_label: Tensor,
        log_q_label: Tensor,
        sequence: Tensor,
        pairs: int,
        pairs_in_batch: Tensor | float | None = None,
        **evidence: Tensor,
    ) -> Out:
        """Reference's and policy's log-probability of each response token, and the response's number; [R].

        Responses 0 .. pairs - 1 are the chosen ones, pairs .. 2 pairs - 1 the rejected. `evidence`: what
        `estimator.evidence` names, at the same tokens. pairs_in_batch: of the global batch (default: here).
        """
        ratio = totals(log_ratios(log_p_label, log_q_label), sequence, 2 * pairs)
        tokens = token_divergences(self.divergence, self.estimator, evidence)
        spent = totals(tokens, sequence, 2 * pairs)
        of_chosen = spent[:pairs].detach() if self.stop_gradient else spent[:pairs]
        reward = self.beta * (ratio + self.alpha * torch.cat([of_chosen, spent[pairs:]]))
        margin = reward[:pairs] - reward[pairs:]
        metrics = preference_metrics(margin, reward=reward, log_ratio=ratio, divergence=spent)
        return Out(preference_loss(margin, pairs_in_batch), metrics)
