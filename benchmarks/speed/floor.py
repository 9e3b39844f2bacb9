"""The least that a fused linear divergence has to do: its matrix products, in chunks of rows as ours."""

import torch
from torch import Tensor

from benchmarks.speed.case import Outcome
from benchmarks.speed.heads import Heads
from fdiv.estimate._heads import Head
from fdiv.estimate._stream import chunk_rows


@torch.no_grad()
def bare_products(given: Heads) -> Outcome:
    """Two projections, then the products for the gradients in the hidden states and in a trained head.

    The student's logits stand in for the gradient in them: the values do not matter to a matrix product.
    """
    chunk = min(len(given.p_hidden), chunk_rows(_models(given)))
    logits = given.p_hidden.new_empty(2, chunk, len(given.p_weight))
    hidden_gradient = torch.empty_like(given.q_hidden)
    weight_gradient = torch.zeros_like(given.q_weight) if given.q_weight.requires_grad else None
    for start in range(0, len(given.p_hidden), chunk):
        rows = slice(start, start + chunk)
        p, q = given.p_hidden[rows], given.q_hidden[rows]
        torch.mm(p, given.p_weight.T, out=logits[0, : len(p)])
        torch.mm(q, given.q_weight.T, out=logits[1, : len(p)])
        _gradients(logits[1, : len(p)], q, given.q_weight, hidden_gradient[rows], weight_gradient)
    return Outcome(logits.new_zeros(()), (hidden_gradient,))


@torch.no_grad()
def student_products(given: Heads) -> Outcome:
    """The student's projection and both gradients: what there is to do where no teacher runs."""
    chunk = min(len(given.q_hidden), chunk_rows(_models(given)[1:]))
    logits = given.q_hidden.new_empty(chunk, len(given.q_weight))
    hidden_gradient = torch.empty_like(given.q_hidden)
    weight_gradient = torch.zeros_like(given.q_weight)
    for start in range(0, len(given.q_hidden), chunk):
        rows = slice(start, start + chunk)
        q = given.q_hidden[rows]
        torch.mm(q, given.q_weight.T, out=logits[: len(q)])
        _gradients(logits[: len(q)], q, given.q_weight, hidden_gradient[rows], weight_gradient)
    return Outcome(logits.new_zeros(()), (hidden_gradient,))


def _models(given: Heads) -> list[tuple[Tensor, Head]]:
    return [(given.p_hidden, Head(given.p_weight)), (given.q_hidden, Head(given.q_weight))]


def _gradients(
    dz: Tensor, hidden: Tensor, weight: Tensor, to_hidden: Tensor, to_weight: Tensor | None
) -> None:
    torch.mm(dz, weight, out=to_hidden)
    if to_weight is not None:
        torch.addmm(to_weight, dz.T, hidden, out=to_weight)
