"""Multistep solvers of dx/dsigma = (x - D) / sigma, one call of D a step, and their damped forms.

Wizadwongsa, Chinchuthakun, Khungurn, Raj, Suwajanakorn, "Diffusion Sampling with Momentum for Mitigating
Divergence Artifacts", arXiv 2307.11118. With e_n the slope and h_n = sigma_{n+1} - sigma_n,

    Adams-Bashforth  x += h AB_k(e),  AB_k = sum_{j<k} g_j nabla^j,  g = 1, 1/2, 5/12, 3/8, 251/720 ...
    heavy ball       v <- (1 - beta) v + beta AB_k(e),  x += h v
    Nesterov         the same v,  x += h ((1 - beta) v + beta AB_k(e))
    GHVB             v <- (1 - beta) v + beta e,  x += h sum_{j<k} (g_j + (1 - beta) / beta g_{j-1}) nabla^j v

nabla is the backward difference. GHVB's is AB_k with e written in v and cut at the same order, so that it
stays of order k; the others fall to the first. beta is `momentum`: 1 is the plain method, smaller damps more.
What the paper calls order 1.8 is order=2, momentum=0.8.

The coefficients are those of even steps. On levels that are spaced smoothly, as `karras`, the error still
falls with the square of the steps for k >= 2, as does that of the first steps, whose history is short.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from fdiv.diffusion.edm import Denoiser, denoised, falling

Rule = Literal["ghvb", "heavy ball", "nesterov"]


def adams_bashforth(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, order: int, condition: Any = None
) -> Tensor:
    """x [B, ...] at sigmas[0], noise already, carried to sigmas[-1]; the state is float64, as in `heun`."""
    return _follow(Multistep(order), denoiser, x, sigmas, condition)


def heavy_ball(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, order: int, momentum: float, condition: Any = None
) -> Tensor:
    return _follow(Multistep(order, momentum, "heavy ball"), denoiser, x, sigmas, condition)


def nesterov(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, order: int, momentum: float, condition: Any = None
) -> Tensor:
    return _follow(Multistep(order, momentum, "nesterov"), denoiser, x, sigmas, condition)


def ghvb(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, order: int, momentum: float, condition: Any = None
) -> Tensor:
    return _follow(Multistep(order, momentum), denoiser, x, sigmas, condition)


class Multistep:
    """The direction of each step, from the slopes so far: `direction(slope)` is called once a step."""

    def __init__(self, order: int, momentum: float = 1.0, rule: Rule = "ghvb"):
        if not (isinstance(order, int) and not isinstance(order, bool) and order >= 1):
            raise ValueError(f"order is a whole number >= 1, got {order!r}; 1.8 is order=2, momentum=0.8")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum is in (0, 1], and 1 is none, got {momentum!r}")
        if rule not in RULES:
            raise ValueError(f"rule is one of {', '.join(RULES)}, got {rule!r}")
        self.order, self.momentum, self.rule = order, momentum, rule
        self.past: list[Tensor] = []  # of e, of GHVB of v; the newest last
        self.velocity: Tensor | None = None

    def direction(self, slope: Tensor) -> Tensor:
        """What the step is multiplied with; the first ones are of the order that they have slopes for."""
        return RULES[self.rule](self, slope)

    def _ghvb(self, slope: Tensor) -> Tensor:
        rate = (1 - self.momentum) / self.momentum
        return self._sum(self._damped(slope), rate)

    def _heavy_ball(self, slope: Tensor) -> Tensor:
        return self._damped(self._sum(slope))

    def _nesterov(self, slope: Tensor) -> Tensor:
        ahead = self._sum(slope)
        return self._mixed(self._damped(ahead), ahead)

    def _damped(self, value: Tensor) -> Tensor:
        self.velocity = value if self.velocity is None else self._mixed(self.velocity, value)
        return self.velocity

    def _mixed(self, old: Tensor, new: Tensor) -> Tensor:
        return (1 - self.momentum) * old + self.momentum * new

    def _sum(self, newest: Tensor, rate: float = 0.0) -> Tensor:
        self.past = [*self.past, newest][-self.order :]
        weights = coefficients(len(self.past), rate)
        return sum((w * value for w, value in zip(weights, reversed(self.past), strict=True)), 0 * newest)


RULES: dict[str, Callable[[Multistep, Tensor], Tensor]] = {
    "ghvb": Multistep._ghvb,
    "heavy ball": Multistep._heavy_ball,
    "nesterov": Multistep._nesterov,
}


def coefficients(order: int, rate: float = 0.0) -> list[float]:
    """The weights of the newest value, of the one before, ...: sum_j (g_j + rate g_{j-1}) nabla^j."""
    plain: list[float] = []
    for j in range(order):
        plain.append(1 - sum(g / (j + 1 - i) for i, g in enumerate(plain)))
    terms = [g + rate * before for g, before in zip(plain, [0.0, *plain], strict=False)]
    return [
        (-1) ** age * sum(math.comb(j, age) * term for j, term in enumerate(terms)) for age in range(order)
    ]


def _follow(rule: Multistep, denoiser: Denoiser, x: Tensor, sigmas: Tensor, condition: Any) -> Tensor:
    state = x.double()
    for sigma, after in pairwise(falling(sigmas)):
        slope = (state - denoised(denoiser, state.to(x.dtype), sigma, condition).double()) / sigma
        state = state + (after - sigma) * rule.direction(slope)
    return state.to(x.dtype)
