"""A convolutional network for images and signals."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from fdiv.networks._network import Network, require_places, require_sizes


@dataclass(frozen=True)
class CNN:
    """`blocks` times a convolution of 3 places, batch norm, ReLU and pooling by 2; then the mean over places.

    `width` channels after the first block, twice as many after each further one. Every block is a stage.
    """

    width: int = 16
    blocks: int = 2

    def __post_init__(self):
        require_sizes(self, width=self.width, blocks=self.blocks)

    def build(self, shape: torch.Size, outputs: int) -> Network:
        require_places(shape, self)
        if min(shape[1:]) < 2**self.blocks:
            raise ValueError(
                f"{self!r} halves its input {self.blocks} times, too often for inputs of shape {tuple(shape)}"
            )
        channels = [shape[0]] + [self.width * 2**n for n in range(self.blocks)]
        blocks = [_block(c, len(shape) == 3) for c in pairwise(channels)]
        return Network([*blocks, _Mean()], channels[-1], outputs)


def _block(channels: tuple[int, int], image: bool) -> nn.Module:
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d) if image else (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d)
    convolution, norm, pool = kinds
    return nn.Sequential(
        convolution(*channels, 3, padding=1, bias=False), norm(channels[1]), nn.ReLU(), pool(2)
    )


class _Mean(nn.Module):
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.flatten(2).mean(-1)
