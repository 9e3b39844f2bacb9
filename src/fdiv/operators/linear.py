"""Linear systems known by their products alone: [rows, unknowns], one system a row, all advanced together."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class LinearSolver(Protocol):
    """x with A x = right, rows by rows; `product` is x -> A x and `transposed` x -> A' x."""

    def __call__(self, product: Product, transposed: Product, right: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class GMRES:
    """Any invertible A: the smallest residual over the Krylov space, restarted every `memory` products.

    Stops at |A x - right| <= tolerance |right|; None is eps^(2/3) of the dtype. Errors: ArithmeticError when
    `steps` products do not reach it.
    Source: Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
    systems" (1986).
    """

    tolerance: float | None = None
    steps: int = 1000
    memory: int = 30

    def __post_init__(self):
        _check(self.tolerance, self.steps)
        if self.memory < 1:
            raise ValueError(
                f"memory is the number of vectors that are kept, at least 1; got {self.memory!r}"
            )

    def __call__(self, product: Product, transposed: Product, right: Tensor) -> Tensor:
        goal = _goal(self.tolerance, right)
        x, residual, left = torch.zeros_like(right), right, self.steps
        while bool((_norm(residual) > goal).any()) and left > 0:
            most = min(self.memory, left, right.shape[-1])
            step, used = _in_krylov_space(product, residual, goal, most)
            x, left = x + step, left - used
            residual = right - product(x)
        return _reached(x, residual, goal, self)


@dataclass(frozen=True)
class ConjugateGradients:
    """A symmetric and definite, of either sign: three vectors, one product a step.

    `ridge` solves (A + ridge I) x = right instead; give it the sign of A.
    Stops and errors as GMRES does.
    Source: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems" (1952).
    """

    ridge: float = 0.0
    tolerance: float | None = None
    steps: int = 1000

    def __post_init__(self):
        _check(self.tolerance, self.steps)

    def __call__(self, product: Product, transposed: Product, right: Tensor) -> Tensor:
        goal = _goal(self.tolerance, right)
        x, residual = torch.zeros_like(right), right
        direction, square = residual, _dot(residual, residual)
        for _ in range(self.steps):
            open_rows = square.sqrt() > goal
            if not bool(open_rows.any()):
                break
            along = product(direction) + self.ridge * direction
            length = torch.where(open_rows, square / _dot(direction, along), 0.0)
            x, residual = x + length * direction, residual - length * along
            before, square = square, _dot(residual, residual)
            direction = residual + torch.where(open_rows, square / before, 0.0) * direction
        return _reached(x, residual, goal, self)


@dataclass(frozen=True)
class LeastSquares:
    """Any A, singular too: the least |A x - right|^2 + ridge |x|^2, by conjugate gradients.

    Two products a step; of many solutions the one of least norm. The condition number counts twice, so ask
    for a ridge, or for float64, where A is nearly singular. Stops at
    |A' (A x - right) + ridge x| <= tolerance |A' right|.
    """

    ridge: float = 0.0
    tolerance: float | None = None
    steps: int = 1000

    def __post_init__(self):
        _check(self.tolerance, self.steps)
        if not (0 <= self.ridge < math.inf):
            raise ValueError(f"ridge is finite and >= 0, got {self.ridge!r}")

    def __call__(self, product: Product, transposed: Product, right: Tensor) -> Tensor:
        def normal(x: Tensor) -> Tensor:
            return transposed(product(x))

        inner = ConjugateGradients(self.ridge, self.tolerance, self.steps)
        return inner(normal, normal, transposed(right))


def _in_krylov_space(product: Product, residual: Tensor, goal: Tensor, most: int) -> tuple[Tensor, int]:
    """(the step that shrinks the residual most within `most` products, the products it took)."""
    length = _norm(residual)
    basis = _unit(residual, length).unsqueeze(-1)  # [rows, unknowns, vectors]
    columns: list[Tensor] = []  # of the Hessenberg matrix: [rows, 2], [rows, 3], ...
    while True:
        new, shares = product(basis[..., -1]), basis.new_zeros(len(basis), basis.shape[-1])
        for _ in range(2):  # once more, for what rounding has left of the others
            share = basis.mT @ new.unsqueeze(-1)
            new, shares = new - (basis @ share).squeeze(-1), shares + share.squeeze(-1)
        height = _norm(new)
        columns.append(torch.cat([shares, height], -1))
        weights, miss = _best_combination(columns, length)
        if len(columns) == most or bool((miss <= goal).all()):
            return (basis @ weights).squeeze(-1), len(columns)
        basis = torch.cat([basis, _unit(new, height).unsqueeze(-1)], -1)


def _best_combination(columns: list[Tensor], length: Tensor) -> tuple[Tensor, Tensor]:
    """The weights [rows, columns, 1] that minimise |length e_1 - H weights|, and that norm [rows, 1]."""
    size = len(columns)
    hessenberg = torch.stack([torch.nn.functional.pad(c, (0, size + 1 - c.shape[-1])) for c in columns], -1)
    first = torch.nn.functional.pad(length, (0, size)).unsqueeze(-1)
    weights = torch.linalg.pinv(hessenberg) @ first
    return weights, _norm((first - hessenberg @ weights).squeeze(-1))


def _check(tolerance: float | None, steps: int) -> None:
    if tolerance is not None and not (0 < tolerance < 1):
        raise ValueError(
            f"tolerance is relative, > 0 and < 1, or None for that of the dtype; got {tolerance!r}"
        )
    if steps < 1:
        raise ValueError(f"steps is the number of steps allowed, at least 1; got {steps!r}")


def _goal(tolerance: float | None, right: Tensor) -> Tensor:
    return (torch.finfo(right.dtype).eps ** (2 / 3) if tolerance is None else tolerance) * _norm(right)


def _reached(x: Tensor, residual: Tensor, goal: Tensor, solver: object) -> Tensor:
    off = ~(_norm(residual) <= goal)
    if bool(off.any()):
        worst = (_norm(residual) / goal)[off].max().item()
        raise ArithmeticError(
            f"{solver!r} stopped with a residual {worst:.1e} times what its tolerance allows; where the "
            "system is singular write LeastSquares(ridge=...), where it is badly scaled take float64, more "
            "steps or a larger tolerance; and see that the optimality condition holds at the solution"
        )
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return a.norm(dim=-1, keepdim=True)


def _unit(a: Tensor, length: Tensor) -> Tensor:
    return a / length.clamp(min=torch.finfo(a.dtype).tiny)
