"""Margins between a label's score and the others, and their worst weighting over classes."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fdiv._divergence import FDivergence
from fdiv.methods.supervise._labels import of_label
from fdiv.operators.worst_case import WorstCase, worst_case

Scores = Literal["plain", "unit", "softplus"]


def worst(delta: Tensor, divergence: FDivergence, lam: float = 1.0) -> WorstCase:
    """max over p of <p, delta> - lam D(p, uniform), its value with a minus sign; delta [B, K]."""
    return worst_case(-delta, uniform(delta), divergence, lam)


def worst_under_cap(delta: Tensor, lam: float, top: int) -> Tensor:
    """max over p <= 1/top of <p, delta> - lam KL(p, uniform), [B].

    Some of the largest delta have p = 1/top; the rest of the mass is a softmax over the others.
    """
    classes = delta.shape[1]
    ordered = delta.sort(-1, descending=True).values / lam
    rest = ordered.flip(-1).logcumsumexp(-1).flip(-1)[:, :top]  # of all from here on
    capped = torch.arange(top, device=delta.device)  # how many have 1/top
    log_mass = (-capped.to(delta) / top).log1p()
    largest = log_mass - (rest - ordered[:, :top])  # log p of the first that has less
    first = (largest <= -math.log(top) + 1e-9).to(torch.int8).argmax(-1, keepdim=True)
    bound = (ordered.cumsum(-1) - ordered)[:, :top] - capped * math.log(classes / top)
    value = bound / top + log_mass.exp() * (rest - log_mass - math.log(classes))
    return lam * value.gather(-1, first).squeeze(-1)


def margins(scores: Tensor, labels: Tensor, margin: float) -> Tensor:
    """delta [B, K]: how far each class's score is above the label's, and the margin for the others."""
    if not bool(scores.detach().isfinite().all()):
        raise ValueError("the scores of all classes are finite; write a large negative one for -inf")
    others = torch.arange(scores.shape[1], device=scores.device) != labels.unsqueeze(-1)
    return scores - of_label(scores, labels).unsqueeze(-1) + margin * others.to(scores)


def prepared(logits: Tensor, scores: Scores) -> Tensor:
    if scores == "plain":
        return logits
    logits = softplus(logits) if scores == "softplus" else logits
    size = logits.abs().mean(-1, keepdim=True)
    return logits / torch.where(size > 0, size, 1.0)


def uniform(like: Tensor) -> Tensor:
    """log of the uniform distribution over the last dimension's places."""
    return like.new_full(like.shape[-1:], -math.log(like.shape[-1]))
