"""From two rows of logits to the divergence and its gradient: the elementwise half of the fused estimator.

With s_j = q_j dg/dq_j the slope of an atom (from the cell), the gradient in the student's logits is

    dD/dz_j = s_j - q_j sum_k s_k,

for every f: one number a row is all that couples its atoms. There are three sweeps: normalisers; value and
slopes; gradient. Where the models agree every slope, and so the gradient, is exactly 0.
A row whose value is +inf has no gradient; it is given 0, and the value says so.
"""

import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.kernels.cell import cell
from fdiv.kernels.worth import blocks


class Wants(NamedTuple):
    """What is to be computed beside the value."""

    p_slope: bool = False
    q_slope: bool = False
    entropies: bool = False


class Rows(NamedTuple):
    """value [rows]; the gradients in the logits [rows, vocab]; the entropies [rows]; None if not wanted."""

    value: Tensor
    p_slope: Tensor | None
    q_slope: Tensor | None
    p_entropy: Tensor | None
    q_entropy: Tensor | None


def rows(
    divergence: FDivergence,
    p_logits: Tensor,
    q_logits: Tensor,
    wants: Wants,
    *,
    upstream: Tensor | None = None,
    compiled: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Rows:
    """Both logits [rows, vocab], float32 or float64, and *used up*: a gradient takes its logits' place.

    upstream [rows]: weights of the gradients. group: the vocabulary is split over these ranks.
    """
    upstream = q_logits.new_ones(len(q_logits)) if upstream is None else upstream.to(q_logits.dtype)
    if group is not None:
        return _sharded(divergence, p_logits, q_logits, wants, upstream, group)
    if compiled and q_logits.is_cuda and _has_triton():
        from fdiv.kernels import triton_rows

        if triton_rows.available(divergence, q_logits.device):
            done = triton_rows.rows(divergence, p_logits, q_logits, wants=wants[:2], upstream=upstream)
            return Rows(*done) if wants.entropies else Rows(*done[:3], None, None)
    if compiled:
        step = _compiled(divergence, q_logits.dtype, wants)
    else:
        step = partial(_step, partial(_cells, divergence, wants), wants)
    parts = [step(*block) for block in blocks(compiled, p_logits, q_logits, upstream)]
    values, *entropies = zip(*parts, strict=True)
    slopes = (z if want else None for z, want in zip((p_logits, q_logits), wants[:2], strict=True))
    return Rows(torch.cat(values), *slopes, *(torch.cat(h) if wants.entropies else None for h in entropies))


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=256)
def _compiled(divergence: FDivergence, dtype: torch.dtype, wants: Wants) -> Callable:
    from fdiv.kernels.compiled import Compiled
    from fdiv.kernels.graph import cell_graph  # here, for importing compilers takes seconds

    graph = cell_graph(divergence, dtype, (True, wants.p_slope, wants.q_slope))

    def cells(log_p: Tensor, log_q: Tensor, gap: Tensor):
        outputs = iter(graph(log_p, log_q, gap))
        return next(outputs), *(next(outputs) if wanted else None for wanted in wants[:2])

    def step(p_logits: Tensor, q_logits: Tensor, upstream: Tensor):
        return _step(cells, wants, p_logits, q_logits, upstream)

    return Compiled(step, repr(divergence))


def _cells(divergence: FDivergence, wants: Wants, log_p: Tensor, log_q: Tensor, gap: Tensor):
    value, p_slope, q_slope = cell(divergence, log_p, log_q, gap)
    return value, p_slope if wants.p_slope else None, q_slope if wants.q_slope else None


def _step(cells: Callable, wants: Wants, p_logits: Tensor, q_logits: Tensor, upstream: Tensor):
    """(value, p_entropy, q_entropy); wanted gradients take the place of the logits."""
    p_lse, q_lse = normaliser(p_logits), normaliser(q_logits)
    value, slopes, totals, entropies = _sums(cells, wants, p_logits, q_logits, p_lse, q_lse)
    for slope, total, logits, lse in zip(slopes, totals, (p_logits, q_logits), (p_lse, q_lse), strict=True):
        if slope is not None and total is not None:
            logits.copy_(_pull(slope, total, logits, lse, value, upstream))
    return value.to(q_logits.dtype), *entropies


def normaliser(logits: Tensor) -> Tensor:
    """logsumexp a row, [rows, 1] in float64: what both models' share of it has to be told apart to."""
    top = logits.amax(-1, keepdim=True)
    # e^-80 beside a term of 1 is nothing, and what is smaller would be a denormal number, which is slow.
    powers = (logits - top).clamp(min=-80.0).exp()
    return top.double() + powers.sum(-1, keepdim=True, dtype=torch.float64).log()


def _sums(cells: Callable, wants: Wants, p_logits: Tensor, q_logits: Tensor, p_lse: Tensor, q_lse: Tensor):
    """The value [rows], the slopes [rows, vocab], their totals [rows, 1], the entropies [rows]."""
    dtype = q_logits.dtype
    # The gap first: logits that are close have an exact difference, their rounded log-densities do not.
    gap = (p_logits - q_logits) - (p_lse - q_lse).to(dtype)
    log_p, log_q = p_logits - p_lse.to(dtype), q_logits - q_lse.to(dtype)
    value, *slopes = cells(log_p, log_q, gap)
    totals = [None if s is None else s.sum(-1, keepdim=True, dtype=torch.float64) for s in slopes]
    entropies = [_entropy(t) if wants.entropies else None for t in (log_p, log_q)]
    return value.sum(-1, dtype=torch.float64), slopes, totals, entropies


def _entropy(log_density: Tensor) -> Tensor:
    terms = log_density.exp() * log_density.clamp(min=-1e4)  # the clamp is 0 * inf made 0
    return -terms.sum(-1, dtype=torch.float64).to(log_density.dtype)


def _pull(
    slope: Tensor, total: Tensor, logits: Tensor, lse: Tensor, value: Tensor, upstream: Tensor
) -> Tensor:
    """From slopes in log-densities to the gradient in logits, weighted by `upstream`."""
    density = (logits - lse.to(logits.dtype)).clamp(min=-80.0).exp()
    gradient = (slope - density * total.to(slope.dtype)) * upstream.unsqueeze(-1)
    return torch.where(value.isfinite().unsqueeze(-1), gradient, 0.0)


def _sharded(divergence: FDivergence, p_logits, q_logits, wants: Wants, upstream: Tensor, group) -> Rows:
    """The same where each rank holds some columns: two numbers a row are exchanged, twice."""
    local = torch.stack([normaliser(p_logits), normaliser(q_logits)])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    p_lse, q_lse = torch.stack(gathered).logsumexp(0)
    cells = partial(_cells, divergence, wants)
    value, slopes, totals, entropies = _sums(cells, wants, p_logits, q_logits, p_lse, q_lse)
    sums = [value, *(t.squeeze(-1) for t in totals if t is not None)]
    sums = torch.stack([*sums, *(h.double() for h in entropies if h is not None)])
    dist.all_reduce(sums, group=group)
    value, *others = sums.unbind()
    others = iter(others)
    p_slope, q_slope = (
        None if slope is None else _pull(slope, next(others).unsqueeze(-1), logits, lse, value, upstream)
        for slope, logits, lse in zip(slopes, (p_logits, q_logits), (p_lse, q_lse), strict=True)
    )
    dtype = q_logits.dtype
    return Rows(
        value.to(dtype), p_slope, q_slope, *(h if h is None else next(others).to(dtype) for h in entropies)
    )
