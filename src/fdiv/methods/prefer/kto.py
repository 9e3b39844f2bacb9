"""KTO: answers are liked or disliked by themselves, against what the policy says on average.

Ethayarajh, Xu, Muennighoff, Jurafsky and Kiela, "KTO: Model Alignment as Prospect Theoretic Optimization",
arXiv 2402.01306.

    desirable    lambda_D [ 1 - sigmoid( beta (l - z0) ) ],   l = log(pi/ref)
    undesirable  lambda_U [ 1 - sigmoid( beta (z0 - l) ) ],   z0 = max(0, mean of l at mismatched answers)

beta is the paper's, lambda_D and lambda_U are `desirable` and `undesirable`. z0 stands for KL(pi, ref), the
policy's own mean of l, without gradient: answers are put behind prompts of other rows.

Another divergence than ReverseKL() is fdiv's own, not the paper's: the reward beta l becomes beta psi, at
every place. KTO compares a reward with the policy's mean reward, in which the prompt's unknown constant
cancels; so z0 is the mean of psi at mismatched answers, not an estimate of the divergence itself, and 0, the
reward psi(1) of the reference's own choice, is the least it can be.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import in_working_precision
from fdiv.divergences.kl import ReverseKL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.prefer._rewards import log_ratios, require_steep, reward_metrics
from fdiv.methods.prefer.fdpo import SUMS


@dataclass(frozen=True)
class KTO:
    """Saturating losses on both answers of a pair: the chosen one is desirable, the rejected one is not.

    desirable, undesirable: their weights. The loss is the mean over answers, two a pair.
    """

    consumes: ClassVar[Consumes] = "pairs"
    reads: ClassVar[tuple[str, ...]] = (*SUMS, "log_ratio_mismatched")

    divergence: FDivergence = field(default_factory=ReverseKL)
    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0

    def __post_init__(self):
        require_steep(self.divergence, "KTO")
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta!r}")
        if min(self.desirable, self.undesirable) < 0 or not self.desirable + self.undesirable > 0:
            raise ValueError(
                "desirable and undesirable are weights >= 0, not both 0, "
                f"got {self.desirable!r} and {self.undesirable!r}"
            )

    def __call__(
        self,
        *,
        log_p_chosen: Tensor,
        log_p_rejected: Tensor,
        log_q_chosen: Tensor,
        log_q_rejected: Tensor,
        log_ratio_mismatched: Tensor,
    ) -> Out:
        """Summed log-probabilities of whole responses, [pairs] each; p reference, q policy.

        log_ratio_mismatched: log q - log p, [pairs of the global batch], which may be other pairs than these.
        """
        log_ratio = log_ratios((log_p_chosen, log_p_rejected), (log_q_chosen, log_q_rejected))
        rewards = self.beta * self.divergence.psi(log_ratio)
        reference_point = self.beta * self.mean_score(log_ratio_mismatched).to(rewards)
        liked = self.desirable * torch.sigmoid(reference_point - rewards[0])  # 1 - sigmoid(x) = sigmoid(-x)
        disliked = self.undesirable * torch.sigmoid(rewards[1] - reference_point)
        metrics = reward_metrics(rewards, log_ratio) | {"reference_point": reference_point}
        return Out(mean_over_tokens((liked + disliked) / 2), metrics)

    def mean_score(self, log_ratio_mismatched: Tensor) -> Tensor:
        """z0: the mean of psi at mismatched answers, at least 0; no gradient."""
        (log_ratio,) = in_working_precision(log_ratio_mismatched.detach())
        if not log_ratio.numel() or bool(log_ratio.isinf().any()):
            raise ValueError(
                f"KTO's reference point is a mean over mismatched answers, got {log_ratio.numel()} of them, "
                f"{int(log_ratio.isinf().sum())} with an infinite log-ratio; give at least one, from models "
                "that can write every answer after every prompt"
            )
        return self.divergence.psi(-log_ratio).mean().clamp(min=0)
