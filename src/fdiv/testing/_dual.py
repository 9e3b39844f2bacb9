"""Laws of the conjugate and of the inverse slope."""

import math

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._ratio import newton_inverse_slope
from fdiv.testing._problems import check, check_close, log_ratios, require, scale_of


def conjugate_is_the_supremum_of_the_tangents(divergence: FDivergence) -> None:
    """u y - f(u) <= f*(y), equal at y = f'(u); -f(0) up to f'(0), +inf above f'(inf)."""
    x = log_ratios(8.0)
    slope, value = divergence.phi(x), divergence.f(x)
    y = torch.cat([slope, slope - 0.2, slope + 0.2])
    conjugate, maximiser = _value_and_derivative(divergence.conjugate, y)
    below = (y.unsqueeze(-1) * x.exp() - value).max(-1).values
    slack = 1e-9 * (scale_of(divergence) + below.abs())
    check(conjugate >= below - slack, "f*(y) >= u y - f(u) for all u", conjugate, below, slope=y)

    at_slope, tangent = conjugate[: len(x)], x.exp() * slope - value
    slack = 1e-9 * (scale_of(divergence) + x.exp() * slope.abs() + value)
    check_close(at_slope, tangent, "f*(f'(u)) = u f'(u) - f(u)", 1e-9, slack, log_ratio=x, slope=slope)
    if divergence.is_smooth:
        says = "the derivative of f* at f'(u) is u"
        check_close(maximiser[: len(x)], x.exp(), says, 1e-6, 1e-6, log_ratio=x)
    _check_ends_of_conjugate(divergence)


def _check_ends_of_conjugate(divergence: FDivergence) -> None:
    steps = torch.tensor([0.1, 5.0], dtype=torch.float64)
    if math.isfinite(divergence.slope_at_zero):
        y = divergence.slope_at_zero - steps
        flat = torch.full_like(y, -divergence.f_at_zero)
        check_close(divergence.conjugate(y), flat, "f* = -f(0) up to f'(0)", 1e-9, 1e-9, slope=y)
    if math.isfinite(divergence.slope_at_infinity):
        y = divergence.slope_at_infinity + steps
        conjugate = divergence.conjugate(y)
        check(conjugate == math.inf, "f* = +inf above f'(inf)", conjugate, "inf", slope=y)


def inverse_slope_inverts_the_slope(divergence: FDivergence) -> None:
    """inverse_slope(f'(u)) = log u, closed form or not; -inf up to f'(0), nan above f'(inf)."""
    x = log_ratios(8.0)
    slope = divergence.phi(x)
    rise = divergence.curvature(x) / x.exp()  # dphi/dlog u, whose inverse magnifies rounding
    x, slope, rise = (t[rise > 1e-9 * (1 + slope.abs())] for t in (x, slope, rise))
    slack = 1e-8 + 1e-14 * (scale_of(divergence) + slope.abs()) / rise
    if len(slope):
        inverse, derivative = _value_and_derivative(divergence.inverse_slope, slope)
        says = "the derivative of inverse_slope is 1 / phi'"
        check_close(inverse, x, "inverse_slope(phi(x)) = x", 1e-8, slack, log_ratio=x, slope=slope)
        check_close(derivative, 1 / rise, says, 1e-5, slope=slope)
    closed_rise = getattr(divergence, "closed_rise", None)
    if len(slope) and closed_rise:
        check_close(closed_rise(x), rise, "closed_rise is the slope of phi", 1e-8, log_ratio=x)
    closed_form = getattr(divergence, "closed_inverse_slope", None)
    if len(slope) and closed_form:
        closed, root = closed_form(slope), newton_inverse_slope(divergence, slope)
        check_close(closed, root, "closed_inverse_slope is Newton's root", 1e-8, slack, slope=slope)
    _check_ends_of_inverse(divergence)


def _check_ends_of_inverse(divergence: FDivergence) -> None:
    def at(slope: float) -> float:
        return divergence.inverse_slope(torch.tensor(slope, dtype=torch.float64)).item()

    require(abs(at(0.0)) < 1e-12, f"inverse_slope(0) is log-ratio 0, got {at(0.0)}")
    if math.isfinite(low := divergence.slope_at_zero):
        got = at(low - 0.1)
        require(got == -math.inf, f"inverse_slope below f'(0) = {low} is -inf, got {got}")
    if math.isfinite(high := divergence.slope_at_infinity):
        got = at(high + 0.1)
        require(math.isnan(got), f"inverse_slope above f'(inf) = {high} is nan, got {got}")


def _value_and_derivative(function, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = function(x)
    finite = value.isfinite()
    (derivative,) = torch.autograd.grad(torch.where(finite, value, 0.0).sum(), x)
    return value.detach(), derivative
