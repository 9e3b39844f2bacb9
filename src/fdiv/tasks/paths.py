"""Paths of a diffusion from one minimum of an energy to another, which it hardly ever takes by itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.classifier import Classifier
from fdiv.methods.paths.log_variance import LogVariance
from fdiv.tasks.labelled import opened, reopened
from fdiv.tasks.surfaces import SURFACES, Surface

DEFAULTS = ("temperature", "step_size", "steps", "width", "radius")


class Rolled(NamedTuple):
    """Some paths: positions [N, K + 1, 2], and moves [N, K, 2] without the unbiased drift."""

    positions: Tensor
    moves: Tensor


@dataclass(frozen=True)
class Paths:
    """dx = (b + u) dt + sqrt(2 T) dW from the `potential`'s first minimum, b its force and u a network's.

    potential: "double well" or "mueller-brown". temperature T is in the potential's unit of energy (the
    double well's default is 1200 K in eV); steps of step_size make the horizon. The reward of a path is the
    relaxed indicator max over t of exp(-|x_t - target|^2 / (2 dimensions width^2)), and it arrives within
    `radius`; None is the potential's default. samples: paths that a sampler is measured by; brute: those of
    the unbiased dynamics that it is compared with, the same for every sampler.
    """

    potential: str = "double well"
    temperature: float | None = None
    step_size: float | None = None
    steps: int | None = None
    width: float | None = None
    radius: float | None = None
    samples: int = 1024
    brute: int = 200_000

    default_method: ClassVar[LogVariance] = LogVariance()

    def __post_init__(self):
        if self.potential not in SURFACES:
            raise ValueError(f"potential is one of {', '.join(map(repr, SURFACES))}, got {self.potential!r}")
        for name in DEFAULTS:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is > 0, or None for the potential's own, got {value!r}")
        for name in ("samples", "brute"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 2):
                raise ValueError(f"{name} is a number of paths, at least 2, got {getattr(self, name)!r}")

    @property
    def surface(self) -> Surface:
        """The potential, with this task's numbers for its defaults."""
        own = {name: value for name in DEFAULTS if (value := getattr(self, name)) is not None}
        return SURFACES[self.potential]._replace(**own)

    @property
    def target(self) -> Tensor:
        return torch.tensor(self.surface.target)

    @property
    def when(self) -> Tensor:
        """The share of the horizon that is over before each step, [K]."""
        return torch.arange(self.surface.steps) / self.surface.steps

    @property
    def variance(self) -> float:
        """Of the noise, for a unit of time."""
        return 2 * self.surface.temperature

    # -- models -------------------------------------------------------------------------------------------

    def load(self, spec, seed: int, reference: Path | None = None) -> Classifier:
        return opened(spec, torch.Size([2]), 2, seed)

    def reopen(self, path: str | Path, spec, seed: int) -> Classifier:
        return reopened(path, spec)

    # -- paths --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rolled(
        self, network: Any, count: int, generator: torch.Generator, heat: float = 1.0, device: Any = "cpu"
    ) -> Rolled:
        """Paths of the dynamics with the network's force; heat multiplies the temperature of the noise."""
        surface, target, when = self.surface, self.target.to(device), self.when
        x = torch.tensor(surface.start, device=device).expand(count, 2)
        scale = (self.variance * heat * surface.step_size) ** 0.5
        positions, moves = [x], []
        for k in range(surface.steps):
            noise = torch.randn(count, 2, generator=generator).to(device)
            bias = network(x, target, when[k].expand(count).to(device))
            moves.append(bias * surface.step_size + scale * noise)
            x = x + surface.force(x) * surface.step_size + moves[-1]
            positions.append(x)
        return Rolled(torch.stack(positions, 1), torch.stack(moves, 1))

    def nearest(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(log of the relaxed indicator [N], the number of steps to the place nearest to the target [N])."""
        square = (positions[:, 1:] - self.target.to(positions)).square().mean(-1)
        least, place = square.min(1)
        return -least / (2 * self.surface.width**2), place + 1

    # -- evaluation ---------------------------------------------------------------------------------------

    def evaluate(
        self, model: Classifier, reference: Classifier | None, measures: dict[str, Divergence], seed: int
    ) -> dict[str, Any]:
        """`measures` are between densities, which a law of paths is not given by."""
        from fdiv.tasks.paths_measurement import measured

        return measured(self, model, seed)
