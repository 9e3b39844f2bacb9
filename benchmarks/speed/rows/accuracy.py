"""B16: how small a divergence may be before value and gradient are lost, from logits in float32."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed import ours
from benchmarks.speed.case import Candidate, Case, Outcome, Target
from benchmarks.speed.peers import peer
from fdiv import JS, KL, FDivergence, ReverseKL

ROWS, VOCAB, STD = 8, 32000, 3.0
RUNGS = range(0, -10, -1)  # KL is about 10^rung
LOSS_HOLDS_TO = -7  # float32 logits carry no better loss further down


def cases(quick: bool) -> Iterator[Case]:
    vocab, rungs = (1000, (0, -7)) if quick else (VOCAB, RUNGS)
    z_p, noise = torch.randn(2, ROWS, vocab, generator=torch.Generator().manual_seed(0))
    for divergence in (KL(), ReverseKL(), JS(0.5)):
        ladder = [_rung(divergence, STD * z_p, noise, rung, compiled=not quick) for rung in rungs]
        yield Case(
            rows="B16",
            setting=f"{divergence!r} from float32 logits, {ROWS} x {vocab}",
            candidates=tuple(candidate for rung in ladder for candidate in rung),
            timed=False,
            weighed=False,
        )


def _rung(divergence: FDivergence, z_p: Tensor, noise: Tensor, rung: int, compiled: bool) -> list[Candidate]:
    z_q = z_p + (2 * 10.0**rung) ** 0.5 * noise
    # in float64 of the same float32 logits
    reference = partial(_by_autograd, divergence, z_p.double(), z_q.double())
    loss = (Target("B16", "loss error", at_most=1e-5),) if rung >= LOSS_HOLDS_TO else ()
    targets = (*loss, Target("B16", "gradient error", at_most=1e-6))

    def own(name: str, compiled: bool) -> Candidate:
        step = partial(_ours, divergence, z_p, z_q, compiled)
        return Candidate(f"{name}, KL 1e{rung}", step, targets=targets, reference=reference)

    gkd = peer("trl", "gkd_from_logits", divergence, z_p, z_q)
    return [
        own("fdiv", compiled=False),
        *([own("fdiv compiled", compiled=True)] if compiled else []),
        Candidate(f"TRL GKD loss, KL 1e{rung}", gkd, reference=reference),
    ]


def _ours(divergence: FDivergence, z_p: Tensor, z_q: Tensor, compiled: bool) -> Outcome:
    value, gradient = ours.ours_from_logits(divergence, z_p, z_q, compiled)
    return Outcome(value.mean(), (gradient / len(value),))


def _by_autograd(divergence: FDivergence, z_p: Tensor, z_q: Tensor) -> Outcome:
    z_q = z_q.detach().requires_grad_()
    value = divergence(z_p.log_softmax(-1), z_q.log_softmax(-1)).mean()
    return Outcome(value.detach(), torch.autograd.grad(value, z_q))
