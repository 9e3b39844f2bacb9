"""Energies of a particle in the plane whose minima and saddles are known."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Surface(NamedTuple):
    """An energy of states [..., 2], its force, and between which minima paths are wanted.

    The rest are a task's defaults: temperature in units of energy; width of the relaxed indicator; radius
    within which a minimum is reached; channel: > 0 where a path takes the one of two ways, at the place where
    it crosses `divide` = 0; window: what an occupation is counted in.
    """

    energy: Callable[[Tensor], Tensor]
    force: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    target: tuple[float, float]
    temperature: float
    step_size: float
    steps: int
    width: float
    radius: float
    window: tuple[tuple[float, float], tuple[float, float]]
    divide: Callable[[Tensor], Tensor] | None = None
    channel: Callable[[Tensor], Tensor] | None = None


def double_well(x: Tensor) -> Tensor:
    """Two minima at (+-sqrt(5/4), 0) and, between them, saddles at (0, +-1) and a top at 0."""
    a, b = x.unbind(-1)
    ring, far = 1 - a * a - b * b, a * a - 2
    plus, minus = (a + b).square() - 1, (a - b).square() - 1
    return (4 * ring.square() + 2 * far.square() + plus.square() + minus.square() - 2) / 6


def double_well_force(x: Tensor) -> Tensor:
    a, b = x.unbind(-1)
    ring, far = 1 - a * a - b * b, a * a - 2
    plus, minus = (a + b) * ((a + b).square() - 1), (a - b) * ((a - b).square() - 1)
    along = -16 * ring * a + 8 * a * far + 4 * plus + 4 * minus
    across = -16 * ring * b + 4 * plus - 4 * minus
    return -torch.stack([along, across], -1) / 6


# Mueller and Brown, Theoretica Chimica Acta 53, 75 (1979): four terms A e^(a dx^2 + b dx dy + c dy^2).
HEIGHT = (-200.0, -100.0, -170.0, 15.0)
CURVES = ((-1.0, 0.0, -10.0), (-1.0, 0.0, -10.0), (-6.5, 11.0, -6.5), (0.7, 0.6, 0.7))
CENTRE = ((1.0, 0.0), (0.0, 0.5), (-0.5, 1.5), (-1.0, 1.0))


def mueller_brown(x: Tensor) -> Tensor:
    return sum((term for term, _, _ in _terms(x)), start=torch.zeros_like(x[..., 0]))


def mueller_brown_force(x: Tensor) -> Tensor:
    along, across = torch.zeros_like(x[..., 0]), torch.zeros_like(x[..., 0])
    for term, slope_x, slope_y in _terms(x):
        along, across = along - term * slope_x, across - term * slope_y
    return torch.stack([along, across], -1)


def _terms(x: Tensor):
    """Of each term its value, and the derivatives of its exponent."""
    for height, (a, b, c), (x0, y0) in zip(HEIGHT, CURVES, CENTRE, strict=True):
        dx, dy = x[..., 0] - x0, x[..., 1] - y0
        exponent = a * dx * dx + b * dx * dy + c * dy * dy
        yield height * exponent.exp(), 2 * a * dx + b * dy, b * dx + 2 * c * dy


SURFACES = {
    "double well": Surface(
        double_well,
        double_well_force,
        start=(-(1.25**0.5), 0.0),
        target=(1.25**0.5, 0.0),
        temperature=8.617e-5 * 1200,  # of 1200 K, with energies in eV
        step_size=0.05,
        steps=200,
        width=0.1,
        radius=0.5,
        window=((-1.7, 1.7), (-1.7, 1.7)),
        divide=lambda x: x[..., 0],
        channel=lambda x: x[..., 1],
    ),
    "mueller-brown": Surface(
        mueller_brown,
        mueller_brown_force,
        start=(-0.558224, 1.441726),
        target=(0.623499, 0.028038),
        temperature=15.0,
        step_size=2e-4,
        steps=250,
        width=0.1,
        radius=0.2,
        window=((-1.4, 1.1), (-0.4, 1.9)),
    ),
}
