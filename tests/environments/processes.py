"""Random decision processes and policies, small enough to sum over."""

import torch
from torch import nn

from fdiv.environments.tabular import MDP


def random_mdp(states=4, actions=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reward, true = torch.randn(2, states, actions, generator=generator, dtype=torch.float64)
    return MDP(
        torch.rand(states, generator=generator, dtype=torch.float64).softmax(0),
        (2 * torch.randn(states, actions, states, generator=generator, dtype=torch.float64)).softmax(-1),
        reward,
        true,
        0.9,
    )


def random_policy(states=4, actions=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(states, actions, generator=generator, dtype=torch.float64).softmax(-1)


class Table(nn.Module):
    """A number, or a row of numbers, of each state."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, states):
        return self.rows[states]
