"""What a small regret in a comp-sum loss says about the error rate.

Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", arXiv 2304.07288.

    (0-1 regret) <= T^-1(comp-sum regret),   each with the gap of the set of scores that is minimised over
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.methods.supervise.comp_sum import check_tau
from fdiv.operators._root import rising_root


class Consistency(NamedTuple):
    """T and its inverse, elementwise and in float64."""

    transform: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def consistency(tau: float, classes: int) -> Consistency:
    """What a regret in the comp-sum loss says about that in the 0-1 loss.

    Over a complete, symmetric set of scores a 0-1 regret of beta costs at least transform(beta) of the loss
    (each regret with its minimisability gap); inverse(regret) bounds the 0-1 regret, by 1 at most. Up to
    tau = 1, and up to tau = 2 with two classes, the transform is the least there is; elsewhere a bound on it.

    >>> import torch
    >>> consistency(2.0, classes=2).inverse(torch.tensor(0.05))
    tensor(0.1000, dtype=torch.float64)
    """
    check_tau(tau)
    if classes < 2:
        raise ValueError(f"there are at least two classes, got {classes!r}")
    return Consistency(
        partial(_transform, tau=tau, classes=classes), partial(_inverse, tau=tau, classes=classes)
    )


def _transform(beta: Tensor, tau: float, classes: int) -> Tensor:
    beta = beta.double()
    if not bool(((beta >= 0) & (beta <= 1)).all()):
        raise ValueError("beta is a regret in the 0-1 loss, from 0 to 1")
    if tau >= 2:
        return beta / ((tau - 1) * classes ** (tau - 1))
    if tau == 1:
        return (torch.special.xlog1py(1 + beta, beta) + torch.special.xlog1py(1 - beta, -beta)) / 2
    log_up, log_down = beta.log1p() / (2 - tau), (-beta).log1p() / (2 - tau)
    change = ((2 - tau) * ((log_up.expm1() + log_down.expm1()) / 2).log1p()).expm1()
    scale = -(2 ** (1 - tau)) / (1 - tau) if tau < 1 else 1 / ((tau - 1) * classes ** (tau - 1))
    return scale * change


def _inverse(regret: Tensor, tau: float, classes: int) -> Tensor:
    regret = regret.double()
    if not bool((regret >= 0).all()):
        raise ValueError("a regret is >= 0")
    low = torch.zeros_like(regret)

    def excess(beta: Tensor) -> Tensor:
        return _transform(beta, tau, classes) - regret

    vacuous = excess(low + 1) <= 0
    inside = torch.where(vacuous, 0.0, regret)
    root = rising_root(lambda beta: _transform(beta, tau, classes) - inside, low, low + 1, 1e-15)
    return torch.where(vacuous, 1.0, root)
