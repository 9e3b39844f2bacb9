"""The mean squared error: KL between unit Gaussians around target and prediction, twice."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv._math import in_working_precision
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens


@dataclass(frozen=True)
class SquaredError:
    """Mean over examples and outputs of (y - prediction)^2, the baseline of a regression."""

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "targets")
    divergence: ClassVar[Divergence] = KL()

    def __call__(self, *, logits: Tensor, targets: Tensor, count: Tensor | float | None = None) -> Out:
        """logits [B, K] the prediction, targets [B, K]; count: the examples of the global batch."""
        errors = residuals(logits, targets)
        loss = mean_over_tokens(errors.square().mean(-1), count=count)
        return Out(loss, {"rmse": root_mean_square(errors)})


def residuals(prediction: Tensor, targets: Tensor) -> Tensor:
    """prediction - targets, [B, K]; targets [B] are refused, for against [B, 1] they broadcast to [B, B]."""
    prediction, targets = in_working_precision(prediction, targets)
    if prediction.ndim != 2 or prediction.shape != targets.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and targets {tuple(targets.shape)} are both (N, outputs), "
            "(N, 1) of a single number; write targets.unsqueeze(-1)"
        )
    return prediction - targets


def root_mean_square(errors: Tensor) -> Tensor:
    """Of all entries, detached; 0 of none."""
    errors = errors.detach()
    return errors.square().mean().sqrt() if errors.numel() else torch.zeros((), device=errors.device)
