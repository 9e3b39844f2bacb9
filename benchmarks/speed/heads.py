"""The problem that most rows share: hidden states and heads of a teacher and a student."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.case import Outcome
from fdiv import FDivergence

ROWS_AT_ONCE = 64  # of float64 logits


class Shape(NamedTuple):
    """Tokens, width of the hidden states, vocabulary."""

    rows: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.width} x {self.vocab}"


TINY = Shape(48, 32, 1024)  # for a smoke test


class Heads(NamedTuple):
    """The student's two take gradients, its head only if it is trained."""

    p_hidden: Tensor  # [rows, width]
    p_weight: Tensor  # [vocab, width]
    q_hidden: Tensor
    q_weight: Tensor

    @property
    def trained(self) -> list[Tensor]:
        return [t for t in (self.q_hidden, self.q_weight) if t.requires_grad]


def heads(shape: Shape, dtype: torch.dtype = torch.float32, std: float = 3.0, frozen: bool = False) -> Heads:
    """Two unrelated models whose logits are normal with standard deviation `std`."""
    generator = torch.Generator().manual_seed(0)
    scale = (std**2 / shape.width) ** 0.25
    sizes = [(shape.rows, shape.width), (shape.vocab, shape.width)] * 2
    p_hidden, p_weight, q_hidden, q_weight = (
        torch.randn(size, generator=generator).mul_(scale).to(dtype) for size in sizes
    )
    return Heads(p_hidden, p_weight, q_hidden.requires_grad_(), q_weight.requires_grad_(not frozen))


def differentiate(loss: Tensor, wanted: Sequence[Tensor]) -> Outcome:
    """The loss and its gradients in `wanted`, without the addition that a kept .grad would cost."""
    return Outcome(loss.detach(), torch.autograd.grad(loss, wanted))


def exact(divergence: FDivergence, given: Heads, valid: Tensor | None = None) -> Outcome:
    """Mean divergence over the (valid) rows and its gradients in float64, a few rows at a time."""
    rows = torch.arange(len(given.p_hidden)) if valid is None else valid.nonzero().squeeze(-1)
    double = Heads(*(t.detach().double().requires_grad_(t.requires_grad) for t in given))
    total = torch.zeros((), dtype=torch.float64)
    for some in rows.split(ROWS_AT_ONCE):
        log_p = (double.p_hidden[some] @ double.p_weight.T).log_softmax(-1)
        log_q = (double.q_hidden[some] @ double.q_weight.T).log_softmax(-1)
        part = divergence(log_p, log_q).sum() / len(rows)
        part.backward()
        total += part.detach()
    gradients = [t.grad for t in double.trained]
    return Outcome(total, tuple(g for g in gradients if g is not None))
