"""What tasks with prompts do alike."""

import torch
from torch import Tensor

from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Prompted, Text


def uniform(sequences: int, tokens: int, generator: torch.Generator) -> Tensor:
    """The numbers that answers are made of, [sequences, tokens]."""
    return torch.rand(sequences, tokens, generator=generator, dtype=torch.float64)


def rollouts(task: Prompted, policy, groups: int, size: int, generator: torch.Generator) -> Text:
    """`size` answers by `policy` to each of `groups` prompts of training."""
    prompts = Text(*(t.repeat_interleave(size, 0) for t in task.prompts(groups, generator)))
    draws = uniform(groups * size, task.answer_length, generator)
    return task.answer(policy, prompts, draws, Decoding())
