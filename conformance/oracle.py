"""What is true: divergences written from probabilities in float64, and gradients by enumeration."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


def _square_over(p: Tensor, q: Tensor, mass: Tensor) -> Tensor:
    """sum (p - q)^2 / mass, where an atom that both leave out costs nothing."""
    return torch.where(p == q, 0.0, (p - q).square() / mass).sum(-1)


def jsd(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q."""

    def value(p: Tensor, q: Tensor) -> Tensor:
        m = beta * p + (1 - beta) * q
        return beta * _kl(p, m) + (1 - beta) * _kl(q, m)

    return value


def alpha(a: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(sum p^a q^(1-a) - 1) / (a (a - 1))."""
    return lambda p, q: ((p**a * q ** (1 - a)).sum(-1) - 1) / (a * (a - 1))


def blend(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    """weight KL(p, q) + (1 - weight) KL(q, p)."""
    return lambda p, q: weight * _kl(p, q) + (1 - weight) * _kl(q, p)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward KL": _kl,
    "reverse KL": lambda p, q: _kl(q, p),
    "JSD(0.1)": jsd(0.1),
    "JSD(0.5)": jsd(0.5),
    "JSD(0.9)": jsd(0.9),
    "forward and reverse KL(0.3)": blend(0.3),
    "Jeffreys": lambda p, q: _kl(p, q) + _kl(q, p),
    "skew KL(0.1)": lambda p, q: _kl(p, 0.1 * p + 0.9 * q),
    "skew reverse KL(0.1)": lambda p, q: _kl(q, 0.1 * q + 0.9 * p),
    "alpha(0.3)": alpha(0.3),
    "squared Hellinger": lambda p, q: (p.sqrt() - q.sqrt()).square().sum(-1) / 2,
    "Pearson": lambda p, q: _square_over(p, q, q),
    "Neyman": lambda p, q: _square_over(p, q, p),
    "TV": lambda p, q: (p - q).abs().sum(-1) / 2,
    "triangular": lambda p, q: _square_over(p, q, p + q),
}


def value(name: str, teacher: Tensor, student: Tensor) -> Tensor:
    """The divergence of rows of logits in float64: [rows]. What follows a comma in the name is ignored."""
    return DIVERGENCES[name.partition(",")[0]](teacher.double().softmax(-1), student.double().softmax(-1))


def gradient(name: str, teacher: Tensor, student: Tensor) -> Tensor:
    """Its gradient in the student's logits, in float64."""
    leaf = student.detach().double().requires_grad_()
    return torch.autograd.grad(value(name, teacher, leaf).sum(), leaf)[0]


def coarse(teacher: Tensor, student: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the atoms of `index` [rows, k] and of one atom that holds all the others."""
    chosen = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, index, True)

    def merge(logits: Tensor) -> Tensor:
        log_probs = logits.double().log_softmax(-1)
        tail = log_probs.masked_fill(chosen, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_probs.gather(-1, index), tail], -1)

    return merge(teacher), merge(student)


def difference(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in norms; inf where `actual` is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if not actual.isfinite().all():
        return math.inf
    scale = max(expected.norm().item(), 1e-12)
    return ((actual - expected).norm() / scale).item()
