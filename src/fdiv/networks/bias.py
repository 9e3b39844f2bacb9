"""Forces that bias a path sampler towards a target state."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fdiv.networks._network import Network, require_sizes

FORMS = ("scale", "potential", "force")


@dataclass(frozen=True)
class BiasForce:
    """A perceptron with `layers` hidden layers of `width` units that reads places and distances to a target.

    form: "force", its outputs; "potential", minus the gradient of its one output; "scale", towards the
    target, times a positive output for each atom: the last never points away, and turns as the state is
    turned. timed: it also reads which share of the horizon is over. Otherwise the force depends on the place
    alone.
    """

    form: Literal["scale", "potential", "force"] = "scale"
    width: int = 64
    layers: int = 2
    timed: bool = False

    def __post_init__(self):
        require_sizes(self, width=self.width, layers=self.layers)
        if self.form not in FORMS:
            raise ValueError(f"form is 'scale', 'potential' or 'force', got {self.form!r}")

    def build(self, shape: torch.Size, outputs: int) -> "BiasNetwork":
        """For states of this shape, [dimensions] or [atoms, dimensions]; a force has as many numbers."""
        if outputs != torch.Size(shape).numel():
            raise ValueError(f"a force on states of shape {tuple(shape)} has as many numbers, not {outputs}")
        return BiasNetwork(self, torch.Size(shape))


@dataclass(frozen=True)
class Unbiased:
    """No force: the dynamics as they are, which a sampler starts from and is compared with."""

    def build(self, shape: torch.Size, outputs: int) -> "UnbiasedNetwork":
        return UnbiasedNetwork([], outputs, outputs)


class BiasNetwork(Network):
    """The force [..., *shape] at states [..., *shape]; target [*shape]; when [...] in [0, 1)."""

    def __init__(self, sizes: BiasForce, shape: torch.Size):
        reads = shape.numel() + shape[:-1].numel() + sizes.timed
        widths = [reads] + [sizes.width] * sizes.layers
        numbers = {"force": shape.numel(), "potential": 1, "scale": shape[:-1].numel()}[sizes.form]
        layers = [nn.Sequential(nn.Linear(*n), nn.SiLU()) for n in pairwise(widths)]
        super().__init__(layers, sizes.width, numbers)
        self.form, self.timed, self.shape = sizes.form, sizes.timed, shape

    def forward(self, x: Tensor, target: Tensor, when: Tensor | None = None) -> Tensor:
        if self.form == "potential":
            return self._downhill(x, target, when)
        said = super().forward(self._read(x, target, when))
        if self.form == "force":
            return said.reshape(x.shape)
        return softplus(said).reshape((*x.shape[:-1], 1)) * (target - x)

    def _downhill(self, x: Tensor, target: Tensor, when: Tensor | None) -> Tensor:
        learning = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = super().forward(self._read(x, target, when)).sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=learning)
        return -slope

    def _read(self, x: Tensor, target: Tensor, when: Tensor | None) -> Tensor:
        """[..., numbers] that the first layer reads."""
        state = x.flatten(-len(self.shape)) if len(self.shape) > 1 else x
        far = (target - x).square().sum(-1).clamp(min=1e-12).sqrt()
        read = [state, far.reshape(*state.shape[:-1], self.shape[:-1].numel())]
        if self.timed:
            if when is None:
                raise ValueError(
                    "BiasForce(timed=True) reads which share of the horizon is over; give `when`"
                )
            read.append(when.to(x).expand(state.shape[:-1]).unsqueeze(-1))
        return torch.cat(read, -1)


class UnbiasedNetwork(Network):
    def forward(self, x: Tensor, target: Tensor, when: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)
