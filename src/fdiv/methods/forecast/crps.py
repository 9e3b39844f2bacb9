"""The continuous ranked probability score of an ensemble.

    CRPS(F, y) = E|X - y| - E|X - X'| / 2 = integral of (F(z) - 1[z >= y])^2 dz,   X, X' ~ F independent

Twice it is the energy distance between F and a point mass at y. It is in the units of y, proper, and |X - y|
for a single member. Sources: Gneiting and Raftery, "Strictly Proper Scoring Rules, Prediction, and
Estimation" (2007); Ferro, "Fair scores for ensemble forecasts" (2014).
"""

import math

import torch
from torch import Tensor

from fdiv._math import in_working_precision


def crps(ensemble: Tensor, y: Tensor, fair: bool = False) -> Tensor:
    """Of M members [M, ...] and what came true [...], elementwise -> [...].

    fair: E|X - X'| over pairs of different members, which makes the expected score independent of M;
    otherwise (M - 1)/M of that, the score of the ensemble's own distribution. One member has no pair.
    O(M log M). The gradient in a member is [sign(x - y) - mean over the pairs of sign(x - x')]/M.
    """
    if ensemble.ndim != y.ndim + 1 or ensemble.shape[1:] != y.shape or not len(ensemble):
        raise ValueError(
            f"an ensemble is [members, ...] and y is [...], got {tuple(ensemble.shape)} and {tuple(y.shape)}"
        )
    ensemble, y = in_working_precision(ensemble, y)
    members = len(ensemble)
    errors = ensemble - y  # small numbers: the weights below cancel
    pairs = members * (members - 1 if fair else members)
    return errors.abs().mean(0) - (errors * _above_less_below(errors.detach())).sum(0) / max(pairs, 1)


def _above_less_below(x: Tensor) -> Tensor:
    """How many members are smaller than each, less how many are larger: sum_j sign(x_i - x_j), [M, ...].

    Half of sum |x_i - x_j| is the sum of x_i times it, and its gradient too, where members are equal as well.
    """
    rows = x.movedim(0, -1).contiguous()
    ordered = rows.sort(-1).values
    smaller = torch.searchsorted(ordered, rows)
    not_larger = torch.searchsorted(ordered, rows, right=True)
    return (smaller + not_larger - len(x)).movedim(-1, 0).to(x.dtype)


def gaussian_crps(mean: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Of the forecast N(mean, scale^2), scale > 0, elementwise."""
    mean, scale, y = in_working_precision(mean, scale, y)
    z = (y - mean) / scale
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    return scale * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
