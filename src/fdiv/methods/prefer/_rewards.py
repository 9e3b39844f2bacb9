"""What the methods that score whole responses share: their log-ratios, what they refuse, what they log."""

import math

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import in_working_precision, ratio_cap


def require_steep(divergence: FDivergence, who: str) -> None:
    """Raise unless every optimum of E[r] - beta D keeps all responses that the reference has.

    Then, and only then, the rewards of an optimum are beta psi up to a constant of the prompt.
    """
    require_f_divergence(divergence, who)
    slope = divergence.reverse.slope_at_zero
    if slope != -math.inf:
        raise TypeError(
            f"{who} cannot use {divergence!r}: f'(0) = {slope:.4g} > -inf, so its score is bounded below as "
            "the policy leaves a response: optima drop responses and no reward can be recovered. Add "
            f"some ReverseKL(), as {divergence!r} + 0.1 * ReverseKL()"
        )


def log_ratios(log_p: tuple[Tensor, Tensor], log_q: tuple[Tensor, Tensor]) -> Tensor:
    """log p - log q of (chosen, rejected) responses, [2, pairs]; p, the reference, has no gradient."""
    reference, policy = in_working_precision(torch.stack(log_p).detach(), torch.stack(log_q))
    for whose, log_prob in (("reference", reference), ("policy", policy)):
        impossible = log_prob.detach().isinf()
        if bool(impossible.any()):
            pair = int(impossible.nonzero()[0, 1])
            raise ValueError(
                f"the {whose} gives probability 0 to a response of pair {pair} of this batch, so that its "
                "log-ratio is infinite and no reward can be read off it; leave such pairs out of the data, "
                f"or use a {whose} that can write every response"
            )
    return reference - policy


def finite_scores(divergence: FDivergence, log_ratio: Tensor) -> Tensor:
    """psi, which a steep divergence makes too large for a number: the difference of two such is nan."""
    scores = divergence.psi(log_ratio)
    broken = scores.detach().isinf()
    if bool(broken.any()):
        where = log_ratio.detach()[broken][0].item()
        raise ValueError(
            f"the score of {divergence!r} at log reference/policy = {where:.4g} is beyond {scores.dtype}: "
            "the policy has left the reference too far for it; write a divergence with milder scores, such "
            "as ReverseKL()"
        )
    return scores


def reward_metrics(rewards: Tensor, log_ratio: Tensor) -> dict[str, Tensor]:
    """Means over pairs: of the reward that is optimised [2, pairs], and of the plain log-ratio beside it."""
    with torch.no_grad():
        margin = rewards[0] - rewards[1]
        return {
            "reward_chosen": rewards[0].mean(),
            "reward_rejected": rewards[1].mean(),
            "accuracy": (margin > 0).float().mean(),
            "margin": margin.mean(),
            "log_ratio_chosen": -log_ratio[0].mean(),
            "log_ratio_rejected": -log_ratio[1].mean(),
            "linearised": (log_ratio.abs() > ratio_cap(log_ratio.dtype)).float().mean(),
        }
