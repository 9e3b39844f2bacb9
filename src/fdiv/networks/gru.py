"""A recurrent network that reads an image row by row, or a signal place by place."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fdiv.networks._network import Network, require_places, require_sizes


@dataclass(frozen=True)
class GRU:
    """`layers` gated recurrent layers of `width` cells, each a stage; features: the last place's state.

    An image [channels, height, width] is `height` places of channels * width numbers, a signal [channels,
    length] is `length` places. dropout: of each layer's output.
    """

    width: int = 64
    layers: int = 1
    dropout: float = 0.0

    def __post_init__(self):
        require_sizes(self, width=self.width, layers=self.layers)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GRU(dropout) is a share of the cells, in [0, 1), got {self.dropout!r}")

    def build(self, shape: torch.Size, outputs: int) -> Network:
        require_places(shape, self)
        widths = [shape[0] * shape[2:].numel()] + [self.width] * self.layers
        layers = [_Layer(*w, self.dropout) for w in pairwise(widths)]
        return Network([nn.Sequential(_Places(), layers[0]), *layers[1:], _Last()], self.width, outputs)


class _Places(nn.Module):
    """[B, channels, places, ...] to [B, places, numbers]."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.transpose(1, 2).flatten(2)


class _Layer(nn.Module):
    def __init__(self, reads: int, width: int, dropout: float):
        super().__init__()
        self.cells = nn.GRU(reads, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, places: Tensor) -> Tensor:
        return self.dropout(self.cells(places)[0])


class _Last(nn.Module):
    def forward(self, places: Tensor) -> Tensor:
        return places[:, -1]
