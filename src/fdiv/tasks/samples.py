"""Instruction data as tokens: what is trained on, what is held out, and what was left out on the way."""

import warnings
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdiv.tasks.conversations import Exchange, exchange
from fdiv.tasks.sources import records, separate

AT_ONCE = 1000  # texts that are tokenized together


class Sample(NamedTuple):
    """Tokens [length] of a prompt and of its response, and the record that they are from."""

    prompt: Tensor
    response: Tensor
    record: dict[str, Any]


class Split(NamedTuple):
    """vocabulary: the ids that occur, ascending. ends: the ids that end responses. counts: see `said`."""

    train: list[Sample]
    held_out: list[Sample]
    vocabulary: Tensor
    ends: tuple[int, ...]
    counts: Counter


@lru_cache(maxsize=4)
def split(task: Any, tokenizer: Any) -> Split:
    """The data of a task in the tokens of a tokenizer; warns, once, of what it had to leave out."""
    counts: Counter = Counter()
    train = _exchanges(task, tokenizer, task.source, counts)
    if isinstance(task.held_out, str):
        held = _exchanges(task, tokenizer, task.held_out, counts)
        kept = {told.prompt for told, _ in held}
        counts["leaked"] = sum(told.prompt in kept for told, _ in train)
    else:
        kept = set(separate([told.prompt for told, _ in train], task.held_out)[1])
        held = [pair for pair in train if pair[0].prompt in kept]
    train = [pair for pair in train if pair[0].prompt not in kept]
    ends: set[int] = set()
    train, held = (_samples(task, tokenizer, side, counts, ends) for side in (train, held))
    if said(task, counts):
        warnings.warn(said(task, counts), stacklevel=2)
    if not train or not held:
        raise ValueError(
            f"{task} gives {len(train)} samples to train on and {len(held)} held out, of {counts['read']}: "
            "take more data, other limits or another held_out"
        )
    texts = [part for sample in (*train, *held) for part in sample[:2]]
    return Split(train, held, torch.cat(texts).unique(), tuple(sorted(ends)), counts)


def said(task: Any, counts: Counter) -> str:
    """What became of samples that are not trained on as they are, or nothing."""
    causes = {
        "empty": "dropped: no prompt or no response",
        "long": f"dropped: a prompt longer than max_prompt={task.max_prompt}",
        "leaked": "dropped: a prompt that is held out too",
        "cut": f"cut, and without their end: a response longer than max_response={task.max_response}",
    }
    found = [f"{counts[name]} {cause}" for name, cause in causes.items() if counts[name]]
    return f"of {counts['read']} samples of {task.source}, " + "; ".join(found) if found else ""


Read = list[tuple[Exchange, dict[str, Any]]]


def _exchanges(task: Any, tokenizer: Any, source: str, counts: Counter) -> Read:
    found = [(exchange(task, tokenizer, record), record) for record in records(source, task.documents)]
    counts["read"] += len(found)
    counts["empty"] += sum(told is None for told, _ in found)
    return [(told, record) for told, record in found if told is not None]


def _samples(task: Any, tokenizer: Any, read: Read, counts: Counter, ends: set[int]) -> list[Sample]:
    """In tokens; what is too long is dropped or cut, and counted."""
    found, rest = [], iter(read)
    while some := list(islice(rest, AT_ONCE)):
        told = tokens(task, tokenizer, [pair[0] for pair in some])
        for (prompt, response), (_, record) in zip(told, some, strict=True):
            if not len(prompt) or len(prompt) > task.max_prompt:
                counts["long" if len(prompt) else "empty"] += 1
                continue
            if len(response) > task.max_response:
                counts["cut"] += 1
                response = response[: task.max_response]
            else:
                ends.add(int(response[-1]))
            found.append(Sample(prompt, response, record))
    return found


def tokens(task: Any, tokenizer: Any, told: Iterable[Exchange]) -> list[tuple[Tensor, Tensor]]:
    """Ids of prompts and responses: those of the whole text, where no token reaches over the border."""
    told = list(told)
    first = prefix(task, tokenizer)
    prompts = ids_of(tokenizer, [t.prompt for t in told])
    responses = ids_of(tokenizer, [t.response for t in told])
    whole = ids_of(tokenizer, [t.prompt + t.response for t in told])
    found = []
    for prompt, response, both in zip(prompts, responses, whole, strict=True):
        if both[: len(prompt)] == prompt:
            response = both[len(prompt) :]
        found.append((torch.tensor([*first, *prompt]), torch.tensor(response)))
    return found


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def fill(tokenizer: Any) -> int:
    """Behind the mask: any token does."""
    return next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)


def prefix(task: Any, tokenizer: Any) -> list[int]:
    """The beginning-of-text token, where the tokenizer puts one before a text and no chat template does."""
    bos = tokenizer.bos_token_id
    return [bos] if task.template != "chat" and tokenizer("a")["input_ids"][:1] == [bos] else []


@lru_cache(maxsize=4)
def known(task: Any, tokenizer: Any) -> dict[tuple[int, ...], list[Sample]]:
    """The samples by the tokens of their prompt."""
    table: dict[tuple[int, ...], list[Sample]] = {}
    for sample in (*split(task, tokenizer).train, *split(task, tokenizer).held_out):
        table.setdefault(tuple(sample.prompt.tolist()), []).append(sample)
    return table


def found(task: Any, tokenizer: Any, row: list[int], begin: int | None) -> tuple[list[Sample], int]:
    """(the samples whose prompt a row begins with, its length); the longest one where it is not known."""
    table = known(task, tokenizer)
    places = [begin] if begin is not None else range(min(len(row), task.max_prompt + 1), 0, -1)
    for place in places:
        if samples := table.get(tuple(row[:place])):
            return samples, place
    raise ValueError(f"a sequence begins with no prompt of {task.source}, so that its solution is not known")


def check_ended(task: Any, tokenizer: Any, prompts: list[Tensor]) -> None:
    """Raise where a prompt of the data is followed by one id again and again, that is, by padding."""
    table = known(task, tokenizer)
    for row in (prompt.tolist() for prompt in prompts):
        places = range(len(row) - 1, 0, -1) if tuple(row) not in table else ()
        for place in takewhile(lambda n, row=row: row[n] == row[-1], places):
            if tuple(row[:place]) in table:
                raise ValueError(
                    f"a prompt is padded with the id {row[-1]}, which is read as text: pad with NOTHING, "
                    "as fdiv.tasks.padding.unanswered does"
                )


def until(response: list[int], ends: tuple[int, ...]) -> list[int]:
    """Up to the first of `ends`."""
    return next((response[:n] for n, token in enumerate(response) if token in ends), response)
