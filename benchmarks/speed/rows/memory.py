"""B7: peak memory as the batch grows. Nothing is timed."""

from collections.abc import Iterator

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Target
from benchmarks.speed.heads import TINY, Heads, Shape, heads
from benchmarks.speed.peers import peer
from fdiv import JS

WIDTH, VOCAB = 128, 32000
ROWS = (512, 1024, 2048, 4096, 8192)
MANY = 2048  # from here on the fixed part of our memory is small beside a naive step's
DIVERGENCE = JS(0.5)


def cases(quick: bool) -> Iterator[Case]:
    fewest = TINY.rows // 2 if quick else ROWS[0]
    for shape in [TINY] if quick else [Shape(rows, WIDTH, VOCAB) for rows in ROWS]:
        yield _case(heads(shape), shape, fewest)


def _case(given: Heads, shape: Shape, fewest: int) -> Case:
    first = Heads(given.p_hidden[:fewest], given.p_weight, given.q_hidden[:fewest], given.q_weight)
    few = Candidate(
        f"fdiv FusedLinear, {fewest} rows",
        lambda: ours.fused_linear(DIVERGENCE, first),
        targets=(Target("B7", "memory", at_least=0.8),),  # flat: gradients alone grow with the rows
    )
    return Case(
        rows="B7",
        setting=f"{DIVERGENCE!r} float32 {shape}",
        candidates=(
            Candidate("fdiv FusedLinear", lambda: ours.fused_linear(DIVERGENCE, given)),
            *([few] if shape.rows > fewest else []),
            Candidate(
                "TRL GKD loss",
                peer("trl", "gkd", DIVERGENCE, given),
                targets=(Target("B7", "memory", at_least=30.0),) if shape.rows >= MANY else (),
            ),
            Candidate("TRL ChunkedDivergence", peer("trl", "chunked_divergence", DIVERGENCE, given)),
            Candidate(
                "Liger JSD compiled",
                peer("liger", "fused_linear_jsd", DIVERGENCE, given, compiled=True),
                targets=(Target("B7", "memory", at_least=2.0),),
            ),
        ),
        timed=False,
    )
