"""Both heads are known: logits are made, used and thrown away a chunk of rows at a time."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.estimate._estimator import Guarantee, Sees


@dataclass(frozen=True)
class FusedLinear:
    """D(softmax(p_hidden p_weight'), softmax(q_hidden q_weight')) a row, never holding rows x vocab.

    Shapes: p_hidden [rows, P], p_weight [vocab, P], q_hidden [rows, Q], q_weight [vocab, Q] -> [rows]; the
    two widths may differ. Logits and divergence are float32 (float64 for float64 inputs) whatever the
    hidden states are. At most `chunk` rows of logits live at a time, in the backward pass too, where they
    are computed again. Temperature: divide the hidden states by it.
    """

    sees: ClassVar[Sees] = "heads"
    evidence = ("p_hidden", "p_weight", "q_hidden", "q_weight")
    guarantee = Guarantee(bias="none", bound="exact", support="all atoms")

    chunk: int = 256

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"FusedLinear(chunk) is a number of rows >= 1, got {self.chunk!r}")

    def check(self, divergence: object) -> None:
        require_f_divergence(divergence, "FusedLinear()")

    def __call__(
        self,
        divergence: FDivergence,
        p_hidden: Tensor,
        p_weight: Tensor,
        q_hidden: Tensor,
        q_weight: Tensor,
    ) -> Tensor:
        self.check(divergence)
        _check_heads(p_hidden, p_weight, q_hidden, q_weight)
        # No row at all is one empty chunk: a micro-batch with every token masked keeps its graph.
        rows = [
            checkpoint(_rows, divergence, p, p_weight, q, q_weight, use_reentrant=False)
            for p, q in zip(p_hidden.split(self.chunk), q_hidden.split(self.chunk), strict=True)
        ]
        return torch.cat(rows)


def _rows(divergence: FDivergence, p_hidden, p_weight, q_hidden, q_weight) -> Tensor:
    return divergence(_log_softmax(p_hidden, p_weight), _log_softmax(q_hidden, q_weight))


def _log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    # Logits rounded to bfloat16 cost 10 to 20 % of the gradient: products of bf16 values are exact in
    # float32, so the product is taken there.
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.to(dtype) @ weight.to(dtype).T).log_softmax(-1)


def _check_heads(p_hidden: Tensor, p_weight: Tensor, q_hidden: Tensor, q_weight: Tensor) -> None:
    if p_hidden.ndim != 2 or q_hidden.ndim != 2 or len(p_hidden) != len(q_hidden):
        raise ValueError(
            f"hidden states are [rows, width] with one row count, got {tuple(p_hidden.shape)} and "
            f"{tuple(q_hidden.shape)}; select the valid tokens first, as hidden[mask]"
        )
    if len(p_weight) != len(q_weight):
        raise ValueError(
            f"the heads have {len(p_weight)} and {len(q_weight)} rows; slice padded heads to the "
            "tokenizer's size, as weight[:size]"
        )
