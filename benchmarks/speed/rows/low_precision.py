"""B5 and B6: the same step on bfloat16 hidden states and heads, where the error tells methods apart."""

from collections.abc import Iterator

import torch

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Target
from benchmarks.speed.floor import bare_products
from benchmarks.speed.heads import TINY, Shape, exact, heads
from benchmarks.speed.peers import peer
from fdiv import JS

SHAPES = [Shape(256, 512, 32000), Shape(512, 1024, 32000)]
DIVERGENCE = JS(0.5)


def cases(quick: bool) -> Iterator[Case]:
    for shape in [TINY] if quick else SHAPES:
        yield _case(shape)


def _case(shape: Shape) -> Case:
    given = heads(shape, torch.bfloat16)
    return Case(
        rows="B5-B6",
        setting=f"{DIVERGENCE!r} bfloat16 {shape}",
        candidates=(
            Candidate(
                "fdiv FusedLinear",
                lambda: ours.fused_linear(DIVERGENCE, given),
                targets=(Target("B6", "gradient error", at_most=3e-3),),
            ),
            Candidate(
                "TRL ChunkedDivergence",
                peer("trl", "chunked_divergence", DIVERGENCE, given),
                targets=(Target("B5", "time", at_least=3.5),),
            ),
            Candidate("TRL GKD loss", peer("trl", "gkd", DIVERGENCE, given)),
            Candidate("TRL GKD loss, logits.float()", peer("trl", "gkd", DIVERGENCE, given, upcast=True)),
            Candidate("Liger JSD", peer("liger", "fused_linear_jsd", DIVERGENCE, given)),
            Candidate(
                "Liger JSD compiled", peer("liger", "fused_linear_jsd", DIVERGENCE, given, compiled=True)
            ),
            Candidate("bare products", lambda: bare_products(given)),
        ),
        reference=lambda: exact(DIVERGENCE, given),
        floor="bare products",
    )
