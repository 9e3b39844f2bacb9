"""A denoiser: a residual perceptron in the scaling of EDM, as teacher, fake score and one-step student."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from fdiv.diffusion.edm import Preconditioning, spread_to
from fdiv.networks._network import Network, require_sizes

FREQUENCIES = 16  # of the level of noise, ln(sigma) / 4, from a twentieth of a turn a unit to eight turns


@dataclass(frozen=True)
class Denoiser:
    """`blocks` residual blocks of `width` units, each told the level of noise and the condition.

    sigma_data: the standard deviation of a coordinate of the data. classes: the condition is a class, [B]
    int64; context: it is so many numbers, [B, context]; neither: there is none. null: one class more, the
    network's attribute `null`, stands for all of them, see `Denoising(drop=)`. The network is
    D(x [B, ...], sigma, condition) -> [B, ...], see fdiv.diffusion.edm; sigma is a number or [B].
    """

    width: int = 256
    blocks: int = 2
    sigma_data: float = 0.5
    classes: int = 0
    context: int = 0
    null: bool = False

    def __post_init__(self):
        require_sizes(self, width=self.width, blocks=self.blocks)
        Preconditioning(self.sigma_data)  # checks it
        for name, size in {"classes": self.classes, "context": self.context}.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise ValueError(f"Denoiser({name}) is a whole number, 0 for none, got {size!r}")
        if self.classes and self.context:
            raise ValueError(
                "a condition is a class or a row of numbers: write classes or context, and where both are "
                "wanted the class as numbers"
            )
        if self.null and not self.classes:
            raise ValueError("null is one class beside the others: write classes, or leave null out")

    def build(self, shape: torch.Size, outputs: int) -> "DenoiserNetwork":
        if outputs != shape.numel():
            raise ValueError(
                f"{self!r} returns what it reads, {shape.numel()} numbers, and not {outputs}; for classes "
                "write MLP()"
            )
        return DenoiserNetwork(self, shape)


class DenoiserNetwork(Network):
    """network(x, sigma, condition), and its `features` [B, width] of the same three, which `head` reads."""

    def __init__(self, sizes: Denoiser, shape: torch.Size):
        width = sizes.width
        super().__init__([_Block(width) for _ in range(sizes.blocks)], width, shape.numel())
        self.scaling = Preconditioning(sizes.sigma_data)
        self.classes, self.context = sizes.classes, sizes.context
        self.null = sizes.classes if sizes.null else None
        self.first = nn.Linear(shape.numel(), width)
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        if self.conditional:
            known = self.classes + sizes.null
            made = nn.Embedding(known, width) if self.classes else nn.Linear(self.context, width)
            self.condition = made
        nn.init.zeros_(self.head.weight)  # an untrained one returns skip(sigma) x
        nn.init.zeros_(self.head.bias)

    @property
    def width(self) -> int:
        """Of its features."""
        return self.first.out_features

    @property
    def conditional(self) -> bool:
        return bool(self.classes or self.context)

    def forward(self, x: Tensor, sigma: Any, condition: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.denoised(self.features(x, sigma, condition), x, sigma)

    def denoised(self, features: Tensor, x: Tensor, sigma: Any) -> Tensor:
        """D [B, ...] of features that are known already."""
        level = spread_to(_levels(sigma, x), x)
        return self.scaling.skip(level) * x + self.scaling.out(level) * self.head(features).reshape(x.shape)

    def features(self, x: Tensor, sigma: Any, condition: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self._stages(x, sigma, condition)[-1]

    def stages(self, inputs: Tensor) -> list[Tensor]:
        """Of the blocks, at sigma_data and, of a conditional one, at condition 0."""
        zeros = inputs.new_zeros(len(inputs), self.context) if self.context else None
        zeros = inputs.new_zeros(len(inputs), dtype=torch.int64) if self.classes else zeros
        return self._stages(inputs, self.scaling.sigma_data, zeros)

    def _stages(self, x: Tensor, sigma: Any, condition: Tensor | None) -> list[Tensor]:
        levels = _levels(sigma, x)
        told = silu(self.level(_waves(self.scaling.noise(levels))) + self._told(condition))
        hidden, stages = self.first((spread_to(self.scaling.into(levels), x) * x).flatten(1)), []
        for block in self.blocks:
            hidden = block(hidden, told)
            stages.append(hidden)
        return [*stages[:-1], silu(layer_norm(hidden, hidden.shape[-1:]))]

    def _told(self, condition: Tensor | None) -> Tensor | float:
        if (condition is not None) != self.conditional:
            wanted = "a condition [B, ...]" if self.conditional else "condition=None"
            raise ValueError(
                f"a Denoiser of classes={self.classes}, context={self.context} reads {wanted}, got "
                f"{None if condition is None else tuple(condition.shape)}"
            )
        return 0.0 if condition is None else self.condition(condition)


class _Block(nn.Module):
    """h + F(h, told), 0 at first, so that depth costs an untrained network nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.told = nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, hidden: Tensor, told: Tensor) -> Tensor:
        inner = self.first(silu(layer_norm(hidden, hidden.shape[-1:]))) + self.told(told)
        return hidden + self.second(silu(inner))


def _levels(sigma: Any, x: Tensor) -> Tensor:
    """[B], from a number or what is [B] already."""
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))


def _waves(level: Tensor) -> Tensor:
    """[B] to [B, 2 FREQUENCIES]."""
    turns = torch.logspace(math.log10(0.05), math.log10(8.0), FREQUENCIES, device=level.device)
    angles = 2 * math.pi * level.unsqueeze(-1) * turns.to(level.dtype)
    return torch.cat([angles.cos(), angles.sin()], -1)
