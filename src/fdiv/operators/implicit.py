"""Derivatives of a solver from the equations that its solution satisfies, whatever the solver did."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdiv.operators.linear import GMRES, LinearSolver

Parts = tuple[Tensor, ...]


def implicit(
    solver: Callable, optimality: Callable, linear: LinearSolver | None = None, batched: bool = False
) -> Callable:
    """`solver`, made differentiable: x = solver(*parameters) with optimality(x, *parameters) = 0.

    With F the optimality condition, A = dF/dx and B = dF/dparameter at the solution,

        dx = -A^{-1} B dparameter,    and backwards   grad_parameter = -B' A'^{-1} grad_x

    A and B are never formed: F is differentiated by torch, and `linear` solves with products by A. None is
    GMRES(); ConjugateGradients() where A is symmetric and definite (F the gradient of something convex);
    LeastSquares(ridge) where it is singular. See fdiv.operators.linear.

    Shapes: x is a tensor or a tuple of tensors, F(x, ...) as x. `batched` says that the first dimension of
    every part of x numbers independent problems: then each has its own linear solver, and all advance
    together; without it they are one block-diagonal problem, right but slower.
    The result is differentiable in each floating-point tensor among the parameters, backward and forward
    (torch.func.jvp, torch.autograd.forward_ad), any number of times, but not forward over forward, where
    torch makes 0 of it. Tensors that `optimality` closes over are constants to it: pass them as parameters.
    `solver` runs without gradient; how well its x satisfies F = 0 bounds how well the derivative is that of
    the true solution. Not under torch.func.vmap.
    Errors: ArithmeticError where the linear system is not solved; ValueError for F of another shape than x.
    Source: Blondel, Berthet, Cuturi, Frostig, Hoyer, Llinares-Lopez, Pedregosa, Vert, "Efficient and Modular
    Implicit Differentiation" (arXiv 2105.15183).

    >>> import torch
    >>> root = implicit(lambda a: a.sqrt(), lambda x, a: x * x - a)
    >>> a = torch.tensor([4.0, 9.0], requires_grad=True)
    >>> torch.autograd.grad(root(a).sum(), a)[0]
    tensor([0.2500, 0.1667])
    """
    problem = _Problem(optimality, linear or GMRES(), batched)

    def solve(*parameters):
        with torch.no_grad():
            x = solver(*(p.detach() if isinstance(p, Tensor) else p for p in parameters))
        single = isinstance(x, Tensor)
        parts = tuple(part.detach() for part in ((x,) if single else x))
        result = _Implicit.apply(problem, single, len(parts), *parts, *parameters)
        return result[0] if single else result

    return solve


@dataclass(frozen=True)
class _Problem:
    optimality: Callable
    linear: LinearSolver
    batched: bool

    def residual(self, x: Parts, parameters: tuple, single: bool) -> Parts:
        value = self.optimality(x[0] if single else x, *parameters)
        value = (value,) if single else tuple(value)
        shapes, wanted = [tuple(v.shape) for v in value], [tuple(part.shape) for part in x]
        if shapes != wanted:
            raise ValueError(
                f"optimality has one equation an unknown: the shapes of x {wanted}, got {shapes}"
            )
        return value

    def solved(self, right: Parts, x: Parts, parameters: tuple, single: bool, transpose: bool) -> Parts:
        """u with A u = right, or A' u = right: itself a solution, and so differentiable in all of these."""
        size = len(x)

        def equations(u: Parts, *given) -> Parts:
            right, at, parameters = given[:size], given[size : 2 * size], given[2 * size :]
            products = _times(self, at, parameters, single)[transpose](u)
            return tuple(product - r for product, r in zip(products, right, strict=True))

        def solver(*given) -> Parts:
            right, at, parameters = given[:size], given[size : 2 * size], given[2 * size :]
            flat = _Flat(at, self.batched)
            with torch.autocast(
                at[0].device.type, enabled=False
            ):  # else products of vectors lose their digits
                times, back = (flat.of(product) for product in _times(self, at, parameters, single))
                products = (back, times) if transpose else (times, back)
                return flat.split(self.linear(*products, flat.join(right)))

        return implicit(solver, equations, self.linear, self.batched)(*right, *x, *parameters)


def _times(problem: _Problem, x: Parts, parameters: tuple, single: bool) -> tuple[Callable, Callable]:
    """(u -> A u, u -> A' u). A u is the transpose of the linear map u -> A' u, so F needs no forward mode."""
    back = torch.func.vjp(lambda *at: problem.residual(at, parameters, single), *x)[1]
    return _transposed(back, x), back


def _transposed(linear_map: Callable[[Parts], Parts], like: Parts) -> Callable[[Parts], Parts]:
    """The transpose of a linear map of tensors shaped `like`."""
    zeros = tuple(torch.zeros_like(part) for part in like)
    return lambda u: torch.func.vjp(lambda *v: linear_map(v), *zeros)[1](u)


@dataclass(frozen=True)
class _Flat:
    """Tensors as one block [problems, unknowns], and back."""

    like: Parts
    batched: bool

    def join(self, parts: Parts) -> Tensor:
        rows = self.like[0].shape[0] if self.batched else 1
        return torch.cat([part.reshape(rows, -1) for part in parts], -1)

    def split(self, block: Tensor) -> Parts:
        sizes = [part.numel() // len(block) for part in self.like]
        pieces = block.split(sizes, -1)
        return tuple(piece.reshape(part.shape) for piece, part in zip(pieces, self.like, strict=True))

    def of(self, function: Callable[[Parts], Parts]) -> Callable[[Tensor], Tensor]:
        return lambda block: self.join(function(self.split(block)))


class _Implicit(torch.autograd.Function):
    """The parts of x as they are, with the derivatives of the theorem."""

    @staticmethod
    def forward(problem: _Problem, single: bool, size: int, *given):
        return tuple(part.clone() for part in given[:size])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.problem, ctx.single, ctx.size, *given = inputs
        parameters = given[ctx.size :]
        ctx.others = [None if isinstance(p, Tensor) else p for p in parameters]
        ctx.tensors = [i for i, p in enumerate(parameters) if isinstance(p, Tensor)]
        saved = (*output, *(parameters[i] for i in ctx.tensors))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, parameters = _saved(ctx)
        wanted = [i for i in ctx.tensors if ctx.needs_input_grad[3 + ctx.size + i]]
        u = ctx.problem.solved(grads, x, parameters, ctx.single, transpose=True)
        pull = _in_parameters(ctx, x, parameters, wanted)
        found = dict(zip(wanted, pull(tuple(-part for part in u)), strict=True))
        return None, None, None, *(None for _ in x), *(found.get(i) for i in range(len(parameters)))

    @staticmethod
    def jvp(ctx, _problem, _single, _size, *tangents):
        x, parameters = _saved(ctx)
        moves = {i: tangents[ctx.size + i] for i in ctx.tensors if tangents[ctx.size + i] is not None}
        right = _transposed(_in_parameters(ctx, x, parameters, list(moves)), x)(tuple(moves.values()))
        return ctx.problem.solved(tuple(-r for r in right), x, parameters, ctx.single, transpose=False)


def _saved(ctx) -> tuple[Parts, tuple]:
    x, tensors = ctx.saved_tensors[: ctx.size], ctx.saved_tensors[ctx.size :]
    parameters = list(ctx.others)
    for i, tensor in zip(ctx.tensors, tensors, strict=True):
        parameters[i] = tensor
    return x, tuple(parameters)


def _in_parameters(ctx, x: Parts, parameters: tuple, wanted: list[int]) -> Callable[[Parts], Parts]:
    """The map u -> B' u in the wanted parameters."""

    def residual(*varied: Tensor) -> Parts:
        given = list(parameters)
        for i, tensor in zip(wanted, varied, strict=True):
            given[i] = tensor
        return ctx.problem.residual(x, tuple(given), ctx.single)

    return torch.func.vjp(residual, *(parameters[i] for i in wanted))[1]
