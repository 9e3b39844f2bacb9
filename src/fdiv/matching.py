"""Matching a target distribution in Python, without a recipe.

    target = Target() * Accept() * Tilt(0.5)                 # base model x scorers
    model = match(task, base, target, JS(), steps=300)       # train towards it
    distance(task, base, target, model, KL())                # exactly, where answers can be enumerated
    draw(task, base, target, model, QuasiRejection(8.0))     # or approach it at inference

`constrain` finds the lambdas of a target that is told by the means of features. All of it is made of parts
that recipes name too: FDPG, the rollouts feed and the training loop.
"""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.adapters.transformers import CausalLM
from fdiv.feeds import feed_of
from fdiv.feeds._feed import READ_ROWS, READ_TOKENS, chunks, padded, sequence_of
from fdiv.methods.decode.quasi_rejection import QuasiRejection
from fdiv.methods.match.fdpg import FDPG
from fdiv.methods.match.gdc import Fit, fit
from fdiv.methods.match.target import Function, Target, features_of
from fdiv.parallel import World
from fdiv.recipe import ModelSpec, Recipe, Reference, TrainSpec
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text
from fdiv.tasks.prompting import rollouts, uniform
from fdiv.train import Run, optimise

MOST_ANSWERS = 100_000  # that a model's vocabulary can write to one prompt, where they are enumerated


def match(
    task: Any,
    base: CausalLM,
    target: Target,
    divergence: FDivergence | None = None,
    *,
    steps: int = 300,
    seed: int = 0,
    folder: str | Path | None = None,
    method: FDPG | None = None,
    **train: Any,
) -> CausalLM:
    """A copy of `base`, trained to lower the divergence from the target at each of the task's prompts.

    divergence: of FDPG, JS() by default; or give a whole `method`, into which target and divergence are put.
    train: keys of a recipe's `train` (batch_size, group_size, learning_rate, ...); the device is base's.
    folder: keeps the log and checkpoints, from which the same call goes on; without one nothing is kept.
    """
    method = replace(method or FDPG(), target=target)
    method = replace(method, divergence=divergence) if divergence is not None else method
    spec = TrainSpec(**{"steps": steps, "device": str(base.model.device)} | train)
    student = CausalLM(copy.deepcopy(base.model).requires_grad_(True), base.vocabulary, base.tokenizer)
    recipe = Recipe(  # what the log says of the run
        name="match",
        task=repr(task),
        reference=Reference(model=ModelSpec(path=type(base.model).__name__)),
        student="reference",
        method=repr(method),
        seeds=[seed],
        train=spec,
    )
    was_training = base.model.training
    base.model.eval()
    with tempfile.TemporaryDirectory(prefix="fdiv-match-") as scratch:
        place = Path(folder or scratch)
        feed = feed_of(method)(method, task, base, spec, seed, World.join(spec.device))
        trained = optimise(student, feed, spec, place, Run(recipe, seed, place))
    base.model.train(was_training)
    trained.model.eval()
    return trained


class Scored(NamedTuple):
    """Answers of a model, with log P and log q of each, [prompts, answers]."""

    text: Text
    log_target: Tensor
    log_proposal: Tensor


def scored(
    task: Any,
    base: CausalLM,
    target: Target,
    model: CausalLM,
    *,
    prompts: int = 64,
    answers: int = 64,
    seed: int = 0,
) -> Scored:
    """`answers` of the model to each of `prompts` prompts of the task: what diagnostics are made of."""
    text = rollouts(task, model, prompts, answers, torch.Generator().manual_seed(seed))
    log_target = target.log_score(answer_log_probs(base, text), *text, task)
    log_proposal = answer_log_probs(model, text)
    return Scored(text, *(t.reshape(prompts, answers) for t in (log_target, log_proposal)))


def constrain(
    task: Any,
    base: CausalLM,
    features: tuple[Function, ...],
    moments: tuple[float, ...],
    *,
    target: Target = Target(),
    prompts: int = 64,
    answers: int = 64,
    seed: int = 0,
    least_ess: float = 10.0,
) -> Fit:
    """The lambdas under which the features have these means, averaged over prompts.

    They bend `target`, the base model by default, into `target * Exponential(features, fit.lambdas)`, and are
    fitted to `answers` of the base model to each of `prompts` prompts.
    """
    text, log_target, log_base = scored(task, base, target, base, prompts=prompts, answers=answers, seed=seed)
    group = torch.arange(prompts).repeat_interleave(answers)
    values, log_weights = features_of(features, *text, task), (log_target - log_base).flatten()
    return fit(values, moments, log_weights=log_weights, group=group, least_ess=least_ess)


class Drawn(NamedTuple):
    """An accepted answer to each prompt, and the tries that it took, [prompts]."""

    text: Text
    tries: Tensor


def draw(
    task: Any,
    base: CausalLM,
    target: Target,
    model: CausalLM,
    rule: QuasiRejection,
    *,
    prompts: int | Text = 64,
    seed: int = 0,
    most: int = 1000,
) -> Drawn:
    """An answer to each prompt, of the task's or these, written by `model` again until one is accepted.

    Raises RuntimeError when a prompt has none after `most` tries.
    """
    generator = torch.Generator().manual_seed(seed)
    asked = task.prompts(prompts, generator) if isinstance(prompts, int) else prompts
    left, tries = torch.arange(len(asked.ids)), torch.zeros(len(asked.ids), dtype=torch.long)
    kept: list[tuple[Text, Tensor]] = []
    while len(left):
        if tries.max() == most:
            raise RuntimeError(
                f"{len(left)} of {len(tries)} prompts have no accepted answer after {most} tries: lower beta "
                f"{rule.beta:g}, let a model write that is nearer to the target, or raise most="
            )
        draws = uniform(len(left), task.answer_length, generator)
        text = task.answer(model, asked.rows(left), draws, Decoding())
        log_target = target.log_score(answer_log_probs(base, text), *text, task)
        coins = torch.rand(len(left), generator=generator, dtype=torch.float64)
        accepted = rule.accept(log_target, answer_log_probs(model, text), coins)
        tries[left] += 1
        kept.append((text.rows(accepted), left[accepted]))
        left = left[~accepted]
    order = torch.cat([rows for _, rows in kept]).argsort()
    return Drawn(padded([text for text, _ in kept]).rows(order), tries)


@torch.no_grad()
def distance(
    task: Any, base: CausalLM, target: Target, model: CausalLM, divergence: FDivergence, prompts: Tensor
) -> Tensor:
    """D(p, q) at each of these prompts, ids [N, S], exactly: [N]; nan where the target has no mass.

    For tasks whose answers all have `answer_length` tokens: whatever the vocabulary can write is summed over.
    """
    answers, log_base = enumerated(base, prompts, task.answer_length)
    ids = torch.cat([prompts.repeat_interleave(len(answers), 0), answers.repeat(len(prompts), 1)], 1)
    mask = (torch.arange(ids.shape[1]) >= prompts.shape[1]).expand_as(ids)
    log_p = target.log_score(log_base.flatten(), ids, mask, task).reshape(log_base.shape)
    log_z, (_, log_q) = log_p.logsumexp(1), enumerated(model, prompts, task.answer_length)
    told = log_z > -torch.inf
    found = divergence(log_p - torch.where(told, log_z, 0.0)[:, None], log_q)
    return torch.where(told, found, torch.nan)


@torch.no_grad()
def enumerated(model: CausalLM, prompts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(all answers of `length` tokens [A, length], log q of each to each prompt [N, A] in float64)."""
    if model.size**length > MOST_ANSWERS:
        raise ValueError(
            f"{model.size}^{length} answers are too many to enumerate; measure on samples, as "
            "QuasiRejection.diagnostics and FDPG's metric `divergence` do"
        )
    symbols = model.tokens(torch.arange(model.size)).cpu()
    answers, log_q = symbols.new_zeros(1, 0), torch.zeros(len(prompts), 1, dtype=torch.float64)
    for _ in range(length):
        known = torch.cat([prompts.repeat_interleave(len(answers), 0), answers.repeat(len(prompts), 1)], 1)
        ids = torch.cat([known, symbols[:1].expand(len(known), 1)], 1)
        mask = (torch.arange(ids.shape[1]) == known.shape[1]).expand_as(ids)
        rows = [model.log_softmax(*some).cpu().double() for some in chunks(Text(ids, mask), 4096, 65536)]
        log_q = log_q.reshape(-1, 1) + torch.cat(rows).log_softmax(-1)  # their sums are 1 in float32 only
        log_q = log_q.reshape(len(prompts), -1)
        answers = torch.cat(
            [answers.repeat_interleave(len(symbols), 0), symbols.repeat(len(answers))[:, None]], 1
        )
    return answers, log_q


@torch.no_grad()
def answer_log_probs(model: CausalLM, text: Text) -> Tensor:
    """log q of each answer as a whole, [N] float64 on the CPU."""
    sums = []
    for some in chunks(text, READ_ROWS, READ_TOKENS):
        rows = model.token_log_probs(*some).cpu().double()
        sums.append(rows.new_zeros(len(some.ids)).index_add(0, sequence_of(some.mask), rows))
    return torch.cat(sums)
