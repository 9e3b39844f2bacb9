"""The occupancy penalty from samples: a discriminator that follows the policy (methods/rl/occupancy.py)."""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdiv._divergence import FDivergence
from fdiv.environments.on_policy import Rollout
from fdiv.estimate.discriminator import logistic_loss
from fdiv.estimate.variational import Variational
from fdiv.methods.rl.occupancy import OccupancyReward


class Follower:
    """A classifier of (observation, action): from the reference, or from the policy as it is now?

    reference: samples (observations [M, ...], actions [M]) of the reference policy.
    network(observations, actions) -> log-ratio log mu_ref - log mu_pi; balanced batches, Adam.
    """

    def __init__(
        self,
        network: nn.Module,
        reference: tuple[Tensor, Tensor],
        seed: int,
        updates: int = 8,
        batch: int = 512,
        lr: float = 3e-3,
    ):
        self.network, self.reference = network, reference
        self.updates, self.batch = updates, batch
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
        self.generator = torch.Generator().manual_seed(seed)

    def learn(self, observation: Tensor, action: Tensor) -> None:
        """Some steps on samples of the policy, [N, ...] and [N]."""
        for _ in range(self.updates):
            p, q = (self._some(*pair) for pair in (self.reference, (observation, action)))
            loss = logistic_loss(self.network(*p), self.network(*q))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def _some(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(action), (self.batch,), generator=self.generator)
        return observation[rows], action[rows]


@dataclass(frozen=True)
class OccupancyPenalty:
    """beta times `reward`'s prices at the discriminator's log-ratio; it learns before it is asked."""

    reward: OccupancyReward
    beta: float
    follower: Follower

    def costs(self, rollout: Rollout, policy: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        observation, action = rollout.observation.flatten(0, 1), rollout.action.flatten()
        self.follower.learn(observation, action)
        with torch.no_grad():
            price, numbers = self.reward(self.follower.network(observation, action))
        return self.beta * price.reshape(rollout.action.shape), numbers

    def loss(self, observation: Tensor, log_q: Tensor) -> Tensor:
        return log_q.new_zeros(())


def occupancy_divergence(
    divergence: FDivergence, follower: Follower, observation: Tensor, action: Tensor, rounds: int = 20
) -> float:
    """A lower bound on D(reference's occupancy, the samples'), by a critic that learns to tell them apart.

    It learns from the first half of either, `rounds` times follower.updates, and is judged on the second.
    """
    halves = [t.tensor_split(2) for t in (*follower.reference, observation, action)]
    learner = copy(follower)
    learner.reference = (halves[0][0], halves[1][0])
    for _ in range(rounds):
        learner.learn(halves[2][0], halves[3][0])
    with torch.no_grad():
        critic_p = learner.network(halves[0][1], halves[1][1])
        critic_q = learner.network(halves[2][1], halves[3][1])
    return Variational()(divergence, critic_p, critic_q).item()
