"""Divergences that know how far apart two atoms are: between weighted points, or between histograms."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdiv._divergence import Divergence, on_one_support
from fdiv._math import in_working_precision


class MetricDivergence(ABC):
    """A divergence between clouds of points, which needs no density and no common support."""

    @abstractmethod
    def between(
        self, x: Tensor, y: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None
    ) -> Tensor:
        """The divergence of the measures sum_i a_i delta(x_i) and sum_j b_j delta(y_j).

        Shapes: x [..., N, D], y [..., M, D], log_a [..., N], log_b [..., M] -> [...]. Weights default to
        uniform; those given are used as they are. Differentiable in points and weights.
        """

    def on(self, points: Tensor) -> "OnPoints":
        """The same divergence between histograms over `points` [V, D]: swappable for KL()."""
        return OnPoints(self, points)


@dataclass(frozen=True, eq=False)
class OnPoints(Divergence):
    """A metric divergence as a function of (log_p, log_q), both over one fixed set of points [V, D]."""

    metric: MetricDivergence
    points: Tensor = field(repr=False)

    def __post_init__(self):
        if not isinstance(self.metric, MetricDivergence):
            raise TypeError(f"OnPoints takes a divergence between points, got {self.metric!r}")
        if self.points.ndim != 2:
            raise ValueError(f"points are [V, D], one row an atom, got shape {tuple(self.points.shape)}")

    def __call__(self, log_p: Tensor, log_q: Tensor, dim: int = -1) -> Tensor:
        log_p, log_q = (t.movedim(dim, -1) for t in on_one_support(log_p, log_q, dim))
        if log_p.shape[-1] != len(self.points):
            raise ValueError(f"{len(self.points)} points cannot carry histograms of {log_p.shape[-1]} atoms")
        points = self.points.to(log_p)
        return self.metric.between(points, points, log_p, log_q)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, OnPoints)
            and self.metric == other.metric
            and torch.equal(self.points, other.points)
        )

    def __hash__(self) -> int:
        return hash((self.metric, tuple(self.points.shape)))


def weighted_points(
    x: Tensor, y: Tensor, log_a: Tensor | None, log_b: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check shapes and return (x, y, a, b) with weights a [..., N] and b [..., M], uniform by default."""
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"points are [..., N, D] and [..., M, D], got {tuple(x.shape)} and {tuple(y.shape)}; "
            "write x.unsqueeze(-1) for points on a line"
        )
    x, y = in_working_precision(x, y)
    return x, y, _weights(x, log_a, "log_a"), _weights(y, log_b, "log_b")


def _weights(points: Tensor, log_weights: Tensor | None, name: str) -> Tensor:
    count = points.shape[-2]
    if log_weights is None:
        return points.new_full((count,), 1.0 / count)
    if log_weights.shape[-1] != count:
        raise ValueError(f"{name} has {log_weights.shape[-1]} weights for {count} points")
    return log_weights.to(points.dtype).exp()
