"""BD-KD: forward and reverse KL, the one that is needed more weighted up.

Amara, Sepahvand, Meyer, Gross and Clark, "BD-KD: Balancing the Divergences for Online Knowledge
Distillation", arXiv 2212.12965; on tokens, as the baseline of ABKD (arXiv 2505.04560) and AMiD (arXiv
2510.15982).

    L = < w_F KL(p, q) + w_R KL(q, p) > over tokens
    w_F = W where H(p) > H(q), else 1: the student is too sure, and is spread
    w_R = W where H(q) > H(p), else 1: the student is not sure enough, and is sharpened

W is `weight`; p is the teacher, which stays as it is here, and q the student. The weights carry no gradient.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, on_one_support, require_f_divergence
from fdiv.divergences.kl import KL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._writer import require_sampler
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Offline


@dataclass(frozen=True)
class BDKD:
    """The mean over response tokens of w_F D(p, q) + w_R D(q, p), weighted by the two entropies.

    divergence: covers the teacher; its reverse sharpens the student. KL() is the paper's.
    weight: the factor of the one that is needed more; entropies that agree to rounding need both alike.
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: FDivergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=Exact)
    sampler: Sampler = field(default_factory=Offline)
    weight: float = 3.0

    def __post_init__(self):
        require_f_divergence(self.divergence, "BDKD, which weights D(p, q) against D(q, p),")
        require_sampler(self.sampler)
        if self.estimator.sees != "logits":
            raise TypeError(
                f"BDKD compares entropies of whole rows, which {self.estimator!r} does not see; write "
                "Exact(), TopK(k) or SampledLogits(n)"
            )
        if not 1 <= self.weight < math.inf:
            raise ValueError(
                f"weight is the factor >= 1 of the divergence that is needed more, got {self.weight!r}; "
                "1 is the plain sum of both"
            )

    def __call__(self, *, log_p: Tensor, log_q: Tensor, count: Tensor | float | None = None) -> Out:
        """log_p, log_q [rows, vocab]; count: response tokens of the global batch (default: here)."""
        surer = surplus_certainty(log_p, log_q)
        covering, sharpening = (1 + (self.weight - 1) * side for side in (surer > 0, surer < 0))
        forward = self.estimator(self.divergence, log_p, log_q)
        backward = self.estimator(self.divergence.reverse, log_p, log_q)
        loss = mean_over_tokens(covering * forward + sharpening * backward, count=count)
        return Out(loss, {"student_surer": mean_over_tokens((surer > 0).float())})


@torch.no_grad()
def surplus_certainty(log_p: Tensor, log_q: Tensor) -> Tensor:
    """H(p) - H(q), 0 where that is rounding; [..., vocab] twice -> [...]."""
    log_p, log_q = on_one_support(log_p, log_q)
    of_p, of_q = (torch.special.entr(t.exp()).sum(-1) for t in (log_p, log_q))
    rounding = 16 * torch.finfo(of_p.dtype).eps * torch.maximum(of_p, of_q)
    return torch.where((of_p - of_q).abs() > rounding, of_p - of_q, 0.0)
