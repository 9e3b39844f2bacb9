"""Rows streamed through heads a chunk at a time: logits are made, used and thrown away.

One autograd function serves every fused estimator. What is computed of a chunk's logits is a `Program`; where
they come from and where their gradients go are `Projection`s. In units of one product rows x width x vocab a
call costs

    a projection for each head, and for each model that trains one product for its hidden states and one for
    its head: 4 with one trained model and its teacher, 3 where that head is frozen,

because the gradient is taken in the forward pass, while the logits are at hand. It is that of the *sum* of
the rows; if the gradient that arrives later is the same for all rows (a mean) it is scaled, and if it is not
the logits are made a second time, but for hidden states alone, whose gradients are scaled a row each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fdiv.estimate._heads import Head, Projection

# Bytes of logits, and of what is made of them, held at one time.
CPU_BYTES, CUDA_BYTES = 64 << 20, 2500 << 20


class Chunk(NamedTuple):
    """values: tensors [rows]; slopes: the gradient of their weighted sum in each model's logits, or None."""

    values: tuple[Tensor, ...]
    slopes: tuple[Tensor | None, ...]


class Program(Protocol):
    """What a fused estimator does with a chunk of logits, which it may use up."""

    outputs: int  # how many of the values have gradients; the others are statistics

    def __call__(
        self,
        logits: Sequence[Tensor],
        rows: slice,
        wants: Sequence[bool],
        upstream: tuple[Tensor, ...] | None,
        /,
    ) -> Chunk:
        """`logits`: [rows, vocab] of each model; `wants`: which need a slope; `upstream`: ones if None."""
        ...


@dataclass(frozen=True)
class Plan:
    """What the autograd function is told beside its tensors."""

    program: Program
    heads: tuple[Head, ...]
    chunk: int
    early: bool  # take the gradient in the forward pass


def stream(
    program: Program,
    models: Sequence[tuple[Tensor, Head]],
    *,
    chunk: int | None = None,
    early: bool = True,
) -> tuple[Tensor, ...]:
    """The values of all rows, each [rows]. `models`: (hidden [rows, width], head) of each."""
    chunk = chunk or chunk_rows(models)
    plan = Plan(program, tuple(head for _, head in models), chunk, early)
    tensors = [t for hidden, head in models for t in (hidden, head.weight, head.bias)]
    with torch.autocast(models[0][0].device.type, enabled=False):
        return _Stream.apply(plan, *tensors)


def chunk_rows(models: Sequence[tuple[Tensor, Head]]) -> int:
    """As many rows of all models' logits as fit the budget of the device."""
    hidden, head = models[-1]
    size = 8 if hidden.dtype == torch.float64 else 4
    per_row = size * len(models) * max(1, len(head.weight))
    budget = CUDA_BYTES if hidden.is_cuda else CPU_BYTES
    # At least 128: each chunk reads and writes the whole gradient of the head.
    return max(128, budget // per_row // 32 * 32)


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, *tensors: Tensor):
        needs = [tuple(ctx.needs_input_grad[1 + i : 4 + i]) for i in range(0, len(tensors), 3)]
        early = plan.early and plan.program.outputs == 1
        values, gradients = _run(plan, tensors, needs if early else [], None)
        ctx.plan, ctx.needs = plan, needs
        ctx.save_for_backward(*tensors)
        ctx.early = gradients if early else None
        ctx.mark_non_differentiable(*values[plan.program.outputs :])
        return values

    @staticmethod
    def backward(ctx, *upstream: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused estimators have no second derivative, which create_graph=True asks for; "
                "write Exact() and pass log-densities"
            )
        weights = tuple(upstream[: ctx.plan.program.outputs])
        early, ctx.early = ctx.early, None
        if early is None or not _scale(early, ctx.needs, weights[0]):
            _, early = _run(ctx.plan, ctx.saved_tensors, ctx.needs, weights)
        return None, *early


def _scale(gradients: list[Tensor | None], needs: list[tuple[bool, ...]], weights: Tensor) -> bool:
    """Weight gradients of a sum of rows, in place, by one number a row; False where that is impossible."""
    rows_alone = not any(weight or bias for _, weight, bias in needs)
    if rows_alone:
        for gradient in filter(torch.is_tensor, gradients):
            gradient *= weights.unsqueeze(-1).to(gradient.dtype)
        return True
    # A mean arrives as one number expanded (stride 0), which is known without looking at it.
    equal = len(weights) < 2 or weights.stride(0) == 0 or bool((weights == weights[0]).all())
    if equal and len(weights):
        for gradient in filter(torch.is_tensor, gradients):
            gradient *= weights[0].to(gradient.dtype)
    return equal


def _run(
    plan: Plan,
    tensors: Sequence[Tensor],
    needs: list[tuple[bool, ...]],
    upstream: tuple[Tensor, ...] | None,
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Stream all rows: their values, and the gradients that `needs` asks for, flat as the tensors are."""
    needs = needs or [(False, False, False)] * len(plan.heads)
    wants = [any(need) for need in needs]
    models = []
    for i, head in enumerate(plan.heads):
        hidden, weight, bias = tensors[3 * i : 3 * i + 3]
        head = head._replace(weight=weight, bias=bias)
        models.append(Projection(hidden, head, plan.chunk, wants[i]))
    sinks = [_Gradients(model, need) for model, need in zip(models, needs, strict=True)]
    parts = []
    # No row at all is one empty chunk, which knows the dtypes of the values.
    for start in range(0, max(1, len(tensors[0])), plan.chunk):
        rows = slice(start, start + plan.chunk)
        logits = [model.logits(rows) for model in models]
        weights = None if upstream is None else tuple(w[rows] for w in upstream)
        values, slopes = plan.program(logits, rows, wants, weights)
        parts.append(values)
        for sink, slope in zip(sinks, slopes, strict=True):
            if slope is not None:
                sink.add(slope, rows)
    values = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return values, [gradient for sink in sinks for gradient in sink.close()]


class _Gradients:
    """The gradients of one model's hidden states, weight and bias, as chunks come by."""

    def __init__(self, model: Projection, needs: tuple[bool, ...]):
        self.model, self.needs = model, needs
        self.hidden = torch.zeros_like(model.hidden) if needs[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, slope: Tensor, rows: slice) -> None:
        gradient = self.model.pull(slope)
        _, weight, bias = self.needs
        if self.hidden is not None:
            self.hidden[rows] = self.model.hidden_gradient(gradient)
        if weight:
            self.weight = self.model.weight_gradient(gradient, rows, self.weight)
        if bias:
            total = gradient.sum(0, dtype=self.model.dtype)
            self.bias = total if self.bias is None else self.bias.add_(total)

    def close(self) -> tuple[Tensor | None, ...]:
        """In the dtypes of the tensors, None where no gradient was asked for."""
        head = self.model.head
        if self.hidden is not None and head.group is not None:
            dist.all_reduce(self.hidden, group=head.group)  # each rank has the share of its columns
        weight = None if self.weight is None else self.weight.to(head.weight.dtype)
        bias = None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype)
        return self.hidden, weight, bias
