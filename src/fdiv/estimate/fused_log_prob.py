"""The log-probability of the tokens that were chosen, from hidden states and a head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.estimate._heads import Head, as_head
from fdiv.estimate._mask import among_zeros, kept_rows
from fdiv.estimate._programs import LogProb, RowLoss
from fdiv.estimate._stream import stream
from fdiv.kernels.worth import is_worth_compiling


class LogProbs(NamedTuple):
    """log q of the chosen token, and the entropy of q in nats; each [rows], with gradients."""

    log_prob: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class FusedLogProb:
    """log softmax(hidden weight')[index] and the entropy a row, never holding rows x vocab.

    Shapes: hidden [rows, width], weight [vocab, width] or a `Head`, index [rows] of token numbers -> [rows]
    twice. What preference losses and policy gradients read of a model. The logits are float32 (float64 for
    float64 inputs), made a chunk of rows at a time, and made again for the gradient.
    chunk, compiled: as in FusedLinear.
    """

    chunk: int | None = None
    compiled: bool | None = None

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"FusedLogProb(chunk) is a number of rows >= 1 or None, got {self.chunk!r}")

    def __call__(
        self, hidden: Tensor, weight: Tensor | Head, index: Tensor, mask: Tensor | None = None
    ) -> LogProbs:
        """Rows where `mask` [rows] is false are skipped and have values 0; their index is not read."""
        hidden, head, program, kept, rows = self._prepared(hidden, weight, index, mask)
        values = stream(program, [(hidden, head)], chunk=self.chunk)
        return LogProbs(*(among_zeros(value, kept, rows) for value in values))

    def loss(
        self,
        function: Callable[..., Tensor],
        hidden: Tensor,
        weight: Tensor | Head,
        index: Tensor,
        *evidence: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """function(log_prob, entropy, *evidence) a row, [rows], with its gradient taken in the forward pass.

        Three products in place of four, for a loss whose rows do not depend on each other: maximum
        likelihood, or a clipped policy gradient with advantages as `evidence` ([rows] each, no gradients).
        """
        if any(t.requires_grad or len(t) != len(hidden) for t in evidence):
            raise ValueError(f"evidence is [{len(hidden)}] each, one number a row, and gets no gradient")
        hidden, head, program, kept, rows = self._prepared(hidden, weight, index, mask)
        if kept is not None:
            evidence = tuple(t[kept] for t in evidence)
        (value,) = stream(RowLoss(function, evidence, program), [(hidden, head)], chunk=self.chunk)
        return among_zeros(value, kept, rows)

    def _prepared(self, hidden: Tensor, weight: Tensor | Head, index: Tensor, mask: Tensor | None):
        """The rows that count, their head and program, and what puts them back in place."""
        head = as_head(weight, "weight")
        if hidden.ndim != 2 or hidden.shape[-1] != head.weight.shape[-1]:
            raise ValueError(
                f"hidden is [rows, {head.weight.shape[-1]}], the width of the head, got {tuple(hidden.shape)}"
            )
        if index.shape != hidden.shape[:1] or index.dtype != torch.long:
            raise ValueError(
                f"index is int64 [{len(hidden)}], one token a row, got {index.dtype} {tuple(index.shape)}"
            )
        rows, kept = len(hidden), kept_rows(mask, len(hidden))
        if kept is not None:
            hidden, index = hidden[kept], index[kept]
        compiled = is_worth_compiling(self.compiled, len(hidden) * len(head.weight))
        return hidden, head, LogProb(index, head.group, compiled), kept, rows
