"""Decisions by chance."""

import torch
from torch import Tensor


class Draws:
    """Decisions by uniform numbers of a generator, one each, in float64: float32 has 2^24 of them."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self) -> float:
        device = self.generator.device
        return torch.rand((), generator=self.generator, dtype=torch.float64, device=device).item()

    def coin(self, chance: float) -> bool:
        return self.uniform() < chance

    def token(self, mass: Tensor) -> int:
        """An index drawn in proportion to `mass` [vocab] by inversion, never one whose mass is 0."""
        below = mass.cumsum(-1)
        level = self.uniform() * below[-1:]
        last = torch.searchsorted(below, below[-1:])  # with any mass: rounding may not lead beyond
        return int(torch.minimum(torch.searchsorted(below, level, right=True), last))
