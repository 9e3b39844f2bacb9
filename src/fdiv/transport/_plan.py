"""The result of a transport problem."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdiv.transport._pairs import Dense, Tiles, weighted


@dataclass(frozen=True, eq=False)
class Transport:
    """What a solver found, for a batch [...] of problems with N and M atoms.

    The plan is P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), whatever the reference of the value. Where both
    marginals are kept, f and g are the ones of the many with <a, f> = <b, g>.

    `plan`, `marginals` and `linear` are made when they are asked for; the first takes N x M numbers.
    Derivatives of all but the value need grad="implicit" or "unroll": with "envelope" they have none.
    """

    value: Tensor  # [...]
    f: Tensor  # [..., N]
    g: Tensor  # [..., M]
    converged: Tensor  # [...]: error <= the tolerance
    error: Tensor  # [...]: L1 distance of a marginal to what it should be, over the mass of a
    iterations: Tensor  # [...]
    log_a: Tensor = field(repr=False)
    log_b: Tensor = field(repr=False)
    eps: Tensor = field(repr=False)  # [problems, 1]
    pairs: Dense | Tiles = field(repr=False)

    @property
    def plan(self) -> Tensor:
        """P [..., N, M]."""
        rows, columns = self._scaled()
        return self._batched(self.pairs.log_plan(rows, columns).exp())

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """The sums of the plan's rows [..., N] and columns [..., M]."""
        rows, columns = self._scaled()
        held = (rows - self.pairs.rows(columns), columns - self.pairs.columns(rows))
        return self._batched(_or_none(held[0], rows)), self._batched(_or_none(held[1], columns))

    @property
    def linear(self) -> Tensor:
        """<P, C> [...], where a forbidden pair adds nothing."""
        rows, columns = self._scaled()
        blocks = self.pairs.tiles()
        parts = [_paid(tile, rows[..., block], columns) for block, tile in blocks]
        return self._batched(torch.stack(parts).sum(0) * self.eps.squeeze(-1))

    def _scaled(self) -> tuple[Tensor, Tensor]:
        """F + log a and G + log b, [problems, atoms]; -inf where there is no weight."""
        f, g = self.f.reshape(self.log_a.shape), self.g.reshape(self.log_b.shape)
        return weighted(f / self.eps, self.log_a), weighted(g / self.eps, self.log_b)

    def _batched(self, rows: Tensor) -> Tensor:
        return rows.reshape((*self.value.shape, *rows.shape[1:]))


def _or_none(log_sum: Tensor, log_weights: Tensor) -> Tensor:
    return torch.where(log_weights > -torch.inf, log_sum, -torch.inf).exp()


def _paid(tile: Dense, rows: Tensor, columns: Tensor) -> Tensor:
    plan = tile.log_plan(rows, columns).exp()
    return (plan * tile.scaled.masked_fill(tile.scaled == torch.inf, 0.0)).sum((-2, -1))
