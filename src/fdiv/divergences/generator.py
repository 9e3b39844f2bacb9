"""An f-divergence from any callable."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import continued, derivative, exp_difference, ratio_cap
from fdiv._ratio import falling_limit


@dataclass(frozen=True, repr=False)
class Generator(FDivergence):
    """sum q f(p/q) for a user's convex `f`, given as a torch function of the log-ratio log(p/q).

    f is standardised: f(u) - f(1) - f'(1) (u - 1) is what counts, so f(u) = u log u and
    f(u) = u log u - u + 1 are one divergence. `f` is a callable or "module:name"; only an importable
    function can stand in a recipe. Run `fdiv.testing.LAWS` on the result: they find an f that is not convex.

    >>> import torch
    >>> Generator(lambda log_ratio: log_ratio.exp() * log_ratio).curvature_at_one  # KL
    1.0
    """

    f_of_log_ratio: Callable[[Tensor], Tensor]
    _at_one: ClassVar[tuple[float, float]]  # of each object: f(1) and f'(1), measured
    _ends: ClassVar[dict[torch.dtype, "_Ends"]]

    def __init__(self, f: Callable[[Tensor], Tensor] | str):
        function = _load(f) if isinstance(f, str) else f
        if not callable(function):
            raise TypeError(f"Generator(f) takes a function of the log-ratio or 'module:name', got {f!r}")
        object.__setattr__(self, "f_of_log_ratio", function)
        zero = torch.zeros((), dtype=torch.float64)
        at_one, slope = function(zero).item(), derivative(function, zero).item()
        if not (math.isfinite(at_one) and math.isfinite(slope)):
            raise ValueError(f"Generator(f) needs f and f' finite at log-ratio 0, got {at_one} and {slope}")
        object.__setattr__(self, "_at_one", (at_one, slope))
        ends = {dtype: _measure_ends(self, dtype) for dtype in (torch.float32, torch.float64)}
        object.__setattr__(self, "_ends", ends)  # here, for a compiled perspective cannot measure

    def __repr__(self) -> str:
        function = self.f_of_log_ratio
        return f"Generator({function.__module__ + ':' + getattr(function, '__qualname__', '?')!r})"

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        gap, cap, ends = log_p - log_q, ratio_cap(log_p.dtype), self._ends[log_p.dtype]
        inside = continued(self.f_of_log_ratio, gap.clamp(max=cap), (ends.low_slope, 0.0))
        # Beyond e^cap f overflows: there the mass of p is factored out, and what is left is a line.
        over = torch.where((gap > cap) & (gap < math.inf), gap - cap, 0.0)
        beyond = torch.where(gap > cap, ends.high_value + ends.high_slope * over, 0.0)
        inside = log_q.exp() * torch.where(gap == -math.inf, ends.f_at_zero, inside)
        beyond = log_p.exp() * torch.where(gap == math.inf, ends.slope_at_infinity, beyond)
        # The linear part stands apart from f, in which it would swallow the digits of psi at u >> 1.
        at_one, slope = self._at_one
        linear = at_one * log_q.exp() + slope * exp_difference(log_p, log_q)
        return torch.where(gap > cap, beyond, inside) - linear

    def _per_unit_of_p(self, log_ratio: Tensor) -> Tensor:
        return self.f_of_log_ratio(log_ratio) * (-log_ratio).exp()


class _Ends(NamedTuple):
    """What a user's f does far from u = 1: f(0), f'(inf), and slopes in the log-ratio at the caps.

    high_value, high_slope: of f(u) / u.
    """

    f_at_zero: float
    slope_at_infinity: float
    low_slope: float
    high_value: float
    high_slope: float


def _measure_ends(generator: Generator, dtype: torch.dtype) -> _Ends:
    far = torch.tensor([100.0, 200.0, 300.0], dtype=torch.float64)
    cap = torch.tensor(ratio_cap(dtype), dtype=torch.float64)
    largest = torch.finfo(dtype).max
    return _Ends(
        f_at_zero=-falling_limit((-generator.f_of_log_ratio(-far)).tolist()),
        slope_at_infinity=-falling_limit((-generator._per_unit_of_p(far)).tolist()),
        low_slope=derivative(generator.f_of_log_ratio, -cap).clamp(-largest, largest).item(),
        high_value=generator._per_unit_of_p(cap).to(dtype).item(),
        high_slope=derivative(generator._per_unit_of_p, cap).clamp(-largest, largest).item(),
    )


def _load(path: str) -> Callable[[Tensor], Tensor]:
    module, separator, name = path.partition(":")
    if not separator:
        raise ValueError(f"Generator(f) names a function as 'module:name', got {path!r}")
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target
