"""The costs of all pairs of atoms, held as a matrix or made again block by block where they are needed."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Cost = Callable[[Tensor, Tensor], Tensor]  # points [..., N, D] and [..., M, D] to [..., N, M]
# Exponents of a kernel are cut here: below, products would be denormal, which is slow. Scalings up to
# e^DRIFT on each side leave what was cut out of sight, and the rest in range.
CUT = {torch.float32: 60.0, torch.float64: 300.0}
DRIFT = {torch.float32: 18.0, torch.float64: 100.0}


class Kernel(NamedTuple):
    """exp(F + G - C/eps) at potentials F and G, and what multiplies it: no exponential a step."""

    rows_of: Tensor  # [problems, N, M]
    columns_of: Tensor  # [problems, M, N]: its transpose, as products of a row vector are the fast ones

    def rows(self, weights: Tensor) -> Tensor:
        """-log sum_j K_ij w_j."""
        return -(weights.unsqueeze(-2) @ self.columns_of).squeeze(-2).log()

    def columns(self, weights: Tensor) -> Tensor:
        """-log sum_i K_ij w_i."""
        return -(weights.unsqueeze(-2) @ self.rows_of).squeeze(-2).log()


@dataclass(frozen=True, eq=False)
class Dense:
    """cost / eps [problems or 1, N, M]."""

    scaled: Tensor

    def take(self, index: Tensor) -> "Dense":
        return self if len(self.scaled) == 1 else Dense(self.scaled[index])

    def transposed(self) -> "Dense":
        return Dense(self.scaled.mT)

    def double(self) -> "Dense":
        return Dense(self.scaled.double())

    def most(self) -> Tensor:
        """The largest finite |cost| / eps, [problems or 1, 1]."""
        low, high = self.scaled.amin((-2, -1)), self.scaled.amax((-2, -1))
        if not bool(high.isfinite().all()):
            high = self.scaled.masked_fill(self.scaled == math.inf, -math.inf).amax((-2, -1))
        return torch.maximum(low.abs(), high.abs()).unsqueeze(-1)

    def start(self, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
        """The first step at temperature 0: then a kernel has an entry near one over each weight."""
        rows = (self.scaled - log_b.unsqueeze(-2)).amin(-1)
        columns = (self.scaled - weighted(rows, log_a).unsqueeze(-1)).amin(-2)
        return rows, columns

    def kernel(self, rows: Tensor, columns: Tensor) -> Kernel:
        cut = CUT[rows.dtype]
        exponent = (rows.unsqueeze(-1) - self.scaled).add_(columns.unsqueeze(-2))
        kernel = exponent.clamp_(-cut, cut).exp_()
        return Kernel(kernel, kernel.mT.contiguous())

    def rows(self, columns: Tensor, heat: Tensor | None = None) -> Tensor:
        """-log sum_j exp(columns_j - heat C_ij / eps), where `columns` holds log b."""
        return -(columns.unsqueeze(-2) - _times(self.scaled, heat)).logsumexp(-1)

    def columns(self, rows: Tensor, heat: Tensor | None = None) -> Tensor:
        return -(rows.unsqueeze(-1) - _times(self.scaled, heat)).logsumexp(-2)

    def log_plan(self, rows: Tensor, columns: Tensor) -> Tensor:
        """rows_i + columns_j - C_ij/eps; both hold their log weights."""
        return rows.unsqueeze(-1) + columns.unsqueeze(-2) - self.scaled

    def tiles(self) -> Iterator[tuple[slice, "Dense"]]:
        yield slice(None), self


def weighted(potential: Tensor, log_weights: Tensor) -> Tensor:
    """potential + log_weights; -inf where there is no weight, even if the potential is +inf there."""
    return torch.where(log_weights > -math.inf, potential + log_weights, -math.inf)


def _times(scaled: Tensor, heat: Tensor | None) -> Tensor:
    return scaled if heat is None else scaled * heat.unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Tiles:
    """cost(x, y) / eps of points [problems, N, D] and [problems, M, D], made again `chunk` rows at a time."""

    x: Tensor
    y: Tensor
    eps: Tensor  # [problems, 1]
    cost: Cost
    chunk: int

    def take(self, index: Tensor) -> "Tiles":
        return Tiles(self.x[index], self.y[index], self.eps[index], self.cost, self.chunk)

    def transposed(self) -> "Tiles":
        return Tiles(self.y, self.x, self.eps, lambda y, x: self.cost(x, y).mT, self.chunk)

    def most(self) -> Tensor:
        return torch.stack([tile.most() for _, tile in self.tiles()]).amax(0)

    def start(self, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([(tile.scaled - log_b.unsqueeze(-2)).amin(-1) for _, tile in self.tiles()], -1)
        back = self.transposed().tiles()
        columns = [(tile.scaled - weighted(rows, log_a).unsqueeze(-2)).amin(-1) for _, tile in back]
        return rows, torch.cat(columns, -1)

    def rows(self, columns: Tensor, heat: Tensor | None = None) -> Tensor:
        return torch.cat([tile.rows(columns, heat) for _, tile in self.tiles()], -1)

    def columns(self, rows: Tensor, heat: Tensor | None = None) -> Tensor:
        return self.transposed().rows(rows, heat)

    def double(self) -> "Tiles":
        return Tiles(self.x.double(), self.y.double(), self.eps.double(), self.cost, self.chunk)

    def log_plan(self, rows: Tensor, columns: Tensor) -> Tensor:
        return Dense(self.cost(self.x, self.y) / self.eps.unsqueeze(-1)).log_plan(rows, columns)

    def tiles(self) -> Iterator[tuple[slice, Dense]]:
        """Blocks of rows, and which rows they are."""
        for first in range(0, self.x.shape[-2], self.chunk):
            block = slice(first, first + self.chunk)
            yield block, Dense(self.cost(self.x[..., block, :], self.y) / self.eps.unsqueeze(-1))
