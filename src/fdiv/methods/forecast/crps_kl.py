"""CRPS + KL: a conditional variational autoencoder whose ensembles are scored, not its single draws.

Zhong et al., "FuXi-ENS: A machine learning model for medium-range ensemble weather forecasting", arXiv
2405.05925.

    L = CRPS({decode(x, z_m)}, y) + lambda D(r(z|x,y), s(z|x)),   z_1 .. z_M ~ r

r is the posterior, s the prior, both Gaussian with independent coordinates; a forecast draws from s. The
paper's divergence is KL(r, s), that is KL(), for here p is the posterior, which knows more, and q the prior.
Its lambda is `weight`. members=1 is the usual loss of a variational autoencoder, L1 + lambda KL.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fdiv._divergence import Divergence, Sum
from fdiv.divergences.alpha import Alpha
from fdiv.divergences.jeffreys import Jeffreys
from fdiv.divergences.kl import KL, ReverseKL
from fdiv.divergences.renyi import Renyi
from fdiv.estimate.closed_forms import log_power_moment
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.forecast.crps import crps

DRAWS = ("posterior", "prior")


@dataclass(frozen=True)
class CRPSKL:
    """Mean CRPS of ensembles of `members`, plus weight times the divergence of posterior and prior.

    warmup: the share of the training over which the weight grows from 0. fair: see `crps`. row_weights: one
    for each output, () for equal ones; divided by their mean, see `latitude_weights`. draws: "posterior", as
    in the paper, or "prior", which scores the forecast itself and trains no posterior: weight=0 then.
    The network states prior(x), posterior(x, y) and decode(x, z), as fdiv.networks.latent.Latent.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "targets", "network", "progress")

    divergence: Divergence = field(default_factory=KL)
    weight: float = 0.001
    warmup: float = 0.1
    members: int = 8
    fair: bool = True
    row_weights: tuple[float, ...] = ()
    draws: Literal["posterior", "prior"] = "posterior"

    def __post_init__(self):
        require_closed_form(self.divergence)
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight is finite and >= 0, got {self.weight!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the training, in [0, 1], got {self.warmup!r}")
        if not (isinstance(self.members, int) and self.members >= 1):
            raise ValueError(f"members is a whole number >= 1, got {self.members!r}")
        if any(not 0 <= w < math.inf for w in self.row_weights) or (
            self.row_weights and not sum(self.row_weights)
        ):
            raise ValueError(f"row_weights are finite, >= 0 and not all 0, got {self.row_weights!r}")
        if self.draws not in DRAWS:
            raise ValueError(f"draws is 'posterior' or 'prior', got {self.draws!r}")
        if self.draws == "prior" and self.weight:
            raise ValueError(
                "draws='prior' uses no posterior, so that a divergence from it would only train the prior to "
                f"be forgotten: write weight=0, got {self.weight!r}"
            )

    def __call__(
        self,
        *,
        inputs: Tensor,
        targets: Tensor,
        network,
        progress: float = 1.0,
        count: Tensor | float | None = None,
    ) -> Out:
        """inputs [B, ...], targets [B, K]; draws come from torch's global generator."""
        prior = network.prior(inputs)
        posterior = network.posterior(inputs, targets) if self.draws == "posterior" else prior
        ensemble = network.decode(inputs, posterior.rsample((self.members,)))  # [members, B, K]
        scores = self._weigh(crps(ensemble, targets, self.fair))
        rows, weight = scores, self.weight * self.growth(progress)
        metrics = {"crps": scores, "spread": spread(ensemble)}
        if self.draws == "posterior":
            metrics["divergence"] = between_gaussians(self.divergence, posterior, prior)
            rows = scores + weight * metrics["divergence"] if weight else scores
        means = {name: value.detach().mean() for name, value in metrics.items()} if len(rows) else {}
        return Out(mean_over_tokens(rows, count=count), means)

    def growth(self, progress: float) -> float:
        """The share of the weight that counts at this point of the training."""
        return min(1.0, progress / self.warmup) if self.warmup else 1.0

    def _weigh(self, scores: Tensor) -> Tensor:
        """The weighted mean over outputs of scores [B, K]."""
        if not self.row_weights:
            return scores.mean(-1)
        if len(self.row_weights) != scores.shape[-1]:
            raise ValueError(
                f"row_weights has {len(self.row_weights)} numbers for {scores.shape[-1]} outputs"
            )
        weights = scores.new_tensor(self.row_weights)
        return (scores * weights).sum(-1) / weights.sum()


def latitude_weights(degrees: tuple[float, ...]) -> tuple[float, ...]:
    """The cosine of each latitude over their mean: the area that a row of a regular grid stands for."""
    cosines = [math.cos(math.radians(degree)) for degree in degrees]
    if not degrees or any(abs(degree) > 90 for degree in degrees) or sum(cosines) < 1e-12:
        raise ValueError(f"latitudes are degrees in [-90, 90], not all of them poles, got {degrees!r}")
    return tuple(cosine * len(cosines) / sum(cosines) for cosine in cosines)


def between_gaussians(divergence: Divergence, p: Normal, q: Normal) -> Tensor:
    """D(p, q) of Gaussians with independent coordinates, means and scales [..., D] -> [...]."""
    match divergence:
        case KL():
            return kl_divergence(p, q).sum(-1)
        case ReverseKL():
            return kl_divergence(q, p).sum(-1)
        case Jeffreys():
            return (kl_divergence(p, q) + kl_divergence(q, p)).sum(-1)
        case Renyi(alpha=alpha):
            return log_power_moment(p, q, alpha).sum(-1) / (alpha - 1)
        case Alpha(alpha=alpha):
            return log_power_moment(p, q, alpha).sum(-1).expm1() / (alpha * (alpha - 1))
        case Sum(terms=terms):
            return torch.stack([weight * between_gaussians(d, p, q) for weight, d in terms]).sum(0)
    raise TypeError(f"between Gaussians there is no closed form of {divergence!r}")


def require_closed_form(divergence: object) -> None:
    """Raise unless it is finite for all Gaussians, and known."""
    match divergence:
        case KL() | ReverseKL() | Jeffreys():
            return
        case Renyi(alpha=alpha) | Alpha(alpha=alpha) if 0 < alpha < 1:
            return
        case Sum(terms=terms):
            for _, term in terms:
                require_closed_form(term)
            return
    raise TypeError(
        "between Gaussians these have a closed form that is always finite: KL(), ReverseKL(), Jeffreys(), "
        f"Renyi(a) and Alpha(a) with 0 < a < 1, and sums of them; got {divergence!r}"
    )


def spread(ensemble: Tensor) -> Tensor:
    """Standard deviation over members [M, ...]; 0 of a single one."""
    if ensemble.numel() and len(ensemble) > 1:
        return ensemble.detach().std(0)
    return torch.zeros_like(ensemble[0])
