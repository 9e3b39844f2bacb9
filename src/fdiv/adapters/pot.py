"""Transport without entropy, by the network simplex of POT."""

from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.divergences.wasserstein import require_equal_masses

try:
    from ot.lp import emd as network_simplex
except ImportError as error:
    raise ImportError('this needs POT: pip install "fdiv[transport]"') from error


class ExactTransport(NamedTuple):
    """The least cost [...], a plan [..., N, M] that has it, and dual potentials f [..., N] and g [..., M]."""

    value: Tensor
    plan: Tensor
    f: Tensor
    g: Tensor


def emd(
    cost: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None, max_iter: int = 1_000_000
) -> ExactTransport:
    """min of <P, C> over plans P with the marginals a and b, problem by problem on the CPU in float64.

    cost [..., N, M] is finite; the log-weights [..., N] and [..., M] broadcast to it and default to uniform.
    The value is differentiable: P in the cost, and f and g in the weights, up to a constant. Where many plans
    are optimal these are one of many subgradients. Of `sinkhorn` it is the limit eps -> 0.
    Errors: RuntimeError where `max_iter` pivots do not suffice.
    """
    if cost.ndim < 2 or not bool(cost.isfinite().all()):
        raise ValueError(
            f"cost is finite and [..., N, M], got {tuple(cost.shape)}; write a large number for inf"
        )
    (n, m), batch = cost.shape[-2:], cost.shape[:-2]
    a = _weights(log_a, cost, n).expand(*batch, n)
    b = _weights(log_b, cost, m).expand(*batch, m)
    require_equal_masses(a, b, "emd")
    costs, rows, columns = (t.detach().double().cpu() for t in (cost, a, b))
    each = zip(costs.reshape(-1, n, m), rows.reshape(-1, n), columns.reshape(-1, m), strict=True)
    solved = [_one(*one, max_iter) for one in each]
    plan, f, g = (
        torch.stack(part).reshape(*batch, *part[0].shape).to(cost) for part in zip(*solved, strict=True)
    )
    priced = (f * (a - a.detach())).sum(-1) + (g * (b - b.detach())).sum(-1)
    return ExactTransport((plan * cost).sum((-2, -1)) + priced, plan, f, g)


def _weights(log_weights: Tensor | None, cost: Tensor, count: int) -> Tensor:
    if log_weights is None:
        return cost.new_full((count,), 1 / count)
    return log_weights.to(cost.dtype).exp()


def _one(cost: Tensor, a: Tensor, b: Tensor, max_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    b = b * (a.sum() / b.sum())  # it refuses a rounding error in the mass
    plan, log = network_simplex(a.numpy(), b.numpy(), cost.numpy(), numItermax=max_iter, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"the network simplex stopped early: {log['warning']}")
    return torch.from_numpy(plan), torch.from_numpy(log["u"]), torch.from_numpy(log["v"])
