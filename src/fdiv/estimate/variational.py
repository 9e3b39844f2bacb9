"""Samples of both and a critic: a lower bound that is tight for the right critic."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.estimate._estimator import Guarantee, Sees


@dataclass(frozen=True)
class Variational:
    """mean over p of phi(l) + mean over q of psi(l), with l the critic's log-ratio: <= D for any l.

    The critic is any network with one real output per sample, read as an estimate of log p/q: the
    divergence's potentials turn it into the f-GAN / NWJ bound, with no output activation to choose. Train
    the critic by maximising it; report it on samples the critic was not trained on.
    Shapes: critic_p [rows, N], critic_q [rows, M] -> [rows].
    Source: Nowozin, Cseke and Tomioka, "f-GAN: Training Generative Neural Samplers using Variational
    Divergence Minimization", arXiv 1606.00709; Nguyen, Wainwright and Jordan, arXiv 0809.0853.
    """

    sees: ClassVar[Sees] = "critic"
    evidence = ("critic_p", "critic_q")
    guarantee = Guarantee(
        bias="low, by how wrong the critic is", bound="lower", support="samples of p and of q"
    )

    def check(self, divergence: object) -> None:
        require_f_divergence(divergence, "Variational(), which needs potentials of the ratio,")

    def __call__(self, divergence: FDivergence, critic_p: Tensor, critic_q: Tensor) -> Tensor:
        self.check(divergence)
        return divergence.phi(critic_p).mean(-1) + divergence.psi(critic_q).mean(-1)
