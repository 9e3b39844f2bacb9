"""The log-probability of one token and the entropy of its distribution, from a row of logits.

d log q_i / dz_j = [i = j] - q_j,        dH / dz_j = -q_j (log q_j + H)
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor


def log_prob_and_entropy(
    logits: Tensor, index: Tensor, compiled: bool, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Each [rows], of logits [rows, vocab] and index [rows]; `group` holds other columns (see `Head`)."""
    moments = _moments(compiled)(logits)
    index, owned = _local(index, logits.shape[-1], group)
    chosen = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    chosen = torch.where(owned, chosen, -torch.inf)
    if group is not None:
        moments = _combined(moments, group)
        dist.all_reduce(chosen, op=dist.ReduceOp.MAX, group=group)
    lse, mean = moments
    return (chosen.double() - lse).to(logits.dtype), (lse - mean).to(logits.dtype)


def log_prob_slope(
    logits: Tensor,
    index: Tensor,
    upstream: Tensor,
    entropy_upstream: Tensor,
    compiled: bool,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The gradient in the logits of upstream log_prob + entropy_upstream entropy, [rows, vocab]."""
    moments = _moments(compiled)(logits)
    if group is not None:
        moments = _combined(moments, group)
    slope = _slopes(compiled)(logits, *moments, upstream, entropy_upstream)
    index, owned = _local(index, logits.shape[-1], group)
    upstream = torch.where(owned, upstream, 0.0).to(slope.dtype)
    return slope.scatter_add_(-1, index.unsqueeze(-1), upstream.unsqueeze(-1))


def _row_moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp, mean of the logits under their softmax) in float64."""
    top = logits.amax(-1, keepdim=True)
    centred = (logits - top).clamp(min=-80.0)
    powers = centred.exp()
    total = powers.sum(-1, dtype=torch.float64)
    mean = (powers * centred).sum(-1, dtype=torch.float64) / total
    top = top.squeeze(-1).double()
    return top + total.log(), top + mean


def _row_slopes(logits: Tensor, lse: Tensor, mean: Tensor, upstream: Tensor, entropy_upstream: Tensor):
    log_q = (logits - lse.to(logits.dtype).unsqueeze(-1)).clamp(min=-80.0)
    entropy = (lse - mean).to(logits.dtype).unsqueeze(-1)
    upstream, entropy_upstream = upstream.unsqueeze(-1), entropy_upstream.unsqueeze(-1)
    return -log_q.exp() * (upstream + entropy_upstream * (log_q + entropy))


def _moments(compiled: bool) -> Callable:
    return _compiled(_row_moments) if compiled else _row_moments


def _slopes(compiled: bool) -> Callable:
    return _compiled(_row_slopes) if compiled else _row_slopes


@lru_cache(maxsize=2)
def _compiled(function: Callable) -> Callable:
    from fdiv.kernels.compiled import Compiled  # here, for importing a compiler takes seconds

    return Compiled(function, "FusedLogProb()")


def _local(index: Tensor, columns: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(the column here, whether it is here) of tokens numbered over all ranks."""
    if group is None:
        return index, torch.ones_like(index, dtype=torch.bool)
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.long, device=index.device)
    sizes[dist.get_rank(group)] = columns
    dist.all_reduce(sizes, group=group)
    index = index - sizes[: dist.get_rank(group)].sum()
    owned = (index >= 0) & (index < columns)
    return torch.where(owned, index, 0), owned


def _combined(moments: tuple[Tensor, Tensor], group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    local = torch.stack(moments)
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    all_lse, all_means = torch.stack(gathered).unbind(1)
    lse = all_lse.logsumexp(0)
    return lse, ((all_lse - lse).exp() * all_means).sum(0)
