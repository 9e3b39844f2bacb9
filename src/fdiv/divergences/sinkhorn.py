"""Entropic optimal transport, through the library geomloss."""

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fdiv._metric import MetricDivergence, weighted_points
from fdiv.divergences.kernels import distances, require_positive
from fdiv.divergences.wasserstein import require_equal_masses


@dataclass(frozen=True)
class Sinkhorn(MetricDivergence):
    """S(a, b) = OT(a, b) - OT(a, a)/2 - OT(b, b)/2 >= 0; without `debias`, OT(a, b).

    OT(a, b) = min over plans P of <P, |x - y|^p / p> + blur^p KL(P, a x b): geomloss's convention,
    blur is a length, and for p = 2 cost and value are half those of POT and OTT. S tends to
    W_p^p / p for a small blur and, for p = 1, to half of Energy for a large one. Masses must agree.

    Annealing takes log(diameter / blur) / -log(scaling) steps, each over N x M costs, and has no
    stopping rule. Relative error of S against the converged fixed point, the worst of 54 problems
    of 20 to 100 points, float32 as float64:

        scaling   blur = diameter / 10   / 20   / 50
        0.99      1e-4                   2e-3   1e-2
        0.9       5e-3                   3e-2   9e-2     nine times cheaper
        0.5       4e-2                   2e-1   3e-1     geomloss's default

    Gradients come from the envelope theorem: first order only, a Hessian would be silently wrong.
    At 0.99 theirs is a relative error of 3e-3 at diameter / 10 and 2e-2 at / 20.
    Needs `pip install "fdiv[transport]"`.
    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences", arXiv 1810.08278.
    """

    blur: float
    p: float = 2
    debias: bool = True
    scaling: float = 0.99

    def __post_init__(self):
        require_positive(self.blur, "Sinkhorn(blur)")
        if not (isinstance(self.p, int | float) and 1 <= self.p <= 2):
            raise ValueError(
                f"Sinkhorn(p) needs 1 <= p <= 2, where S is never negative, got {self.p!r}; "
                "write Sliced(p) for larger exponents"
            )
        if not isinstance(self.debias, bool):
            raise ValueError(f"Sinkhorn(debias) is True or False, got {self.debias!r}")
        if not 0 < self.scaling < 1:
            raise ValueError(
                f"Sinkhorn(scaling) needs 0 < scaling < 1, got {self.scaling!r}; "
                "nearer to 1 is more exact and slower"
            )
        _samples_loss()  # now, and not at the first step of a training run

    def between(
        self, x: Tensor, y: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None
    ) -> Tensor:
        x, y, a, b = weighted_points(x, y, log_a, log_b)
        require_equal_masses(a, b, "Sinkhorn")
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2], a.shape[:-1], b.shape[:-1])
        loss = _samples_loss()(
            p=self.p,
            blur=self.blur,
            debias=self.debias,
            scaling=self.scaling,
            diameter=max(_diameter(x, y), self.blur),
            cost=self._cost,  # geomloss's own cancels far from 0, and is 1e-4 at distance 0
            backend="tensorized",
        )
        clouds = [_one_batch(batch, t, dims) for t, dims in ((a, 1), (x, 2), (b, 1), (y, 2))]
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # to restore it: geomloss leaves it on
            value = loss(*clouds).reshape(batch)
        return value if torch.is_grad_enabled() else value.detach()

    def _cost(self, x: Tensor, y: Tensor) -> Tensor:
        return distances(x, y).pow(self.p) / self.p


def _one_batch(batch: torch.Size, tensor: Tensor, dims: int) -> Tensor:
    """Fold all but the last `dims` dimensions: geomloss takes exactly one of batch."""
    own = tensor.shape[-dims:]
    return tensor.expand(*batch, *own).reshape(-1, *own)


def _diameter(x: Tensor, y: Tensor) -> float:
    """Of the box around every point of the batch: where the annealing starts."""
    points = torch.cat([t.detach().flatten(0, -2) for t in (x, y)])
    return (points.amax(0) - points.amin(0)).norm().item()


def _samples_loss():
    """geomloss's class, imported on use: nothing else needs it, and beside pykeops it is slow."""
    try:
        return importlib.import_module("geomloss").SamplesLoss
    except ImportError as error:
        raise ImportError('Sinkhorn needs geomloss: pip install "fdiv[transport]"') from error
