"""Numbers for TRL's logs: means over all processes."""

from typing import Any

import torch
from torch import Tensor


def log_of(trainer: Any) -> dict[str, list[float]]:
    """The lists that TRL's `log` will average and empty."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


def masked_mean(accelerator: Any, values: Tensor, mask: Tensor) -> float:
    """The mean of `values` where `mask` is true, over the tokens of all processes; 0 without any."""
    values, mask = values.detach().float(), mask.bool()
    total, count = accelerator.reduce(torch.stack([values[mask].sum(), mask.sum().float()]), "sum").tolist()
    return total / max(count, 1.0)


def mean(accelerator: Any, value: Tensor) -> float:
    """The mean of one number a process."""
    return accelerator.reduce(value.detach().float(), "mean").item()
