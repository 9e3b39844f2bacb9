"""A scalar function of the log-ratio whose plain autograd, at samples of q, is the gradient of D."""

from functools import lru_cache

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, Sum
from fdiv._math import ratio_cap
from fdiv.divergences.alpha import Alpha
from fdiv.divergences.chi_kl import ChiKL
from fdiv.divergences.chi_square import Neyman, Pearson
from fdiv.divergences.hellinger import SquaredHellinger
from fdiv.divergences.jeffreys import Jeffreys
from fdiv.divergences.kl import KL, ReverseKL
from fdiv.divergences.tv import TV
from fdiv.estimate import _far

NODES = 64


def potential(divergence: FDivergence, log_ratio: Tensor) -> Tensor:
    """h >= 0 with h(1) = 0 and -dh/dlog u = psi(u); elementwise, twice differentiable.

    dh/dlog q is then psi, and E_q[psi grad log q] the gradient of D. For ReverseKL() h is (log u)^2 / 2,
    Schulman's k2. Its value is no estimate of D.
    """
    with torch.no_grad():
        value = _value(divergence, log_ratio)
    return with_slope(divergence, log_ratio, value)


def with_slope(divergence: FDivergence, log_ratio: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of the potential: exactly psi in log q."""
    return _Potential.apply(log_ratio, value.detach(), divergence)


class _Potential(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_ratio: Tensor, value: Tensor, divergence: FDivergence) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        log_ratio, _, ctx.divergence = inputs
        ctx.save_for_backward(log_ratio)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (log_ratio,) = ctx.saved_tensors
        return -grad * _far.psi(ctx.divergence, log_ratio), None, None


def _value(divergence: FDivergence, log_ratio: Tensor) -> Tensor:
    cap = ratio_cap(log_ratio.dtype)
    inside = log_ratio.clamp(-cap, cap)
    beyond = (log_ratio - inside).clamp(-_far.FAR, _far.FAR)
    return _inside(divergence, inside) - _far.psi(divergence, inside) * beyond


def _inside(divergence: FDivergence, x: Tensor) -> Tensor:
    match divergence:
        case Sum(terms=terms):
            return torch.stack([weight * _inside(d, x) for weight, d in terms]).sum(0)
        case TV():
            return x.abs() / 2
    powers = _powers(divergence)
    if not powers:
        return _integral(divergence, x)
    return torch.stack([weight * _of_power(x, exponent) for weight, exponent in powers]).sum(0)


def _powers(divergence: FDivergence) -> tuple[tuple[float, float], ...]:
    """(weight, exponent) of the Alphas that `divergence` is a sum of; nothing where it is none."""
    match divergence:
        case KL():
            return ((1.0, 1.0),)
        case ReverseKL():
            return ((1.0, 0.0),)
        case Jeffreys():
            return ((1.0, 1.0), (1.0, 0.0))
        case Alpha(alpha=alpha):
            return ((1.0, alpha),)
        case SquaredHellinger():
            return ((0.25, 0.5),)
        case Pearson():
            return ((2.0, 2.0),)
        case Neyman():
            return ((2.0, -1.0),)
        case ChiKL(weight=weight):
            return ((1.0, 1.0), (2.0 * weight, 2.0))
    return ()


def _of_power(x: Tensor, exponent: float) -> Tensor:
    """The integral of -psi = (u^a - 1)/a, which is (u^a - 1 - a log u)/a^2: k3 of a power of u."""
    if exponent == 0.0:
        return x.square() / 2
    return _far.f(ReverseKL(), exponent * x) / exponent**2


def _integral(divergence: FDivergence, x: Tensor) -> Tensor:
    """-x times the mean of psi between u = 1 and u; a kink of f, which is at 1, is not crossed."""
    nodes, weights = (t.to(x) for t in _gauss_legendre())
    return -x * (_far.psi(divergence, x.unsqueeze(-1) * nodes) @ weights)


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], from the eigenvectors of the Jacobi matrix (Golub and Welsch, 1969)."""
    k = torch.arange(1, NODES, dtype=torch.float64)
    side = torch.diag(k / (4 * k.square() - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(side + side.T)
    return (1 + nodes) / 2, vectors[0].square()
