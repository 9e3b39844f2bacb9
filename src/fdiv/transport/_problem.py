"""What a solver is given, what it finds, and when it stops. Everything is in units of eps."""

from typing import NamedTuple

from torch import Tensor

from fdiv.transport._marginals import Marginal
from fdiv.transport._pairs import Dense, Tiles


class Problem(NamedTuple):
    """`problems` of one shape. A weight of 0 is -inf."""

    pairs: Dense | Tiles
    log_a: Tensor  # [problems, N]
    log_b: Tensor  # [problems, M]
    eps: Tensor  # [problems, 1]
    at_a: Marginal
    at_b: Marginal

    def take(self, index: Tensor) -> "Problem":
        a, b, eps = self.log_a[index], self.log_b[index], self.eps[index]
        return Problem(self.pairs.take(index), a, b, eps, self.at_a, self.at_b)

    def turned(self) -> "Problem":
        return Problem(self.pairs.transposed(), self.log_b, self.log_a, self.eps, self.at_b, self.at_a)

    def double(self) -> "Problem":
        a, b, eps = (t.double() for t in (self.log_a, self.log_b, self.eps))
        return Problem(self.pairs.double(), a, b, eps, self.at_a, self.at_b)


class Solution(NamedTuple):
    """Potentials F and G, log-ratios x of the wanted marginals to a and b, and how it went, [problems]."""

    f: Tensor
    g: Tensor
    x: Tensor
    y: Tensor
    mass: Tensor  # of the plan
    error: Tensor  # the L1 distance of the rows' marginal to the wanted one, over the mass of a
    steps: Tensor


class Stop(NamedTuple):
    tolerance: Tensor  # [problems]
    steps: int
    newton: bool
