"""One transport problem, or many of one shape, on the way to its solution."""

import torch
from torch import Tensor

from fdiv.transport._marginals import Exact
from fdiv.transport._pairs import DRIFT, Dense, Kernel, weighted
from fdiv.transport._problem import Problem, Solution

STATE = ("f", "g", "x", "y")


class Run:
    """Potentials F0 + f and G0 + g on their way."""

    def __init__(self, problem: Problem, f: Tensor, g: Tensor):
        self.problem, self.steps = problem, 0
        self.a, self.b = problem.log_a.exp(), problem.log_b.exp()
        self.x, self.y = torch.zeros_like(f), torch.zeros_like(g)
        self._anchor(f, g)

    def _anchor(self, f: Tensor, g: Tensor) -> None:
        """Make the kernel here. Where costs are not in memory there is none, and F0 = G0 = 0."""
        self.kernel: Kernel | None = None
        self.f0, self.g0, self.f, self.g = torch.zeros_like(f), torch.zeros_like(g), f, g
        if isinstance(self.problem.pairs, Dense):
            # An atom without weight and without an allowed partner has the potential inf.
            self.f0, self.g0 = f.nan_to_num(posinf=0.0), g.nan_to_num(posinf=0.0)
            self.f, self.g = torch.zeros_like(f), torch.zeros_like(g)
            self.kernel = self.problem.pairs.kernel(self.f0, self.g0)

    def exact_rows(self) -> Tensor:
        """The f that would fit the rows to a."""
        if self.kernel is None:
            return self.problem.pairs.rows(weighted(self.g, self.problem.log_b))
        return self.kernel.rows(self.b * self.g.exp())

    def exact_columns(self) -> Tensor:
        if self.kernel is None:
            return self.problem.pairs.columns(weighted(self.f, self.problem.log_a))
        return self.kernel.columns(self.a * self.f.exp())

    def error(self, exact: Tensor) -> Tensor:
        """Of the rows; before the first step of both sides."""
        error = self._off(self.a, self.f, exact, self._row_potential(exact))
        if self.steps == 0:
            exact = self.exact_columns()
            wanted = self._column_potential(exact)
            self.y = wanted - exact
            error = error + self._off(self.b, self.g, exact, wanted)
        return error / self.a.sum(-1)

    def _off(self, weight: Tensor, now: Tensor, exact: Tensor, wanted: Tensor) -> Tensor:
        off = weight * ((now - exact).exp() - (wanted - exact).exp()).abs()
        return torch.where(weight > 0, off, 0.0).sum(-1)

    def _row_potential(self, exact: Tensor) -> Tensor:
        if isinstance(self.problem.at_a, Exact):
            return exact
        return self.problem.at_a.potential(self.f0 + exact, self.problem.eps, self.x) - self.f0

    def _column_potential(self, exact: Tensor) -> Tensor:
        if isinstance(self.problem.at_b, Exact):
            return exact
        return self.problem.at_b.potential(self.g0 + exact, self.problem.eps, self.y) - self.g0

    def step(self, exact: Tensor, relaxation: Tensor | None, last: bool) -> None:
        """Both sides, stretched; the columns of the last step of a block are fitted exactly."""
        wanted = self._row_potential(exact)
        self.x = wanted - exact
        self.f = wanted if relaxation is None else torch.lerp(self.f, wanted, relaxation)
        exact = self.exact_columns()
        wanted = self._column_potential(exact)
        self.y = wanted - exact
        self.g = wanted if relaxation is None or last else torch.lerp(self.g, wanted, relaxation)
        self.steps += 1

    def is_far(self) -> bool:
        """Whether the kernel was made too far from here to be trusted."""
        if self.kernel is None:
            return False
        f = torch.where(self.a > 0, self.f, 0.0).abs().amax()
        g = torch.where(self.b > 0, self.g, 0.0).abs().amax()
        return not bool(torch.maximum(f, g) <= DRIFT[self.f.dtype])  # nan is far, too

    def renew(self) -> None:
        """Make the kernel here, or where numbers have overflown, one step on from where it was made."""
        f, g = self.f0 + self.f, self.g0 + self.g
        if not bool(f.isfinite().all() & g.isfinite().all()):
            pairs, log_a, log_b, eps, at_a, at_b = self.problem
            f = at_a.potential(pairs.rows(weighted(self.g0, log_b)), eps)
            g = at_b.potential(pairs.columns(weighted(f, log_a)), eps)
            self.steps += 1
        self._anchor(f, g)

    def solution(self, exact: Tensor, error: Tensor) -> Solution:
        x = self._row_potential(exact) - exact
        mass = torch.where(self.a > 0, self.a * (self.f - exact).exp(), 0.0).sum(-1)
        steps = torch.full_like(error, self.steps, dtype=torch.long)
        return Solution(self.f0 + self.f, self.g0 + self.g, x, self.y, mass, error, steps)

    def take(self, index: Tensor) -> None:
        self.problem = self.problem.take(index)
        for name in ("a", "b", "f0", "g0", *STATE):
            setattr(self, name, getattr(self, name)[index])
        if self.kernel is not None:
            self.kernel = Kernel(*(part[index] for part in self.kernel))


class Mirror(Run):
    """F = G."""

    def error(self, exact: Tensor) -> Tensor:
        return self._off(self.a, self.f, exact, self._row_potential(exact)) / self.a.sum(-1)

    def step(self, exact: Tensor, relaxation: Tensor | None, last: bool) -> None:
        wanted = self._row_potential(exact)
        self.f = self.g = (self.f + wanted) / 2
        self.x = self.y = wanted - exact
        self.steps += 1
