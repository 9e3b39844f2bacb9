"""SiD: data-free one-step distillation by the difference of the scores, squared.

Zhou, Zheng, Wang, Yin and Huang, "Score identity Distillation: Exponentially Fast Distillation of Pretrained
Diffusion Models for One-Step Generation", arXiv 2404.04057.

    L = (D_p - D_q).[(D_p - x0) - alpha (D_p - D_q)] / mean|x0 - D_p|   at x = x0 + sigma noise,  x0 = G(z)

D_p is the teacher and D_q the fake score, both fixed functions whose *inputs* carry the gradient. alpha = 1/2
is half the gradient of E_q|D_q - D_p|^2, alpha = 1 that with q's samples held where they are (SIM), and the
paper's 1.2 is larger than either.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.divergences.kl import ReverseKL
from fdiv.methods.generate._critic import Critic, Known, Rows
from fdiv.methods.generate._one_step import mean_coordinate, weights
from fdiv.methods.generate._student import Compared, OneStep, Turn
from fdiv.methods.generate.levels import Karras, Levels, LogNormal

WEIGHTS = ("distance", "denoiser", "score", "expansion")


@dataclass(frozen=True)
class SiD(OneStep):
    """The student network(sigma_init z, sigma_init) learns by L; fields as in `FDistill`, no ratio.

    Its divergence is the reverse KL of the samples, of which E_q|s_q - s_p|^2 over all levels is the
    expansion, see `UniInstruct`.
    """

    divergence: ClassVar[FDivergence] = ReverseKL()

    alpha: float = 1.2
    every: int = 1
    sigma_init: float = 2.5
    levels: Levels = Karras(most=24.4)
    weight: Literal["distance", "denoiser", "score", "expansion"] = "distance"
    head_start: int = 0
    critic: Critic | Known = Critic(levels=LogNormal())
    guidance: float = 1.0

    def __post_init__(self):
        if not 0 <= self.alpha < 10:
            raise ValueError(f"SiD(alpha) is in [0, 10), 1.2 in the paper, got {self.alpha!r}")
        self._require(WEIGHTS)

    def learns(self, turn: Turn, seen: Compared) -> Rows:
        made, (_, level, student, teacher) = turn.made, seen
        scale = weights(self.weight, made, teacher, level, self.levels, power=2)
        rows = mean_coordinate(scale * identity(self.alpha, made, student, teacher))
        return rows, {"score_gap": (scale * (student - teacher).square()).detach().mean()}


def identity(alpha: float, made: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """(D_p - D_q).[(D_p - x0) - alpha (D_p - D_q)], coordinate by coordinate."""
    apart = teacher - student
    return apart * (teacher - made - alpha * apart)
