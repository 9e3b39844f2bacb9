"""The log-probability of one token and the entropy of its distribution, from a row of logits.

d log q_i / dz_j = [i = j] - q_j,        dH / dz_j = -q_j (log q_j + H)
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fdiv.kernels.worth import blocks


class Moments(NamedTuple):
    """logsumexp of a row of logits, and their mean under its softmax; [rows] each, in float64."""

    lse: Tensor
    mean: Tensor

    @property
    def entropy(self) -> Tensor:
        return self.lse - self.mean


def moments(logits: Tensor, compiled: bool, group: dist.ProcessGroup | None = None) -> Moments:
    """Of logits [rows, vocab]; `group` holds other columns (see `Head`)."""
    function = _compiled(_row_moments) if compiled else _row_moments
    parts = [function(*block) for block in blocks(compiled, logits)]
    found = Moments(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return found if group is None else _combined(found, group)


def log_prob(logits: Tensor, index: Tensor, lse: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """log softmax(logits)[index], [rows]."""
    index, owned = _local(index, logits.shape[-1], group)
    chosen = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    chosen = torch.where(owned, chosen, -torch.inf)
    if group is not None:
        dist.all_reduce(chosen, op=dist.ReduceOp.MAX, group=group)
    return (chosen.double() - lse).to(logits.dtype)


def log_prob_slope(
    logits: Tensor,
    index: Tensor,
    found: Moments,
    upstream: tuple[Tensor, ...],
    compiled: bool,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """From the gradients in log-probability and entropy to that in the logits, whose place it takes."""
    of_log_prob, of_entropy = upstream
    push_down(logits, found, of_log_prob, of_entropy, compiled)
    index, owned = _local(index, logits.shape[-1], group)
    own = torch.where(owned, of_log_prob, 0.0).to(logits.dtype)
    return logits.scatter_add_(-1, index.unsqueeze(-1), own.unsqueeze(-1))


def push_down(
    logits: Tensor, found: Moments, upstream: Tensor, entropy_upstream: Tensor, compiled: bool
) -> None:
    """logits become -q (upstream + entropy_upstream (log q + H)), the gradient less the chosen atoms'."""
    function = _compiled(_push_down) if compiled else _push_down
    weights = (t.to(logits.dtype) for t in (upstream, entropy_upstream))
    for block in blocks(compiled, logits, *found, *weights):
        function(*block)


def _row_moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp, mean of the logits under their softmax) in float64."""
    top = logits.amax(-1, keepdim=True)
    centred = (logits - top).clamp(min=-80.0)
    powers = centred.exp()
    total = powers.sum(-1, dtype=torch.float64)
    mean = (powers * centred).sum(-1, dtype=torch.float64) / total
    top = top.squeeze(-1).double()
    return top + total.log(), top + mean


def _push_down(logits: Tensor, lse: Tensor, mean: Tensor, upstream: Tensor, entropy_upstream: Tensor) -> None:
    log_q = (logits - lse.to(logits.dtype).unsqueeze(-1)).clamp(min=-80.0)
    entropy = (lse - mean).to(logits.dtype).unsqueeze(-1)
    upstream, entropy_upstream = upstream.unsqueeze(-1), entropy_upstream.unsqueeze(-1)
    logits.copy_(-log_q.exp() * (upstream + entropy_upstream * (log_q + entropy)))


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


def _combined(here: Moments, group: dist.ProcessGroup) -> Moments:
    local = torch.stack(here)
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    all_lse, all_means = torch.stack(gathered).unbind(1)
    lse = all_lse.logsumexp(0)
    return Moments(lse, ((all_lse - lse).exp() * all_means).sum(0))
