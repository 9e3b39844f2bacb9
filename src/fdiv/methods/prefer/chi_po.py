"""chi-PO: DPO with a chi-square beside the KL, against over-optimisation.

Huang, Zhan, Xie, Lee, Sun, Krishnamurthy and Foster, "Correcting the Mythos of KL-Regularization: Direct
Alignment without Overoptimization via Chi-Squared Preference Optimization", arXiv 2407.13399.

    L = -log sigmoid( clip_{2 R}( beta [ phi(t_w) - phi(t_l) ] ) ),   phi(t) = t + log t,   t = pi/ref

phi - 1 is f' of KL(pi, ref) + chi^2(pi, ref) / 2, the score of ChiKL(0.5).reverse, and the 1 cancels.
The paper's R_max is `reward_bound`; clip_{2 R} keeps a margin within [-2 R, 2 R].
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from fdiv._divergence import FDivergence
from fdiv.divergences.chi_kl import ChiKL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.prefer._rewards import log_ratios, reward_metrics


@dataclass(frozen=True)
class ChiPO:
    """f-DPO under KL + chi^2 / 2 of the policy from the reference, with the paper's clip as an option.

    reward_bound: true rewards lie in [0, reward_bound]. A pair whose margin is beyond twice that has no
    gradient; the metric `clipped` is their fraction. None does not clip.
    """

    consumes: ClassVar[Consumes] = "pairs"
    divergence: ClassVar[FDivergence] = ChiKL(0.5).reverse

    beta: float = 0.1
    reward_bound: float | None = None

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta!r}")
        if self.reward_bound is not None and not self.reward_bound > 0:
            raise ValueError(
                f"reward_bound is the largest true reward, > 0, got {self.reward_bound!r}; "
                "write None not to clip"
            )

    def __call__(
        self, *, log_p_chosen: Tensor, log_p_rejected: Tensor, log_q_chosen: Tensor, log_q_rejected: Tensor
    ) -> Out:
        """Summed log-probabilities of whole responses, [pairs] each; p reference, q policy."""
        log_ratio = log_ratios((log_p_chosen, log_p_rejected), (log_q_chosen, log_q_rejected))
        scores = self.divergence.psi(log_ratio)
        metrics = reward_metrics(self.beta * scores, log_ratio)
        margin = self.beta * (scores[0] - scores[1])
        if self.reward_bound is not None:
            bound = 2 * self.reward_bound
            metrics["clipped"] = (margin.detach().abs() > bound).float().mean()
            margin = margin.clamp(-bound, bound)
        return Out(mean_over_tokens(-logsigmoid(margin)), metrics)
