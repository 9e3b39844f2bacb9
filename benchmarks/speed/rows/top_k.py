"""B13: distillation from a cache of the teacher's 64 likeliest atoms, the rest being one tail atom."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Outcome, Target
from benchmarks.speed.floor import student_products
from benchmarks.speed.heads import ROWS_AT_ONCE, TINY, Heads, Shape, heads
from benchmarks.speed.peers import peer
from fdiv import JS, KL, FDivergence, TopK

SHAPE = Shape(512, 256, 32000)
K = 64


def cases(quick: bool) -> Iterator[Case]:
    shape = TINY if quick else SHAPE
    given = heads(shape)
    index, log_p = _cached(given)
    for divergence in (KL(), JS(0.5)):
        yield Case(
            rows="B13",
            setting=f"{divergence!r} on {K} atoms and a tail, float32 {shape}",
            candidates=(
                Candidate("fdiv FusedAtoms", partial(ours.fused_atoms, divergence, K, index, log_p, given)),
                Candidate(
                    "torch log_softmax + gather",
                    peer("torch_composites", "gathered_atoms", divergence, index, log_p, given),
                    targets=(
                        Target("B13", "time", at_least=1.4),
                        Target("B13", "memory", at_least=3.5),
                    ),
                ),
                Candidate("bare products", lambda: student_products(given)),
            ),
            reference=partial(_exact, divergence, index, log_p, given),
            floor="bare products",
        )


@torch.no_grad()
def _cached(given: Heads) -> tuple[Tensor, Tensor]:
    """Indices and log-probabilities [rows, K] of the teacher's likeliest atoms, a few rows at a time."""
    tops = [
        (hidden @ given.p_weight.T).log_softmax(-1).topk(K) for hidden in given.p_hidden.split(ROWS_AT_ONCE)
    ]
    return torch.cat([t.indices for t in tops]), torch.cat([t.values for t in tops])


def _exact(divergence: FDivergence, index: Tensor, log_p: Tensor, given: Heads) -> Outcome:
    hidden, weight = (t.detach().double().requires_grad_() for t in (given.q_hidden, given.q_weight))
    total = torch.zeros((), dtype=torch.float64)
    for some in torch.arange(len(hidden)).split(ROWS_AT_ONCE):
        log_q = (hidden[some] @ weight.T).log_softmax(-1).gather(-1, index[some])
        part = TopK.atoms(divergence, log_p[some].double(), log_q).value.sum() / len(hidden)
        part.backward()
        total += part.detach()
    return Outcome(total, tuple(t.grad for t in (hidden, weight) if t.grad is not None))
