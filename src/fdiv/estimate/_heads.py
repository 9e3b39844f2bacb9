"""The last layer of a language model, as the fused estimators see it."""

from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Head(NamedTuple):
    """logits = softcap tanh(scale (hidden weight' + bias) / softcap) / temperature; a bare weight is a head.

    weight [vocab, width], bias [vocab]. Without `softcap` the tanh is left out. A weight sharded by FSDP2 (a
    DTensor) is gathered for the call and its gradient averaged over the ranks, as FSDP2 does.
    `group`: the vocabulary is split over these ranks, in the order of their numbers; each rank passes its own
    columns and the same rows, and gets the whole value and the whole gradient of the hidden states.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    group: dist.ProcessGroup | None = None


def as_head(weight: "Tensor | Head", name: str) -> Head:
    """A Head of plain tensors, checked; `name` is the argument's."""
    head = weight if isinstance(weight, Head) else Head(weight)
    head = head._replace(weight=_gathered(head.weight), bias=_gathered(head.bias))
    if head.weight.ndim != 2:
        raise ValueError(f"{name} is [vocab, width], got {tuple(head.weight.shape)}")
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(
            f"the bias of {name} is [vocab] = [{len(head.weight)}], got {tuple(head.bias.shape)}"
        )
    for field in ("scale", "temperature", "softcap"):
        value = getattr(head, field)
        if value is not None and not value > 0:
            raise ValueError(f"the {field} of {name} is > 0, got {value!r}")
    return head


class _Average(torch.autograd.Function):
    """The identity, whose gradient is divided by a number of ranks."""

    @staticmethod
    def forward(ctx, tensor: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad / ctx.ranks, None


def _gathered(tensor: Tensor | None) -> Tensor | None:
    if type(tensor).__name__ != "DTensor":
        return tensor
    from torch.distributed.tensor import DTensor, Partial  # here, for it takes a second to import

    assert isinstance(tensor, DTensor)
    # Each rank has rows of its own, so gradients are summed; dividing first makes that FSDP2's average.
    mesh = tensor.device_mesh
    return _Average.apply(tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim), mesh.size())


TILE_BYTES = 2 << 20  # of a head, widened at one time


class Projection:
    """One model's rows on their way to logits, and a gradient's way back, for the length of a call.

    Products of bfloat16 numbers are taken and kept in float32, for logits rounded to bfloat16 cost 10 to 20 %
    of the gradient; the gradient itself is rounded for its two products.
    """

    def __init__(self, hidden: Tensor, head: Head, chunk: int, trains: bool):
        self.hidden, self.head, self.trains = hidden, head, trains
        narrow = torch.promote_types(hidden.dtype, head.weight.dtype)
        self.dtype = torch.promote_types(narrow, torch.float32)  # of the logits
        # Of the gradient's two products; float16 has not the range for that of a small probability.
        self.narrow = narrow if narrow == torch.bfloat16 else self.dtype
        self.on_cuda = hidden.is_cuda
        self.weight = head.weight.to(self.narrow)
        self.factor = head.scale if head.softcap else head.scale / head.temperature
        # One buffer for all chunks: fresh pages would cost as much as the exponentials.
        self.buffer = hidden.new_empty(min(chunk, len(hidden)), len(head.weight), dtype=self.dtype)
        self.cap_slope: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        """[rows, vocab], in a buffer that the next call overwrites."""
        hidden = self.hidden[rows]
        logits = self._product(hidden, self.buffer[: len(hidden)])
        if self.head.bias is not None:
            logits += self.head.bias.to(self.dtype)
        if self.factor != 1.0:
            logits *= self.factor
        if self.head.softcap:
            level = logits.div_(self.head.softcap).tanh_()
            self.cap_slope = (1 - level.square()).div_(self.head.temperature) if self.trains else None
            logits *= self.head.softcap / self.head.temperature
        return logits

    def pull(self, gradient: Tensor) -> Tensor:
        """From the gradient in the logits to that in hidden weight' + bias; `gradient` is used up."""
        if self.cap_slope is not None:
            gradient *= self.cap_slope
        if self.factor != 1.0:
            gradient *= self.factor
        return gradient.to(self.narrow)

    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        """[rows, width], of one chunk"""
        return (gradient @ self.weight).to(self.hidden.dtype)

    def weight_gradient(self, gradient: Tensor, rows: slice, total: Tensor | None) -> Tensor:
        """total + gradient' hidden [vocab, width]; `total` is used up. Summed in the logits' precision."""
        hidden = self.hidden[rows].to(self.narrow)
        if self.narrow == self.dtype and total is not None:
            return total.addmm_(gradient.T, hidden)
        if self.narrow != self.dtype and self.on_cuda:
            product = torch.mm(gradient.T, hidden, out_dtype=self.dtype)
        else:
            product = gradient.T @ hidden
        # The product of one chunk alone needs no sum, nor the pages of a wider tensor.
        return product if total is None else total.to(self.dtype).add_(product)

    def _product(self, hidden: Tensor, out: Tensor) -> Tensor:
        if self.narrow == self.dtype:
            return torch.mm(hidden.to(self.dtype), self.weight.T, out=out)
        if self.on_cuda:
            return out.copy_(torch.mm(hidden.to(self.narrow), self.weight.T, out_dtype=self.dtype))
        return self._tiled_product(hidden.to(self.dtype), out)

    def _tiled_product(self, hidden: Tensor, out: Tensor) -> Tensor:
        """CUDA multiplies bfloat16 into float32; a CPU wants operands of the result's type.

        They are widened a piece at a time, which is still in the cache when it is multiplied.
        """
        tile = hidden.new_empty(max(1, TILE_BYTES // (4 * max(1, hidden.shape[1]))), hidden.shape[1])
        with _bfloat16_units():
            for start in range(0, len(self.weight), len(tile)):
                part = self.weight[start : start + len(tile)]
                torch.mm(hidden, tile[: len(part)].copy_(part).T, out=out[:, start : start + len(part)])
        return out


@contextmanager
def _bfloat16_units():
    """Let float32 products run on a CPU's bfloat16 units, which is exact for operands that are bfloat16.

    The setting is global, so that it must not outlive the product: it would round other people's float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
