"""What methods for classifiers share: rows of classes, and what is refused."""

import math

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import in_working_precision


def tempered(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the classes, [B, C], in single precision at least."""
    (logits,) = in_working_precision(logits)
    return (logits / temperature).log_softmax(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log of each label's probability, [B]."""
    return -of_label(tempered(logits), labels)


def of_label(rows: Tensor, labels: Tensor) -> Tensor:
    """The entry of each row's label, [B, C] -> [B]."""
    return rows.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def but_label(rows: Tensor, labels: Tensor) -> Tensor:
    """The entries of all other classes in their order, [B, C] -> [B, C - 1]."""
    classes = torch.arange(rows.shape[-1], device=rows.device)
    return rows[classes != labels.unsqueeze(-1)].view(len(rows), len(classes) - 1)


def require_finite(rows: Tensor, divergence: FDivergence) -> Tensor:
    """The rows [B], unless one is infinite: an infinite loss has no gradient to go on with."""
    broken = int((~rows.detach().isfinite()).sum())
    if broken:
        raise ValueError(
            f"{divergence!r} is infinite at {broken} of {rows.numel()} rows: one model gives next to no "
            "probability to what the other predicts; write a bounded divergence, such as JS(0.5), or KL()"
        )
    return rows


def require_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature divides the logits, a number > 0, got {temperature!r}")


def require_weights(**weights: float) -> None:
    """Raise unless each is a finite number >= 0."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} is a weight >= 0, got {weight!r}; 0 leaves its term out")
