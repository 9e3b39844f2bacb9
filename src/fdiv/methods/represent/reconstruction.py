"""A stacked denoising autoencoder: what DEPICT starts from, and its baseline."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.robust.attacks import evaluated


@dataclass(frozen=True)
class Reconstruction:
    """(x - x')^2 plus `hidden` times the same of each hidden layer, means over their places.

    x' and the layers are decoded from the noisy path, the network in train mode; what they are compared with
    is of the clean path, in eval mode, and its gradient counts as well. For unit Gaussians it is twice KL.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "network")
    divergence: ClassVar[Divergence] = KL()

    hidden: float = 0.1

    def __post_init__(self):
        if not (self.hidden >= 0 and math.isfinite(self.hidden)):
            raise ValueError(f"hidden is finite and >= 0, got {self.hidden!r}")

    def __call__(self, *, inputs: Tensor, network: Any, count: Tensor | float | None = None) -> Out:
        """inputs [B, ...]; the network states decode(features), see fdiv.networks.autoencoder."""
        rows = reconstruction(inputs, network.stages(inputs)[-1], network, self.hidden)
        metrics = {"reconstruction": rows.detach().mean()} if len(rows) else {}
        return Out(mean_over_tokens(rows, count=count), metrics)


def reconstruction(inputs: Tensor, noisy: Tensor, network: Any, hidden: float) -> Tensor:
    """The squared errors of what is decoded from noisy features, one number an example [B]."""
    if not hasattr(network, "decode"):
        raise TypeError(f"inputs are restored by a decoder, and {network!r} has none; write Autoencoder()")
    with evaluated(network):
        clean = [inputs, *network.stages(inputs)[:-1]]
    decoded = network.decode(noisy)
    first, *others = (_squares(a, b) for a, b in zip(clean, decoded, strict=True))
    return first + hidden * sum(others, start=torch.zeros_like(first))


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
