"""Far from u = 1, where exponentials overflow: functions of the log-ratio go on as straight lines.

Up to `ratio_cap` nothing changes. Beyond it value and slope are kept, where a clamp would lose the gradient.
A line ends FAR beyond the cap: what lies further, an atom that one side lacks included, is priced as what
lies there, and has no gradient of its own. Where f has a finite limit the limit is what it costs.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import derivative, in_working_precision, ratio_cap
from fdiv.divergences.kl import KL

FAR = 1e4

Function = Callable[[FDivergence, Tensor], Tensor]


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q; 0 where both are empty, which costs nothing."""
    log_p, log_q = in_working_precision(log_p, log_q)
    empty = (log_p == -math.inf) & (log_q == -math.inf)
    return torch.where(empty, 0.0, log_p - log_q)


def f(divergence: FDivergence, x: Tensor, control: float = 0.0) -> Tensor:
    """f(u) + control (u - 1) at log-ratios of any size."""
    value = _continued(FDivergence.f, divergence, x)
    return value - control * psi(KL(), x) if control else value  # KL's psi is 1 - u


def psi(divergence: FDivergence, x: Tensor) -> Tensor:
    """f(u) - u f'(u) at log-ratios of any size."""
    return _continued(FDivergence.psi, divergence, x)


def log_weight(log_q: Tensor, log_behaviour: Tensor) -> Tensor:
    """log q/behaviour, whose exponential goes on as a line beyond the cap; -inf where q has no mass."""
    log_q, log_behaviour = in_working_precision(log_q, log_behaviour)
    x = torch.where(log_q == -math.inf, -math.inf, log_q - log_behaviour)
    return bent(x, ratio_cap(x.dtype))


def weighted(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight) value, whose size goes on as a line where the product of the two would overflow."""
    limit = 690.0 if value.dtype == torch.float64 else 78.0
    tiny = torch.finfo(value.dtype).tiny  # a logarithm of 0 has no gradient
    size = log_weight + value.abs().clamp(min=tiny).log()
    over = size > limit
    line = value.sign() * bent(torch.where(over, size, 0.0), limit).exp()
    return torch.where(over, line, torch.where(over, 0.0, log_weight).exp() * value)


def moving(log_q: Tensor) -> Tensor:
    """0, with the gradient of log_q; none where it is -inf."""
    return torch.where(log_q.isfinite(), log_q - log_q.detach(), 0.0)


def bent(x: Tensor, cap: float) -> Tensor:
    """x, of which the exponential is a line from `cap` on."""
    beyond = (x - cap).clamp(0.0, FAR)
    return torch.where(x > cap, cap + beyond.log1p(), x)


class _Line(NamedTuple):
    cap: float  # inf: the function itself serves
    slope: float


def _continued(function: Function, divergence: FDivergence, x: Tensor) -> Tensor:
    low, high = _lines(function, divergence, x.dtype)
    value = function(divergence, x.clamp(-low.cap, high.cap))
    for line, beyond in ((high, x - high.cap), (low, -low.cap - x)):
        if line.cap < math.inf:
            step = torch.where(beyond > 0, beyond.clamp(max=FAR), 0.0)
            value = value + line.slope * step
    return value


@lru_cache(maxsize=4096)
def _lines(function: Function, divergence: FDivergence, dtype: torch.dtype) -> tuple[_Line, _Line]:
    """What follows below 1/cap and above cap; slopes point outwards."""

    def line(sign: float) -> _Line:
        at = torch.tensor(sign * math.inf, dtype=torch.float64)
        if function(divergence, at).isfinite():
            return _Line(math.inf, 0.0)
        return _line(partial(function, divergence), sign, dtype)

    return line(-1.0), line(1.0)


def _line(function: Callable[[Tensor], Tensor], sign: float, dtype: torch.dtype) -> _Line:
    cap, largest = ratio_cap(dtype), torch.finfo(dtype).max
    while True:  # a steep f, as that of Alpha(4), leaves no room for the line: it starts earlier
        at = torch.tensor(sign * cap, dtype=torch.float64)
        value, slope = function(at).item(), sign * derivative(function, at).item()
        if abs(value) + FAR * abs(slope) < largest:
            return _Line(cap, slope)
        cap /= 2
