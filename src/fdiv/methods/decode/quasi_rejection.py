"""Quasi-rejection sampling: approach a target at inference, at a price in tries that is known beforehand.

Eikema, Kruszewski, Dance, Elsahar and Dymetman, "An approximate sampler for energy-based models with
divergence diagnostics", Transactions on Machine Learning Research; first as "Sampling from Discrete
Energy-Based Models with Quality/Efficiency Trade-offs", arXiv 2112.05702.

    x ~ q is kept with probability min(1, P(x) / (beta q(x)))
    its law is p_beta = min(P, beta q) / Z_beta,  kept are Z_beta / beta of the tries

P is the target up to its sum Z. Where beta >= max P/q this is rejection sampling and p_beta = p = P/Z. Any
divergence of p from p_beta is an expectation under q of a function of P/q, so that one set of samples of q
tells it for every beta. The symbols are the paper's.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import KL
from fdiv.divergences.tv import TV


class Diagnostics(NamedTuple):
    """Estimates from samples of the proposal; of its atoms, each as often as it is likely, exact values.

    acceptance: the fraction of tries that is kept. divergences: D(p, p_beta), in the order of the method's.
    covered: the mass of p where P <= beta q, so that nothing of it is lost. ess: (sum w)^2 / sum w^2 of
    w = P/q, the samples of p that those of q are worth; where it is small nothing here can be trusted.
    """

    acceptance: float
    divergences: tuple[float, ...]
    covered: float
    log_partition: float
    ess: float


@dataclass(frozen=True)
class QuasiRejection:
    """Keeps a draw x of q with probability min(1, P(x) / (beta q(x))).

    beta: in units of P/q; the larger it is, the nearer to the target, and the more is thrown away.
    """

    beta: float = 1.0
    divergences: tuple[FDivergence, ...] = (TV(), KL())

    def __post_init__(self):
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta is a finite number > 0, in units of P/q, got {self.beta!r}")
        if not isinstance(self.divergences, tuple):
            raise TypeError(f"divergences are a tuple, got {self.divergences!r}; write (TV(), KL())")
        for divergence in self.divergences:
            require_f_divergence(divergence, "QuasiRejection")

    def log_kept(self, log_target: Tensor, log_proposal: Tensor) -> Tensor:
        """log of the probability to keep each draw, [N] float64; -inf where the target has no mass."""
        return (_log_weights(log_target, log_proposal) - math.log(self.beta)).clamp(max=0.0)

    def accept(self, log_target: Tensor, log_proposal: Tensor, uniform: Tensor) -> Tensor:
        """Which draws are kept, bool [N]; uniform [N] in [0, 1), one number a draw."""
        log_kept = self.log_kept(log_target, log_proposal)
        if uniform.shape != log_kept.shape or not bool(((uniform >= 0) & (uniform < 1)).all()):
            raise ValueError(
                f"{tuple(log_kept.shape)} draws need as many uniform numbers in [0, 1), got "
                f"{tuple(uniform.shape)} or others"
            )
        return uniform.to(log_kept) < log_kept.exp()

    @torch.no_grad()
    def diagnostics(self, log_target: Tensor, log_proposal: Tensor) -> Diagnostics:
        """What this beta costs and misses, from draws of the proposal [N], of which none is left out."""
        log_p = _log_weights(log_target, log_proposal)
        if not bool((log_p > -math.inf).any()):
            raise ValueError(f"the target has no mass at any of {len(log_p)} draws; draw more")
        log_cut = log_p.clamp(max=math.log(self.beta))
        each = math.log(len(log_p))
        log_z, log_z_beta = (t.logsumexp(0) - each for t in (log_p, log_cut))
        normal = log_p - each - log_z, log_cut - each - log_z_beta
        weights = normal[0].exp()
        return Diagnostics(
            acceptance=(log_z_beta - math.log(self.beta)).exp().item(),
            divergences=tuple(divergence(*normal).item() for divergence in self.divergences),
            covered=weights[log_p <= math.log(self.beta)].sum().item(),
            log_partition=log_z.item(),
            ess=(1 / weights.square().sum()).item(),
        )


def _log_weights(log_target: Tensor, log_proposal: Tensor) -> Tensor:
    """log P/q of draws of q, [N] float64."""
    if log_target.shape != log_proposal.shape or log_target.ndim != 1:
        raise ValueError(
            f"log_target and log_proposal are [N] both, got {tuple(log_target.shape)} and "
            f"{tuple(log_proposal.shape)}"
        )
    weights = log_target.detach().double() - log_proposal.detach().to(log_target.device).double()
    if bool((weights.isnan() | (weights == math.inf)).any()):
        raise ValueError("P/q is nan or infinite at a draw; what was drawn has q > 0, and P is finite")
    return weights
