"""A perceptron with hidden layers."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from fdiv.networks._network import Network, require_sizes


@dataclass(frozen=True)
class MLP:
    """`layers` hidden layers of `width` units with ReLU; each is a stage. Inputs of any shape, flattened."""

    width: int = 64
    layers: int = 2
    dropout: float = 0.0

    def __post_init__(self):
        require_sizes(self, width=self.width, layers=self.layers)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"MLP(dropout) is a share of the units, in [0, 1), got {self.dropout!r}")

    def build(self, shape: torch.Size, outputs: int) -> Network:
        widths = [shape.numel()] + [self.width] * self.layers
        return Network([self._layer(n) for n in pairwise(widths)], self.width, outputs)

    def _layer(self, widths: tuple[int, int]) -> nn.Module:
        layer = [nn.Flatten(), nn.Linear(*widths), nn.ReLU()]
        return nn.Sequential(*layer, *([nn.Dropout(self.dropout)] if self.dropout else []))
