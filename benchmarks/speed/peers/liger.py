"""Liger's chunked Jensen-Shannon loss, whose gradient is made in the forward pass."""

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torch import Tensor

from benchmarks.speed.case import Outcome
from benchmarks.speed.heads import Heads, differentiate
from benchmarks.speed.peers import beta_of
from fdiv import FDivergence

CHUNK = 256  # its default of 1024 takes more time and memory at these sizes


def fused_linear_jsd(
    divergence: FDivergence, given: Heads, valid: Tensor | None = None, compiled: bool = False
) -> Outcome:
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta_of(divergence),
        compiled=compiled,
        chunk_size=CHUNK,
    )
    labels = torch.zeros(len(given.q_hidden), dtype=torch.long)
    if valid is not None:
        labels[~valid] = -100
    value = loss(given.q_hidden, given.q_weight, given.p_hidden, given.p_weight, labels)
    return differentiate(value, given.trained)
