"""B14: alpha-entmax, the sparse softmax, forward alone and with the gradient of a weighted sum."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Outcome, Target
from benchmarks.speed.peers import peer

ALPHA = 1.5
SETTINGS = [(64, 32000, 1.0), (64, 32000, 3.0), (32, 151936, 1.0), (32, 151936, 3.0)]
PARTIAL_SORT = 100
HALVINGS = 80


def cases(quick: bool) -> Iterator[Case]:
    for rows, vocab, std in [(8, 1000, 3.0)] if quick else SETTINGS:
        logits, weights = torch.randn(2, rows, vocab, generator=torch.Generator().manual_seed(0))
        setting = f"alpha {ALPHA} on {rows} x {vocab}, logits of std {std:g}"
        yield _case(logits * std, None, setting)
        yield _case((logits * std).requires_grad_(), weights, f"{setting}, and their gradient")


def _case(logits: Tensor, weights: Tensor | None, setting: str) -> Case:
    """weights: of the outputs in a sum whose gradient is taken too."""

    def step(forward: Callable[[], Outcome]) -> Callable[[], Outcome]:
        if weights is None:
            return forward
        return partial(_with_gradient, forward, logits, weights)

    return Case(
        rows="B14",
        setting=setting,
        candidates=(
            Candidate("fdiv f_softargmax", step(lambda: ours.alpha_entmax(logits, ALPHA))),
            Candidate(
                "entmax bisection, 50 steps",
                step(peer("entmax", "bisected_entmax", logits, ALPHA)),
                targets=(Target("B14", "time", at_least=25.0),),
            ),
            Candidate(
                f"entmax15, k={PARTIAL_SORT}",
                step(peer("entmax", "sorted_entmax15", logits, PARTIAL_SORT)),
                targets=(Target("B14", "time", at_least=1.2),),
            ),
            Candidate("entmax15, whole sort", step(peer("entmax", "sorted_entmax15", logits))),
            Candidate("softmax", step(lambda: Outcome(logits.softmax(-1)))),
        ),
        reference=partial(_exact, logits.detach().double(), weights),
        floor="softmax",
        repeat=3,
    )


def _with_gradient(forward: Callable[[], Outcome], logits: Tensor, weights: Tensor) -> Outcome:
    value = forward().value
    return Outcome(value.detach(), torch.autograd.grad(value, logits, weights))


def _exact(logits: Tensor, weights: Tensor | None = None) -> Outcome:
    """Halve the interval of the threshold t in p = [(alpha - 1) x - t]_+^(1 / (alpha - 1))."""
    scaled = (ALPHA - 1) * logits
    high = scaled.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_low = (scaled - middle).clamp(min=0).pow(1 / (ALPHA - 1)).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    p = (scaled - low).clamp(min=0).pow(1 / (ALPHA - 1))
    p = p / p.sum(-1, keepdim=True)
    if weights is None:
        return Outcome(p)
    slope = torch.where(p > 0, p.pow(2 - ALPHA), 0.0)  # dp_i/dx_i at a fixed threshold
    mean = (slope * weights).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
    return Outcome(p, (slope * (weights - mean),))
