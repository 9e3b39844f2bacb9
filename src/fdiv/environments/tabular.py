"""A Markov decision process in tables: occupancies, returns and gradients by linear algebra."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class MDP(NamedTuple):
    """S states and A actions; an episode goes on with probability `discount` after each step.

    `reward` is what a policy is trained on, the proxy; `true_reward` what is wanted. Returns are means over
    the occupancy: the reward of an average step.
    """

    start: Tensor  # [S] where an episode begins, sums to 1
    transitions: Tensor  # [S, A, S]
    reward: Tensor  # [S, A]
    true_reward: Tensor  # [S, A]
    discount: float

    @classmethod
    def of_table(cls, table: dict, start: Tensor, discount: float) -> "MDP":
        """From gymnasium's toy-text form: table[s][a] lists (chance, next state, reward, terminated).

        What terminated stays where it is, without reward.
        """
        states, actions = len(table), len(table[0])
        transitions = torch.zeros(states, actions, states, dtype=torch.float64)
        reward, ends = torch.zeros(states, actions, dtype=torch.float64), torch.zeros(states).bool()
        for state, rows in table.items():
            for action, outcomes in rows.items():
                for chance, after, gain, terminated in outcomes:
                    transitions[state, action, after] += chance
                    reward[state, action] += chance * gain
                    ends[after] |= terminated
        transitions[ends] = torch.eye(states, dtype=torch.float64)[ends].unsqueeze(1)
        reward[ends] = 0.0
        return cls(start.double(), transitions, reward, reward, discount)

    def occupancy(self, policy: Tensor) -> Tensor:
        """The share of steps spent in each state and action under policy [S, A]: [S, A], sums to 1.

        Differentiable in the policy. d = (1 - g) start + g P^T d, P the policy's transitions.
        """
        moves = torch.einsum("sa,sat->st", policy, self.transitions)
        stays = torch.eye(len(moves), dtype=moves.dtype) - self.discount * moves.mT
        return torch.linalg.solve(stays, (1 - self.discount) * self.start).unsqueeze(-1) * policy

    def soft_optimal(self, reward: Tensor, temperature: float) -> Tensor:
        """The policy [S, A] of highest return plus temperature times the entropy of its actions.

        As temperature falls it becomes the optimal policy. Solved by value iteration, to float64's rounding.
        """
        value, last, quality = torch.zeros_like(self.start), torch.ones_like(self.start), reward
        while (value - last).abs().max() > 1e-12:
            quality = reward + self.discount * (self.transitions @ value)
            value, last = temperature * (quality / temperature).logsumexp(-1), value
        return (quality / temperature).softmax(-1)

    def restricted(self, states: Tensor) -> "MDP":
        """The states of the boolean mask [S] alone, which the others are not needed to move between."""
        transitions = self.transitions[states][:, :, states]
        return MDP(
            self.start[states], transitions, self.reward[states], self.true_reward[states], self.discount
        )

    def reachable(self) -> Tensor:
        """Which states some policy can visit, bool [S]."""
        seen = self.start > 0
        step = self.transitions.sum(1) > 0
        while (more := seen | step[seen].any(0)).sum() > seen.sum():
            seen = more
        return seen

    def optimise(
        self, objective: Callable[[Tensor, Tensor], Tensor], policy: Tensor, steps: int = 200, lr: float = 0.1
    ) -> Tensor:
        """Adam on the exact gradient of objective(occupancy, policy) in the logits of `policy`: [S, A]."""
        logits = policy.log().clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=lr)
        for _ in range(steps):
            policy = logits.softmax(-1)
            loss = -objective(self.occupancy(policy), policy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return logits.detach().softmax(-1)


def spread(occupancy: Tensor, reward: Tensor) -> Tensor:
    """The standard deviation of a reward over an occupancy."""
    return covariance(occupancy, reward, reward).sqrt()


def correlation(occupancy: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The correlation of two rewards over an occupancy: the paper's r, of proxy and true reward."""
    return covariance(occupancy, one, other) / (spread(occupancy, one) * spread(occupancy, other))


def covariance(occupancy: Tensor, one: Tensor, other: Tensor) -> Tensor:
    one, other = (reward - (occupancy * reward).sum() for reward in (one, other))
    return (occupancy * one * other).sum()
