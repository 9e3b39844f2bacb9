"""ROSE: answers that branch off each other, credit for each stretch of the tree, and less of it for length.

Zhao et al., "Reinforced Efficient Reasoning via Semantically Diverse Exploration", arXiv 2601.05053.

    V(b)  = mean reward of the answers that pass the node b                                            (6)
    A_t   = V(b_j) - V(b_(j-1))   for the tokens b_(j-1) < t <= b_j between two nodes of an answer       (7)
    A_t  <- A_t - |A_t| (1 - ((|s| - b) / (|c| - b))^alpha)   for t > b in a right answer c            (8)

Nodes are the root, the places where answers branch off, and the end of each; s is the shortest right answer
of the group and b the place where c leaves it. alpha is `length`; epsilon, and the measure of how open a
place is, are in `branching` (fdiv.sample.branching). p is the reference, q the policy; the paper's
penalty is ReverseKL(), of which its code differentiates the k3 estimate.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import ReverseKL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.monte_carlo import MonteCarlo
from fdiv.estimate.tokens import Penalty, per_token
from fdiv.methods._method import Consumes, Out, mean_over_tokens, named
from fdiv.methods.rl.clipping import Aggregate, Clip, aggregated, clipped_gain, log_importance
from fdiv.methods.rl.grpo import GRPO
from fdiv.sample.branching import Branching


@dataclass(frozen=True)
class ROSE:
    """Clipped policy gradient on the advantages of a tree's stretches, plus beta times D to the reference.

    divergence, estimator, beta, clip, future, aggregate: as GRPO's; aggregate=1 is the loss as it is printed.
    branching: how the answers are written. length: alpha, 0 for no price on length. An answer is right if
    its reward is above 0.
    shared: the tokens that an answer has from another count in "each" answer, as in the paper, or "once", in
    the one that wrote them.
    """

    consumes: ClassVar[Consumes] = "rollouts"
    unit: ClassVar[str] = "group"

    divergence: Divergence = field(default_factory=ReverseKL)
    estimator: Estimator = field(default_factory=MonteCarlo)
    beta: float = 1e-3
    clip: Clip = 0.2
    branching: Branching = field(default_factory=Branching)
    length: float = 1.0
    shared: Literal["each", "once"] = "each"
    future: bool = True
    aggregate: Aggregate = "tokens"

    def __post_init__(self):
        GRPO(self.divergence, self.estimator, self.beta, self.clip, self.future, aggregate=self.aggregate)
        if not isinstance(self.branching, Branching):
            raise TypeError(f"branching is Branching(...), got {self.branching!r}")
        if not 0 <= self.length < math.inf:
            raise ValueError(f"length is an exponent >= 0, got {self.length!r}; 0 puts no price on length")
        if self.shared not in ("each", "once"):
            raise ValueError(f"shared is 'each' or 'once', got {self.shared!r}")

    @property
    def reads(self) -> tuple[str, ...]:
        tree = ("reward", "group", "parent", "branch")
        return tree if self.aggregate == "tokens" else (*tree, "sequences")

    def __call__(
        self,
        *,
        log_policy: Tensor,
        log_behaviour: Tensor,
        mask: Tensor,
        count: Tensor | float | None = None,
        sequences: Tensor | float | None = None,
        reward: Tensor,
        group: Tensor,
        parent: Tensor,
        branch: Tensor,
        **evidence: Tensor,
    ) -> Out:
        """Tensors [B, T] of the sampled tokens; reward, group, parent and branch [B], the groups whole.

        parent: the number within its group of the answer that one branches off, an earlier one, or -1;
        branch: the tokens it has of it. count, sequences: those of the global batch (default: here).
        `evidence`: what else `estimator.evidence` names, over [B, T]; none with beta=0.
        """
        common = common_tokens(mask.sum(-1), group, parent, branch)
        advantage = stretch_advantage(reward.detach(), mask, group, common)
        advantage = shortened(advantage, reward, mask, group, common, self.length)
        metrics = {"branched": mean_over_tokens((parent >= 0).to(advantage.dtype))}
        if self.shared == "once":
            count = mask.sum() if count is None else count  # that of all tokens, as the trainer's is
            mask = mask & (_number(mask) >= branch.unsqueeze(-1))
        gain = clipped_gain(log_importance(log_policy, log_behaviour, mask), advantage, self.clip)
        rows = -gain.gain
        if self.beta or evidence:
            penalty = self._penalty(evidence, log_policy, log_behaviour, mask)
            rows = rows + self.beta * penalty.surrogate
            metrics["divergence"] = mean_over_tokens(penalty.value, mask)
        metrics["ratio"] = mean_over_tokens(gain.ratio, mask)
        metrics["clipped"] = mean_over_tokens(gain.clipped, mask)
        return Out(aggregated(rows, mask, self.aggregate, count, sequences), metrics)

    def _penalty(
        self, evidence: dict[str, Tensor], log_policy: Tensor, log_behaviour: Tensor, mask: Tensor
    ) -> Penalty:
        names = self.estimator.evidence
        if "log_behaviour" in names:
            evidence = evidence | {"log_behaviour": log_behaviour.detach()}
        tensors = named(evidence, names)
        return per_token(self.estimator, self.divergence, tensors, log_policy, mask, future=self.future)


def common_tokens(length: Tensor, group: Tensor, parent: Tensor, branch: Tensor) -> Tensor:
    """[B, B] tokens that two answers of a group have by descent from a third or each other; else 0.

    On the diagonal their lengths [B]; group, parent and branch [B] are ROSE's.
    """
    size = len(group)
    place = torch.arange(size, device=group.device)
    first = torch.searchsorted(group.contiguous(), group.contiguous())
    _check_tree(place - first, parent, branch)
    endless = torch.iinfo(torch.long).max
    tokens = torch.diag(torch.full_like(place, endless))  # of itself it could keep any number
    for turn in range(1, int((place - first).max()) + 1 if size else 0):
        rows = ((place - first == turn) & (parent >= 0)).nonzero().squeeze(1)
        kept = torch.minimum(branch[rows].unsqueeze(1), tokens[first[rows] + parent[rows]])
        tokens[rows] += kept
        tokens[:, rows] += kept.mT
    return torch.where(tokens == endless, length.unsqueeze(1), tokens)


def stretch_advantage(reward: Tensor, mask: Tensor, group: Tensor, common: Tensor) -> Tensor:
    """V of the node that ends a token's stretch less V of the one where it begins, [B, T]; 0 where masked."""
    width = mask.shape[1]
    within = (group.unsqueeze(1) == group).to(torch.promote_types(reward.dtype, torch.float32))
    first = torch.searchsorted(group.contiguous(), group.contiguous())
    # Equal rewards become zeros, whose mean has no rounding.
    reward = (reward - reward[first]).to(within)
    common = common.clamp(max=width)
    none = within.new_zeros(len(group), width + 1)
    answers = none.scatter_add(1, common, within)  # that leave at each place, or end there
    value = _from_here(none.scatter_add(1, common, within * reward)) / _from_here(answers).clamp(min=1)
    places = torch.arange(width + 1, device=mask.device).expand(answers.shape)
    begins = torch.where(answers > 0, places, 0).cummax(1).values  # the last node up to a place
    number = _number(mask)
    rise = value.gather(1, number + 1) - value.gather(1, begins.gather(1, number))
    return torch.where(mask, rise, 0.0)


def shortened(
    advantage: Tensor, reward: Tensor, mask: Tensor, group: Tensor, common: Tensor, power: float
) -> Tensor:
    """Less of the advantage of right answers behind the place where they leave the shortest right one."""
    size, length, right = len(group), mask.sum(-1), reward > 0
    place = torch.arange(size, device=group.device)
    # The first one of several that are shortest.
    order = torch.where(right, length, mask.shape[1] + 1) * size + place
    rivals = torch.where(group.unsqueeze(1) == group, order, torch.iinfo(torch.long).max)
    shortest = rivals.argmin(1) if size else place
    left = common[place, shortest]
    ratio = (length[shortest] - left).clamp(min=0) / (length - left).clamp(min=1)
    price = torch.where(right & (place != shortest), 1 - ratio.to(advantage.dtype) ** power, 0.0)
    behind = _number(mask) >= left.unsqueeze(1)
    return advantage - torch.where(behind, advantage.abs() * price.unsqueeze(1), 0.0)


def _number(mask: Tensor) -> Tensor:
    """Of each token in its answer, from 0; [B, T]."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _from_here(rows: Tensor) -> Tensor:
    """The sum of each entry and those behind it."""
    return rows.flip(1).cumsum(1).flip(1)


def _check_tree(number: Tensor, parent: Tensor, branch: Tensor) -> None:
    if bool(((parent >= number) | (parent < -1) | (branch < 0)).any()):
        raise ValueError(
            "an answer branches off an earlier one of its group, by its number there, and keeps >= 0 tokens "
            "of it; parent is -1 at the root"
        )
    if bool(((parent < 0) & (branch > 0)).any()):
        raise ValueError("an answer without a parent keeps no tokens; its branch is 0")
