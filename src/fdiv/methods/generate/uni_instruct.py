"""Uni-Instruct: one-step distillation by an f-divergence of the *samples*, written as one of their scores.

Wang, Bai, Zhang, Zhang, Luo et al., "Uni-Instruct: One-step Diffusion Model through Unified Diffusion
Divergence Instruction", arXiv 2505.20755.

    D_f(p_0, q_0) = int sigma E_q[ h(r) |s_q - s_p|^2 ] dsigma + D_f at infinite noise,   h(r) = r^2 f''(r)
    grad E_q[ h |d|^2 ] = grad E[ (h - r h') |d|^2 - 2 h d.(s_q - s_cond) ],   d = s_q - s_p

On the right the functions r, s_p and s_q are fixed, and gradients flow through where they are taken, with
grad log r = -d. h is `divergence`.curvature. KL() leaves 2 r d.(s_q - s_cond) of it, ReverseKL() twice SiD
with alpha 1/2. The paper's weight of the GAN loss is `gan`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import derivative
from fdiv.diffusion.edm import spread_to
from fdiv.divergences.kl import KL
from fdiv.methods.generate._critic import Critic, Known, Rows
from fdiv.methods.generate._one_step import mean_coordinate, weights
from fdiv.methods.generate._ratio import density_ratio, needs_ratio
from fdiv.methods.generate._student import Compared, Turn, Weighed
from fdiv.methods.generate.levels import Karras, Levels, LogNormal

WEIGHTS = ("distance", "denoiser", "score", "expansion")


@dataclass(frozen=True)
class UniInstruct(Weighed):
    """The student's own f-divergence from the teacher, through the expansion over levels of noise.

    weight: of a product of two differences of denoisers: over mean|x0 - D_p| ("distance", the authors'), as
    it is ("denoiser"), over sigma^4 ("score"), or that and sigma over the density of the levels
    ("expansion": exactly the divergence, of high variance). through_ratio: r is differentiated too, as the
    theorem has it; in many dimensions its slope, a difference of scores, is large and noisy at small levels,
    and False holds r where it is. Other fields as in `FDistill`.
    """

    divergence: FDivergence = field(default_factory=KL)
    every: int = 1
    gan: float = 0.01
    sigma_init: float = 2.5
    levels: Levels = Karras(most=24.4)
    weight: Literal["distance", "denoiser", "score", "expansion"] = "distance"
    ratio: tuple[float, float] = (0.1, 20.0)
    bins: int = 10
    bin_rate: float = 0.0
    head_start: int = 0
    critic: Critic | Known = Critic(levels=LogNormal())
    guidance: float = 1.0
    through_ratio: bool = True

    def __post_init__(self):
        self._require(WEIGHTS)

    @property
    def unit(self) -> str | None:
        """Ratios are normalised over a batch; reverse KL has none."""
        return "batch" if needs_ratio(self.divergence) and self.bins else None

    def learns(self, turn: Turn, seen: Compared) -> Rows:
        made, (x, level, student, teacher) = turn.made, seen
        logit, metrics = self._log_ratio(turn), {}
        log_ratio = torch.zeros_like(level.sigma)
        if logit is not None and needs_ratio(self.divergence):
            with torch.no_grad():
                found = logit(x, level.sigma, turn.condition)
            if self.through_ratio:
                found = with_slope(found, x, (teacher - student) / spread_to(level.sigma, x) ** 2)
            options = self.ratio, self.bins, self.bin_rate
            log_ratio, metrics = density_ratio(found, level.rank, *options, turn.state)
            metrics["weight_variance"] = relative_variance(self.divergence, log_ratio.detach())
        scale = weights(self.weight, made, teacher, level, self.levels, power=2)
        rows = mean_coordinate(scale * expanded(self.divergence, log_ratio, made, student, teacher))
        rows, metrics = self._with_gan(rows, metrics, logit, seen, turn.condition)
        return rows, {name: number.detach() for name, number in metrics.items()}


def expanded(
    divergence: FDivergence, log_ratio: Tensor, made: Tensor, student: Tensor, teacher: Tensor
) -> Tensor:
    """sigma^4 [(h - r h') |d|^2 - 2 h d.(s_q - s_cond)], coordinate by coordinate [B, ...].

    student and teacher are denoised at one x; s_q - s_cond is (student - made) / sigma^2.
    """
    h = divergence.curvature(log_ratio)
    tangent = h - derivative(divergence.curvature, log_ratio)  # h - r h'(r), for r d/dr = d/dlog r
    apart = student - teacher
    return spread_to(tangent, made) * apart.square() - 2 * spread_to(h, made) * apart * (student - made)


def with_slope(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """value [B], with the gradient `slope` [B, ...] in x: the networks' own difference of scores.

    A discriminator's gradient is not trained to be anything; that of log p/q is s_p - s_q.
    """
    return value + (slope.detach() * (x - x.detach())).flatten(1).sum(1)


def relative_variance(divergence: FDivergence, log_ratio: Tensor) -> Tensor:
    curvature = divergence.curvature(log_ratio)
    return (curvature / curvature.mean()).var(correction=0)
