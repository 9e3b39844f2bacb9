"""APO (View-R1): right answers to hard questions are held less to the reference, long wrong ones lose more.

Hong, Guo, Xia, Wang, Zhang, Jin and Zhao, "APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy
Optimization", arXiv 2506.21655.

    L = GRPO's clipped loss + beta mean over answers of w(d) mean over tokens of D(ref, pi)
    w(d) = 1 - exp(-e (1 - d)) where the advantage is positive (DADS), else 1;  d = 1 - pass rate of the group
    A -> A (2 - 1.00001^-(L - mean L of right answers)) for wrong answers longer than that mean (STCR)

Not Anchored Preference Optimization, which is called APO too. p is the reference, q the policy pi; the
paper's divergence is ReverseKL(), of which it differentiates the k3 estimate, whose gradient is another one.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import ReverseKL
from fdiv.estimate import _far
from fdiv.estimate.monte_carlo import MonteCarlo
from fdiv.estimate.tokens import per_token
from fdiv.methods._method import Consumes, Out, blank, mean_over_tokens
from fdiv.methods.rl._groups import advantage_within, check_correct, group_mean
from fdiv.methods.rl.clipping import (
    Aggregate,
    Clip,
    aggregated,
    check_aggregate,
    check_clip,
    clipped_gain,
    log_importance,
)


@dataclass(frozen=True)
class APO:
    """GRPO whose penalty is weighted by how hard the question is, and whose wrong answers pay for length.

    sharpness: the e in w(d); None is w = 1. length_rate: the 0.00001 of STCR, a token; 0 turns it off.
    The penalty is the mean of w f(u) over the policy's own answers; its gradient, on-policy, is that of this
    mean with the pass rates held fixed: a weight that depends on how an answer ends is felt by all of its
    tokens, and not by those of the group's other answers. aggregate: see clipping.py; the authors' is
    "sequences".
    """

    consumes: ClassVar[Consumes] = "rollouts"
    unit: ClassVar[str] = "group"
    reads: ClassVar[tuple[str, ...]] = ("reward", "correct", "group", "log_p", "log_q", "sequences")

    divergence: FDivergence = field(default_factory=ReverseKL)
    beta: float = 1e-3
    clip: Clip = 0.2
    sharpness: float | None = math.e
    length_rate: float = 1e-5
    aggregate: Aggregate = "sequences"

    def __post_init__(self):
        require_f_divergence(self.divergence, "APO")
        check_clip(self.clip)
        check_aggregate(self.aggregate)
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta!r}; without a penalty write GRPO(beta=0.0)")
        if self.sharpness is not None and not 0 < self.sharpness < math.inf:
            raise ValueError(f"sharpness is a number > 0, got {self.sharpness!r}; None is for weights of 1")
        if not 0 <= self.length_rate < math.inf:
            raise ValueError(f"length_rate must be >= 0, got {self.length_rate!r}; 0 turns it off")

    def __call__(
        self,
        *,
        log_policy: Tensor,
        log_behaviour: Tensor,
        mask: Tensor,
        count: Tensor | float | None = None,
        sequences: Tensor | float | None = None,
        reward: Tensor,
        correct: Tensor,
        group: Tensor,
        log_p: Tensor,
        log_q: Tensor,
    ) -> Out:
        """Tensors [B, T] of the sampled tokens; reward, correct and group [B], the groups whole.

        count, sequences: those of the global batch (default: here).
        """
        check_correct(correct)
        plain = advantage_within(reward.detach(), group)
        advantage = plain * self.length_factor(mask.sum(-1), correct, group).to(plain)
        weight = self.weight(plain, correct, group)
        log_ratio = log_importance(log_policy, log_behaviour, mask)
        gain = clipped_gain(log_ratio, advantage.unsqueeze(-1), self.clip)
        penalty, value = self._penalty((log_p, log_q, log_behaviour), log_policy, mask)
        rows = self.beta * weight.unsqueeze(-1) * penalty - gain.gain
        metrics = {
            "ratio": mean_over_tokens(gain.ratio, mask),
            "clipped": mean_over_tokens(gain.clipped, mask),
            "divergence": mean_over_tokens(value, mask),
            "weight": weight.mean(),
        }
        return Out(aggregated(rows, mask, self.aggregate, count, sequences), metrics)

    def weight(self, advantage: Tensor, correct: Tensor, group: Tensor) -> Tensor:
        """DADS: what the penalty of each answer is multiplied by, [B]; advantage, correct and group [B]."""
        if self.sharpness is None:
            return torch.ones_like(advantage)
        rate = group_mean(correct.to(advantage.dtype), group)
        shaped = (advantage > 0) & (rate > 0) & (rate < 1)
        return torch.where(shaped, -torch.expm1(-self.sharpness * rate), 1.0)

    def length_factor(self, length: Tensor, correct: Tensor, group: Tensor) -> Tensor:
        """STCR: what the advantage of each answer is multiplied by, [B]; length, correct and group [B]."""
        length, right = length.double(), correct.double()
        rate = group_mean(right, group)
        usual = group_mean(right * length, group) / torch.where(rate > 0, rate, 1.0)
        excess = torch.where(~correct & (rate > 0), length - usual, 0.0).relu()
        return 1 - torch.expm1(-excess * math.log1p(self.length_rate))

    def _penalty(
        self, evidence: tuple[Tensor, ...], log_policy: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(a tensor with the values f(u) and, in every token's gradient, the whole answer's), the values."""
        estimator = MonteCarlo("behaviour")
        own, value = per_token(estimator, self.divergence, evidence, log_policy, mask, future=False)
        others = value.sum(-1, keepdim=True) - value
        return own + others * _far.moving(blank(log_policy, mask)), value
