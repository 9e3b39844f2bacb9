"""Samples of both alone: a classifier that tells them apart knows the log-ratio.

critic = the logit of "from p". At the optimum of `logistic_loss` it is log p - log q, which is what the
divergences' `f`, `phi` and `psi` read, and the estimator Variational.
Source: Sugiyama, Suzuki and Kanamori, "Density Ratio Estimation in Machine Learning" (2012), chapter 4.
"""

import math

from torch import Tensor
from torch.nn.functional import softplus


def logistic_loss(critic_p: Tensor, critic_q: Tensor) -> Tensor:
    """E_p softplus(-critic) + E_q softplus(critic) over the last dimension; [..., N], [..., M] -> [...].

    Each side weighs the same, however many samples it has. The minimum is 2 log 2 - 2 JS(0.5)(p, q): the
    loss is an f-GAN's, and what it learns serves every divergence.
    """
    return softplus(-critic_p).mean(-1) + softplus(critic_q).mean(-1)


def trimmed_mean(values: Tensor, trim: float) -> Tensor:
    """The mean of values [N] without the smallest and the largest floor(trim N) of them.

    It tames a heavy tail at the price of a bias, downwards where the tail is the upper one.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim is the fraction left out at either end, in [0, 0.5), got {trim!r}")
    # 0.01 * 700 is a little more than 7, 0.29 * 100 a little less than 29.
    out = math.floor(trim * values.numel() + 1e-9)
    return values.flatten().sort().values[out : values.numel() - out].mean()
