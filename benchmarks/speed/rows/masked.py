"""B8: a quarter, a half and all of the tokens valid. Prompts and padding should cost nothing."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Target
from benchmarks.speed.heads import TINY, Heads, Shape, exact, heads
from benchmarks.speed.peers import peer
from fdiv import JS

SHAPE = Shape(512, 256, 32000)
OVERHEAD = 0.10  # of the time for all rows
DIVERGENCE = JS(0.5)


def cases(quick: bool) -> Iterator[Case]:
    shape = TINY if quick else SHAPE
    given = heads(shape)
    for share in (0.25, 0.5, 1.0):
        order = torch.randperm(shape.rows, generator=torch.Generator().manual_seed(0))
        yield _case(given, shape, order < share * shape.rows, share)


def _case(given: Heads, shape: Shape, valid: Tensor, share: float) -> Case:
    everything = Candidate(
        "fdiv FusedLinear, every row valid",
        lambda: ours.fused_linear(DIVERGENCE, given),
        reference=lambda: exact(DIVERGENCE, given),
        targets=(Target("B8", "time", at_least=round(1 / (share + OVERHEAD), 2)),),
    )
    return Case(
        rows="B8",
        setting=f"{DIVERGENCE!r} float32 {shape}, {share:.0%} of rows valid",
        candidates=(
            Candidate("fdiv FusedLinear", lambda: ours.fused_linear(DIVERGENCE, given, valid)),
            *([everything] if share < 1 else []),
            Candidate(
                "TRL ChunkedDivergence",
                peer("trl", "chunked_divergence", DIVERGENCE, given, valid),
                note="compacts masked rows on a GPU only",
            ),
            Candidate("TRL GKD loss", peer("trl", "gkd", DIVERGENCE, given, valid)),
            Candidate(
                "Liger JSD compiled",
                peer("liger", "fused_linear_jsd", DIVERGENCE, given, valid, compiled=True),
            ),
        ),
        reference=lambda: exact(DIVERGENCE, given, valid),
    )
