"""Numbers of a group: the answers to one prompt."""

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4  # beside a standard deviation


def group_advantage(rewards: Tensor, scale: Literal["std", "mean"] = "std") -> Tensor:
    """r - mean within each row, over its std; 0 where all rewards of a group are equal. [groups, samples]

    scale="mean": less the mean only.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are [groups, samples >= 2], got {tuple(rewards.shape)}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    rewards = rewards - rewards[:, :1]  # equal rewards become zeros, whose mean has no rounding to divide
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred if scale == "mean" else centred / (rewards.std(1, keepdim=True) + EPSILON)


def advantage_within(reward: Tensor, group: Tensor) -> Tensor:
    """The same for groups of any size, reward and group [B]: group numbers them from 0."""
    reward = reward.to(torch.promote_types(reward.dtype, torch.float32))
    sizes = group.bincount()
    largest = reward.new_full(sizes.shape, -torch.inf).scatter_reduce(0, group, reward, "amax")
    reward = reward - largest[group]
    centred = reward - group_mean(reward, group)
    squares = reward.new_zeros(sizes.shape).index_add(0, group, centred.square())
    std = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return centred / (std[group] + EPSILON)


def group_mean(rows: Tensor, group: Tensor) -> Tensor:
    """The mean of its group at each row, [B]."""
    sizes = group.bincount()
    return (rows.new_zeros(sizes.shape).index_add(0, group, rows) / sizes.clamp(min=1))[group]


def check_correct(correct: Tensor) -> None:
    """Raise unless `correct` is boolean: a reward may be anything, and 0.5 is neither right nor wrong."""
    if correct.dtype != torch.bool:
        raise TypeError(f"correct is boolean, got {correct.dtype}; write reward > 0, say")
