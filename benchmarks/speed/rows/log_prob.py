"""B12: log-probability of a sampled token and the entropy of its row, with both gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Outcome, Target
from benchmarks.speed.floor import student_products
from benchmarks.speed.heads import ROWS_AT_ONCE, TINY, Heads, Shape, heads
from benchmarks.speed.peers import peer

SHAPE = Shape(512, 256, 32000)
ENTROPY_WEIGHT = 0.1


def cases(quick: bool) -> Iterator[Case]:
    shape = TINY if quick else SHAPE
    given = heads(shape)
    index = torch.randint(shape.vocab, (shape.rows,), generator=torch.Generator().manual_seed(1))
    work = (given, index, ENTROPY_WEIGHT)
    yield Case(
        rows="B12",
        setting=f"log-probability and entropy, float32 {shape}",
        candidates=(
            Candidate("fdiv FusedLogProb.loss", lambda: ours.fused_log_prob_loss(*work)),
            Candidate("fdiv FusedLogProb", lambda: ours.fused_log_prob(*work)),
            Candidate(
                "TRL ChunkedLogProb",
                peer("trl", "chunked_log_prob", *work),
                targets=(Target("B12", "time", at_least=1.7),),
            ),
            Candidate(
                "TRL selective_log_softmax + entropy",
                peer("trl", "selected_log_prob", *work),
                targets=(Target("B12", "time", at_least=1.7),),
            ),
            Candidate("torch log_softmax + gather", peer("torch_composites", "gathered_log_prob", *work)),
            Candidate("bare products", lambda: student_products(given)),
        ),
        reference=lambda: _exact(*work),
        floor="bare products",
    )


def _exact(given: Heads, index: Tensor, entropy_weight: float) -> Outcome:
    hidden, weight = (t.detach().double().requires_grad_() for t in (given.q_hidden, given.q_weight))
    total = torch.zeros((), dtype=torch.float64)
    for some in torch.arange(len(hidden)).split(ROWS_AT_ONCE):
        log_q = (hidden[some] @ weight.T).log_softmax(-1)
        log_prob = log_q.gather(-1, index[some].unsqueeze(-1)).sum()
        part = (-log_prob + entropy_weight * (log_q.exp() * log_q).sum()) / len(hidden)
        part.backward()
        total += part.detach()
    return Outcome(total, tuple(t.grad for t in (hidden, weight) if t.grad is not None))
