"""f, f' and psi of a divergence along the log-ratio, with all derivatives: there, and in its parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdiv import _ratio
from fdiv._divergence import FDivergence

STEP = 2e-3  # of a central difference of sixth order: it leaves errors of about 1e-12 of the derivative
WEIGHTS = ((1, 45 / 60), (2, -9 / 60), (3, 1 / 60))


@dataclass(frozen=True)
class Curves:
    """The curves of make(*parameters). A plain divergence is one without parameters.

    Differentiable in the log-ratio and in each parameter, backward and forward, any number of times.
    """

    make: Callable[..., FDivergence]
    parameters: tuple[Tensor, ...] = ()

    @property
    def member(self) -> FDivergence:
        return self.make(*_floats(self.parameters))

    def rise(self, log_ratio: Tensor) -> Tensor:
        """u f''(u), the slope of f' along finite log-ratios."""
        closed = None if self.parameters else getattr(self.member, "closed_rise", None)
        if closed:
            return closed(log_ratio)
        return self._of(_ratio.phi, log_ratio, 1)

    def psi(self, log_ratio: Tensor) -> Tensor:
        """f(u) - u f'(u), f(0) at -inf."""
        return self._with_zero(_ratio.psi, log_ratio)

    def f(self, log_ratio: Tensor) -> Tensor:
        return self._with_zero(_f, log_ratio)

    def phi_in(self, which: int, log_ratio: Tensor) -> Tensor:
        """The derivative of f'(u) in one of the parameters, at finite log-ratios."""
        return self._of(_ratio.phi, log_ratio, 0, which)

    def f_in(self, which: int, log_ratio: Tensor) -> Tensor:
        """The derivative of f(u) in one of the parameters; at -inf that of f(0)."""
        return self._with_zero(_f, log_ratio, which)

    def _of(self, function: Callable, log_ratio: Tensor, order: int = 0, which: int | None = None) -> Tensor:
        orders = tuple(int(i == which) for i in range(len(self.parameters)))
        return _Mixed.apply(log_ratio, _Partial(function, self.make, order, orders), *self.parameters)

    def _with_zero(self, function: Callable, log_ratio: Tensor, which: int | None = None) -> Tensor:
        empty = log_ratio == -math.inf
        inside = self._of(function, torch.where(empty, 0.0, log_ratio), 0, which)
        if math.isinf(self.member.f_at_zero):  # which no parameter moves
            return inside.masked_fill(empty, math.inf if which is None else 0.0)
        at_zero = self._of(_f, log_ratio.new_full((), -math.inf), 0, which)
        return torch.where(empty, at_zero, inside)


def _f(divergence: FDivergence, log_ratio: Tensor) -> Tensor:
    return divergence.f(log_ratio)


@dataclass(frozen=True)
class _Partial:
    """A partial derivative of function(make(*parameters), log_ratio).

    `order` times in the log-ratio, and `orders` times in each parameter.
    """

    function: Callable
    make: Callable[..., FDivergence]
    order: int
    orders: tuple[int, ...]

    def once_more(self, which: int | None) -> "_Partial":
        """In the log-ratio, or in a parameter."""
        orders = tuple(n + (i == which) for i, n in enumerate(self.orders))
        return replace(self, order=self.order + (which is None), orders=orders)

    def __call__(self, log_ratio: Tensor, given: tuple[float, ...]) -> Tensor:
        which = next((i for i, n in enumerate(self.orders) if n), None)
        if which is None:
            return _derived(lambda x: self.function(self.make(*given), x), self.order)(log_ratio)
        step = _step(self.make, given, which, log_ratio)
        rest = replace(self, orders=tuple(n - (i == which) for i, n in enumerate(self.orders)))

        def moved(by: float) -> Tensor:
            return rest(log_ratio, _moved(given, which, by))

        terms = [weight * (moved(n * step) - moved(-n * step)) for n, weight in WEIGHTS]
        return sum(terms[1:], start=terms[0]) / step


class _Mixed(torch.autograd.Function):
    """The value of a _Partial, whose derivatives are others."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_ratio: Tensor, partial: _Partial, *parameters: Tensor) -> Tensor:
        at = log_ratio.double() if any(partial.orders) else log_ratio
        return partial(at, _floats(parameters)).to(log_ratio.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        log_ratio, ctx.partial, *parameters = inputs
        ctx.save_for_backward(log_ratio, *parameters)
        ctx.save_for_forward(log_ratio, *parameters)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _, *parameters = ctx.saved_tensors
        in_log_ratio = grad * _once_more(ctx, None) if ctx.needs_input_grad[0] else None
        in_parameters = [
            (grad * _once_more(ctx, i)).sum().reshape(p.shape).to(p.dtype)
            if ctx.needs_input_grad[2 + i]
            else None
            for i, p in enumerate(parameters)
        ]
        return in_log_ratio, None, *in_parameters

    @staticmethod
    def jvp(ctx, along, _partial, *moves):
        total = torch.zeros_like(ctx.saved_tensors[0]) if along is None else along * _once_more(ctx, None)
        for i, move in enumerate(moves):
            if move is not None:
                total = total + _once_more(ctx, i) * move.reshape(()).to(total.dtype)
        return total


def _once_more(ctx, which: int | None) -> Tensor:
    log_ratio, *parameters = ctx.saved_tensors
    return _Mixed.apply(log_ratio, ctx.partial.once_more(which), *parameters)


def _derived(function: Callable, order: int) -> Callable:
    """The derivative of this order of an elementwise function."""
    if order == 0:
        return function
    return torch.func.grad(lambda x: _derived(function, order - 1)(x).sum())


def _moved(given: tuple[float, ...], which: int, by: float) -> tuple[float, ...]:
    return tuple(value + by * (i == which) for i, value in enumerate(given))


def _step(make, given: tuple[float, ...], which: int, log_ratio: Tensor) -> float:
    """Small beside the parameter, and beside 1/|log-ratio|, as u to the power of a parameter is typical."""
    value, far = given[which], log_ratio[log_ratio.isfinite()].abs()
    step = STEP * (min(max(abs(value), 0.01), 1.0) if value else 1.0)
    step = step / (1 + (far.max().item() if far.numel() else 0.0))
    for _ in range(5):
        try:
            for n, _weight in WEIGHTS:
                for by in (n * step, -n * step):
                    make(*_moved(given, which, by))
            return step
        except ValueError:
            step = step / 10
    raise ValueError(
        f"parameter {which} is {value!r}, at the very edge of what {make!r} allows: no derivative there"
    )


def _floats(parameters: tuple[Tensor, ...]) -> tuple[float, ...]:
    return tuple(float(p.detach()) for p in parameters)
