"""Points of a known density, from which a density is learnt that is known up to its normaliser."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.classifier import Classifier
from fdiv.diffusion.mixture import Mixture
from fdiv.methods.energy.nce import NCE
from fdiv.methods.robust.attacks import evaluated
from fdiv.tasks.labelled import Labelled, opened, reopened

LAWS = {
    "two modes": Mixture(((-2.0,), (2.0,)), (0.5, 0.5), (0.3, 0.7)),
    "heavy tail": Mixture(((0.0,), (0.0,)), (0.5, 2.0), (0.7, 0.3)),
    "ring": Mixture(
        tuple((2 * math.cos(math.pi * k / 4), 2 * math.sin(math.pi * k / 4)) for k in range(8)),
        (0.3,) * 8,
        (1.0,) * 8,
    ),
}
CELLS = {1: 4001, 2: 201}  # of the grid, along each side


@dataclass(frozen=True)
class Unnormalised:
    """Draws of a mixture, to be learnt by a network with one output, the energy: q is e^-E / Z.

    law: "two modes" and "heavy tail" in one dimension, "ring" of eight modes in two, or a Mixture. reach: the
    grid that Z and divergences are summed on covers the law's means and this many of its deviations on each
    side.
    """

    law: str | Mixture = "two modes"
    reach: float = 8.0

    default_method: ClassVar[NCE] = NCE()

    def __post_init__(self):
        if not (isinstance(self.law, Mixture) or self.law in LAWS):
            raise ValueError(f"law is one of {sorted(LAWS)} or a Mixture, got {self.law!r}")
        if self.mixture.dim not in CELLS or min(self.mixture.scales) <= 0:
            raise ValueError(f"the law has a density in one or two dimensions, got {self.mixture!r}")
        if not 0 < self.reach < math.inf:
            raise ValueError(f"reach is finite and > 0, got {self.reach!r}")

    @property
    def mixture(self) -> Mixture:
        return LAWS[self.law] if isinstance(self.law, str) else self.law

    # -- models -------------------------------------------------------------------------------------------

    def load(self, spec, seed: int, reference: Path | None = None) -> Classifier:
        return opened(spec, torch.Size([self.mixture.dim]), 1, seed)

    def reopen(self, path: str | Path, spec, seed: int) -> Classifier:
        return reopened(path, spec)

    # -- data ---------------------------------------------------------------------------------------------

    def examples(self, kind: str | None, count: int, generator: torch.Generator) -> Labelled:
        """`count` draws; labels are 0 throughout."""
        return Labelled(self.mixture.sample(count, generator), torch.zeros(count, dtype=torch.int64))

    def held_out(self, kind: str | None) -> Labelled:
        return self.examples(kind, 4096, torch.Generator().manual_seed(2**31))

    def log_prior(self, data: Labelled) -> Tensor:
        raise ValueError("points without labels have no log_prior")

    # -- evaluation ---------------------------------------------------------------------------------------

    def evaluate(
        self, model: Classifier, reference: Classifier | None, measures: dict[str, Divergence], seed: int
    ) -> dict[str, Any]:
        """log Z by quadrature and, exactly but for the grid, divergences of the true density to the model's.

        kl: KL(p, q). log Z: 0 of an energy that normalises itself. mode error: of a mode, the model's
        mass nearest to it over its own, the worst of them as |log ratio|.
        """
        points, cell = grid(self)
        log_p = self.mixture.log_prob(points) + cell
        log_joint = -energies(model, points) + cell  # log of e^-E times the cell
        log_partition = log_joint.logsumexp(0)
        log_q = log_joint - log_partition
        scalars = {
            "kl": float((log_p.exp() * (log_p - log_q)).sum()),
            "reverse kl": float((log_q.exp() * (log_q - log_p)).sum()),
            "log Z": float(log_partition),
            "mode error": self._mode_error(points, log_p, log_q),
        }
        divergences = {name: float(measure(log_p, log_q)) for name, measure in measures.items()}
        found = {"exact": True, "scalars": scalars, "scalar_errors": dict.fromkeys(scalars, 0.0)}
        return found | {"divergences": divergences, "calibration": {}, "curves": {}, "samples": []}

    def _mode_error(self, points: Tensor, log_p: Tensor, log_q: Tensor) -> float:
        """Each cell is that of the mode it likeliest comes from."""
        mode = self.mixture.log_shares(points).argmax(-1)
        modes = len(self.mixture.weights)
        masses = [points.new_zeros(modes).index_add(0, mode, log.exp()) for log in (log_p, log_q)]
        there = masses[0] > 0
        return float((masses[1][there] / masses[0][there]).log().abs().max())


@lru_cache(maxsize=8)
def grid(task: Unnormalised) -> tuple[Tensor, float]:
    """(points [cells, d] in float64, log of a cell's volume)."""
    law, far = task.mixture, task.reach * max(task.mixture.scales)
    sides = []
    for coordinates in zip(*law.means, strict=True):
        low, high = min(coordinates) - far, max(coordinates) + far
        sides.append(torch.linspace(low, high, CELLS[law.dim], dtype=torch.float64))
    points = torch.cartesian_prod(*sides).reshape(-1, law.dim)
    return points, sum(math.log(float(side[1] - side[0])) for side in sides)


@torch.no_grad()
def energies(model: Classifier, points: Tensor) -> Tensor:
    """[N], in float64."""
    network: Any = model.model
    like = next(network.parameters())
    with evaluated(network):
        said = [network(some.to(like)).squeeze(-1).double().cpu() for some in points.split(8192)]
    return torch.cat(said)
