"""An exponential moving average of weights, for what is better evaluated a little behind its training."""

import torch
from torch import Tensor, nn


class Average:
    """a <- rate a + (1 - rate) w after each step; over the first steps the rate grows from 0.1.

    It follows the parameters that are trained, and none of the buffers.
    """

    def __init__(self, model: nn.Module, rate: float):
        self.model, self.rate = model, rate
        self.weights = {name: p.detach().clone() for name, p in self._trained()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After the step of this number, from 0."""
        rate = min(self.rate, (1 + step) / (10 + step))
        for name, weight in self._trained():
            self.weights[name].lerp_(weight, 1 - rate)

    @torch.no_grad()
    def settle(self) -> None:
        """The model gets the average."""
        for name, weight in self._trained():
            weight.copy_(self.weights[name])

    def restore(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            self.weights[name].copy_(tensor)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
