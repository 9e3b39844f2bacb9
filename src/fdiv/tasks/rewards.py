"""Rewards: plain Python functions that judge answers as text.

A reward function is called as TRL calls its own, with keyword arguments that are lists, one entry an
answer: `prompts`, `completions`, and every field of the records that the prompts are from. It returns one
number each.

    def concise(completions, **fields):
        return [1.0 if len(text) < 80 else 0.0 for text in completions]

A recipe names it "module:function"; a file beside the recipe, listed under `plugins`, is such a module.
"""

from typing import Any

import torch
from torch import Tensor

from fdiv.notation import function_named

OWN = ("prompts", "completions")  # which no field of a record can be called


def rewarded(
    names: tuple[str, ...], prompts: list[str], completions: list[str], records: list[dict[str, Any]]
) -> Tensor:
    """The sum of what the functions say of each answer, [N] float32."""
    named = dict.fromkeys(name for record in records for name in record)
    fields = {name: [r.get(name) for r in records] for name in named if name not in OWN}
    total = torch.zeros(len(completions))
    for name in names:
        said = function_named(name)(prompts=prompts, completions=completions, **fields)
        total += _numbers(name, said, len(completions))
    return total


def _numbers(name: str, said: Any, count: int) -> Tensor:
    try:
        numbers = torch.tensor([float(number) for number in said])
    except (TypeError, ValueError):
        raise ValueError(f"the reward {name!r} returns a list of numbers, got {said!r:.200}") from None
    if len(numbers) != count or not bool(numbers.isfinite().all()):
        raise ValueError(
            f"the reward {name!r} gave {said!r:.200} for {count} answers: one finite number each"
        )
    return numbers
