"""WSRL: fine-tune a policy from offline RL online, without the offline data, after a warm-up.

Zhou, Peng, Li, Levine and Kumar, "Efficient Online Reinforcement Learning Fine-Tuning Need Not Retain Offline
Data", arXiv 2412.07762.

    warm-up:  K steps of the pretrained policy, frozen, fill an empty buffer; nothing is learned
    then:     G updates a step from that buffer;  L = mean over members i of (Q_i(s, a) - y)^2
              y = r + discount E_{a' ~ pi}[ min over a subset of the members of Q' - temperature log pi(a') ]

K is `warmup`, G `updates`, the ensemble has `members` of which `subset` are minimised over, a rule of
REDQ (arXiv 2101.05982). The paper's actions are continuous and its actor a network (SAC); here they are
discrete, and the policy is the softmax of the ensemble's mean over the temperature.
No f-divergence is in the objective. Its link to fdiv: the warm-up bridges the shift between the states of the
pretrained policy and those of the online one, which is an occupancy divergence, and a discriminator of
the two buffers measures it (fdiv.environments.occupancy.occupancy_divergence).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WSRL:
    """The rule and the losses; `fdiv.environments.off_policy` is a loop that follows them.

    quality: Q of every member, state and action, [members, rows, actions].
    """

    warmup: int = 5000
    updates: int = 4
    members: int = 10
    subset: int = 2
    discount: float = 0.99
    temperature: float = 0.01

    def __post_init__(self):
        if self.warmup < 0 or self.updates < 1:
            raise ValueError(
                f"warmup >= 0 steps and updates >= 1 a step, got {self.warmup!r} and {self.updates!r}"
            )
        if not 1 <= self.subset <= self.members:
            raise ValueError(f"1 <= subset <= members, got {self.subset!r} of {self.members!r}")
        if not (0 < self.discount <= 1 and self.temperature > 0):
            raise ValueError(
                f"discount is in (0, 1] and temperature > 0, got {self.discount!r} and {self.temperature!r}"
            )

    def updates_after(self, step: int) -> int:
        """How many updates follow the step of this number, counted from 1 when the buffer was empty."""
        return self.updates if step > self.warmup else 0

    def log_policy(self, quality: Tensor) -> Tensor:
        """[members, rows, actions] -> [rows, actions]"""
        return (quality.mean(0) / self.temperature).log_softmax(-1)

    def target(
        self,
        reward: Tensor,
        terminated: Tensor,
        quality_after: Tensor,
        log_policy_after: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """y [rows], from the slow copy's quality and the policy at the states that the steps led to."""
        some = torch.randperm(len(quality_after), generator=generator)[: self.subset]
        soft = quality_after[some].amin(0) - self.temperature * log_policy_after
        value = (log_policy_after.exp() * soft).sum(-1)
        return (reward + self.discount * value.masked_fill(terminated, 0.0)).detach()

    def loss(self, quality: Tensor, action: Tensor, target: Tensor) -> Tensor:
        return (self.chosen(quality, action) - target).square().mean()

    def conservative(self, quality: Tensor, action: Tensor) -> Tensor:
        """What offline pretraining adds: the soft maximum over actions, less that of the data's action.

        Kumar, Zhou, Tucker and Levine, "Conservative Q-Learning for Offline Reinforcement Learning",
        arXiv 2006.04779, at this policy's temperature.
        """
        highest = self.temperature * (quality / self.temperature).logsumexp(-1)
        return (highest - self.chosen(quality, action)).mean()

    def chosen(self, quality: Tensor, action: Tensor) -> Tensor:
        """Q of the actions taken, [members, rows]."""
        return quality.gather(-1, action.expand(len(quality), -1).unsqueeze(-1)).squeeze(-1)
