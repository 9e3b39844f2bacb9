"""Kinetic-optimal paths: how fast to mix data and noise so that samples travel least.

Shaul, Chen, Nickel, Le, Lipman, "On Kinetic Optimal Probability Paths for Generative Models", arXiv
2306.06626. x_t = a_t x1 + m_t x0 of data x1, scaled to E|x1|^2 = d, and noise x0; a goes from 0 to 1, m from
1 to 0. The data enter the energy only through their separation lambda(s) = E|E[x1 | x_t]|^2 / d at s = a / m:

    energy = 1/d int E|v_t(x_t)|^2 dt = int a'^2 + m'^2 - (1 - lambda(a / m)) (a' - a m' / m)^2 dt

v_t is the velocity of the law, not of a pair. Below, theta = atan(a / m) and

    slack(theta) = (lambda - sin^2 theta) / cos^2 theta = lambda - s^2 (1 - lambda) >= 0,

0 for Gaussian data. In polar coordinates, radius rho = sqrt(a^2 + m^2) and angle phi(theta) the integral of
sqrt(slack), the energy is int rho'^2 + rho^2 phi'^2 dt: that of a path in the plane. The least is on the
straight line, 4 sin^2(Phi / 2) with Phi = phi(pi / 2) <= pi / 2; where lambda = 1 it is a = t, m = 1 - t.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.diffusion.edm import Denoiser, denoised


class Separation(NamedTuple):
    """How far data are from Gaussian, by angle: the slack [cells] at the middles of even cells of theta."""

    slack: Tensor

    @property
    def total(self) -> float:
        """Phi."""
        return self._turned()[-1].item()

    @property
    def least_energy(self) -> float:
        return 4 * math.sin(self.total / 2) ** 2

    def ratio(self) -> Tensor:
        """lambda [cells], the data separation function at s = tan of the middles."""
        theta = middles(len(self.slack))
        return theta.sin() ** 2 + theta.cos() ** 2 * self.slack

    def angle(self, theta: Tensor) -> Tensor:
        """phi(theta), of any shape, for theta in [0, pi / 2]."""
        edges = torch.linspace(0, math.pi / 2, len(self.slack) + 1, dtype=torch.float64)
        return _interpolated(theta.double(), edges, self._turned())

    def energy(self, a: Tensor, m: Tensor) -> float:
        """Of the path [T] at even times from 0 to 1, (a, m) = (0, 1) and (1, 0) at its ends.

        Between two times the path is taken as straight in the plane of rho and phi, so that more of them only
        add to it.
        """
        if a.shape != m.shape or a.ndim != 1 or len(a) < 2:
            raise ValueError(f"a and m are [T], of two times or more, got {tuple(a.shape)}, {tuple(m.shape)}")
        ends = torch.stack([a[[0, -1]], m[[0, -1]]]).double()
        if not torch.allclose(ends, ends.new_tensor([[0.0, 1.0], [1.0, 0.0]]), atol=1e-6) or bool(
            (torch.minimum(a, m) < -1e-6).any()
        ):
            raise ValueError(f"a goes from 0 to 1 and m from 1 to 0, neither is negative; got ends {ends}")
        rho, phi = torch.hypot(a.double(), m.double()), self.angle(torch.atan2(a.double(), m.double()))
        steps = torch.stack([rho * phi.cos(), rho * phi.sin()]).diff(dim=1)
        return steps.square().sum().item() * steps.shape[1]

    def optimal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, m) of the kinetic-optimal path at times t in [0, 1], float64."""
        t, total = t.double(), self._turned()[-1]
        x, y = 1 - t + t * total.cos(), t * total.sin()
        if total < 1e-6:  # nothing to be gained anywhere: variance-preserving at an even pace
            theta = t * math.pi / 2
        else:
            edges = torch.linspace(0, math.pi / 2, len(self.slack) + 1, dtype=torch.float64)
            rising = self._turned() / total + 1e-9 * edges  # strictly, so that both ends are reached
            theta = _interpolated(torch.atan2(y, x) / total * rising[-1], rising, edges)
        rho = torch.hypot(x, y)
        return rho * theta.sin(), rho * theta.cos()

    def _turned(self) -> Tensor:
        """phi at the edges of the cells, [cells + 1]."""
        steps = self.slack.double().sqrt() * (math.pi / 2 / len(self.slack))
        return torch.cat([steps.new_zeros(1), steps.cumsum(0)])


def separation(
    denoiser: Denoiser,
    data: Tensor,
    cells: int = 128,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> Separation:
    """From a denoiser of the law of `data` [n, ...], with `draws` of noise for each row at every level.

    With v = E|x1|^2 / d, the slack at the level sigma^2 = v cot^2(theta) is (v + sigma^2) / (sigma^2 v d)
    E|D(x) - x v / (v + sigma^2)|^2: what D does beyond the best multiple of x. It is estimated in this form,
    which is never negative and for Gaussian data exactly 0. E|x1|^2 is that of the rows given.
    """
    scale = data.double().square().mean().sqrt().item()
    if not 0 < scale < math.inf:
        raise ValueError(f"the data have a finite scale > 0, got {scale}")
    rows = data.repeat_interleave(draws, 0)
    found = []
    for theta in middles(cells).tolist():
        sigma = scale / math.tan(theta)
        noise = torch.randn(rows.shape, dtype=rows.dtype, device=rows.device, generator=generator)
        x = rows + sigma * noise
        beyond = denoised(denoiser, x, sigma) - x * scale**2 / (scale**2 + sigma**2)
        found.append(beyond.double().square().mean() * (1 / scale**2 + 1 / sigma**2))
    return Separation(torch.stack(found).cpu())


def of_function(ratio: Callable[[Tensor], Tensor], cells: int = 1024) -> Separation:
    """From lambda as a function of s > 0, which must be in [s^2 / (1 + s^2), 1]."""
    s = middles(cells).tan()
    slack = ratio(s).double() * (1 + s**2) - s**2
    if bool((slack < -1e-9 * (1 + s**2)).any() | (slack > 1 + 1e-9 * (1 + s**2)).any()):
        raise ValueError("lambda(s) is at least s^2 / (1 + s^2), that of Gaussian data, and at most 1")
    return Separation(slack.clamp(0.0, 1.0))  # rounding only


def middles(cells: int) -> Tensor:
    """The middles of even cells of [0, pi / 2]: s = 0 and s = inf are not among them."""
    if not (isinstance(cells, int) and not isinstance(cells, bool) and cells >= 1):
        raise ValueError(f"cells is a whole number >= 1, got {cells!r}")
    return (torch.arange(cells, dtype=torch.float64) + 0.5) * (math.pi / 2 / cells)


def _interpolated(x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """The piecewise linear function through (at, values), `at` strictly rising."""
    right = torch.searchsorted(at, x.contiguous()).clamp(1, len(at) - 1)
    share = (x - at[right - 1]) / (at[right] - at[right - 1])
    return values[right - 1] + share.clamp(0.0, 1.0) * (values[right] - values[right - 1])
