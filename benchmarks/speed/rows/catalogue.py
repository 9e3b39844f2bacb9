"""B10 and B11: a user's one line costs what a built-in costs, and every divergence what KL costs."""

import math
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

import fdiv
from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Target
from benchmarks.speed.heads import TINY, Shape, exact, heads
from fdiv import JS, KL, FDivergence, Generator, Pearson, ReverseKL

SHAPE = Shape(256, 256, 32000)

CATALOGUE: tuple[FDivergence, ...] = (
    KL(),
    ReverseKL(),
    fdiv.Jeffreys(),
    JS(0.5),
    fdiv.SkewKL(0.1),
    fdiv.SkewReverseKL(0.1),
    fdiv.Alpha(0.5),
    fdiv.Alpha(1.5),
    fdiv.SquaredHellinger(),
    Pearson(),
    fdiv.Neyman(),
    fdiv.TV(),
    fdiv.Triangular(),
    fdiv.SoftenedKL(),
    fdiv.SoftenedReverseKL(),
    fdiv.ChiKL(),
    0.8 * KL() + 0.2 * ReverseKL(),
)


def js(log_ratio: Tensor) -> Tensor:
    u = log_ratio.exp()
    return 0.5 * u * log_ratio - 0.5 * (u + 1) * (u.log1p() - math.log(2))


def pearson(log_ratio: Tensor) -> Tensor:
    return (log_ratio.exp() - 1).square()


def reverse_kl(log_ratio: Tensor) -> Tensor:
    return -log_ratio


ONE_LINERS: tuple[tuple[FDivergence, Callable[[Tensor], Tensor]], ...] = (
    (JS(0.5), js),
    (Pearson(), pearson),
    (ReverseKL(), reverse_kl),
)


def generic_cases(quick: bool) -> Iterator[Case]:
    # Nearer models than elsewhere: chi-square of two unrelated ones is a number of forty digits.
    shape = TINY if quick else SHAPE
    given = heads(shape, std=1.0)
    for built_in, f in ONE_LINERS:
        yield Case(
            rows="B10",
            setting=f"{built_in!r} float32 {shape}",
            candidates=(
                Candidate("built-in", partial(ours.fused_linear, built_in, given)),
                Candidate(
                    "Generator(f)",
                    partial(ours.fused_linear, Generator(f), given),
                    targets=(Target("B10", "time", at_most=1.1),),
                ),
            ),
            reference=partial(exact, built_in, given),
        )


def cases(quick: bool) -> Iterator[Case]:
    shape = TINY if quick else SHAPE
    given = heads(shape, std=1.0)
    yield Case(
        rows="B11",
        setting=f"every f-divergence, float32 {shape}",
        candidates=tuple(
            Candidate(
                repr(divergence),
                partial(ours.fused_linear, divergence, given),
                targets=() if divergence == KL() else (Target("B11", "time", at_most=1.15),),
                reference=partial(exact, divergence, given),
            )
            for divergence in CATALOGUE
        ),
    )
