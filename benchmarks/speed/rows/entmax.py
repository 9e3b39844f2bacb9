"""B14: alpha-entmax, the sparse softmax, forward only."""

from collections.abc import Iterator
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
        logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * std
        yield _case(logits, f"alpha {ALPHA} on {rows} x {vocab}, logits of std {std:g}")


def _case(logits: Tensor, setting: str) -> Case:
    return Case(
        rows="B14",
        setting=setting,
        candidates=(
            Candidate("fdiv f_softargmax", lambda: ours.alpha_entmax(logits, ALPHA)),
            Candidate(
                "entmax bisection, 50 steps",
                peer("entmax", "bisected_entmax", logits, ALPHA),
                targets=(Target("B14", "time", at_least=25.0),),
            ),
            Candidate(
                f"entmax15, k={PARTIAL_SORT}",
                peer("entmax", "sorted_entmax15", logits, PARTIAL_SORT),
                targets=(Target("B14", "time", at_least=1.2),),
            ),
            Candidate("entmax15, whole sort", peer("entmax", "sorted_entmax15", logits)),
            Candidate("softmax", lambda: Outcome(logits.softmax(-1))),
        ),
        reference=partial(_exact, logits.double()),
        floor="softmax",
        repeat=3,
    )


def _exact(logits: Tensor) -> Outcome:
    """Halve the interval of the threshold t in p = [(alpha - 1) x - t]_+^(1 / (alpha - 1))."""
    scaled = (ALPHA - 1) * logits
    high = scaled.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_low = (scaled - middle).clamp(min=0).pow(1 / (ALPHA - 1)).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    p = (scaled - low).clamp(min=0).pow(1 / (ALPHA - 1))
    return Outcome(p / p.sum(-1, keepdim=True))
