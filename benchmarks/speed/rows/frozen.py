"""B9: the student's head takes no gradient (LoRA), so one of the four products is not needed."""

from collections.abc import Iterator

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Target
from benchmarks.speed.floor import bare_products
from benchmarks.speed.heads import TINY, Shape, exact, heads
from benchmarks.speed.peers import peer
from fdiv import JS

SHAPE = Shape(256, 256, 32000)
DIVERGENCE = JS(0.5)


def cases(quick: bool) -> Iterator[Case]:
    shape = TINY if quick else SHAPE
    given = heads(shape, frozen=True)
    yield Case(
        rows="B9",
        setting=f"{DIVERGENCE!r} float32 {shape}, frozen head",
        candidates=(
            Candidate("fdiv FusedLinear", lambda: ours.fused_linear(DIVERGENCE, given)),
            Candidate(
                "TRL ChunkedDivergence",
                peer("trl", "chunked_divergence", DIVERGENCE, given),
                targets=(Target("B9", "time", at_least=5.0),),
            ),
            Candidate("TRL GKD loss", peer("trl", "gkd", DIVERGENCE, given)),
            Candidate(
                "Liger JSD compiled",
                peer("liger", "fused_linear_jsd", DIVERGENCE, given, compiled=True),
                note="makes the head's gradient all the same",
            ),
            Candidate("bare products", lambda: bare_products(given)),
        ),
        reference=lambda: exact(DIVERGENCE, given),
        floor="bare products",
    )
