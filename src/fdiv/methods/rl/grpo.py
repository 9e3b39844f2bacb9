"""GRPO with any f-divergence to the reference, and its exact gradient.

Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", arXiv
2402.03300, for the group-relative advantage; the paper puts the k3 estimate of reverse KL into the loss,
whose gradient is that of *forward* KL. Here the penalty's gradient is the divergence's own:

    maximise E_pi[r] - beta sum_i D(ref, pi)(.|s_i)
    gradient of the penalty at token i: psi_i (or the whole vocabulary's) + sum over j > i of D_j

psi_i acts through token i itself, the later values through where token i leads. p is the reference, q the
policy pi: ReverseKL() is RLHF's regulariser.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import ReverseKL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.monte_carlo import MonteCarlo
from fdiv.methods._method import Consumes, Out, blank, mean_over_tokens, named


@dataclass(frozen=True)
class GRPO:
    """Clipped policy gradient on group-normalised rewards, plus beta times a divergence to the reference.

    estimator: MonteCarlo() sees the sampled tokens, Exact() the whole vocabulary at the sampled prefixes.
    future: include the penalty's effect on later tokens; without it the gradient is only partial.
    The penalty's gradient is exact where the policy itself sampled. MonteCarlo("behaviour") weights each
    token's penalty by its own importance ratio only, the usual approximation.
    clip: the trust region of the importance ratio. beta = 0 turns the penalty off.
    """

    consumes: ClassVar[Consumes] = "rollouts"

    divergence: Divergence = field(default_factory=ReverseKL)
    estimator: Estimator = field(default_factory=MonteCarlo)
    beta: float = 0.04
    clip: float = 0.2
    future: bool = True

    def __post_init__(self):
        self.estimator.check(self.divergence)
        if self.estimator.sees not in ("logits", "log_probs"):
            raise TypeError(
                f"GRPO penalises the policy at sampled prefixes, which {self.estimator!r} cannot see; "
                "write MonteCarlo() or Exact()"
            )
        if getattr(self.estimator, "samples", "q") == "p":
            raise TypeError(
                f"GRPO's rollouts are not samples of the reference, as {self.estimator!r} takes them to be; "
                "write MonteCarlo(), or MonteCarlo('behaviour') off-policy"
            )
        if self.beta < 0:
            raise ValueError(f"beta must be >= 0, got {self.beta!r}: a negative one maximises the divergence")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip is between 0 and 1, got {self.clip!r}")

    def __call__(
        self,
        *,
        log_policy: Tensor,
        log_behaviour: Tensor,
        rewards: Tensor | None = None,
        advantage: Tensor | None = None,
        mask: Tensor,
        count: Tensor | float | None = None,
        **evidence: Tensor,
    ) -> Out:
        """log_policy, log_behaviour, mask [B, T] of the sampled tokens; rewards [groups, B / groups].

        advantage [B] in place of rewards: normalised elsewhere, where this batch has no whole groups.
        `evidence`: what else `estimator.evidence` names, over [B, T].
        """
        advantage, metrics = _advantage(rewards, advantage)
        if len(advantage) != len(log_policy):
            raise ValueError(f"{len(advantage)} rewards for {len(log_policy)} sequences; one each is needed")
        log_policy, log_behaviour = blank(log_policy, mask), blank(log_behaviour.detach(), mask)
        ratio = (log_policy - log_behaviour).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        loss = mean_over_tokens(-gain, mask, count)
        metrics["ratio"] = mean_over_tokens(ratio, mask).detach()
        if self.beta or evidence:
            tensors = self._evidence(evidence, log_behaviour, mask)
        if self.beta:
            penalty, value = self._penalty(log_policy, mask, tensors)
            loss = loss + self.beta * mean_over_tokens(penalty, mask, count)
            metrics["divergence"] = mean_over_tokens(value, mask)
        return Out(loss, metrics)

    def _evidence(self, evidence: dict[str, Tensor], log_behaviour: Tensor, mask: Tensor) -> list[Tensor]:
        names = self.estimator.evidence
        if "log_behaviour" in names:
            evidence = evidence | {"log_behaviour": log_behaviour}
        return [blank(tensor, mask) for tensor in named(evidence, names)]

    def _penalty(self, log_policy: Tensor, mask: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(a tensor whose gradient is the penalty's, the penalty's values), each [B, T]."""
        own = getattr(self.estimator, "surrogate", self.estimator)(self.divergence, *tensors)
        value = torch.where(mask, own, 0.0).detach()
        if not self.future:
            return own, value
        later = value.flip(-1).cumsum(-1).flip(-1) - value
        return own + later * (log_policy - log_policy.detach()), value


def _advantage(rewards: Tensor | None, advantage: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """([B, 1], what there is to log of the rewards); neither is differentiated."""
    if advantage is not None and rewards is None:
        return advantage.detach().reshape(-1, 1), {}
    if rewards is None or advantage is not None:
        raise TypeError("GRPO takes either rewards [groups, B / groups] or advantage [B]")
    rewards = rewards.detach()
    return group_advantage(rewards).reshape(-1, 1), {"reward": rewards.float().mean()}


def group_advantage(rewards: Tensor) -> Tensor:
    """(r - mean) / std within each row; 0 where all rewards of a group are equal. [groups, samples]"""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are [groups, samples >= 2], got {tuple(rewards.shape)}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    rewards = rewards - rewards[:, :1]  # equal rewards become zeros, whose mean has no rounding to divide
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
