"""Preference data: a better and a worse response to each prompt.

Records hold `prompt`, the better response and the worse one, as text or as lists of turns; or two whole
conversations that differ in their last turn (messages="chosen", rejected="rejected").
"""

import warnings
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.tasks._task import Pairs, Text
from fdiv.tasks.conversations import exchange
from fdiv.tasks.measurement import likelihood
from fdiv.tasks.padding import answered
from fdiv.tasks.samples import Sample, fill, split, tokens

JUDGED = 256  # held-out pairs that an evaluation reads, at most


def some(task: Any, tokenizer: Any, count: int, generator: torch.Generator, held_out: bool) -> Pairs:
    """At most `count` pairs, in random order."""
    sides = both(task, tokenizer)[held_out]
    chosen = torch.randperm(len(sides), generator=generator)[:count].tolist()
    prompts = [sides[n][0].prompt for n in chosen]
    better, worse = [sides[n][0].response for n in chosen], [sides[n][1] for n in chosen]
    return Pairs(*(answered(prompts, side, fill(tokenizer)) for side in (better, worse)))


@lru_cache(maxsize=4)
def both(task: Any, tokenizer: Any) -> tuple[list[tuple[Sample, Tensor]], list[tuple[Sample, Tensor]]]:
    """(to train on, held out): each sample with the tokens of its other response."""
    if task.rejected is None:
        raise ValueError(
            f"{task!r} has one response to a prompt; write Instructions(..., response='chosen', "
            "rejected='rejected') with the fields of the better and the worse"
        )
    parts = split(task, tokenizer)
    counts: Counter = Counter()
    train, held = (_with_the_other(task, tokenizer, side, counts) for side in (parts.train, parts.held_out))
    if counts:
        warnings.warn(_said(task, counts), stacklevel=2)
    return train, held


def _said(task: Any, counts: Counter) -> str:
    causes = {
        "empty": f"dropped: no response in {task.rejected!r}",
        "cut": f"cut, and without their end: one in {task.rejected!r} longer than "
        f"max_response={task.max_response}",
    }
    found = [f"{counts[name]} {cause}" for name, cause in causes.items() if counts[name]]
    return f"of the samples of {task.source}, " + "; ".join(found)


def _with_the_other(
    task: Any, tokenizer: Any, samples: list[Sample], counts: Counter
) -> list[tuple[Sample, Tensor]]:
    field = {"messages": task.rejected} if task.messages else {"response": task.rejected}
    other = replace(task, rejected=None, **field)
    told = [exchange(other, tokenizer, sample.record) for sample in samples]
    kept = [(sample, text) for sample, text in zip(samples, told, strict=True) if text is not None]
    if not kept:
        raise ValueError(f"no record has a response in the field {task.rejected!r}")
    found = tokens(other, tokenizer, [text for _, text in kept])
    for (sample, _), (prompt, _) in zip(kept, found, strict=True):
        if prompt.tolist() != sample.prompt.tolist():
            raise ValueError(
                f"the two conversations of a record differ before their last turn: {sample.record!r:.300}"
            )
    long = sum(len(response) > task.max_response for _, response in found)
    counts.update({name: n for name, n in {"empty": len(samples) - len(kept), "cut": long}.items() if n})
    return [
        (sample, response[: task.max_response])
        for (sample, _), (_, response) in zip(kept, found, strict=True)
    ]


def judged(task: Any, model: CausalLM, reference: CausalLM, seed: int) -> dict[str, np.ndarray]:
    """Of held-out pairs, whether the model has raised the better response over the worse, [pairs]."""
    pairs = some(task, reference.tokenizer, JUDGED, torch.Generator().manual_seed(seed), held_out=True)
    (better, raised), (worse, lowered) = (_log_probs(model, reference, side) for side in pairs)
    return {
        "preference accuracy": (raised > lowered).astype(float),
        "likelihood accuracy": (better > worse).astype(float),
        "log-ratio margin": raised - lowered,
    }


def _log_probs(model: CausalLM, reference: CausalLM, text: Text) -> tuple[np.ndarray, np.ndarray]:
    """(log q, log q - log p) of whole responses."""
    log_q, log_p = (np.nansum(likelihood(m, text), 1) for m in (model, reference))
    return log_q, log_q - log_p
