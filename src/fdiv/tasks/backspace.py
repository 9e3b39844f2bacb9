"""A token that takes back the token before it: noise for it to undo, and what a text is once it has.

Cundy and Ermon, "SequenceMatch: Imitation Learning for Autoregressive Sequence Modelling with Backtracking",
arXiv 2306.05426. A prompt is never taken back: where nothing of the answer is left, a backspace does nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.tasks._task import Text
from fdiv.tasks.padding import answered


class Replayed(NamedTuple):
    """What a model reads in place of a text with backspaces, to be in the state of the prefix that is left.

    A backspace is read as the last token that it leaves, once more and in its place. Row i of `visible`
    [N, S, S] has what is left behind token i, which it may attend to; its depth there is its position
    [N, S]. Nothing that comes later sees what was taken back.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor


def noised(
    text: Text, noise: float, symbols: Tensor, backspace: int, generator: torch.Generator, spare: int = 0
) -> Text:
    """With a wrong token of `symbols` [K] and its backspace before some tokens of each answer.

    noise: the chance of it, token by token, but for the last `spare` ones.
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"noise is a chance in [0, 1], got {noise!r}")
    if len(symbols.unique()) < 2 or bool((symbols == backspace).any()):
        raise ValueError(f"noise is one of two tokens or more, and no backspace, got {symbols.tolist()}")
    strikes = torch.rand(text.ids.shape, generator=generator) < noise
    choices = torch.rand(text.ids.shape, generator=generator)
    prompts, answers = [], []
    for ids, mask, strike, choice in zip(*text, strikes, choices, strict=True):
        prompt, answer = halves(ids, mask)
        written: list[int] = []
        for n, token in enumerate(answer):
            if strike[n] and n < len(answer) - spare:
                others = symbols[symbols != token]
                written += [int(others[int(choice[n] * len(others))]), backspace]
            written.append(token)
        prompts.append(prompt)
        answers.append(torch.tensor(written, dtype=torch.long))
    return answered(prompts, answers, 0)


def unasked(text: Text, backspace: int) -> Text:
    """With the mask false on what is taken back: likelihood then teaches to undo it, not to write it."""
    mask = text.mask.clone()
    for row, ids in zip(mask, text.ids, strict=True):
        prompt, answer = halves(ids, row)
        stack: list[int] = []
        for n, token in enumerate(answer):
            if token != backspace:
                stack.append(n)
            elif stack:
                row[len(prompt) + stack.pop()] = False
    return Text(text.ids, mask)


def collapsed(text: Text, backspace: int) -> Text:
    """Without backspaces and what they take back; answers may be empty."""
    prompts, answers = [], []
    for ids, mask in zip(*text, strict=True):
        prompt, answer = halves(ids, mask)
        prompts.append(prompt)
        answers.append(torch.tensor([answer[n] for n in left(answer, backspace)[-1]], dtype=torch.long))
    return answered(prompts, answers, 0)


def left(answer: Sequence[int], backspace: int) -> list[list[int]]:
    """The places of the tokens that are left, before the answer and behind each of its tokens."""
    kept: list[list[int]] = [[]]
    for n, token in enumerate(answer):
        kept.append(kept[-1][:-1] if token == backspace else [*kept[-1], n])
    return kept


def replayed(text: Text, backspace: int) -> Replayed:
    """For a model that takes positions and a mask of attention; padding sees itself alone."""
    ids, positions = text.ids.clone(), torch.zeros_like(text.ids)
    visible = torch.eye(text.ids.shape[1], dtype=torch.bool, device=text.ids.device).repeat(len(ids), 1, 1)
    for n, (row, mask) in enumerate(zip(*text, strict=True)):
        prompt, answer = halves(row, mask)
        stack: list[int] = []
        for place, token in enumerate([*prompt.tolist(), *answer]):
            if place >= len(prompt) and token == backspace:
                if len(stack) > len(prompt):
                    stack.pop()
                ids[n, place] = ids[n, stack[-1]]
                stack[-1] = place  # what it leaves is read again, here
            else:
                stack.append(place)
            positions[n, place] = len(stack) - 1
            visible[n, place, stack] = True
    return Replayed(ids, positions, visible)


def halves(ids: Tensor, mask: Tensor) -> tuple[Tensor, list[int]]:
    """(prompt, answer) of one text; the answer is all that stands under the mask."""
    places = mask.nonzero().flatten().tolist()
    if not places or len(places) != places[-1] - places[0] + 1:
        raise ValueError(
            f"the mask of a text is true on its answer, without a gap, got {mask.tolist()}; ask `unasked` "
            "last of all"
        )
    return ids[: places[0]], ids[places].tolist()
