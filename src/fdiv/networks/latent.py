"""A conditional variational autoencoder: an ensemble of predictions by draws of a latent variable."""

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import softplus

from fdiv.networks._network import Network, require_sizes

LEAST = 1e-3  # of a scale: a Gaussian must not become a point


@dataclass(frozen=True)
class Latent:
    """`latent` Gaussian coordinates between an encoder and a decoder of `layers` layers of `width` units.

    Stages: the encoded input, and the decoder's last layer at the prior's mean; that is what the network
    predicts when it is called. Draws are for `ensemble`.
    """

    width: int = 64
    layers: int = 2
    latent: int = 8

    def __post_init__(self):
        require_sizes(self, width=self.width, layers=self.layers, latent=self.latent)

    def build(self, shape: torch.Size, outputs: int) -> "LatentNetwork":
        return LatentNetwork(self, shape.numel(), outputs)


class LatentNetwork(Network):
    """prior(x) and posterior(x, y) over z, decode(x, z) and ensembles of it, under draws of the prior."""

    def __init__(self, sizes: Latent, inputs: int, outputs: int):
        width, latent = sizes.width, sizes.latent
        encoder = nn.Sequential(nn.Flatten(), *_hidden(inputs, width, sizes.layers))
        super().__init__([encoder, _Decoder(sizes)], width, outputs)
        self.of_posterior = nn.Sequential(*_hidden(width + outputs, width, 1), nn.Linear(width, 2 * latent))

    def prior(self, inputs: Tensor) -> Normal:
        """Over z [B, latent], of the inputs alone."""
        encoder, decoder = self._halves
        return _normal(decoder.of_prior(encoder(inputs)))

    def posterior(self, inputs: Tensor, targets: Tensor) -> Normal:
        """Over z [B, latent], of inputs and targets [B, outputs]."""
        return _normal(self.of_posterior(torch.cat([self.blocks[0](inputs), targets], -1)))

    def decode(self, inputs: Tensor, z: Tensor) -> Tensor:
        """The prediction [..., B, outputs] at z [..., B, latent]."""
        encoder, decoder = self._halves
        return self.head(decoder.at(encoder(inputs), z))

    def ensemble(self, inputs: Tensor, members: int) -> Tensor:
        """[members, B, outputs], drawn by torch's global generator."""
        return self.decode(inputs, self.prior(inputs).sample((members,)))

    @property
    def _halves(self) -> tuple[nn.Module, "_Decoder"]:
        return cast("tuple[nn.Module, _Decoder]", tuple(self.blocks))


class _Decoder(nn.Module):
    """From the encoded input and z; called without z, at the prior's mean."""

    def __init__(self, sizes: Latent):
        super().__init__()
        self.of_prior = nn.Linear(sizes.width, 2 * sizes.latent)
        self.layers = nn.Sequential(*_hidden(sizes.width + sizes.latent, sizes.width, sizes.layers))

    def forward(self, encoded: Tensor) -> Tensor:
        return self.at(encoded, _normal(self.of_prior(encoded)).mean)

    def at(self, encoded: Tensor, z: Tensor) -> Tensor:
        return self.layers(torch.cat([encoded.expand(*z.shape[:-1], -1), z], -1))


def _hidden(inputs: int, width: int, layers: int) -> list[nn.Module]:
    widths = [inputs] + [width] * layers
    return [m for n in pairwise(widths) for m in (nn.Linear(*n), nn.ReLU())]


def _normal(parameters: Tensor) -> Normal:
    mean, scale = parameters.chunk(2, -1)
    return Normal(mean, softplus(scale) + LEAST)
