"""The root of a rising function, many at a time and without its derivative."""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_STEPS = 200


def rising_root(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, tolerance: float) -> Tensor:
    """The root, elementwise; `function` is <= 0 at `low` and >= 0 at `high`, up to rounding.

    Quadratic inverse interpolation where three points allow it, bisection otherwise; `tolerance` is relative,
    to 1 + |root|. The end with the smaller |function| is the root.
    Source: Chandrupatla, "A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear
    function without using derivatives" (1997); here the first step is a secant.
    """
    # `new` is the latest point, `across` one on the other side of the root, `old` the one before.
    new, across = high, low
    f_new, f_across = function(new), function(across)
    share = (f_new / (f_new - f_across)).nan_to_num(0.5)
    for _ in range(MAX_STEPS):
        best, f_best = _nearer(new, f_new, across, f_across)
        error = tolerance * (1 + best.abs())
        least = error / (across - new).abs()
        done = (f_best.abs() <= error) | (least >= 0.5)
        if bool(done.all()):
            break
        share = torch.minimum(torch.maximum(share, least), 1 - least)
        point = torch.where(done, best, new + share * (across - new))
        f_point = function(point)
        same = (f_point > 0) == (f_new > 0)
        old, f_old = torch.where(same, new, across), torch.where(same, f_new, f_across)
        across, f_across = torch.where(same, across, new), torch.where(same, f_across, f_new)
        new, f_new = point, f_point
        share = _interpolated(new, f_new, across, f_across, old, f_old)
    return _nearer(new, f_new, across, f_across)[0]


def _nearer(a: Tensor, f_a: Tensor, b: Tensor, f_b: Tensor) -> tuple[Tensor, Tensor]:
    closer = f_a.abs() <= f_b.abs()
    return torch.where(closer, a, b), torch.where(closer, f_a, f_b)


def _interpolated(a: Tensor, f_a: Tensor, b: Tensor, f_b: Tensor, c: Tensor, f_c: Tensor) -> Tensor:
    """The share of the way from a to b where the inverse quadratic through the points is zero, or 1/2."""
    along, rise = (a - b) / (c - b), (f_a - f_b) / (f_c - f_b)
    monotone = (rise.square() < along) & ((1 - rise).square() < 1 - along)
    share = f_a / (f_b - f_a) * (f_c / (f_b - f_c)) + (c - a) / (b - a) * (f_a / (f_c - f_a)) * (
        f_b / (f_c - f_b)
    )
    return torch.where(monotone, share, 0.5)
