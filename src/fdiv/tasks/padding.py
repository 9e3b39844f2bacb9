"""Sequences of different lengths in one tensor.

Prompts that wait for an answer are padded on the right with NOTHING, which is no token: ids such as that of
the end of text occur inside prompts, so that no token could tell where a prompt ends. Answered text is padded
with a real token behind its mask, where a causal model never looks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fdiv.tasks._task import Text

NOTHING = -1


def right_padded(rows: Sequence[Tensor], fill: int) -> Tensor:
    """Rows [length] of different lengths as [rows, longest]."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


def unanswered(prompts: Sequence[Tensor]) -> Text:
    """Prompts [length] each, as a batch."""
    ids = right_padded(prompts, NOTHING)
    return Text(ids, torch.zeros_like(ids, dtype=torch.bool))


def answered(prompts: Sequence[Tensor], responses: Sequence[Tensor], fill: int) -> Text:
    """Each response behind its prompt, `fill` behind both; mask marks the responses."""
    pairs = list(zip(prompts, responses, strict=True))
    ids = right_padded([torch.cat(pair) for pair in pairs], fill)
    marks = [torch.cat([torch.zeros_like(p, dtype=torch.bool), torch.ones_like(r, dtype=torch.bool)])
             for p, r in pairs]  # fmt: skip
    return Text(ids, right_padded(marks, 0))


def lengths(prompts: Tensor) -> Tensor:
    """Tokens of each prompt [N, S], on the CPU."""
    real = (prompts != NOTHING).cpu()
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError("prompts are padded on the right, with fdiv.tasks.padding.NOTHING; these are not")
    count = real.sum(1)
    if not count.all():
        raise ValueError("a prompt has no token; what follows nothing is not predicted by a causal model")
    return count


def rows_of(prompts: Text) -> list[Tensor]:
    """The prompts of a batch, without padding."""
    count = lengths(prompts.ids)
    return [row[:n] for row, n in zip(prompts.ids.cpu(), count.tolist(), strict=True)]


def prompts_of(text: Text) -> Text:
    """What stands before the first masked token of each sequence, as prompts to be answered anew."""
    return unanswered(
        [row[: int(mark.int().argmax())] for row, mark in zip(*(t.cpu() for t in text), strict=True)]
    )


def trimmed(text: Text) -> Text:
    """Without the columns behind the last masked token of any sequence."""
    used = int(text.mask.any(0).nonzero().max()) + 1 if text.mask.any() else 0
    return Text(text.ids[:, :used], text.mask[:, :used])
