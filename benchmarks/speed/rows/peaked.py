"""B17: peaked rows are full of subnormal numbers, which must not slow a step down."""

from collections.abc import Iterator
from functools import partial

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Target
from benchmarks.speed.heads import TINY, Shape, exact, heads
from fdiv import JS, KL

SHAPE = Shape(256, 256, 32000)
FLAT, PEAKED = 3.0, 25.0


def cases(quick: bool) -> Iterator[Case]:
    shape = TINY if quick else SHAPE
    flat, peaked = heads(shape, std=FLAT), heads(shape, std=PEAKED)
    for divergence in (KL(), JS(0.5)):
        yield Case(
            rows="B17",
            setting=f"{divergence!r} float32 {shape}",
            candidates=(
                Candidate(
                    f"logits of std {FLAT:g}",
                    partial(ours.fused_linear, divergence, flat),
                    reference=partial(exact, divergence, flat),
                ),
                Candidate(
                    f"logits of std {PEAKED:g}",
                    partial(ours.fused_linear, divergence, peaked),
                    reference=partial(exact, divergence, peaked),
                    targets=(Target("B17", "time", at_most=1.2),),
                ),
            ),
        )
