"""A transport problem as the caller gave it: checked, and with one dimension of batch."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import in_working_precision
from fdiv.divergences.wasserstein import require_equal_masses
from fdiv.transport._marginals import By, Exact, Marginal, marginal_of
from fdiv.transport._pairs import Cost, Dense, Tiles

Penalty = Literal["balanced"] | FDivergence
Marginals = Penalty | tuple[Penalty, Penalty]
Reference = Literal["product", "uniform"]
Gradient = Literal["envelope", "implicit", "unroll"]


class Given(NamedTuple):
    """With its graph, and costs not yet in units of eps."""

    cost: Tensor  # [problems or 1, N, M]
    log_a: Tensor  # [problems, N]
    log_b: Tensor  # [problems, M]
    eps: Tensor  # [problems, 1]
    at_a: Marginal
    at_b: Marginal

    @property
    def pairs(self) -> Dense:
        shared = len(self.cost) == 1 and bool((self.eps == self.eps[:1]).all())
        return Dense(self.cost / (self.eps[:1] if shared else self.eps).unsqueeze(-1))

    def detached(self) -> "Given":
        cost, log_a, log_b = (t.detach() for t in self[:3])
        return Given(cost, log_a, log_b, *self[3:])


class GivenPoints(NamedTuple):
    """The same, where costs are made block by block."""

    x: Tensor  # [problems, N, D]
    y: Tensor  # [problems, M, D]
    log_a: Tensor
    log_b: Tensor
    eps: Tensor
    at_a: Marginal
    at_b: Marginal
    cost: Cost
    chunk: int

    @property
    def pairs(self) -> Tiles:
        return Tiles(self.x, self.y, self.eps, self.cost, self.chunk)

    def detached(self) -> "GivenPoints":
        x, y, log_a, log_b = (t.detach() for t in self[:4])
        return GivenPoints(x, y, log_a, log_b, *self[4:])


def sides_of(marginals: Marginals) -> tuple[Marginal, Marginal]:
    if not isinstance(marginals, tuple):
        marginals = (marginals, marginals)
    if len(marginals) != 2:
        raise ValueError(f"marginals are one penalty for both sides or a pair, got {marginals!r}")
    at_a, at_b = map(marginal_of, marginals)
    return at_a, at_b


def given_costs(
    cost: Tensor,
    log_a: Tensor | None,
    log_b: Tensor | None,
    eps: float | Tensor,
    sides: tuple[Marginal, Marginal],
) -> tuple[Given, torch.Size]:
    """The problem, and the dimensions of batch that the result gets back."""
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"cost is [..., N, M] with an atom on each side, got {tuple(cost.shape)}")
    log_a = _weights(log_a, cost, cost.shape[-2], "log_a")
    log_b = _weights(log_b, cost, cost.shape[-1], "log_b")
    cost, log_a, log_b = in_working_precision(cost, log_a, log_b)
    eps = _positive(eps, cost)
    batch = torch.broadcast_shapes(cost.shape[:-2], log_a.shape[:-1], log_b.shape[:-1], eps.shape)
    log_a, log_b = _checked(_rows(log_a, batch, 1), _rows(log_b, batch, 1), sides)
    shared = cost.shape[:-2].numel() == 1
    cost = cost.reshape(1, *cost.shape[-2:]) if shared else _rows(cost, batch, 2)
    _check_costs(cost.detach(), log_a.detach(), log_b.detach())
    return Given(cost, log_a, log_b, eps.expand(batch).reshape(-1, 1), *sides), batch


def given_points(
    x: Tensor,
    y: Tensor,
    log_a: Tensor | None,
    log_b: Tensor | None,
    eps: float | Tensor,
    sides: tuple[Marginal, Marginal],
    cost: Cost,
    chunk: int,
) -> tuple[GivenPoints, torch.Size]:
    log_a, log_b = _weights(log_a, x, x.shape[-2], "log_a"), _weights(log_b, x, y.shape[-2], "log_b")
    x, y, log_a, log_b = in_working_precision(x, y, log_a, log_b)
    eps = _positive(eps, x)
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2], log_a.shape[:-1], log_b.shape[:-1], eps.shape)
    x, y = _rows(x, batch, 2), _rows(y, batch, 2)
    log_a, log_b = _checked(_rows(log_a, batch, 1), _rows(log_b, batch, 1), sides)
    return GivenPoints(x, y, log_a, log_b, eps.expand(batch).reshape(-1, 1), *sides, cost, chunk), batch


def check_modes(sides: tuple[Marginal, Marginal], reference: Reference, grad: Gradient) -> None:
    if reference not in ("product", "uniform"):
        raise ValueError(f'reference is "product" or "uniform", got {reference!r}')
    if reference == "uniform" and not are_kept(*sides):
        raise ValueError('reference="uniform" is for balanced marginals; write "product"')
    if grad not in ("envelope", "implicit", "unroll"):
        raise ValueError(f'grad is "envelope", "implicit" or "unroll", got {grad!r}')
    if grad == "implicit" and not all(side.is_smooth for side in sides):
        raise ValueError('grad="implicit" needs penalties without a kink; write "envelope"')
    if grad == "unroll" and any(isinstance(side, By) for side in sides):
        raise ValueError('grad="unroll" takes balanced marginals, KL() and TV(); write "implicit"')


def are_kept(at_a: Marginal, at_b: Marginal) -> bool:
    """Whether both marginals are: then a constant may go from one potential to the other."""
    return isinstance(at_a, Exact) and isinstance(at_b, Exact)


def _weights(log_weights: Tensor | None, like: Tensor, count: int, name: str) -> Tensor:
    if log_weights is None:
        return like.new_full((count,), -math.log(count))
    if log_weights.shape[-1:] != (count,):
        raise ValueError(f"{name} is [..., {count}], one weight an atom, got {tuple(log_weights.shape)}")
    return log_weights


def _positive(eps: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(eps, Tensor) and eps.requires_grad:
        raise ValueError("eps is not differentiated; write eps.detach()")
    eps = torch.as_tensor(eps, dtype=like.dtype, device=like.device)
    if not bool(((eps > 0) & eps.isfinite()).all()):
        raise ValueError(
            f"eps is finite and > 0, in the units of the cost, got {eps}; 0 is fdiv.adapters.pot.emd"
        )
    return eps


def _rows(tensor: Tensor, batch: torch.Size, dims: int) -> Tensor:
    """All but the last `dims` dimensions as one."""
    own = tensor.shape[-dims:]
    return tensor.expand(*batch, *own).reshape(-1, *own)


def _checked(log_a: Tensor, log_b: Tensor, sides: tuple[Marginal, Marginal]) -> tuple[Tensor, Tensor]:
    """The weights; of one mass if both marginals are kept."""
    heaviest = torch.cat([log_a.detach().amax(-1), log_b.detach().amax(-1)])
    if bool((heaviest == -math.inf).any()):
        raise ValueError("a measure has no mass: all its log-weights are -inf")
    if not bool((heaviest < math.inf).all()):
        raise ValueError("log-weights are numbers < inf, and not nan")
    if not are_kept(*sides):
        return log_a, log_b
    a, b = log_a.detach().exp(), log_b.detach().exp()
    require_equal_masses(a, b, "balanced transport")
    shift = (b.sum(-1, keepdim=True) / a.sum(-1, keepdim=True)).log() / 2
    return log_a + shift, log_b - shift


def _check_costs(cost: Tensor, log_a: Tensor, log_b: Tensor) -> None:
    if not bool(cost.amin() > -math.inf):  # nan is not, either
        raise ValueError("costs are numbers, or +inf for a forbidden pair; got -inf or nan")
    if bool(cost.amax() == math.inf):
        to_b = (cost - log_b.unsqueeze(-2)).amin(-1)
        to_a = (cost - log_a.unsqueeze(-1)).amin(-2)
        alone = [(log > -math.inf) & (least == math.inf) for log, least in ((log_a, to_b), (log_b, to_a))]
        if any(bool(one.any()) for one in alone):
            raise ValueError(
                "an atom with weight has no allowed partner, all its costs are +inf; leave it out"
            )
