"""IPO: preferences are regressed on, so that certain ones do not drive the policy to infinity.

Azar, Rowland, Piot, Guo, Calandriello, Valko and Munos, "A General Theoretical Paradigm to Understand
Learning from Human Preferences", arXiv 2310.12036.

    L = ( l_w - l_l - 1 / (2 tau) )^2,   l = log(pi/ref)

The paper's tau is `beta`. Where y beats a uniformly drawn other y' (itself among them) with chance P(y), the
minimiser is pi(y) ~ ref(y) exp(P(y) / tau): a preference of 1 moves it as far as 1 / tau and no further.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.divergences.kl import ReverseKL
from fdiv.methods._method import Consumes, Out
from fdiv.methods.prefer.fdpo import FDPO


@dataclass(frozen=True)
class IPO:
    """FDPO(loss="ipo") with log-ratios as scores; write that for the scores of another divergence.

    length_normalised: l over the tokens of its response, as TRL's IPO has it. 1 / (2 beta) is per token then.
    """

    consumes: ClassVar[Consumes] = "pairs"
    divergence: ClassVar[FDivergence] = ReverseKL()

    beta: float = 0.1
    length_normalised: bool = False

    def __post_init__(self):
        _ = self.objective  # which refuses a wrong beta

    @property
    def objective(self) -> FDPO:
        """What is minimised."""
        return FDPO(beta=self.beta, loss="ipo", length_normalised=self.length_normalised)

    @property
    def reads(self) -> tuple[str, ...]:
        return self.objective.reads

    def __call__(self, **tensors: Tensor) -> Out:
        """As FDPO's: log_p_chosen, log_p_rejected, log_q_chosen, log_q_rejected [pairs], and lengths."""
        return self.objective(**tensors)
