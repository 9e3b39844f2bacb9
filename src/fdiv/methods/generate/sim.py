"""SIM: the difference of the scores under any distance d, with the student's samples held where they are.

Luo, Huang, Geng, Kolter and Qi, "One-Step Diffusion Distillation through Score Implicit Matching", arXiv
2410.16794.

    grad E_{x ~ sg q} d(s_q - s_p) = -grad E[ d'(y).(s_q - s_cond) ],   y = s_q - s_p at x = x0 + sigma noise

On the right s_q and s_p are fixed functions whose inputs carry the gradient. d(y) = |y|^2 is twice SiD with
alpha = 1. The paper's c is `huber`: d(y) = sqrt(|y|^2 + c^2) - c, whose slope is bounded.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.diffusion.edm import spread_to
from fdiv.divergences.kl import ReverseKL
from fdiv.methods.generate._critic import Critic, Known, Rows
from fdiv.methods.generate._one_step import mean_coordinate, require_size, weights
from fdiv.methods.generate._student import Compared, OneStep, Turn
from fdiv.methods.generate.levels import Karras, Levels, LogNormal

WEIGHTS = ("distance", "denoiser", "score", "expansion")


@dataclass(frozen=True)
class SIM(OneStep):
    """As `SiD`, with a distance in place of alpha: huber, a difference of denoisers, or None for squares."""

    divergence: ClassVar[FDivergence] = ReverseKL()

    huber: float | None = None
    every: int = 1
    sigma_init: float = 2.5
    levels: Levels = Karras(most=24.4)
    weight: Literal["distance", "denoiser", "score", "expansion"] = "distance"
    head_start: int = 0
    critic: Critic | Known = Critic(levels=LogNormal())
    guidance: float = 1.0

    def __post_init__(self):
        if self.huber is not None:
            require_size("SIM", huber=self.huber)
        self._require(WEIGHTS)

    def learns(self, turn: Turn, seen: Compared) -> Rows:
        made, (_, level, student, teacher) = turn.made, seen
        scale = weights(self.weight, made, teacher, level, self.levels, power=2)
        rows = mean_coordinate(-scale * distance_slope(student - teacher, self.huber) * (student - made))
        return rows, {"score_gap": (scale * (student - teacher).square()).detach().mean()}


def distance_slope(apart: Tensor, huber: float | None) -> Tensor:
    """d'(y), of y [B, ...]: 2 y, or y / sqrt(|y|^2 + c^2)."""
    if huber is None:
        return 2 * apart
    return apart / spread_to((apart.flatten(1).square().sum(1) + huber**2).sqrt(), apart)
