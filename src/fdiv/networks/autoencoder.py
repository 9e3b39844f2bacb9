"""Autoencoders that predict as well: every layer of the encoder has one of the decoder to restore it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fdiv.networks._network import Network, require_sizes


@dataclass(frozen=True)
class Autoencoder:
    """`layers` hidden layers of `width` units down to `latent` features in (-1, 1), and up again.

    dropout: of the inputs and of each hidden layer of the encoder, in train mode: the noisy path; eval mode
    is the clean one. Every layer of the encoder is a stage. Inputs of any shape, flattened.
    """

    width: int = 128
    layers: int = 2
    latent: int = 10
    dropout: float = 0.1

    def __post_init__(self):
        _check(self)

    def build(self, shape: torch.Size, outputs: int) -> "AutoencoderNetwork":
        widths = [shape.numel(), *[self.width] * self.layers, self.latent]
        down = [_layer(nn.Linear(*n), self.dropout) for n in pairwise(widths[:-1])]
        down[0] = nn.Sequential(nn.Flatten(), nn.Dropout(self.dropout), down[0])
        up = [_layer(nn.Linear(*n)) for n in pairwise(widths[:0:-1])]
        up.append(nn.Sequential(nn.Linear(widths[1], widths[0]), nn.Unflatten(1, shape)))
        features = nn.Sequential(nn.Linear(widths[-2], self.latent), nn.Tanh())
        return AutoencoderNetwork([*down, features], up, self.latent, outputs)


@dataclass(frozen=True)
class ConvAutoencoder:
    """The same for images: `layers` convolutions halve the sides, `width` channels, then twice as many."""

    width: int = 16
    layers: int = 2
    latent: int = 10
    dropout: float = 0.1

    def __post_init__(self):
        _check(self)

    def build(self, shape: torch.Size, outputs: int) -> "AutoencoderNetwork":
        if len(shape) != 3 or any(side % 2**self.layers for side in shape[1:]):
            raise ValueError(
                f"{self!r} halves the sides of images [channels, height, width] {self.layers} times, got "
                f"inputs of shape {tuple(shape)}; write fewer layers, or Autoencoder()"
            )
        channels = [shape[0]] + [self.width * 2**n for n in range(self.layers)]
        small = torch.Size([channels[-1], *(side // 2**self.layers for side in shape[1:])])
        down = [_layer(nn.Conv2d(*n, 3, stride=2, padding=1), self.dropout) for n in pairwise(channels)]
        down[0] = nn.Sequential(nn.Dropout(self.dropout), down[0])
        features = nn.Sequential(nn.Flatten(), nn.Linear(small.numel(), self.latent), nn.Tanh())
        up = [nn.Sequential(_layer(nn.Linear(self.latent, small.numel())), nn.Unflatten(1, small))]
        up += [_layer(_doubling(*n)) for n in pairwise(channels[:0:-1])]
        up.append(_doubling(channels[1], channels[0]))
        return AutoencoderNetwork([*down, features], up, self.latent, outputs)


class AutoencoderNetwork(Network):
    """`decode(features)` restores what each stage of the encoder was made from."""

    def __init__(self, down: Sequence[nn.Module], up: Sequence[nn.Module], latent: int, outputs: int):
        super().__init__(down, latent, outputs)
        self.decoder = nn.ModuleList(up)

    def decode(self, features: Tensor) -> list[Tensor]:
        """What features [B, latent] say of the inputs [B, ...] and of every stage but the last, in order."""
        restored = []
        for layer in self.decoder:
            features = layer(features)
            restored.append(features)
        return restored[::-1]


def _layer(linear: nn.Module, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(linear, nn.LeakyReLU(0.01), *([nn.Dropout(dropout)] if dropout else []))


def _doubling(channels: int, fewer: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, fewer, 4, stride=2, padding=1)


def _check(spec: Autoencoder | ConvAutoencoder) -> None:
    require_sizes(spec, width=spec.width, layers=spec.layers, latent=spec.latent)
    if not 0 <= spec.dropout < 1:
        raise ValueError(
            f"{type(spec).__name__}(dropout) is a share of the units, in [0, 1), got {spec.dropout!r}"
        )
