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
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.diffusion.edm import guided, heun, karras, spread_to
from fdiv.divergences.js import JS
from fdiv.divergences.kl import ReverseKL
from fdiv.methods.generate._critic import Critic, Known, LogRatio, Rows
from fdiv.methods.generate._one_step import mean_coordinate, require_size, weights
from fdiv.methods.generate._ratio import density_ratio, needs_ratio
from fdiv.methods.generate._student import Compared, Turn, Weighed
from fdiv.methods.generate.levels import Drawn, Karras, Levels, LogNormal

WEIGHTS = ("distance", "denoiser", "score")


@dataclass(frozen=True)
class FDistill(Weighed):
    """The student network(sigma_init z, sigma_init) moves along h(r) w(sigma) (s_p - s_q).

    every: its critics learn at each step, the student at the last of so many; head_start: steps they have
    before. weight: w is sigma^2 / mean|x0 - D_p| ("distance", of DMD), sigma^2 ("denoiser") or 1 ("score").
    ratio, bins, bin_rate: see `density_ratio`. normalise: h is divided by its mean over the batch. gan:
    weight of softplus(-logit), by which real data teach too. regression: weight of the squared distance to
    where the teacher's solver goes from the same noise, in regression_steps of Heun. guidance: of the
    teacher's denoiser, see `guided`; the ratio stays that of the data. The value of the loss means nothing:
    its gradient does, a mean over coordinates.
    """

    through: ClassVar[bool] = False

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
    guidance: float = 1.0

    def __post_init__(self):
        self._require(WEIGHTS)
        require_size("FDistill", least=0.0, regression=self.regression)
        karras(self.regression_steps)  # checks it

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

    def learns(self, turn: Turn, seen: Compared) -> Rows:
        made, (x, level, student, teacher), logit = turn.made, seen, self._log_ratio(turn)
        with torch.no_grad():
            steer, metrics = self._steer(logit, x, level, turn.condition, turn.state)
            scale = weights(self.weight, made, teacher, level, self.levels, power=1)
        rows = follow(made, scale * spread_to(steer, x) * (student - teacher))
        if self.regression:
            rows = rows + self._regression(turn)
        return self._with_gan(rows, metrics, logit, seen, turn.condition)

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

    def _regression(self, turn: Turn) -> Tensor:
        """[B], between where the student and the teacher's solver take the same noise."""
        sigmas, told = karras(self.regression_steps), guided(turn.p_network, self.guidance)
        with torch.no_grad():
            there = heun(told, sigmas[0].item() * turn.noise, sigmas, turn.condition)
        return self.regression * mean_coordinate((turn.made - there).square())


def follow(made: Tensor, slope: Tensor) -> Tensor:
    """Rows [B] whose gradient in made is `slope` over the number of coordinates."""
    return mean_coordinate((made - (made - slope).detach()).square()) / 2
