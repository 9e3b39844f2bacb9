"""Samples of a policy in tables; needs gymnasium."""

import torch
from tests.environments.processes import Table

from fdiv.environments.on_policy import collect, started
from fdiv.environments.simulation import Simulations


def rolled_out(mdp, policy, seed, steps, number=64):
    """(states, actions) of a policy [S, A] after its start is forgotten."""
    generator = torch.Generator().manual_seed(seed)
    envs, table = Simulations(mdp, number), Table(policy.log().float())
    _, observation = collect(envs, table, started(envs, seed), 128, generator)
    rollout, _ = collect(envs, table, observation, steps, generator)
    return rollout
