"""A network whose one output is an energy that can be normalised."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fdiv.networks._network import Network, require_sizes


@dataclass(frozen=True)
class EnergyMLP:
    """A smooth perceptron of `layers` layers of `width` units, plus |x|^2 / (2 confined^2).

    The perceptron grows linearly at most, so that e^-E has a finite integral whatever the weights are.
    confined: the deviation of the Gaussian that is left far from all data; inf leaves it out.
    """

    width: int = 64
    layers: int = 2
    confined: float = 3.0

    def __post_init__(self):
        require_sizes(self, width=self.width, layers=self.layers)
        if not self.confined > 0:
            raise ValueError(f"confined is a standard deviation, > 0, got {self.confined!r}")

    def build(self, shape: torch.Size, outputs: int) -> "EnergyNetwork":
        if outputs != 1:
            raise ValueError(f"an energy is one number, and the task asks for {outputs}")
        widths = [shape.numel()] + [self.width] * self.layers
        blocks = [nn.Sequential(nn.Flatten(), nn.Linear(*n), nn.SiLU()) for n in pairwise(widths)]
        return EnergyNetwork(blocks, self.width, self.confined)


class EnergyNetwork(Network):
    def __init__(self, blocks: list[nn.Sequential], width: int, confined: float):
        super().__init__(blocks, width, 1)
        self.stiffness = 0.0 if math.isinf(confined) else 1 / confined**2

    def forward(self, inputs: Tensor) -> Tensor:
        far = inputs.flatten(1).square().sum(-1, keepdim=True)
        return super().forward(inputs) + self.stiffness / 2 * far
