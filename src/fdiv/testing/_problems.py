"""What the laws are tried on, and how they complain."""

import math

import torch
from torch import Tensor

from fdiv._divergence import FDivergence

EMPTY = -math.inf  # log 0


def distributions(
    rows: int = 6,
    support: int = 9,
    scale: float = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [rows, support] of two softmaxes, their logits normal with this scale."""
    log_p, log_q = (x.log_softmax(-1) for x in _normal(2, rows, support, seed=seed, dtype=dtype) * scale)
    return log_p, log_q


def measures(scale: float = 2.0, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The same with total masses that are not one."""
    log_p, log_q = distributions(scale=scale, seed=seed, dtype=dtype)
    shift = _normal(2, len(log_p), 1, seed=seed + 1, dtype=dtype)
    return log_p + shift[0], log_q + shift[1]


def neighbours(distance: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Pairs whose log-ratios are about `distance`, rounded to `dtype`."""
    log_p, direction = distributions(seed=2)
    log_q = (log_p + distance * direction).log_softmax(-1)
    return log_p.to(dtype), log_q.to(dtype)


def log_ratios(limit: float = 12.0) -> Tensor:
    """A grid of log-ratios that leaves 0 out, where f may have a kink."""
    return torch.linspace(-limit, limit, 48, dtype=torch.float64)


def scale_of(divergence: FDivergence) -> float:
    """What rounding errors are proportional to."""
    return max(1.0, divergence.curvature_at_one) if divergence.is_smooth else 1.0


def gradient(function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the sum of `function(*inputs)`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves).sum(), leaves)


def check(holds: Tensor, says: str, got: Tensor, expected: Tensor | str, **at: Tensor) -> None:
    """Raise an AssertionError about the first entry where `holds` is false."""
    if bool(holds.all()):
        return
    where = tuple(torch.nonzero(~holds)[0].tolist())
    if isinstance(expected, Tensor):
        expected = repr(expected.expand(holds.shape)[where].item())
    inputs = ", ".join(f"{name} = {_entry(x, where)}" for name, x in at.items())
    got = got.expand(holds.shape)[where]
    raise AssertionError(f"{says}: expected {expected}, got {got.item()!r} at {inputs or where}")


def check_close(
    got: Tensor, expected: Tensor, says: str, rtol: float, atol: float | Tensor = 0.0, **at: Tensor
) -> None:
    """`check` that two tensors agree, infinities included; NaN agrees with nothing."""
    try:
        shape = torch.broadcast_shapes(got.shape, expected.shape)
    except RuntimeError:
        shape = None
    require(shape == got.shape, f"{says}: expected shape {[*expected.shape]}, got {[*got.shape]}")
    near = (got - expected).abs() <= atol + rtol * expected.abs()
    check((got == expected) | (near & expected.isfinite()), says, got, expected, **at)


def require(holds: bool, says: str) -> None:
    if not holds:
        raise AssertionError(says)


def _entry(x: Tensor, where: tuple[int, ...]) -> str:
    values = x[where[: x.ndim]].tolist()
    if isinstance(values, list) and len(values) > 16:
        return f"[{', '.join(f'{v:.6g}' for v in values[:16])}, ...]"
    return str(values)


def _normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    # Drawn in float64 so that every dtype meets the same problem.
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)
