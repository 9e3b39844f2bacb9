"""The cell of a divergence: what one atom adds to the value and to the gradient.

A kernel needs, from log p, log q and the gap log p - log q of one atom,

    value = g(p, q),    slope_p = p dg/dp,    slope_q = q dg/dq,

g the perspective. All three come from the one line that a divergence consists of.
"""

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import NEAR


def cell(divergence: FDivergence, log_p: Tensor, log_q: Tensor, gap: Tensor) -> tuple[Tensor, ...]:
    """(value, slope_p, slope_q) of every atom; elementwise. An atom without mass on either side is free.

    `gap` is log_p - log_q, known better than by subtracting: the difference of two logits is exact where they
    are close, while log p and log q have been rounded. Where it is small the perspective is taken at (p/q, 1)
    and weighted by q, which is the same by homogeneity and leaves the gap as it came.
    """
    empty = (log_p == -torch.inf) & (log_q == -torch.inf)
    near = (gap.abs() < NEAR) | empty
    a = torch.where(near, torch.where(empty, 0.0, gap), log_p)
    b = torch.where(near, 0.0, log_q)
    weight = torch.where(near, log_q.exp(), 1.0)
    value, pull, *_ = torch.func.vjp(divergence.perspective, a, b)
    slope_p, slope_q = pull(torch.ones_like(value))
    return weight * value, weight * slope_p, weight * slope_q
