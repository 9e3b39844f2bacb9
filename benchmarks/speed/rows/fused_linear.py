"""B1-B4: a whole fused step in float32, hidden states to loss and both gradients, beside everybody."""

from collections.abc import Iterator

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Target
from benchmarks.speed.floor import bare_products
from benchmarks.speed.heads import TINY, Heads, Shape, exact, heads
from benchmarks.speed.peers import peer
from fdiv import JS, KL, FDivergence, ReverseKL

JS_SHAPES = [Shape(512, width, 32000) for width in (256, 512, 1024)] + [Shape(192, 256, 151936)]
KL_SHAPE = Shape(512, 256, 32000)


def cases(quick: bool) -> Iterator[Case]:
    for shape in [TINY] if quick else JS_SHAPES:
        yield _case(JS(0.5), shape)
    for divergence in (KL(),) if quick else (KL(), ReverseKL()):
        yield _case(divergence, TINY if quick else KL_SHAPE)


def _case(divergence: FDivergence, shape: Shape) -> Case:
    given = heads(shape)
    return Case(
        rows="B1-B4",
        setting=f"{divergence!r} float32 {shape}",
        candidates=_candidates(divergence, given, shape),
        reference=lambda: exact(divergence, given),
        floor="bare products",
    )


def _candidates(divergence: FDivergence, given: Heads, shape: Shape) -> tuple[Candidate, ...]:
    promised = divergence == JS(0.5) and shape.rows == 512
    near_floor = 0.85 if shape.width >= 512 else 0.65

    def target(row: str, at_least: float) -> tuple[Target, ...]:
        return (Target(row, "time", at_least),) if promised else ()

    return (
        Candidate("fdiv FusedLinear", lambda: ours.fused_linear(divergence, given)),
        Candidate(
            "TRL ChunkedDivergence",
            peer("trl", "chunked_divergence", divergence, given),
            targets=target("B1", 3.0),
        ),
        Candidate("TRL GKD loss", peer("trl", "gkd", divergence, given), targets=target("B2", 2.0)),
        Candidate("Liger JSD", peer("liger", "fused_linear_jsd", divergence, given)),
        Candidate(
            "Liger JSD compiled",
            peer("liger", "fused_linear_jsd", divergence, given, compiled=True),
            targets=target("B3", 1.0),
        ),
        Candidate(
            "torch log_softmax + kl_div",
            peer("torch_composites", "log_softmax_and_kl_div", divergence, given),
        ),
        Candidate(
            "bare products",
            lambda: bare_products(given),
            targets=(Target("B4", "time", near_floor),) if divergence == JS(0.5) else (),
        ),
    )
