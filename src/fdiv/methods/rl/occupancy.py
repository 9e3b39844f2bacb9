"""Correlated proxies: a penalty on where the policy goes, not on how it acts, against reward hacking.

Laidlaw, Singhal and Dragan, "Correlated Proxies: A New Definition and Improved Mitigation for Reward
Hacking", arXiv 2403.03185.

    maximise  J(pi, proxy) - beta sqrt(chi2(mu_pi || mu_ref))
    gradient of the penalty:  E_mu_pi[ psi / (2 sqrt(chi2)) grad log mu_pi ],   psi = 2 (mu_pi / mu_ref - 1)

mu is the occupancy: the share of steps in each state and action; of text, written in one turn, that of prompt
and whole answer. p is mu_ref and q is mu_pi, so that the paper's chi-square is Neyman()(p, q), its
discriminator d is -log_ratio and its lambda is `beta`. For every f the price of being somewhere is psi.
If proxy and true reward correlate with r over mu_ref, beta = sigma sqrt(1 - r^2) maximises a lower bound on
the true reward, sigma being the proxy's standard deviation over mu_ref (`guarantee`).
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.chi_square import Neyman
from fdiv.estimate.discriminator import trimmed_mean
from fdiv.methods._method import Consumes, Out, blank, mean_over_tokens
from fdiv.methods.rl.clipping import Clip
from fdiv.methods.rl.grpo import GRPO


def guarantee(proxy: Tensor, chi_square: Tensor, correlation: float) -> Tensor:
    """The least true reward of any policy: (proxy - sqrt((1 - r^2) chi2)) / r, for correlation r in (0, 1].

    Both rewards are counted from their means over mu_ref, in their standard deviations there.
    """
    if not 0 < correlation <= 1:
        raise ValueError(f"correlation is in (0, 1], got {correlation!r}: a proxy goes with the true reward")
    return (proxy - ((1 - correlation**2) * chi_square).sqrt()) / correlation


@dataclass(frozen=True)
class OccupancyReward:
    """What a discriminator's log-ratio costs, to be taken off the reward of each state and action.

    root: sqrt(chi2), by the mean of mu_pi / mu_ref - 1 over a batch of the policy without the fraction `trim`
    at either end; where that is not positive, the plain half psi. root=False: D itself, for any f.
    cap: the |log-ratio| beyond which prices go on linearly in it.
    """

    divergence: FDivergence = field(default_factory=Neyman)
    root: bool = True
    trim: float = 0.01
    cap: float = 7.0

    def __post_init__(self):
        _check(self)
        if self.root and self.divergence != Neyman():
            raise TypeError(f"the root is of chi-square, Neyman(), got {self.divergence!r}; write root=False")
        trimmed_mean(torch.zeros(1), self.trim)  # refuses what is no fraction

    def __call__(self, log_ratio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the price of each sample, metrics), from log mu_ref - log mu_pi at samples of the policy."""
        log_ratio = log_ratio.detach()
        price, _ = priced(self.divergence, log_ratio, self.cap)
        metrics = {"linearised": (log_ratio.abs() > self.cap).float().mean()}
        if not self.root:
            return price, metrics
        chi_square = trimmed_mean(price / 2, self.trim)
        known = chi_square > 0
        root = torch.where(known, chi_square, 1.0).sqrt()
        return price / (2 * root), metrics | {"chi_square": chi_square, "rooted": known.float()}


@dataclass(frozen=True)
class OccupancyPO:
    """Clipped policy gradient on normalised rewards, less beta sqrt(D(reference, policy)) of whole answers.

    root: D under the root, as the paper's chi-square is; its gradient needs D over the whole batch. False: D.
    beta is in standard deviations of the rewards, as these are normalised within a group.
    cap: the |log-ratio| of an answer beyond which D and its price go on linearly in it. floor: below this D
    is not rooted but divided by sqrt(floor), since the slope of a root is infinite at 0.
    The penalty's gradient is exact on-policy; off-policy its tokens are weighted by their own ratios alone.
    """

    consumes: ClassVar[Consumes] = "rollouts"

    divergence: FDivergence = field(default_factory=Neyman)
    beta: float = 0.1
    root: bool = True
    clip: Clip = 0.2
    cap: float = 10.0
    floor: float = 1e-4

    def __post_init__(self):
        _check(self)
        GRPO(beta=self.beta, clip=self.clip)  # refuses what is no weight, and no trust region
        if not self.floor > 0:
            raise ValueError(f"floor is a value of the divergence, > 0, got {self.floor!r}")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("advantage", "log_p", "sequences", "batch_value") if self.root else ("advantage", "log_p")

    @torch.no_grad()
    def survey(self, log_policy: Tensor, log_behaviour: Tensor, *, log_p: Tensor, mask: Tensor) -> Tensor:
        """[B, T] whose sum over tokens is that of D over answers, each weighted by policy / behaviour."""
        log_policy, log_behaviour, log_p = (blank(t, mask) for t in (log_policy, log_behaviour, log_p))
        _, value = priced(self.divergence, (log_p - log_policy).sum(-1), self.cap)
        value = value * (log_policy - log_behaviour).sum(-1).exp()
        return torch.where(mask, (value / mask.sum(-1).clamp(min=1)).unsqueeze(-1), 0.0)

    def __call__(
        self,
        *,
        log_policy: Tensor,
        log_behaviour: Tensor,
        advantage: Tensor,
        mask: Tensor,
        log_p: Tensor,
        count: Tensor | float | None = None,
        sequences: Tensor | float | None = None,
        batch_value: Tensor | float | None = None,
    ) -> Out:
        """log_policy, log_behaviour, log_p (the reference's), mask [B, T] of sampled tokens; advantage [B].

        batch_value: the mean over the global batch's tokens of `survey`, of which there are `count` in
        `sequences` answers; with root only. By default this call is the whole batch.
        """
        log_ratio = (blank(log_p.detach(), mask) - blank(log_policy.detach(), mask)).sum(-1)
        price, value = priced(self.divergence, log_ratio, self.cap)
        metrics = {
            "divergence": mean_over_tokens(value),
            "linearised": mean_over_tokens((log_ratio.abs() > self.cap).float()),
        }
        if self.root:
            if batch_value is None:
                batch_value = self.survey(log_policy, log_behaviour, log_p=log_p, mask=mask)
                batch_value = mean_over_tokens(batch_value, mask, count)
            mean = self._mean(batch_value, mask, count, sequences)
            price = price / (2 * mean.clamp(min=self.floor).sqrt())
            metrics["rooted"] = (mean > self.floor).float()
        out = GRPO(beta=0.0, clip=self.clip)(
            log_policy=log_policy,
            log_behaviour=log_behaviour,
            advantage=advantage - self.beta * price,
            mask=mask,
            count=count,
        )
        return Out(out.loss, metrics | out.metrics)

    def _mean(self, batch_value, mask: Tensor, count, sequences) -> Tensor:
        """D over the answers of the global batch, from the mean over its tokens."""
        count = mask.sum() if count is None else count
        sequences = max(1, len(mask)) if sequences is None else sequences
        return torch.as_tensor(batch_value * count / sequences, device=mask.device)


def priced(divergence: FDivergence, log_ratio: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(psi, f) at samples of the policy, continued linearly in the log-ratio beyond +-cap."""
    if not log_ratio.isfinite().all():
        raise ValueError(
            "a sample of the policy has no finite log-ratio: the reference gives it no probability, or the "
            "policy does not; mask such tokens out, or mix some of the policy's vocabulary into the reference"
        )
    near = log_ratio.clamp(-cap, cap)
    step = log_ratio - near
    psi, f = divergence.psi(near), divergence.f(near)
    price = psi - torch.where(step == 0, 0.0, divergence.curvature(near)) * step
    return price, f + (f - psi) * step  # df / dlog u = u f' = f - psi


def _check(method: OccupancyReward | OccupancyPO) -> None:
    require_f_divergence(method.divergence, type(method).__name__)
    if not method.cap > 0:
        raise ValueError(f"cap is a log-ratio > 0, got {method.cap!r}")
