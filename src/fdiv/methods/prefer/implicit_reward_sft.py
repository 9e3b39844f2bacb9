"""f-SFT: likelihood training as the learning of an implicit reward, under any f-divergence.

Wang, Cheng, Peng, Bao, Li, Guo, Li, Zeng, Zhou and Qiu, "Implicit Reward as the Bridge: A Unified View of SFT
and DPO Connections", arXiv 2507.00018.
Reconstructed: the losses below are derived here from the paper's claims, not read in it.

    max over r, min over q of  E_p[phi(r)] - E_q[r] + beta KL(q, ref),   phi(r) = -f*(-r),  f of q/p

learns the reward r under which q imitates the demonstrations p in D(p, q). The inner optimum has r = beta
log(q/ref) + V, which leaves

    L = - E_p phi(beta log(q/ref) + V) / beta,   dL = - E_p phi'(r) d log q,   phi'(r) = (f')^{-1}(-r)

V, one number a prompt, cannot be told from demonstrations, and is 0. f of q/p is the generator of D.reverse.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.tv import TV
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.prefer._responses import log_ratios, totals

MARGIN = 1e-9  # how far before its end f* is left, relative to the slope there


@dataclass(frozen=True)
class ImplicitRewardSFT:
    """SFT in which a demonstration weighs phi'(beta l), l its log-ratio policy / reference.

    average: whether l is the mean over the response's tokens, or their sum.
    steepest: the largest weight. phi goes on linearly from there, and where it would end in a jump of its
    slope: TV() is SFT itself. The metric `linearised` counts; `stopped` counts the weights that are 0.
    """

    consumes: ClassVar[Consumes] = "responses"
    reads: ClassVar[tuple[str, ...]] = ("log_p_label", "log_q_label", "sequence")
    estimator: ClassVar[None] = None  # of the reference, only its log-probability of the text is asked

    divergence: FDivergence = field(default_factory=TV)
    beta: float = 1.0
    average: bool = True
    steepest: float = 100.0

    def __post_init__(self):
        require_f_divergence(self.divergence, "ImplicitRewardSFT")
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta!r}; its limit 0 is SFT()")
        if not 1 < self.steepest < math.inf:
            raise ValueError(f"steepest is a finite weight > 1, the one at reward 0, got {self.steepest!r}")

    def __call__(
        self,
        *,
        log_p_label: Tensor,
        log_q_label: Tensor,
        sequence: Tensor,
        count: Tensor | float | None = None,
    ) -> Out:
        """The reference's and the policy's log-probability of each token of demonstrations; [R].

        count: the tokens of the global batch (default: here); each response weighs as many as it has.
        """
        ratio = log_ratios(log_p_label, log_q_label)
        lengths = sequence.bincount()
        length = lengths.clamp(min=1) if self.average else torch.ones_like(lengths)
        log_ratio = totals(ratio, sequence, len(lengths)).double() / length
        reward = implicit_reward(torch.zeros_like(log_ratio), log_ratio, self.beta)
        value, weight, linear = self.imitation(reward)
        count = len(sequence) if count is None else count
        loss = mean_over_tokens(-value * length / self.beta, count=count).to(ratio)
        numbers = {"reward": reward, "weight": weight, "linearised": linear, "stopped": weight == 0}
        present = lengths > 0
        return Out(loss, {n: mean_over_tokens(r[present].detach().to(ratio)) for n, r in numbers.items()})

    def imitation(self, reward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(phi(r), its derivative, whether phi is continued linearly there), elementwise."""
        reach, slope = _reach(self.divergence, self.steepest), -reward.detach()
        inside = slope.clamp(reach.low, reach.high).requires_grad_()
        with torch.enable_grad():  # the derivative of f* is (f')^{-1}: both from one solution
            conjugate = self.divergence.reverse.conjugate(inside)
            (weight,) = torch.autograd.grad(conjugate.sum(), inside)
        above, below = slope > reach.high, slope < reach.low
        weight = torch.where(above, reach.high_weight, torch.where(below, reach.low_weight, weight))
        value = (conjugate + weight * (slope - inside)).detach()
        # `reward + slope` is 0, and carries the gradient.
        return weight * (reward + slope) - value, weight, above | (below & (reach.low_weight > 0))


def implicit_reward(log_p: Tensor, log_q: Tensor, beta: float, value: float = 0.0) -> Tensor:
    """beta log(policy / reference) + value, the reward under which the policy is optimal.

    log_p, log_q: the reference's and the policy's log-probabilities, of tokens or of whole responses. `value`
    is a constant of the prompt that no policy reveals: compare rewards of one prompt only.
    """
    return beta * (log_q - log_p) + value


class Reach(NamedTuple):
    """The slopes y between which f* is used, and its own slopes, the weights, beyond."""

    low: float
    high: float
    low_weight: float
    high_weight: float


@lru_cache(maxsize=256)
def _reach(divergence: FDivergence, steepest: float) -> Reach:
    generator, lowest = divergence.reverse, divergence.reverse.slope_at_zero

    def at(log_weight: float) -> Tensor:
        return torch.tensor(log_weight, dtype=torch.float64)

    def weight(slope: float) -> float:
        return generator.inverse_slope(at(slope)).exp().item()

    top = generator.phi(at(math.log(steepest))).item()
    high = top - MARGIN * (1 + abs(top))
    low, low_weight = lowest, 0.0
    if math.isfinite(lowest) and generator.curvature(at(-4.6)).item() == 0:  # f is linear near 0, as TV's
        low = lowest + MARGIN * (1 + abs(lowest))
        low_weight = weight(low)
    return Reach(low, high, low_weight, weight(high))
