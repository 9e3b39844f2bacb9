"""What the losses on scores and labels agree on."""

import torch
from torch import Tensor

from fdiv._math import in_working_precision


def scores_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits [B, C] in working precision; raises unless labels [B] are numbers of their columns."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits are [examples, classes >= 2], got {tuple(logits.shape)}")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {len(logits)} int64 numbers of classes, got {labels.dtype} {tuple(labels.shape)}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels are from 0 to {logits.shape[1] - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    return in_working_precision(logits)[0]


def of_label(rows: Tensor, labels: Tensor) -> Tensor:
    """The entry of each row [B, C] that is its label's, [B]."""
    return rows.gather(1, labels.unsqueeze(1)).squeeze(1)
