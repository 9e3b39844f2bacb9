"""What a generator of points is measured by: the modes it finds, and divergences between smoothed densities.

Both laws plus noise of the same deviation have densities everywhere. That of the target is known, that of a
generator is the mean of Gaussians about its samples: no bandwidth is guessed, the noise is the bandwidth.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.diffusion.mixture import Mixture
from fdiv.networks.affine import AffineNetwork, ClosedFormNetwork
from fdiv.tasks.generation import jackknifed

REACH = 8.5  # deviations about every mode that the grid covers; the rest of space is one more cell
BLOCKS = 16  # of samples, for the errors of divergences
PAIRS = 2**22  # of a cell and a sample at a time
NEAR = 3.0  # deviations from its mode up to which a sample is a good one
ENOUGH = 0.2  # of its weight, in good samples, makes a mode covered


class Gaussians(NamedTuple):
    """sum_k exp(log_weights_k) N(means_k, diag scales_k^2): [K, d], [K, d], [K]; all float64."""

    means: Tensor
    scales: Tensor
    log_weights: Tensor

    def log_prob(self, points: Tensor) -> Tensor:
        """[G], at points [G, d]."""
        rows = max(1, PAIRS // len(self.means))
        return torch.cat([self._log_prob(some) for some in points.split(rows)])

    def _log_prob(self, points: Tensor) -> Tensor:
        # squares multiplied out: one matrix [G, K], not one for each coordinate
        precision = self.scales.square().reciprocal()
        ahead = torch.addmm(
            -(precision * self.means.square()).sum(-1) / 2, points, (precision * self.means).T
        )
        of_each = ahead.addmm_(points.square(), precision.T, alpha=-0.5)
        height = -self.scales.log().sum(-1) - points.shape[1] / 2 * math.log(2 * math.pi)
        return of_each.add_(height + self.log_weights).logsumexp(-1)

    def log_outside(self, low: Tensor, high: Tensor) -> Tensor:
        """log of the mass that is not in the box between low [d] and high [d]."""
        below, above = (low - self.means) / self.scales, (self.means - high) / self.scales
        tails = torch.logaddexp(*(torch.special.log_ndtr(side) for side in (below, above)))  # [K, d]
        inside = torch.log1p(-tails.exp().clamp(max=1)).sum(-1)
        mass = -torch.expm1(inside)
        # a mass that is lost in rounding is the sum of the tails, which is kept as a logarithm
        log_mass = torch.where(mass > 1e-12, mass.log(), tails.logsumexp(-1))
        return (log_mass + self.log_weights).logsumexp(0)


def smoothed(law: Mixture, noise: float) -> Gaussians:
    """The target plus noise."""
    means, scales, weights = (torch.tensor(t).double() for t in (law.means, law.scales, law.weights))
    wide = (scales.square() + noise**2).sqrt().unsqueeze(-1).expand_as(means)
    return Gaussians(means, wide, (weights / weights.sum()).log())


def about(samples: Tensor, noise: float) -> list[Gaussians]:
    """The samples plus noise, in BLOCKS parts."""
    parts = samples.double().chunk(BLOCKS)
    return [Gaussians(x, torch.full_like(x, noise), x.new_full((len(x),), -math.log(len(x)))) for x in parts]


def together(parts: list[Gaussians]) -> Gaussians:
    """The mean of laws of equal size."""
    means, scales, weights = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Gaussians(means, scales, weights - math.log(len(parts)))


def of_network(network: object, noise: float) -> Gaussians | None:
    """What a network makes, plus noise, if it states that in closed form."""
    if isinstance(network, ClosedFormNetwork):
        return smoothed(network.law, noise)
    if not isinstance(network, AffineNetwork):
        return None
    mean, variance = (t.detach().cpu().double() for t in (network.mean, (2 * network.log_scale).exp()))
    scales = (variance + noise**2).sqrt().unsqueeze(0)
    return Gaussians(mean.unsqueeze(0), scales, mean.new_zeros(1))


class Grid(NamedTuple):
    """Points [G, d], the log of the volume of a cell, and the corners of the box that the cells fill."""

    points: Tensor
    log_volume: float
    low: Tensor
    high: Tensor

    def of(self, law: Gaussians) -> Tensor:
        """The log-probability of every cell, and of what is outside: [G + 1]."""
        inside = law.log_prob(self.points) + self.log_volume
        return torch.cat([inside, law.log_outside(self.low, self.high).unsqueeze(0)])


def grid(law: Mixture, noise: float, other: Gaussians | None = None) -> Grid:
    """Cells half as wide as the noise: sums over them are integrals up to rounding.

    It reaches over the other law too, as long as its sides do not become twice as long for that.
    """
    low, high = _box(smoothed(law, noise))
    if other is not None:
        (below, above), room = _box(other), (high - low) / 2
        low, high = (
            torch.minimum(low, below.maximum(low - room)),
            torch.maximum(high, above.minimum(high + room)),
        )
    counts = _counts(low, high, noise)
    widths = (high - low) / torch.tensor(counts)
    axes = [a + w * (torch.arange(n).double() + 0.5) for a, w, n in zip(low, widths, counts, strict=True)]
    points = torch.cartesian_prod(*axes).reshape(-1, law.dim)
    return Grid(points, widths.log().sum().item(), low, high)


def cells(law: Mixture, noise: float) -> int:
    """Of the grid of a law alone."""
    return math.prod(_counts(*_box(smoothed(law, noise)), noise))


def _box(law: Gaussians) -> tuple[Tensor, Tensor]:
    reach = REACH * law.scales
    return (law.means - reach).amin(0), (law.means + reach).amax(0)


def _counts(low: Tensor, high: Tensor, noise: float) -> list[int]:
    return [math.ceil(side / (noise / 2)) for side in (high - low).tolist()]


def divergences(
    law: Mixture, noise: float, network: object, samples: Tensor, measures: dict[str, Divergence]
) -> dict[str, tuple[float, float | None]]:
    """{name: (D(p_noise, q_noise), its standard error)}; without an error where q is known."""
    known = of_network(network, noise)
    where = grid(law, noise, known)
    log_p = where.of(smoothed(law, noise))
    if known is not None:
        log_q = where.of(known)
        return {name: (measure(log_p, log_q).item(), None) for name, measure in measures.items()}
    parts = torch.stack([where.of(part) for part in about(samples, noise)])

    def of_mean(measure: Divergence, parts: Tensor) -> Tensor:
        return measure(log_p, parts.logsumexp(0) - math.log(len(parts)))

    return {
        name: jackknifed(lambda some, m=measure: of_mean(m, some), parts)
        for name, measure in measures.items()
    }


# -- modes: rows of (mode, whether near), [N, 2] ---------------------------------------------------------


def modes(law: Mixture, samples: Tensor) -> np.ndarray:
    """The mode of each sample, by distance in deviations, and whether it lies within NEAR of them."""
    means, scales = torch.tensor(law.means).double(), torch.tensor(law.scales).double()
    away, mode = ((samples.double().unsqueeze(1) - means).norm(dim=-1) / scales).min(-1)
    return torch.stack([mode.double(), (away <= NEAR).double()], -1).numpy()


def near(rows: np.ndarray) -> float:
    """The share of samples within NEAR deviations of a mode."""
    return float(rows[:, 1].mean())


def shares(rows: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(rows[:, 0].astype(int), minlength=count) / len(rows)


def missed(rows: np.ndarray, weights: np.ndarray) -> float:
    """Total variation between the modes' weights and their shares of the samples."""
    return float(np.abs(shares(rows, len(weights)) - weights).sum() / 2)


def covered(rows: np.ndarray, weights: np.ndarray) -> float:
    """The share of modes that get ENOUGH of their weight in good samples."""
    good = np.bincount(rows[:, 0].astype(int), weights=rows[:, 1], minlength=len(weights)) / len(rows)
    return float((good >= ENOUGH * weights).mean())
