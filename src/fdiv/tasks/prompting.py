"""What tasks with prompts do alike."""

from typing import Any

import torch
from torch import Tensor

from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Prompted, Text


def uniform(sequences: int, tokens: int, generator: torch.Generator) -> Tensor:
    """The numbers that answers are made of, [sequences, tokens]."""
    return torch.rand(sequences, tokens, generator=generator, dtype=torch.float64)


def unseen(task: Any, teacher: Any, count: int, generator: torch.Generator) -> Text:
    """At most `count` responses that are not trained on: held out, or new where a task makes them."""
    held_out = getattr(task, "held_out_responses", None)
    return (held_out or task.responses)(teacher, count, generator)


def rollouts(task: Prompted, policy, groups: int, size: int, generator: torch.Generator) -> Text:
    """`size` answers by `policy` to each of `groups` prompts of training."""
    prompts = Text(*(t.repeat_interleave(size, 0) for t in task.prompts(groups, generator)))
    draws = uniform(groups * size, task.answer_length, generator)
    return task.answer(policy, prompts, draws, Decoding())
