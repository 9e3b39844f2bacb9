"""A transformer over patches of an image or a signal."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdiv.networks._network import Network, require_places, require_sizes


@dataclass(frozen=True)
class Transformer:
    """Patches of `patch` places a side, `layers` pre-norm encoder layers (each a stage), mean over tokens."""

    width: int = 32
    layers: int = 2
    heads: int = 4
    patch: int = 2

    def __post_init__(self):
        require_sizes(self, width=self.width, layers=self.layers, heads=self.heads, patch=self.patch)
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads cannot share a width of {self.width} evenly")

    def build(self, shape: torch.Size, outputs: int) -> Network:
        require_places(shape, self)
        if any(side % self.patch for side in shape[1:]):
            raise ValueError(
                f"patches of {self.patch} do not cover inputs of shape {tuple(shape)}; each side must be a "
                "multiple of the patch"
            )
        layers = [
            nn.TransformerEncoderLayer(
                self.width, self.heads, 2 * self.width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(self.layers)
        ]
        first = nn.Sequential(_Patches(shape, self.patch, self.width), layers[0])
        last = _Mean(self.width)
        return Network([first, *layers[1:], last], self.width, outputs)


class _Patches(nn.Module):
    """[B, channels, ...places] to tokens [B, T, width], with a learnt position each."""

    def __init__(self, shape: torch.Size, patch: int, width: int):
        super().__init__()
        kind = nn.Conv2d if len(shape) == 3 else nn.Conv1d
        self.patches = kind(shape[0], width, patch, stride=patch)
        places = torch.Size(side // patch for side in shape[1:]).numel()
        self.position = nn.Parameter(0.02 * torch.randn(places, width))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.patches(inputs).flatten(2).mT + self.position


class _Mean(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens).mean(1)
