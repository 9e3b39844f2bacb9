"""Which atoms can have probability where f'(0) is finite: few of a vocabulary, and all that need work."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.operators._solver import solve

WIDE = 1024  # from this many atoms on, looking for the support first is worth its passes
GROUP = 64  # the best atom of each such group stands for it in the guess of the support


@dataclass(frozen=True)
class Candidates:
    """Places in [rows, atoms], and how they stand side by side in a block [rows, width]."""

    row: Tensor
    column: Tensor
    place: Tensor
    rows: int
    width: int

    def pack(self, values: Tensor, empty: float) -> Tensor:
        block = values.new_full((self.rows * self.width,), empty)
        return block.index_put((self.place,), values).view(self.rows, self.width)

    def unpack(self, block: Tensor) -> Tensor:
        return block.flatten()[self.place]


def candidates(theta: Tensor, log_q: Tensor, divergence: FDivergence) -> Candidates | None:
    """The atoms that may have x > 0, or None where f keeps all of them, or most, or there are not many."""
    rows, atoms = theta.shape
    lowest = divergence.slope_at_zero
    if atoms < WIDE or not math.isfinite(lowest):
        return None
    best, log_q_there = _best_of_groups(theta, log_q)
    # Some of the atoms alone need a smaller tau, and hence would keep more, than all of them do.
    reach = lowest - solve(best, log_q_there, divergence).slope
    top = best.amax(-1, keepdim=True)
    slack = 1e-4 * reach.abs() + 8 * torch.finfo(theta.dtype).eps * top.abs()
    row, column = _above(theta, best, top + reach - slack)
    first = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
    width = int(first.diff().max())
    if width > atoms // 2:
        return None
    rank = torch.arange(len(row), device=row.device) - first[row]
    return Candidates(row, column, row * width + rank, rows, width)


def _in_groups(theta: Tensor) -> tuple[Tensor, Tensor]:
    """([rows, groups, GROUP], what is left over): neighbours form a group, which is then read at once."""
    groups = theta.shape[1] // GROUP
    even = groups * GROUP
    return theta[:, :even].unflatten(1, (groups, GROUP)), theta[:, even:]


def _best_of_groups(theta: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """One atom of each group, the best of all among them: [rows, groups + left over] twice."""
    by_group, left = _in_groups(theta)
    if log_q.stride() == (0, 0):  # one number, expanded: which atom it was does not matter, and costs
        best = torch.cat([by_group.amax(-1), left], -1)
        return best, log_q[:, :1].expand_as(best)
    best, index = by_group.max(-1)
    log_q_by_group, log_q_left = _in_groups(log_q)
    log_q_there = log_q_by_group.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return torch.cat([best, left], -1), torch.cat([log_q_there, log_q_left], -1)


def _above(theta: Tensor, best: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) where theta > bound, by rows: in the groups whose best is, as long as those are few."""
    by_group, _ = _in_groups(theta)
    groups = by_group.shape[1]
    row, place = (best > bound).nonzero(as_tuple=True)
    if len(row) * GROUP > theta.numel() // 8:
        row, column = (theta > bound).nonzero(as_tuple=True)
        return row, column
    of_group = place < groups
    alone, row, group = row[~of_group], row[of_group], place[of_group]
    hit, within = (by_group[row, group] > bound[row]).nonzero(as_tuple=True)
    found = torch.cat([row[hit], alone])
    column = torch.cat([group[hit] * GROUP + within, place[~of_group] + groups * (GROUP - 1)])
    order = found.argsort(stable=True)
    return found[order], column[order]
