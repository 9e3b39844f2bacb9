"""f' of any f-divergence on a grid of log-ratios: looked up both ways, and inverted to a cell."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence

STEP = 0.125  # two Newton steps from anywhere in a cell reach a relative 1e-6
END = {torch.float32: 120.0, torch.float64: 760.0}  # beyond, e^-|log-ratio| is 0


class Slopes(NamedTuple):
    log_ratio: Tensor  # [points], rising
    slope: Tensor  # [points], not falling

    def at(self, log_ratio: Tensor) -> Tensor:
        """f', linear between the points and constant beyond them."""
        return _interpolated(self.log_ratio, self.slope, log_ratio)

    def inverse(self, slope: Tensor) -> Tensor:
        return _interpolated(self.slope, self.log_ratio, slope)

    def cell(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The log-ratios between which f' takes this value."""
        above = torch.searchsorted(self.slope, slope).clamp(1, len(self.slope) - 1)
        return self.log_ratio[above - 1], self.log_ratio[above]


@lru_cache(maxsize=256)
def slopes_of(divergence: FDivergence, dtype: torch.dtype, device: torch.device) -> Slopes:
    end = END[dtype]
    log_ratio = torch.arange(-end, end + STEP, STEP, dtype=dtype, device=device)
    return Slopes(log_ratio, divergence.phi(log_ratio).cummax(0).values)


def _interpolated(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    above = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    left, width = x[above - 1], x[above] - x[above - 1]
    share = torch.where(width > 0, (at - left) / width, 0.5).clamp(0.0, 1.0)
    return torch.lerp(y[above - 1], y[above], share)
