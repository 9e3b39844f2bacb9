"""fdiv's side, one function a kind of work."""

from typing import Any

import torch
from torch import Tensor

import fdiv
from benchmarks.speed.case import Outcome
from benchmarks.speed.heads import Heads, differentiate
from benchmarks.speed.measure import Absent
from fdiv import Alpha, FDivergence, FusedAtoms, FusedLinear, FusedLogProb, Sinkhorn, TopK
from fdiv.kernels.rows import Wants, rows


def fused_linear(
    divergence: FDivergence, given: Heads, valid: Tensor | None = None, compiled: bool | None = None
) -> Outcome:
    """The mean over the valid rows, or over all."""
    values = FusedLinear(compiled=compiled)(divergence, *given, mask=valid)
    return differentiate(values.mean() if valid is None else values.sum() / valid.sum(), given.trained)


def fused_log_prob(given: Heads, index: Tensor, entropy_weight: float) -> Outcome:
    out = FusedLogProb()(given.q_hidden, given.q_weight, index)
    return differentiate(-out.log_prob.mean() - entropy_weight * out.entropy.mean(), given.trained)


def fused_log_prob_loss(given: Heads, index: Tensor, entropy_weight: float) -> Outcome:
    """The same loss, known to be one of rows, so that its gradient is taken in the forward pass."""

    def loss(log_prob: Tensor, entropy: Tensor) -> Tensor:
        return -log_prob - entropy_weight * entropy

    rows = FusedLogProb().loss(loss, given.q_hidden, given.q_weight, index)
    return differentiate(rows.mean(), given.trained)


def fused_atoms(divergence: FDivergence, k: int, index: Tensor, log_p: Tensor, given: Heads) -> Outcome:
    values = FusedAtoms(TopK(k))(divergence, index, log_p, given.q_hidden, given.q_weight)
    return differentiate(values.mean(), given.trained)


def ours_from_logits(
    divergence: FDivergence, z_p: Tensor, z_q: Tensor, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Value a row and its gradient in z_q, from logits [rows, vocab]: what FusedLinear does of a chunk."""
    z_p, z_q = z_p.clone(), z_q.clone()  # which are used up
    done = rows(divergence, z_p, z_q, Wants(q_slope=True), compiled=compiled)
    assert done.q_slope is not None  # wanted
    return done.value, done.q_slope


def sinkhorn(x: Tensor, y: Tensor, blur: float, tolerance: float) -> Outcome:
    """With its gradient in x, if x asks for one."""
    value = Sinkhorn(blur, debias=False, tolerance=tolerance).between(x, y)
    return Outcome(value.detach(), torch.autograd.grad(value.sum(), x) if x.requires_grad else ())


def alpha_entmax(logits: Tensor, alpha: float) -> Outcome:
    """alpha-entmax is the f-softargmax of Alpha(alpha) against a mass of one on every atom."""
    return Outcome(landed("f_softargmax")(logits, Alpha(alpha)))


def landed(name: str) -> Any:
    """A name of fdiv's public surface, or the note that it is not there yet."""
    if not hasattr(fdiv, name):
        raise Absent(f"fdiv.{name} is not there yet")
    return getattr(fdiv, name)
