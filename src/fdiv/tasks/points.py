"""Points in one or two dimensions from a mixture of Gaussians, of which all is known in closed form."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.classifier import Classifier
from fdiv.diffusion.mixture import Mixture
from fdiv.divergences.energy import Energy
from fdiv.divergences.sinkhorn import Sinkhorn
from fdiv.methods.generate.denoising import Denoising
from fdiv.methods.generate.levels import LogNormal
from fdiv.networks.affine import ClosedForm
from fdiv.tasks.generation import drawn, grouped
from fdiv.tasks.labelled import Labelled, opened, reopened
from fdiv.tasks.labelled_measurement import error
from fdiv.tasks.points_measurement import (
    BLOCKS,
    about,
    cells,
    covered,
    divergences,
    grid,
    missed,
    modes,
    near,
    of_network,
    shares,
    smoothed,
    together,
)

LAWS: dict[str, Mixture] = {
    "two modes": Mixture(((-3.0,), (3.0,)), (0.6,) * 2, (0.5,) * 2),
    "ring": Mixture(
        tuple((2 * math.cos(math.pi * n / 4), 2 * math.sin(math.pi * n / 4)) for n in range(8)),
        (0.15,) * 8,
        (0.125,) * 8,
    ),
    "rare mode": Mixture(
        ((-1.5, -1.5), (-1.5, 1.5), (1.5, -1.5), (1.5, 1.5)), (0.3,) * 4, (0.32, 0.32, 0.32, 0.04)
    ),
}
CLOUDS = {"sinkhorn": Sinkhorn(blur=0.5, tolerance=1e-3), "energy distance": Energy(unbiased=True)}
MOST_CELLS, SHOWN = 10**6, 400


@dataclass(frozen=True)
class Points:
    """Draws of a mixture, which a generator learns without labels.

    law: "two modes" (on a line, at -3 and 3, deviation 0.6), "ring" (eight modes on a circle of radius 2,
    deviation 0.15), "rare mode" (four corners at 1.5, deviation 0.3, one of weight 0.04), or a Mixture.
    weights, apart: other weights of its modes, and its means times a number. samples: of a generator, that it
    is measured by. noise: the deviation of what is added to both laws before divergences are taken between
    their densities. tested: draws that validation and distances between clouds see.
    The reference may be ClosedForm(), the law's own denoiser.
    """

    law: str | Mixture = "ring"
    weights: tuple[float, ...] | None = None
    apart: float = 1.0
    samples: int = 4096
    noise: float = 0.2
    denoising: Denoising | None = None

    def __post_init__(self):
        if not (isinstance(self.law, Mixture) or self.law in LAWS):
            raise ValueError(f"law is one of {sorted(LAWS)} or a Mixture, got {self.law!r}")
        count = len(_of_name(self).weights)
        if self.weights is not None and len(self.weights) != count:
            raise ValueError(f"{self.law!r} has {count} modes, and so many weights, got {self.weights!r}")
        if not 0 < self.apart < math.inf:
            raise ValueError(f"apart is a factor > 0, got {self.apart!r}")
        if not (isinstance(self.samples, int) and self.samples >= 16 * BLOCKS and self.samples % BLOCKS == 0):
            raise ValueError(
                f"samples are measured in {BLOCKS} parts of 16 or more: write a multiple of {BLOCKS} from "
                f"{16 * BLOCKS} on, got {self.samples!r}"
            )
        if not 0 < self.noise < math.inf:
            raise ValueError(f"noise is a deviation > 0, got {self.noise!r}")
        if cells(mixture(self), self.noise) > MOST_CELLS:
            raise ValueError(
                f"noise of {self.noise} asks for a grid of {cells(mixture(self), self.noise)} cells, and "
                f"{MOST_CELLS} are the most; write more noise"
            )

    # -- models -------------------------------------------------------------------------------------------

    @property
    def default_method(self) -> Denoising:
        """What a reference is trained by, and sampled if it is not trained."""
        wide = _deviation(mixture(self))
        suits = Denoising(wide, LogNormal(math.log(wide) - 1.2, 1.4), steps=32, least=0.01, most=20 * wide)
        return self.denoising or suits

    def load(self, spec, seed: int, reference: Path | None = None) -> Classifier:
        return opened(self._told(spec), torch.Size([self.dim]), self.dim, seed)

    def reopen(self, path: str | Path, spec, seed: int) -> Classifier:
        return reopened(path, self._told(spec))

    @property
    def dim(self) -> int:
        return mixture(self).dim

    def _told(self, spec: Any) -> Any:
        """The spec with a ClosedForm() of this law; generators of points have no condition."""
        if isinstance(spec.network, ClosedForm) and spec.network.law is None:
            return spec.model_copy(update={"network": ClosedForm(mixture(self))})
        if getattr(spec.network, "classes", 0) or getattr(spec.network, "context", 0):
            raise ValueError(f"points have no labels, got {spec.network!r}; leave out classes and context")
        return spec

    # -- data ---------------------------------------------------------------------------------------------

    def examples(self, kind: str | None, count: int, generator: torch.Generator) -> Labelled:
        """`count` draws; every label is 0."""
        if kind not in (None, "truth"):
            raise ValueError(f"Points has data 'truth', got {kind!r}")
        return Labelled(mixture(self).sample(count, generator), torch.zeros(count, dtype=torch.int64))

    def held_out(self, kind: str | None) -> Labelled:
        return _held_out(self)

    def log_prior(self, data: Labelled) -> Tensor:
        raise ValueError("points have no classes, and so no log_prior")

    # -- evaluation ---------------------------------------------------------------------------------------

    def evaluate(
        self, model: Classifier, reference: Classifier | None, measures: dict[str, Divergence], seed: int
    ) -> dict[str, Any]:
        """Modes, divergences between densities, distances between clouds, and what a sample costs.

        A generator that is known in closed form, Affine() say, has the divergences of its law.
        """
        law = mixture(self)
        noise = torch.randn(self.samples, self.dim, generator=torch.Generator().manual_seed(seed))
        made = drawn(model, self.default_method, noise)
        found = divergences(law, self.noise, model.model, made.points, measures)
        numbers = found | _of_modes(law, made.points) | self._of_clouds(made.points)
        numbers |= {"network calls": (made.evaluations, None), "ms a sample": (1e3 * made.seconds, None)}
        return {
            "exact": False,
            "scalars": {name: value for name, (value, _) in numbers.items()},
            "scalar_errors": {name: miss for name, (_, miss) in numbers.items() if miss is not None},
            "divergences": {name: found[name][0] for name in measures},
            "calibration": {},
            "curves": {},
            "samples": [],
            "drawn": self._picture(model, made.points),
        }

    def _of_clouds(self, points: Tensor) -> dict[str, tuple[float, float | None]]:
        held = _held_out(self).inputs
        found: dict[str, tuple[float, float | None]] = {
            name: grouped(measure.between, held, points) for name, measure in CLOUDS.items()
        }
        if self.dim == 1:
            found |= {"mean": (points.mean().item(), None), "deviation": (points.std().item(), None)}
        return found

    def _picture(self, model: Classifier, points: Tensor) -> dict[str, Any]:
        """For the report: densities on a line, or points in the plane."""
        law = mixture(self)
        if self.dim > 1:
            sides = {"points": points, "target": _held_out(self).inputs}
            return {name: _rounded(side[:SHOWN, :2]) for name, side in sides.items()}
        noise = max(self.noise, 0.1)  # with less a density of samples is ragged
        where = grid(law, noise)
        x = torch.linspace(where.low.item(), where.high.item(), SHOWN).double().unsqueeze(1)
        made = of_network(model.model, noise) or together(about(points, noise))
        densities = {"target": smoothed(law, noise), "made": made}
        line = {name: _rounded(density.log_prob(x).exp()) for name, density in densities.items()}
        return {"line": {"x": _rounded(x[:, 0])} | line}


def _of_modes(law: Mixture, points: Tensor) -> dict[str, tuple[float, float | None]]:
    rows, weights = modes(law, points), np.array(law.weights) / sum(law.weights)
    statistics = {
        "mode coverage": lambda rows: covered(rows, weights),
        "mode tv": lambda rows: missed(rows, weights),
        "high quality": near,
        "rarest mode": lambda rows: float(shares(rows, len(weights))[weights.argmin()]),
    }
    return {name: (statistic(rows), error(rows, statistic)) for name, statistic in statistics.items()}


def _rounded(numbers: Tensor) -> list:
    return (numbers.double() * 1e4).round().div(1e4).tolist()


@lru_cache(maxsize=8)
def mixture(task: Points) -> Mixture:
    """The law with the task's own weights, and its modes as far apart as it says."""
    law = _of_name(task)
    means = tuple(tuple(task.apart * v for v in mean) for mean in law.means)
    return replace(law, means=means, weights=law.weights if task.weights is None else task.weights)


def _deviation(law: Mixture) -> float:
    """Of a coordinate, over the coordinates."""
    means, weights = torch.tensor(law.means).double(), torch.tensor(law.weights).double()
    weights = weights / weights.sum()
    about_all = (means - weights @ means).square().mean(-1) + torch.tensor(law.scales).double().square()
    return math.sqrt(weights @ about_all)


def _of_name(task: Points) -> Mixture:
    return LAWS[task.law] if isinstance(task.law, str) else task.law


@lru_cache(maxsize=8)
def _held_out(task: Points) -> Labelled:
    """As many draws as a generator is asked for, the same for every seed."""
    points = mixture(task).sample(task.samples, torch.Generator().manual_seed(2**31))
    return Labelled(points, torch.zeros(task.samples, dtype=torch.int64))
