"""f-distill: a one-step student that follows the difference of two scores, weighted by any f-divergence.

Xu, Nie and Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", arXiv 2502.15681.

    grad int w D_f(p_sigma, q_sigma) dsigma = -E[ w h(r) (s_p - s_q)(x) dx/dtheta ],   x = G(z) + sigma noise
    h(r) = r^2 f''(r),  r = p_sigma/q_sigma

h is `divergence`.curvature; s_q comes from a fake score and r from a discriminator (`critic`). The code's
lambda_gan is `gan`, its student_update_freq `every`, its bounds and bins of r `ratio` and `bins`.

With ReverseKL(), h = 1, these are Diff-Instruct (Luo et al., "Diff-Instruct: A Universal Approach for
Transferring Knowledge From Pre-trained Diffusion Models", arXiv 2305.18455), which calls its loss the
integral KL; DMD (Yin et al., "One-step Diffusion with Distribution Matching Distillation", arXiv
2311.18828) and DMD2 ("Improved Distribution Matching Distillation for Fast Image Synthesis", arXiv
2405.14867); and, told a context, the distillation of ARDiT ("Autoregressive Diffusion Transformer for
Text-to-Speech Synthesis", arXiv 2406.05551).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fdiv._divergence import FDivergence
from fdiv.diffusion.edm import heun, karras, spread_to
from fdiv.divergences.js import JS
from fdiv.divergences.kl import ReverseKL
from fdiv.methods._method import Consumes, Out
from fdiv.methods.generate._critic import (
    Compared,
    Critic,
    Known,
    LogRatio,
    Rows,
    alternated,
    compared,
    require_critic,
)
from fdiv.methods.generate._one_step import (
    generated,
    mean_coordinate,
    require_plan,
    require_size,
    require_weight,
    weights,
)
from fdiv.methods.generate._ratio import density_ratio, needs_ratio, require_curvature, require_ratio
from fdiv.methods.generate.levels import Drawn, Karras, Levels, LogNormal, require_levels

WEIGHTS = ("distance", "denoiser", "score")


@dataclass(frozen=True)
class FDistill:
    """The student network(sigma_init z, sigma_init) moves along h(r) w(sigma) (s_p - s_q).

    every: its critics learn at each step, the student at the last of so many; head_start: steps they have
    before. weight: w is sigma^2 / mean|x0 - D_p| ("distance", of DMD), sigma^2 ("denoiser") or 1 ("score").
    ratio, bins, bin_rate: see `density_ratio`. normalise: h is divided by its mean over the batch. gan:
    weight of softplus(-logit), by which real data teach too. regression: weight of the squared distance to
    where the teacher's solver goes from the same noise, in regression_steps of Heun. The value of the loss
    means nothing: its gradient does, a mean over coordinates.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = (
        "inputs", "labels", "network", "p_network", "module", "step", "state",
    )  # fmt: skip
    alternating: ClassVar[bool] = True

    divergence: FDivergence = field(default_factory=lambda: JS(0.5))
    every: int = 5
    gan: float = 1e-3
    sigma_init: float = 2.5
    levels: Levels = Karras()
    weight: Literal["distance", "denoiser", "score"] = "distance"
    ratio: tuple[float, float] = (0.1, 20.0)
    bins: int = 10
    bin_rate: float = 0.0
    normalise: bool = True
    regression: float = 0.0
    regression_steps: int = 18
    head_start: int = 0
    critic: Critic | Known = Critic()

    def __post_init__(self):
        require_curvature(self.divergence, "FDistill")
        require_plan(self, self.every, self.head_start, self.sigma_init)
        require_size("FDistill", least=0.0, gan=self.gan, regression=self.regression)
        require_levels(self.levels, "FDistill(levels)")
        require_weight("FDistill", self.weight, WEIGHTS)
        require_ratio("FDistill", self.ratio, self.bins, self.bin_rate)
        require_critic(self.critic, "FDistill")
        karras(self.regression_steps)  # checks it
        if self.gan and isinstance(self.critic, Known):
            raise ValueError(f"Known() has no discriminator: write gan=0.0, got {self.gan!r}")

    @classmethod
    def diff_instruct(cls, critic: Critic | Known | None = None) -> "FDistill":
        """Reverse KL at EDM's levels, the student at every step, no discriminator."""
        return cls(
            ReverseKL(), every=1, gan=0.0, sigma_init=1.0, levels=LogNormal(), weight="denoiser",
            critic=critic or Critic(),
        )  # fmt: skip

    @classmethod
    def dmd(cls, regression: float, critic: Critic | Known | None = None) -> "FDistill":
        """Reverse KL in steps of one size, the student at every step, and the teacher's own pairs."""
        return cls(ReverseKL(), every=1, gan=0.0, regression=regression, critic=critic or Critic())

    @classmethod
    def dmd2(cls, gan: float = 3e-3, critic: Critic | None = None) -> "FDistill":
        """Reverse KL in steps of one size, five steps of the critics to one, real data instead of pairs."""
        return cls(ReverseKL(), every=5, gan=gan, critic=critic or Critic())

    @property
    def unit(self) -> str | None:
        """Ratios and their weights are normalised over a batch; reverse KL has neither."""
        return "batch" if needs_ratio(self.divergence) and (self.bins or self.normalise) else None

    def beside(self, network: Any, p_network: Any) -> nn.Module:
        return self.critic.beside(network, p_network, self._discriminates)

    def initial_state(self) -> dict[str, float]:
        """The mean ratio of each bin, if it is remembered."""
        return {f"bin_{k}": 1.0 for k in range(self.bins)} if self.bin_rate else {}

    def advance(
        self, state: dict[str, float], metrics: dict[str, float], progress: float
    ) -> dict[str, float]:
        return {name: metrics.get(name, last) for name, last in state.items()}

    def sample(self, network: Any, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        return generated(network, noise, self.sigma_init, condition)

    def __call__(
        self,
        *,
        inputs: Tensor,
        labels: Tensor,
        network: Any,
        p_network: Any,
        module: Any,
        step: int,
        state: dict[str, float] | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """inputs [B, ...] are data, labels [B, ...] the condition of networks that read one.

        Noise and levels come from torch's global generator. count: the examples of the global batch.
        """

        def own(made: Tensor, noise: Tensor, condition: Any) -> Rows:
            seen = compared(self, made, condition, network, p_network, module, through=False)
            rows, metrics = self._rows(made, seen, condition, network, p_network, module, state or {})
            if self.regression:
                rows = rows + self._regression(made, noise, p_network, condition)
            return rows, metrics

        return alternated(self, own, inputs, labels, network, p_network, module, step, count)

    def _rows(
        self,
        made: Tensor,
        seen: Compared,
        condition: Any,
        network: Any,
        p_network: Any,
        module: Any,
        state: dict[str, float],
    ) -> Rows:
        x, level = seen.x, seen.level
        log_ratio = self.critic.log_ratio(module, network, p_network) if self._discriminates else None
        with torch.no_grad():
            steer, metrics = self._steer(log_ratio, x, level, condition, state)
            scale = weights(self.weight, made, seen.teacher, level, self.levels, power=1)
        rows = follow(made, scale * spread_to(steer, x) * (seen.student - seen.teacher))
        if self.gan and log_ratio is not None:
            fooled = softplus(-log_ratio(x, level.sigma, condition))
            rows, metrics["gan_loss"] = rows + self.gan * fooled, fooled.detach().mean()
        return rows, metrics

    @property
    def _discriminates(self) -> bool:
        return bool(self.gan) or needs_ratio(self.divergence)

    def _steer(
        self, log_ratio: LogRatio | None, x: Tensor, level: Drawn, condition: Any, state: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """h(r) [B], of mean 1 if it is normalised."""
        if log_ratio is None or not needs_ratio(self.divergence):
            at_one = self.divergence.curvature(torch.zeros_like(level.sigma))
            return at_one / at_one if self.normalise else at_one, {}
        found = log_ratio(x, level.sigma, condition)
        within, metrics = density_ratio(found, level.rank, self.ratio, self.bins, self.bin_rate, state)
        curvature = self.divergence.curvature(within)
        relative = curvature / curvature.mean()
        metrics["weight_variance"] = relative.var(correction=0)
        return relative if self.normalise else curvature, metrics

    def _regression(self, made: Tensor, noise: Tensor, p_network: Any, condition: Any) -> Tensor:
        """[B], between where the student and the teacher's solver take the same noise."""
        sigmas = karras(self.regression_steps)
        with torch.no_grad():
            there = heun(p_network, sigmas[0].item() * noise, sigmas, condition)
        return self.regression * mean_coordinate((made - there).square())


def follow(made: Tensor, slope: Tensor) -> Tensor:
    """Rows [B] whose gradient in made is `slope` over the number of coordinates."""
    return mean_coordinate((made - (made - slope).detach()).square()) / 2
