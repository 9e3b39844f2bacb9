"""NPO: the half of DPO that pushes an answer down, for answers to be forgotten.

Zhang, Lin, Bai and Mei, "Negative Preference Optimization: From Catastrophic Collapse to Effective
Unlearning", arXiv 2404.05868.

    L = -(2 / beta) E[ log sigmoid( -beta log q(y)/p(y) ) ]

The paper's pi_theta is q and its pi_ref is p. The gradient is that of gradient ascent with the weight
2 q^beta / (q^beta + p^beta), which fades as the answer is forgotten; for beta -> 0 the loss is gradient
ascent but for the constant 2 log 2 / beta. Ours: another f-divergence puts f-DPO's score psi for log q/p.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import ReverseKL
from fdiv.methods._method import Consumes, Out
from fdiv.methods.unlearn.gradient_ascent import RETAINED, check_retain, with_retained


@dataclass(frozen=True)
class NPO:
    """-(2 / beta) log sigmoid(-beta psi(log p - log q)) of the pair's rejected answer.

    retain: weight of the cross-entropy of text that is not to be forgotten; 0 reads none.
    """

    consumes: ClassVar[Consumes] = "pairs"

    divergence: FDivergence = field(default_factory=ReverseKL)
    beta: float = 0.1
    retain: float = 0.0

    def __post_init__(self):
        require_f_divergence(self.divergence, "NPO")
        if not self.divergence.is_smooth:
            raise TypeError(
                f"the score of {self.divergence!r} jumps where the policy is the reference, which is where "
                "training starts; write ReverseKL(), or another divergence without a kink"
            )
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta!r}; its limit at 0 is GradientAscent()")
        check_retain(self.retain)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("log_p_rejected", "log_q_rejected", *(RETAINED if self.retain else ()))

    def __call__(
        self,
        *,
        log_p_rejected: Tensor,
        log_q_rejected: Tensor,
        log_q_retain_label: Tensor | None = None,
        retain_sequence: Tensor | None = None,
    ) -> Out:
        """log_p_rejected, log_q_rejected [pairs]: of whole answers; the retained text's [R]."""
        log_p = log_p_rejected.detach()
        if log_p.isneginf().any():
            raise ValueError("the reference never gives one of the answers to be forgotten; leave it out")
        score = self.divergence.psi(log_p - log_q_rejected)
        if bool(score.detach().isposinf().any()):
            raise ValueError(
                f"the score of {self.divergence!r} is beyond {score.dtype} at an answer that the policy "
                "likes far better than the reference; write a divergence with milder scores, such as "
                "ReverseKL()"
            )
        loss = -(2 / self.beta) * logsigmoid(-self.beta * score).mean()
        metrics = {
            "log_q_forget": log_q_rejected.detach().mean(),
            "log_ratio_forget": (log_q_rejected.detach() - log_p).mean(),
            "score": score.detach().mean(),
        }
        return with_retained(Out(loss, metrics), self.retain, log_q_retain_label, retain_sequence)
