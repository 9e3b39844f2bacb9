"""The package entmax: alpha-entmax by a partial sort (alpha 1.5) and by bisection."""

import entmax
from torch import Tensor

from benchmarks.speed.case import Outcome


def sorted_entmax15(logits: Tensor, k: int | None = None) -> Outcome:
    """`k`: how many of the largest logits are sorted first; all of them if None."""
    return Outcome(entmax.entmax15(logits, dim=-1, k=k))


def bisected_entmax(logits: Tensor, alpha: float) -> Outcome:
    return Outcome(entmax.entmax_bisect(logits, alpha=alpha, dim=-1, n_iter=50))
